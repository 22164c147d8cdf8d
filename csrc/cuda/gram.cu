// gram: launch. Reference: dirmerge/ops/gram.py.
#include "gram.cuh"
#include "launch.h"

// result = xᵀx, x: (batch, m, n) of 16-bit or float32 elements by strides; result: (batch, n, n), contiguous
// float32.
DIRMERGE_EXPORT int dirmerge_gram(const void* x, void* result, int dtype, std::int64_t batch, std::int64_t m,
                                  std::int64_t n, std::int64_t stride_batch, std::int64_t stride_m,
                                  std::int64_t stride_n, void* stream) {
    using namespace dirmerge::cuda;
    const std::int64_t tiles_across = ceil_div(n, gram::TILE);
    const std::int64_t blocks = batch * (tiles_across * (tiles_across + 1) / 2);
    return with_single(dtype, [&](auto type) {
        using T = decltype(type);
        return launch(gram_kernel<T>, blocks, gram::THREADS, 0, stream, static_cast<const T*>(x),
                      static_cast<float*>(result), batch, m, n, stride_batch, stride_m, stride_n);
    });
}
