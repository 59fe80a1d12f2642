// Attention of many queries over the cells of one KV head, included once per instruction set (see headkv-simd.h).
//
// Lanes are queries. A block of cells is converted to F32 once for all queries of the call; queries are transposed once, so
// that K and V need not be, and the softmax of a query never leaves its lane. A panel of queries goes over a block of cells with
// scores S = K Q, running maxima and sums, and answers O += V S, all in registers but for S.
#pragma once

#include "headkv-attend-prompt.h"
#include "headkv-op.h"
#include "headkv-simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace {

constexpr int N_PROMPT_CELLS = 96; // of a block; maxima change between blocks, which begin at multiples of it
constexpr int N_PROMPT_TILE = 6;   // cells (of K) or columns (of V) whose accumulators are in registers
constexpr int N_PROMPT_VEC = N_REG == 32 ? 4 : 2; // vectors of queries, same
constexpr int N_PROMPT_PANEL = N_PROMPT_VEC * W;
constexpr float PROMPT_LOWEST = -1e30f; // below every score, and no NaN when it is taken from itself
constexpr float LOG2_E = 1.44269504088896f;

static_assert(N_PROMPT_CELLS % N_PROMPT_TILE == 0, "a block is made of tiles");

// 2^x for x <= 0, relative error 1e-7; anything below -126 counts as -126
inline vf prompt_exp2(vf x) {
    x = vf_max(vf_set(-126.0f), x);
    const vf n = vf_round(x);
    const vf r = vf_sub(x, n);
    // least relative error on [-1/2, 1/2]: 2e-9
    vf p = vf_set(0.0001534581242594868f);
    p = vf_fma(p, r, vf_set(0.0013399930903688073f));
    p = vf_fma(p, r, vf_set(0.009618489071726799f));
    p = vf_fma(p, r, vf_set(0.05550328642129898f));
    p = vf_fma(p, r, vf_set(0.24022646248340607f));
    p = vf_fma(p, r, vf_set(0.6931471824645996f));
    p = vf_fma(p, r, vf_set(1.0f));
    return vf_mul(p, vf_exp2i(n));
}

// dst[i][l] = sum_j a(i, j)*b[j][l] for I values of i and NV vectors of l, j in order; KEEP: and factor[l] times what is there
template <int I, int NV, bool KEEP>
inline void prompt_tile(const float * a, int64_t a_i, int64_t a_j, const float * b, int n, float * dst, const vf * factor) {
    vf acc[I * NV];
    for (int i = 0; i < I * NV; ++i) {
        acc[i] = vf_zero();
    }
    for (int j = 0; j < n; ++j) {
        vf bj[NV];
        for (int v = 0; v < NV; ++v) {
            bj[v] = vf_load(b + j * N_PROMPT_PANEL + v * W);
        }
        for (int i = 0; i < I; ++i) {
            const vf ai = vf_set(a[i * a_i + j * a_j]);
            for (int v = 0; v < NV; ++v) {
                acc[i * NV + v] = vf_fma(ai, bj[v], acc[i * NV + v]);
            }
        }
    }
    for (int i = 0; i < I; ++i) {
        for (int v = 0; v < NV; ++v) {
            float * d = dst + i * N_PROMPT_PANEL + v * W;
            vf_store(d, KEEP ? vf_fma(vf_load(d), factor[v], acc[i * NV + v]) : acc[i * NV + v]);
        }
    }
}

// what a panel of queries has seen so far, and what it is still to see
struct prompt_panel {
    float max[N_PROMPT_PANEL];
    float sum[N_PROMPT_PANEL];
    float first[N_PROMPT_PANEL]; // cells it sees
    float end[N_PROMPT_PANEL];
    int min_first, max_first, min_end, max_end;
};

