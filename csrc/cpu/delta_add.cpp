// delta_add: base plus a linear combination of differences, from the stored dtypes to the output's.
#include "common/parallel.h"
#include "cpu/blocks.h"

namespace dirmerge::DIRMERGE_ISA {

namespace {

// Base, sum and inputs of a block stay in the first-level cache while the tasks pass by.
constexpr std::int64_t block = 2048;
constexpr std::int64_t group = 16;  // blocks per task of a thread

// Not inlined, or GCC interchanges this loop with the one over the tasks and nothing vectorises.
template <typename T, typename V>
[[gnu::noinline]] void add_scaled_difference(const T* weight, const V* origin, V coefficient,
                                             std::int64_t count, V* sum) {
    for (std::int64_t i = 0; i < count; ++i)
        sum[i] += coefficient * (static_cast<V>(widen(weight[i])) - origin[i]);
}

template <typename V>
std::int64_t add_block(const Elements* base, const Elements* weights, const double* coefficients,
                       std::int64_t tasks, Elements result, std::int64_t start, std::int64_t count,
                       std::int64_t next) {
    V origin[block], sum[block];
    if (base != nullptr) prefetch(*base, start + count, next);
    read_origin(base, start, count, origin);
    for (std::int64_t i = 0; i < count; ++i) sum[i] = 0;
    for (std::int64_t t = 0; t < tasks; ++t) {
        prefetch(weights[t], start + count, next);
        with_type(weights[t].dtype, [&](auto type) {
            add_scaled_difference(at<decltype(type)>(weights[t], start), origin,
                                  static_cast<V>(coefficients[t]), count, sum);
        });
    }
    // A difference that is not finite leaves a sum that is not, even times 0: results tell it all.
    return write_sum(origin, sum, V{1}, start, count, result);
}

}  // namespace

void delta_add(const Elements* base, const Elements* weights, const double* coefficients, std::int64_t tasks,
               bool is_double, Elements result, std::int64_t count, std::int64_t* nonfinite, int threads) {
    constexpr std::int64_t span = group * block;
    const std::int64_t spans = (count + span - 1) / span;
    const Scratch scratch(static_cast<std::size_t>(spans) * sizeof(std::int64_t));
    std::int64_t* const counts = static_cast<std::int64_t*>(scratch.data());
    parallel_for(spans, threads_for(count * (tasks + 1), threads), [&](std::int64_t s) {
        const std::int64_t stop = (s + 1) * span < count ? (s + 1) * span : count;
        counts[s] = 0;
        for (std::int64_t start = s * span; start < stop; start += block) {
            const std::int64_t size = stop - start < block ? stop - start : block;
            const std::int64_t rest = count - start - size;
            const std::int64_t next = rest < block ? rest : block;
            counts[s] +=
                is_double ? add_block<double>(base, weights, coefficients, tasks, result, start, size, next)
                          : add_block<float>(base, weights, coefficients, tasks, result, start, size, next);
        }
    });
    *nonfinite = 0;
    for (std::int64_t s = 0; s < spans; ++s) *nonfinite += counts[s];
}

}  // namespace dirmerge::DIRMERGE_ISA
