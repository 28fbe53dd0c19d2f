// Sixteen lanes as an array: plain C++, which a compiler makes vectors of where it can. simd/simd.h says what each
// function owes.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "numbers.h"

namespace narrows::NARROWS_TARGET {

struct F32x16 {
    float v[16];
};
struct I32x16 {
    int32_t v[16];
};
struct Lanes {
    int count;
};

// A result of `of(lane)` for each lane.
template <typename Vector, typename Of>
[[gnu::always_inline]] inline Vector each(Of of) {
    Vector y;
    for (int i = 0; i < 16; ++i) y.v[i] = of(i);
    return y;
}

inline Lanes first_lanes(int64_t count) { return {count >= 16 ? 16 : count <= 0 ? 0 : int(count)}; }
inline bool are_all(Lanes lanes) { return lanes.count == 16; }

inline F32x16 set(float x) {
    return each<F32x16>([&](int) { return x; });
}
inline F32x16 zero() { return set(0.0f); }

inline float from_f16(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | rest << 13 | (rest > 0x7c00 ? 0x400000 : 0));
    const float size = std::bit_cast<float>(rest << 13) * 0x1p112f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(size));
}
inline uint16_t to_f16(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return uint16_t(sign | 0x7e00 | (size >> 13 & 0x3ff));
    if (size >= 0x47800000) return uint16_t(sign | 0x7c00);  // 65536 and more
    if (size < 0x38800000)                                   // denormal: the addition rounds
        return uint16_t(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(size) + 0.5f) - 0x3f000000));
    return uint16_t(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

template <typename T>
inline F32x16 load(const T* p) {
    return each<F32x16>([&](int i) { return ::to_float(p[i]); });
}
template <typename T>
inline F32x16 load(const T* p, Lanes lanes) {
    F32x16 y = zero();
    for (int i = 0; i < lanes.count; ++i) y.v[i] = ::to_float(p[i]);
    return y;
}
inline F32x16 load_f16(const uint16_t* p) {
    return each<F32x16>([&](int i) { return from_f16(p[i]); });
}

template <typename T>
inline void store(T* p, const F32x16& x, Lanes lanes = {16}) {
    for (int i = 0; i < lanes.count; ++i) p[i] = rounded_to<T>(x.v[i]);
}
inline void store_exactly(bf16* p, const F32x16& x) { store(p, x); }
inline F32x16 as_bf16(const F32x16& x) {
    return each<F32x16>([&](int i) { return ::to_float(to_bf16(x.v[i])); });
}
inline bool store_ordinary(bf16*, const F32x16 (&)[4]) { return false; }
inline void store_f16(uint16_t* p, const F32x16& x) {
    for (int i = 0; i < 16; ++i) p[i] = to_f16(x.v[i]);
}

// One rounding where the CPU has an instruction for it; else two, since a function for it would take far longer.
inline float fused(float a, float b, float c) {
#ifdef FP_FAST_FMAF
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

#define OPERATOR(SIGN)                                                  \
    inline F32x16 operator SIGN(const F32x16& a, const F32x16& b) {     \
        return each<F32x16>([&](int i) { return a.v[i] SIGN b.v[i]; }); \
    }
OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
OPERATOR(/)
#undef OPERATOR
inline F32x16 mul_add(const F32x16& a, const F32x16& b, const F32x16& c) {
    return each<F32x16>([&](int i) { return fused(a.v[i], b.v[i], c.v[i]); });
}
inline F32x16 add_product(const F32x16& sum, const F32x16& x, const F32x16& y) { return mul_add(x, y, sum); }
inline F32x16 mul_sub(const F32x16& a, const F32x16& b, const F32x16& c) {
    return each<F32x16>([&](int i) { return fused(a.v[i], b.v[i], -c.v[i]); });
}
inline F32x16 neg_mul_add(const F32x16& a, const F32x16& b, const F32x16& c) {
    return each<F32x16>([&](int i) { return fused(-a.v[i], b.v[i], c.v[i]); });
}
inline float larger(float a, float b) { return a > b ? a : b; }
inline F32x16 max(const F32x16& a, const F32x16& b) {
    return each<F32x16>([&](int i) { return larger(a.v[i], b.v[i]); });
}
inline F32x16 abs(const F32x16& x) {
    return each<F32x16>([&](int i) { return std::fabs(x.v[i]); });
}
inline F32x16 round(const F32x16& x) {
    return each<F32x16>([&](int i) { return std::nearbyint(x.v[i]); });
}
inline float power_of_2(int32_t n) { return std::bit_cast<float>((n + 127) << 23); }
inline F32x16 times_power_of_2(const F32x16& x, const F32x16& n) {
    return each<F32x16>([&](int i) {
        const float within = n.v[i] > -252.0f ? (n.v[i] < 254.0f ? n.v[i] : 254.0f) : -252.0f;
        const int32_t all = int32_t(within), half = all >> 1;
        return x.v[i] * power_of_2(half) * power_of_2(all - half);
    });
}

template <typename Of>
inline float reduce(F32x16 x, Of of) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) x.v[i] = of(x.v[i + width], x.v[i]);
    return x.v[0];
}
inline float reduce_sum(const F32x16& x) {
    return reduce(x, [](float a, float b) { return a + b; });
}
inline float reduce_max(const F32x16& x) { return reduce(x, larger); }

