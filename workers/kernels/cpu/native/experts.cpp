// The experts that have rows, and only those: grouped by expert, gate and up with the activation, down, combine.
#include <memory>
#include <vector>

#include "kernels.h"
#include "matmul.h"

using namespace mull;

namespace {

std::vector<Chunk> chunks_of(const std::vector<std::int64_t>& starts) {
    std::vector<Chunk> chunks;
    for (std::size_t expert = 0; expert + 1 < starts.size(); ++expert)
        for (std::int64_t at = starts[expert]; at < starts[expert + 1]; at += CHUNK_ROWS) {
            const std::int64_t rows = std::min<std::int64_t>(CHUNK_ROWS, starts[expert + 1] - at);
            chunks.push_back({static_cast<std::int64_t>(expert), at, static_cast<int>(rows)});
        }
    return chunks;
}

}  // namespace

// out[t] = sum over k, in their order, of weights[t][k] * expert ids[t][k] (x[t]), for ids in
// [first_expert, first_expert + num_experts); others are skipped.
extern "C" void mull_experts(const float* x, std::int64_t x_stride, std::int64_t num_tokens, const std::int64_t* ids,
                             const float* weights, std::int64_t num_chosen, const Weight* gate_up, const Weight* down,
                             std::int64_t first_expert, float* out) {
    const std::int64_t num_experts = gate_up->num_experts, num_pairs = num_tokens * num_chosen;
    const auto local = [&](std::int64_t pair) { return ids[pair] - first_expert; };
    const auto is_local = [&](std::int64_t pair) { return local(pair) >= 0 && local(pair) < num_experts; };
    std::vector<std::int64_t> starts(num_experts + 1), place_of(num_pairs), token_of(num_pairs);
    for (std::int64_t pair = 0; pair < num_pairs; ++pair)
        if (is_local(pair)) ++starts[local(pair) + 1];
    for (std::int64_t expert = 0; expert < num_experts; ++expert) starts[expert + 1] += starts[expert];
    std::vector<std::int64_t> next(starts.begin(), starts.end() - 1);
    for (std::int64_t pair = 0; pair < num_pairs; ++pair)
        if (is_local(pair)) {
            place_of[pair] = next[local(pair)]++;
            token_of[place_of[pair]] = pair / num_chosen;
        }
    const std::int64_t hidden = gate_up->out, size = down->out, num_rows = starts[num_experts];
    const std::unique_ptr<float[]> gated(new float[num_rows * hidden]), results(new float[num_rows * size]);
    const std::vector<Chunk> chunks = chunks_of(starts);
    const auto multiply_all = [&](const Weight& w, const auto& row_of, float* to) {
        multiply_chunks(w, chunks.data(), static_cast<std::int64_t>(chunks.size()), num_rows, row_of, to, w.out);
    };
    multiply_all(
        *gate_up, [&](std::int64_t row) { return x + token_of[row] * x_stride; }, gated.get());
    multiply_all(
        *down, [&](std::int64_t row) { return gated.get() + row * hidden; }, results.get());
    parallel_for((num_tokens + 15) / 16, [&](std::int64_t part) {
        for (std::int64_t token = part * 16; token < std::min(num_tokens, part * 16 + 16); ++token) {
            float* to = out + token * size;
            std::memset(to, 0, sizeof(float) * size);
            for (std::int64_t pair = token * num_chosen; pair < (token + 1) * num_chosen; ++pair) {
                if (!is_local(pair)) continue;
                const float* from = results.get() + place_of[pair] * size;
                for (std::int64_t i = 0; i < size; ++i) to[i] += weights[pair] * from[i];
            }
        }
    });
}
