// Numbers as they are stored: bf16 and float16 <-> float32, one at a time.
//
// Rounding is to nearest, ties to even, as torch does; a NaN stays a NaN.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;  // the upper half of a float32

[[gnu::always_inline]] inline float to_float(float x) { return x; }

[[gnu::always_inline]] inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t(x) << 16); }

[[gnu::always_inline]] inline bf16 to_bf16(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16((bits >> 16) | 0x40);
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A float32 as the type that is stored: itself, or rounded to bf16.
template <typename T>
inline T rounded_to(float x);
template <>
inline float rounded_to<float>(float x) {
    return x;
}
template <>
inline bf16 rounded_to<bf16>(float x) {
    return to_bf16(x);
}
