// What is done to each row between the products: norms, rotary positions, the KV write, the choice of experts.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "simd.h"
#include "threads.h"

using namespace mull;

namespace {

constexpr std::int64_t ROWS_PER_ITEM = 16;

template <class Body>
void each_row(std::int64_t num_rows, const Body& body) {
    parallel_for((num_rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM, [&](std::int64_t item) {
        const std::int64_t stop = std::min(num_rows, (item + 1) * ROWS_PER_ITEM);
        for (std::int64_t row = item * ROWS_PER_ITEM; row < stop; ++row) body(row);
    });
}

// Calls body(start, count) for each vector of a row; count is below the width in the last one at most.
template <class Body>
void each_vector(std::int64_t size, const Body& body) {
    for (std::int64_t i = 0; i < size; i += Floats::width)
        body(i, static_cast<int>(std::min<std::int64_t>(Floats::width, size - i)));
}

float inverse_rms(const float* x, std::int64_t size, float eps) {
    Floats squares = Floats::zero();
    each_vector(size, [&](std::int64_t i, int count) {
        const Floats value = Floats::load(x + i, count);
        squares = multiply_add(value, value, squares);
    });
    return 1.0f / std::sqrt(squares.sum() / static_cast<float>(size) + eps);
}

void normalize(const float* x, const float* weight, std::int64_t size, float eps, float* out) {
    const Floats factor = Floats::broadcast(inverse_rms(x, size, eps));
    each_vector(size, [&](std::int64_t i, int count) {
        (Floats::load(x + i, count) * factor * Floats::load(weight + i, count)).store(out + i, count);
    });
}

// Pairs (i, i + size / 2) turned by their angle; the first half of the sines is negated already.
void rotate(float* x, const float* cosines, const float* signed_sines, std::int64_t size) {
    const std::int64_t half = size / 2;
    each_vector(half, [&](std::int64_t i, int count) {
        const auto at = [&](const float* from) { return Floats::load(from + i, count); };
        const Floats low = at(x), high = at(x + half);
        multiply_add(high, at(signed_sines), low * at(cosines)).store(x + i, count);
        multiply_add(low, at(signed_sines + half), high * at(cosines + half)).store(x + half + i, count);
    });
}

}  // namespace

extern "C" void mull_rms_norm(const float* x, std::int64_t x_stride, std::int64_t num_rows, std::int64_t size,
                              const float* weight, float eps, float* out) {
    each_row(num_rows, [&](std::int64_t row) { normalize(x + row * x_stride, weight, size, eps, out + row * size); });
}

// x += delta, then its norm: what stands between two halves of a layer.
extern "C" void mull_add_rms_norm(float* x, const float* delta, std::int64_t num_rows, std::int64_t size,
                                  const float* weight, float eps, float* out) {
    each_row(num_rows, [&](std::int64_t row) {
        float* sum = x + row * size;
        each_vector(size, [&](std::int64_t i, int count) {
            (Floats::load(sum + i, count) + Floats::load(delta + row * size + i, count)).store(sum + i, count);
        });
        normalize(sum, weight, size, eps, out + row * size);
    });
}

// In place: norms and rotates the query heads of each token and the key heads behind them, then stores K and V.
// `norms` is [num_q_heads + num_kv_heads, head_dim]; without a pool nothing is stored, and there may be no KV heads.
extern "C" void mull_rotate_and_store(float* heads, std::int64_t stride, std::int64_t num_tokens,
                                      std::int64_t num_q_heads, std::int64_t num_kv_heads, std::int64_t head_dim,
                                      const float* norms, float eps, const float* rotations, void* pool,
                                      std::int32_t pool_kind,
                                      std::int64_t num_cells, const std::int64_t* cells) {
    each_row(num_tokens, [&](std::int64_t token) {
        float* row = heads + token * stride;
        const float* angles = rotations + token * 2 * head_dim;
        for (std::int64_t h = 0; h < num_q_heads + num_kv_heads; ++h) {
            float* head = row + h * head_dim;
            normalize(head, norms + h * head_dim, head_dim, eps, head);
            rotate(head, angles, angles + head_dim, head_dim);
        }
        for (std::int64_t h = 0; pool && h < 2 * num_kv_heads; ++h) {
            const float* from = row + (num_q_heads + h) * head_dim;
            const std::int64_t cell = (h * num_cells + cells[token]) * head_dim;
            if (pool_kind == BF16) {
                Bf16* to = static_cast<Bf16*>(pool) + cell;
                for (std::int64_t d = 0; d < head_dim; ++d) to[d] = round_to_bf16(from[d]);
            } else {
                std::memcpy(static_cast<float*>(pool) + cell, from, sizeof(float) * head_dim);
            }
        }
    });
}

// The likeliest experts of each token, of equals the first, and their softmax over all or over the chosen.
extern "C" void mull_choose_experts(const float* logits, std::int64_t stride, std::int64_t num_tokens,
                                    std::int64_t num_experts, std::int64_t num_chosen, std::int32_t is_normalized,
                                    std::int64_t* ids, float* weights) {
    each_row(num_tokens, [&](std::int64_t token) {
        const float* row = logits + token * stride;
        std::int64_t* chosen = ids + token * num_chosen;
        float* weight = weights + token * num_chosen;
        for (std::int64_t k = 0; k < num_chosen; ++k) {
            // The next in the order (larger logit, lower id): behind the one before.
            std::int64_t best = -1;
            for (std::int64_t e = 0; e < num_experts; ++e) {
                if (k && !(row[e] < row[chosen[k - 1]] || (row[e] == row[chosen[k - 1]] && e > chosen[k - 1])))
                    continue;
                if (best < 0 || row[e] > row[best]) best = e;
            }
            chosen[k] = best < 0 ? 0 : best;  // only where logits are NaN: any expert is as good
        }
        float sum = 0;
        const float largest = row[chosen[0]];
        for (std::int64_t k = 0; k < num_chosen; ++k) sum += weight[k] = std::exp(row[chosen[k]] - largest);
        if (!is_normalized) {
            sum = 0;
            for (std::int64_t e = 0; e < num_experts; ++e) sum += std::exp(row[e] - largest);
        }
        for (std::int64_t k = 0; k < num_chosen; ++k) weight[k] /= sum;
    });
}
