#define HEADKV_NO_SIMD
#include "headkv-op.h"
#include "headkv-score-kernel.h"
#include "headkv-stages.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

// Sum of the rows of x [n, n_rows], in place: halves are added until one row is left. Upstream's pooling and
// matrix products walk columns here and are slower; the order of additions is fixed.
static ggml_tensor * sum_rows(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * x) {
    const int64_t n = x->ne[0];
    for (int64_t n_rows = x->ne[1]; n_rows > 1; n_rows = n_rows / 2) {
        const int64_t half = n_rows / 2;
        ggml_tensor * lo = ggml_view_2d(ctx, x, n, half, x->nb[1], 0);
        ggml_tensor * hi = ggml_view_2d(ctx, x, n, half, x->nb[1], half * x->nb[1]);
        ggml_build_forward_expand(gf, ggml_add_inplace(ctx, lo, hi));
        if (n_rows % 2 == 1) {
            ggml_tensor * first = ggml_view_1d(ctx, x, n, 0);
            ggml_tensor * last = ggml_view_1d(ctx, x, n, (n_rows - 1) * x->nb[1]);
            ggml_build_forward_expand(gf, ggml_add_inplace(ctx, first, last));
        }
    }
    return x;
}

ggml_tensor * headkv_sinks_of_head(ggml_context * ctx, ggml_tensor * sinks, int64_t n_group, int64_t ih) {
    // copied, because devices take no tensor that begins anywhere, and an op is run where its weights are
    return !sinks ? nullptr : ggml_cont(ctx, ggml_view_1d(ctx, sinks, n_group, ih * n_group * sizeof(float)));
}

ggml_tensor * headkv_build_soft_max(ggml_context * ctx, ggml_tensor * kq, ggml_tensor * mask, float scale, float softcap, ggml_tensor * sinks, float max_bias) {
    if (softcap > 0.0f) {
        kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, scale / softcap)), softcap);
        scale = 1.0f;
    }
    ggml_tensor * res = ggml_soft_max_ext(ctx, kq, mask, scale, max_bias);
    ggml_soft_max_add_sinks(res, sinks);
    return res;
}

ggml_tensor * headkv_build_score(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
        int64_t n_prefix, float scale, float softcap, int n_square, headkv_pool pool, int pool_kernel, ggml_tensor * sinks) {
    const int64_t n_kv = k->ne[1];
    const int64_t n_window = q->ne[1];
    const int64_t n_group = q->ne[2];

    ggml_tensor * kq = ggml_mul_mat(ctx, k, ggml_reshape_2d(ctx, q, q->ne[0], n_window * n_group)); // [n_kv, n_window*n_group]
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    kq = ggml_reshape_3d(ctx, kq, n_kv, n_window, n_group);
    ggml_tensor * p = headkv_build_soft_max(ctx, kq, mask, scale, softcap, sinks); // the allocator makes it in place
    ggml_build_forward_expand(gf, p);
    for (int i = 0; i < n_square; ++i) {
        p = ggml_sqr_inplace(ctx, p);
        ggml_build_forward_expand(gf, p);
    }

    p = sum_rows(ctx, gf, ggml_reshape_2d(ctx, p, n_kv, n_window * n_group));

    ggml_tensor * s = ggml_scale(ctx, ggml_view_1d(ctx, p, n_prefix, 0), 1.0f / (n_window * n_group));
    for (int i = 0; i < n_square; ++i) {
        s = ggml_sqrt(ctx, s);
    }
    if (pool_kernel > 1) {
        // max leaves out the neighbours that do not exist, avg counts them as zero: what torch's poolings do
        s = pool == HEADKV_POOL_MAX
                ? ggml_pool_1d(ctx, s, GGML_OP_POOL_MAX, pool_kernel, 1, pool_kernel / 2)
                : ggml_pool_2d(ctx, s, GGML_OP_POOL_AVG, pool_kernel, 1, 1, 1, pool_kernel / 2, 0);
        s = ggml_reshape_1d(ctx, s, n_prefix);
    }
    return s;
}