// S of n cells, of which the first one is number i0, to probabilities by the maximum so far; scale: of S, which makes it an
// exponent of 2; factor: of what was summed before
template <int NV>
inline void prompt_softmax(prompt_panel & p, float * s, int i0, int n, float scale, vf * factor) {
    const vf c = vf_set(scale);
    const bool some_hidden = i0 < p.max_first || i0 + n > p.min_end;
    const vf lowest = vf_set(PROMPT_LOWEST);
    for (int v = 0; v < NV; ++v) {
        const vf first = vf_load(p.first + v * W);
        const vf end = vf_load(p.end + v * W);
        float * sv = s + v * W;
        vf m = vf_load(p.max + v * W);
        const vf shift_before = vf_mul(m, c);
        for (int i = 0; i < n; ++i) {
            vf x = vf_load(sv + i * N_PROMPT_PANEL);
            if (some_hidden) {
                const vf number = vf_set((float) (i0 + i));
                x = vf_if_less(number, first, lowest, vf_if_less(number, end, x, lowest));
                vf_store(sv + i * N_PROMPT_PANEL, x);
            }
            m = vf_max(m, x);
        }
        const vf shift = vf_mul(m, c);
        factor[v] = prompt_exp2(vf_sub(shift_before, shift));
        vf sum = vf_zero();
        for (int i = 0; i < n; ++i) {
            const vf x = vf_load(sv + i * N_PROMPT_PANEL);
            vf e = prompt_exp2(vf_fma(x, c, vf_sub(vf_zero(), shift)));
            if (some_hidden) {
                e = vf_if_less(x, vf_set(0.5f * PROMPT_LOWEST), vf_zero(), e); // NaN stays
            }
            vf_store(sv + i * N_PROMPT_PANEL, e);
            sum = vf_add(sum, e);
        }
        vf_store(p.max + v * W, m);
        vf_store(p.sum + v * W, vf_fma(vf_load(p.sum + v * W), factor[v], sum));
    }
}

template <int NV>
inline void prompt_answers(const float * v, int n_embd, const float * s, int n, float * o, const vf * factor) {
    int d = 0;
    for (; d + N_PROMPT_TILE <= n_embd; d += N_PROMPT_TILE) {
        prompt_tile<N_PROMPT_TILE, NV, true>(v + d, 1, n_embd, s, n, o + d * N_PROMPT_PANEL, factor);
    }
    for (; d + 2 <= n_embd; d += 2) {
        prompt_tile<2, NV, true>(v + d, 1, n_embd, s, n, o + d * N_PROMPT_PANEL, factor);
    }
    for (; d < n_embd; ++d) {
        prompt_tile<1, NV, true>(v + d, 1, n_embd, s, n, o + d * N_PROMPT_PANEL, factor);
    }
}

struct prompt_block {
    const float * k; // F32 [n][n_embd_head_k], rounded up to whole tiles
    const float * v; // F32 [n][n_embd_head_v]
    int i0;
    int n;
};

// S of n cells and a panel; what makes it an exponent of 2
template <int NV>
inline float prompt_scores(const headkv_prompt_args & a, const prompt_block & block, int n, const float * q, float * s) {
    for (int i = 0; i < n; i += N_PROMPT_TILE) {
        prompt_tile<N_PROMPT_TILE, NV, false>(block.k + (int64_t) i * a.n_embd_head_k, a.n_embd_head_k, 1, q, a.n_embd_head_k, s + i * N_PROMPT_PANEL, nullptr);
    }
    float scale = a.scale;
    if (a.softcap > 0.0f) {
        for (int i = 0; i < n; ++i) {
            for (int l = 0; l < NV * W; ++l) {
                float & x = s[i * N_PROMPT_PANEL + l];
                x = std::tanh(x * (a.scale / a.softcap));
            }
        }
        scale = a.softcap;
    }
    return scale * LOG2_E;
}

// one panel over one block; NV vectors of queries are in use
template <int NV>
void prompt_step(const headkv_prompt_args & a, const prompt_block & block, prompt_panel & p, const float * q, float * s, float * o) {
    const int n = std::min(block.n, p.max_end - block.i0);
    const float scale = prompt_scores<NV>(a, block, n, q, s);
    vf factor[NV];
    prompt_softmax<NV>(p, s, block.i0, n, scale, factor);
    prompt_answers<NV>(block.v, a.n_embd_head_v, s, n, o, factor);
}

