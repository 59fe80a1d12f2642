#include "headkv-stages.h"

// Sum of the rows of x [n, n_rows], in place: halves are added until one row is left. Upstream's pooling and
// matrix products walk columns here and are slower; the order of additions is fixed.
static ggml_tensor * sum_rows(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * x) {
    const int64_t n = x->ne[0];
    for (int64_t n_rows = x->ne[1]; n_rows > 1; n_rows = n_rows/2) {
        const int64_t half = n_rows/2;
        ggml_tensor * lo = ggml_view_2d(ctx, x, n, half, x->nb[1], 0);
        ggml_tensor * hi = ggml_view_2d(ctx, x, n, half, x->nb[1], half*x->nb[1]);
        ggml_build_forward_expand(gf, ggml_add_inplace(ctx, lo, hi));
        if (n_rows % 2 == 1) {
            ggml_tensor * first = ggml_view_1d(ctx, x, n, 0);
            ggml_tensor * last  = ggml_view_1d(ctx, x, n, (n_rows - 1)*x->nb[1]);
            ggml_build_forward_expand(gf, ggml_add_inplace(ctx, first, last));
        }
    }
    return x;
}

ggml_tensor * headkv_build_score(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
        float scale, float softcap, headkv_pool pool, int pool_kernel) {
    const int64_t n_kv     = k->ne[1];
    const int64_t n_window = q->ne[1];
    const int64_t n_group  = q->ne[2];
    const int64_t n_prefix = n_kv - n_window;

    ggml_tensor * kq = ggml_mul_mat(ctx, k, ggml_reshape_2d(ctx, q, q->ne[0], n_window*n_group)); // [n_kv, n_window*n_group]
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    if (softcap > 0.0f) {
        kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, scale/softcap)), softcap);
        scale = 1.0f;
    }
    kq = ggml_reshape_3d(ctx, kq, n_kv, n_window, n_group);
    ggml_tensor * p = ggml_soft_max_ext(ctx, kq, mask, scale, 0.0f); // the allocator makes it in place
    ggml_build_forward_expand(gf, p);

    p = sum_rows(ctx, gf, ggml_reshape_2d(ctx, p, n_kv, n_window*n_group));

    ggml_tensor * s = ggml_scale(ctx, ggml_view_1d(ctx, p, n_prefix, 0), 1.0f/(n_window*n_group));
    if (pool_kernel > 1) {
        // max leaves out the neighbours that do not exist, avg counts them as zero: what torch's poolings do
        s = pool == HEADKV_POOL_MAX
            ? ggml_pool_1d(ctx, s, GGML_OP_POOL_MAX, pool_kernel, 1, pool_kernel/2)
            : ggml_pool_2d(ctx, s, GGML_OP_POOL_AVG, pool_kernel, 1, 1, 1, pool_kernel/2, 0);
        s = ggml_reshape_1d(ctx, s, n_prefix);
    }
    return s;
}

void headkv_build_sums(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
        ggml_tensor * sums, ggml_tensor * cells, float scale, float softcap) {
    const int64_t n_head   = q->ne[1];
    const int64_t n_tokens = q->ne[2];
    const int64_t H        = k->ne[1];
    const int64_t n_kv     = k->ne[2];

    ggml_tensor * zeros = ggml_fill_inplace(ctx, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, n_tokens, H), 0.0f);
    sums = ggml_set_rows(ctx, sums, zeros, cells);
    ggml_build_forward_expand(gf, sums);

    q = ggml_cont(ctx, ggml_permute(ctx, q, 0, 2, 1, 3));                     // [D, n_tokens, n_head]
    ggml_tensor * p = ggml_mul_mat(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), q); // [n_kv, n_tokens, n_head]
    ggml_prec_set_acc(p, GGML_PREC_F32);
    if (softcap > 0.0f) {
        p = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, p, scale/softcap)), softcap);
        scale = 1.0f;
    }
    p = ggml_soft_max_ext(ctx, p, mask, scale, 0.0f);
    p = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_permute(ctx, p, 1, 0, 2, 3))); // [1, n_kv, n_head]
    p = ggml_reshape_3d(ctx, p, n_kv, n_head/H, H);
    p = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_permute(ctx, p, 1, 0, 2, 3))); // [1, n_kv, H]
    ggml_tensor * seen = ggml_view_2d(ctx, sums, n_kv, H, sums->nb[2], 0);
    ggml_build_forward_expand(gf, ggml_add_inplace(ctx, seen, ggml_reshape_2d(ctx, p, n_kv, H)));
}

ggml_tensor * headkv_build_value_norm(ggml_context * ctx, ggml_tensor * v, ggml_tensor * wo, int64_t n_group) {
    ggml_tensor * out = ggml_mul_mat(ctx, wo, v); // [n_embd*n_group, n]
    return ggml_scale(ctx, ggml_sum_rows(ctx, ggml_abs_inplace(ctx, out)), 1.0f/n_group);
}

ggml_tensor * headkv_build_output_matrix(ggml_context * ctx, ggml_tensor * wo, ggml_tensor * wo_s, ggml_tensor * columns, int64_t n_embd_head) {
    // a product, because repacked weights can be read in no other way
    ggml_tensor * res = ggml_mul_mat(ctx, wo, columns); // [n_embd, n_embd_head*n_group]
    if (wo_s) {
        res = ggml_mul(ctx, res, wo_s);
    }
    const int64_t n_embd  = res->ne[0];
    const int64_t n_group = res->ne[1]/n_embd_head;
    res = ggml_permute(ctx, ggml_reshape_3d(ctx, res, n_embd, n_embd_head, n_group), 1, 0, 2, 3);
    return ggml_cont_2d(ctx, res, n_embd_head, n_embd*n_group);
}
