// Parameters of our ops. They ride on GGML_OP_CUSTOM and lie at the end of op_params, behind what ggml_custom_4d() puts
// there, so that a backend can know an op and run it by itself. What the op means is said where it is built; the CPU
// callback is its definition.
#pragma once

#include "ggml.h"

#include <cmath>
#include <cstdint>
#include <cstring>

enum headkv_op_kind : int32_t {
    HEADKV_OP_NONE = 0,
    HEADKV_OP_ATTEND = 1, // headkv-attend.h
    HEADKV_OP_STATS = 2, // headkv-stages.h, first half of score
    HEADKV_OP_SCORE = 3, // same
    HEADKV_OP_SELECT = 4, // same
    HEADKV_OP_ATTEND_PROMPT = 5, // headkv-attend-prompt.h; on the CPU
    HEADKV_OP_COMPACT = 6, // headkv-stages.h
};

constexpr int HEADKV_SCORE_CHUNK = 512; // keys that share an element of the result of STATS

struct headkv_op {
    static constexpr uint32_t TAG = 0x564b4448;

    uint32_t tag = TAG;
    headkv_op_kind kind = HEADKV_OP_NONE;

    float scale = 1.0f; // attend, stats, score: of the dot products
    float softcap = 0.0f; // same, 0 = none
    float max_bias = 0.0f; // same, of ALiBi, 0 = none
    int32_t n_recent = 0;    // select
    int32_t n_square = 0;    // score: probabilities are squared so often before their mean is taken
    int32_t pool_max = 1;    // score: pooling by the maximum, else by the average
    int32_t pool_kernel = 1;    // score
    int32_t n_job = 0; // attend of a prompt: tokens that a thread takes at a time
};

// what ggml_custom_4d() takes: a function, the number of tasks, a pointer
static_assert(2 * sizeof(void *) + sizeof(int64_t) + sizeof(headkv_op) <= GGML_MAX_OP_PARAMS, "no room for the parameters");

inline void headkv_op_set(ggml_tensor * t, const headkv_op & op) {
    memcpy((char *) t->op_params + GGML_MAX_OP_PARAMS - sizeof(op), &op, sizeof(op));
}

// What ALiBi adds to the logit of a query head per position that a cell lies before the query, negated: n heads, the largest power of
// two that there are, fall from 2^(-max_bias/n) to 2^-max_bias; those behind them lie between the first ones.
inline float headkv_alibi_slope(float max_bias, int64_t n_head, int64_t ih) {
    int64_t n = 1;
    while (2 * n <= n_head) {
        n *= 2;
    }
    const float step = max_bias / n;
    return std::exp2(ih < n ? -step * (ih + 1) : -0.5f * step * (2 * (ih - n) + 1));
}

inline void headkv_to_floats(ggml_type type, const void * src, float * dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, n * sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}

inline bool headkv_has_floats(ggml_type type) {
    return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float;
}

// Bytes that a device copies at a time in compact: the largest power of two up to 16 that divides rows and where they may lie. A backend
// aligns the memory of a tensor to more.
inline size_t headkv_compact_word(const ggml_tensor * op) {
    const ggml_tensor * cells = op->src[1];
    const size_t all = 16 | ggml_row_size(op->type, op->ne[0]) | op->nb[1] | op->view_offs | cells->nb[1] | cells->view_offs;
    return all & (~all + 1);
}

// kind NONE: not ours
inline headkv_op headkv_op_get(const ggml_tensor * t) {
    headkv_op op;
    memcpy(&op, (const char *) t->op_params + GGML_MAX_OP_PARAMS - sizeof(op), sizeof(op));
    return t->op == GGML_OP_CUSTOM && op.tag == headkv_op::TAG ? op : headkv_op();
}
