// delta: D = finetuned − base with Σ D² and the count of non-finite entries, one pass over memory.
#include "common/parallel.h"
#include "cpu/kernels.h"

namespace dirmerge::DIRMERGE_ISA {

namespace {

// Small enough that a block is still in the first-level cache when its non-finite entries must be counted,
// and the unit of the sum: partial sums are added in block order, whatever the number of threads.
constexpr std::int64_t block = 4096;
constexpr int lanes = 16;

template <typename V>
bool is_finite(V x) {
    return x - x == V{0};
}

template <typename A, typename B, typename V>
void delta_block(const A* finetuned, const B* base, V* value, std::int64_t count, double* sum,
                 std::int64_t* nonfinite) {
    double sums[lanes] = {};
    std::int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        for (int l = 0; l < lanes; ++l) {
            const V d = static_cast<V>(widen(finetuned[i + l])) - static_cast<V>(widen(base[i + l]));
            value[i + l] = d;
            sums[l] += static_cast<double>(d) * static_cast<double>(d);
        }
    }
    for (; i < count; ++i) {
        const V d = static_cast<V>(widen(finetuned[i])) - static_cast<V>(widen(base[i]));
        value[i] = d;
        sums[0] += static_cast<double>(d) * static_cast<double>(d);
    }
    for (int width = lanes / 2; width > 0; width /= 2)
        for (int l = 0; l < width; ++l) sums[l] += sums[l + width];
    *sum = sums[0];
    *nonfinite = 0;
    // A finite sum of squares has finite terms only. The converse fails for doubles above 1e154, which the
    // count finds.
    if (!is_finite(sums[0]))
        for (std::int64_t j = 0; j < count; ++j) *nonfinite += !is_finite(value[j]);
}

}  // namespace

void delta(Elements finetuned, Elements base, void* value, std::int64_t count, double* sum_of_squares,
           std::int64_t* nonfinite, int threads) {
    const std::int64_t blocks = (count + block - 1) / block;
    const Scratch scratch(static_cast<std::size_t>(blocks) * (sizeof(double) + sizeof(std::int64_t)));
    double* const sums = static_cast<double*>(scratch.data());
    std::int64_t* const counts = reinterpret_cast<std::int64_t*>(sums + blocks);
    constexpr std::int64_t group = 16;  // blocks per task
    with_type(finetuned.dtype, [&](auto a) {
        with_type(base.dtype, [&](auto b) {
            using A = decltype(a);
            using B = decltype(b);
            using V = std::conditional_t<std::is_same_v<A, double>, double, Compute<B>>;
            parallel_for((blocks + group - 1) / group, threads_for(count, threads), [&](std::int64_t g) {
                const std::int64_t last = (g + 1) * group < blocks ? (g + 1) * group : blocks;
                for (std::int64_t i = g * group; i < last; ++i) {
                    const std::int64_t start = i * block;
                    delta_block(static_cast<const A*>(finetuned.data) + start,
                                static_cast<const B*>(base.data) + start, static_cast<V*>(value) + start,
                                count - start < block ? count - start : block, sums + i, counts + i);
                }
            });
        });
    });
    *sum_of_squares = 0;
    *nonfinite = 0;
    for (std::int64_t i = 0; i < blocks; ++i) {
        *sum_of_squares += sums[i];
        *nonfinite += counts[i];
    }
}

}  // namespace dirmerge::DIRMERGE_ISA
