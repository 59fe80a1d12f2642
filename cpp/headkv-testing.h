// What benchmarks and tests of this repository ask of the cache beside headkv.h; rows are converted to float. It may change.
#pragma once

#include "headkv.h"

#ifdef __cplusplus
extern "C" {
#endif

// For benchmarks: makes the empty sequence look as if n_tokens had been read, with random K, V and window queries.
LLAMA_API int32_t headkv_fill_prompt(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens, uint32_t seed);

// The window queries of a sequence in position order, [n_window][n_head][n_embd_head_k]; returns n_window. Of a compressed one with
// kv_generated those of its last generated tokens.
LLAMA_API int32_t headkv_read_window(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, float * dst, int64_t n);

// The reference queries of a sequence in position order, [n_refs][n_head_kv][n_embd_head_k]; returns n_refs.
LLAMA_API int32_t headkv_read_refs(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, float * dst, int64_t n);

// What the softmax of a layer is made of: the factor on q k, the cap of logits and the largest ALiBi bias (0 = none), then
// the sink of each query head if it has any. Returns how many values.
LLAMA_API int32_t headkv_read_softmax(const struct llama_context * ctx, int32_t il, float * dst, int64_t n);

// K (or V) of one head: of the whole prompt while it is staged, else of the cells that the head holds,
// [n_cells][n_embd_head_k or n_embd_head_v]; returns n_cells.
LLAMA_API int32_t headkv_read_cells(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t ih, bool v, float * dst, int64_t n);

#ifdef __cplusplus
}
#endif
