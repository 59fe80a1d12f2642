// What the cache holds, for tests and tools, and random contents for benchmarks. All but headkv_fill() leave it as it is.
// They throw std::invalid_argument with value and limit, or std::runtime_error.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "llama.h"

class llama_kv_cache_ragged;

// puts random data in place of a prompt of an empty sequence; false: no room, headkv_last_error() says why
bool headkv_fill(llama_kv_cache_ragged & kv, llama_context * lctx, llama_seq_id seq_id, uint32_t n_tokens, uint32_t seed);

// Attention of the last n_queries tokens of a staged sequence, see headkv_read_attention().
void headkv_attention_of(llama_kv_cache_ragged & kv, llama_context * lctx, llama_seq_id seq_id, int32_t n_queries,
        const std::vector<std::pair<int32_t, int32_t>> & spans, int32_t n_top, float * mass, int32_t * top);

// The largest probabilities of the first positions, see headkv_read_attention_max().
void headkv_attention_max_of(llama_kv_cache_ragged & kv, llama_context * lctx, llama_seq_id seq_id, int32_t n_queries, int32_t n_positions, float * dst);

// Rows converted to float into dst, which has room for n values. Return their number.
int32_t headkv_window_of(const llama_kv_cache_ragged & kv, llama_seq_id seq_id, int32_t il, float * dst, int64_t n);
int32_t headkv_softmax_of(const llama_kv_cache_ragged & kv, int32_t il, float * dst, int64_t n);
int32_t headkv_refs_of(const llama_kv_cache_ragged & kv, llama_seq_id seq_id, int32_t il, float * dst, int64_t n);
int32_t headkv_cells_of(const llama_kv_cache_ragged & kv, llama_seq_id seq_id, int32_t il, int32_t ih, bool v, float * dst, int64_t n);