int headkv_pool_kernel(int64_t n_keep) {
    return (int) std::min<int64_t>(31, std::max<int64_t>(3, n_keep / 4 / 2 * 2 + 1));
}

// max leaves out the neighbours that do not exist, avg counts them as zero
static float pooled(const float * begin, const float * end, bool max, int kernel) {
    if (max) {
        return *std::max_element(begin, end);
    }
    float res = 0.0f;
    for (const float * p = begin; p < end; ++p) {
        res += *p;
    }
    return res / kernel;
}

void headkv_pool_scores(float * scores, int64_t n, headkv_pool pool, int kernel) {
    const std::vector<float> plain(scores, scores + n);
    const int64_t half = kernel / 2;
    for (int64_t i = 0; i < n; ++i) {
        scores[i] = pooled(plain.data() + std::max<int64_t>(i - half, 0), plain.data() + std::min(i + half + 1, n), pool == HEADKV_POOL_MAX, kernel);
    }
}

void headkv_build_sums(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
        ggml_tensor * sums, ggml_tensor * cells, float scale, float softcap, ggml_tensor * sinks, float max_bias) {
    const int64_t n_head = q->ne[1];
    const int64_t n_tokens = q->ne[2];
    const int64_t H = k->ne[1];
    const int64_t n_kv = k->ne[2];

    ggml_tensor * zeros = ggml_fill_inplace(ctx, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, n_tokens, H), 0.0f);
    sums = ggml_set_rows(ctx, sums, zeros, cells);
    ggml_build_forward_expand(gf, sums);

    q = ggml_cont(ctx, ggml_permute(ctx, q, 0, 2, 1, 3));                     // [D, n_tokens, n_head]
    ggml_tensor * p = ggml_mul_mat(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), q); // [n_kv, n_tokens, n_head]
    ggml_prec_set_acc(p, GGML_PREC_F32);
    p = headkv_build_soft_max(ctx, p, mask, scale, softcap, headkv_sinks_of_head(ctx, sinks, n_head, 0), max_bias);
    p = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_permute(ctx, p, 1, 0, 2, 3))); // [1, n_kv, n_head]
    p = ggml_reshape_3d(ctx, p, n_kv, n_head / H, H);
    p = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_permute(ctx, p, 1, 0, 2, 3))); // [1, n_kv, H]
    ggml_tensor * seen = ggml_view_2d(ctx, sums, n_kv, H, sums->nb[2], 0);
    ggml_build_forward_expand(gf, ggml_add_inplace(ctx, seen, ggml_reshape_2d(ctx, p, n_kv, H)));
}

//
// fused: both ops cut the keys of each head into chunks, which threads take in turn
//

const headkv_score_kernel * headkv_score_kernel_portable() {
    return &score_kernel;
}

namespace {

// env: HEADKV_KERNEL, for tests and measurements
const headkv_score_kernel & kernel_of_env() {
    const headkv_score_kernel * res = headkv_score_kernel_find(getenv("HEADKV_KERNEL"));
    GGML_ASSERT(res && "HEADKV_KERNEL names no kernel of this build and machine");
    return *res;
}

struct score_args {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const int32_t * cells;

    headkv_op op;
    int64_t n_embd_head, n_head_kv, n_group, n_window, n_kv, n_prefix, n_query, n_chunk;

