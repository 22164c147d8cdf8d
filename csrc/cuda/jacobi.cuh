// What jacobi_svd and jacobi_eigh share: ranges of numbers, plane rotations and their order; device code.
#pragma once

#include "elements.cuh"

namespace dirmerge::cuda {

namespace jacobi {

constexpr int SMALL = 128;      // columns at most
constexpr int MAX_WARPS = 16;   // of a block; one for each pair of columns up to here
constexpr int MAX_SWEEPS = 40;  // random matrices take 5 to 12
constexpr int NOT_FINITE = -1;  // the sweeps of a matrix that holds NaN or Inf

__host__ __device__ constexpr int warps(int n) {
    const int pairs = (n + 1) / 2;
    return pairs < 1 ? 1 : pairs < MAX_WARPS ? pairs : MAX_WARPS;
}

// The first odd number that is not below x: a leading dimension for which neither the rows nor the columns of
// a matrix meet in one bank of shared memory.
__host__ __device__ constexpr int64 odd(int64 x) { return x | 1; }

// Matrices are scaled by a power of two so that the largest magnitude lies in [2^LARGEST, 2^(LARGEST + 1)):
// squared norms then neither overflow nor, above CUTOFF², underflow.
template <typename T>
struct Range;

template <>
struct Range<float> {
    static constexpr float EPSILON = 0x1p-23f;
    static constexpr float LARGEST_FINITE = 0x1.fffffep127f;
    static constexpr int LARGEST = 40;
    static constexpr float CUTOFF = 0x1p-50f;
};

template <>
struct Range<double> {
    static constexpr double EPSILON = 0x1p-52;
    static constexpr double LARGEST_FINITE = 0x1.fffffffffffffp1023;
    static constexpr int LARGEST = 400;
    static constexpr double CUTOFF = 0x1p-450;
};

__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }
__device__ __forceinline__ float times_power_of_two(float x, int e) { return ldexpf(x, e); }
__device__ __forceinline__ double times_power_of_two(double x, int e) { return ldexp(x, e); }
__device__ __forceinline__ int exponent(float x) { return ilogbf(x); }
__device__ __forceinline__ int exponent(double x) { return ilogb(x); }

// Of all lanes of a full warp, in the same order on every one of them.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, bits);
    return x;
}

// The two columns, p < q, of a round robin's pair; rounds: columns − 1, for an even number of columns. In the
// `rounds` rounds of a sweep every pair comes once, and within a round no column comes twice.
struct Pair {
    int p, q;
};

__device__ __forceinline__ Pair pair_of(int round, int i, int rounds) {
    const int one = i == 0 ? rounds : (round + i) % rounds;
    const int other = (round + rounds - i) % rounds;
    return one < other ? Pair{one, other} : Pair{other, one};
}

// The rotation (x, y) → (c x − s y, s x + c y) by at most 45° that makes two vectors with squared norms alpha
// and beta and product gamma ≠ 0 orthogonal, or a symmetric 2 × 2 matrix with these entries diagonal.
template <typename T>
struct Rotation {
    T tangent;
    T sine;
    T half;  // tan(angle / 2)

    Rotation() = default;  // undefined: shared memory takes no other

    __device__ __forceinline__ Rotation(T alpha, T beta, T gamma) {
        const T cotangent = (beta - alpha) / (2 * gamma);  // of twice the angle
        const T size = magnitude(cotangent);
        // Beyond this 1 does not count beside the square, which may overflow.
        const T steep = size < T(0x1p60) ? size + root(1 + cotangent * cotangent) : 2 * size;
        tangent = (cotangent < 0 ? T(-1) : T(1)) / steep;
        const T cosine = 1 / root(1 + tangent * tangent);
        sine = cosine * tangent;
        half = sine / (1 + cosine);
    }

    // As a correction of x and y (Rutishauser): small rotations then round the corrections alone.
    __device__ __forceinline__ void apply(T& x, T& y) const {
        const T before = x;
        x -= sine * (y + half * x);
        y += sine * (before - half * y);
    }
};

// Where a value stands in descending order: how many come before it; ties by index.
template <typename T>
__device__ __forceinline__ int rank_of(const T* values, int n, int index) {
    int before = 0;
    for (int i = 0; i < n; ++i)
        before += values[i] > values[index] || (values[i] == values[index] && i < index);
    return before;
}

// The largest of every thread's magnitudes on all threads of the block; scratch: MAX_WARPS entries.
template <typename T>
__device__ __forceinline__ T block_max(T x, T* scratch) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) {
        const T other = __shfl_xor_sync(0xFFFFFFFFu, x, bits);
        x = other > x ? other : x;
    }
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) x = scratch[warp] > x ? scratch[warp] : x;
    return x;
}

}  // namespace jacobi

}  // namespace dirmerge::cuda