inline float first_lane(const F32x16& x) { return x.v[0]; }
inline F32x16 select(Lanes lanes, const F32x16& x, const F32x16& otherwise) {
    return each<F32x16>([&](int i) { return i < lanes.count ? x.v[i] : otherwise.v[i]; });
}
inline F32x16 keep(const F32x16& x, Lanes lanes) { return select(lanes, x, zero()); }
inline F32x16 if_greater(const F32x16& a, const F32x16& b, const F32x16& then, const F32x16& otherwise) {
    return each<F32x16>([&](int i) { return a.v[i] > b.v[i] ? then.v[i] : otherwise.v[i]; });
}
inline uint32_t equal_lanes(const F32x16& a, const F32x16& b) {
    uint32_t lanes = 0;
    for (int i = 0; i < 16; ++i) lanes |= uint32_t(a.v[i] == b.v[i]) << i;
    return lanes;
}
inline uint32_t nan_lanes(const F32x16& x) { return ~equal_lanes(x, x) & 0xffff; }

template <typename T>
inline void load_pairs(const T* p, F32x16& first, F32x16& second) {
    first = each<F32x16>([&](int i) { return ::to_float(p[2 * i]); });
    second = each<F32x16>([&](int i) { return ::to_float(p[2 * i + 1]); });
}

inline I32x16 set_int(int32_t x) {
    return each<I32x16>([&](int) { return x; });
}
inline I32x16 zero_int() { return set_int(0); }
inline I32x16 load_int(const uint32_t* p) {
    return each<I32x16>([&](int i) { return int32_t(p[i]); });
}
inline void store(int32_t* p, const I32x16& x) { std::memcpy(p, x.v, sizeof x.v); }
inline I32x16 operator+(const I32x16& a, const I32x16& b) {
    return each<I32x16>([&](int i) { return int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i])); });
}
inline I32x16 operator-(const I32x16& a, const I32x16& b) {
    return each<I32x16>([&](int i) { return int32_t(uint32_t(a.v[i]) - uint32_t(b.v[i])); });
}
inline I32x16 min(const I32x16& a, const I32x16& b) {
    return each<I32x16>([&](int i) { return std::min(a.v[i], b.v[i]); });
}
inline I32x16 max(const I32x16& a, const I32x16& b) {
    return each<I32x16>([&](int i) { return std::max(a.v[i], b.v[i]); });
}
inline int32_t reduce_max(const I32x16& x) { return *std::max_element(x.v, x.v + 16); }
inline I32x16 bits_of(const F32x16& x) {
    return each<I32x16>([&](int i) { return std::bit_cast<int32_t>(x.v[i]); });
}
inline I32x16 rounded(const F32x16& x) {
    return each<I32x16>([&](int i) {
        const float y = std::nearbyint(x.v[i]);  // as x86: what does not fit is the least number
        return y >= -0x1p31f && y < 0x1p31f ? int32_t(y) : std::numeric_limits<int32_t>::min();
    });
}
inline F32x16 to_floats(const I32x16& x) {
    return each<F32x16>([&](int i) { return float(x.v[i]); });
}

