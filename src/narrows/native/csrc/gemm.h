// The matrix products that gemm.cpp and experts.cpp share: packed weights, packed rows, and a register tile for each
// kind of weight: bf16, and int8 with bf16 rows or with rows rounded to int8 (gemm_int8.h).
//
// A bf16 weight [N, K] is held as panels of 32 outputs: [N / 32][K / 2][32][2], two neighbouring inputs side by side, as
// vdpbf16ps (and the tiles of AMX) want them; missing outputs and an odd last input are zeros. A panel is read from
// front to back, so that a product of few rows streams the weight once, at the speed of memory.
// Rows are packed likewise, in blocks of up to 12: [K / 2][rows][2].
//
// Each result is one chain of additions over K in a fixed order, whatever other rows and columns there are: a row's
// bits never depend on its company. Many rows may go to another library's product instead (`Brgemm`), which is for CPUs
// with AMX, and promises no such thing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "fatal.h"
#include "vector.h"

#if defined(NARROWS_VECTORS) && defined(__AVX512BF16__)
#define NARROWS_GEMM 1

namespace narrows {

constexpr int64_t PANEL = 32;       // outputs of a panel
constexpr int64_t BLOCK = 12;       // most rows of a block: 12 x 2 accumulators of the 32 registers
constexpr int64_t CHUNK = 384 << 10;  // bytes of packed rows that are worked on together; they stay in the L2 cache

inline int64_t pairs_of(int64_t num_inputs) { return (num_inputs + 1) / 2; }
inline int64_t panels_of(int64_t num_outputs) { return (num_outputs + PANEL - 1) / PANEL; }

// Memory of the calling thread, kept for its next call.
class Scratch {
   public:
    Scratch() = default;
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // Room for `count` numbers, of an address also where there are none. Ends the process if there is no memory.
    template <typename T>
    T* of(int64_t count) {
        const int64_t bytes = std::max<int64_t>(64, (count * int64_t(sizeof(T)) + 63) / 64 * 64);
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            data_ = std::aligned_alloc(64, bytes);
            if (data_ == nullptr) fatal("no memory for %lld bytes of packed numbers", static_cast<long long>(bytes));
            size_ = bytes;
        }
        return static_cast<T*>(data_);
    }

   private:
    void* data_ = nullptr;
    int64_t size_ = 0;
};

// torch's `at::native::cpublas::brgemm` for bf16 (M, N, K, lda, ldb, ldc, add to C, A, B in pairs as here, C, pairs)
// and `brgemm_release`, which gives the tiles of AMX back.
struct Brgemm {
    void (*product)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const bf16*, const bf16*, float*, bool);
    void (*release)(bool);
};

constexpr int64_t MANY = 16;  // rows from which on tiles of 16 rows are worth it

// How rows are cut into blocks of nearly equal height: block i is rows [start(i), start(i + 1)).
struct Blocks {
    int64_t num_rows, count;
    explicit Blocks(int64_t rows, int64_t most = BLOCK) : num_rows(rows), count((rows + most - 1) / most) {}
    int64_t start(int64_t i) const { return i * num_rows / count; }
};

// Packs `num_rows` rows (`row_of` gives each one's address) into one block; `in_order`: as they are, for `Brgemm`.
template <typename RowOf>
inline void pack_rows(uint32_t* block, RowOf row_of, int64_t num_rows, int64_t num_inputs, bool in_order) {
    const int64_t whole = num_inputs / 2;
    if (in_order) {
        for (int64_t r = 0; r < num_rows; ++r) {
            uint32_t* to = block + r * pairs_of(num_inputs);
            if (whole) std::memcpy(to, row_of(r), whole * 4);
            if (num_inputs % 2) to[whole] = row_of(r)[num_inputs - 1];
        }
        return;
    }
    for (int64_t r = 0; r < num_rows; ++r) {
        const bf16* row = row_of(r);
        uint32_t* to = block + r;
        for (int64_t p = 0; p < whole; ++p) {
            uint32_t pair;
            std::memcpy(&pair, row + 2 * p, 4);
            to[p * num_rows] = pair;
        }
        if (num_inputs % 2) to[whole * num_rows] = row[num_inputs - 1];
    }
}

// What a tile fetches with each word of a panel: `STREAMED` (the panel comes from memory) what lies 8 KB further on;
// else, the panel being in the L2 cache, its next lines from there, and `ahead`, `step` bytes each time, into the L2 cache.
template <bool STREAMED>
inline void fetch(const uint32_t* panel, const char*& ahead, int64_t step) {
    const char* later = reinterpret_cast<const char*>(panel) + (STREAMED ? 8192 : 1024);
    _mm_prefetch(later, _MM_HINT_T0);
    _mm_prefetch(later + 64, _MM_HINT_T0);
    if (!STREAMED) {
        _mm_prefetch(ahead, _MM_HINT_T1);
        ahead += step;
    }
}