// once more, when the sum of a query is a factor: the attention that each cell gets, in whole numbers, which add up to the same in any order
template <int NV>
void prompt_step_sums(const headkv_prompt_args & a, const prompt_block & block, const prompt_panel & p, const float * q, float * s) {
    const int n = std::min(block.n, p.max_end - block.i0);
    const vf c = vf_set(prompt_scores<NV>(a, block, n, q, s));
    const vf most = vf_set(2.0f * HEADKV_PROMPT_ONE);
    for (int v = 0; v < NV; ++v) {
        const vf first = vf_load(p.first + v * W);
        const vf end = vf_load(p.end + v * W);
        const vf shift = vf_mul(vf_load(p.max + v * W), c);
        const vf factor = vf_load(p.sum + v * W);
        for (int i = 0; i < n; ++i) {
            float * si = s + i * N_PROMPT_PANEL + v * W;
            const vf number = vf_set((float) (block.i0 + i));
            vf e = vf_mul(prompt_exp2(vf_fma(vf_load(si), c, vf_sub(vf_zero(), shift))), factor);
            e = vf_if_less(e, most, e, vf_zero()); // no NaN
            vf_store(si, vf_round(vf_if_less(number, first, vf_zero(), vf_if_less(number, end, e, vf_zero()))));
        }
    }
    for (int i = 0; i < n; ++i) {
        int64_t sum = 0;
        for (int l = 0; l < NV * W; ++l) {
            sum += (int32_t) s[i * N_PROMPT_PANEL + l];
        }
        a.sums[block.i0 + i] += sum;
    }
}

// f(number of vectors that n_lanes queries take)
template <typename F>
inline void prompt_with_lanes(int n_lanes, const F & f) {
    if (n_lanes <= W) {
        f(std::integral_constant<int, 1>());
    } else if (n_lanes <= 2 * W) {
        f(std::integral_constant<int, 2>());
    } else {
        f(std::integral_constant<int, N_PROMPT_VEC>());
    }
}

// cells to rows of F32
inline void prompt_convert(const char * data, size_t nb, const int32_t * cells, int n, ggml_type type, int n_embd, float * dst) {
    for (int i = 0; i < n; ++i, dst += n_embd) {
        const char * row = data + (size_t) cells[i] * nb;
        int d = 0;
#ifdef HEADKV_SIMD
        const int n_vec = n_embd - n_embd % W;
        if (type == GGML_TYPE_F16) {
            for (; d < n_vec; d += W) {
                vf_store(dst + d, row_f16::load(row, d));
            }
        } else if (type == GGML_TYPE_BF16) {
            for (; d < n_vec; d += W) {
                vf_store(dst + d, row_bf16::load(row, d));
            }
        } else if (type == GGML_TYPE_Q8_0) {
            for (; d < n_vec; d += W) {
                vf_store(dst + d, row_q8_0::load(row, d));
            }
        }
#endif
        if (d < n_embd) {
            headkv_to_floats(type, row + ggml_row_size(type, d), dst + d, n_embd - d);
        }
    }
}

inline int64_t prompt_n_panels(const headkv_prompt_args & a) {
    return ((int64_t) a.n_tokens * a.n_group + N_PROMPT_PANEL - 1) / N_PROMPT_PANEL;
}

// floats of each part of the work space, in order
struct prompt_work {
    size_t q, o, k, v, s, panels;

    explicit prompt_work(const headkv_prompt_args & a) :
        q(prompt_n_panels(a) * a.n_embd_head_k * N_PROMPT_PANEL), o(prompt_n_panels(a) * a.n_embd_head_v * N_PROMPT_PANEL),
        k((size_t) N_PROMPT_CELLS * a.n_embd_head_k), v((size_t) N_PROMPT_CELLS * a.n_embd_head_v), s((size_t) N_PROMPT_CELLS * N_PROMPT_PANEL),
        panels(prompt_n_panels(a) * sizeof(prompt_panel) / sizeof(float)) {}
};

size_t prompt_n_work(const headkv_prompt_args & a) {
    const prompt_work w(a);
    return w.q + w.o + w.k + w.v + w.s + w.panels;
}

