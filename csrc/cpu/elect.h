// Sign election with a disjoint mean over a segment of entries, task after task.
#pragma once

#include "cpu/kernels.h"

namespace dirmerge::DIRMERGE_ISA {

namespace {

// Entries whose sums stay in the first-level cache while the tasks pass by.
constexpr std::int64_t election_width = 512;

// Both sides of the election are summed apart: the sign of the sum is that of the heavier side.
template <typename V>
struct Election {
    V positive[election_width], negative[election_width], positive_weight[election_width],
        negative_weight[election_width];
};

// Adds one task. The choices are made by masks on the bits: written as conditions they become branches, and
// nothing vectorises. Not inlined, or GCC interchanges this loop with the one over the tasks, to the same
// effect.
template <typename T, typename V>
[[gnu::noinline]] void add_to_election(const T* x, V weight, V threshold, std::int64_t count,
                                       Election<V>& sums) {
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

template <typename V>
void clear(Election<V>& sums, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i)
        sums.positive[i] = sums.negative[i] = sums.positive_weight[i] = sums.negative_weight[i] = 0;
}

// The mean of the heavier side.
template <typename V>
V elected(const Election<V>& sums, std::int64_t i) {
    const V positive = sums.positive[i];
    const V negative = sums.negative[i];
    V merged = positive + negative;  // no side is heavier: 0, or NaN where an entry is
    merged = positive > -negative ? positive / sums.positive_weight[i] : merged;
    merged = positive < -negative ? negative / sums.negative_weight[i] : merged;
    return merged;
}

}  // namespace

}  // namespace dirmerge::DIRMERGE_ISA
