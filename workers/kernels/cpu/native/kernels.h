// What is called from Python, and from the calls that take half a layer at a time.
#pragma once

#include <cstdint>

#include "weight.h"

// One more with each change of an argument, a structure or the panels: `workers.kernels.cpu.library` asks for its own.
constexpr std::int64_t MULL_ABI = 4;

extern "C" {
void mull_linear(const float* x, std::int64_t x_stride, std::int64_t num_rows, const mull::Weight* weight, float* out,
                 std::int64_t out_stride);
void mull_experts(const float* x, std::int64_t x_stride, std::int64_t num_tokens, const std::int64_t* ids,
                  const float* weights, std::int64_t num_chosen, const mull::Weight* gate_up, const mull::Weight* down,
                  std::int64_t first_expert, float* out);
void mull_rms_norm(const float* x, std::int64_t x_stride, std::int64_t num_rows, std::int64_t size, const float* weight,
                   float eps, float* out);
void mull_add_rms_norm(float* x, const float* delta, std::int64_t num_rows, std::int64_t size, const float* weight,
                       float eps, float* out);
void mull_rotate_and_store(float* heads, std::int64_t stride, std::int64_t num_tokens, std::int64_t num_q_heads,
                           std::int64_t num_kv_heads, std::int64_t head_dim, const float* norms, float eps,
                           const float* rotations, void* pool, std::int32_t pool_kind, std::int64_t num_cells,
                           const std::int64_t* cells);
void mull_choose_experts(const float* logits, std::int64_t stride, std::int64_t num_tokens, std::int64_t num_experts,
                         std::int64_t num_chosen, std::int32_t is_normalized, std::int64_t* ids, float* weights);
void mull_decode_attention(const float* q, std::int64_t q_stride, std::int64_t num_seqs, std::int64_t num_heads,
                           std::int64_t num_kv_heads, std::int64_t head_dim, const void* pool, std::int32_t pool_kind,
                           std::int64_t num_cells, std::int64_t block_size, const std::int64_t* tables, std::int64_t table_stride,
                           const std::int64_t* num_keys, float* out);
void mull_prefill_attention(const float* q, std::int64_t q_stride, std::int64_t num_chunks, const std::int64_t* starts,
                            const std::int64_t* sizes, std::int64_t num_heads, std::int64_t num_kv_heads,
                            std::int64_t head_dim, const void* pool, std::int32_t pool_kind, std::int64_t num_cells,
                            std::int64_t block_size,
                            const std::int64_t* tables, std::int64_t table_stride, float* out);
}
