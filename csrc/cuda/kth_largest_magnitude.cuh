// kth_largest_magnitude: radix selection on the bits of the numbers, two passes for 16-bit, three for 32-bit
// ones; device code.
//
// Without its sign bit a float orders as an integer does, NaN above infinity. From the top digit down, a pass
// counts the digits of the entries whose higher digits are those chosen so far (histogram), and chooses the
// digit in which the k-th largest lies (select). Histograms are kept in shared memory, in COPIES copies that
// neighbouring lanes spread over, because most magnitudes share a few leading digits, and added to global
// memory at the end.
//
// Occupancy as designed: 4 blocks of 512 threads on an SM, all of its threads, at 32 registers a thread and
// 32 KiB of shared memory a block.
#pragma once

#include "elements.cuh"

namespace dirmerge::cuda {

namespace kth_largest_magnitude {
constexpr int THREADS = 512;
constexpr int MIN_BLOCKS = 4;
constexpr int DIGIT_BITS = 11;  // of the widest digit
constexpr int BINS = 1 << DIGIT_BITS;
constexpr int COPIES = 4;
constexpr int SELECT_THREADS = 256;
constexpr int SELECT_BINS = BINS / SELECT_THREADS;  // of each thread
// Enough blocks to fill any current GPU, few enough that adding up their histograms stays a small cost.
constexpr int BLOCKS = 1024;

// The digits of 15, 31 and 63 bits from the top: their widths, and how many there are.
constexpr int DIGITS_16[] = {8, 7};
constexpr int DIGITS_32[] = {11, 10, 10};
constexpr int DIGITS_64[] = {11, 11, 11, 10, 10, 10};
}  // namespace kth_largest_magnitude

// What is known of the k-th largest magnitude of one task.
struct KthState {
    uint64 prefix;     // its digits so far
    uint64 remaining;  // its rank among the entries with these digits
};

__global__ void __launch_bounds__(kth_largest_magnitude::SELECT_THREADS)
    kth_start_kernel(KthState* states, uint64* counts, int64 tasks, uint64 k) {
    using namespace kth_largest_magnitude;
    for (int64 t = blockIdx.x; t < tasks; t += gridDim.x) {
        if (threadIdx.x == 0) states[t] = {0, k};
        for (int bin = threadIdx.x; bin < BINS; bin += SELECT_THREADS) counts[t * BINS + bin] = 0;
    }
}

// x: (tasks, size) as unsigned integers, each x[t] contiguous, stride_t elements apart; counts: (tasks,
// BINS). `shares` blocks divide an x[t] among them. WIDTH: every x[t] starts at a multiple of so many
// elements' bytes, and size is one. The digit is bits shift to shift + digit_bits.
template <typename Bits, int WIDTH>
__global__ void __launch_bounds__(kth_largest_magnitude::THREADS, kth_largest_magnitude::MIN_BLOCKS)
    kth_histogram_kernel(const Bits* x, const KthState* states, uint64* counts, int64 tasks, int64 size,
                         int64 stride_t, int64 shares, int shift, int digit_bits) {
    using namespace kth_largest_magnitude;
    constexpr Bits MAGNITUDE = static_cast<Bits>(~Bits{0}) >> 1;
    // A count fits 32 bits: a block would need to see 2^32 entries of the memory of one GPU.
    __shared__ uint32 histogram[BINS * COPIES];
    const int copy = threadIdx.x % COPIES;

    for (int64 work = blockIdx.x; work < tasks * shares; work += gridDim.x) {
        const int64 t = work / shares;
        for (int i = threadIdx.x; i < BINS * COPIES; i += THREADS) histogram[i] = 0;
        __syncthreads();

        const Bits prefix = static_cast<Bits>(states[t].prefix);
        for (int64 i = (work % shares * THREADS + threadIdx.x) * WIDTH; i < size;
             i += shares * THREADS * WIDTH) {
            const auto pack = *reinterpret_cast<const Pack<Bits, WIDTH>*>(x + t * stride_t + i);
#pragma unroll
            for (int e = 0; e < WIDTH; ++e) {
                const Bits magnitude = pack.element[e] & MAGNITUDE;
                if (static_cast<Bits>(magnitude >> (shift + digit_bits)) != prefix) continue;
                const int digit = static_cast<int>(magnitude >> shift) & ((1 << digit_bits) - 1);
                atomicAdd(&histogram[digit * COPIES + copy], 1u);
            }
        }
        __syncthreads();

        for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
            uint32 count = 0;
#pragma unroll
            for (int c = 0; c < COPIES; ++c) count += histogram[bin * COPIES + c];
            if (count > 0) atomicAdd(&counts[t * BINS + bin], uint64{count});
        }
        __syncthreads();  // the next round clears the histogram
    }
}

// Chooses the digit, one block per task, and clears the counts for the next pass. A thread sums SELECT_BINS
// bins, the first thread the highest; the thread on whose bins the sum from the top reaches the rank goes
// through them.
template <typename Bits>
__global__ void __launch_bounds__(kth_largest_magnitude::SELECT_THREADS)
    kth_select_kernel(KthState* states, uint64* counts, Bits* result, int64 tasks, int digit_bits,
                      bool last) {
    using namespace kth_largest_magnitude;
    constexpr int WARPS = SELECT_THREADS / 32;
    __shared__ uint64 warp_sums[WARPS];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;

    for (int64 t = blockIdx.x; t < tasks; t += gridDim.x) {
        const KthState state = states[t];
        const int highest = BINS - 1 - static_cast<int>(threadIdx.x) * SELECT_BINS;
        uint64 own[SELECT_BINS];
        uint64 sum = 0;
#pragma unroll
        for (int i = 0; i < SELECT_BINS; ++i) {
            own[i] = counts[t * BINS + highest - i];
            counts[t * BINS + highest - i] = 0;
            sum += own[i];
        }
        uint64 up_to = sum;  // of this lane and those before it
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const uint64 before = __shfl_up_sync(0xFFFFFFFFu, up_to, distance);
            if (lane >= distance) up_to += before;
        }
        if (lane == 31) warp_sums[warp] = up_to;
        __syncthreads();  // and everybody has read the state

        uint64 above = up_to - sum;
#pragma unroll
        for (int w = 0; w < WARPS; ++w)
            if (w < warp) above += warp_sums[w];
        if (above < state.remaining && state.remaining <= above + sum) {
            int chosen = highest;
            bool found = false;
#pragma unroll
            for (int i = 0; i < SELECT_BINS; ++i) {
                found = found || state.remaining <= above + own[i];
                if (!found) {
                    above += own[i];
                    --chosen;
                }
            }
            const uint64 prefix = (state.prefix << digit_bits) | static_cast<uint64>(chosen);
            states[t] = {prefix, state.remaining - above};
            if (last) result[t] = static_cast<Bits>(prefix);
        }
        __syncthreads();  // the next round writes the sums of the warps
    }
}

}  // namespace dirmerge::cuda
