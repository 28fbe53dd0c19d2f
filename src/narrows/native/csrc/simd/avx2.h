// Sixteen lanes in two registers of AVX2, with FMA and F16C. simd/simd.h says what each function owes.
#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace narrows::NARROWS_TARGET {

struct F32x16 {
    __m256 a, b;
};
struct I32x16 {
    __m256i a, b;
};
struct Lanes {
    int count;
};

inline Lanes first_lanes(int64_t count) { return {count >= 16 ? 16 : count <= 0 ? 0 : int(count)}; }
inline bool are_all(Lanes lanes) { return lanes.count == 16; }

inline F32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F32x16 set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

inline __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }

inline __m256i upper_halves(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
}
[[gnu::always_inline]] inline __m256i narrow(F32x16 x) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(upper_halves(x.a), upper_halves(x.b)), 0xd8);
}

inline __m128i eight_halves(const void* p, int i) { return _mm_loadu_si128(static_cast<const __m128i*>(p) + i); }

inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F32x16 load(const bf16* p) { return {widen(eight_halves(p, 0)), widen(eight_halves(p, 1))}; }
inline F32x16 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(eight_halves(p, 0)), _mm256_cvtph_ps(eight_halves(p, 1))};
}
template <typename T>
inline F32x16 load(const T* p, Lanes lanes) {
    if (are_all(lanes)) return load(p);
    T some[16] = {};
    if (lanes.count) std::memcpy(some, p, lanes.count * sizeof(T));
    return load(some);
}

inline void store(float* p, F32x16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
[[gnu::always_inline]] inline void store(bf16* p, F32x16 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x));
}
template <typename T>
[[gnu::noinline]] inline void store_some(T* p, const F32x16& x, int count) {
    T some[16];
    store(some, x);
    if (count) std::memcpy(p, some, count * sizeof(T));
}
// Inlined, since a call would pass the numbers through memory.
template <typename T>
[[gnu::always_inline]] inline void store(T* p, F32x16 x, Lanes lanes) {
    if (are_all(lanes)) return store(p, x);
    store_some(p, x, lanes.count);
}
inline void store_exactly(bf16* p, F32x16 x) { store(p, x); }
inline F32x16 as_bf16(F32x16 x) {
    const __m256i y = narrow(x);
    return {widen(_mm256_castsi256_si128(y)), widen(_mm256_extracti128_si256(y, 1))};
}
inline bool store_ordinary(bf16*, const F32x16 (&)[4]) { return false; }
inline void store_f16(uint16_t* p, F32x16 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

inline F32x16 operator+(F32x16 x, F32x16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F32x16 operator-(F32x16 x, F32x16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F32x16 operator*(F32x16 x, F32x16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F32x16 operator/(F32x16 x, F32x16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F32x16 mul_add(F32x16 x, F32x16 y, F32x16 z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
// GCC 12 would put some sums of a full tile into the register of x or y, and spill others for that.
inline __m256 add_product(__m256 sum, __m256 x, __m256 y) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x), "x"(y));
    return sum;
}
inline F32x16 add_product(F32x16 sum, F32x16 x, F32x16 y) {
    return {add_product(sum.a, x.a, y.a), add_product(sum.b, x.b, y.b)};
}
inline F32x16 mul_sub(F32x16 x, F32x16 y, F32x16 z) {
    return {_mm256_fmsub_ps(x.a, y.a, z.a), _mm256_fmsub_ps(x.b, y.b, z.b)};
}
inline F32x16 neg_mul_add(F32x16 x, F32x16 y, F32x16 z) {
    return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
inline F32x16 max(F32x16 x, F32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F32x16 abs(F32x16 x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F32x16 round(F32x16 x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}

inline __m256 power_of_2(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// In two steps, since 2^n alone may be too small or too large: only the second rounds.
inline __m256 times_power_of_2(__m256 x, __m256 n) {
    const __m256 low = _mm256_set1_ps(-252.0f), high = _mm256_set1_ps(254.0f);
    const __m256i all = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(n, low), high));
    const __m256i half = _mm256_srai_epi32(all, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, power_of_2(half)), power_of_2(_mm256_sub_epi32(all, half)));
}
inline F32x16 times_power_of_2(F32x16 x, F32x16 n) { return {times_power_of_2(x.a, n.a), times_power_of_2(x.b, n.b)}; }

inline float reduce_sum(F32x16 x) {
    const __m256 eight = _mm256_add_ps(x.b, x.a);
    const __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
    const __m128 two = _mm_add_ps(four, _mm_shuffle_ps(four, four, 0x4e));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 0xb1)));
}
inline float reduce_max(F32x16 x) {
    const __m256 eight = _mm256_max_ps(x.b, x.a);
    const __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
    const __m128 two = _mm_max_ps(four, _mm_shuffle_ps(four, four, 0x4e));
    return _mm_cvtss_f32(_mm_max_ps(two, _mm_shuffle_ps(two, two, 0xb1)));
}

inline float first_lane(F32x16 x) { return _mm256_cvtss_f32(x.a); }
inline F32x16 select(Lanes lanes, F32x16 x, F32x16 otherwise) {
    const __m256i count = _mm256_set1_epi32(lanes.count), first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i next = _mm256_add_epi32(first, _mm256_set1_epi32(8));
    return {_mm256_blendv_ps(otherwise.a, x.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, first))),
            _mm256_blendv_ps(otherwise.b, x.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, next)))};
}
inline F32x16 keep(F32x16 x, Lanes lanes) { return select(lanes, x, zero()); }
inline F32x16 if_greater(F32x16 x, F32x16 y, F32x16 then, F32x16 otherwise) {
    return {_mm256_blendv_ps(otherwise.a, then.a, _mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ)),
            _mm256_blendv_ps(otherwise.b, then.b, _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ))};
}
inline uint32_t lanes_of(__m256 a, __m256 b) { return _mm256_movemask_ps(a) | _mm256_movemask_ps(b) << 8; }
inline uint32_t nan_lanes(F32x16 x) {
    return lanes_of(_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q));
}
inline uint32_t equal_lanes(F32x16 x, F32x16 y) {
    return lanes_of(_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ));
}

