#include "headkv-stages.h"

#include "llama-impl.h"

ggml_tensor * headkv_build_window(ggml_context * ctx, ggml_tensor * q_cur, ggml_tensor * rot, ggml_tensor * ring,
        ggml_tensor * tokens, ggml_tensor * slots) {
    const int64_t n_row = q_cur->ne[0] * q_cur->ne[1];

    // a fused QKV projection leaves q as a strided view
    ggml_tensor * q = ggml_is_contiguous(q_cur) ? ggml_reshape_2d(ctx, q_cur, n_row, q_cur->ne[2])
                                                : ggml_cont_2d(ctx, q_cur, n_row, q_cur->ne[2]);
    q = ggml_get_rows(ctx, q, tokens);
    if (rot) {
        q = ggml_reshape_3d(ctx, q, q_cur->ne[0], q_cur->ne[1], tokens->ne[0]);
        q = llama_mul_mat_hadamard(ctx, q, rot);
        q = ggml_reshape_2d(ctx, q, n_row, tokens->ne[0]);
    }
    return ggml_set_rows(ctx, ring, q, slots);
}

ggml_tensor * headkv_build_refs(ggml_context * ctx, ggml_tensor * q_cur, ggml_tensor * rot, ggml_tensor * refs,
        ggml_tensor * rows, ggml_tensor * slots) {
    const int64_t n_rows = q_cur->ne[1] * q_cur->ne[2];
    ggml_tensor * q = ggml_is_contiguous(q_cur) ? ggml_reshape_2d(ctx, q_cur, q_cur->ne[0], n_rows) : ggml_cont_2d(ctx, q_cur, q_cur->ne[0], n_rows);
    q = ggml_get_rows(ctx, q, rows);
    return ggml_set_rows(ctx, refs, rot ? llama_mul_mat_hadamard(ctx, q, rot) : q, slots);
}
