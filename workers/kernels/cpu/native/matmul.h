// Rows times one panel of a weight. The order of the additions is that of the inputs, in runs of at most 128 that never
// cross a tile: it depends on the weight alone, so a row's result does not change with the rows beside it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "simd.h"
#include "threads.h"
#include "weight.h"

namespace mull {

constexpr int RUN = 128;    // inputs summed before a tile's scale is applied
constexpr int VECTORS = 2;  // of a panel's outputs at a time
constexpr int COLUMNS = VECTORS * Floats::width;
constexpr int MAX_ROWS = Floats::width == 16 ? 12 : 6;  // with VECTORS sums each they nearly fill the registers
constexpr int CHUNK_ROWS = 16 * MAX_ROWS;               // rows that may share one conversion of a run

struct Accumulator {
    alignas(64) float rows[CHUNK_ROWS][PANEL];
};

// What is multiplied in one step along the inputs: a value of a row with a vector of weights.
template <class Code>
struct Step {
    using Value = float;
    using Vector = Floats;
    static constexpr int inputs = 1, at_once = Floats::width == 16 ? 2 : 1;  // steps converted together
    static constexpr int direct_blocks = 2;  // up to so many blocks of rows, converting again is as fast as storing
};

#if defined(__AVX512BF16__)
struct PairStep {
    using Value = Pair;
    using Vector = Pairs;
    static constexpr int inputs = 2, at_once = 1;
    static constexpr int direct_blocks = CHUNK_ROWS;  // other parts of the processor convert while it multiplies
};
template <>
struct Step<E4m3Pair> : PairStep {};
template <>
struct Step<Bf16Pair> : PairStep {};
template <>
struct Step<Pair> : PairStep {};
#endif

// Rows lie in blocks of at most MAX_ROWS: the rows of a block side by side, one step after another, so that going along
// the inputs reads one place. The blocks of a chunk are as even as can be.
inline int blocks_of(int rows) { return (rows + MAX_ROWS - 1) / MAX_ROWS; }
inline int block_start(int rows, int block) { return rows * block / blocks_of(rows); }

// Some rows, at most CHUNK_ROWS, in that form: `steps` values each.
template <class Value>
struct PackedChunk {
    const Value* values;
    std::int64_t steps;
    int rows;
};

// `count` inputs of a row as the values of steps: its own floats, or `room` for their pairs.
inline const float* values_of(const float* from, int, float*) { return from; }
#if defined(__AVX512BF16__)
inline const Pair* values_of(const float* from, int count, Pair* room) {
    round_to_pairs(from, count, room);
    return room;
}
#endif

// Puts the rows of a chunk into that form.
template <class Value, class RowOf>
void pack_chunk(int rows, std::int64_t in, const RowOf& row_of, Value* to) {
    constexpr std::int64_t PART = 64;  // inputs at a time: what is written stays in the first cache
    constexpr int INPUTS = std::is_same_v<Value, float> ? 1 : 2;
    Value room[PART];
    for (int block = 0; block < blocks_of(rows); ++block) {
        const int first = block_start(rows, block), width = block_start(rows, block + 1) - first;
        Value* of_block = to + first * (in / INPUTS);
        for (std::int64_t start = 0; start < in; start += PART) {
            const int count = static_cast<int>(std::min(PART, in - start));
            Value* of_part = of_block + start / INPUTS * width;
            for (int r = 0; r < width; ++r) {
                const Value* from = values_of(row_of(first + r) + start, count, room);
                for (int k = 0; k < count / INPUTS; ++k) of_part[k * width + r] = from[k];
            }
        }
    }
}

// sums[r] += scale * (x[r] @ codes), for x of one block: STRIDE values from one step to the next.
template <int ROWS, int STRIDE, class Code>
void multiply(const typename Step<Code>::Value* x, int steps, const Code* codes, const float* scale,
              float (*sums)[PANEL]) {
    using Vector = typename Step<Code>::Vector;
    constexpr int AT_ONCE = Step<Code>::at_once;
    for (int column = 0; column < PANEL; column += COLUMNS) {
        Floats sum[ROWS][VECTORS];
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) sum[r][v] = Floats::zero();
        const auto add = [&](int k, const Vector* weights) {
            for (int r = 0; r < ROWS; ++r) {
                const Vector value = Vector::broadcast(x[k * STRIDE + r]);
                for (int v = 0; v < VECTORS; ++v) sum[r][v] = multiply_add(value, weights[v], sum[r][v]);
            }
        };
        int k = 0;
        for (; k + AT_ONCE <= steps; k += AT_ONCE) {
            Vector weights[AT_ONCE * VECTORS];
            widen_all(codes + k * PANEL + column, weights);
            for (int i = 0; i < AT_ONCE; ++i) add(k + i, weights + i * VECTORS);
        }
        for (; AT_ONCE > 1 && k < steps; ++k) {
            Vector weights[VECTORS];
            widen_all(codes + k * PANEL + column, weights);
            add(k, weights);
        }
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) {
                const int lane = column + v * Floats::width;
                const Floats factor = scale ? Floats::load(scale + lane) : Floats::broadcast(1.0f);
                multiply_add(sum[r][v], factor, Floats::load(sums[r] + lane)).store(sums[r] + lane);
            }
    }
}

