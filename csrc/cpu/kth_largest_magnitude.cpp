// kth_largest_magnitude: exact selection by the bits of the magnitudes, which order as integers do.
//
// The number is found digit by digit, from the most significant bits down: count the digits of those entries
// that agree with what is known, and see in which digit the k-th largest lies. After a digit that leaves few
// entries these are copied out, and the rest is done among them.
#include "common/parallel.h"
#include "cpu/kernels.h"

namespace dirmerge::DIRMERGE_ISA {

namespace {

constexpr int digit_bits = 11;
constexpr std::int64_t bins = std::int64_t{1} << digit_bits;
constexpr std::int64_t piece = 1 << 16;  // elements of one task
constexpr int group = 32;                // elements that are skipped together

// A half-open range of magnitudes' bits: those that agree with the digits found so far.
template <typename U>
struct Range {
    U low, width_minus_1;
    bool contains(U bits) const { return bits - low <= width_minus_1; }
};

template <typename U>
constexpr U magnitude_mask = static_cast<U>(~U{0}) >> 1;

// Counts the digits at `shift` of the entries in range. Once `k` entries at or above a digit are seen,
// entries below it cannot be the k-th largest, and whole groups of them are skipped: with a small k nearly
// all are. Odd entries are counted apart: neighbours often share a digit, and their increments would wait for
// each other.
template <typename U>
void count_digits(const U* x, std::int64_t count, Range<U> range, int shift, std::int64_t k,
                  std::int64_t* counts) {
    std::int64_t odd_counts[bins] = {};
    for (std::int64_t d = 0; d < bins; ++d) counts[d] = 0;
    const U top = range.low + range.width_minus_1;
    U bound = range.low;
    for (std::int64_t start = 0; start < count; start += piece) {
        const std::int64_t stop = start + piece < count ? start + piece : count;
        std::int64_t i = start;
        for (; i + group <= stop; i += group) {
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
        for (; i < stop; ++i) {
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

template <typename U>
void copy_in_range(const U* x, std::int64_t count, Range<U> range, U* out) {
    std::int64_t found = 0;
    std::int64_t i = 0;
    for (; i + group <= count; i += group) {
        U any = 0;
        for (int l = 0; l < group; ++l) any |= static_cast<U>(range.contains(x[i + l] & magnitude_mask<U>));
        if (!any) continue;
        for (int l = 0; l < group; ++l)
            if (range.contains(x[i + l] & magnitude_mask<U>)) out[found++] = x[i + l];
    }
    for (; i < count; ++i)
        if (range.contains(x[i] & magnitude_mask<U>)) out[found++] = x[i];
}

template <typename U>
U select(const U* x, std::int64_t count, std::int64_t k, int threads) {
    Range<U> range{0, magnitude_mask<U>};
    int undecided = 8 * static_cast<int>(sizeof(U)) - 1;
    const Scratch kept_memory(static_cast<std::size_t>(count / 16 + 1) * sizeof(U));
    U* const kept = static_cast<U*>(kept_memory.data());
    threads = threads_for(count, threads);
    const Scratch counts_memory(static_cast<std::size_t>(threads) * bins * sizeof(std::int64_t));
    std::int64_t* const counts = static_cast<std::int64_t*>(counts_memory.data());
    while (undecided > 0) {
        const int shift = undecided > digit_bits ? undecided - digit_bits : 0;
        const std::int64_t slice = (count + threads - 1) / threads;
        parallel_for(threads, threads, [&](std::int64_t t) {
            const std::int64_t start = t * slice < count ? t * slice : count;
            const std::int64_t size = count - start < slice ? count - start : slice;
            count_digits(x + start, size, range, shift, k, counts + t * bins);
        });
        const auto total = [&](std::int64_t d) {
            std::int64_t sum = 0;
            for (int t = 0; t < threads; ++t) sum += counts[t * bins + d];
            return sum;
        };
        std::int64_t digit = bins - 1;
        for (; total(digit) < k; --digit) k -= total(digit);
        range = {static_cast<U>(range.low + (static_cast<U>(digit) << shift)),
                 static_cast<U>((U{1} << shift) - 1)};
        undecided = shift;
        const std::int64_t remaining = total(digit);
        if (undecided > 0 && x != kept && remaining <= count / 16) {
            // The counts of this digit are complete in every slice, so each slice knows where its entries go.
            parallel_for(threads, threads, [&](std::int64_t t) {
                std::int64_t offset = 0;
                for (std::int64_t s = 0; s < t; ++s) offset += counts[s * bins + digit];
                const std::int64_t start = t * slice < count ? t * slice : count;
                const std::int64_t size = count - start < slice ? count - start : slice;
                copy_in_range(x + start, size, range, kept + offset);
            });
            x = kept;
            count = remaining;
            threads = threads_for(count, threads);
        }
    }
    return range.low;
}

template <typename U>
void select_rows(const U* x, std::int64_t tasks, std::int64_t count, std::int64_t task_stride, std::int64_t k,
                 U* result, int threads) {
    // Threads share one row if it is long, and take a row each if rows are short.
    const bool long_rows = threads_for(count, threads) == threads;
    parallel_for(tasks, long_rows ? 1 : threads_for(tasks * count, threads), [&](std::int64_t t) {
        result[t] = select(x + t * task_stride, count, k, long_rows ? threads : 1);
    });
}

}  // namespace

void kth_largest_magnitude(Elements x, std::int64_t tasks, std::int64_t count, std::int64_t task_stride,
                           std::int64_t k, void* result, int threads) {
    if (x.dtype == DType::float64)
        select_rows(static_cast<const std::uint64_t*>(x.data), tasks, count, task_stride, k,
                    static_cast<std::uint64_t*>(result), threads);
    else
        select_rows(static_cast<const std::uint32_t*>(x.data), tasks, count, task_stride, k,
                    static_cast<std::uint32_t*>(result), threads);
}

}  // namespace dirmerge::DIRMERGE_ISA
