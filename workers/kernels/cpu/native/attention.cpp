// Attention of one new token a sequence over its paged K and V, read where they lie.
#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#include "kernels.h"
#include "pages.h"
#include "threads.h"

using namespace mull;

namespace {

// Heads that share a KV head, `head_dim` values each.
struct Queries {
    const float* rows;
    std::int64_t num_heads, head_dim;
    const float* head(std::int64_t h) const { return rows + h * head_dim; }
};

template <int HEADS, class Value>
void dot_keys(const Queries& q, std::int64_t first, const Pages<Value>& keys, float scale, float* scores) {
    const int tail = static_cast<int>(q.head_dim % Floats::width);
    const std::int64_t whole = q.head_dim - tail;
    keys.each([&](std::int64_t key, const Value* row) {
        Floats sum[HEADS];
        for (int h = 0; h < HEADS; ++h) sum[h] = Floats::zero();
        for (std::int64_t d = 0; d < whole; d += Floats::width) {
            const Floats values = widen(row + d);
            for (int h = 0; h < HEADS; ++h)
                sum[h] = multiply_add(Floats::load(q.head(first + h) + d), values, sum[h]);
        }
        if (tail)
            for (int h = 0; h < HEADS; ++h)
                sum[h] = multiply_add(Floats::load(q.head(first + h) + whole, tail), widen(row + whole, tail),
                                      sum[h]);
        for (int h = 0; h < HEADS; ++h) scores[h * keys.num_keys + key] = sum[h].sum() * scale;
    });
}

// exp(score - largest) in place; returns one over their sum.
float exponentiate(float* scores, std::int64_t count) {
    float largest = scores[0], sum = 0;
    std::int64_t i = 0;
    for (std::int64_t k = 1; k < count; ++k) largest = std::max(largest, scores[k]);
    const Floats top = Floats::broadcast(largest);
    Floats sums = Floats::zero();
    for (; i + Floats::width <= count; i += Floats::width) {
        const Floats value = exp(Floats::load(scores + i) - top);
        value.store(scores + i);
        sums = sums + value;
    }
    if (i < count) {
        const int rest = static_cast<int>(count - i);
        exp(Floats::load(scores + i, rest) - top).store(scores + i, rest);
        for (; i < count; ++i) sum += scores[i];
    }
    return 1.0f / (sum + sums.sum());
}

// Sums `VECTORS` vectors of the head dimension at a time, so that they stay in registers over all keys.
template <int HEADS, int VECTORS, class Value>
void weigh_values(const Pages<Value>& values, std::int64_t column, int last_count, const float* weights, const float* norms,
                  float* out) {
    Floats sum[HEADS][VECTORS];
    for (int h = 0; h < HEADS; ++h)
        for (int v = 0; v < VECTORS; ++v) sum[h][v] = Floats::zero();
    values.each([&](std::int64_t key, const Value* row) {
        Floats value[VECTORS];
        for (int v = 0; v < VECTORS; ++v)
            value[v] = v == VECTORS - 1 ? widen(row + column + v * Floats::width, last_count)
                                        : widen(row + column + v * Floats::width);
        for (int h = 0; h < HEADS; ++h) {
            const Floats weight = Floats::broadcast(weights[h * values.num_keys + key]);
            for (int v = 0; v < VECTORS; ++v) sum[h][v] = multiply_add(weight, value[v], sum[h][v]);
        }
    });
    for (int h = 0; h < HEADS; ++h)
        for (int v = 0; v < VECTORS; ++v)
            (sum[h][v] * Floats::broadcast(norms[h]))
                .store(out + h * values.head_dim + column + v * Floats::width,
                       v == VECTORS - 1 ? last_count : Floats::width);
}

template <int HEADS, class Value>
void attend(const Queries& q, std::int64_t first, const Pages<Value>& keys, const Pages<Value>& values, float* scores,
            float* out) {
    dot_keys<HEADS>(q, first, keys, 1.0f / std::sqrt(static_cast<float>(q.head_dim)), scores);
    float norms[HEADS];
    for (int h = 0; h < HEADS; ++h) norms[h] = exponentiate(scores + h * keys.num_keys, keys.num_keys);
    constexpr int REGISTERS = Floats::width == 16 ? 16 : 8;  // for sums
    constexpr int AT_ONCE = std::min(8, REGISTERS / HEADS), STEP = AT_ONCE * Floats::width;
    float* rows = out + first * q.head_dim;
    std::int64_t column = 0;
    for (; column + STEP <= q.head_dim; column += STEP)
        weigh_values<HEADS, AT_ONCE>(values, column, Floats::width, scores, norms, rows);
    for (; column < q.head_dim; column += Floats::width) {
        const std::int64_t count = std::min<std::int64_t>(Floats::width, q.head_dim - column);
        weigh_values<HEADS, 1>(values, column, static_cast<int>(count), scores, norms, rows);
    }
}

}  // namespace

// Row b of `tables` names the blocks of sequence b.
extern "C" void mull_decode_attention(const float* q, std::int64_t q_stride, std::int64_t num_seqs,
                                      std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_dim,
                                      const void* pool, std::int32_t pool_kind, std::int64_t num_cells,
                                      std::int64_t block_size, const std::int64_t* tables, std::int64_t table_stride,
                                      const std::int64_t* num_keys, float* out) {
    const std::int64_t group = num_heads / num_kv_heads;
    with_values(pool, pool_kind, [&](const auto* cells) {
        using Value = std::remove_const_t<std::remove_pointer_t<decltype(cells)>>;
        parallel_for(num_seqs * num_kv_heads, [&](std::int64_t item) {
            const std::int64_t seq = item / num_kv_heads, head = item % num_kv_heads;
            const Queries queries{q + seq * q_stride + head * group * head_dim, group, head_dim};
            const auto pages = [&](std::int64_t kv_head) {
                return Pages<Value>{cells + kv_head * num_cells * head_dim, tables + seq * table_stride, block_size,
                                    head_dim, num_keys[seq]};
            };
            const Pages<Value> keys = pages(head), values = pages(num_kv_heads + head);
            const std::unique_ptr<float[]> scores(new float[4 * keys.num_keys]);
            float* to = out + (seq * num_heads + head * group) * head_dim;
            std::int64_t first = 0;
            for (; first + 4 <= group; first += 4) attend<4>(queries, first, keys, values, scores.get(), to);
            for (; first + 2 <= group; first += 2) attend<2>(queries, first, keys, values, scores.get(), to);
            if (first < group) attend<1>(queries, first, keys, values, scores.get(), to);
        });
    });
}