    explicit score_args(const ggml_tensor * dst) :
        q(dst->src[0]), k(dst->src[1]), cells((const int32_t *) dst->src[2]->data), op(headkv_op_get(dst)),
        n_embd_head(q->ne[0]), n_head_kv(k->ne[0] / n_embd_head), n_group(q->ne[1] / n_head_kv), n_window(q->ne[2]), n_kv(dst->src[2]->ne[0]),
        n_prefix(op.kind == HEADKV_OP_SCORE ? dst->ne[0] : 0), n_query(n_window * n_group), n_chunk((n_kv + HEADKV_SCORE_CHUNK - 1) / HEADKV_SCORE_CHUNK) {
    }
};

// the logits of one block of keys for all queries of a head
struct score_block {
    static constexpr int N = headkv_score_kernel::N_KEYS;
    static_assert(HEADKV_SCORE_CHUNK % N == 0);

    const score_args & a;
    const headkv_score_kernel & kernel;
    const headkv_score_kernel::to_column to_column;

    int64_t head = -1;
    std::vector<float> q; // of the head, (token, head of the group)
    std::vector<float> slopes; // of ALiBi, of the head's group
    std::vector<float> row;
    std::vector<float> keys;
    std::vector<float> x; // [n_query][N]

    explicit score_block(const score_args & a) :
        a(a), kernel(kernel_of_env()),
        // 32: a multiple of the vectors and of the blocks of q8_0
        to_column(a.n_embd_head % 32 == 0 ? kernel.find_to_column(a.k->type) : nullptr),
        q(n_padded() * a.n_embd_head), row(a.n_embd_head), keys(N * a.n_embd_head), x(N * n_padded()) {
    }

    size_t n_padded() const {
        constexpr int Q = headkv_score_kernel::N_QUERIES;
        return (a.n_query + Q - 1) / Q * Q;
    }

    void set_head(int64_t ih) {
        if (ih == head) {
            return;
        }
        head = ih;
        slopes.clear();
        for (int64_t g = 0; g < a.n_group; ++g) {
            slopes.push_back(headkv_alibi_slope(a.op.max_bias, a.q->ne[1], head * a.n_group + g));
        }
        for (int64_t j = 0; j < a.n_query; ++j) {
            const char * src = (const char *) a.q->data + j / a.n_group * a.q->nb[2] + (head * a.n_group + j % a.n_group) * a.q->nb[1];
            for (int64_t d = 0; d < a.n_embd_head; ++d) {
                q[j * a.n_embd_head + d] = ((const float *) src)[d] * a.op.scale;
            }
        }
    }

