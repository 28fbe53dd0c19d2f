// The sums of sums.h: a few vectors at a time, so that every number is read once and the running sum stays in registers.
#include "sums.h"

#include <algorithm>
#include <cstring>

#ifdef __AVX2__
// GCC 12 warns of its own headers: their "undefined" vectors are meant so.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

#include "export.h"

namespace sums {
namespace {

constexpr int64_t lanes = 16;
constexpr int64_t depth = 4;  // vectors at a time
constexpr int64_t block = lanes * depth;

// Sixteen float32. bf16 is rounded to nearest, ties to even, also what is denormal; a NaN stays one: torch's bits.
#if defined(__AVX512F__)

struct Floats {
    __m512 x;

    void operator+=(Floats y) { x = _mm512_add_ps(x, y.x); }

    static Floats float32_at(const char* p) { return {_mm512_loadu_ps(p)}; }
    void float32_to(char* p) const { _mm512_storeu_ps(p, x); }

    static Floats bfloat16_at(const char* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
    }
    void bfloat16_to(char* p) const {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i y = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0xffff));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(y));
    }

    static Floats float16_at(const char* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    void float16_to(char* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
};

#elif defined(__AVX2__) && defined(__F16C__)

struct Floats {
    __m256 x[2];

    void operator+=(Floats y) {
        for (int i = 0; i < 2; i++) x[i] = _mm256_add_ps(x[i], y.x[i]);
    }

    static __m128i eight(const char* p, int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i); }

    static Floats float32_at(const char* p) {
        const float* f = reinterpret_cast<const float*>(p);
        return {{_mm256_loadu_ps(f), _mm256_loadu_ps(f + 8)}};
    }
    void float32_to(char* p) const {
        for (int i = 0; i < 2; i++) _mm256_storeu_ps(reinterpret_cast<float*>(p) + 8 * i, x[i]);
    }

    static Floats bfloat16_at(const char* p) {
        Floats y;
        for (int i = 0; i < 2; i++)
            y.x[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight(p, i)), 16));
        return y;
    }
    void bfloat16_to(char* p) const {
        __m256i y[2];
        for (int i = 0; i < 2; i++) {
            const __m256i bits = _mm256_castps_si256(x[i]);
            const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
            const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x[i], x[i], _CMP_UNORD_Q));
            y[i] = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0xffff), nan);
        }
        const __m256i all = _mm256_permute4x64_epi64(_mm256_packus_epi32(y[0], y[1]), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), all);
    }

    static Floats float16_at(const char* p) { return {{_mm256_cvtph_ps(eight(p, 0)), _mm256_cvtph_ps(eight(p, 1))}}; }
    void float16_to(char* p) const {
        for (int i = 0; i < 2; i++)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + i, _mm256_cvtps_ph(x[i], _MM_FROUND_TO_NEAREST_INT));
    }
};

#else

struct Floats {
    float x[lanes];

    void operator+=(const Floats& y) {
        for (int64_t i = 0; i < lanes; i++) x[i] += y.x[i];
    }

    static Floats float32_at(const char* p) {
        Floats y;
        std::memcpy(y.x, p, sizeof y.x);
        return y;
    }
    void float32_to(char* p) const { std::memcpy(p, x, sizeof x); }

