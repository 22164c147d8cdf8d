// elect_merge: launch. Reference: dirmerge/ops/elect_merge.py.
#include "elect_merge.cuh"
#include "launch.h"

// x: (tasks, rows, columns), rows contiguous; thresholds, weights: (tasks,) of the compute type, or null;
// starts: (block_count + 1,) int64 on the device, or null; result: (rows, columns), contiguous, the dtype of
// x.
DIRMERGE_EXPORT int dirmerge_elect_merge(const void* x, const void* thresholds, const void* weights,
                                         const void* starts, void* result, int dtype, std::int64_t tasks,
                                         std::int64_t rows, std::int64_t columns, std::int64_t stride_t,
                                         std::int64_t stride_row, std::int64_t block_count, void* stream) {
    using namespace dirmerge::cuda;
    return with_element(dtype, [&](auto type) {
        using T = decltype(type);
        using V = Compute<T>;
        constexpr std::int64_t bytes = sizeof(T);
        const bool wide =
            aligned(x, stride_t * bytes, stride_row * bytes) && aligned(result, columns * bytes);
        constexpr int WIDE = elect_merge::WIDE<T>;
        const int width = wide ? WIDE : 1;
        const auto kernel = wide ? elect_merge_kernel<T, WIDE> : elect_merge_kernel<T, 1>;
        const std::int64_t blocks = rows * ceil_div(columns, elect_merge::THREADS * width);
        return launch(kernel, blocks, elect_merge::THREADS, 0, stream, static_cast<const T*>(x),
                      static_cast<const V*>(thresholds), static_cast<const V*>(weights),
                      static_cast<const int64*>(starts), static_cast<T*>(result), tasks, rows, columns,
                      stride_t, stride_row, block_count);
    });
}
