// Element types of the CUDA kernels, their conversions, and aligned packs of them for wide loads.
//
// Written out rather than taken from cuda_fp16.h and cuda_bf16.h, so that NVRTC needs no header but ours.
#pragma once

#include "simt.h"

#if defined(SIMT_EMULATED)
#include "common/dtype.h"
#endif

namespace dirmerge::cuda {

struct BFloat16 {
    unsigned short bits;
};

struct Float16 {
    unsigned short bits;
};

// The type sums are formed in: double for double, else float.
template <typename T>
struct ComputeOf {
    using Type = float;
};

template <>
struct ComputeOf<double> {
    using Type = double;
};

template <typename T>
using Compute = typename ComputeOf<T>::Type;

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }

__device__ __forceinline__ float widened(BFloat16 x) { return __uint_as_float(uint32{x.bits} << 16); }

__device__ __forceinline__ float widened(Float16 x) {
#if defined(SIMT_EMULATED)
    return dirmerge::widen(dirmerge::Float16{x.bits});
#else
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
    return result;
#endif
}

// Rounds to T, to the nearest, ties to even; NaN stays NaN.
template <typename T>
__device__ __forceinline__ T rounded(Compute<T> x) {
    return x;
}

template <>
__device__ __forceinline__ BFloat16 rounded<BFloat16>(float x) {
#if defined(SIMT_EMULATED)
    dirmerge::BFloat16 result;
    dirmerge::narrow(x, result);
    return {result.bits};
#else
    BFloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
#endif
}

template <>
__device__ __forceinline__ Float16 rounded<Float16>(float x) {
#if defined(SIMT_EMULATED)
    dirmerge::Float16 result;
    dirmerge::narrow(x, result);
    return {result.bits};
#else
    Float16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
#endif
}

// x · y rounded by itself: a following addition is not fused with it, whatever the compiler's flags.
__device__ __forceinline__ float product(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double product(double x, double y) { return __dmul_rn(x, y); }

// Consecutive elements that one instruction loads or stores; their address must be a multiple of the size.
template <typename T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Pack {
    T element[WIDTH];
};

// Elements of T in the 16 bytes that a thread loads at most at once.
template <typename T>
constexpr int WIDEST = 16 / static_cast<int>(sizeof(T));

__host__ __device__ __forceinline__ int64 ceil_div(int64 a, int64 b) { return (a + b - 1) / b; }

}  // namespace dirmerge::cuda
