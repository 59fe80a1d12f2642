// Attention of a prompt while it is read: queries of consecutive tokens of one sequence over its staged cells.
//
//   q      F32 [n_embd_head_k, n_head, n_tokens]
//   k          [n_embd_head_k, n_head_kv, n_cells]     any type that can be converted; heads and cells may have strides
//   v          [n_embd_head_v, n_head_kv, n_cells]     same
//   cells  I32 [n]                                     cells of the sequence in the order of their positions
//   seen   I32 [2, n_tokens]                           token t sees the cells from seen[0, t] to before seen[1, t] of this order
//   sinks  F32 [n_head] or null                        see headkv-attend.h
//   sums   F32 [1, all cells, n_head_kv] or null       the attention that each cell gets from all query heads of its group is added
//   fresh  I64 [n] or null                             cells of it that begin with zero
//   dst    F32 [n_embd_head_v*n_head, n_tokens]
//
// A row of the result depends on its query and on what it sees, and on nothing else: not on the tokens that are computed with
// it, nor on the number of threads. Accumulation is in F32; of what is added to the sums, in whole numbers, so that it does not depend on the
// threads either. A query whose scores are no numbers makes all sums of its KV head NaN.
#pragma once

#include "headkv-attend.h"

constexpr float HEADKV_PROMPT_ONE = 1 << 30;

// the queries of some tokens and one GQA group over the cells of its KV head
struct headkv_prompt_args {
    const float * q; // [n_tokens][n_group][n_embd_head_k], strides of tokens and heads in floats
    int64_t nq_token;
    int64_t nq_head;
    const char * k;
    const char * v;
    size_t nb_k; // bytes from cell to cell
    size_t nb_v;
    const int32_t * cells;
    const int32_t * seen; // [n_tokens][2]
    const float * sinks; // [n_group] or null
    float * dst; // [n_tokens][n_group][n_embd_head_v], stride of tokens in floats
    int64_t nd_token;
    int64_t * sums; // [n_cells + 1] or null: HEADKV_PROMPT_ONE for all attention of a query is added; the last one counts queries without numbers
    int64_t n_cells;
    int n_tokens;
    int n_group;
    int n_embd_head_k;
    int n_embd_head_v;
    ggml_type type_k;
    ggml_type type_v;
    float scale;
    float softcap; // 0 = none
};

struct headkv_prompt_kernel {
    size_t (*n_work)(const headkv_prompt_args & args); // floats, without sums
    void (*run)(const headkv_prompt_args & args, float * work);
};

const headkv_prompt_kernel * headkv_prompt_kernel_portable();

const headkv_prompt_kernel * headkv_prompt_kernel_find(const char * name);

// whether K and V of these types can be converted
bool headkv_prompt_takes(ggml_type type_k, ggml_type type_v);

// Scale, softcap and kernel are those of the state when it is built. What a thread needs besides lies behind the result, so that nothing is
// allocated while it is computed: for n_threads of them, more would look on.
ggml_tensor * headkv_build_attend_prompt(ggml_context * ctx, headkv_attend_state * state, int n_threads,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * cells, ggml_tensor * seen, ggml_tensor * sinks = nullptr,
        ggml_tensor * sums = nullptr, ggml_tensor * fresh = nullptr);
