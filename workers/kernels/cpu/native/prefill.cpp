// Causal attention of chunks of known tokens to their sequences' K and V, read where they lie.
//
// Rows are (token, query head) pairs that share a KV head, 32 side by side. Their scores are a product with rows of K,
// their sums one with V: both take the path of every product. Keys come in blocks that begin at multiples of 64, so
// a row's result depends on its position alone, and not on how its sequence was cut into chunks.
#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "kernels.h"
#include "matmul.h"
#include "pages.h"

using namespace mull;

namespace {

constexpr int KEYS = 64;        // of a block
constexpr int TILE_PANELS = 6;  // of 32 rows, which share one copy of a block's K and V
constexpr float LOWEST = -3e38f;

// `count` values as floats: where they lie, or in `room`.
const float* as_floats(const float* values, std::int64_t, float*) { return values; }
const float* as_floats(const Bf16* values, std::int64_t count, float* room) {
    for (std::int64_t d = 0; d < count; d += Floats::width) {
        const int width = static_cast<int>(std::min<std::int64_t>(Floats::width, count - d));
        widen(values + d, width).store(room + d, width);
    }
    return room;
}

// What is multiplied: pairs of bf16 where K and V are bf16 and the processor has products of it, or floats.
template <class Value>
struct Products {
    using Factor = float;
};
#if defined(__AVX512BF16__)
template <>
struct Products<Bf16> {
    using Factor = Pair;
};
#endif

// A row of a panel of factors: of one row of floats, or of two. A second one that is not there counts nothing.
inline void put_factors(const float* first, const float*, int count, float* to) {
    std::memcpy(to, first, sizeof(float) * count);
}
inline void put_scaled(const float* query, float scale, float* to) { *to = *query * scale; }
#if defined(__AVX512BF16__)
inline void put_factors(const float* first, const float* second, int count, Pair* to) {
    constexpr float NOTHING[PANEL] = {};
    round_to_pairs(first, second ? second : NOTHING, count, to);
}
inline void put_scaled(const float* query, float scale, Pair* to) {
    *to = {{round_to_bf16(query[0] * scale).bits, round_to_bf16(query[1] * scale).bits}};
}
#endif

// 32 rows: queries, and what they have gathered so far.
template <class Factor>
struct Panel {
    Factor* queries;           // [head_dim / inputs of a factor][32], scaled
    float (*out)[PANEL];       // [panels of the head dimension][32 rows][32]
    alignas(64) float positions[PANEL], largest[PANEL], sums[PANEL];
    int rows;
    std::int64_t last_position;
};

// From scores to weights: e to the power of their distance to the largest so far; what was gathered before is scaled to
// it. Keys behind a row's position weigh nothing.
template <class Factor>
void weigh(Panel<Factor>& panel, std::int64_t first_key, int count, float (*scores)[PANEL], float* factors) {
    const bool is_cut = first_key + count - 1 > static_cast<std::int64_t>(panel.positions[0]);
    for (int lane = 0; lane < PANEL; lane += Floats::width) {
        const Floats zero = Floats::zero(), one = Floats::broadcast(1.0f), low = Floats::broadcast(LOWEST);
        const Floats position = Floats::load(panel.positions + lane), before = Floats::load(panel.largest + lane);
        const auto is_seen = [&](int key) {  // 1 or 0
            return min(max(position - Floats::broadcast(static_cast<float>(first_key + key) - 1.0f), zero), one);
        };
        Floats largest = before, sum = zero;
        for (int key = 0; key < count; ++key) {
            Floats score = Floats::load(scores[key] + lane);
            if (is_cut) score = multiply_add(one - is_seen(key), low, score);
            largest = max(largest, score);
        }
        for (int key = 0; key < count; ++key) {
            Floats weight = exp(Floats::load(scores[key] + lane) - largest);
            if (is_cut) weight = weight * is_seen(key);
            weight.store(scores[key] + lane);
            sum = sum + weight;
        }
        const Floats factor = exp(before - largest);
        factor.store(factors + lane);
        largest.store(panel.largest + lane);
        multiply_add(Floats::load(panel.sums + lane), factor, sum).store(panel.sums + lane);
    }
}

// out += weights @ values, for all rows of a panel and each 32 values of the head dimension.
template <int ROWS = MAX_ROWS, class Factor>
void gather(int rows, const Factor* weights, int steps, const Factor* values, float (*out)[PANEL]) {
    if (rows >= ROWS) {
        multiply<ROWS, PANEL>(weights, steps, values, nullptr, out);
        return rows > ROWS ? gather(rows - ROWS, weights + ROWS, steps, values, out + ROWS) : void();
    }
    if constexpr (ROWS > 1) gather<ROWS - 1>(rows, weights, steps, values, out);
}

// The rows of one tile of a chunk that share a KV head.
template <class Value>
struct Tile {
    using Factor = typename Products<Value>::Factor;
    static constexpr int INPUTS = Step<Factor>::inputs;

