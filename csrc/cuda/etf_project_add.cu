// etf_project_add: launch. Reference: dirmerge/ops/etf_project_add.py.
#include "etf_project_add.cuh"
#include "launch.h"

// The bytes of memory on the device, aligned to 8, that a call for n columns works in.
DIRMERGE_EXPORT std::int64_t dirmerge_etf_project_add_workspace(std::int64_t n) {
    return dirmerge::cuda::etf_project_add::SLICES * n * static_cast<std::int64_t>(sizeof(double));
}

// result = base + scale · K/(K − 1) · (update − frame_sum (frame_sumᵀ update) / K). base and update: (m, n)
// by strides, frame_sum: (m,), contiguous; update and frame_sum of the compute type of base. result: (m, n),
// contiguous.
DIRMERGE_EXPORT int dirmerge_etf_project_add(const void* base, const void* update, const void* frame_sum,
                                             void* result, void* workspace, int dtype, int out_dtype,
                                             std::int64_t m, std::int64_t n, std::int64_t base_stride_m,
                                             std::int64_t base_stride_n, std::int64_t stride_m,
                                             std::int64_t stride_n, std::int64_t K, double scale,
                                             void* stream) {
    using namespace dirmerge::cuda;
    using namespace etf_project_add;
    const double vertices = static_cast<double>(K);
    const std::int64_t column_blocks = ceil_div(n, COLUMNS);
    return with_element(dtype, [&](auto type) {
        using T = decltype(type);
        using V = Compute<T>;
        const V* const D = static_cast<const V*>(update);
        const V* const q = static_cast<const V*>(frame_sum);
        V* const partial = static_cast<V*>(workspace);
        const int code = launch(etf_column_product_kernel<V>, SLICES * column_blocks, THREADS, 0, stream, D,
                                q, partial, m, n, stride_m, stride_n);
        if (code != SUCCESS) return code;
        return with_element(out_dtype, [&](auto out_type) {
            using O = decltype(out_type);
            return launch(etf_rank_one_add_kernel<T, O>, ceil_div(m, ROWS) * column_blocks, THREADS, 0,
                          stream, static_cast<const T*>(base), D, q, partial, static_cast<O*>(result), m, n,
                          base_stride_m, base_stride_n, stride_m, stride_n, 1 / vertices,
                          scale * (vertices / (vertices - 1)));
        });
    });
}
