// jacobi_svd: launch. Reference: dirmerge/ops/jacobi_svd.py.
#include "jacobi_svd.cuh"
#include "launch.h"

namespace {

template <typename T, int IN_SHARED>
int start(const void* a, void* u, void* s, void* v, void* sweeps, void* workspace, std::int64_t batch,
          std::int64_t m, std::int64_t n, std::int64_t stride_batch, std::int64_t stride_row,
          std::int64_t stride_column, void* stream) {
    using namespace dirmerge::cuda;
    const std::int64_t bytes = jacobi_svd::shared_bytes(m, n, IN_SHARED, sizeof(T));
    return launch(jacobi_svd_kernel<T, IN_SHARED>, batch, jacobi::warps(static_cast<int>(n)) * 32,
                  static_cast<std::size_t>(bytes), stream, static_cast<const T*>(a), static_cast<T*>(u),
                  static_cast<T*>(s), static_cast<T*>(v), static_cast<int*>(sweeps),
                  static_cast<T*>(workspace), batch, m, n, stride_batch, stride_row, stride_column);
}

}  // namespace

// a = u diag(s) vᵀ; a: (batch, m, n) by strides with m >= n and n <= 128, float32 or float64 like u: (batch,
// m, n), s: (batch, n) and v: (batch, n, n); sweeps: (batch) int32. in_shared: how many of a and v stay in
// shared memory, which must suffice for them; workspace: jacobi_svd::workspace_entries for each matrix, for
// the others.
DIRMERGE_EXPORT int dirmerge_jacobi_svd(const void* a, void* u, void* s, void* v, void* sweeps,
                                        void* workspace, int dtype, std::int64_t in_shared,
                                        std::int64_t batch, std::int64_t m, std::int64_t n,
                                        std::int64_t stride_batch, std::int64_t stride_row,
                                        std::int64_t stride_column, void* stream) {
    using namespace dirmerge::cuda;
    if (n > jacobi::SMALL || m < n || m > 0x7FFFFFFF / jacobi::SMALL || in_shared < 0 || in_shared > 2)
        return INVALID_VALUE;
    if (n == 0) return SUCCESS;
    const auto of = [&](auto type) {
        using T = decltype(type);
        const auto with = in_shared == 0 ? start<T, 0> : in_shared == 1 ? start<T, 1> : start<T, 2>;
        return with(a, u, s, v, sweeps, workspace, batch, m, n, stride_batch, stride_row, stride_column,
                    stream);
    };
    if (dtype == float32) return of(float{});
    if (dtype == float64) return of(double{});
    return INVALID_VALUE;
}
