// jacobi_eigh: a = w diag(λ) wᵀ of small symmetric matrices by two-sided Jacobi rotations; device code.
//
// A block takes a matrix. In a round n / 2 disjoint rotations are found from the diagonal, then applied at
// once: a thread takes the 2 × 2 block where the rows of one meet the columns of another, of two that mirror
// each other only one, so that a stays symmetric to the bit; a warp takes a pair of columns of w. A sweep of
// n − 1 rounds without a rotation is the last.
//
// Bound by the bandwidth of shared memory and, below n = 32, by the two barriers of a round.
//
// Source: Golub, Van Loan, Matrix Computations (2013), section 8.5.
#pragma once

#include "jacobi.cuh"

namespace dirmerge::cuda {

namespace jacobi_eigh {

// An off-diagonal entry is zero where it is below EPSILON √|λ_p λ_q|, or this part of the largest entry: the
// rest of a singular matrix is noise, of which no rotation would make an end.
template <typename T>
constexpr T NEGLIGIBLE = jacobi::Range<T>::EPSILON * jacobi::Range<T>::EPSILON;

// n, or n + 1 for a row and column of zeros that make it even.
__host__ __device__ constexpr int64 even(int64 n) { return n + (n & 1); }

// Bytes of dynamic shared memory with so many of the two matrices, a first and then w, in it.
__host__ __device__ constexpr int64 shared_bytes(int64 n, int in_shared, int64 itemsize) {
    return in_shared * even(n) * (even(n) + 1) * itemsize;
}

// Entries of the workspace that each matrix of the batch needs for what is not in shared memory.
__host__ __device__ constexpr int64 workspace_entries(int64 n, int in_shared) {
    return (2 - in_shared) * even(n) * (even(n) + 1);
}

}  // namespace jacobi_eigh

// a: (batch, n, n) by strides in elements, of which the lower triangle is read, n <= SMALL; values: (batch,
// n), vectors: (batch, n, n), sweeps: (batch), all contiguous; workspace: see workspace_entries.
template <typename T, int IN_SHARED>
__global__ void __launch_bounds__(jacobi::MAX_WARPS * 32, 1)
    jacobi_eigh_kernel(const T* a, T* values_out, T* vectors_out, int* sweeps, T* workspace, int64 batch,
                       int n, int64 stride_batch, int64 stride_row, int64 stride_column) {
    using namespace jacobi_eigh;
    using jacobi::Range;
    SIMT_DYNAMIC_SHARED(T, shared);
    __shared__ jacobi::Rotation<T> rotations[jacobi::SMALL / 2];
    __shared__ T values[jacobi::SMALL];
    __shared__ int order[jacobi::SMALL];
    __shared__ T scratch[jacobi::MAX_WARPS];
    const int size = static_cast<int>(even(n));
    // Of w the columns lie one after the other, an odd number of entries apart. Of a they are an even number
    // apart: the threads of a warp read along a diagonal or an antidiagonal.
    const int ld = size;
    const int ld_w = size + 1;
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int warps = blockDim.x / 32;
    const int pairs = size / 2;
    const int rounds = size - 1;

    for (int64 entry = blockIdx.x; entry < batch; entry += gridDim.x) {
        T* const outside = workspace + entry * workspace_entries(n, IN_SHARED);
        T* const w = IN_SHARED > 1 ? shared + size * ld_w : IN_SHARED > 0 ? outside : outside + size * ld_w;
        T* const m = IN_SHARED > 0 ? shared : outside;
        const T* const matrix = a + entry * stride_batch;
        T* const out = vectors_out + entry * n * n;

        T largest = 0;
        bool finite = true;
        for (int index = threadIdx.x; index < size * size; index += blockDim.x) {
            const int i = index / size;
            const int j = index % size;
            const int row = i > j ? i : j;
            const int column = i > j ? j : i;
            const T x = row < n ? matrix[row * stride_row + column * stride_column] : T(0);
            const T magnitude = jacobi::magnitude(x);
            finite &= magnitude <= Range<T>::LARGEST_FINITE;
            largest = magnitude > largest ? magnitude : largest;
            m[i * ld + j] = x;
            w[i * ld_w + j] = i == j ? T(1) : T(0);
        }
        largest = jacobi::block_max(largest, scratch);
        if (__syncthreads_or(!finite)) {
            const T nan = T(0) / T(0);
            for (int index = threadIdx.x; index < n * n; index += blockDim.x) out[index] = nan;
            for (int index = threadIdx.x; index < n; index += blockDim.x) values_out[entry * n + index] = nan;
            if (threadIdx.x == 0) sweeps[entry] = jacobi::NOT_FINITE;
            continue;
        }
        const int power = largest > 0 ? -jacobi::exponent(largest) : 0;
        for (int index = threadIdx.x; index < size * size; index += blockDim.x)
            m[index] = jacobi::times_power_of_two(m[index], power);
        __syncthreads();

        int sweep = 0;
        bool rotated = true;
        while (rotated && sweep < jacobi::MAX_SWEEPS) {
            bool mine = false;
            for (int round = 0; round < rounds; ++round) {
                for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
                    const jacobi::Pair pair = jacobi::pair_of(round, i, rounds);
                    const T alpha = m[pair.p * ld + pair.p];
                    const T beta = m[pair.q * ld + pair.q];
                    const T gamma = m[pair.p * ld + pair.q];
                    const T small = Range<T>::EPSILON * jacobi::root(jacobi::magnitude(alpha)) *
                                    jacobi::root(jacobi::magnitude(beta));
                    const T size_of = jacobi::magnitude(gamma);
                    if (size_of > small && size_of > NEGLIGIBLE<T>) {
                        rotations[i] = jacobi::Rotation<T>(alpha, beta, gamma);
                        mine = true;
                    } else {
                        rotations[i].sine = 0;
                    }
                }
                __syncthreads();
                // Two rotations i and i + d around the circle of pairs: every two once, up to half way.
                for (int index = threadIdx.x; index < pairs * (pairs / 2 + 1); index += blockDim.x) {
                    const int i = index % pairs;
                    const int d = index / pairs;
                    const int k = (i + d) % pairs;
                    if (2 * d == pairs && i >= d) continue;
                    const jacobi::Rotation<T> rows = rotations[i];
                    const jacobi::Rotation<T> columns = rotations[k];
                    if (rows.sine == 0 && columns.sine == 0) continue;
                    const jacobi::Pair r = jacobi::pair_of(round, i, rounds);
                    const jacobi::Pair c = jacobi::pair_of(round, k, rounds);
                    if (i == k) {
                        const T change = rows.tangent * m[r.p * ld + r.q];
                        m[r.p * ld + r.p] -= change;
                        m[r.q * ld + r.q] += change;
                        m[r.p * ld + r.q] = m[r.q * ld + r.p] = 0;
                        continue;
                    }
                    T pp = m[r.p * ld + c.p], pq = m[r.p * ld + c.q];
                    T qp = m[r.q * ld + c.p], qq = m[r.q * ld + c.q];
                    rows.apply(pp, qp);
                    rows.apply(pq, qq);
                    columns.apply(pp, pq);
                    columns.apply(qp, qq);
                    m[r.p * ld + c.p] = m[c.p * ld + r.p] = pp;
                    m[r.p * ld + c.q] = m[c.q * ld + r.p] = pq;
                    m[r.q * ld + c.p] = m[c.p * ld + r.q] = qp;
                    m[r.q * ld + c.q] = m[c.q * ld + r.q] = qq;
                }
                for (int i = warp; i < pairs; i += warps) {
                    const jacobi::Rotation<T> rotation = rotations[i];
                    if (rotation.sine == 0) continue;
                    const jacobi::Pair pair = jacobi::pair_of(round, i, rounds);
                    for (int row = lane; row < n; row += 32)
                        rotation.apply(w[pair.p * ld_w + row], w[pair.q * ld_w + row]);
                }
                __syncthreads();
            }
            rotated = __syncthreads_or(mine);
            ++sweep;
        }

        // Rotations are orthogonal up to rounding: what they did to the length of an eigenvector, they did to
        // its value twice.
        for (int j = warp; j < n; j += warps) {
            T square = 0;
            for (int i = lane; i < n; i += 32) square += w[j * ld_w + i] * w[j * ld_w + i];
            square = jacobi::warp_sum(square);
            const T length = jacobi::root(square);
            for (int i = lane; i < n; i += 32) w[j * ld_w + i] /= length;
            if (lane == 0) values[j] = m[j * ld + j] / square;
        }
        __syncthreads();
        for (int j = threadIdx.x; j < n; j += blockDim.x) {
            const int rank = jacobi::rank_of(values, n, j);
            order[rank] = j;
            values_out[entry * n + rank] = jacobi::times_power_of_two(values[j], -power);
        }
        __syncthreads();
        for (int index = threadIdx.x; index < n * n; index += blockDim.x)
            out[index] = w[order[index % n] * ld_w + index / n];
        if (threadIdx.x == 0) sweeps[entry] = rotated ? -sweep : sweep;
        __syncthreads();  // the next matrix is loaded over this one
    }
}

}  // namespace dirmerge::cuda