inline I32x16 load_i8(const int8_t* p, Lanes lanes) {
    I32x16 y = zero_int();
    for (int i = 0; i < lanes.count; ++i) y.v[i] = p[i];
    return y;
}
inline void store_i8(int8_t* p, const I32x16& x, Lanes lanes) {
    for (int i = 0; i < lanes.count; ++i) p[i] = int8_t(std::clamp(x.v[i], -128, 127));
}

inline F32x16 low_half(const I32x16& pairs) {
    return each<F32x16>([&](int i) { return std::bit_cast<float>(uint32_t(pairs.v[i]) << 16); });
}
inline F32x16 high_half(const I32x16& pairs) {
    return each<F32x16>([&](int i) { return std::bit_cast<float>(uint32_t(pairs.v[i]) & 0xffff0000); });
}
inline I32x16 even_bytes(const I32x16& quads) {
    return each<I32x16>([&](int i) { return quads.v[i] & 0x00ff00ff; });
}
inline I32x16 odd_bytes(const I32x16& quads) {
    return each<I32x16>([&](int i) { return int32_t(uint32_t(quads.v[i]) >> 8 & 0x00ff00ff); });
}
inline I32x16 byte_of(const I32x16& quads, int byte) {
    return each<I32x16>([&](int i) { return int32_t(uint32_t(quads.v[i]) >> 8 * byte & 0xff); });
}
inline I32x16 mul_add_pairs(const I32x16& a, const I32x16& b, const I32x16& c) {
    return each<I32x16>([&](int i) {
        const int32_t low = int16_t(a.v[i]) * int16_t(b.v[i]), high = (a.v[i] >> 16) * (b.v[i] >> 16);
        return int32_t(uint32_t(c.v[i]) + uint32_t(low) + uint32_t(high));
    });
}

inline I32x16 operator&(const I32x16& a, const I32x16& b) {
    return each<I32x16>([&](int i) { return a.v[i] & b.v[i]; });
}
inline I32x16 operator|(const I32x16& a, const I32x16& b) {
    return each<I32x16>([&](int i) { return a.v[i] | b.v[i]; });
}
inline I32x16 operator^(const I32x16& a, const I32x16& b) {
    return each<I32x16>([&](int i) { return a.v[i] ^ b.v[i]; });
}
inline I32x16 shift_right(const I32x16& x, int bits) {
    return each<I32x16>([&](int i) { return int32_t(uint32_t(x.v[i]) >> bits); });
}
inline I32x16 shift_left(const I32x16& x, int bits) {
    return each<I32x16>([&](int i) { return int32_t(uint32_t(x.v[i]) << bits); });
}
constexpr bool DOTS_ANY_BYTE = true;
template <typename Byte>
inline I32x16 dot_bytes_of(const I32x16& sum, const I32x16& a, const I32x16& b) {
    return each<I32x16>([&](int i) {
        int32_t y = sum.v[i];
        for (int byte = 0; byte < 32; byte += 8) y += Byte(uint32_t(a.v[i]) >> byte) * int8_t(uint32_t(b.v[i]) >> byte);
        return y;
    });
}
inline I32x16 dot_bytes(const I32x16& sum, const I32x16& a, const I32x16& b) {
    return dot_bytes_of<uint8_t>(sum, a, b);
}
inline I32x16 dot_signed_bytes(const I32x16& sum, const I32x16& a, const I32x16& b) {
    return dot_bytes_of<int8_t>(sum, a, b);
}

template <int ROWS>
inline void store_columns(float* to, const F32x16 (&rows)[ROWS]) {
    for (int r = 0; r < ROWS; ++r) {
        float row[16];
        store(row, rows[r]);
        for (int i = 0; i < 16; ++i) to[i * ROWS + r] = row[i];
    }
}

inline void fetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void fetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

constexpr bool WIDENS_FOR_FREE = false;
constexpr int TILE_ROWS = 6, TILE_VECTORS = 1;

}  // namespace narrows::NARROWS_TARGET
