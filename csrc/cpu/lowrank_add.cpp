// lowrank_add: the part after the product: base + scale · update, rounded to the output's dtype.
#include "common/parallel.h"
#include "cpu/kernels.h"

namespace dirmerge::DIRMERGE_ISA {

namespace {

template <typename B, typename O>
void add_row(const B* base, const float* update, float scale, std::int64_t count, O* result) {
    for (std::int64_t i = 0; i < count; ++i) narrow(widen(base[i]) + scale * update[i], result[i]);
}

}  // namespace

void lowrank_add(Matrix base, Matrix update, float scale, Matrix result, int threads) {
    with_type(base.dtype, [&](auto base_type) {
        using B = decltype(base_type);
        if constexpr (sizeof(B) == 2) {
            with_type(result.dtype, [&](auto result_type) {
                using O = decltype(result_type);
                parallel_for(base.rows, threads_for(base.rows * base.cols, threads), [&](std::int64_t i) {
                    add_row(static_cast<const B*>(base.data) + i * base.row_stride,
                            static_cast<const float*>(update.data) + i * update.row_stride, scale, base.cols,
                            static_cast<O*>(result.data) + i * result.row_stride);
                });
            });
        }
    });
}

}  // namespace dirmerge::DIRMERGE_ISA
