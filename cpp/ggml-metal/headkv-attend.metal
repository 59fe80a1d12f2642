// Stage 7, attend, see headkv-attend.h. One threadgroup per (chunk of a range, tile of queries), then one per (range, query) that combines
// the chunks of a range in order. Which chunk a threadgroup has follows from the ranges, which are device data: the grid covers all that
// the pool can hold.

inline int n_chunks(int n_rows, int n_rows_chunk) {
    return n_rows <= n_rows_chunk ? 1 : (n_rows + n_rows_chunk - 1) / n_rows_chunk; // an empty range has one too
}

// The range that chunk number `chunk` of all ranges belongs to; chunk becomes its number there. -1: there are fewer. For whole SIMD
// groups.
inline int find_range(constant headkv_metal_attend & a, device const int32_t * ranges, int lane, thread int & chunk) {
    for (int first = 0; first < a.n_ranges; first += HEADKV_METAL_SIMD) {
        const int i = first + lane;
        const int n = i < a.n_ranges ? n_chunks(ranges[2 * i + 1], a.n_rows_chunk) : 0;
        const int sum = simd_prefix_inclusive_sum(n);
        const int found = simd_min(chunk < sum ? lane : HEADKV_METAL_SIMD);
        if (found < HEADKV_METAL_SIMD) {
            chunk -= simd_shuffle(sum - n, (ushort) found);
            return first + found;
        }
        chunk -= simd_shuffle(sum, (ushort) (HEADKV_METAL_SIMD - 1));
    }
    return -1;
}

// query j of a range: token and head of the query tensor
inline int token_of(constant headkv_metal_attend & a, int range, int j) {
    return range / a.n_head_kv * a.n_tps + j / a.n_group;
}

inline int head_of(constant headkv_metal_attend & a, int range, int j) {
    return range % a.n_head_kv * a.n_group + j % a.n_group;
}

// floats from the beginning of the result
inline ulong result_of(constant headkv_metal_attend & a, int range, int j) {
    return ((ulong) token_of(a, range, j) * a.n_head_kv * a.n_group + head_of(a, range, j)) * HEADKV_D;
}

