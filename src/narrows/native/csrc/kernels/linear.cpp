// Products of bf16 rows with a packed weight (products.h says how): a linear layer, and gate and up with their
// activation.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "kernels/products.h"

namespace narrows::NARROWS_TARGET {
namespace {

// Puts rows [first, first + num_rows) of a weight into its panels, `INPUTS` numbers to a word of 4 bytes.
// `flip` is added to each word without carry.
template <int INPUTS, typename Number>
void pack_weight(uint32_t* panels, const Number* source, int64_t stride, int64_t first, int64_t num_rows,
                 int64_t num_inputs, int64_t half, uint32_t flip) {
    const int64_t num_whole = num_inputs / INPUTS, num_words = (num_inputs + INPUTS - 1) / INPUTS;
    const int64_t width = half < 0 ? PANEL : PANEL / 2;
    const int64_t offset = half == 1 ? PANEL / 2 : 0;
    constexpr int64_t SPAN = 64;  // words at a time: what is written stays in the cache until its lines are full
    for (int64_t row = first; row < first + num_rows;) {
        const int64_t stop = std::min(first + num_rows, (row / width + 1) * width);
        uint32_t* panel = panels + row / width * num_words * PANEL + offset + row % width;
        for (int64_t from = 0; from < num_words; from += SPAN) {
            const int64_t until = std::min(num_whole, from + SPAN);
            for (int64_t r = row; r < stop; ++r) {
                const Number* x = source + (r - first) * stride;
                for (int64_t p = from; p < until; ++p) {  // a copy of a size that is known is one instruction
                    uint32_t word;
                    std::memcpy(&word, x + INPUTS * p, sizeof word);
                    panel[p * PANEL + r - row] = word ^ flip;
                }
                if (from + SPAN >= num_words && num_whole < num_words) {
                    uint32_t word = 0;
                    std::memcpy(&word, x + INPUTS * num_whole, (num_inputs - INPUTS * num_whole) * sizeof(Number));
                    panel[num_whole * PANEL + r - row] = word ^ flip;
                }
            }
        }
        row = stop;
    }
}

}  // namespace

// Puts rows [first, first + num_rows) of a bf16 weight into its panels, source [num_rows, num_inputs] with row stride
// `stride`. `half`: panels hold 16 gates and 16 ups; this is a part of the gates (0) or the ups (1); -1: plain panels.
void gemm_pack(uint32_t* panels, const bf16* source, int64_t stride, int64_t first, int64_t num_rows,
               int64_t num_inputs, int64_t half) {
    pack_weight<2>(panels, source, stride, first, num_rows, num_inputs, half, 0);
}

// The same for a weight of int8, whose panels hold 128 more (products.h).
void gemm_pack_int8(uint32_t* panels, const int8_t* source, int64_t stride, int64_t first, int64_t num_rows,
                    int64_t num_inputs, int64_t half) {
    pack_weight<4>(panels, source, stride, first, num_rows, num_inputs, half, 0x80808080);
}

namespace {

// Calls `product(first_block, stop_block, packed rows, first_panel, stop_panel)` for chunks of rows and ranges of
// panels, on `num_threads` threads that share the panels. Few rows are packed by each thread for itself: on a busy
// machine waiting for each other would cost them more.
template <typename Kind, typename Product>
void for_chunks(const bf16* x, int64_t stride, int64_t num_rows, int64_t num_inputs, int64_t num_panels,
                int num_threads, const Brgemm* brgemm, Product product) {
    // Each thread's own: a thread_local is freed only where its thread comes through the declaration.
    const auto room_for = [](int64_t words) {
        static thread_local Scratch scratch;
        return scratch.of<uint32_t>(words);
    };
    constexpr int64_t FEW = 64 << 10;  // bytes
    const int64_t row_words = Kind::row_words(num_inputs);
    const Blocks blocks(num_rows, Kind::MOST_ROWS);
    const int64_t per_chunk = std::max<int64_t>(1, CHUNK / (Kind::MOST_ROWS * std::max<int64_t>(1, row_words) * 4));
    const int64_t room = std::min(per_chunk * Kind::MOST_ROWS, num_rows) * row_words;
    const auto pack = [&](uint32_t* packed, int64_t first, int64_t stop, int thread, int threads) {
        const int64_t base = blocks.start(first);
        for (int64_t b = first + thread; b < stop; b += threads) {
            const int64_t start = blocks.start(b);
            Kind::pack(
                packed + (start - base) * row_words, [&](int64_t r) { return x + (start + r) * stride; },
                blocks.start(b + 1) - start, num_inputs, brgemm != nullptr);
        }
    };
    const auto multiply = [&](const uint32_t* packed, int64_t first, int64_t stop, int thread, int threads) {
        product(first, stop, packed, thread * num_panels / threads, (thread + 1) * num_panels / threads);
        if (brgemm != nullptr) brgemm->release(true);
    };
    if (num_threads <= 1) {
        uint32_t* packed = room_for(room);
        for (int64_t first = 0; first < blocks.count; first += per_chunk) {
            const int64_t stop = std::min(blocks.count, first + per_chunk);
            pack(packed, first, stop, 0, 1);
            multiply(packed, first, stop, 0, 1);
        }
    } else if (room * 4 <= FEW && blocks.count <= per_chunk) {
#pragma omp parallel num_threads(num_threads)
        {
            uint32_t* packed = room_for(room);  // this thread's
            pack(packed, 0, blocks.count, 0, 1);
            multiply(packed, 0, blocks.count, omp_get_thread_num(), omp_get_num_threads());
        }
    } else {
        uint32_t* packed = room_for(room);  // the caller's, for all threads
#pragma omp parallel num_threads(num_threads)
        for (int64_t first = 0; first < blocks.count; first += per_chunk) {
            const int64_t stop = std::min(blocks.count, first + per_chunk);
            pack(packed, first, stop, omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
            multiply(packed, first, stop, omp_get_thread_num(), omp_get_num_threads());
            if (stop < blocks.count) {
#pragma omp barrier
            }
        }
    }
}

template <typename Kind, typename Out>
void multiply_rows(Out* out, int64_t out_stride, const bf16* x, int64_t x_stride, const Packed& weight,
                   const bf16* bias, int64_t num_rows, int64_t num_outputs, int64_t num_inputs, int num_threads,
                   const Brgemm* brgemm) {
    const Blocks blocks(num_rows, Kind::MOST_ROWS);
    const auto product = [&](int64_t first, int64_t stop, const uint32_t* packed, int64_t panel, int64_t last) {
        for (; panel < last; ++panel) {
            const int64_t column = panel * PANEL;
            const Lanes here = first_lanes(num_outputs - column);
            const Lanes next = first_lanes(num_outputs - column - 16);
            F32x16 b0 = zero(), b1 = b0;
            if (bias != nullptr) b0 = load(bias + column, here), b1 = load(bias + column + 16, next);
            Kind::product(packed, blocks, first, stop, weight, panel, num_inputs, brgemm,
                          [&](int64_t row, F32x16 low, F32x16 high) {
                              Out* to = out + row * out_stride + column;
                              store(to, low + b0, here);
                              store(to + 16, high + b1, next);
                          });
        }
    };
    for_chunks<Kind>(x, x_stride, num_rows, num_inputs, panels_of(num_outputs), num_threads, brgemm, product);
}

}  // namespace

// out[t] = x[t] weight^T + bias, summed in float32, rounded once; `wide`: out is float32, not rounded. Strides in
// elements. bias may be null, and so may brgemm (kernels.h), which is for bf16 alone. `kind` of weight: products.h;
// `scales`: of int8, for whole panels.
void linear(void* out, int64_t out_stride, const bf16* x, int64_t x_stride, int kind, const uint32_t* panels,
            const float* scales, const bf16* bias, int64_t num_rows, int64_t num_outputs, int64_t num_inputs, int wide,
            int num_threads, const Brgemm* brgemm) {
    if (num_rows == 0) return;
    if (num_rows < MANY || kind != BF16_WEIGHT || !TAKES_BRGEMM) brgemm = nullptr;
    const Packed weight{panels, scales, kind};
    with_kind(kind, [&]<typename Kind>(Kind) {
        if (wide) {
            multiply_rows<Kind>(static_cast<float*>(out), out_stride, x, x_stride, weight, bias, num_rows, num_outputs,
                                num_inputs, num_threads, brgemm);
        } else {
            multiply_rows<Kind>(static_cast<bf16*>(out), out_stride, x, x_stride, weight, bias, num_rows, num_outputs,
                                num_inputs, num_threads, brgemm);
        }
    });
}

namespace {

constexpr int LINE = 64 / sizeof(bf16);  // numbers that are fetched at once

// ROWS rows times four outputs at a time of a plain weight [num_outputs, num_inputs].
template <int ROWS>
void few_rows(bf16* out, int64_t out_stride, const bf16* x, int64_t x_stride, const bf16* weight, const bf16* bias,
              int64_t first, int64_t stop, int64_t num_inputs) {
    constexpr int AT_ONCE = OUTPUTS_AT_ONCE<ROWS>;
    for (; first < stop; first += AT_ONCE) {
        const int64_t here = std::min<int64_t>(AT_ONCE, stop - first);
        const bf16* w[AT_ONCE];
        for (int o = 0; o < AT_ONCE; ++o) w[o] = weight + (first + std::min<int64_t>(o, here - 1)) * num_inputs;
        F32x16 sum[ROWS][AT_ONCE];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
            for (int o = 0; o < AT_ONCE; ++o) sum[r][o] = zero();
        }
        const auto step = [&](int64_t k, auto load) {
            Numbers column[AT_ONCE];
#pragma GCC unroll 4
            for (int o = 0; o < AT_ONCE; ++o) column[o] = load(w[o] + k);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const Numbers value = load(x + r * x_stride + k);
#pragma GCC unroll 4
                for (int o = 0; o < AT_ONCE; ++o) sum[r][o] = add_dot(sum[r][o], value, column[o]);
            }
        };
        const bf16* ahead = weight + (first + AT_ONCE) * num_inputs;  // the next outputs, which lie behind these
        int64_t k = 0;
        for (; k + NUMBERS <= num_inputs; k += NUMBERS) {
            step(k, [](const bf16* p) { return load_numbers(p); });
            for (int i = 0; i < AT_ONCE * NUMBERS; i += LINE) fetch_near(ahead + AT_ONCE * k + i);
        }
        if (k < num_inputs) step(k, [&](const bf16* p) { return load_numbers(p, num_inputs - k); });
        for (int r = 0; r < ROWS; ++r) {
            for (int64_t o = 0; o < here; ++o) {
                const float y = reduce_sum(sum[r][o]) + (bias == nullptr ? 0.0f : to_float(bias[first + o]));
                out[r * out_stride + first + o] = to_bf16(y);
            }
        }
    }
}

}  // namespace