template <class Code, int ROWS = MAX_ROWS>
inline void multiply_rows(int rows, const typename Step<Code>::Value* x, int steps, const Code* codes,
                          const float* scale, float (*sums)[PANEL]) {
    if (rows == ROWS) return multiply<ROWS, ROWS>(x, steps, codes, scale, sums);
    if constexpr (ROWS > 1) multiply_rows<Code, ROWS - 1>(rows, x, steps, codes, scale, sums);
}

// One run of steps, from `first` on, with all rows of a chunk.
template <class Code>
inline void multiply_run(const PackedChunk<typename Step<Code>::Value>& x, std::int64_t first, int steps,
                         const Code* codes, const float* scale, Accumulator& sums) {
    const int blocks = blocks_of(x.rows);
    const auto each_block = [&](const auto* weights) {
        for (int block = 0; block < blocks; ++block) {
            const int start = block_start(x.rows, block), rows = block_start(x.rows, block + 1) - start;
            multiply_rows(rows, x.values + start * x.steps + first * rows, steps, weights, scale, sums.rows + start);
        }
    };
    if (blocks <= Step<Code>::direct_blocks) return each_block(codes);
    if constexpr (Step<Code>::inputs == 1) {
        alignas(64) float converted[RUN * PANEL];
        for (int k = 0; k < steps; ++k)
            for (int column = 0; column < PANEL; column += COLUMNS) {
                Floats weights[VECTORS];
                widen_all(codes + k * PANEL + column, weights);
                for (int v = 0; v < VECTORS; ++v) weights[v].store(converted + k * PANEL + column + v * Floats::width);
            }
        each_block(static_cast<const float*>(converted));
    }
}

// sums[r] = x[r] @ one panel of an expert's weight.
template <class Code>
inline void multiply_panel(const Weight& w, std::int64_t expert, std::int64_t panel,
                           const PackedChunk<typename Step<Code>::Value>& x, Accumulator& sums) {
    constexpr int INPUTS = Step<Code>::inputs;
    std::memset(sums.rows, 0, sizeof(float) * PANEL * x.rows);
    const Code* codes = static_cast<const Code*>(w.panels) + (expert * w.num_panels + panel) * x.steps * PANEL;
    const float* scales = w.scale ? w.scale + (expert * w.num_tiles * w.num_panels + panel) * PANEL : nullptr;
    std::int64_t first = 0, tile_end = w.first_tile;
    for (std::int64_t tile = 0; first < w.in; ++tile, tile_end += w.tile) {
        const std::int64_t end = std::min(tile_end, w.in);
        const float* scale = scales ? scales + tile * w.num_panels * PANEL : nullptr;
        while (first < end) {
            const int count = static_cast<int>(std::min<std::int64_t>(RUN, end - first));
            multiply_run(x, first / INPUTS, count / INPUTS, codes + first / INPUTS * PANEL, scale, sums);
            first += count;
        }
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

// Rows [first, first + rows) of a product's input, and the expert that they are for.
struct Chunk {
    std::int64_t expert, first;
    int rows;
};

template <class Code, class RowOf>
void multiply_chunks_of(const Weight& w, const Chunk* chunks, std::int64_t num_chunks, std::int64_t num_rows,
                        const RowOf& row_of, float* out, std::int64_t out_stride) {
    using Value = typename Step<Code>::Value;
    const std::int64_t steps = w.in / Step<Code>::inputs;
    const std::unique_ptr<Value[]> packed(new Value[num_rows * steps]);
    parallel_for(num_chunks, [&](std::int64_t index) {
        const Chunk& chunk = chunks[index];
        pack_chunk(
            chunk.rows, w.in, [&](int r) { return row_of(chunk.first + r); }, packed.get() + chunk.first * steps);
    });
    parallel_for(num_chunks * w.num_panels, [&](std::int64_t item) {
        const Chunk& chunk = chunks[item / w.num_panels];
        const std::int64_t panel = item % w.num_panels;
        Accumulator sums;
        const PackedChunk<Value> rows{packed.get() + chunk.first * steps, steps, chunk.rows};
        multiply_panel<Code>(w, chunk.expert, panel, rows, sums);
        for (int r = 0; r < chunk.rows; ++r)
            write_outputs(w, panel, sums.rows[r], out + (chunk.first + r) * out_stride);
    });
}

// Every chunk times its expert's weight: row r of the input, row_of(r), gives row r of `out`.
template <class RowOf>
void multiply_chunks(const Weight& w, const Chunk* chunks, std::int64_t num_chunks, std::int64_t num_rows,
                     const RowOf& row_of, float* out, std::int64_t out_stride) {
    const auto as = [&](auto code) {
        multiply_chunks_of<decltype(code)>(w, chunks, num_chunks, num_rows, row_of, out, out_stride);
    };
    switch (w.kind) {
        case E4M3: return as(std::uint8_t{});
        case BF16: return as(Bf16{});
#if defined(__AVX512BF16__)
        case E4M3_AS_BF16: return as(E4m3Pair{});
        case BF16_AS_BF16: return as(Bf16Pair{});
#endif
        default: return as(float{});
    }
}

}  // namespace mull
