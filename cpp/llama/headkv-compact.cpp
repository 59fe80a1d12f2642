#include "headkv-op.h"
#include "headkv-stages.h"

#include <cstring>

static void compact_op(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(userdata);
    const ggml_tensor * cells = dst->src[1];
    const ggml_tensor * kept = dst->src[2];
    const ggml_tensor * cell = dst->src[3];
    const ggml_tensor * plan = dst->src[4];

    const size_t n_bytes = ggml_row_size(dst->type, dst->ne[0]);
    const int32_t * pos = (const int32_t *) kept->data;
    const int32_t * cell_of = (const int32_t *) cell->data;

    for (int64_t h = ith; h < plan->ne[1]; h += nth) {
        const int32_t * p = (const int32_t *) ((const char *) plan->data + h * plan->nb[1]);
        for (int32_t i = 0; i < p[1]; ++i) {
            memcpy((char *) dst->data + (size_t) (p[2] + i) * dst->nb[1],
                    (const char *) cells->data + (size_t) cell_of[pos[p[0] + i]] * cells->nb[1] + h * n_bytes, n_bytes);
        }
    }
}

ggml_tensor * headkv_build_compact(ggml_context * ctx, ggml_tensor * pool, ggml_tensor * cells, ggml_tensor * kept,
        ggml_tensor * cell, ggml_tensor * plan) {
    GGML_ASSERT(pool->type == cells->type && cells->ne[0] == pool->ne[0] * plan->ne[1]);
    ggml_tensor * args[] = { cells, kept, cell, plan };
    ggml_tensor * res = ggml_custom_inplace(ctx, pool, args, 4, compact_op, GGML_N_TASKS_MAX, nullptr);

    headkv_op op;
    op.kind = HEADKV_OP_COMPACT;
    headkv_op_set(res, op);
    return res;
}

ggml_tensor * headkv_build_mean(ggml_context * ctx, ggml_tensor * rows, ggml_tensor * share) {
    ggml_tensor * columns = ggml_cont(ctx, ggml_transpose(ctx, rows)); // F32 [n, elements of a row]
    return ggml_reshape_2d(ctx, ggml_mul_mat(ctx, columns, share), rows->ne[0], 1);
}
