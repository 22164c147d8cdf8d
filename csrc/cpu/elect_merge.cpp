// elect_merge: sign election with a disjoint mean and thresholds in one pass over the tasks.
#include "common/parallel.h"
#include "cpu/elect.h"

namespace dirmerge::DIRMERGE_ISA {

namespace {

template <typename T, typename V>
void elect_segment(const T* x, std::int64_t tasks, std::int64_t task_stride, const V* thresholds,
                   const V* weights, std::int64_t count, T* result) {
    Election<V> sums;
    clear(sums, count);
    for (std::int64_t t = 0; t < tasks; ++t)
        add_to_election(x + t * task_stride, weights == nullptr ? V{1} : weights[t],
                        thresholds == nullptr ? V{0} : thresholds[t], count, sums);
    for (std::int64_t i = 0; i < count; ++i) {
        const V merged = elected(sums, i);
        narrow(merged, result[i]);
    }
}

template <typename T>
void elect(const T* x, std::int64_t tasks, std::int64_t count, std::int64_t task_stride,
           const void* thresholds, const void* weights, T* result, int threads) {
    using V = Compute<T>;
    constexpr std::int64_t span = 16 * election_width;
    const std::int64_t spans = (count + span - 1) / span;
    parallel_for(spans, threads_for(tasks * count, threads), [&](std::int64_t i) {
        const std::int64_t stop = count - i * span < span ? count : (i + 1) * span;
        for (std::int64_t start = i * span; start < stop; start += election_width)
            elect_segment(x + start, tasks, task_stride, static_cast<const V*>(thresholds),
                          static_cast<const V*>(weights),
                          stop - start < election_width ? stop - start : election_width, result + start);
    });
}

}  // namespace

void elect_merge(Elements x, std::int64_t tasks, std::int64_t count, std::int64_t task_stride,
                 const void* thresholds, const void* weights, void* result, int threads) {
    with_type(x.dtype, [&](auto type) {
        using T = decltype(type);
        elect(static_cast<const T*>(x.data), tasks, count, task_stride, thresholds, weights,
              static_cast<T*>(result), threads);
    });
}

}  // namespace dirmerge::DIRMERGE_ISA
