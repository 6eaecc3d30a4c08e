// K and V of a sequence, where they lie in the pool: [2 * num_kv_heads, num_cells, head_dim], K before V.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"
#include "weight.h"

namespace mull {

constexpr std::int64_t KEYS_AHEAD = 8, LINE_BYTES = 64;

// The K or the V of one head; a cell's values are fp32 or bf16.
template <class Value>
struct Pages {
    const Value* cells;  // [num_blocks * block_size, head_dim]
    const std::int64_t* block_ids;
    std::int64_t block_size, head_dim, num_keys;

    const Value* block(std::int64_t index) const { return cells + block_ids[index] * block_size * head_dim; }
    const Value* row(std::int64_t key) const { return block(key / block_size) + key % block_size * head_dim; }

    // The processor's own prefetching ends with each page of memory, and a block is a few of them. Where a block is
    // shorter than KEYS_AHEAD, what is asked for may be another's: that is of no use and does no harm.
    template <class Visit>
    void each(const Visit& visit) const {
        constexpr std::int64_t LINE = LINE_BYTES / sizeof(Value);
        for (std::int64_t key = 0, index = 0; key < num_keys; ++index) {
            const Value *row = block(index), *ahead = row + KEYS_AHEAD * head_dim;
            const std::int64_t end = std::min(num_keys, key + block_size);
            for (; key < end; ++key, row += head_dim, ahead += head_dim) {
                if (key + KEYS_AHEAD == end && end < num_keys) ahead = block(index + 1);
                for (std::int64_t d = 0; d < head_dim; d += LINE) _mm_prefetch(ahead + d, _MM_HINT_T0);
                visit(key, row);
            }
        }
    }
};

// Calls body with a pointer to the pool's values, of their own type.
template <class Body>
void with_values(const void* pool, std::int32_t kind, const Body& body) {
    if (kind == BF16) return body(static_cast<const Bf16*>(pool));
    body(static_cast<const float*>(pool));
}

}  // namespace mull
