// etf_project: K/(K − 1) · (Z − 1 1ᵀ Z / K), the centred rows of a core, scaled; device code.
//
// A block takes 32 columns: eight groups of threads sum every eighth row, the partial sums meet in shared
// memory. Up to WHOLE_K rows stay in registers between the sum and the subtraction, so that the core is read
// once; longer columns are read twice, the second time mostly from the second-level cache. Bound by memory.
//
// Occupancy as designed: at least 4 blocks of 256 threads on an SM, half of it at 64 registers a thread.
#pragma once

#include "elements.cuh"

namespace dirmerge::cuda {

namespace etf_project {
constexpr int COLUMNS = 32;
constexpr int GROUPS = 8;
constexpr int THREADS = COLUMNS * GROUPS;
constexpr int WHOLE_K = 128;
constexpr int MIN_BLOCKS = 4;
}  // namespace etf_project

// A sum of many numbers that rounds as one of two: the error of every addition is kept (Knuth's two-sum).
template <typename V>
struct ExactSum {
    V value = 0;
    V lost = 0;

    __device__ __forceinline__ void add(V x) {
        const V next = value + x;
        const V added = next - value;
        lost += (value - (next - added)) + (x - added);
        value = next;
    }

    // Where an infinity was added the errors are NaN and the value is right.
    __device__ __forceinline__ V total() const { return lost == lost ? value + lost : value; }
};

// core: (batch, K, n) by strides in elements; result: contiguous; WHOLE: K <= WHOLE_K. scale: K / (K − 1).
template <typename T, bool WHOLE>
__global__ void __launch_bounds__(etf_project::THREADS, etf_project::MIN_BLOCKS)
    etf_project_kernel(const T* core, T* result, int64 batch, int64 K, int64 n, int64 stride_batch,
                       int64 stride_k, int64 stride_n, Compute<T> scale) {
    using namespace etf_project;
    using V = Compute<T>;
    __shared__ ExactSum<V> partial[GROUPS][COLUMNS];
    const int lane = threadIdx.x % COLUMNS;
    const int group = threadIdx.x / COLUMNS;
    const int64 column_blocks = ceil_div(n, COLUMNS);

    for (int64 work = blockIdx.x; work < batch * column_blocks; work += gridDim.x) {
        const int64 column = work % column_blocks * COLUMNS + lane;
        const int64 entry = work / column_blocks;
        const int64 rows = column < n ? K : 0;  // a thread beyond the last column has nothing to sum
        const T* const z = core + entry * stride_batch + column * stride_n;
        T* const out = result + entry * K * n + column;

        V kept[WHOLE ? WHOLE_K / GROUPS : 1];
        ExactSum<V> sum;
        if constexpr (WHOLE) {
#pragma unroll
            for (int i = 0; i < WHOLE_K / GROUPS; ++i) {
                const int64 k = group + i * GROUPS;
                kept[i] = k < rows ? widened(z[k * stride_k]) : V{0};
            }
#pragma unroll
            for (int i = 0; i < WHOLE_K / GROUPS; ++i) sum.add(kept[i]);
        } else {
            for (int64 k = group; k < rows; k += GROUPS) sum.add(widened(z[k * stride_k]));
        }
        partial[group][lane] = sum;
        __syncthreads();

        ExactSum<V> column_sum;
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            column_sum.add(partial[g][lane].value);
            column_sum.lost += partial[g][lane].lost;
        }
        const V mean = column_sum.total() / static_cast<V>(K);
        if constexpr (WHOLE) {
#pragma unroll
            for (int i = 0; i < WHOLE_K / GROUPS; ++i) {
                const int64 k = group + i * GROUPS;
                if (k < rows) out[k * n] = rounded<T>(product(kept[i] - mean, scale));
            }
        } else {
            for (int64 k = group; k < rows; k += GROUPS)
                out[k * n] = rounded<T>(product(widened(z[k * stride_k]) - mean, scale));
        }
        __syncthreads();  // the next round writes its partial sums over these
    }
}

}  // namespace dirmerge::cuda
