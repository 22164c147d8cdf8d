// etf_project_add: W = base + scale · K/(K − 1) · (D − q (qᵀD) / K), the simplex ETF's Gram operator on a
// dense update, added to a weight and rounded once; device code.
//
// First qᵀD: a block takes 32 columns and one of SLICES slices of rows, so that matrices with few columns
// fill the device too; the parts of the slices are added up in a fixed order, without atomics, by the second
// kernel, which then reads base and D once and writes W once. Bound by memory.
//
// Occupancy as designed: at least 6 blocks of 256 threads on an SM, three quarters of it at 40 registers a
// thread.
#pragma once

#include "elements.cuh"

namespace dirmerge::cuda {

namespace etf_project_add {
constexpr int COLUMNS = 32;
constexpr int GROUPS = 8;
constexpr int THREADS = COLUMNS * GROUPS;
constexpr int SLICES = 16;
constexpr int ROWS = 64;  // of a tile of the result
constexpr int MIN_BLOCKS = 6;
}  // namespace etf_project_add

// The sum over the groups of threads of one value each, column by column, in every thread.
template <typename V>
__device__ __forceinline__ V group_sum(V value,
                                       V (&shared)[etf_project_add::GROUPS][etf_project_add::COLUMNS]) {
    using namespace etf_project_add;
    const int lane = threadIdx.x % COLUMNS;
    shared[threadIdx.x / COLUMNS][lane] = value;
    __syncthreads();
    V sum = 0;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) sum += shared[group][lane];
    __syncthreads();  // the next sum is written over this one
    return sum;
}

// partial: (SLICES, n), the parts of qᵀD. update: (m, n) by strides; frame_sum: (m,), contiguous.
template <typename V>
__global__ void __launch_bounds__(etf_project_add::THREADS, etf_project_add::MIN_BLOCKS)
    etf_column_product_kernel(const V* update, const V* frame_sum, V* partial, int64 m, int64 n,
                              int64 stride_m, int64 stride_n) {
    using namespace etf_project_add;
    __shared__ V shared[GROUPS][COLUMNS];
    const int group = threadIdx.x / COLUMNS;
    const int64 column_blocks = ceil_div(n, COLUMNS);
    const int64 slice_rows = ceil_div(m, SLICES);

    for (int64 work = blockIdx.x; work < SLICES * column_blocks; work += gridDim.x) {
        const int64 slice = work / column_blocks;
        const int64 column = work % column_blocks * COLUMNS + threadIdx.x % COLUMNS;
        const int64 last = (slice + 1) * slice_rows < m ? (slice + 1) * slice_rows : m;
        V sum = 0;
        if (column < n)
            for (int64 row = slice * slice_rows + group; row < last; row += GROUPS)
                sum += frame_sum[row] * update[row * stride_m + column * stride_n];
        sum = group_sum(sum, shared);
        if (group == 0 && column < n) partial[slice * n + column] = sum;
    }
}

// result: (m, n), contiguous, of type O; base by strides, of type T. factor: scale · K/(K − 1).
template <typename T, typename O>
__global__ void __launch_bounds__(etf_project_add::THREADS, etf_project_add::MIN_BLOCKS)
    etf_rank_one_add_kernel(const T* base, const Compute<T>* update, const Compute<T>* frame_sum,
                            const Compute<T>* partial, O* result, int64 m, int64 n, int64 base_stride_m,
                            int64 base_stride_n, int64 stride_m, int64 stride_n, Compute<T> inverse_K,
                            Compute<T> factor) {
    using namespace etf_project_add;
    using V = Compute<T>;
    __shared__ V shared[GROUPS][COLUMNS];
    const int group = threadIdx.x / COLUMNS;
    const int64 column_blocks = ceil_div(n, COLUMNS);

    for (int64 work = blockIdx.x; work < ceil_div(m, ROWS) * column_blocks; work += gridDim.x) {
        const int64 first = work / column_blocks * ROWS;
        const int64 column = work % column_blocks * COLUMNS + threadIdx.x % COLUMNS;
        V product = 0;  // of q and this column
        if (column < n)
            for (int slice = group; slice < SLICES; slice += GROUPS) product += partial[slice * n + column];
        product = group_sum(product, shared) * inverse_K;
        if (column >= n) continue;
#pragma unroll
        for (int i = 0; i < ROWS / GROUPS; ++i) {
            const int64 row = first + group + i * GROUPS;
            if (row >= m) break;
            const V projected = update[row * stride_m + column * stride_n] - frame_sum[row] * product;
            const V value = projected * factor + widened(base[row * base_stride_m + column * base_stride_n]);
            result[row * n + column] = converted<O>(value);
        }
    }
}

}  // namespace dirmerge::cuda
