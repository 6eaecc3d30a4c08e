// The experts that have rows, and only those: grouped by expert, gate and up with the activation, down, combine.
#include <memory>
#include <vector>

#include "matmul.h"
#include "threads.h"

using namespace mull;

namespace {

// Some of one expert's rows and one panel of its weight.
struct Item {
    std::int64_t expert, first, rows;
};

std::vector<Item> chunks_of(const std::vector<std::int64_t>& starts) {
    std::vector<Item> items;
    for (std::size_t expert = 0; expert + 1 < starts.size(); ++expert)
        for (std::int64_t at = starts[expert]; at < starts[expert + 1]; at += CHUNK_ROWS)
            items.push_back({static_cast<std::int64_t>(expert), at,
                             std::min<std::int64_t>(CHUNK_ROWS, starts[expert + 1] - at)});
    return items;
}

template <class RowOf>
void multiply_all(const Weight& w, const std::vector<Item>& items, const RowOf& row_of, float* out,
                  std::int64_t out_stride) {
    parallel_for(static_cast<std::int64_t>(items.size()) * w.num_panels, [&](std::int64_t index) {
        const Item& item = items[index / w.num_panels];
        const std::int64_t panel = index % w.num_panels;
        const float* rows[CHUNK_ROWS];
        for (int r = 0; r < item.rows; ++r) rows[r] = row_of(item.first + r);
        Accumulator sums;
        multiply_panel_of(w, item.expert, panel, static_cast<int>(item.rows), rows, sums);
        for (int r = 0; r < item.rows; ++r)
            write_outputs(w, panel, sums.rows[r], out + (item.first + r) * out_stride);
    });
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
    const std::vector<Item> items = chunks_of(starts);
    multiply_all(*gate_up, items, [&](std::int64_t row) { return x + token_of[row] * x_stride; }, gated.get(), hidden);
    multiply_all(*down, items, [&](std::int64_t row) { return gated.get() + row * hidden; }, results.get(), size);
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