// As narrows_linear, of a plain weight [num_outputs, num_inputs] without gaps and at most 4 rows: for a weight that
// has to stay as it is (an embedding that is also the head).
void linear_few(bf16* out, int64_t out_stride, const bf16* x, int64_t x_stride, const bf16* weight, const bf16* bias,
                int64_t num_rows, int64_t num_outputs, int64_t num_inputs, int num_threads) {
    const auto work = [&](int64_t thread, int64_t threads) {
        const int64_t first = thread * num_outputs / threads, stop = (thread + 1) * num_outputs / threads;
        switch (num_rows) {
#define CASE(N)                                                                           \
    case N:                                                                               \
        few_rows<N>(out, out_stride, x, x_stride, weight, bias, first, stop, num_inputs); \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
        }
    };
    if (num_threads <= 1) return work(0, 1);
#pragma omp parallel num_threads(num_threads)
    work(omp_get_thread_num(), omp_get_num_threads());
}

namespace {

template <typename Kind>
void activate_rows(bf16* out, int64_t out_stride, const bf16* x, int64_t x_stride, const Packed& weight,
                   const bf16* bias, int64_t num_rows, int64_t num_inner, int64_t num_inputs, int num_threads,
                   const Brgemm* brgemm) {
    const Blocks blocks(num_rows, Kind::MOST_ROWS);
    const auto product = [&](int64_t first, int64_t stop, const uint32_t* packed, int64_t panel, int64_t last) {
        for (; panel < last; ++panel) {
            const int64_t column = panel * PANEL / 2;
            const Lanes here = first_lanes(num_inner - column);
            F32x16 b0 = zero(), b1 = b0;
            if (bias != nullptr) b0 = load(bias + column, here), b1 = load(bias + num_inner + column, here);
            Kind::product(packed, blocks, first, stop, weight, panel, num_inputs, brgemm,
                          [&](int64_t row, F32x16 low, F32x16 high) {
                              const F32x16 y = silu_mul(low + b0, high + b1);
                              store(out + row * out_stride + column, y, here);
                          });
        }
    };
    for_chunks<Kind>(x, x_stride, num_rows, num_inputs, panels_of(2 * num_inner), num_threads, brgemm, product);
}

}  // namespace

// out[t] = silu(gate x[t] + bias) * (up x[t] + bias), in float32, rounded once; out [num_rows, num_inner] and bias
// [gates, then ups] or null. The weight as in narrows_linear.
void gate_up(bf16* out, int64_t out_stride, const bf16* x, int64_t x_stride, int kind, const uint32_t* panels,
             const float* scales, const bf16* bias, int64_t num_rows, int64_t num_inner, int64_t num_inputs,
             int num_threads, const Brgemm* brgemm) {
    if (num_rows == 0) return;
    if (num_rows < MANY || kind != BF16_WEIGHT || !TAKES_BRGEMM) brgemm = nullptr;
    with_kind(kind, [&]<typename Kind>(Kind) {
        activate_rows<Kind>(out, out_stride, x, x_stride, {panels, scales, kind}, bias, num_rows, num_inner, num_inputs,
                            num_threads, brgemm);
    });
}

}  // namespace narrows::NARROWS_TARGET