    std::int64_t group, head_dim, first_position;
    int rows;
    Pages<Value> keys, values;

    template <class QueryOf, class OutOf>
    void attend(const QueryOf& query_of, const OutOf& out_of) const {
        const std::int64_t columns = (head_dim + PANEL - 1) / PANEL;  // panels of the head dimension
        const int num_panels = (rows + PANEL - 1) / PANEL;
        const std::int64_t of_panel = head_dim / INPUTS * PANEL, of_column = KEYS / INPUTS * PANEL;
        const auto floats = [](std::int64_t count) { return std::unique_ptr<float[]>(new float[count]); };
        const auto factors = [](std::int64_t count) { return std::unique_ptr<Factor[]>(new Factor[count]()); };
        const auto out = floats(num_panels * columns * PANEL * PANEL), widened = floats(KEYS * head_dim);
        const auto queries = factors(num_panels * of_panel), copied = factors(columns * of_column);
        const auto packed = factors(KEYS * head_dim / INPUTS);
        std::fill_n(out.get(), num_panels * columns * PANEL * PANEL, 0.0f);
        std::vector<Panel<Factor>> panels(num_panels);
        for (int p = 0; p < num_panels; ++p)
            open(panels[p], p, queries.get() + p * of_panel,
                 reinterpret_cast<float (*)[PANEL]>(out.get() + p * columns * PANEL * PANEL), query_of);
        const std::int64_t num_keys = panels.back().last_position + 1;
        for (std::int64_t first = 0; first < num_keys; first += KEYS) {
            const int count = static_cast<int>(std::min<std::int64_t>(KEYS, num_keys - first));
            const float* found[KEYS];
            const auto find = [&](const Pages<Value>& pages) {
                for (int key = 0; key < count; ++key)
                    found[key] = as_floats(pages.row(first + key), head_dim, widened.get() + key * head_dim);
            };
            find(keys);
            pack_chunk(
                count, head_dim, [&](int key) { return found[key]; }, packed.get());
            find(values);
            for (int key = 0; key < count; key += INPUTS)
                for (std::int64_t column = 0; column < columns; ++column) {
                    const std::int64_t start = column * PANEL;
                    put_factors(found[key] + start, key + 1 < count ? found[key + 1] + start : nullptr,
                                static_cast<int>(std::min<std::int64_t>(PANEL, head_dim - start)),
                                copied.get() + column * of_column + key / INPUTS * PANEL);
                }
            for (Panel<Factor>& panel : panels)
                if (first <= panel.last_position) take_in(panel, first, count, packed.get(), copied.get());
        }
        for (int row = 0; row < rows; ++row) {
            const Panel<Factor>& panel = panels[row / PANEL];
            const int lane = row % PANEL;
            float* to = out_of(row);
            for (std::int64_t d = 0; d < head_dim; ++d)
                to[d] = panel.out[d / PANEL * PANEL + lane][d % PANEL] / panel.sums[lane];
        }
    }

private:
    template <class QueryOf>
    void open(Panel<Factor>& panel, int index, Factor* queries, float (*out)[PANEL], const QueryOf& query_of) const {
        const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
        panel.queries = queries;
        panel.out = out;
        panel.rows = std::min(PANEL, rows - index * PANEL);
        for (int lane = 0; lane < PANEL; ++lane) {
            const int row = index * PANEL + std::min(lane, panel.rows - 1);  // lanes without a row repeat the last
            panel.last_position = first_position + row / group;
            panel.positions[lane] = static_cast<float>(panel.last_position);
            panel.largest[lane] = LOWEST;
            panel.sums[lane] = 0;
            const float* query = query_of(row);
            for (std::int64_t d = 0; d < head_dim; d += INPUTS)
                put_scaled(query + d, scale, queries + d / INPUTS * PANEL + lane);
        }
    }