    static Floats bfloat16_at(const char* p) {
        uint16_t halves[lanes];
        std::memcpy(halves, p, sizeof halves);
        uint32_t words[lanes];
        for (int64_t i = 0; i < lanes; i++) words[i] = uint32_t(halves[i]) << 16;
        return float32_at(reinterpret_cast<const char*>(words));
    }
    void bfloat16_to(char* p) const {
        uint32_t words[lanes];
        std::memcpy(words, x, sizeof words);
        uint16_t halves[lanes];
        for (int64_t i = 0; i < lanes; i++) {
            const uint32_t rounded = (words[i] + 0x7fff + ((words[i] >> 16) & 1)) >> 16;
            halves[i] = uint16_t((words[i] & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
        }
        std::memcpy(p, halves, sizeof halves);
    }

    static Floats float16_at(const char*) { return {}; }  // never called: see narrows_sums_dtypes
    void float16_to(char*) const {}
};

#endif

template <int64_t dtype>
Floats at(const char* p) {
    if constexpr (dtype == float32) return Floats::float32_at(p);
    if constexpr (dtype == bfloat16) return Floats::bfloat16_at(p);
    if constexpr (dtype == float16) return Floats::float16_at(p);
}

// A whole block at once, by an instruction that rounds alike but for NaN and what is denormal: false if there are such.
#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512DQ__)
bool put_ordinary(char* p, const Floats (&x)[depth]) {
    constexpr int kinds = 0x01 | 0x20 | 0x80;  // quiet NaN, denormal, signalling NaN
    unsigned odd = 0;
    for (int64_t i = 0; i < depth; i++) odd |= _mm512_fpclass_ps_mask(x[i].x, kinds);
    if (odd) return false;
    for (int64_t i = 0; i < depth; i += 2)
        _mm512_storeu_si512(p + i * lanes * 2, __m512i(_mm512_cvtne2ps_pbh(x[i + 1].x, x[i].x)));
    return true;
}
#else
bool put_ordinary(char*, const Floats (&)[depth]) { return false; }
#endif

template <int64_t dtype>
void put(char* p, const Floats& x) {
    if constexpr (dtype == float32) x.float32_to(p);
    if constexpr (dtype == bfloat16) x.bfloat16_to(p);
    if constexpr (dtype == float16) x.float16_to(p);
}

// One block of a part joins the sum, or begins it.
template <int64_t dtype, bool first>
void join(Floats (&total)[depth], const char* from) {
    for (int64_t i = 0; i < depth; i++) {
        const Floats x = at<dtype>(from + i * lanes * size_of(dtype));
        if constexpr (first)
            total[i] = x;
        else
            total[i] += x;
    }
}

// Blocks `from` to `to` of the sum, in the dtype of part 0. `same`: all parts are of it.
template <int64_t dtype, bool same>
void sum_blocks(char* out, const Part* parts, int64_t num_parts, int64_t from, int64_t to) {
    for (int64_t start = from; start < to; start += block) {
        Floats total[depth];
        join<dtype, true>(total, parts[0].data + start * size_of(dtype));
        for (int64_t i = 1; i < num_parts; i++) {
            const Part& part = parts[i];
            const char* x = part.data + start * size_of(part.dtype);
            if (same || part.dtype == dtype)
                join<dtype, false>(total, x);
            else if (part.dtype == float32)
                join<float32, false>(total, x);
            else if (part.dtype == bfloat16)
                join<bfloat16, false>(total, x);
            else
                join<float16, false>(total, x);
        }
        if (dtype == bfloat16 && put_ordinary(out + start * 2, total)) continue;
        for (int64_t i = 0; i < depth; i++) put<dtype>(out + (start + i * lanes) * size_of(dtype), total[i]);
    }
}

using Sum = void (*)(char*, const Part*, int64_t, int64_t, int64_t);

template <bool same>
Sum sum_of(int64_t dtype) {
    const Sum all[] = {sum_blocks<float32, same>, sum_blocks<bfloat16, same>, sum_blocks<float16, same>};
    return all[dtype];
}

// Less than a block, from number `from` on: in blocks of its own, so that nothing is read or written beyond the end.
void sum_rest(char* out, const Part* parts, int64_t num_parts, int64_t from, int64_t rest) {
    float total[block];
    char addend[block * sizeof(float)] = {};
    std::fill(total, total + block, -0.0f);  // what changes no number that it is added to
    char* const sum = reinterpret_cast<char*>(total);
    for (int64_t i = 0; i < num_parts; i++) {
        const int64_t size = size_of(parts[i].dtype);
        std::memcpy(addend, parts[i].data + from * size, size_t(rest * size));
        const Part two[2] = {{sum, float32}, {addend, parts[i].dtype}};
        sum_blocks<float32, false>(sum, two, 2, 0, block);
    }
    const int64_t dtype = parts[0].dtype;
    for (int64_t i = 0; i < block; i += lanes) {
        const Floats x = at<float32>(sum + i * sizeof(float));
        char* const to = addend + i * size_of(dtype);
        dtype == float32 ? put<float32>(to, x) : dtype == bfloat16 ? put<bfloat16>(to, x) : put<float16>(to, x);
    }
    std::memcpy(out, addend, size_t(rest * size_of(dtype)));
}

}  // namespace

void sum(char* out, const Part* parts, int64_t num_parts, int64_t count) {
    const int64_t dtype = parts[0].dtype;
    const bool same = std::all_of(parts, parts + num_parts, [&](const Part& part) { return part.dtype == dtype; });
    const Sum add = same ? sum_of<true>(dtype) : sum_of<false>(dtype);
    const int64_t whole = count / block * block;
    add(out, parts, num_parts, 0, whole);
    if (whole == count) return;
    sum_rest(out + whole * size_of(dtype), parts, num_parts, whole, count - whole);
}

}  // namespace sums

// The dtypes that are summed here, as bits: float16 needs the CPU's conversions.
NARROWS_EXPORT int64_t narrows_sums_dtypes() {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
    return 1 << sums::float32 | 1 << sums::bfloat16 | 1 << sums::float16;
#else
    return 1 << sums::float32 | 1 << sums::bfloat16;
#endif
}
