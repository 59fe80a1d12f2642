// Stage 4, score, see headkv-stages.h: two passes over the keys, of which the first leaves the largest logit and the sum of
// exponentials of each chunk behind, the second the pooled scores.
#pragma once

#include "headkv-device.cuh"
#include "headkv-op.h"

namespace headkv {

constexpr int N_SCORE_QUERIES = 8; // at a time

struct score_params {
    const float * q;
    const char * k;
    const int32_t * cells;
    const float * sinks; // or null
    float * stats;   // [head][chunk][query][2]
    float * totals;  // [head][query][2]: largest logit of all keys, 1/sum of exponentials
    float * dst;     // [head][n_prefix]
    size_t nq1, nq2; // floats from head to head, token to token
    size_t nb_k;     // bytes from cell to cell
    size_t nb_head;  // from head to head
    int n_head_kv;
    int n_group;
    int n_window;
    int n_kv;
    int n_prefix;
    int n_chunk;
    int n_square;
    bool pool_max;
    int pool_kernel;
    float scale;
    float softcap;
};

// queries j0 to j0 + N_SCORE_QUERIES - 1 of a head, (token, head of the group); those that do not exist are zero
template <int D>
static __device__ __forceinline__ void load_queries(const score_params & a, int head, int j0, float * q) {
    for (int i = threadIdx.x; i < N_SCORE_QUERIES * D; i += N_THREADS) {
        const int j = j0 + i / D;
        q[i] = j < a.n_window * a.n_group ? a.q[j / a.n_group * a.nq2 + (head * a.n_group + j % a.n_group) * a.nq1 + i % D] : 0.0f;
    }
}

// one block per (chunk, head)
template <int D, class Row>
static __global__ void __launch_bounds__(N_THREADS) score_stats(const score_params a) {
    constexpr int NQ = N_SCORE_QUERIES;

    alignas(16) __shared__ float q[NQ * D];
    alignas(16) __shared__ float p[N_TILE * NQ];

    const int head = blockIdx.y;
    const int first = blockIdx.x * HEADKV_SCORE_CHUNK;
    const int last = min(first + HEADKV_SCORE_CHUNK, a.n_kv);
    const int n_query = a.n_window * a.n_group;
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;

    for (int j0 = 0; j0 < n_query; j0 += NQ) {
        load_queries<D>(a, head, j0, q); // the last ones were read before a barrier
        float m[NQ / N_WARPS]; // of queries warp, warp + N_WARPS, ..
        float s[NQ / N_WARPS];
#pragma unroll
        for (int i = 0; i < NQ / N_WARPS; ++i) {
            m[i] = -INFINITY;
            s[i] = 0.0f;
        }
        for (int r0 = first; r0 < last; r0 += N_TILE) {
            const int n = min(N_TILE, last - r0);
            __syncthreads();
            tile_dots<D, NQ, Row>(q, a.k + head * a.nb_head, a.nb_k, a.cells + r0, n, p);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < NQ / N_WARPS; ++i) {
                const int j = warp + i * N_WARPS;
                const int visible = a.n_kv - a.n_window + (j0 + j) / a.n_group + 1 - r0; // rows from r0 on
                float mt = m[i];
                for (int r = lane; r < n; r += 32) {
                    mt = r < visible ? fmaxf(mt, logit(p[r * NQ + j], a.scale, a.softcap)) : mt;
                }
                mt = warp_max(mt);
                float st = 0.0f;
                for (int r = lane; r < n; r += 32) {
                    st += r < visible ? expf(logit(p[r * NQ + j], a.scale, a.softcap) - mt) : 0.0f;
                }
                st = warp_sum(st);
                s[i] = st + (m[i] > -INFINITY ? s[i] * expf(m[i] - mt) : 0.0f);
                m[i] = mt;
            }
        }
#pragma unroll
        for (int i = 0; i < NQ / N_WARPS; ++i) {
            const int j = j0 + warp + i * N_WARPS;
            if (lane == 0 && j < n_query) {
                float * out = a.stats + (((size_t) head * a.n_chunk + blockIdx.x) * n_query + j) * 2;
                out[0] = m[i];
                out[1] = s[i];
            }
        }
    }
}

// one warp per (query, head), chunks in order
static __global__ void __launch_bounds__(32) score_totals(const score_params a) {
    const int n_query = a.n_window * a.n_group;
    const float * stats = a.stats + ((size_t) blockIdx.y * a.n_chunk * n_query + blockIdx.x) * 2;

    float m = -INFINITY;
    for (int c = threadIdx.x; c < a.n_chunk; c += 32) {
        m = fmaxf(m, stats[(size_t) c * n_query * 2]);
    }
    m = warp_max(m);
    float s = 0.0f;
    for (int c = threadIdx.x; c < a.n_chunk; c += 32) {
        const float mc = stats[(size_t) c * n_query * 2];
        s += mc > -INFINITY ? stats[(size_t) c * n_query * 2 + 1] * expf(mc - m) : 0.0f;
    }
    s = warp_sum(s);
    if (threadIdx.x == 0) {
        float * out = a.totals + ((size_t) blockIdx.y * n_query + blockIdx.x) * 2;
        out[0] = m;
        out[1] = 1.0f / with_sink(s, m, a.sinks, blockIdx.y * a.n_group + blockIdx.x % a.n_group);
    }
}

