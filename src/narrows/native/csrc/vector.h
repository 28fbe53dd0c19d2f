// Numbers as kernels need them: bf16 <-> float32, one at a time and sixteen at once. Knows no tensor.
//
// Rounding to bf16 is to nearest, ties to even, as torch does; a NaN stays a NaN.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
// GCC 12 warns of its own headers: their "undefined" vectors are meant so.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

using bf16 = uint16_t;  // the upper half of a float32

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
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

#ifdef __AVX512F__
// Sixteen numbers; `mask` says which of them are there (absent ones are neither read nor written, and load as 0).

// `count` may be negative: none.
inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load16(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

inline __m256i narrow(__m512 x) {
#ifdef __AVX512BF16__
    // The instruction flushes denormals to zero, which torch does too where it uses it.
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i y = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    y = _mm512_mask_mov_epi32(y, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(y);
#endif
}

#ifdef __AVX512BW__
#ifdef __AVX512VL__
#define NARROWS_VECTORS 1  // all of the sixteen-wide helpers are there
inline __m512 load16(const bf16* p, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, p)); }
inline void store16(bf16* p, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
inline void store16(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
// Masked stores are slow on some CPUs (Zen: several times a plain one), a branch that is nearly always taken is not.
inline void store16(bf16* p, __m512 x, __mmask16 mask) {
    if (mask == 0xffff) return store16(p, x);
    _mm256_mask_storeu_epi16(p, mask, narrow(x));
}
inline void store16(float* p, __m512 x, __mmask16 mask) {
    if (mask == 0xffff) return store16(p, x);
    _mm512_mask_storeu_ps(p, mask, x);
}

// exp(x) to about 1 unit in the last place of float32; 0 below -87.3, infinity above 88.7.
inline __m512 exp16(__m512 x) {
    const __m512 log2e = _mm512_set1_ps(1.44269504088896341f);
    const __m512 ln2_hi = _mm512_set1_ps(0.693145751953125f), ln2_lo = _mm512_set1_ps(1.42860682030941723e-6f);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, ln2_hi, x);
    r = _mm512_fnmadd_ps(n, ln2_lo, r);
    __m512 p = _mm512_set1_ps(1.9841269841e-4f);  // 1 / 7!
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3888888889e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3333333333e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1666666667e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666666667e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    // scalef: 2^n with the right ends (0, infinity); x itself where it is infinite, since r is then NaN.
    const __m512 y = _mm512_scalef_ps(p, n);
    const __mmask16 over = _mm512_cmp_ps_mask(x, _mm512_set1_ps(88.8f), _CMP_GT_OQ);
    const __mmask16 under = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-104.0f), _CMP_LT_OQ);
    const __m512 inf = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000));
    return _mm512_mask_mov_ps(_mm512_mask_mov_ps(y, over, inf), under, _mm512_setzero_ps());
}
#endif
#endif
#endif
