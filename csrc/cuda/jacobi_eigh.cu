// jacobi_eigh: launch. Reference: dirmerge/ops/jacobi_eigh.py.
#include "jacobi_eigh.cuh"
#include "launch.h"

namespace {

template <typename T, int IN_SHARED>
int start(const void* a, void* values, void* vectors, void* sweeps, void* workspace, std::int64_t batch,
          std::int64_t n, std::int64_t stride_batch, std::int64_t stride_row, std::int64_t stride_column,
          void* stream) {
    using namespace dirmerge::cuda;
    const std::int64_t bytes = jacobi_eigh::shared_bytes(n, IN_SHARED, sizeof(T));
    return launch(jacobi_eigh_kernel<T, IN_SHARED>, batch, jacobi::warps(static_cast<int>(n)) * 32,
                  static_cast<std::size_t>(bytes), stream, static_cast<const T*>(a), static_cast<T*>(values),
                  static_cast<T*>(vectors), static_cast<int*>(sweeps), static_cast<T*>(workspace), batch, n,
                  stride_batch, stride_row, stride_column);
}

}  // namespace

// a = w diag(λ) wᵀ; a: (batch, n, n) by strides, n <= 128, float32 or float64 like values λ: (batch, n) and
// vectors w: (batch, n, n); sweeps: (batch) int32. in_shared: how many of a and w stay in shared memory,
// which must suffice for them; workspace: jacobi_eigh::workspace_entries for each matrix, for the others.
DIRMERGE_EXPORT int dirmerge_jacobi_eigh(const void* a, void* values, void* vectors, void* sweeps,
                                         void* workspace, int dtype, std::int64_t in_shared,
                                         std::int64_t batch, std::int64_t n, std::int64_t stride_batch,
                                         std::int64_t stride_row, std::int64_t stride_column, void* stream) {
    using namespace dirmerge::cuda;
    if (n > jacobi::SMALL || in_shared < 0 || in_shared > 2) return INVALID_VALUE;
    if (n == 0) return SUCCESS;
    const auto of = [&](auto type) {
        using T = decltype(type);
        const auto with = in_shared == 0 ? start<T, 0> : in_shared == 1 ? start<T, 1> : start<T, 2>;
        return with(a, values, vectors, sweeps, workspace, batch, n, stride_batch, stride_row, stride_column,
                    stream);
    };
    if (dtype == float32) return of(float{});
    if (dtype == float64) return of(double{});
    return INVALID_VALUE;
}
