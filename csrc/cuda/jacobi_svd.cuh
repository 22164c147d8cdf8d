// jacobi_svd: a = u diag(s) vᵀ of small matrices by one-sided Jacobi rotations; device code.
//
// A block takes a matrix with m >= n: its columns, and those of v = I beside them, are rotated in pairs until
// all are orthogonal; then their norms are s, and what they point along is u. A warp takes a pair, n / 2
// disjoint pairs make a round, n − 1 rounds a sweep, and a sweep without a rotation is the last. Squared
// norms and products are summed anew for every pair, so that no error of theirs lasts. Exchanging columns to
// have the longer one first (de Rijk) is for other orders: in this one a random 128 × 128 matrix then takes
// 17 sweeps, without it 10.
//
// Bound by the bandwidth of shared memory: a warp reads a pair twice and writes it once, and sixteen of them
// cover the latency of the sums. Occupancy as designed: one block of 512 threads of at most 128 registers for
// 128 × 128 matrices, which fill the shared memory of an SM.
//
// Source: Hestenes, J. SIAM 6 (1958); Brent, Luk, SIAM J. Sci. Stat. Comput. 6 (1985).
#pragma once

#include "jacobi.cuh"

namespace dirmerge::cuda {

namespace jacobi_svd {

// Bytes of dynamic shared memory with so many of the two matrices, a first and then v, in it.
__host__ __device__ constexpr int64 shared_bytes(int64 m, int64 n, int in_shared, int64 itemsize) {
    const int64 matrices =
        (in_shared > 0 ? jacobi::odd(m) * n : 0) + (in_shared > 1 ? jacobi::odd(n) * n : 0);
    return matrices * itemsize;
}

// Entries of the workspace that each matrix of the batch needs for what is not in shared memory.
__host__ __device__ constexpr int64 workspace_entries(int64 m, int64 n, int in_shared) {
    return (in_shared > 0 ? 0 : jacobi::odd(m) * n) + (in_shared > 1 ? 0 : jacobi::odd(n) * n);
}

// Rotates the columns x (m entries) with y and v with w (n entries); returns whether they were not
// orthogonal.
template <typename T>
__device__ __forceinline__ bool orthogonalise(T* x, T* y, T* v, T* w, int m, int n, T tolerance) {
    using jacobi::Range;
    const int lane = threadIdx.x % 32;
    T alpha = 0, beta = 0, gamma = 0;
    for (int i = lane; i < m; i += 32) {
        alpha += x[i] * x[i];
        beta += y[i] * y[i];
        gamma += x[i] * y[i];
    }
    alpha = jacobi::warp_sum(alpha);
    beta = jacobi::warp_sum(beta);
    gamma = jacobi::warp_sum(gamma);
    constexpr T CUTOFF = Range<T>::CUTOFF;
    if (alpha < CUTOFF * CUTOFF || beta < CUTOFF * CUTOFF) return false;
    if (jacobi::magnitude(gamma) <= tolerance * jacobi::root(alpha) * jacobi::root(beta)) return false;

    const jacobi::Rotation<T> rotation(alpha, beta, gamma);
    for (int i = lane; i < m; i += 32) rotation.apply(x[i], y[i]);
    for (int i = lane; i < n; i += 32) rotation.apply(v[i], w[i]);
    return true;
}

// By one warp: makes every column whose value is zero a unit vector orthogonal to all others, which have
// length 1 already.
template <typename T>
__device__ void complete(T* columns, const T* values, int m, int n, int64 ld) {
    const int lane = threadIdx.x % 32;
    for (int missing = 0; missing < n; ++missing) {
        if (values[missing] != 0) continue;
        T* const column = columns + missing * ld;
        // The axis of which the others hold least keeps the most of its length beside them.
        T least = 2;
        int axis = 0;
        for (int i = lane; i < m; i += 32) {
            T held = 0;
            for (int j = 0; j < n; ++j)
                if (values[j] != 0 || j < missing) held += columns[j * ld + i] * columns[j * ld + i];
            if (held < least) {
                least = held;
                axis = i;
            }
        }
#pragma unroll
        for (int bits = 16; bits > 0; bits /= 2) {
            const T other = __shfl_xor_sync(0xFFFFFFFFu, least, bits);
            const int there = __shfl_xor_sync(0xFFFFFFFFu, axis, bits);
            if (other < least || (other == least && there < axis)) {
                least = other;
                axis = there;
            }
        }
        for (int i = lane; i < m; i += 32) column[i] = i == axis ? T(1) : T(0);
        T square = 1;
        for (int pass = 0; pass < 2; ++pass) {
            for (int j = 0; j < n; ++j) {
                if (values[j] == 0 && j >= missing) continue;
                const T* const other = columns + j * ld;
                T along = 0;
                for (int i = lane; i < m; i += 32) along += other[i] * column[i];
                along = jacobi::warp_sum(along);
                for (int i = lane; i < m; i += 32) column[i] -= along * other[i];
            }
            square = 0;
            for (int i = lane; i < m; i += 32) square += column[i] * column[i];
            const T scale = 1 / jacobi::root(jacobi::warp_sum(square));
            for (int i = lane; i < m; i += 32) column[i] *= scale;
        }
    }
}

}  // namespace jacobi_svd

// a: (batch, m, n) by strides in elements, m >= n, n <= SMALL; u: (batch, m, n), s: (batch, n), v: (batch, n,
// n), sweeps: (batch), all contiguous; workspace: see workspace_entries.
template <typename T, int IN_SHARED>
__global__ void __launch_bounds__(jacobi::MAX_WARPS * 32, 1)
    jacobi_svd_kernel(const T* a, T* u, T* s, T* v, int* sweeps, T* workspace, int64 batch, int m, int n,
                      int64 stride_batch, int64 stride_row, int64 stride_column) {
    using namespace jacobi_svd;
    using jacobi::Range;
    SIMT_DYNAMIC_SHARED(T, shared);
    __shared__ T values[jacobi::SMALL];
    __shared__ int order[jacobi::SMALL];
    __shared__ T scratch[jacobi::MAX_WARPS];
    const int64 ld = jacobi::odd(m);
    const int64 ld_v = jacobi::odd(n);
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int warps = blockDim.x / 32;
    // The cosine that two columns are left at: the rounding of a sum of m products, up to 1024 of them two
    // units.
    const T tolerance = Range<T>::EPSILON * jacobi::root(static_cast<T>(m > 1024 ? m : 1024)) / 16;

    for (int64 entry = blockIdx.x; entry < batch; entry += gridDim.x) {
        T* const outside = workspace + entry * workspace_entries(m, n, IN_SHARED);
        T* const columns = IN_SHARED > 0 ? shared : outside;
        T* const right = IN_SHARED > 1 ? shared + ld * n : IN_SHARED > 0 ? outside : outside + ld * n;
        const T* const matrix = a + entry * stride_batch;
        T* const left_out = u + entry * m * n;
        T* const right_out = v + entry * n * n;

        T largest = 0;
        bool finite = true;
        const bool rows_adjoin = stride_row == 1;
        for (int index = threadIdx.x; index < m * n; index += blockDim.x) {
            const int i = rows_adjoin ? index % m : index / n;
            const int j = rows_adjoin ? index / m : index % n;
            const T x = matrix[i * stride_row + j * stride_column];
            const T size = jacobi::magnitude(x);
            finite &= size <= Range<T>::LARGEST_FINITE;
            largest = size > largest ? size : largest;
            columns[j * ld + i] = x;
        }
        largest = jacobi::block_max(largest, scratch);
        if (__syncthreads_or(!finite)) {
            const T nan = T(0) / T(0);
            for (int index = threadIdx.x; index < m * n; index += blockDim.x) left_out[index] = nan;
            for (int index = threadIdx.x; index < n * n; index += blockDim.x) right_out[index] = nan;
            for (int index = threadIdx.x; index < n; index += blockDim.x) s[entry * n + index] = nan;
            if (threadIdx.x == 0) sweeps[entry] = jacobi::NOT_FINITE;
            continue;
        }
        const int power = largest > 0 ? Range<T>::LARGEST - jacobi::exponent(largest) : 0;
        for (int index = threadIdx.x; index < m * n; index += blockDim.x) {
            T& x = columns[index / m * ld + index % m];
            x = jacobi::times_power_of_two(x, power);
        }
        for (int index = threadIdx.x; index < n * n; index += blockDim.x)
            right[index / n * ld_v + index % n] = index / n == index % n ? T(1) : T(0);
        __syncthreads();

        const int pairs = (n + 1) / 2;
        const int rounds = 2 * pairs - 1;
        int sweep = 0;
        bool rotated = true;
        while (rotated && sweep < jacobi::MAX_SWEEPS) {
            bool mine = false;
            for (int round = 0; round < rounds; ++round) {
                for (int i = warp; i < pairs; i += warps) {
                    const jacobi::Pair pair = jacobi::pair_of(round, i, rounds);
                    if (pair.q >= n) continue;  // of an odd number of columns one rests
                    mine |= orthogonalise(columns + pair.p * ld, columns + pair.q * ld, right + pair.p * ld_v,
                                          right + pair.q * ld_v, m, n, tolerance);
                }
                __syncthreads();
            }
            rotated = __syncthreads_or(mine);
            ++sweep;
        }

        // A rotation changes the length of a column of a and of v by the same rounding errors: the ratio has
        // none of them.
        for (int j = warp; j < n; j += warps) {
            T square = 0, square_v = 0;
            for (int i = lane; i < m; i += 32) square += columns[j * ld + i] * columns[j * ld + i];
            for (int i = lane; i < n; i += 32) square_v += right[j * ld_v + i] * right[j * ld_v + i];
            const T norm = jacobi::root(jacobi::warp_sum(square));
            const T norm_v = jacobi::root(jacobi::warp_sum(square_v));
            const bool zero = norm < Range<T>::CUTOFF;
            for (int i = lane; i < m; i += 32) columns[j * ld + i] = zero ? T(0) : columns[j * ld + i] / norm;
            for (int i = lane; i < n; i += 32) right[j * ld_v + i] /= norm_v;
            if (lane == 0) values[j] = zero ? T(0) : norm / norm_v;
        }
        __syncthreads();
        if (warp == 0) complete(columns, values, m, n, ld);
        for (int j = threadIdx.x; j < n; j += blockDim.x) {
            const int rank = jacobi::rank_of(values, n, j);
            order[rank] = j;
            s[entry * n + rank] = jacobi::times_power_of_two(values[j], -power);
        }
        __syncthreads();
        for (int index = threadIdx.x; index < m * n; index += blockDim.x)
            left_out[index] = columns[order[index % n] * ld + index / n];
        for (int index = threadIdx.x; index < n * n; index += blockDim.x)
            right_out[index] = right[order[index % n] * ld_v + index / n];
        if (threadIdx.x == 0) sweeps[entry] = rotated ? -sweep : sweep;
        __syncthreads();  // the next matrix is loaded over this one
    }
}

}  // namespace dirmerge::cuda