    // keys first to first + n - 1; a key that a query does not see has the logit -INFINITY
    void compute(int64_t first, int64_t n) {
        const size_t nb_head = ggml_row_size(a.k->type, a.n_embd_head);
        for (int64_t i = 0; i < n; ++i) {
            const char * src = (const char *) a.k->data + a.cells[first + i] * a.k->nb[1] + head * nb_head;
            if (first + i + N < a.n_kv) {
                // cells of a head lie too far apart for the processor to foresee the next block
                vf_prefetch((const char *) a.k->data + a.cells[first + i + N] * a.k->nb[1] + head * nb_head, nb_head);
            }
            if (to_column) {
                to_column(src, keys.data() + i, (int) a.n_embd_head);
                continue;
            }
            headkv_to_floats(a.k->type, src, row.data(), a.n_embd_head);
            for (int64_t d = 0; d < a.n_embd_head; ++d) {
                keys[d * N + i] = row[d];
            }
        }
        kernel.logits(q.data(), (int) n_padded(), keys.data(), (int) a.n_embd_head, x.data());
        if (a.op.softcap > 0.0f) {
            for (float & v : x) {
                v = a.op.softcap * std::tanh(v / a.op.softcap);
            }
        }
        for (int64_t j = 0; j < a.n_query; ++j) {
            // a query of the window sees the keys up to its own
            const int64_t n_before = a.n_kv - a.n_window + j / a.n_group - first; // keys
            const int64_t n_visible = std::min(n, n_before + 1);
            for (int64_t i = 0; i < n_visible && a.op.max_bias > 0.0f; ++i) {
                x[j * N + i] += slopes[j % a.n_group] * (float) (i - n_before);
            }
            if (n_visible < N) {
                std::fill(x.begin() + j * N + std::max<int64_t>(n_visible, 0), x.begin() + (j + 1) * N, -INFINITY);
            }
        }
    }
};

// F32 [2, n_query, n_chunk, n_head_kv]
void stats_op(ggml_tensor * dst, int ith, int nth, void *) {
    const score_args a(dst);
    score_block block(a);

    for (int64_t job = ith; job < a.n_head_kv * a.n_chunk; job += nth) {
        const int64_t first = job % a.n_chunk * HEADKV_SCORE_CHUNK;
        const int64_t last = std::min(first + HEADKV_SCORE_CHUNK, a.n_kv);
        block.set_head(job / a.n_chunk);

        float * out = (float *) dst->data + job * a.n_query * 2;
        for (int64_t j = 0; j < a.n_query; ++j) {
            out[2 * j] = -INFINITY;
            out[2 * j + 1] = 0.0f;
        }
        for (int64_t i = first; i < last; i += block.N) {
            block.compute(i, std::min<int64_t>(block.N, last - i));
            for (int64_t j = 0; j < a.n_query; ++j) {
                block.kernel.add_stats(block.x.data() + j * block.N, out + 2 * j, out + 2 * j + 1);
            }
        }
    }
}

void score_op(ggml_tensor * dst, int ith, int nth, void *) {
    const score_args a(dst);
    score_block block(a);
    const int64_t n_chunk = (a.n_prefix + HEADKV_SCORE_CHUNK - 1) / HEADKV_SCORE_CHUNK; // of the scores
    const int64_t half = a.op.pool_kernel / 2;

    std::vector<float> m(a.n_query);
    std::vector<float> f(a.n_query); // 1/sum of exponentials
    std::vector<float> mean;
    for (int64_t job = ith; job < a.n_head_kv * n_chunk; job += nth) {
        const int64_t head = job / n_chunk;
        block.set_head(head);

        const float * stats = (const float *) dst->src[3]->data + head * a.n_chunk * a.n_query * 2;
        const float * sinks = dst->src[4] ? (const float *) dst->src[4]->data + head * a.n_group : nullptr;
        for (int64_t j = 0; j < a.n_query; ++j) {
            m[j] = -INFINITY;
            for (int64_t c = 0; c < a.n_chunk; ++c) {
                m[j] = std::max(m[j], stats[(c * a.n_query + j) * 2]);
            }
            float s = 0.0f;
            for (int64_t c = 0; c < a.n_chunk; ++c) {
                s += stats[(c * a.n_query + j) * 2 + 1] * std::exp(stats[(c * a.n_query + j) * 2] - m[j]);
            }
            if (sinks) {
                s += std::exp(sinks[j % a.n_group] - m[j]);
            }
            f[j] = 1.0f / s;
        }

        // the means of the chunk and of the neighbours that are pooled with it
        const int64_t first = job % n_chunk * HEADKV_SCORE_CHUNK;
        const int64_t last = std::min(first + HEADKV_SCORE_CHUNK, a.n_prefix);
        const int64_t lo = std::max<int64_t>(first - half, 0);
        const int64_t hi = std::min(last + half, a.n_prefix);
        mean.assign(GGML_PAD(hi - lo, block.N), 0.0f);
        for (int64_t i = lo; i < hi; i += block.N) {
            block.compute(i, std::min<int64_t>(block.N, hi - i));
            for (int64_t j = 0; j < a.n_query; ++j) {
                block.kernel.add_probs(block.x.data() + j * block.N, m[j], f[j], a.op.n_square, mean.data() + i - lo);
            }
        }
        for (float & x : mean) {
            x /= a.n_query;
            for (int i = 0; i < a.op.n_square; ++i) {
                x = std::sqrt(x);
            }
        }
        for (int64_t i = first; i < last; ++i) {
            const float * begin = mean.data() + std::max(i - half, lo) - lo;
            const float * end = mean.data() + std::min(i + half + 1, hi) - lo;
            ((float *) dst->data)[head * a.n_prefix + i] = pooled(begin, end, a.op.pool_max, a.op.pool_kernel);
        }
    }
}

} // namespace

