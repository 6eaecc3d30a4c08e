// Rows times one panel of a weight. The order of the additions is that of the inputs, in runs of at most 128 that never
// cross a tile: it depends on the weight alone, so a row's result does not change with the rows beside it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"
#include "weight.h"

namespace mull {

constexpr int RUN = 128;        // inputs summed before a tile's scale is applied
constexpr int CHUNK_ROWS = 96;  // rows that share one conversion of a run
constexpr int VECTORS = Floats::width == 16 ? 4 : 2;
constexpr int MAX_ROWS = 6;  // with VECTORS accumulators each, and the weights, they fill the registers

struct Accumulator {
    alignas(64) float rows[CHUNK_ROWS][PANEL];
};

// sums[r] += scale * (x[r][0:count] @ codes[0:count])
template <int ROWS, class Code>
inline void multiply(const float* const* x, std::int64_t first, int count, const Code* codes, const float* scale,
                     float (*sums)[PANEL]) {
    for (int column = 0; column < PANEL; column += VECTORS * Floats::width) {
        Floats sum[ROWS][VECTORS];
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) sum[r][v] = Floats::zero();
        for (int k = 0; k < count; ++k) {
            Floats weights[VECTORS];
            for (int v = 0; v < VECTORS; ++v) weights[v] = widen(codes + k * PANEL + column + v * Floats::width);
            for (int r = 0; r < ROWS; ++r) {
                const Floats value = Floats::broadcast(x[r][first + k]);
                for (int v = 0; v < VECTORS; ++v) sum[r][v] = multiply_add(value, weights[v], sum[r][v]);
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) {
                const int lane = column + v * Floats::width;
                const Floats factor = scale ? Floats::load(scale + lane) : Floats::broadcast(1.0f);
                multiply_add(sum[r][v], factor, Floats::load(sums[r] + lane)).store(sums[r] + lane);
            }
    }
}

template <class Code>
inline void multiply_rows(int rows, const float* const* x, std::int64_t first, int count, const Code* codes,
                          const float* scale, float (*sums)[PANEL]) {
    switch (rows) {
        case 1: return multiply<1>(x, first, count, codes, scale, sums);
        case 2: return multiply<2>(x, first, count, codes, scale, sums);
        case 3: return multiply<3>(x, first, count, codes, scale, sums);
        case 4: return multiply<4>(x, first, count, codes, scale, sums);
        case 5: return multiply<5>(x, first, count, codes, scale, sums);
        default: return multiply<6>(x, first, count, codes, scale, sums);
    }
}

// All rows of a chunk: where there are several blocks of them, codes are converted once for all.
template <class Code>
inline void multiply_chunk(int rows, const float* const* x, std::int64_t first, int count, const Code* codes,
                           const float* scale, Accumulator& sums) {
    const int blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    if (blocks == 1) return multiply_rows(rows, x, first, count, codes, scale, sums.rows);
    alignas(64) float converted[RUN * PANEL];
    for (int i = 0; i < count * PANEL; i += Floats::width) widen(codes + i).store(converted + i);
    for (int block = 0; block < blocks; ++block) {
        const int start = rows * block / blocks, stop = rows * (block + 1) / blocks;
        multiply_rows(stop - start, x + start, first, count, converted, scale, sums.rows + start);
    }
}

template <class Code>
inline void multiply_panel(const Weight& w, std::int64_t expert, std::int64_t panel, int rows, const float* const* x,
                           Accumulator& sums) {
    std::memset(sums.rows, 0, sizeof(float) * PANEL * rows);
    const Code* codes = static_cast<const Code*>(w.panels) + (expert * w.num_panels + panel) * w.in * PANEL;
    const float* scales = w.scale ? w.scale + (expert * w.num_tiles * w.num_panels + panel) * PANEL : nullptr;
    std::int64_t first = 0, tile_end = w.first_tile;
    for (std::int64_t tile = 0; first < w.in; ++tile, tile_end += w.tile) {
        const std::int64_t end = std::min(tile_end, w.in);
        const float* scale = scales ? scales + tile * w.num_panels * PANEL : nullptr;
        while (first < end) {
            const int count = static_cast<int>(std::min<std::int64_t>(RUN, end - first));
            multiply_chunk(rows, x, first, count, codes + first * PANEL, scale, sums);
            first += count;
        }
    }
}

// sums[r] = x[r] @ one panel of an expert's weight.
inline void multiply_panel_of(const Weight& w, std::int64_t expert, std::int64_t panel, int rows,
                              const float* const* x, Accumulator& sums) {
    switch (w.kind) {
        case E4M3: return multiply_panel<std::uint8_t>(w, expert, panel, rows, x, sums);
        case BF16: return multiply_panel<Bf16>(w, expert, panel, rows, x, sums);
        default: return multiply_panel<float>(w, expert, panel, rows, x, sums);
    }
}

// Outputs of one panel: as they are, or of a paired weight silu(gate) * up.
inline int panel_outputs(const Weight& w, std::int64_t panel) {
    const std::int64_t width = w.is_paired ? PAIR : PANEL;
    return static_cast<int>(std::min(width, w.out - panel * width));
}

inline void write_outputs(const Weight& w, std::int64_t panel, const float* sums, float* out) {
    const int count = panel_outputs(w, panel);
    if (!w.is_paired) {
        std::memcpy(out + panel * PANEL, sums, sizeof(float) * count);
        return;
    }
    alignas(64) float gated[PAIR];
    for (int lane = 0; lane < PAIR; lane += Floats::width) {
        const Floats gate = Floats::load(sums + lane), up = Floats::load(sums + PAIR + lane);
        const Floats one = Floats::broadcast(1.0f);
        (gate / (one + exp(Floats::zero() - gate)) * up).store(gated + lane);
    }
    std::memcpy(out + panel * PAIR, gated, sizeof(float) * count);
}

}  // namespace mull
