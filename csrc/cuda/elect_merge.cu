// elect_merge: launch. Reference: dirmerge/ops/elect_merge.py.
#include "elect_merge.cuh"
#include "launch.h"

// x: (tasks, count), each x[t] contiguous; thresholds, weights: (tasks,) of the compute type, or null;
// result: (count,), contiguous, the dtype of x.
DIRMERGE_EXPORT int dirmerge_elect_merge(const void* x, const void* thresholds, const void* weights,
                                         void* result, int dtype, std::int64_t tasks, std::int64_t count,
                                         std::int64_t stride_t, void* stream) {
    using namespace dirmerge::cuda;
    return with_element(dtype, [&](auto type) {
        using T = decltype(type);
        using V = Compute<T>;
        constexpr std::int64_t bytes = sizeof(T);
        const bool wide = aligned(x, stride_t * bytes) && aligned(result, count * bytes);
        constexpr int WIDE = elect_merge::WIDE<T>;
        const int width = wide ? WIDE : 1;
        const auto kernel = wide ? elect_merge_kernel<T, WIDE> : elect_merge_kernel<T, 1>;
        const std::int64_t blocks = ceil_div(count, elect_merge::THREADS * width);
        return launch(kernel, blocks, elect_merge::THREADS, 0, stream, static_cast<const T*>(x),
                      static_cast<const V*>(thresholds), static_cast<const V*>(weights),
                      static_cast<T*>(result), tasks, count, stride_t);
    });
}
