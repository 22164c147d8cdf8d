// elect_merge: sign election with a disjoint mean and thresholds in one pass over the tasks.
#include "common/parallel.h"
#include "cpu/kernels.h"

namespace dirmerge::DIRMERGE_ISA {

namespace {

// Entries whose sums stay in the first-level cache while the tasks pass by.
constexpr std::int64_t width = 512;

// Both sides of the election are summed apart: the sign of the sum is that of the heavier side.
template <typename V>
struct Sums {
    V positive[width], negative[width], positive_weight[width], negative_weight[width];
};

// Adds one task. The choices are made by masks on the bits: written as conditions they become branches, and
// nothing vectorises. Not inlined, or GCC interchanges this loop with the one over the tasks, to the same
// effect.
template <typename T, typename V>
[[gnu::noinline]] void add_task(const T* x, V weight, V threshold, std::int64_t count, Sums<V>& sums) {
    using U = decltype(to_bits(V{}));
    constexpr int sign_shift = 8 * static_cast<int>(sizeof(U)) - 1;
    const U weight_bits = to_bits(weight);
    // Magnitudes order as their bits do. A threshold that no magnitude is below keeps everything.
    const U threshold_bits = threshold > 0 ? to_bits(threshold) : U{0};
    for (std::int64_t i = 0; i < count; ++i) {
        const U bits = to_bits(widen(x[i]));
        const U magnitude = bits << 1 >> 1;
        const U has_sign = U{0} - static_cast<U>((magnitude >= threshold_bits) & (magnitude != 0));
        const U is_negative = U{0} - (bits >> sign_shift);
        sums.positive[i] += from_bits(bits & has_sign & ~is_negative) * weight;
        sums.negative[i] += from_bits(bits & has_sign & is_negative) * weight;
        sums.positive_weight[i] += from_bits(weight_bits & has_sign & ~is_negative);
        sums.negative_weight[i] += from_bits(weight_bits & has_sign & is_negative);
    }
}

template <typename T, typename V>
void elect_segment(const T* x, std::int64_t tasks, std::int64_t task_stride, const V* thresholds,
                   const V* weights, std::int64_t count, T* result) {
    Sums<V> sums;
    for (std::int64_t i = 0; i < count; ++i)
        sums.positive[i] = sums.negative[i] = sums.positive_weight[i] = sums.negative_weight[i] = 0;
    for (std::int64_t t = 0; t < tasks; ++t)
        add_task(x + t * task_stride, weights == nullptr ? V{1} : weights[t],
                 thresholds == nullptr ? V{0} : thresholds[t], count, sums);
    for (std::int64_t i = 0; i < count; ++i) {
        const V positive = sums.positive[i];
        const V negative = sums.negative[i];
        V merged = positive + negative;  // no side is heavier: 0, or NaN where an entry is
        merged = positive > -negative ? positive / sums.positive_weight[i] : merged;
        merged = positive < -negative ? negative / sums.negative_weight[i] : merged;
        narrow(merged, result[i]);
    }
}

template <typename T>
void elect(const T* x, std::int64_t tasks, std::int64_t count, std::int64_t task_stride,
           const void* thresholds, const void* weights, T* result, int threads) {
    using V = Compute<T>;
    constexpr std::int64_t span = 16 * width;
    const std::int64_t spans = (count + span - 1) / span;
    parallel_for(spans, threads_for(tasks * count, threads), [&](std::int64_t i) {
        const std::int64_t stop = count - i * span < span ? count : (i + 1) * span;
        for (std::int64_t start = i * span; start < stop; start += width)
            elect_segment(x + start, tasks, task_stride, static_cast<const V*>(thresholds),
                          static_cast<const V*>(weights), stop - start < width ? stop - start : width,
                          result + start);
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
