// gram: XᵀX, the tiles on and above the diagonal, each stored twice; device code.
//
// A block forms one tile of TILE x TILE: it goes down the rows of X in steps of STEP, keeps both strips of
// columns in shared memory as float32, and every thread accumulates ROWS x COLUMNS products in registers. The
// next step is loaded from memory while this one is multiplied. One block goes down all rows, so that sums do
// not depend on the grid; every CHUNK steps the sums are added to totals in shared memory, so that their
// error grows with the number of rows as little as in a blocked library.
//
// These are the float32 units at work: for a large n the tensor cores of triton_kernels/gram.py are several
// times faster, and "auto" prefers them. This kernel needs no Triton, and rounds products of float32 as IEEE
// does.
//
// Occupancy as designed: at least 4 blocks of 128 threads on an SM, a quarter of it at 128 registers a
// thread; each thread keeps 32 independent sums in flight. 33 KiB of shared memory a block.
#pragma once

#include "elements.cuh"

namespace dirmerge::cuda {

namespace gram {
constexpr int TILE = 64;
constexpr int STEP = 16;
constexpr int ROWS = 8;  // of the tile that a thread has
constexpr int COLUMNS = 4;
constexpr int THREADS = TILE / ROWS * (TILE / COLUMNS);
constexpr int LOADS = TILE * STEP / THREADS;  // elements of a strip that a thread loads
// Packs of four columns, and one more, which keeps lanes that write one column off each other's banks.
constexpr int PACKS = TILE / 4 + 1;
constexpr int CHUNK = 16;  // steps that are summed in registers
constexpr int MIN_BLOCKS = 4;
}  // namespace gram

// The tile (row, column), row <= column, with number tile = column (column + 1) / 2 + row.
__device__ __forceinline__ void upper_tile(int64 tile, int64& row, int64& column) {
    column = static_cast<int64>((sqrt(8.0 * static_cast<double>(tile) + 1.0) - 1.0) * 0.5);
    // The root can be off by one for large numbers.
    while (column * (column + 1) / 2 > tile) --column;
    while ((column + 1) * (column + 2) / 2 <= tile) ++column;
    row = tile - column * (column + 1) / 2;
}

// STEP rows of a strip of TILE columns on their way from global to shared memory. Neighbouring threads take
// neighbouring elements of memory, be they in one row of X or in one column.
template <typename T>
struct Strip {
    const T* next;      // first element of this thread in the step to be loaded
    int64 stride_load;  // from one of its elements to the next: k_load rows and column_load columns away
    int64 stride_step;  // from one step to the next
    int64 rows;         // that are left
    int columns;        // of the strip that exist
    int k, column;      // of the first element in the strip
    int k_load, column_load;
    float value[gram::LOADS];

    __device__ __forceinline__ Strip(const T* x, int64 start, int64 m, int64 n, int64 stride_m,
                                     int64 stride_n) {
        using namespace gram;
        const int thread = static_cast<int>(threadIdx.x);
        const bool along_rows = stride_n <= stride_m;
        k = along_rows ? thread / TILE : thread % STEP;
        column = along_rows ? thread % TILE : thread / STEP;
        k_load = along_rows ? THREADS / TILE : 0;
        column_load = along_rows ? 0 : THREADS / STEP;
        stride_load = k_load * stride_m + column_load * stride_n;
        stride_step = STEP * stride_m;
        rows = m;
        columns = static_cast<int>(n - start < TILE ? n - start : TILE);
        next = x + k * stride_m + (start + column) * stride_n;
    }

    // Loads the next step; beyond the last row and column its elements are 0.
    __device__ __forceinline__ void load() {
        const T* element = next;
#pragma unroll
        for (int i = 0; i < gram::LOADS; ++i, element += stride_load) {
            const bool inside = k + i * k_load < rows && column + i * column_load < columns;
            value[i] = inside ? widened(*element) : 0.0f;
        }
        next += stride_step;
        rows -= gram::STEP;
    }

    __device__ __forceinline__ void store(Pack<float, 4> (&shared)[gram::STEP][gram::PACKS]) const {
#pragma unroll
        for (int i = 0; i < gram::LOADS; ++i) {
            const int c = column + i * column_load;
            shared[k + i * k_load][c / 4].element[c % 4] = value[i];
        }
    }
};

// x: (batch, m, n) by strides in elements; result: (batch, n, n), contiguous.
template <typename T>
__global__ void __launch_bounds__(gram::THREADS, gram::MIN_BLOCKS)
    gram_kernel(const T* x, float* result, int64 batch, int64 m, int64 n, int64 stride_batch, int64 stride_m,
                int64 stride_n) {
    using namespace gram;
    // Two stages: one is multiplied while the next is written.
    __shared__ Pack<float, 4> left[2][STEP][PACKS], right[2][STEP][PACKS];
    __shared__ float total[ROWS][COLUMNS][THREADS];  // a thread reads and writes its own
    const int row = static_cast<int>(threadIdx.x) / (TILE / COLUMNS) * ROWS;
    const int column = static_cast<int>(threadIdx.x) % (TILE / COLUMNS) * COLUMNS;
    const int64 tiles_across = ceil_div(n, TILE);
    const int64 tiles = tiles_across * (tiles_across + 1) / 2;

    for (int64 work = blockIdx.x; work < batch * tiles; work += gridDim.x) {
        const T* const matrix = x + work / tiles * stride_batch;
        int64 tile_row, tile_column;
        upper_tile(work % tiles, tile_row, tile_column);
        Strip<T> left_strip(matrix, tile_row * TILE, m, n, stride_m, stride_n);
        Strip<T> right_strip(matrix, tile_column * TILE, m, n, stride_m, stride_n);

        float sum[ROWS][COLUMNS] = {};
#pragma unroll
        for (int i = 0; i < ROWS * COLUMNS; ++i) total[i / COLUMNS][i % COLUMNS][threadIdx.x] = 0;
        const int64 steps = ceil_div(m, STEP);
        left_strip.load();
        right_strip.load();
        for (int64 step = 0; step < steps; ++step) {
            const int stage = static_cast<int>(step % 2);
            left_strip.store(left[stage]);
            right_strip.store(right[stage]);
            // Who passes has finished the step before, so that its stage may be written in the next.
            __syncthreads();
            left_strip.load();
            right_strip.load();
#pragma unroll
            for (int k = 0; k < STEP; ++k) {
                const Pack<float, 4> a[] = {left[stage][k][row / 4], left[stage][k][row / 4 + 1]};
                const Pack<float, 4> b = right[stage][k][column / 4];
#pragma unroll
                for (int i = 0; i < ROWS; ++i)
#pragma unroll
                    for (int j = 0; j < COLUMNS; ++j) sum[i][j] += a[i / 4].element[i % 4] * b.element[j];
            }
            if ((step + 1) % CHUNK == 0 || step + 1 == steps) {
#pragma unroll
                for (int i = 0; i < ROWS; ++i)
#pragma unroll
                    for (int j = 0; j < COLUMNS; ++j) {
                        total[i][j][threadIdx.x] += sum[i][j];
                        sum[i][j] = 0;
                    }
            }
        }
        __syncthreads();  // the next tile writes the stages

        float* const out = result + work / tiles * n * n;
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                const int64 r = tile_row * TILE + row + i;
                const int64 c = tile_column * TILE + column + j;
                if (r < n && c < n) {
                    out[r * n + c] = total[i][j][threadIdx.x];
                    out[c * n + r] = total[i][j][threadIdx.x];
                }
            }
        }
    }
}

}  // namespace dirmerge::cuda