// partials [chunk][query of a head][HEADKV_D + 2]: sum of exp(s - m)*v, m, sum of exp(s - m)
[[kernel, max_total_threads_per_threadgroup(HEADKV_METAL_THREADS)]] void headkv_attend(
        constant headkv_metal_attend & a [[buffer(0)]],
        device const float * queries [[buffer(1)]],
        device const char * keys [[buffer(2)]],
        device const char * values [[buffer(3)]],
        device const int32_t * ranges [[buffer(4)]],
        device const float * bias [[buffer(5)]],
        device const float * sinks [[buffer(6)]],
        device float * dst [[buffer(7)]],
        device float * partials [[buffer(8)]],
        threadgroup float * q [[threadgroup(0)]], // NQ*D queries, at the end the sum over the SIMD groups
        threadgroup float * p [[threadgroup(1)]], // TILE*NQ scores, then probabilities
        threadgroup float * m [[threadgroup(2)]], // NQ, same below
        threadgroup float * s [[threadgroup(3)]],
        threadgroup float * f [[threadgroup(4)]], // what the sums so far are multiplied with
        uint3 group [[threadgroup_position_in_grid]],
        uint thread_index [[thread_index_in_threadgroup]],
        uint simd_index [[simdgroup_index_in_threadgroup]],
        uint lane_index [[thread_index_in_simdgroup]]) {
    enum {
        D = HEADKV_D,
        NQ = HEADKV_NQ,
        N_WARPS = HEADKV_METAL_THREADS / HEADKV_METAL_SIMD,
        VW = D % 128 == 0 ? 4 : 2,                                         // elements of V that a lane takes at a time
        NV = (D + HEADKV_METAL_SIMD * VW - 1) / (HEADKV_METAL_SIMD * VW) // how often
    };

    const int tid = (int) thread_index;
    const int warp = (int) simd_index;
    const int lane = (int) lane_index;

    int chunk = (int) group.x;
    const int range = find_range(a, ranges, lane, chunk);
    if (range < 0) {
        return;
    }

    const int len = ranges[2 * range + 1];
    const int first = chunk * a.n_rows_chunk;
    const int last = len - first > a.n_rows_chunk ? first + a.n_rows_chunk : len;
    const int n_query = a.n_tps * a.n_group;
    const int q0 = (int) group.y * NQ;
    const int nq = min((int) NQ, n_query - q0);

    device const char * k = keys + (ulong) ranges[2 * range] * a.nb_k;
    device const char * v = values + (ulong) ranges[2 * range] * a.nb_v;

    for (int i = tid; i < NQ * D; i += HEADKV_METAL_THREADS) {
        q[i] = i / D < nq ? queries[token_of(a, range, q0 + i / D) * a.nq2 + head_of(a, range, q0 + i / D) * a.nq1 + i % D] : 0.0f;
    }
    if (tid < NQ) {
        m[tid] = LOWEST;
        s[tid] = 0.0f;
    }
    float acc[NQ][NV * VW];
    for (int j = 0; j < NQ; ++j) {
        for (int i = 0; i < NV * VW; ++i) {
            acc[j][i] = 0.0f;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (int r0 = first; r0 < last; r0 += HEADKV_METAL_TILE) {
        const int n = min((int) HEADKV_METAL_TILE, last - r0);
        tile_dots<NQ>(q, k + (ulong) r0 * a.nb_k, a.nb_k, rows_in_order(), n, p, tid);
        threadgroup_barrier(mem_flags::mem_threadgroup);

        for (int j = warp; j < NQ; j += N_WARPS) {
            const int visible = len - (a.n_tps - 1 - (q0 + j) / a.n_group) - r0; // rows from r0 on
            float mj = LOWEST;
            for (int r = lane; r < n; r += HEADKV_METAL_SIMD) {
                float x = LOWEST;
                if (r < visible) {
                    x = logit(p[r * NQ + j], a.scale, a.softcap);
                    if (a.has_bias && r0 + r == 0) {
                        x += bias[range];
                    }
                }
                p[r * NQ + j] = x;
                mj = max(mj, x);
            }
            const float m0 = m[j];
            mj = max(m0, simd_max(mj));
            float sj = 0.0f;
            for (int r = lane; r < n; r += HEADKV_METAL_SIMD) {
                const float e = r < visible ? precise::exp(p[r * NQ + j] - mj) : 0.0f;
                p[r * NQ + j] = e;
                sj += e;
            }
            sj = simd_sum(sj); // all lanes have read m[j]
            if (lane == 0) {
                const float fj = precise::exp(m0 - mj);
                m[j] = mj;
                s[j] = s[j] * fj + sj;
                f[j] = fj;
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        for (int j = 0; j < NQ; ++j) {
            const float fj = f[j];
            for (int i = 0; i < NV * VW; ++i) {
                acc[j][i] *= fj;
            }
        }
        for (int r = warp; r < n; r += N_WARPS) {
            device const char * row = v + (ulong) (r0 + r) * a.nb_v;
            for (int i = 0; i < NV; ++i) {
                const int d = VW * (lane + HEADKV_METAL_SIMD * i);
                if (d < D) {
                    float x[VW];
                    load_row<VW>(row, d, x);
                    for (int j = 0; j < NQ; ++j) {
                        for (int e = 0; e < VW; ++e) {
                            acc[j][i * VW + e] += p[r * NQ + j] * x[e];
                        }
                    }
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    // the SIMD groups one after the other; the queries are no longer needed
    for (int w = 0; w < N_WARPS; ++w) {
        if (warp == w) {
            for (int i = 0; i < NV; ++i) {
                const int d = VW * (lane + HEADKV_METAL_SIMD * i);
                if (d < D) {
                    for (int j = 0; j < NQ; ++j) {
                        for (int e = 0; e < VW; ++e) {
                            q[j * D + d + e] = (w > 0 ? q[j * D + d + e] : 0.0f) + acc[j][i * VW + e];
                        }
                    }
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    if (n_chunks(len, a.n_rows_chunk) == 1) {
        for (int i = tid; i < nq * D; i += HEADKV_METAL_THREADS) {
            const int j = i / D;
            float mj = m[j];
            float sj = s[j];
            float fj = 1.0f;
            if (a.has_sinks) {
                sj = with_sink(sj, sinks[head_of(a, range, q0 + j)], mj, fj);
            }
            dst[result_of(a, range, q0 + j) + i % D] = sj > 0.0f ? q[i] * fj / sj : 0.0f;
        }
        return;
    }
    device float * part = partials + ((ulong) group.x * n_query + q0) * (D + 2);
    for (int i = tid; i < nq * D; i += HEADKV_METAL_THREADS) {
        part[i / D * (D + 2) + i % D] = q[i];
    }
    if (tid < nq) {
        part[tid * (D + 2) + D] = m[tid];
        part[tid * (D + 2) + D + 1] = s[tid];
    }
}

[[kernel, max_total_threads_per_threadgroup(HEADKV_METAL_THREADS)]] void headkv_combine(
        constant headkv_metal_attend & a [[buffer(0)]],
        device const int32_t * ranges [[buffer(1)]],
        device const float * sinks [[buffer(2)]],
        device const float * partials [[buffer(3)]],
        device float * dst [[buffer(4)]],
        uint3 group [[threadgroup_position_in_grid]],
        uint thread_index [[thread_index_in_threadgroup]],
        uint simd_index [[simdgroup_index_in_threadgroup]],
        uint lane_index [[thread_index_in_simdgroup]]) {
    const int range = (int) group.x;
    const int j = (int) group.y;
    const int lane = (int) lane_index;

    const int n = n_chunks(ranges[2 * range + 1], a.n_rows_chunk);
    if (n == 1) {
        return; // its threadgroup wrote the result
    }
    int before = 0; // chunks of earlier ranges
    for (int i = lane; i < range; i += HEADKV_METAL_SIMD) {
        before += n_chunks(ranges[2 * i + 1], a.n_rows_chunk);
    }
    before = simd_sum(before);

    const int n_query = a.n_tps * a.n_group;
    const ulong step = (ulong) n_query * (HEADKV_D + 2); // from chunk to chunk
    device const float * part = partials + ((ulong) before * n_query + j) * (HEADKV_D + 2);

    float m = LOWEST;
    for (int c = lane; c < n; c += HEADKV_METAL_SIMD) {
        m = max(m, part[c * step + HEADKV_D]);
    }
    m = simd_max(m);

    device float * out = dst + result_of(a, range, j);
    for (int d = (int) thread_index; d < HEADKV_D; d += HEADKV_METAL_THREADS) {
        float acc = 0.0f;
        float s = 0.0f;
        for (int c = 0; c < n; ++c) {
            const float fc = precise::exp(part[c * step + HEADKV_D] - m);
            acc += fc * part[c * step + d];
            s += fc * part[c * step + HEADKV_D + 1];
        }
        float f = 1.0f;
        if (a.has_sinks) {
            float larger = m;
            s = with_sink(s, sinks[head_of(a, range, j)], larger, f);
        }
        out[d] = s > 0.0f ? acc * f / s : 0.0f;
    }
}
