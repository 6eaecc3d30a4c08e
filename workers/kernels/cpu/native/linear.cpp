// x @ weight.T, and how a weight gets into panels.
#include <vector>

#include "kernels.h"
#include "matmul.h"

using namespace mull;

extern "C" void mull_linear(const float* x, std::int64_t x_stride, std::int64_t num_rows, const Weight* weight,
                            float* out, std::int64_t out_stride) {
    const std::int64_t num_chunks = (num_rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    std::vector<Chunk> chunks(num_chunks);
    for (std::int64_t i = 0; i < num_chunks; ++i) {
        const std::int64_t start = num_rows * i / num_chunks, stop = num_rows * (i + 1) / num_chunks;
        chunks[i] = {0, start, static_cast<int>(stop - start)};
    }
    multiply_chunks(
        *weight, chunks.data(), num_chunks, num_rows, [&](std::int64_t row) { return x + row * x_stride; }, out,
        out_stride);
}

// Where a lane's first or second input lies among the items of a step; e4m3 codes of two inputs are in the order in
// which the bytes of a vector are interleaved.
static std::int64_t place_of(std::int32_t kind, std::int64_t lane, std::int64_t input) {
    if (kind < E4M3_AS_BF16) return lane;
    const std::int64_t item = lane % PAIR * 2 + input, half = lane / PAIR;
    return kind == BF16_AS_BF16 ? half * PANEL + item : item / 8 * 16 + half * 8 + item % 8;
}

// Rows [first_row, first_row + num_rows) of a weight, each of `in` items of `item_bytes`, into its panels.
// `pair_rows` is the number of gate rows of a paired weight, 0 of others.
extern "C" void mull_pack(const std::uint8_t* rows, std::int64_t num_rows, std::int64_t in, std::int64_t item_bytes,
                          std::int64_t first_row, std::int64_t pair_rows, std::int32_t kind, std::uint8_t* panels) {
    constexpr std::int64_t BLOCK = 64;  // inputs at a time: a square of both sides stays in the cache
    for (std::int64_t start = 0; start < in; start += BLOCK) {
        const std::int64_t stop = std::min(in, start + BLOCK);
        for (std::int64_t r = 0; r < num_rows; ++r) {
            const std::int64_t row = first_row + r;
            const std::int64_t width = pair_rows ? PAIR : PANEL;
            const bool is_up = pair_rows && row >= pair_rows;
            const std::int64_t within = is_up ? row - pair_rows : row;
            const std::int64_t lane = within % width + (is_up ? PAIR : 0);
            const std::int64_t inputs = kind < E4M3_AS_BF16 ? 1 : 2;
            const std::int64_t places[] = {place_of(kind, lane, 0), place_of(kind, lane, 1)};
            std::uint8_t* panel = panels + within / width * in * PANEL * item_bytes;
            const std::uint8_t* from = rows + (r * in + start) * item_bytes;
            for (std::int64_t k = start; k < stop; ++k, from += item_bytes) {
                std::uint8_t* to = panel + (k / inputs * inputs * PANEL + places[k % inputs]) * item_bytes;
                for (std::int64_t byte = 0; byte < item_bytes; ++byte) to[byte] = from[byte];
            }
        }
    }
}
