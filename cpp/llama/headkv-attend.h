// Stage 7, attend: queries over per-head ranges of a flat pool.
//
//   q      F32 [n_embd_head_k, n_head, n_tokens]       tokens of a sequence are consecutive, n_tokens/n_seqs each
//   k          [n_embd_head_k, n_rows]                 any type with a vec_dot; rows of all heads and sequences
//   v          [n_embd_head_v, n_rows]                 any type that can be converted; same rows
//   ranges I32 [2, n_head_kv, n_seqs]                  first row and number of rows, the ubatch's own included
//   bias   F32 [n_head_kv, n_seqs] or null             finite, added to the logit of the first row of each range (after
//                                                      scale and softcap): log n makes this row count n times
//   sinks  F32 [n_head] or null                        a logit of each query head that is in the sum that its probabilities
//                                                      are divided by, and has no value; neither scaled nor capped
//   pos    F32 [n_rows] or null                        position of each row, counted from any one of its sequence: with ALiBi, slope x
//                                                      position is added to each logit, after softcap. Not with bias or sinks
//   dst    F32 [n_embd_head_v*n_head, n_tokens]
//
// Token t of the n tokens of its sequence sees the first len - (n - 1 - t) rows of each range: the ubatch's own
// rows are the last ones. A range without rows gives zeros. Accumulation is in F32 and independent of the number
// of threads and of tokens: ranges are cut into chunks of fixed size and partial results are combined in order.
#pragma once

#include "ggml.h"

#include <atomic>
#include <memory>
#include <vector>

// partial attention of a GQA group over consecutive rows
struct headkv_attend_args {
    const float * q;    // [n_group][n_embd_head_k], stride nq floats
    int64_t nq;
    const char * k;
    const char * v;
    size_t nb_k; // bytes from row to row
    size_t nb_v;
    int n_rows;
    int n_embd_head_k;
    int n_embd_head_v;
    int n_group;
    ggml_type type_k;
    ggml_type type_v;
    float scale;
    float softcap; // 0 = none
    const float * pos;    // [n_rows] or null
    const float * slopes; // [n_group] factors on pos
};

// acc [n_group*n_embd_head_v] sum of exp(s - m)*v, m [n_group] largest score, s [n_group] sum of exp(s - m)
typedef void (*headkv_attend_kernel)(const headkv_attend_args & args, float * acc, float * m, float * s);

// null = it has no version for these types and sizes
headkv_attend_kernel headkv_attend_kernel_portable(ggml_type type_k, ggml_type type_v, int n_embd_head_k, int n_embd_head_v);

// the fastest one; name (may be null) asks for one of "portable", "avx2", "avx512", "neon"
headkv_attend_kernel headkv_attend_kernel_find(ggml_type type_k, ggml_type type_v, int n_embd_head_k, int n_embd_head_v, const char * name);

struct headkv_prompt_kernel;

// what the ops need besides their tensors; one object per layer, alive as long as graphs with the ops are
struct headkv_attend_state {
    headkv_attend_state(int n_embd_head_k, int n_embd_head_v, int n_head, int n_head_kv, int n_seq_max, ggml_type type_k, ggml_type type_v);

    headkv_attend_kernel kernel;
    const headkv_prompt_kernel * prompt_kernel; // headkv-attend-prompt.h

    int n_embd_head_k;
    int n_embd_head_v;
    int n_head;
    int n_head_kv;
    float scale = 1.0f;
    float softcap = 0.0f;
    float max_bias = 0.0f; // of ALiBi

    // scheduling of one run; zero between runs
    std::atomic<int> ticket{ 0 };
    std::atomic<int> n_left{ 0 };
    std::unique_ptr<std::atomic<int>[]> n_done; // [n_head_kv*n_seq_max*N_TOKENS_SPLIT]

    // more tokens than this keep the threads busy without cutting ranges
    static constexpr int N_TOKENS_SPLIT = 4;
    static constexpr int N_ROWS_CHUNK = 128;
};

// the fused op; the scale, the softcap and the ALiBi bias are those of the state when it is built
ggml_tensor * headkv_build_attend_fused(ggml_context * ctx, headkv_attend_state * state,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * ranges, ggml_tensor * bias = nullptr, ggml_tensor * sinks = nullptr,
        ggml_tensor * pos = nullptr);
