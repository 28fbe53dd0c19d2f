// Single rows of a weight in blocks (tile/blocks.h): an embedding that is also the head.
#include <algorithm>

#include "kernels/products.h"

namespace narrows::NARROWS_TARGET {
namespace {

// The numbers of one output of a panel, rounded to bf16.
template <typename Format>
void one_output(bf16* out, const uint32_t* panel, int64_t lane, int64_t num_inputs) {
    constexpr int64_t GROUPS_OF = Format::INPUTS / GROUP, PER_SCALE = GROUP / Format::PARTS;
    constexpr int64_t NUMBERS = GROUPS_OF * Format::PARTS * PANEL;
    alignas(64) float scales[NUMBERS], mins[NUMBERS];
    std::fill(mins, mins + NUMBERS, 0.0f);
    for (int64_t first = 0; first < num_inputs; first += Format::INPUTS) {
        const uint32_t* block = panel + first / Format::INPUTS * Format::BYTES * PANEL / 4;
        Format::scales(block, scales, mins);
        for (int64_t k = 0; k < Format::INPUTS; k += 4) {
            int32_t codes[16];
            store(codes, Format::codes(block, k / GROUP, k % GROUP / 4, lane / 16));
            const int64_t at = k / PER_SCALE * PANEL + lane;
            for (int i = 0; i < 4; ++i) {
                const uint8_t byte = uint8_t(uint32_t(codes[lane % 16]) >> 8 * i);
                const float code = Format::SIGNED ? float(int8_t(byte)) : float(byte);
                out[first + k + i] = to_bf16(scales[at] * code - mins[at]);
            }
        }
    }
}

}  // namespace

// As embedding, of a table in blocks of `kind`, packed as a weight of num_ids outputs.
void embedding_blocks(bf16* out, int64_t out_stride, const int64_t* ids, int64_t num_rows, const uint32_t* panels,
                      int kind, int64_t first_id, int64_t num_ids, int64_t num_inputs) {
    const int64_t size = InBlocks::panel_size({panels, nullptr, kind}, num_inputs);
    InBlocks::with_format(kind, [&]<typename Format>(Format) {
        for (int64_t t = 0; t < num_rows; ++t) {
            const int64_t at = ids[t] - first_id;
            bf16* row = out + t * out_stride;
            if (at < 0 || at >= num_ids) {
                std::fill(row, row + num_inputs, bf16(0));
            } else {
                one_output<Format>(row, panels + at / PANEL * size, at % PANEL, num_inputs);
            }
        }
    });
}

}  // namespace narrows::NARROWS_TARGET
