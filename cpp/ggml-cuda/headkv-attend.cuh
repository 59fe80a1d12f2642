// Stage 7, attend, see headkv-attend.h. One block per (chunk of a range, tile of queries), then one pass that combines the
// chunks of a range in order. Which chunk a block has follows from the ranges, which are device data: a captured graph stays
// valid while they grow, because the grid covers all that the pool can hold.
#pragma once

#include "headkv-device.cuh"
#include "headkv-op.h"

#include <algorithm>

namespace headkv {

struct attend_params {
    const float * q;
    const char * k;
    const char * v;
    const int32_t * ranges;
    const float * bias; // or null
    const float * sinks; // same
    float * dst;
    float * partials;     // [chunk][query of a head][D + 2]: sum of exp(s - m)*v, m, sum of exp(s - m)
    size_t nq1, nq2;     // floats from head to head, token to token
    size_t nb_k, nb_v;   // bytes from row to row
    int n_head_kv;
    int n_ranges;       // n_head_kv*n_seqs
    int n_tps;
    int n_group;
    int n_rows_chunk;
    float scale;
    float softcap;
};

static __host__ __device__ __forceinline__ int n_chunks(int n_rows, int n_rows_chunk) {
    return n_rows <= n_rows_chunk ? 1 : (n_rows + n_rows_chunk - 1) / n_rows_chunk; // an empty range has one too
}

// The range that chunk number `chunk` of all ranges belongs to; chunk becomes its number there. -1: there are fewer. For
// whole warps.
static __device__ __forceinline__ int find_range(const attend_params & a, int & chunk) {
    const int lane = threadIdx.x % 32;
    for (int first = 0; first < a.n_ranges; first += 32) {
        const int i = first + lane;
        const int n = i < a.n_ranges ? n_chunks(a.ranges[2 * i + 1], a.n_rows_chunk) : 0;
        const int sum = warp_scan(n);
        const unsigned found = __ballot_sync(ALL_LANES, chunk < sum);
        if (found) {
            const int l = __ffs(found) - 1;
            chunk -= __shfl_sync(ALL_LANES, sum - n, l);
            return first + l;
        }
        chunk -= __shfl_sync(ALL_LANES, sum, 31);
    }
    return -1;
}

// query j of a range: token and head of the query tensor
static __device__ __forceinline__ void query_of(const attend_params & a, int range, int j, int & token, int & head) {
    token = range / a.n_head_kv * a.n_tps + j / a.n_group;
    head = range % a.n_head_kv * a.n_group + j % a.n_group;
}

static __device__ __forceinline__ float * result_of(const attend_params & a, int D, int range, int j) {
    int token, head;
    query_of(a, range, j, token, head);
    return a.dst + ((size_t) token * a.n_head_kv * a.n_group + head) * D;
}

template <int D, int NQ, class Row>
static __global__ void __launch_bounds__(N_THREADS) attend_chunk(const attend_params a) {
    constexpr int VW = D % 128 == 0 ? 4 : 2;          // elements of V that a lane takes at a time
    constexpr int NV = (D + 32 * VW - 1) / (32 * VW);       // how often

    alignas(16) __shared__ float q[NQ * D];      // at the end the sum over the warps
    alignas(16) __shared__ float p[N_TILE * NQ]; // scores, then probabilities
    __shared__ float m[NQ];
    __shared__ float s[NQ];
    __shared__ float f[NQ];         // what the sums so far are multiplied with

    int chunk = blockIdx.x;
    const int range = find_range(a, chunk);
    if (range < 0) {
        return;
    }
    const int tid = threadIdx.x;
    const int warp = tid / 32;
    const int lane = tid % 32;

    const int len = a.ranges[2 * range + 1];
    const int first = chunk * a.n_rows_chunk;
    const int last = len - first > a.n_rows_chunk ? first + a.n_rows_chunk : len;
    const int n_query = a.n_tps * a.n_group;
    const int q0 = blockIdx.y * NQ;
    const int nq = min(NQ, n_query - q0);

    const char * k = a.k + (size_t) a.ranges[2 * range] * a.nb_k;
    const char * v = a.v + (size_t) a.ranges[2 * range] * a.nb_v;

    for (int i = tid; i < NQ * D; i += N_THREADS) {
        float x = 0.0f;
        if (i / D < nq) {
            int token, head;
            query_of(a, range, q0 + i / D, token, head);
            x = a.q[token * a.nq2 + head * a.nq1 + i % D];
        }
        q[i] = x;
    }
    if (tid < NQ) {
        m[tid] = -INFINITY;
        s[tid] = 0.0f;
    }
    float acc[NQ][NV * VW] = {};
    __syncthreads();

    for (int r0 = first; r0 < last; r0 += N_TILE) {
        const int n = min(N_TILE, last - r0);
        tile_dots<D, NQ, Row>(q, k + (size_t) r0 * a.nb_k, a.nb_k, nullptr, n, p);
        __syncthreads();

        for (int j = warp; j < NQ; j += N_WARPS) {
            const int visible = len - (a.n_tps - 1 - (q0 + j) / a.n_group) - r0; // rows from r0 on
            float mj = -INFINITY;
            for (int r = lane; r < n; r += 32) {
                float x = -INFINITY;
                if (r < visible) {
                    x = logit(p[r * NQ + j], a.scale, a.softcap);
                    if (a.bias && r0 + r == 0) {
                        x += a.bias[range];
                    }
                }
                p[r * NQ + j] = x;
                mj = fmaxf(mj, x);
            }
            const float m0 = m[j];
            mj = fmaxf(m0, warp_max(mj));
            float sj = 0.0f;
            for (int r = lane; r < n; r += 32) {
                const float x = p[r * NQ + j];
                const float e = x > -INFINITY ? expf(x - mj) : 0.0f;
                p[r * NQ + j] = e;
                sj += e;
            }
            sj = warp_sum(sj); // all lanes have read m[j]
            if (lane == 0) {
                const float fj = m0 > -INFINITY ? expf(m0 - mj) : 0.0f;
                m[j] = mj;
                s[j] = s[j] * fj + sj;
                f[j] = fj;
            }
        }
        __syncthreads();

#pragma unroll
        for (int j = 0; j < NQ; ++j) {
            const float fj = f[j];
#pragma unroll
            for (int i = 0; i < NV * VW; ++i) {
                acc[j][i] *= fj;
            }
        }
#pragma unroll 4
        for (int r = warp; r < n; r += N_WARPS) {
            const char * row = v + (size_t) (r0 + r) * a.nb_v;
#pragma unroll
            for (int i = 0; i < NV; ++i) {
                const int d = VW * (lane + 32 * i);
                if (D % (32 * VW) == 0 || d < D) {
                    float x[VW];
                    Row::template load<VW>(row, d, x);
#pragma unroll
                    for (int j = 0; j < NQ; ++j) {
#pragma unroll
                        for (int e = 0; e < VW; ++e) {
                            acc[j][i * VW + e] += p[r * NQ + j] * x[e];
                        }
                    }
                }
            }
        }
        __syncthreads();
    }

    // the warps one after the other; the queries are no longer needed
    for (int w = 0; w < N_WARPS; ++w) {
        if (warp == w) {
#pragma unroll
            for (int i = 0; i < NV; ++i) {
                const int d = VW * (lane + 32 * i);
                if (D % (32 * VW) == 0 || d < D) {
#pragma unroll
                    for (int j = 0; j < NQ; ++j) {
#pragma unroll
                        for (int e = 0; e < VW; ++e) {
                            q[j * D + d + e] = (w > 0 ? q[j * D + d + e] : 0.0f) + acc[j][i * VW + e];
                        }
                    }
                }
            }
        }
        __syncthreads();
    }

    if (n_chunks(len, a.n_rows_chunk) == 1) {
        for (int i = tid; i < nq * D; i += N_THREADS) {
            int token, head;
            query_of(a, range, q0 + i / D, token, head);
            const float sj = with_sink(s[i / D], m[i / D], a.sinks, head);
            result_of(a, D, range, q0 + i / D)[i % D] = sj > 0.0f ? q[i] / sj : 0.0f;
        }
        return;
    }
    float * part = a.partials + ((size_t) blockIdx.x * n_query + q0) * (D + 2);
    for (int i = tid; i < nq * D; i += N_THREADS) {
        part[i / D * (D + 2) + i % D] = q[i];
    }
    if (tid < nq) {
        part[tid * (D + 2) + D] = m[tid];
        part[tid * (D + 2) + D + 1] = s[tid];
    }
}

// one block per (range, query)
template <int D>
static __global__ void __launch_bounds__(N_THREADS) attend_combine(const attend_params a) {
    const int range = blockIdx.x;
    const int lane = threadIdx.x % 32;

    const int n = n_chunks(a.ranges[2 * range + 1], a.n_rows_chunk);
    if (n == 1) {
        return; // its block wrote the result
    }
    int before = 0; // chunks of earlier ranges
    for (int i0 = 0; i0 < range; i0 += 32) {
        const int i = i0 + lane;
        before += __shfl_sync(ALL_LANES, warp_scan(i < range ? n_chunks(a.ranges[2 * i + 1], a.n_rows_chunk) : 0), 31);
    }
    const int n_query = a.n_tps * a.n_group;
    const size_t step = (size_t) n_query * (D + 2); // from chunk to chunk
    const float * part = a.partials + ((size_t) before * n_query + blockIdx.y) * (D + 2);

    float m = -INFINITY;
    for (int c = lane; c < n; c += 32) {
        m = fmaxf(m, part[c * step + D]);
    }
    m = warp_max(m);

    int token, head;
    query_of(a, range, blockIdx.y, token, head);
    float * out = result_of(a, D, range, blockIdx.y);
    for (int d = threadIdx.x; d < D; d += N_THREADS) {
        float acc = 0.0f;
        float s = 0.0f;
        for (int c = 0; c < n; ++c) {
            const float mc = part[c * step + D];
            const float f = mc > -INFINITY ? expf(mc - m) : 0.0f;
            acc += f * part[c * step + d];
            s += f * part[c * step + D + 1];
        }
        s = with_sink(s, m, a.sinks, head);
        out[d] = s > 0.0f ? acc / s : 0.0f;
    }
}

//
// host
//

// tensors of the op: q, k, v, ranges, bias, sinks
inline bool attend_supports(const ggml_tensor * op) {
    const ggml_tensor * q = op->src[0];
    const ggml_tensor * k = op->src[1];
    const ggml_tensor * v = op->src[2];

    const int64_t D = q->ne[0];
    if (v->ne[0] != D || k->type != v->type || (k->type != GGML_TYPE_F16 && k->type != GGML_TYPE_BF16 && k->type != GGML_TYPE_Q8_0)) {
        return false;
    }
    if ((D != 64 && D != 80 && D != 96 && D != 128 && D != 256) || (k->type == GGML_TYPE_Q8_0 && D % 32 != 0)) {
        return false;
    }
    // rows of 16-bit elements are read 16 bytes at a time
    for (const ggml_tensor * t : { k, v }) {
        if (t->type != GGML_TYPE_Q8_0 && (t->nb[1] % 16 != 0 || t->view_offs % 16 != 0)) {
            return false;
        }
    }
    return q->nb[0] == sizeof(float) && q->nb[1] % sizeof(float) == 0 && q->nb[2] % sizeof(float) == 0;
}

// what follows from the shapes alone
struct attend_grid {
    int n_query; // of a head
    int nq;      // of them in a block
    int n_tiles;
    int n_rows_chunk;
    int n_chunks_max;

