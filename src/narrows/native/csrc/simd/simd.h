// Sixteen float32 or int32 at once, whatever the registers of the target: all that kernels know of vectors.
//
// Numbers: F32x16 (+ - * /), I32x16 (+ -), and Lanes, the first so many of sixteen.
//   load, store          of float32 or bf16; with Lanes, others are neither read nor written, and load as 0
//   store_exactly        as store of bf16, also what is denormal: store flushes that where an instruction does
//   store_ordinary       four of them as store_exactly, if an instruction can: else false, and nothing is stored
//   mul_add(a, b, c)     a * b + c rounded once; mul_sub a * b - c, neg_mul_add c - a * b
//   add_product          sum + x * y rounded once, into the register of the sum: for tiles that fill all registers
//   as_bf16              rounded to bf16, as store rounds
//   max(a, b)            b where one of them is a NaN
//   reduce_sum           by halves: lane i + lane i + 8, then + 4, + 2, + 1; the same tree on every target
//   round, rounded       to the nearest whole number, ties to even; `rounded` as int32, the least if it does not fit
//   times_power_of_2     x * 2^n rounded once, n whole
//   store_columns        so many rows of sixteen, column by column
//   load_pairs           sixteen pairs of neighbours: first members, and second ones
//   low_half, high_half  the two bf16 of each word; even_bytes, odd_bytes: two bytes of each word as pairs of int16
//   mul_add_pairs        c + the two products of int16 in each lane
//   shift_right          of unsigned words, by as many bits in all lanes; shift_left
//   dot_bytes            sum + the four products of a's unsigned bytes with b's signed ones in each lane; unless
//                        DOTS_ANY_BYTE, a's are at most 127, and b's at least -127. dot_signed_bytes: a's are signed
//
// Products and sums are rounded one by one (-ffp-contract=off), so results are the same bits on all targets, but where
// an instruction says otherwise: bf16 that is denormal (`store`), products of bf16 (tile/), and mul_add where a CPU has
// none.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd/avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd/avx2.h"
#else
#include "simd/portable.h"
#endif

namespace narrows::NARROWS_TARGET {

// A float32 as it is after it was stored as T.
template <typename T>
inline F32x16 stored_as(F32x16 x) {
    if constexpr (sizeof(T) == 4)
        return x;
    else
        return as_bf16(x);
}

// p(r) = c[0] r^n + c[1] r^(n - 1) + ...
template <size_t N>
inline F32x16 polynomial(const float (&c)[N], F32x16 r) {
    F32x16 p = set(c[0]);
#pragma GCC unroll 8
    for (size_t i = 1; i < N; ++i) p = mul_add(p, r, set(c[i]));
    return p;
}

// exp(x) to about 1 unit in the last place of float32; 0 below -104, infinity above 88.8.
inline F32x16 exp(F32x16 x) {
    const F32x16 n = round(x * set(1.44269504088896341f));
    F32x16 r = neg_mul_add(n, set(0.693145751953125f), x);
    r = neg_mul_add(n, set(1.42860682030941723e-6f), r);
    constexpr float by_factorials[] = {
        1.9841269841e-4f, 1.3888888889e-3f, 8.3333333333e-3f, 4.1666666667e-2f, 1.6666666667e-1f, 0.5f, 1.0f, 1.0f};
    const F32x16 y = times_power_of_2(polynomial(by_factorials, r), n);
    // x itself may be infinite: then r is a NaN.
    const F32x16 large = if_greater(x, set(88.8f), set(__builtin_inff()), y);
    return if_greater(set(-104.0f), x, zero(), large);
}

// 2^x to about 1 unit in the last place of float32, for x <= 0; 0 far below.
inline F32x16 exp2(F32x16 x) {
    const F32x16 n = round(x);
    constexpr float by_factorials[] = {1.54035304e-4f,
                                       1.33335581e-3f,
                                       9.61812911e-3f,
                                       5.55041087e-2f,
                                       2.40226507e-1f,
                                       6.93147181e-1f,
                                       1.0f};  // ln(2)^k / k!
    return times_power_of_2(polynomial(by_factorials, x - n), n);
}

}  // namespace narrows::NARROWS_TARGET