void prompt_run(const headkv_prompt_args & a, float * work) {
    const prompt_work w(a);
    float * q = work;
    float * o = q + w.q;
    float * k = o + w.o;
    float * v = k + w.k;
    float * s = v + w.v;
    auto * panels = (prompt_panel *) (s + w.s);

    const int n_rows = a.n_tokens * a.n_group;
    const int n_panels = (int) prompt_n_panels(a);

    // queries to columns; lanes without one see nothing
    memset(q, 0, w.q * sizeof(float));
    memset(o, 0, w.o * sizeof(float));
    memset(k, 0, w.k * sizeof(float)); // what stands behind the last cell is multiplied and not used
    int first = INT32_MAX, end = 0;
    for (int i = 0; i < n_panels; ++i) {
        prompt_panel & p = panels[i];
        p.min_first = p.min_end = INT32_MAX;
        p.max_first = p.max_end = 0;
        for (int l = 0; l < N_PROMPT_PANEL; ++l) {
            p.max[l] = PROMPT_LOWEST;
            p.sum[l] = 0.0f;
            p.first[l] = p.end[l] = 0.0f;
            const int r = i * N_PROMPT_PANEL + l;
            if (r >= n_rows) {
                continue;
            }
            const int t = r / a.n_group;
            const float * src = a.q + t * a.nq_token + (r % a.n_group) * a.nq_head;
            for (int d = 0; d < a.n_embd_head_k; ++d) {
                q[((int64_t) i * a.n_embd_head_k + d) * N_PROMPT_PANEL + l] = src[d];
            }
            const int from = a.seen[2 * t], to = a.seen[2 * t + 1];
            p.first[l] = (float) from;
            p.end[l] = (float) to;
            p.min_first = std::min(p.min_first, from);
            p.max_first = std::max(p.max_first, from);
            p.min_end = std::min(p.min_end, to);
            p.max_end = std::max(p.max_end, to);
        }
        first = std::min(first, p.min_first);
        end = std::max(end, p.max_end);
    }

    const auto sweep = [&](bool with_v, const auto & step) { // step(lanes, block, number of a panel that sees some of it)
        for (int i0 = first - first % N_PROMPT_CELLS; i0 < end; i0 += N_PROMPT_CELLS) {
            const int n = std::min(N_PROMPT_CELLS, end - i0);
            prompt_convert(a.k, a.nb_k, a.cells + i0, n, a.type_k, a.n_embd_head_k, k);
            if (with_v) {
                prompt_convert(a.v, a.nb_v, a.cells + i0, n, a.type_v, a.n_embd_head_v, v);
            }
            const prompt_block block = { k, v, i0, n };
            for (int i = 0; i < n_panels; ++i) {
                if (i0 + n > panels[i].min_first && i0 < panels[i].max_end) {
                    prompt_with_lanes(std::min(N_PROMPT_PANEL, n_rows - i * N_PROMPT_PANEL), [&](auto lanes) { step(lanes, block, i); });
                }
            }
        }
    };
    sweep(true, [&](auto lanes, const prompt_block & block, int64_t i) {
        prompt_step<decltype(lanes)::value>(a, block, panels[i], q + i * a.n_embd_head_k * N_PROMPT_PANEL, s, o + i * a.n_embd_head_v * N_PROMPT_PANEL);
    });

    for (int r = 0; r < n_rows; ++r) {
        const int g = r % a.n_group;
        prompt_panel & p = panels[r / N_PROMPT_PANEL];
        const int l = r % N_PROMPT_PANEL;
        const float * src = o + (int64_t) (r / N_PROMPT_PANEL) * a.n_embd_head_v * N_PROMPT_PANEL + l;
        float sum = p.sum[l];
        float f = 1.0f;
        if (a.sinks) {
            const float max = p.max[l] * (a.softcap > 0.0f ? a.softcap : a.scale);
            const float m = std::max(max, a.sinks[g]);
            f = std::exp(max - m);
            sum = sum * f + std::exp(a.sinks[g] - m);
        }
        f = sum > 0.0f || sum != sum ? f / sum : 0.0f;
        float * dst = a.dst + (r / a.n_group) * a.nd_token + (int64_t) g * a.n_embd_head_v;
        for (int d = 0; d < a.n_embd_head_v; ++d) {
            dst[d] = src[d * N_PROMPT_PANEL] * f;
        }
        p.sum[l] = f == f ? f * HEADKV_PROMPT_ONE : 0.0f;
        if (a.sums && f != f) {
            ++a.sums[a.n_cells];
        }
    }
    if (!a.sums) {
        return;
    }
    for (int64_t r = n_rows; r < (int64_t) n_panels * N_PROMPT_PANEL; ++r) {
        panels[r / N_PROMPT_PANEL].sum[r % N_PROMPT_PANEL] = 0.0f;
    }
    sweep(false, [&](auto lanes, const prompt_block & block, int64_t i) {
        prompt_step_sums<decltype(lanes)::value>(a, block, panels[i], q + i * a.n_embd_head_k * N_PROMPT_PANEL, s);
    });
}

const headkv_prompt_kernel prompt_kernel = { prompt_n_work, prompt_run };

} // namespace