// One block per (tile of keys, head). Tiles overlap by the neighbours that pooling takes.
template <int D, class Row>
static __global__ void __launch_bounds__(N_THREADS) score_pooled(const score_params a) {
    static_assert(N_TILE == N_THREADS, "a thread owns a key");
    constexpr int NQ = N_SCORE_QUERIES;

    alignas(16) __shared__ float q[NQ * D];
    alignas(16) __shared__ float p[N_TILE * NQ];
    __shared__ float mean[N_TILE];

    const int head = blockIdx.y;
    const int n_prefix = a.n_prefix;
    const int n_query = a.n_window * a.n_group;
    const int half = a.pool_kernel / 2;
    const int first = blockIdx.x * (N_TILE - 2 * half); // of the scores
    const int r0 = max(first - half, 0);         // of the keys
    const int n = min(r0 + N_TILE, n_prefix) - r0;
    const int r = threadIdx.x;

    float sum = 0.0f;
    for (int j0 = 0; j0 < n_query; j0 += NQ) {
        load_queries<D>(a, head, j0, q); // the last ones were read before a barrier
        __syncthreads();
        tile_dots<D, NQ, Row>(q, a.k + head * a.nb_head, a.nb_k, a.cells + r0, n, p);
        __syncthreads();
        if (r < n) {
            const float * totals = a.totals + ((size_t) head * n_query + j0) * 2;
            for (int j = 0; j < min(NQ, n_query - j0); ++j) {
                const int visible = a.n_kv - a.n_window + (j0 + j) / a.n_group + 1 - r0;
                float x = r < visible ? expf(logit(p[r * NQ + j], a.scale, a.softcap) - totals[2 * j]) * totals[2 * j + 1] : 0.0f;
                for (int i = 0; i < a.n_square; ++i) {
                    x *= x;
                }
                sum += x;
            }
        }
    }
    sum /= n_query;
    for (int i = 0; i < a.n_square; ++i) {
        sum = sqrtf(sum);
    }
    mean[r] = sum;
    __syncthreads();

    const int i = first + r; // position
    if (r >= N_TILE - 2 * half || i >= n_prefix) {
        return;
    }
    // max leaves out the neighbours that do not exist, avg counts them as zero
    float res = a.pool_max ? -INFINITY : 0.0f;
    for (int o = max(i - half, 0); o <= min(i + half, n_prefix - 1); ++o) {
        const float x = mean[o - r0];
        res = a.pool_max ? fmaxf(res, x) : res + x;
    }
    a.dst[(size_t) head * n_prefix + i] = a.pool_max ? res : res / a.pool_kernel;
}

//
// host; tensors of the ops: q, k, cells, and for the second one stats and sinks
//

inline bool score_supports(const ggml_tensor * op) {
    const ggml_tensor * q = op->src[0];
    const ggml_tensor * k = op->src[1];

    const int64_t D = q->ne[0];
    if (D != 64 && D != 80 && D != 96 && D != 128 && D != 256) {
        return false;
    }
    if (k->type == GGML_TYPE_F16 || k->type == GGML_TYPE_BF16) {
        return k->nb[1] % 16 == 0 && k->view_offs % 16 == 0;
    }
    return k->type == GGML_TYPE_Q8_0 && D % 32 == 0;
}

// bytes
inline size_t score_scratch(const ggml_tensor * op) {
    return (size_t) 2 * op->src[0]->ne[1] * op->src[0]->ne[2] * sizeof(float);
}

template <int D, class Row, class Stream>
void score_run(const score_params & a, bool pooled, Stream stream) {
    const dim3 block(N_THREADS, 1, 1);
    if (!pooled) {
        HEADKV_LAUNCH((score_stats<D, Row>), dim3(a.n_chunk, a.n_head_kv, 1), block, stream, a);
        return;
    }
    const int n_step = N_TILE - 2 * (a.pool_kernel / 2);
    HEADKV_LAUNCH((score_totals), dim3(a.n_window * a.n_group, a.n_head_kv, 1), dim3(32, 1, 1), stream, a);
    HEADKV_LAUNCH((score_pooled<D, Row>), dim3((a.n_prefix + n_step - 1) / n_step, a.n_head_kv, 1), block, stream, a);
}

template <class Stream>
void score_run(ggml_tensor * dst, float * scratch, Stream stream) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * cells = dst->src[2];
    const ggml_tensor * stats = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];

    const headkv_op op = headkv_op_get(dst);
    const bool pooled = op.kind == HEADKV_OP_SCORE;
    const int D = (int) q->ne[0];

    score_params a;
    a.q = (const float *) q->data;
    a.k = (const char *) k->data;
    a.cells = (const int32_t *) cells->data;
    a.sinks = sinks ? (const float *) sinks->data : nullptr;
    a.stats = (float *) (pooled ? stats->data : dst->data);
    a.totals = scratch;
    a.dst = (float *) dst->data;
    a.nq1 = q->nb[1] / sizeof(float);
    a.nq2 = q->nb[2] / sizeof(float);
    a.nb_k = k->nb[1];
    a.nb_head = ggml_row_size(k->type, D);
    a.n_head_kv = (int) (k->ne[0] / D);
    a.n_group = (int) q->ne[1] / a.n_head_kv;
    a.n_window = (int) q->ne[2];
    a.n_kv = (int) cells->ne[0];
    a.n_prefix = pooled ? (int) dst->ne[0] : 0;
    a.n_square = op.n_square;
    a.n_chunk = (a.n_kv + HEADKV_SCORE_CHUNK - 1) / HEADKV_SCORE_CHUNK;
    a.pool_max = op.pool_max != 0;
    a.pool_kernel = op.pool_kernel;
    a.scale = op.scale;
    a.softcap = op.softcap;

    with_shape(k->type, D, [&](auto shape) {
        score_run<decltype(shape)::D, typename decltype(shape)::Row>(a, pooled, stream);
    });
}

} // namespace headkv
