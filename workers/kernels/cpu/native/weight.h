// A weight [out, in] as the kernels read it: panels of 32 outputs, in each the inputs one after another, so that a step
// along the inputs loads one cache line of codes and needs no sum over lanes.
#pragma once

#include <cstdint>

namespace mull {

constexpr int PANEL = 32;
constexpr int PAIR = PANEL / 2;

// What is stored, and what it is multiplied as where that is not fp32: then two inputs of an output lie side by side.
enum Kind : std::int32_t { E4M3 = 0, BF16 = 1, FP32 = 2, E4M3_AS_BF16 = 3, BF16_AS_BF16 = 4 };

// Mirrored by `workers.kernels.cpu.panels`.
struct Weight {
    const void* panels;     // [experts, num_panels, in, 32], or [experts, num_panels, in / 2, 32, 2]
    const float* scale;     // [experts, tiles, num_panels * 32], or null; of e4m3 codes times 2**8
    std::int64_t out;       // of a paired weight, half its rows
    std::int64_t in;
    std::int64_t num_panels;
    std::int64_t num_tiles;
    std::int64_t first_tile;  // inputs of the first tile, which a slice may cut
    std::int64_t tile;        // of the others
    std::int64_t num_experts;
    std::int32_t kind;
    std::int32_t is_paired;  // lanes 0-15 of a panel are rows of the gate, 16-31 the same rows of up
};

}  // namespace mull
