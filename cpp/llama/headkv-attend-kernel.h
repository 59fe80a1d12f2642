// The vectorised attend kernel, included once per instruction set (see headkv-simd.h).
//
// Rows are taken in blocks that stay in the L1 cache. A row of K (V) is converted once for the whole GQA group;
// the group's accumulators stay in registers.
#pragma once

#include "headkv-attend.h"
#include "headkv-simd.h"

#include <algorithm>
#include <cmath>

#ifdef HEADKV_SIMD

namespace {

constexpr int N_BLOCK = 64; // rows

// largest power of two n <= limit such that n*G accumulators, n shared operands and two more fit into the registers
constexpr int fit_registers(int G, int limit) {
    int n = 1;
    while (2 * n <= limit && 2 * n * (G + 1) + 2 <= N_REG) {
        n *= 2;
    }
    return n;
}

// s[g*N_BLOCK + r] = q_g . k_r for R rows
template <int G, int R, class K>
inline void scores(const headkv_attend_args & a, const float * q, const char * k, float * s) {
    constexpr int N_SUM = (R * G + 3) / 4 * 4; // summed four at a time
    vf acc[N_SUM];
    for (int i = 0; i < N_SUM; ++i) {
        acc[i] = vf_zero();
    }
    for (int d = 0; d < a.n_embd_head_k; d += W) {
        vf kr[R];
        for (int r = 0; r < R; ++r) {
            kr[r] = K::load(k + r * a.nb_k, d);
        }
        for (int g = 0; g < G; ++g) {
            const vf qg = vf_load(q + g * a.nq + d);
            for (int r = 0; r < R; ++r) {
                acc[g * R + r] = vf_fma(kr[r], qg, acc[g * R + r]);
            }
        }
    }
    float sum[N_SUM];
    for (int i = 0; i < N_SUM; i += 4) {
        vf_sum4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], sum + i);
    }
    for (int g = 0; g < G; ++g) {
        for (int r = 0; r < R; ++r) {
            s[g * N_BLOCK + r] = sum[g * R + r];
        }
    }
}

// acc_g += sum_r p[g*N_BLOCK + r]*v_r, N vectors of columns at a time; n_bytes of each row of K behind next are fetched meanwhile
template <int G, int N, class V>
inline void accumulate(const headkv_attend_args & a, const float * p, const char * v, int n, int d0, float * acc, const char * next, size_t n_bytes) {
    vf t[G * N];
    for (int g = 0; g < G; ++g) {
        for (int i = 0; i < N; ++i) {
            t[g * N + i] = vf_load(acc + g * a.n_embd_head_v + d0 + i * W);
        }
    }
    for (int r = 0; r < n; ++r) {
        vf_prefetch(next + r * a.nb_k, n_bytes);
        vf vr[N];
        for (int i = 0; i < N; ++i) {
            vr[i] = V::load(v + r * a.nb_v, d0 + i * W);
        }
        for (int g = 0; g < G; ++g) {
            const vf pg = vf_set(p[g * N_BLOCK + r]);
            for (int i = 0; i < N; ++i) {
                t[g * N + i] = vf_fma(vr[i], pg, t[g * N + i]);
            }
        }
    }
    for (int g = 0; g < G; ++g) {
        for (int i = 0; i < N; ++i) {
            vf_store(acc + g * a.n_embd_head_v + d0 + i * W, t[g * N + i]);
        }
    }
}

