// delta_elect_add: base plus the elected mean of the differences, from the stored dtypes to the output's.
#include "common/parallel.h"
#include "cpu/blocks.h"
#include "cpu/elect.h"

namespace dirmerge::DIRMERGE_ISA {

namespace {

constexpr std::int64_t group = 64;  // segments per task of a thread

template <typename V>
std::int64_t elect_segment(const Elements* base, const Elements* weights, const V* thresholds,
                           const double* election_weights, std::int64_t tasks, V scale, Elements result,
                           std::int64_t start, std::int64_t count, std::int64_t next) {
    Election<V> sums;
    V origin[election_width], values[election_width];
    if (base != nullptr) prefetch(*base, start + count, next);
    read_origin(base, start, count, origin);
    clear(sums, count);
    for (std::int64_t t = 0; t < tasks; ++t) {
        prefetch(weights[t], start + count, next);
        read_difference(weights[t], origin, start, count, values);
        add_to_election(values, static_cast<V>(election_weights[t]),
                        thresholds == nullptr ? V{0} : thresholds[t], count, sums);
    }
    for (std::int64_t i = 0; i < count; ++i) values[i] = elected(sums, i);
    // A difference that is not finite wins its election, or makes it NaN: results tell it all.
    return write_sum(origin, values, scale, start, count, result);
}

template <typename V>
void elect_all(const Elements* base, const Elements* weights, const V* thresholds,
               const double* election_weights, std::int64_t tasks, V scale, Elements result,
               std::int64_t count, std::int64_t* nonfinite, int threads) {
    constexpr std::int64_t span = group * election_width;
    const std::int64_t spans = (count + span - 1) / span;
    const Scratch scratch(static_cast<std::size_t>(spans) * sizeof(std::int64_t));
    std::int64_t* const counts = static_cast<std::int64_t*>(scratch.data());
    parallel_for(spans, threads_for(count * (tasks + 1), threads), [&](std::int64_t s) {
        const std::int64_t stop = (s + 1) * span < count ? (s + 1) * span : count;
        counts[s] = 0;
        for (std::int64_t start = s * span; start < stop; start += election_width) {
            const std::int64_t size = stop - start < election_width ? stop - start : election_width;
            const std::int64_t rest = count - start - size;
            const std::int64_t next = rest < election_width ? rest : election_width;
            counts[s] += elect_segment(base, weights, thresholds, election_weights, tasks, scale, result,
                                       start, size, next);
        }
    });
    *nonfinite = 0;
    for (std::int64_t s = 0; s < spans; ++s) *nonfinite += counts[s];
}

}  // namespace

void delta_elect_add(const Elements* base, const Elements* weights, const void* thresholds,
                     const double* election_weights, std::int64_t tasks, bool is_double, double scale,
                     Elements result, std::int64_t count, std::int64_t* nonfinite, int threads) {
    if (is_double)
        elect_all(base, weights, static_cast<const double*>(thresholds), election_weights, tasks, scale,
                  result, count, nonfinite, threads);
    else
        elect_all(base, weights, static_cast<const float*>(thresholds), election_weights, tasks,
                  static_cast<float>(scale), result, count, nonfinite, threads);
}

}  // namespace dirmerge::DIRMERGE_ISA