ggml_tensor * headkv_build_score_fused(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * cells,
        int64_t n_prefix, float scale, float softcap, int n_square, headkv_pool pool, int pool_kernel, ggml_tensor * sinks, float max_bias) {
    const int64_t n_embd_head = q->ne[0];
    const int64_t n_head_kv = k->ne[0] / n_embd_head;
    const int64_t n_kv = cells->ne[0];
    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && k->ne[0] % n_embd_head == 0 && q->ne[1] % n_head_kv == 0);
    GGML_ASSERT(cells->type == GGML_TYPE_I32 && ggml_is_contiguous(cells) && n_kv >= q->ne[2] && n_kv >= n_prefix && pool_kernel % 2 == 1 && pool_kernel < 64);
    GGML_ASSERT(!sinks || (sinks->type == GGML_TYPE_F32 && ggml_nelements(sinks) == q->ne[1] && ggml_is_contiguous(sinks)));

    headkv_op op;
    op.kind = HEADKV_OP_STATS;
    op.scale = scale;
    op.softcap = softcap;
    op.max_bias = max_bias;
    op.n_square = n_square;
    op.pool_max = pool == HEADKV_POOL_MAX;
    op.pool_kernel = pool_kernel;

    // a view of the sinks, because an op is run where its weights are
    ggml_tensor * args[] = { q, k, cells, nullptr, sinks ? ggml_view_1d(ctx, sinks, q->ne[1], 0) : nullptr };
    const int64_t n_chunk = (n_kv + HEADKV_SCORE_CHUNK - 1) / HEADKV_SCORE_CHUNK;
    args[3] = ggml_custom_4d(ctx, GGML_TYPE_F32, 2, q->ne[1] / n_head_kv * q->ne[2], n_chunk, n_head_kv, args, 3, stats_op, GGML_N_TASKS_MAX, nullptr);
    headkv_op_set(args[3], op);

    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, n_prefix, n_head_kv, 1, 1, args, 5, score_op, GGML_N_TASKS_MAX, nullptr);
    op.kind = HEADKV_OP_SCORE;
    headkv_op_set(res, op);
    return res;
}

ggml_tensor * headkv_build_output_norm(ggml_context * ctx, ggml_tensor * v, ggml_tensor * wo, int64_t n_group) {
    ggml_tensor * out = ggml_mul_mat(ctx, wo, v); // [n_embd*n_group, n]
    return ggml_scale(ctx, ggml_sum_rows(ctx, ggml_abs_inplace(ctx, out)), 1.0f / n_group);
}

ggml_tensor * headkv_build_value_norm(ggml_context * ctx, ggml_tensor * v) {
    return ggml_sqrt(ctx, ggml_sum_rows(ctx, ggml_sqr_inplace(ctx, v)));
}

ggml_tensor * headkv_build_output_matrix(ggml_context * ctx, ggml_tensor * wo, ggml_tensor * wo_s, ggml_tensor * columns, int64_t n_embd_head_v) {
    // a product, because repacked weights can be read in no other way
    ggml_tensor * res = ggml_mul_mat(ctx, wo, columns); // [n_embd, n_embd_head_v*n_group]
    if (wo_s) {
        res = ggml_mul(ctx, res, wo_s);
    }
    const int64_t n_embd = res->ne[0];
    const int64_t n_group = res->ne[1] / n_embd_head_v;
    res = ggml_permute(ctx, ggml_reshape_3d(ctx, res, n_embd, n_embd_head_v, n_group), 1, 0, 2, 3);
    return ggml_cont_2d(ctx, res, n_embd_head_v, n_embd * n_group);
}