    // One block of keys: `packed` K, `copied` V.
    void take_in(Panel<Factor>& panel, std::int64_t first, int in_block, const Factor* packed,
                 const Factor* copied) const {
        const int count = static_cast<int>(std::min<std::int64_t>(in_block, panel.last_position + 1 - first));
        alignas(64) float scores[KEYS][PANEL], factors[PANEL];
        alignas(64) Factor weights[KEYS / INPUTS][PANEL];
        const int steps = static_cast<int>(head_dim / INPUTS);
        std::memset(scores, 0, sizeof(float) * PANEL * in_block);
        for (int block = 0; block < blocks_of(in_block) && block_start(in_block, block) < count; ++block) {
            const int start = block_start(in_block, block), width = block_start(in_block, block + 1) - start;
            multiply_rows(width, packed + start * steps, steps, static_cast<const Factor*>(panel.queries), nullptr,
                          scores + start);
        }
        weigh(panel, first, count, scores, factors);
        for (int key = 0; key < count; key += INPUTS)
            put_factors(scores[key], key + 1 < count ? scores[key + 1] : nullptr, PANEL, weights[key / INPUTS]);
        for (std::int64_t column = 0; column * PANEL < head_dim; ++column) {
            float (*out)[PANEL] = panel.out + column * PANEL;
            for (int row = 0; row < panel.rows; ++row) {
                const Floats factor = Floats::broadcast(factors[row]);
                for (int d = 0; d < PANEL; d += Floats::width)
                    (Floats::load(out[row] + d) * factor).store(out[row] + d);
            }
            gather(panel.rows, static_cast<const Factor*>(weights[0]), (count + INPUTS - 1) / INPUTS,
                   copied + column * (KEYS / INPUTS * PANEL), out);
        }
    }
};

}  // namespace

// Chunk c is `sizes[c]` tokens of a sequence whose blocks row c of `tables` names, the first at position `starts[c]`;
// chunks follow one another in q and out. Their own K and V are stored already. The pool is [2 * num_kv_heads,
// num_cells, head_dim], K before V.
extern "C" void mull_prefill_attention(const float* q, std::int64_t q_stride, std::int64_t num_chunks,
                                       const std::int64_t* starts, const std::int64_t* sizes, std::int64_t num_heads,
                                       std::int64_t num_kv_heads, std::int64_t head_dim, const void* pool,
                                       std::int32_t pool_kind, std::int64_t num_cells, std::int64_t block_size, const std::int64_t* tables,
                                       std::int64_t table_stride, float* out) {
    struct Item {
        std::int64_t chunk, first_token, num_tokens, first_row;
    };
    const std::int64_t group = num_heads / num_kv_heads;
    const std::int64_t tokens_per_tile = std::max<std::int64_t>(1, TILE_PANELS * PANEL / group);
    std::vector<Item> items;
    for (std::int64_t chunk = 0, row = 0; chunk < num_chunks; row += sizes[chunk++])
        for (std::int64_t at = 0; at < sizes[chunk]; at += tokens_per_tile)
            items.push_back({chunk, at, std::min(tokens_per_tile, sizes[chunk] - at), row + at});
    // The longest first, so that no thread begins one when the others end.
    const auto last_key = [&](const Item& item) { return starts[item.chunk] + item.first_token + item.num_tokens; };
    std::stable_sort(items.begin(), items.end(),
                     [&](const Item& a, const Item& b) { return last_key(a) > last_key(b); });
    const auto attend = [&](const auto* cells, std::int64_t index) {
        using Value = std::remove_const_t<std::remove_pointer_t<decltype(cells)>>;
        const Item& item = items[index / num_kv_heads];
        const std::int64_t kv_head = index % num_kv_heads;
        const auto pages = [&](std::int64_t head) {
            return Pages<Value>{cells + head * num_cells * head_dim, tables + item.chunk * table_stride, block_size,
                                head_dim, last_key(item)};
        };
        const auto at = [&](int row) { return std::pair{item.first_row + row / group, kv_head * group + row % group}; };
        const Tile<Value> tile{group, head_dim, starts[item.chunk] + item.first_token,
                        static_cast<int>(item.num_tokens * group), pages(kv_head), pages(num_kv_heads + kv_head)};
        tile.attend(
            [&](int row) {
                const auto [token, head] = at(row);
                return q + token * q_stride + head * head_dim;
            },
            [&](int row) {
                const auto [token, head] = at(row);
                return out + (token * num_heads + head) * head_dim;
            });
    };
    with_values(pool, pool_kind, [&](const auto* cells) {
        parallel_for(static_cast<std::int64_t>(items.size()) * num_kv_heads,
                     [&](std::int64_t index) { attend(cells, index); });
    });
}
