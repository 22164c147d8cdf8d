// etf_project: launch. Reference: dirmerge/ops/etf_project.py.
#include "etf_project.cuh"
#include "launch.h"

// result = K/(K − 1) · (core − mean over k), core: (batch, K, n) by strides, result: contiguous, the dtype of
// core.
DIRMERGE_EXPORT int dirmerge_etf_project(const void* core, void* result, int dtype, std::int64_t batch,
                                         std::int64_t K, std::int64_t n, std::int64_t stride_batch,
                                         std::int64_t stride_k, std::int64_t stride_n, void* stream) {
    using namespace dirmerge::cuda;
    const double scale = static_cast<double>(K) / static_cast<double>(K - 1);
    const std::int64_t blocks = batch * ceil_div(n, etf_project::COLUMNS);
    return with_element(dtype, [&](auto type) {
        using T = decltype(type);
        const auto kernel =
            K <= etf_project::WHOLE_K ? etf_project_kernel<T, true> : etf_project_kernel<T, false>;
        return launch(kernel, blocks, etf_project::THREADS, 0, stream, static_cast<const T*>(core),
                      static_cast<T*>(result), batch, K, n, stride_batch, stride_k, stride_n, scale);
    });
}
