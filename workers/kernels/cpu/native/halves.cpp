// Half a layer in one call, which is what stands between two sums over ranks; where a rank is alone, all layers. A tensor
// and a call from Python for each kernel would be a good part of a decode step of one stream.
#include <memory>

#include "kernels.h"

using namespace mull;

namespace {

std::unique_ptr<float[]> floats(std::int64_t count) { return std::unique_ptr<float[]>(new float[count]); }

// x += delta, where there is one, and its norm.
std::unique_ptr<float[]> normed(float* x, const float* delta, std::int64_t rows, std::int64_t hidden,
                                const float* weight, float eps) {
    auto out = floats(rows * hidden);
    if (delta)
        mull_add_rms_norm(x, delta, rows, hidden, weight, eps, out.get());
    else
        mull_rms_norm(x, hidden, rows, hidden, weight, eps, out.get());
    return out;
}

}  // namespace

// These four are mirrored by `workers.kernels.cpu.halves`.
struct AttentionHalf {
    const float* norm;
    const float* head_norms;
    const Weight* qkv;
    const Weight* o;
    std::int64_t num_heads, num_kv_heads, head_dim;
    float eps;
};

struct FeedForwardHalf {
    const float* norm;
    const Weight* gate;  // null where the layer is dense
    const Weight* gate_up;
    const Weight* down;
    std::int64_t num_chosen;
    float eps;
    std::int32_t is_normalized;
};

// The rows of a step: those of chunks, then one for each sequence that decodes.
struct StepRows {
    std::int64_t num_chunks, num_known, num_singles;
    const float* rotations;
    const std::int64_t* cells;
    const std::int64_t *starts, *sizes, *chunk_tables;
    std::int64_t chunk_stride;
    const std::int64_t *tables, *num_keys;
    std::int64_t table_stride, num_cells, block_size;
};

struct LayerHalves {
    const AttentionHalf* attention;
    const FeedForwardHalf* feed_forward;
    void* pool;
    std::int64_t pool_kind;
};

extern "C" std::int64_t mull_abi() { return MULL_ABI; }

extern "C" void mull_attention_half(float* x, const float* delta, const AttentionHalf* layer, const StepRows* rows,
                                    void* pool, std::int32_t pool_kind, float* out) {
    const std::int64_t num_rows = rows->num_known + rows->num_singles, hidden = layer->qkv->in;
    const std::int64_t num_heads = layer->num_heads, num_kv_heads = layer->num_kv_heads, head_dim = layer->head_dim;
    const std::int64_t stride = (num_heads + 2 * num_kv_heads) * head_dim, width = num_heads * head_dim;
    const auto heads = floats(num_rows * stride), attended = floats(num_rows * width);
    mull_linear(normed(x, delta, num_rows, hidden, layer->norm, layer->eps).get(), hidden, num_rows, layer->qkv,
                heads.get(), stride);
    mull_rotate_and_store(heads.get(), stride, num_rows, num_heads, num_kv_heads, head_dim, layer->head_norms,
                          layer->eps, rows->rotations, pool, pool_kind, rows->num_cells, rows->cells);
    if (rows->num_chunks)
        mull_prefill_attention(heads.get(), stride, rows->num_chunks, rows->starts, rows->sizes, num_heads,
                               num_kv_heads, head_dim, pool, pool_kind, rows->num_cells, rows->block_size, rows->chunk_tables,
                               rows->chunk_stride, attended.get());
    if (rows->num_singles)
        mull_decode_attention(heads.get() + rows->num_known * stride, stride, rows->num_singles, num_heads,
                              num_kv_heads, head_dim, pool, pool_kind, rows->num_cells, rows->block_size, rows->tables,
                              rows->table_stride, rows->num_keys, attended.get() + rows->num_known * width);
    mull_linear(attended.get(), width, num_rows, layer->o, out, hidden);
}

extern "C" void mull_feed_forward_half(float* x, const float* delta, std::int64_t num_rows,
                                       const FeedForwardHalf* layer, float* out) {
    const std::int64_t hidden = layer->gate_up->in, ffn = layer->gate_up->out;
    const auto inputs = normed(x, delta, num_rows, hidden, layer->norm, layer->eps);
    if (!layer->gate) {
        const auto gated = floats(num_rows * ffn);
        mull_linear(inputs.get(), hidden, num_rows, layer->gate_up, gated.get(), ffn);
        mull_linear(gated.get(), ffn, num_rows, layer->down, out, hidden);
        return;
    }
    const std::int64_t num_experts = layer->gate->out, num_chosen = layer->num_chosen;
    const auto logits = floats(num_rows * num_experts), weights = floats(num_rows * num_chosen);
    const std::unique_ptr<std::int64_t[]> ids(new std::int64_t[num_rows * num_chosen]);
    mull_linear(inputs.get(), hidden, num_rows, layer->gate, logits.get(), num_experts);
    mull_choose_experts(logits.get(), num_experts, num_rows, num_experts, num_chosen, layer->is_normalized, ids.get(),
                        weights.get());
    mull_experts(inputs.get(), hidden, num_rows, ids.get(), weights.get(), num_chosen, layer->gate_up, layer->down, 0,
                 out);
}

// Leaves in `delta` what is still to be added to x.
extern "C" void mull_layers(float* x, const LayerHalves* layers, std::int64_t num_layers, const StepRows* rows,
                            float* delta) {
    const std::int64_t num_rows = rows->num_known + rows->num_singles;
    const auto attended = floats(num_rows * layers->attention->qkv->in);
    for (std::int64_t i = 0; i < num_layers; ++i) {
        mull_attention_half(x, i ? delta : nullptr, layers[i].attention, rows, layers[i].pool,
                            static_cast<std::int32_t>(layers[i].pool_kind), attended.get());
        mull_feed_forward_half(x, attended.get(), num_rows, layers[i].feed_forward, delta);
    }
}