    explicit attend_grid(const ggml_tensor * op) {
        const int n_head_kv = (int) op->src[3]->ne[1];
        const int n_seqs = (int) op->src[3]->ne[2];
        const int n_ranges = n_head_kv * n_seqs;
        const int64_t n_rows = op->src[1]->ne[1];

        n_query = (int) (op->src[0]->ne[1] / n_head_kv * (op->src[0]->ne[2] / n_seqs));
        nq = n_query <= 4 ? 4 : 8;
        n_tiles = (n_query + nq - 1) / nq;

        // enough blocks for every device, but no more partial results than they are worth
        constexpr int N_BLOCKS = 1024;
        if (n_ranges * n_tiles >= N_BLOCKS) {
            n_rows_chunk = 1 << 30;
        } else {
            const int64_t n = (n_rows * n_tiles / N_BLOCKS + N_TILE - 1) / N_TILE * N_TILE;
            n_rows_chunk = (int) std::min<int64_t>(std::max<int64_t>(n, N_TILE), 8 * N_TILE);
        }
        // ranges do not overlap
        n_chunks_max = (int) (n_rows / n_rows_chunk) + n_ranges;
    }
};

// bytes
inline size_t attend_scratch(const ggml_tensor * op) {
    const attend_grid g(op);
    return (size_t) g.n_chunks_max * g.n_query * (op->src[0]->ne[0] + 2) * sizeof(float);
}

template <int D, class Row, class Stream>
void attend_run(const attend_params & a, const attend_grid & g, Stream stream) {
    const dim3 grid(g.n_chunks_max, g.n_tiles, 1);
    const dim3 block(N_THREADS, 1, 1);
    if (g.nq == 4) {
        HEADKV_LAUNCH((attend_chunk<D, 4, Row>), grid, block, stream, a);
    } else {
        HEADKV_LAUNCH((attend_chunk<D, 8, Row>), grid, block, stream, a);
    }
    if (g.n_rows_chunk < 1 << 30) {
        HEADKV_LAUNCH((attend_combine<D>), dim3(a.n_ranges, g.n_query, 1), block, stream, a);
    }
}

template <class Stream>
void attend_run(ggml_tensor * dst, float * scratch, Stream stream) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * ranges = dst->src[3];
    const ggml_tensor * bias = dst->src[4];
    const ggml_tensor * sinks = dst->src[5];

