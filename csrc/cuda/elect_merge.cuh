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

// The last of the ascending starts that is <= row: the diagonal block that holds it. Blocks may be empty.
__device__ __forceinline__ int64 block_of(int64 row, const int64* starts, int64 block_count) {
    int64 low = 0;
    int64 high = block_count;
    while (high - low > 1) {
        const int64 middle = (low + high) / 2;
        (starts[middle] <= row ? low : high) = middle;
    }
    return low;
}

// x: (tasks, rows, columns), rows contiguous, the matrices stride_t and the rows stride_row elements apart;
// result: (rows, columns), contiguous. thresholds and weights: one per task, or null. starts: block_count + 1
// ascending numbers from 0 to columns, between which the diagonal blocks lie, or null for one block, all.
// WIDTH: every row of x and result starts at a multiple of so many elements' bytes, and columns is one.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(elect_merge::THREADS, elect_merge::MIN_BLOCKS)
    elect_merge_kernel(const T* x, const Compute<T>* thresholds, const Compute<T>* weights,
                       const int64* starts, T* result, int64 tasks, int64 rows, int64 columns, int64 stride_t,
                       int64 stride_row, int64 block_count) {
    using namespace elect_merge;
    using V = Compute<T>;
    const int64 spans = ceil_div(columns, THREADS * WIDTH);

    for (int64 work = blockIdx.x; work < rows * spans; work += gridDim.x) {
        const int64 row = work / spans;
        const int64 column = (work % spans * THREADS + threadIdx.x) * WIDTH;
        if (column >= columns) continue;
        int64 first = 0;
        int64 last = columns;
        if (starts != nullptr) {
            const int64 block = block_of(row, starts, block_count);
            first = starts[block];
            last = starts[block + 1];
        }

        V positive[WIDTH] = {}, negative[WIDTH] = {}, positive_weight[WIDTH] = {},
          negative_weight[WIDTH] = {};
        if (column < last && column + WIDTH > first) {
            using Entries = Pack<T, WIDTH>;
            const T* entries = x + row * stride_row + column;
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
                for (int i = 0; i < WIDTH; ++i) {
                    V value = widened(pack.element[i]);
                    if ((value < 0 ? -value : value) < threshold) value = 0;
                    // Compared this way round, a NaN enters both sums.
                    positive[i] += product(value < 0 ? V{0} : value, weight);
                    negative[i] += product(value > 0 ? V{0} : value, weight);
                    positive_weight[i] += value > 0 ? weight : V{0};
                    negative_weight[i] += value < 0 ? weight : V{0};
                }
            }
        }

        Pack<T, WIDTH> merged;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            // Where neither side is heavier the sum is 0, or NaN where an entry is.
            V value = positive[i] + negative[i];
            if (positive[i] > -negative[i]) value = positive[i] / positive_weight[i];
            if (positive[i] < -negative[i]) value = negative[i] / negative_weight[i];
            const bool inside = column + i >= first && column + i < last;
            merged.element[i] = rounded<T>(inside ? value : V{0});
        }
        *reinterpret_cast<Pack<T, WIDTH>*>(result + row * columns + column) = merged;
    }
}

}  // namespace dirmerge::cuda