inline I32x16 zero_int() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I32x16 set_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I32x16 load_int(const uint32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline void store(int32_t* p, I32x16 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
inline I32x16 operator+(I32x16 x, I32x16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I32x16 operator-(I32x16 x, I32x16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I32x16 min(I32x16 x, I32x16 y) { return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)}; }
inline I32x16 max(I32x16 x, I32x16 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline int32_t reduce_max(I32x16 x) {
    const __m256i eight = _mm256_max_epi32(x.a, x.b);
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline I32x16 bits_of(F32x16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline I32x16 rounded(F32x16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F32x16 to_floats(I32x16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

inline void load_pairs(const bf16* p, F32x16& first, F32x16& second) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(p);
    const I32x16 pairs = load_int(words);
    const __m256i upper = _mm256_set1_epi32(int32_t(0xffff0000));
    first = {_mm256_castsi256_ps(_mm256_slli_epi32(pairs.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(pairs.b, 16))};
    second = {_mm256_castsi256_ps(_mm256_and_si256(pairs.a, upper)),
              _mm256_castsi256_ps(_mm256_and_si256(pairs.b, upper))};
}
inline void load_pairs(const float* p, F32x16& first, F32x16& second) {
    const F32x16 low = load(p), high = load(p + 16);
    const auto members = [](__m256 x) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8)); };
    first = {members(_mm256_shuffle_ps(low.a, low.b, 0x88)), members(_mm256_shuffle_ps(high.a, high.b, 0x88))};
    second = {members(_mm256_shuffle_ps(low.a, low.b, 0xdd)), members(_mm256_shuffle_ps(high.a, high.b, 0xdd))};
}

inline I32x16 load_i8(const int8_t* p, Lanes lanes) {
    int8_t some[16] = {};
    if (lanes.count) std::memcpy(some, p, lanes.count);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(some));
    return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
inline void store_i8(int8_t* p, I32x16 x, Lanes lanes) {
    const __m128i low = _mm_packs_epi32(_mm256_castsi256_si128(x.a), _mm256_extracti128_si256(x.a, 1));
    const __m128i high = _mm_packs_epi32(_mm256_castsi256_si128(x.b), _mm256_extracti128_si256(x.b, 1));
    int8_t some[16];
    int8_t* to = are_all(lanes) ? p : some;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(low, high));
    if (!are_all(lanes) && lanes.count) std::memcpy(p, some, lanes.count);
}

inline F32x16 low_half(I32x16 pairs) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(pairs.b, 16))};
}
// The mask is read each time: held, it would be the seventeenth register of a tile of six sums, and one of them
// spilled.
inline __m256i upper_mask() {
    alignas(32) static constexpr uint32_t mask[8] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                     0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
    return *reinterpret_cast<const volatile __m256i*>(mask);
}
inline F32x16 high_half(I32x16 pairs) {
    return {_mm256_castsi256_ps(_mm256_and_si256(pairs.a, upper_mask())),
            _mm256_castsi256_ps(_mm256_and_si256(pairs.b, upper_mask()))};
}
inline I32x16 even_bytes(I32x16 quads) {
    const __m256i even = _mm256_set1_epi32(0x00ff00ff);
    return {_mm256_and_si256(quads.a, even), _mm256_and_si256(quads.b, even)};
}
inline I32x16 odd_bytes(I32x16 quads) { return {_mm256_srli_epi16(quads.a, 8), _mm256_srli_epi16(quads.b, 8)}; }
inline I32x16 byte_of(I32x16 quads, int byte) {
    const __m256i low = _mm256_set1_epi32(0xff);
    return {_mm256_and_si256(_mm256_srli_epi32(quads.a, 8 * byte), low),
            _mm256_and_si256(_mm256_srli_epi32(quads.b, 8 * byte), low)};
}
inline I32x16 mul_add_pairs(I32x16 x, I32x16 y, I32x16 z) {
    return {_mm256_add_epi32(_mm256_madd_epi16(x.a, y.a), z.a), _mm256_add_epi32(_mm256_madd_epi16(x.b, y.b), z.b)};
}
inline I32x16 operator&(I32x16 x, I32x16 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline I32x16 operator|(I32x16 x, I32x16 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline I32x16 operator^(I32x16 x, I32x16 y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
inline I32x16 shift_right(I32x16 x, int bits) {
    const __m128i by = _mm_cvtsi32_si128(bits);
    return {_mm256_srl_epi32(x.a, by), _mm256_srl_epi32(x.b, by)};
}
inline I32x16 shift_left(I32x16 x, int bits) {
    const __m128i by = _mm_cvtsi32_si128(bits);
    return {_mm256_sll_epi32(x.a, by), _mm256_sll_epi32(x.b, by)};
}
constexpr bool DOTS_ANY_BYTE = false;
inline I32x16 dot_bytes(I32x16 sum, I32x16 x, I32x16 y) {
    const __m256i one = _mm256_set1_epi16(1);
    return mul_add_pairs({_mm256_maddubs_epi16(x.a, y.a), _mm256_maddubs_epi16(x.b, y.b)}, {one, one}, sum);
}
inline I32x16 dot_signed_bytes(I32x16 sum, I32x16 x, I32x16 y) {
    return dot_bytes(sum, {_mm256_abs_epi8(x.a), _mm256_abs_epi8(x.b)},
                     {_mm256_sign_epi8(y.a, x.a), _mm256_sign_epi8(y.b, x.b)});
}

// Four rows as columns: what belongs to column i of each half goes to `step` numbers after column i - 1.
inline void store_four_rows(float* to, int64_t step, __m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 ab = _mm256_unpacklo_ps(a, b), more_ab = _mm256_unpackhi_ps(a, b);
    const __m256 cd = _mm256_unpacklo_ps(c, d), more_cd = _mm256_unpackhi_ps(c, d);
    const __m256 columns[] = {_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee),
                              _mm256_shuffle_ps(more_ab, more_cd, 0x44), _mm256_shuffle_ps(more_ab, more_cd, 0xee)};
    for (int i = 0; i < 4; ++i) {
        _mm_storeu_ps(to + i * step, _mm256_castps256_ps128(columns[i]));
        _mm_storeu_ps(to + (i + 4) * step, _mm256_extractf128_ps(columns[i], 1));
    }
}
inline void store_two_rows(float* to, int64_t step, __m256 a, __m256 b) {
    const __m256 ab = _mm256_unpacklo_ps(a, b), more = _mm256_unpackhi_ps(a, b);
    const __m128 columns[] = {_mm256_castps256_ps128(ab), _mm256_castps256_ps128(more), _mm256_extractf128_ps(ab, 1),
                              _mm256_extractf128_ps(more, 1)};
    for (int i = 0; i < 4; ++i) {
        _mm_storel_pi(reinterpret_cast<__m64*>(to + 2 * i * step), columns[i]);
        _mm_storeh_pi(reinterpret_cast<__m64*>(to + (2 * i + 1) * step), columns[i]);
    }
}
template <int ROWS>
inline void store_columns(float* to, const F32x16 (&rows)[ROWS]) {
    int r = 0;
    for (; r + 4 <= ROWS; r += 4) {
        store_four_rows(to + r, ROWS, rows[r].a, rows[r + 1].a, rows[r + 2].a, rows[r + 3].a);
        store_four_rows(to + 8 * ROWS + r, ROWS, rows[r].b, rows[r + 1].b, rows[r + 2].b, rows[r + 3].b);
    }
    if (r + 2 <= ROWS) {
        store_two_rows(to + r, ROWS, rows[r].a, rows[r + 1].a);
        store_two_rows(to + 8 * ROWS + r, ROWS, rows[r].b, rows[r + 1].b);
        r += 2;
    }
    if (r < ROWS) {
        alignas(32) float row[16];
        store(row, rows[r]);
        for (int i = 0; i < 16; ++i) to[i * ROWS + r] = row[i];
    }
}

inline void fetch_near(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void fetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Whether words are split into their two bf16 beside the products of six rows: shifts have a pipe of their own on Zen.
constexpr bool WIDENS_FOR_FREE = true;
constexpr int TILE_ROWS = 6, TILE_VECTORS = 1;  // 6 sums, which are 12 of the 16 registers

}  // namespace narrows::NARROWS_TARGET
