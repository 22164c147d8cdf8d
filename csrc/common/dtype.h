// Element types, and their conversions to and from float and double.
//
// Rounding is to nearest, ties to even, by integer operations: the same bits on every machine, and loops over
// these functions vectorise. NaN stays NaN. Functions are static because this header is compiled once per
// instruction set (see cpu/kernels.h) and the copies must not be merged by the linker.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace dirmerge {

enum class DType { bfloat16, float16, float32, float64 };

struct BFloat16 {
    std::uint16_t bits;
};

struct Float16 {
    std::uint16_t bits;
};

static inline std::size_t size_of(DType dtype) {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// The type sums are formed in: double for double, else float.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

static inline std::uint32_t to_bits(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline std::uint64_t to_bits(double x) {
    std::uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float from_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

static inline double from_bits(std::uint64_t bits) {
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(BFloat16 x) { return from_bits(std::uint32_t{x.bits} << 16); }

static inline float widen(Float16 x) {
    const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16;
    const std::uint32_t exponent = x.bits & 0x7C00u;
    const std::uint32_t magnitude = x.bits & 0x7FFFu;
    // A subnormal is its integer mantissa times 2^-24, an exact product of normal floats.
    const std::uint32_t subnormal =
        to_bits(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
    const std::uint32_t normal = (magnitude << 13) + (exponent == 0x7C00u ? 0x70000000u : 0x38000000u);
    return from_bits(sign | (exponent == 0 ? subnormal : normal));
}

static inline void narrow(float x, float& out) { out = x; }
static inline void narrow(float x, double& out) { out = x; }
static inline void narrow(double x, double& out) { out = x; }

static inline void narrow(float x, BFloat16& out) {
    const std::uint32_t bits = to_bits(x);
    const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t quiet_nan = (bits >> 16) | 0x40u;
    out.bits = static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded);
}

static inline void narrow(float x, Float16& out) {
    const std::uint32_t bits = to_bits(x);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    // 2^-14 and above: drop 13 bits, rounded, and rebase the exponent; a carry runs into the exponent as it
    // should.
    const std::uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    // Below: adding 0.5 leaves the mantissa in units of 2^-24, and the addition itself rounds to even.
    const std::uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3F000000u;
    std::uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477FF000u ? 0x7C00u : result;  // 65520 and above round to infinity
    result = magnitude > 0x7F800000u ? 0x7E00u : result;
    out.bits = static_cast<std::uint16_t>(sign | result);
}

// Calls body(T{}) with the element type T of dtype.
template <typename Body>
static inline void with_type(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::bfloat16:
            return body(BFloat16{});
        case DType::float16:
            return body(Float16{});
        case DType::float32:
            return body(float{});
        case DType::float64:
            return body(double{});
    }
}

}  // namespace dirmerge