// G heads of the group, starting at the given ones
template <int G, class K, class V>
void attend_group(const headkv_attend_args & a, const float * q, const float * slopes, float * acc, float * m, float * s) {
    constexpr int R = fit_registers(G, 8); // rows of K at a time
    constexpr int N = fit_registers(G, 4); // vectors of V at a time

    for (int i = 0; i < G * a.n_embd_head_v; ++i) {
        acc[i] = 0.0f;
    }
    for (int g = 0; g < G; ++g) {
        m[g] = -INFINITY;
        s[g] = 0.0f;
    }
    alignas(64) float p[G * N_BLOCK];
    const size_t n_bytes_k = ggml_row_size(a.type_k, a.n_embd_head_k);
    const size_t n_bytes_v = ggml_row_size(a.type_v, a.n_embd_head_v);

    for (int r0 = 0; r0 < a.n_rows; r0 += N_BLOCK) {
        const int n = std::min(N_BLOCK, a.n_rows - r0);
        const char * k = a.k + r0 * a.nb_k;
        const char * v = a.v + r0 * a.nb_v;

        int r = 0;
        for (; r + R <= n; r += R) {
            for (int i = 0; i < R; ++i) {
                vf_prefetch(v + (r + i) * a.nb_v, n_bytes_v);
            }
            scores<G, R, K>(a, q, k + r * a.nb_k, p + r);
        }
        for (; r < n; ++r) {
            scores<G, 1, K>(a, q, k + r * a.nb_k, p + r);
        }

        const int n_pad = (n + W - 1) / W * W;
        for (int g = 0; g < G; ++g) {
            float * pg = p + g * N_BLOCK;
            for (int i = 0; i < n; ++i) {
                pg[i] = a.softcap > 0.0f ? a.softcap * std::tanh(pg[i] * a.scale / a.softcap) : pg[i] * a.scale;
            }
            for (int i = 0; i < n && a.pos; ++i) {
                pg[i] += slopes[g] * a.pos[r0 + i];
            }
            for (int i = n; i < n_pad; ++i) {
                pg[i] = -INFINITY;
            }
            vf mv = vf_load(pg);
            for (int i = W; i < n_pad; i += W) {
                mv = vf_max(mv, vf_load(pg + i));
            }
            const float mb = vf_hmax(mv);
            if (mb > m[g]) {
                const float f = std::exp(m[g] - mb);
                m[g] = mb;
                s[g] *= f;
                for (int d = 0; d < a.n_embd_head_v; ++d) {
                    acc[g * a.n_embd_head_v + d] *= f;
                }
            }
            vf sv = vf_zero();
            for (int i = 0; i < n_pad; i += W) {
                const vf e = vf_exp(vf_sub(vf_load(pg + i), vf_set(m[g])));
                vf_store(pg + i, e);
                sv = vf_add(sv, e);
            }
            s[g] += vf_sum(sv);
        }

        const char * next = k + N_BLOCK * a.nb_k;
        size_t n_fetch = r0 + N_BLOCK < a.n_rows ? n_bytes_k : 0;
        int d = 0;
        for (; d + N * W <= a.n_embd_head_v; d += N * W) {
            accumulate<G, N, V>(a, p, v, n, d, acc, next, n_fetch);
            n_fetch = 0;
        }
        for (; d < a.n_embd_head_v; d += W) {
            accumulate<G, 1, V>(a, p, v, n, d, acc, next, n_fetch);
            n_fetch = 0;
        }
    }
}

template <class K, class V>
void attend(const headkv_attend_args & a, float * acc, float * m, float * s) {
    for (int g = 0; g < a.n_group;) {
        const float * q = a.q + g * a.nq;
        const float * sl = a.slopes + (a.pos ? g : 0);
        float * acc_g = acc + g * a.n_embd_head_v;
        const int n = std::min(8, a.n_group - g);
        switch (n) {
            case 1: attend_group<1, K, V>(a, q, sl, acc_g, m + g, s + g); break;
            case 2: attend_group<2, K, V>(a, q, sl, acc_g, m + g, s + g); break;
            case 3: attend_group<3, K, V>(a, q, sl, acc_g, m + g, s + g); break;
            case 4: attend_group<4, K, V>(a, q, sl, acc_g, m + g, s + g); break;
            case 5: attend_group<5, K, V>(a, q, sl, acc_g, m + g, s + g); break;
            case 6: attend_group<6, K, V>(a, q, sl, acc_g, m + g, s + g); break;
            case 7: attend_group<7, K, V>(a, q, sl, acc_g, m + g, s + g); break;
            case 8: attend_group<8, K, V>(a, q, sl, acc_g, m + g, s + g); break;
        }
        g += n;
    }
}

inline headkv_attend_kernel find_kernel(ggml_type type_k, ggml_type type_v, int n_embd_head_k, int n_embd_head_v) {
    if (n_embd_head_k % W != 0 || n_embd_head_v % W != 0 || type_k != type_v) {
        return nullptr;
    }
    switch (type_k) {
        case GGML_TYPE_F32: return attend<row_f32, row_f32>;
        case GGML_TYPE_F16: return attend<row_f16, row_f16>;
        case GGML_TYPE_BF16: return attend<row_bf16, row_bf16>;
        case GGML_TYPE_Q8_0: return n_embd_head_k % 32 == 0 && n_embd_head_v % 32 == 0 ? attend<row_q8_0, row_q8_0> : nullptr;
        default: return nullptr;
    }
}

} // namespace

#endif
