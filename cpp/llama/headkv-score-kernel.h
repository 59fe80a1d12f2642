// The inner loops of the fused score, included once per instruction set (see headkv-simd.h).
#pragma once

#include "headkv-score.h"
#include "headkv-simd.h"

#include <cmath>

namespace {

constexpr int N_KEYS = headkv_score_kernel::N_KEYS;

#ifdef HEADKV_SIMD

template <class K>
void key_to_column(const char * key, float * dst, int n) {
    float x[W];
    for (int d = 0; d < n; d += W) {
        vf_store(x, K::load(key, d));
        for (int i = 0; i < W; ++i) {
            dst[(d + i) * N_KEYS] = x[i];
        }
    }
}

headkv_score_kernel::to_column find_to_column(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32: return key_to_column<row_f32>;
        case GGML_TYPE_F16: return key_to_column<row_f16>;
        case GGML_TYPE_BF16: return key_to_column<row_bf16>;
        case GGML_TYPE_Q8_0: return key_to_column<row_q8_0>;
        default: return nullptr;
    }
}

#else

headkv_score_kernel::to_column find_to_column(ggml_type) {
    return nullptr;
}

#endif

// R vectors of keys at a time against N_QUERIES queries: the accumulators stay in registers
void score_logits(const float * q, int n_query, const float * keys, int n_embd_head, float * x) {
    constexpr int Q = headkv_score_kernel::N_QUERIES;
    constexpr int R = 2;
    for (int j = 0; j < n_query; j += Q) {
        for (int i = 0; i < N_KEYS; i += R * W) {
            vf acc[Q * R];
            for (int a = 0; a < Q * R; ++a) {
                acc[a] = vf_zero();
            }
            for (int d = 0; d < n_embd_head; ++d) {
                vf k[R];
                for (int r = 0; r < R; ++r) {
                    k[r] = vf_load(keys + d * N_KEYS + i + r * W);
                }
                for (int a = 0; a < Q; ++a) {
                    const vf qa = vf_set(q[(j + a) * n_embd_head + d]);
                    for (int r = 0; r < R; ++r) {
                        acc[a * R + r] = vf_fma(k[r], qa, acc[a * R + r]);
                    }
                }
            }
            for (int a = 0; a < Q; ++a) {
                for (int r = 0; r < R; ++r) {
                    vf_store(x + (j + a) * N_KEYS + i + r * W, acc[a * R + r]);
                }
            }
        }
    }
}

void score_add_stats(const float * x, float * m, float * s) {
    vf mv = vf_load(x);
    for (int i = W; i < N_KEYS; i += W) {
        mv = vf_max(mv, vf_load(x + i));
    }
    const float mb = vf_hmax(mv);
    if (mb == -INFINITY) {
        return;
    }
    if (mb > *m) {
        *s *= std::exp(*m - mb);
        *m = mb;
    }
    vf sv = vf_zero();
    for (int i = 0; i < N_KEYS; i += W) {
        sv = vf_add(sv, vf_exp(vf_sub(vf_load(x + i), vf_set(*m))));
    }
    *s += vf_sum(sv);
}

void score_add_probs(const float * x, float m, float f, int n_square, float * sum) {
    for (int i = 0; i < N_KEYS; i += W) {
        vf p = vf_mul(vf_exp(vf_sub(vf_load(x + i), vf_set(m))), vf_set(f));
        for (int j = 0; j < n_square; ++j) {
            p = vf_mul(p, p);
        }
        vf_store(sum + i, vf_add(vf_load(sum + i), p));
    }
}

const headkv_score_kernel score_kernel = { find_to_column, score_logits, score_add_stats, score_add_probs };

} // namespace