    const headkv_op op = headkv_op_get(dst);
    const attend_grid g(dst);

    attend_params a;
    a.q = (const float *) q->data;
    a.k = (const char *) k->data;
    a.v = (const char *) v->data;
    a.ranges = (const int32_t *) ranges->data;
    a.bias = bias ? (const float *) bias->data : nullptr;
    a.sinks = sinks ? (const float *) sinks->data : nullptr;
    a.dst = (float *) dst->data;
    a.partials = scratch;
    a.nq1 = q->nb[1] / sizeof(float);
    a.nq2 = q->nb[2] / sizeof(float);
    a.nb_k = k->nb[1];
    a.nb_v = v->nb[1];
    a.n_head_kv = (int) ranges->ne[1];
    a.n_ranges = (int) (ranges->ne[1] * ranges->ne[2]);
    a.n_tps = (int) (q->ne[2] / ranges->ne[2]);
    a.n_group = (int) (q->ne[1] / ranges->ne[1]);
    a.n_rows_chunk = g.n_rows_chunk;
    a.scale = op.scale;
    a.softcap = op.softcap;

    with_shape(k->type, (int) q->ne[0], [&](auto shape) {
        attend_run<decltype(shape)::D, typename decltype(shape)::Row>(a, g, stream);
    });
}

} // namespace headkv