// The register tile: `ROWS` packed rows times one panel; `store(row, low, high)` takes 2 x 16 results in float32.
template <int ROWS, bool STREAMED, typename Store>
inline void tile(const uint32_t* block, const uint32_t* panel, int64_t num_pairs, const char* ahead,
                 int64_t ahead_step, Store store) {
    __m512 low[ROWS], high[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) low[r] = high[r] = _mm512_setzero_ps();
    for (int64_t p = 0; p < num_pairs; ++p) {
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel), w1 = (__m512bh)_mm512_loadu_si512(panel + 16);
        fetch<STREAMED>(panel, ahead, ahead_step);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(int32_t(block[r]));
            low[r] = _mm512_dpbf16_ps(low[r], x, w0);
            high[r] = _mm512_dpbf16_ps(high[r], x, w1);
        }
        block += ROWS;
        panel += PANEL;
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) store(r, low[r], high[r]);
}

// A packed weight: its panels, and of an int8 one the scale of each output.
struct Packed {
    const uint32_t* panels;
    const float* scales;
};

// A kind of weight says how many words of 4 bytes a packed row has (`row_words`), and an output in its panel
// (`panel_words`), how many rows make a block, how they are packed, and how a block of them is multiplied with a panel.
struct Bf16 {
    static constexpr int64_t MOST_ROWS = BLOCK;  // of a block
    static int64_t row_words(int64_t num_inputs) { return pairs_of(num_inputs); }
    static int64_t panel_words(int64_t num_inputs) { return pairs_of(num_inputs); }
    template <typename RowOf>
    static void pack(uint32_t* block, RowOf row_of, int64_t num_rows, int64_t num_inputs, bool in_order) {
        pack_rows(block, row_of, num_rows, num_inputs, in_order);
    }
    template <int ROWS, bool STREAMED, typename Store>
    static void multiply(const uint32_t* block, const Packed& weight, int64_t panel, int64_t num_words,
                         const char* ahead, int64_t ahead_step, Store store) {
        tile<ROWS, STREAMED>(block, weight.panels + panel * num_words * PANEL, num_words, ahead, ahead_step, store);
    }
};

template <typename Kind, bool STREAMED, typename Store>
inline void tile_of(int64_t rows, const uint32_t* block, const Packed& weight, int64_t panel, int64_t num_words,
                    const char* ahead, int64_t ahead_step, Store store) {
    switch (rows) {
#define CASE(N) \
    case N: Kind::template multiply<N, STREAMED>(block, weight, panel, num_words, ahead, ahead_step, store); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

// Blocks [first, stop) of packed rows (`rows` begins with block `first`) times one panel. Of several passes over the
// panel each fetches its share of the one that comes next. `brgemm`: the rows are packed in order, and it multiplies.
template <typename Kind, typename Store>
inline void panel_product(const uint32_t* rows, const Blocks& blocks, int64_t first, int64_t stop, const Packed& weight,
                          int64_t panel, int64_t num_inputs, const Brgemm* brgemm, Store store) {
    const int64_t passes = stop - first, base = blocks.start(first), step = PANEL * 4 / passes;
    const int64_t num_words = Kind::panel_words(num_inputs), row_words = Kind::row_words(num_inputs);
    const uint32_t* begin = weight.panels + panel * num_words * PANEL;
    if (brgemm != nullptr && num_words > 0) {
        static thread_local Scratch for_sums;
        const int64_t count = blocks.start(stop) - base;
        float* sums = for_sums.of<float>(count * PANEL);
        brgemm->product(count, PANEL, 2 * num_words, 2 * num_words, PANEL, PANEL, false,
                        reinterpret_cast<const bf16*>(rows), reinterpret_cast<const bf16*>(begin), sums, true);
        for (int64_t r = 0; r < count; ++r) store(base + r, load16(sums + r * PANEL), load16(sums + r * PANEL + 16));
        return;
    }
    const char* next = reinterpret_cast<const char*>(begin + num_words * PANEL);
    for (int64_t b = first; b < stop; ++b) {
        const int64_t start = blocks.start(b), count = blocks.start(b + 1) - start;
        const uint32_t* block = rows + (start - base) * row_words;
        const auto keep = [&](int64_t r, __m512 low, __m512 high) { store(start + r, low, high); };
        if (passes == 1) {
            tile_of<Kind, true>(count, block, weight, panel, num_words, nullptr, 0, keep);
        } else {
            tile_of<Kind, false>(count, block, weight, panel, num_words, next + (b - first) * step * num_words, step,
                                 keep);
        }
    }
}

// silu(gate) * up in float32.
inline __m512 silu_mul16(__m512 gate, __m512 up) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), gate));
    return _mm512_mul_ps(_mm512_div_ps(gate, _mm512_add_ps(one, e)), up);
}

}  // namespace narrows
#endif
