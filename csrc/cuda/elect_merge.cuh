// elect_merge: threshold, sign election and disjoint mean over the tasks, one read and one write; device
// code.
//
// A thread owns WIDTH neighbouring entries of the result, loads those of one task after the other in one
// instruction, the next while it adds these, and sums the positive and the negative ones apart: the sign of
// the sum is that of the heavier side. Nothing is shared between threads. Bound by memory.
//
// Occupancy as designed: at least 4 blocks of 256 threads on an SM, half of it at 64 registers a thread.
#pragma once

#include "elements.cuh"

namespace dirmerge::cuda {

namespace elect_merge {
constexpr int THREADS = 256;
constexpr int MIN_BLOCKS = 4;
// Entries of a thread where rows are aligned: the four sums of more than four would not fit the registers.
template <typename T>
constexpr int WIDE = WIDEST<T> < 4 ? WIDEST<T> : 4;
}  // namespace elect_merge

// x: (tasks, count), each x[t] contiguous, stride_t elements apart; result: (count,), contiguous. thresholds
// and weights: one per task, or null. WIDTH: every x[t] and the result start at a multiple of so many
// elements' bytes, and count is one.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(elect_merge::THREADS, elect_merge::MIN_BLOCKS)
    elect_merge_kernel(const T* x, const Compute<T>* thresholds, const Compute<T>* weights, T* result,
                       int64 tasks, int64 count, int64 stride_t) {
    using namespace elect_merge;
    using V = Compute<T>;
    const int64 step = int64{gridDim.x} * THREADS * WIDTH;

    for (int64 i = (int64{blockIdx.x} * THREADS + threadIdx.x) * WIDTH; i < count; i += step) {
        V positive[WIDTH] = {}, negative[WIDTH] = {}, positive_weight[WIDTH] = {},
          negative_weight[WIDTH] = {};
        using Entries = Pack<T, WIDTH>;
        const T* entries = x + i;
        Entries next = *reinterpret_cast<const Entries*>(entries);
#pragma unroll 1
        for (int64 t = 0; t < tasks; ++t) {
            const Entries pack = next;
            entries += stride_t;
            if (t + 1 < tasks) next = *reinterpret_cast<const Entries*>(entries);
            // A NaN among the thresholds keeps everything, as a comparison with it is false.
            const V threshold = thresholds == nullptr ? V{0} : thresholds[t];
            const V weight = weights == nullptr ? V{1} : weights[t];
#pragma unroll
            for (int e = 0; e < WIDTH; ++e) {
                V value = widened(pack.element[e]);
                if ((value < 0 ? -value : value) < threshold) value = 0;
                // Compared this way round, a NaN enters both sums.
                positive[e] += product(value < 0 ? V{0} : value, weight);
                negative[e] += product(value > 0 ? V{0} : value, weight);
                positive_weight[e] += value > 0 ? weight : V{0};
                negative_weight[e] += value < 0 ? weight : V{0};
            }
        }

        Pack<T, WIDTH> merged;
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) {
            // Where neither side is heavier the sum is 0, or NaN where an entry is.
            V value = positive[e] + negative[e];
            if (positive[e] > -negative[e]) value = positive[e] / positive_weight[e];
            if (positive[e] < -negative[e]) value = negative[e] / negative_weight[e];
            merged.element[e] = rounded<T>(value);
        }
        *reinterpret_cast<Pack<T, WIDTH>*>(result + i) = merged;
    }
}

}  // namespace dirmerge::cuda
