// Sixteen lanes in one register of AVX-512 (F, BW, VL, DQ). simd/simd.h says what each function owes.
#pragma once

// GCC 12 warns of its own headers: their "undefined" vectors are meant so.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "numbers.h"

namespace narrows::NARROWS_TARGET {

using F32x16 = __m512;
struct I32x16 {
    __m512i v;
};
using Lanes = __mmask16;

inline Lanes first_lanes(int64_t count) {
    return count >= 16 ? Lanes(0xffff) : count <= 0 ? Lanes(0) : Lanes((1u << count) - 1);
}
inline bool are_all(Lanes lanes) { return lanes == 0xffff; }

inline F32x16 zero() { return _mm512_setzero_ps(); }
inline F32x16 set(float x) { return _mm512_set1_ps(x); }

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// Any number, also what is denormal.
inline __m256i narrow_exactly(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i y = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(y, 16));
}

inline __m256i narrow(__m512 x) {
#ifdef __AVX512BF16__
    // The instruction flushes denormals to zero, which torch does too where it uses it.
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    return narrow_exactly(x);
#endif
}

inline F32x16 load(const float* p) { return _mm512_loadu_ps(p); }
inline F32x16 load(const float* p, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
inline F32x16 load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F32x16 load(const bf16* p, Lanes lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, p)); }
inline F32x16 load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline void store(float* p, F32x16 x) { _mm512_storeu_ps(p, x); }
inline void store(bf16* p, F32x16 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
// Masked stores are slow on some CPUs (Zen: several times a plain one), a branch that is nearly always taken is not.
inline void store(float* p, F32x16 x, Lanes lanes) {
    if (are_all(lanes)) return store(p, x);
    _mm512_mask_storeu_ps(p, lanes, x);
}
inline void store(bf16* p, F32x16 x, Lanes lanes) {
    if (are_all(lanes)) return store(p, x);
    _mm256_mask_storeu_epi16(p, lanes, narrow(x));
}
inline void store_exactly(bf16* p, F32x16 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_exactly(x)); }
inline F32x16 as_bf16(F32x16 x) { return widen(narrow(x)); }
// Sixty-four numbers to bf16 exactly, by an instruction: false, and nothing stored, if it would round one otherwise (a
// NaN, or what is denormal).
inline bool store_ordinary(bf16* p, const F32x16 (&x)[4]) {
#ifdef __AVX512BF16__
    constexpr int kinds = 0x01 | 0x20 | 0x80;  // quiet NaN, denormal, signalling NaN
    unsigned odd = 0;
    for (const F32x16& part : x) odd |= _mm512_fpclass_ps_mask(part, kinds);
    if (odd) return false;
    for (int i = 0; i < 4; i += 2) _mm512_storeu_si512(p + i * 16, __m512i(_mm512_cvtne2ps_pbh(x[i + 1], x[i])));
    return true;
#else
    return false;
#endif
}
inline void store_f16(uint16_t* p, F32x16 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline F32x16 mul_add(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32x16 add_product(F32x16 sum, F32x16 x, F32x16 y) { return mul_add(x, y, sum); }
inline F32x16 mul_sub(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmsub_ps(a, b, c); }
inline F32x16 neg_mul_add(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fnmadd_ps(a, b, c); }
inline F32x16 max(F32x16 a, F32x16 b) { return _mm512_max_ps(a, b); }
inline F32x16 abs(F32x16 x) { return _mm512_abs_ps(x); }
inline F32x16 round(F32x16 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F32x16 times_power_of_2(F32x16 x, F32x16 n) { return _mm512_scalef_ps(x, n); }
inline float reduce_sum(F32x16 x) { return _mm512_reduce_add_ps(x); }
inline float reduce_max(F32x16 x) { return _mm512_reduce_max_ps(x); }

inline float first_lane(F32x16 x) { return _mm512_cvtss_f32(x); }
inline F32x16 keep(F32x16 x, Lanes lanes) { return _mm512_maskz_mov_ps(lanes, x); }
inline F32x16 select(Lanes lanes, F32x16 x, F32x16 otherwise) { return _mm512_mask_mov_ps(otherwise, lanes, x); }
inline F32x16 if_greater(F32x16 a, F32x16 b, F32x16 then, F32x16 otherwise) {
    return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), then);
}
inline uint32_t nan_lanes(F32x16 x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
inline uint32_t equal_lanes(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }

inline void load_pairs(const bf16* p, F32x16& first, F32x16& second) {
    const __m512i pairs = _mm512_loadu_si512(p);
    first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000))));
}
inline void load_pairs(const float* p, F32x16& first, F32x16& second) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 low = _mm512_loadu_ps(p), high = _mm512_loadu_ps(p + 16);
    first = _mm512_permutex2var_ps(low, even, high);
    second = _mm512_permutex2var_ps(low, odd, high);
}

