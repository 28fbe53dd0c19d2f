// Packed weights and the product that many rows may go to, as the tests of products need them.
#pragma once

#include "check.h"

namespace testing {

using narrows::Brgemm, narrows::Packed;

constexpr int64_t PANEL = 32;  // outputs of a panel
inline int64_t pairs_of(int64_t num_inputs) { return (num_inputs + 1) / 2; }
inline int64_t panels_of(int64_t num_outputs) { return (num_outputs + PANEL - 1) / PANEL; }

inline std::vector<int> kinds() { return {BF16_WEIGHT, INT8, INT8_WEIGHT}; }

// `count` weights [num_outputs, num_inputs] of small whole numbers times `scale`, packed one after the other. `gated`:
// the outputs are gates, then ups.
class Weights {
 public:
    Weights(int64_t count, int64_t num_outputs, int64_t num_inputs, int kind, bool gated, Random& random,
            float scale = 1)
        : num_outputs_(num_outputs),
          num_inputs_(num_inputs),
          kind_(kind),
          padded_(panels_of(num_outputs) * PANEL),
          values_(count * num_outputs * num_inputs),
          panels_(count * padded_ * words()),
          scales_(kind ? count * padded_ : 0) {
        Buffer<bf16> rows(num_outputs * num_inputs);
        Buffer<int8_t> codes(num_outputs * num_inputs);
        for (int64_t w = 0; w < count; ++w) {
            float* values = values_.data() + w * num_outputs * num_inputs;
            for (int64_t i = 0; i < rows.size(); ++i) {
                const float x = random.whole(3);
                codes[i] = int8_t(x);
                rows[i] = stored<bf16>(x * scale);
                values[i] = kind ? x * scale : to_float(rows[i]);
            }
            for (int64_t o = 0; kind && o < num_outputs; ++o) scales_[w * padded_ + place(o, gated)] = scale;
            const int64_t parts = gated ? 2 : 1, per_part = num_outputs / parts;
            for (int64_t part = 0; part < parts; ++part) {
                // In two pieces, as loads may bring them.
                const int64_t cut = per_part / 3;
                pack(w, rows, codes, part * per_part, 0, cut, gated ? part : -1);
                pack(w, rows, codes, part * per_part, cut, per_part - cut, gated ? part : -1);
            }
        }
    }

    float at(int64_t weight, int64_t output, int64_t input) const {
        return values_[(weight * num_outputs_ + output) * num_inputs_ + input];
    }
    const uint32_t* panels() { return panels_.data(); }
    const float* scales() { return scales_.data(); }
    Packed packed() { return {panels(), scales(), kind_}; }

 private:
    int64_t words() const { return kind_ ? (num_inputs_ + 3) / 4 : (num_inputs_ + 1) / 2; }
    int64_t place(int64_t output, bool gated) const {
        if (!gated) return output;
        const int64_t part = output / (num_outputs_ / 2), o = output % (num_outputs_ / 2);
        return o / 16 * 32 + o % 16 + 16 * part;
    }
    void pack(int64_t weight, Buffer<bf16>& rows, Buffer<int8_t>& codes, int64_t from, int64_t first, int64_t num_rows,
              int64_t half) {
        uint32_t* to = panels_.data() + weight * padded_ * words();
        const int64_t source = (from + first) * num_inputs_;
        if (kind_)
            call::gemm_pack_int8(to, codes.data() + source, num_inputs_, first, num_rows, num_inputs_, half);
        else
            call::gemm_pack(to, rows.data() + source, num_inputs_, first, num_rows, num_inputs_, half);
    }

    int64_t num_outputs_, num_inputs_;
    int kind_;
    int64_t padded_;
    std::vector<float> values_;
    Buffer<uint32_t> panels_;
    Buffer<float> scales_;
};

// A product as torch's brgemm makes it, number by number: a [m, k], b [k / 2, n] in pairs, c [m, n].
inline void plain_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                          const bf16* a, const bf16* b, float* c, bool) {
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            float sum = add ? c[i * ldc + j] : 0.0f;
            for (int64_t p = 0; p < k; ++p)
                sum += to_float(a[i * lda + p]) * to_float(b[(p / 2 * ldb + j) * 2 + p % 2]);
            c[i * ldc + j] = sum;
        }
    }
}
inline void plain_release(bool) {}
inline constexpr Brgemm plain_brgemm{plain_product, plain_release};

}  // namespace testing
