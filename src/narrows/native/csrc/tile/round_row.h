// Rows rounded to int8, for products with int8 weights.
#pragma once

#include <bit>

#include "simd/simd.h"

namespace narrows::NARROWS_TARGET {

// A row's scale, and 128 times the sum of its numbers.
struct Rounded {
    float scale;
    int32_t offset;
};

// The sum of all lanes, modulo 2^32: what is not finite is rounded to -2^31.
inline uint32_t wrapping_sum(I32x16 x) {
    uint32_t lanes[16], sum = 0;
    store(reinterpret_cast<int32_t*>(lanes), x);
    for (const uint32_t lane : lanes) sum += lane;
    return sum;
}

// Rounds a row to int8; `to` has room for 16 numbers more, and is filled up with zeros. Magnitudes are compared as
// integers, of which a NaN is the largest: the scale is then NaN and so are the results. A maximum of floats loses it.
inline Rounded round_row(int8_t* to, const bf16* row, int64_t num_inputs) {
    I32x16 most = zero_int();
    for (int64_t k = 0; k < num_inputs; k += 16) {
        most = max(most, bits_of(abs(load(row + k, first_lanes(num_inputs - k)))));
    }
    const float largest = std::bit_cast<float>(reduce_max(most));
    const F32x16 inverse = set(largest > 0.0f ? 127.0f / largest : 0.0f);
    I32x16 sum = zero_int();
    for (int64_t k = 0; k < num_inputs; k += 16) {
        const I32x16 numbers = rounded(load(row + k, first_lanes(num_inputs - k)) * inverse);
        sum = sum + numbers;
        store_i8(to + k, numbers, first_lanes(16));
    }
    return {largest / 127.0f, int32_t(128 * wrapping_sum(sum))};
}

}  // namespace narrows::NARROWS_TARGET