inline I32x16 zero_int() { return {_mm512_setzero_si512()}; }
inline I32x16 set_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I32x16 load_int(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(int32_t* p, I32x16 x) { _mm512_storeu_si512(p, x.v); }
inline I32x16 operator+(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32x16 operator-(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I32x16 min(I32x16 a, I32x16 b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline I32x16 max(I32x16 a, I32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline int32_t reduce_max(I32x16 x) { return _mm512_reduce_max_epi32(x.v); }
inline I32x16 bits_of(F32x16 x) { return {_mm512_castps_si512(x)}; }
inline I32x16 rounded(F32x16 x) { return {_mm512_cvtps_epi32(x)}; }
inline F32x16 to_floats(I32x16 x) { return _mm512_cvtepi32_ps(x.v); }

inline I32x16 load_i8(const int8_t* p, Lanes lanes) {
    return {_mm512_cvtepi8_epi32(are_all(lanes) ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
                                                : _mm_maskz_loadu_epi8(lanes, p))};
}
inline void store_i8(int8_t* p, I32x16 x, Lanes lanes) {
    if (are_all(lanes))
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x.v));
    else
        _mm512_mask_cvtsepi32_storeu_epi8(p, lanes, x.v);
}

inline F32x16 low_half(I32x16 pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs.v, 16)); }
inline F32x16 high_half(I32x16 pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs.v, _mm512_set1_epi32(int32_t(0xffff0000))));
}
inline I32x16 even_bytes(I32x16 quads) { return {_mm512_and_si512(quads.v, _mm512_set1_epi32(0x00ff00ff))}; }
inline I32x16 odd_bytes(I32x16 quads) { return {_mm512_srli_epi16(quads.v, 8)}; }
inline I32x16 byte_of(I32x16 quads, int byte) {
    return {_mm512_and_si512(_mm512_srli_epi32(quads.v, 8 * byte), _mm512_set1_epi32(0xff))};
}
inline I32x16 mul_add_pairs(I32x16 a, I32x16 b, I32x16 c) {
    return {_mm512_add_epi32(_mm512_madd_epi16(a.v, b.v), c.v)};
}
inline I32x16 operator&(I32x16 a, I32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I32x16 operator|(I32x16 a, I32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I32x16 operator^(I32x16 a, I32x16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline I32x16 shift_right(I32x16 x, int bits) { return {_mm512_srl_epi32(x.v, _mm_cvtsi32_si128(bits))}; }
inline I32x16 shift_left(I32x16 x, int bits) { return {_mm512_sll_epi32(x.v, _mm_cvtsi32_si128(bits))}; }
#ifdef __AVX512VNNI__
constexpr bool DOTS_ANY_BYTE = true;
inline I32x16 dot_bytes(I32x16 sum, I32x16 a, I32x16 b) { return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)}; }
#else
constexpr bool DOTS_ANY_BYTE = false;
inline I32x16 dot_bytes(I32x16 sum, I32x16 a, I32x16 b) {
    return mul_add_pairs({_mm512_maddubs_epi16(a.v, b.v)}, {_mm512_set1_epi16(1)}, sum);
}
#endif
inline I32x16 dot_signed_bytes(I32x16 sum, I32x16 a, I32x16 b) {
    const __m512i turned = _mm512_mask_sub_epi8(b.v, _mm512_movepi8_mask(a.v), _mm512_setzero_si512(), b.v);
    return dot_bytes(sum, {_mm512_abs_epi8(a.v)}, {turned});
}

template <int ROWS>
inline void store_columns(float* to, const F32x16 (&rows)[ROWS]) {
    for (int r = 0; r < ROWS; ++r) {
        float row[16];
        store(row, rows[r]);
        for (int i = 0; i < 16; ++i) to[i * ROWS + r] = row[i];
    }
}

inline void fetch_near(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void fetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

constexpr bool WIDENS_FOR_FREE = false;
constexpr int TILE_ROWS = 12, TILE_VECTORS = 2;  // 24 sums in the 32 registers

}  // namespace narrows::NARROWS_TARGET
