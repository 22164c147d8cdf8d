// Blocks of stored numbers widened to float or double, and rounded back: what the fused kernels over several
// weights share. Each function takes one stored dtype, so that kernels need no instance per combination.
#pragma once

#include "cpu/kernels.h"

namespace dirmerge::DIRMERGE_ISA {

namespace {

template <typename T>
const T* at(Elements x, std::int64_t start) {
    return static_cast<const T*>(x.data) + start;
}

// Asks for elements that are soon to be read. With several inputs read in turn, block by block, the hardware
// loses track of each at every change.
static inline void prefetch(Elements x, std::int64_t start, std::int64_t count) {
#if defined(__GNUC__)
    const auto size = static_cast<std::int64_t>(size_of(x.dtype));
    const char* const address = static_cast<const char*>(x.data) + start * size;
    for (std::int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(address + i, 0, 2);
#else
    static_cast<void>(x), static_cast<void>(start), static_cast<void>(count);
#endif
}

// origin = the base, or 0 without one.
template <typename V>
void read_origin(const Elements* base, std::int64_t start, std::int64_t count, V* origin) {
    if (base == nullptr) {
        for (std::int64_t i = 0; i < count; ++i) origin[i] = 0;
        return;
    }
    with_type(base->dtype, [&](auto type) {
        const auto* const x = at<decltype(type)>(*base, start);
        for (std::int64_t i = 0; i < count; ++i) origin[i] = static_cast<V>(widen(x[i]));
    });
}

// difference = weight − origin.
template <typename V>
void read_difference(Elements weight, const V* origin, std::int64_t start, std::int64_t count,
                     V* difference) {
    with_type(weight.dtype, [&](auto type) {
        const auto* const x = at<decltype(type)>(weight, start);
        for (std::int64_t i = 0; i < count; ++i) difference[i] = static_cast<V>(widen(x[i])) - origin[i];
    });
}

static inline std::uint16_t stored_bits(BFloat16 x) { return x.bits; }
static inline std::uint16_t stored_bits(Float16 x) { return x.bits; }
static inline std::uint32_t stored_bits(float x) { return to_bits(x); }
static inline std::uint64_t stored_bits(double x) { return to_bits(x); }

template <typename T>
constexpr auto exponent_bits = decltype(stored_bits(T{})){};
template <>
constexpr std::uint16_t exponent_bits<BFloat16> = 0x7F80;
template <>
constexpr std::uint16_t exponent_bits<Float16> = 0x7C00;
template <>
constexpr std::uint32_t exponent_bits<float> = 0x7F800000;
template <>
constexpr std::uint64_t exponent_bits<double> = 0x7FF0000000000000;

// The number of NaN and infinite ones among at most 32768 numbers: 16-bit counters, for 16-bit numbers, hold
// it.
template <typename T>
std::int64_t count_nonfinite(const T* x, std::int64_t count) {
    using U = decltype(stored_bits(T{}));
    U found = 0;
    for (std::int64_t i = 0; i < count; ++i)
        found = static_cast<U>(found + ((stored_bits(x[i]) & exponent_bits<T>) == exponent_bits<T>));
    return static_cast<std::int64_t>(found);
}

// One rounding from double to 16 bits, by way of a float rounded to odd: it keeps a trace of what it drops.
template <typename T>
void narrow_once(double x, T& out) {
    const float nearest = static_cast<float>(x);
    const double widened = nearest;
    const double past = x < 0 ? x - widened : widened - x;
    std::uint32_t bits = to_bits(nearest) - static_cast<std::uint32_t>(past > 0);
    bits |= static_cast<std::uint32_t>(widened != x);
    narrow(from_bits(bits), out);
}

template <typename T>
void narrow_once(float x, T& out) {
    narrow(x, out);
}

static inline void narrow_once(double x, float& out) { out = static_cast<float>(x); }
static inline void narrow_once(double x, double& out) { out = x; }

// result = round(origin + scale · update); returns the number of non-finite results.
template <typename V>
std::int64_t write_sum(const V* origin, const V* update, V scale, std::int64_t start, std::int64_t count,
                       Elements result) {
    std::int64_t nonfinite = 0;
    with_type(result.dtype, [&](auto type) {
        using T = decltype(type);
        T* const out = static_cast<T*>(result.data) + start;
        for (std::int64_t i = 0; i < count; ++i) {
            const V sum = origin[i] + scale * update[i];
            narrow_once(sum, out[i]);
        }
        nonfinite = count_nonfinite(out, count);
    });
    return nonfinite;
}

}  // namespace

}  // namespace dirmerge::DIRMERGE_ISA
