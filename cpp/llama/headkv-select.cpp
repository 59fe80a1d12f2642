#include "headkv-op.h"
#include "headkv-stages.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

// Larger key = better cell: the score in an order-preserving integer code, then the lower position. No two keys
// are equal, so the outcome does not depend on the algorithm. NaN counts as the lowest score.
static uint64_t cell_key(float score, uint32_t pos) {
    uint32_t bits = 0;
    if (!std::isnan(score)) {
        score += 0.0f; // -0 and 0 are one score
        memcpy(&bits, &score, sizeof(bits));
        bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    }
    return ((uint64_t) bits << 32) | (0xffffffffu - pos);
}

// keys: room for n
static void select_cells(const float * scores, int64_t n, int64_t n_keep, uint64_t * keys, int32_t * out) {
    if (n_keep >= n) {
        for (int64_t i = 0; i < n; ++i) {
            out[i] = (int32_t) i;
        }
        return;
    }
    for (int64_t i = 0; i < n; ++i) {
        keys[i] = cell_key(scores[i], (uint32_t) i);
    }
    std::nth_element(keys, keys + n_keep, keys + n, std::greater<uint64_t>());
    for (int64_t i = 0; i < n_keep; ++i) {
        out[i] = (int32_t) (0xffffffffu - (uint32_t) keys[i]);
    }
    std::sort(out, out + n_keep);
}

std::vector<int32_t> headkv_select_cells(const float * scores, int64_t n, int64_t n_keep) {
    std::vector<uint64_t> keys(n);
    std::vector<int32_t> res(std::min(n_keep, n));
    select_cells(scores, n, n_keep, keys.data(), res.data());
    return res;
}

static void select_op(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(userdata);
    const ggml_tensor * scores = dst->src[0];
    const ggml_tensor * plan = dst->src[1];

    const int64_t n_prefix = scores->ne[0];
    const int32_t n_recent = headkv_op_get(dst).n_recent;

    // the keys come before the result
    uint64_t * all_keys = (uint64_t *) dst->data;
    int32_t * res = (int32_t *) (all_keys + n_prefix * scores->ne[1]);
    for (int64_t h = ith; h < scores->ne[1]; h += nth) {
        const int32_t * p = (const int32_t *) ((const char *) plan->data + h * plan->nb[1]);
        const float * s = (const float *) ((const char *) scores->data + h * scores->nb[1]);
        const int32_t n_keep = p[1];
        int32_t * out = res + p[0];

        select_cells(s, n_prefix, n_keep, all_keys + h * n_prefix, out);
        for (int32_t i = 0; i < n_recent; ++i) {
            out[std::min<int64_t>(n_keep, n_prefix) + i] = (int32_t) n_prefix + i;
        }
    }
}

ggml_tensor * headkv_build_select(ggml_context * ctx, ggml_tensor * scores, ggml_tensor * plan, int64_t n_recent, int64_t n_total) {
    GGML_ASSERT(scores->type == GGML_TYPE_F32 && plan->type == GGML_TYPE_I32 && plan->ne[1] == scores->ne[1]);
    ggml_tensor * args[] = { scores, plan };
    const int64_t n_keys = 2 * ggml_nelements(scores); // elements that the keys, of 64 bits each, take
    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_I32, n_keys + n_total, 1, 1, 1, args, 2, select_op, GGML_N_TASKS_MAX, nullptr);

    headkv_op op;
    op.kind = HEADKV_OP_SELECT;
    op.n_recent = (int32_t) n_recent;
    headkv_op_set(res, op);
    return ggml_view_1d(ctx, res, n_total, n_keys * sizeof(int32_t));
}

ggml_tensor * headkv_build_select_composed(ggml_context * ctx, ggml_tensor * scores, int64_t n_keep, ggml_tensor * recent) {
    ggml_tensor * kept = recent;
    if (n_keep > 0) {
        const int64_t n = scores->ne[0];
        if (n > HEADKV_MAX_SELECT_COMPOSED) {
            throw std::length_error("a prompt of more than 4194304 tokens cannot be compressed on this device: its positions are not exact there, use the CPU");
        }

        // The smallest score to keep. Which of several cells with this score top_k takes is up to the backend.
        ggml_tensor * top = ggml_top_k(ctx, scores, (int) n_keep); // unordered
        ggml_tensor * best = ggml_get_rows(ctx, ggml_reshape_2d(ctx, scores, 1, n), top); // [1, n_keep]
        ggml_tensor * lowest = ggml_view_1d(ctx, ggml_argsort(ctx, ggml_reshape_1d(ctx, best, n_keep), GGML_SORT_ORDER_ASC), 1, 0);
        ggml_tensor * limit = ggml_reshape_1d(ctx, ggml_get_rows(ctx, best, lowest), 1);

        // Keys without ties: 2, 1 or 0 for a score above, at or below the limit, then the lower position; integers up to
        // 3*n, exact in F32.
        ggml_tensor * d = ggml_sub(ctx, scores, limit);
        ggml_tensor * above = ggml_step(ctx, d);
        ggml_tensor * below = ggml_step(ctx, ggml_neg(ctx, d));
        ggml_tensor * rank = ggml_scale_bias(ctx, ggml_sub(ctx, above, below), (float) n, (float) n);
        ggml_tensor * key = ggml_sub(ctx, rank, ggml_arange(ctx, 0.0f, (float) n, 1.0f));
        top = ggml_top_k(ctx, key, (int) n_keep);

        // positions below 2^24 are exact in F32
        top = ggml_reshape_2d(ctx, ggml_cast(ctx, top, GGML_TYPE_F32), 1, n_keep);
        ggml_tensor * order = ggml_argsort(ctx, ggml_reshape_1d(ctx, top, n_keep), GGML_SORT_ORDER_ASC);
        top = ggml_reshape_1d(ctx, ggml_get_rows(ctx, top, order), n_keep);
        kept = ggml_concat(ctx, top, recent, 0);
    }
    return ggml_cast(ctx, kept, GGML_TYPE_I32);
}
