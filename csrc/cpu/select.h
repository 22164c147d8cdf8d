// Exact selection by the bits of the magnitudes, which order as integers do.
//
// The number is found digit by digit, from the most significant bits down: count the digits of those entries
// that agree with what is known, and see in which digit the k-th largest lies. After a digit that leaves few
// entries these are copied out, and the rest is done among them. Of many numbers a sample tells two bounds
// that the number almost surely lies between: one pass counts what is above and copies what is between, and
// is the only one unless the sample was misleading.
#pragma once

#include <cmath>

#include "common/parallel.h"
#include "cpu/kernels.h"

namespace dirmerge::DIRMERGE_ISA {

namespace {

constexpr int digit_bits = 11;
constexpr std::int64_t bins = std::int64_t{1} << digit_bits;
constexpr std::int64_t piece = 1 << 15;  // elements that are read at a time
constexpr int group = 32;                // elements that are skipped together
constexpr int narrow_group = 16;         // the same where a few in a hundred are not skipped
constexpr std::int64_t sample_blocks = 256, sample_block = 256;
constexpr std::int64_t sample_from = 8 * sample_blocks * sample_block;

// A half-open range of magnitudes' bits: those that agree with the digits found so far.
template <typename U>
struct Range {
    U low, width_minus_1;
    bool contains(U bits) const { return bits - low <= width_minus_1; }
};

// Numbers to select from that lie in memory. A source gives their bits piece by piece.
template <typename U>
struct InMemory {
    using Bits = U;
    static constexpr bool needs_buffer = false;
    const U* x;
    const U* read(std::int64_t start, std::int64_t, U*) const { return x + start; }
};

template <typename U>
constexpr U magnitude_mask = static_cast<U>(~U{0}) >> 1;

// Counts the digits at `shift` of the entries in range. Once `k` entries at or above a digit are seen,
// entries below it cannot be the k-th largest, and whole groups of them are skipped: with a small k nearly
// all are. Odd entries are counted apart: neighbours often share a digit, and their increments would wait for
// each other.
template <typename Source, typename U>
void count_digits(const Source& source, std::int64_t first, std::int64_t count, Range<U> range, int shift,
                  std::int64_t k, U* buffer, std::int64_t* counts) {
    std::int64_t odd_counts[bins] = {};
    for (std::int64_t d = 0; d < bins; ++d) counts[d] = 0;
    const U top = range.low + range.width_minus_1;
    U bound = range.low;
    for (std::int64_t start = 0; start < count; start += piece) {
        const std::int64_t size = count - start < piece ? count - start : piece;
        const U* const x = source.read(first + start, size, buffer);
        std::int64_t i = 0;
        for (; i + group <= size; i += group) {
            U any = 0;
            for (int l = 0; l < group; ++l) {
                const U bits = x[i + l] & magnitude_mask<U>;
                any |= static_cast<U>(bits >= bound && bits <= top);
            }
            if (!any) continue;
            for (int l = 0; l < group; l += 2) {
                const U even = x[i + l] & magnitude_mask<U>;
                const U odd = x[i + l + 1] & magnitude_mask<U>;
                if (even >= bound && even <= top) ++counts[(even - range.low) >> shift];
                if (odd >= bound && odd <= top) ++odd_counts[(odd - range.low) >> shift];
            }
        }
        for (; i < size; ++i) {
            const U bits = x[i] & magnitude_mask<U>;
            if (bits >= bound && bits <= top) ++counts[(bits - range.low) >> shift];
        }
        for (std::int64_t d = 0; d < bins; ++d) {
            counts[d] += odd_counts[d];
            odd_counts[d] = 0;
        }
        std::int64_t above = 0;
        for (std::int64_t d = bins - 1; d >= 0; --d) {
            above += counts[d];
            if (above >= k) {
                bound = range.low + (static_cast<U>(d) << shift);
                break;
            }
        }
    }
}

template <typename Source, typename U>
void copy_in_range(const Source& source, std::int64_t first, std::int64_t count, Range<U> range, U* buffer,
                   U* out) {
    std::int64_t copied = 0;
    for (std::int64_t start = 0; start < count; start += piece) {
        const std::int64_t size = count - start < piece ? count - start : piece;
        const U* const x = source.read(first + start, size, buffer);
        std::int64_t i = 0;
        for (; i + group <= size; i += group) {
            U any = 0;
            for (int l = 0; l < group; ++l)
                any |= static_cast<U>(range.contains(x[i + l] & magnitude_mask<U>));
            if (!any) continue;
            for (int l = 0; l < group; ++l)
                if (range.contains(x[i + l] & magnitude_mask<U>)) out[copied++] = x[i + l];
        }
        for (; i < size; ++i)
            if (range.contains(x[i] & magnitude_mask<U>)) out[copied++] = x[i];
    }
}

// What is known of the number that is looked for: its range, its rank in the range, the bits to come.
template <typename U>
struct Search {
    Range<U> range{0, magnitude_mask<U>};
    int undecided = 8 * static_cast<int>(sizeof(U)) - 1;
    std::int64_t k;
};

// Finds digits, until all are known or, if `kept` is given, the entries in range are few enough to be copied
// there. Returns their number, or 0.
template <typename Source, typename U>
std::int64_t narrow_search(const Source& source, std::int64_t count, int threads, Search<U>& search,
                           U* kept) {
    const Scratch counts_memory(static_cast<std::size_t>(threads) * bins * sizeof(std::int64_t));
    std::int64_t* const counts = static_cast<std::int64_t*>(counts_memory.data());
    const std::size_t buffer_size = Source::needs_buffer ? piece : 0;
    const Scratch buffers_memory(static_cast<std::size_t>(threads) * buffer_size * sizeof(U));
    U* const buffers = static_cast<U*>(buffers_memory.data());
    // Of whole pieces, so that a source sees the same pieces at every pass.
    const std::int64_t slice = ((count + threads - 1) / threads + piece - 1) / piece * piece;
    const auto for_slices = [&](const auto& body) {
        parallel_for(threads, threads, [&](std::int64_t t) {
            const std::int64_t start = t * slice < count ? t * slice : count;
            const std::int64_t size = count - start < slice ? count - start : slice;
            body(t, start, size, buffers + static_cast<std::size_t>(t) * buffer_size);
        });
    };
    while (search.undecided > 0) {
        const Range<U> range = search.range;
        const int shift = search.undecided > digit_bits ? search.undecided - digit_bits : 0;
        for_slices([&](std::int64_t t, std::int64_t start, std::int64_t size, U* buffer) {
            count_digits(source, start, size, range, shift, search.k, buffer, counts + t * bins);
        });
        const auto total = [&](std::int64_t d) {
            std::int64_t sum = 0;
            for (int t = 0; t < threads; ++t) sum += counts[t * bins + d];
            return sum;
        };
        std::int64_t digit = bins - 1;
        for (; total(digit) < search.k; --digit) search.k -= total(digit);
        search.range = {static_cast<U>(range.low + (static_cast<U>(digit) << shift)),
                        static_cast<U>((U{1} << shift) - 1)};
        search.undecided = shift;
        const std::int64_t remaining = total(digit);
        if (search.undecided > 0 && kept != nullptr && remaining <= count / 16) {
            // The counts of this digit are complete in every slice, so each slice knows where its entries go.
            for_slices([&](std::int64_t t, std::int64_t start, std::int64_t size, U* buffer) {
                std::int64_t offset = 0;
                for (std::int64_t s = 0; s < t; ++s) offset += counts[s * bins + digit];
                copy_in_range(source, start, size, search.range, buffer, kept + offset);
            });
            return remaining;
        }
    }
    return 0;
}

// Counts the entries above a range and copies those in it. Returns how many were copied, or -1 if there are
// more than `capacity`.
template <typename Source, typename U>
std::int64_t split_at(const Source& source, std::int64_t first, std::int64_t count, Range<U> range, U* buffer,
                      U* out, std::int64_t capacity, std::int64_t& above) {
    const U top = range.low + range.width_minus_1;
    std::int64_t copied = 0;
    above = 0;
    for (std::int64_t start = 0; start < count; start += piece) {
        const std::int64_t size = count - start < piece ? count - start : piece;
        const U* const x = source.read(first + start, size, buffer);
        std::int64_t i = 0;
        for (; i + narrow_group <= size; i += narrow_group) {
            U higher = 0, inside = 0;
            for (int l = 0; l < narrow_group; ++l) {
                const U bits = x[i + l] & magnitude_mask<U>;
                higher += static_cast<U>(bits > top);
                inside += static_cast<U>(bits - range.low <= range.width_minus_1);
            }
            above += static_cast<std::int64_t>(higher);
            if (!inside) continue;
            if (copied + narrow_group > capacity) return -1;
            for (int l = 0; l < narrow_group; ++l) {
                const U bits = x[i + l] & magnitude_mask<U>;
                out[copied] = bits;
                copied += range.contains(bits);
            }
        }
        if (copied + narrow_group > capacity) return -1;
        for (; i < size; ++i) {
            const U bits = x[i] & magnitude_mask<U>;
            above += bits > top;
            out[copied] = bits;
            copied += range.contains(bits);
        }
    }
    return copied;
}

// Bounds of the k-th largest of `count` numbers, from a sample: six standard deviations of its rank apart.
template <typename Source, typename U>
Range<U> sampled_range(const Source& source, std::int64_t count, std::int64_t k) {
    constexpr std::int64_t size = sample_blocks * sample_block;
    const Scratch memory(static_cast<std::size_t>(size) * sizeof(U));
    U* const sample = static_cast<U*>(memory.data());
    U buffer[sample_block];
    for (std::int64_t b = 0; b < sample_blocks; ++b) {
        const U* const x = source.read(b * (count / sample_blocks), sample_block, buffer);
        std::memcpy(sample + b * sample_block, x, static_cast<std::size_t>(sample_block) * sizeof(U));
    }
    const double share = static_cast<double>(k) / static_cast<double>(count);
    const double rank = share * static_cast<double>(size);
    const double margin = 6 * std::sqrt(rank * (1 - share)) + 8;
    const auto bits_at = [&](double wanted) {
        Search<U> search;
        search.k = wanted < 1                           ? 1
                   : wanted > static_cast<double>(size) ? size
                                                        : static_cast<std::int64_t>(wanted);
        narrow_search(InMemory<U>{sample}, size, 1, search, static_cast<U*>(nullptr));
        return search.range.low;
    };
    const U high = rank - margin < 1 ? magnitude_mask<U> : bits_at(rank - margin);
    const U low = rank + margin > static_cast<double>(size) ? U{0} : bits_at(rank + margin);
    return {low, static_cast<U>(high - low)};
}

// Finds the number between the bounds that a sample gives; false where it is not there, or too much else is.
template <typename Source, typename U>
bool select_by_sample(const Source& source, std::int64_t count, int threads, Search<U>& search, U* kept) {
    const Range<U> range = sampled_range<Source, U>(source, count, search.k);
    const std::size_t buffer_size = Source::needs_buffer ? piece : 0;
    const Scratch buffers_memory(static_cast<std::size_t>(threads) * buffer_size * sizeof(U));
    const Scratch counts_memory(static_cast<std::size_t>(2 * threads) * sizeof(std::int64_t));
    U* const buffers = static_cast<U*>(buffers_memory.data());
    std::int64_t* const counts = static_cast<std::int64_t*>(counts_memory.data());
    const std::int64_t slice = ((count + threads - 1) / threads + piece - 1) / piece * piece;
    parallel_for(threads, threads, [&](std::int64_t t) {
        const std::int64_t start = t * slice < count ? t * slice : count;
        const std::int64_t size = count - start < slice ? count - start : slice;
        counts[2 * t] =
            split_at(source, start, size, range, buffers + static_cast<std::size_t>(t) * buffer_size,
                     kept + start / 16, size / 16, counts[2 * t + 1]);
    });
    std::int64_t inside = 0, above = 0;
    for (int t = 0; t < threads; ++t) {
        if (counts[2 * t] < 0) return false;
        const std::int64_t start = t * slice < count ? t * slice : count;
        std::memmove(kept + inside, kept + start / 16, static_cast<std::size_t>(counts[2 * t]) * sizeof(U));
        inside += counts[2 * t];
        above += counts[2 * t + 1];
    }
    if (above >= search.k || above + inside < search.k) return false;
    search.k -= above;
    narrow_search(InMemory<U>{kept}, inside, threads_for(inside, threads), search, static_cast<U*>(nullptr));
    return true;
}

// The bits of the k-th largest magnitude of `count` numbers.
template <typename Source>
typename Source::Bits select(const Source& source, std::int64_t count, std::int64_t k, int threads) {
    using U = typename Source::Bits;
    Search<U> search;
    search.k = k;
    const Scratch kept_memory(static_cast<std::size_t>(count / 16 + 1) * sizeof(U));
    U* const kept = static_cast<U*>(kept_memory.data());
    if (count >= sample_from && select_by_sample(source, count, threads_for(count, threads), search, kept))
        return search.range.low;
    const std::int64_t remaining = narrow_search(source, count, threads_for(count, threads), search, kept);
    if (remaining > 0)
        narrow_search(InMemory<U>{kept}, remaining, threads_for(remaining, threads), search,
                      static_cast<U*>(nullptr));
    return search.range.low;
}

}  // namespace

}  // namespace dirmerge::DIRMERGE_ISA
