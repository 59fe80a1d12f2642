// Stage 4, score, see headkv-stages.h: two passes over the keys, of which the first leaves the largest logit and the sum of
// exponentials of each chunk behind, the second the pooled scores.

// queries j0 to j0 + HEADKV_METAL_QUERIES - 1 of a head, (token, head of the group); those that do not exist are zero
inline void load_queries(constant headkv_metal_score & a, device const float * queries, int head, int j0, threadgroup float * q, int tid) {
    for (int i = tid; i < HEADKV_METAL_QUERIES * HEADKV_D; i += HEADKV_METAL_THREADS) {
        const int j = j0 + i / HEADKV_D;
        q[i] = j < a.n_window * a.n_group ? queries[j / a.n_group * a.nq2 + (head * a.n_group + j % a.n_group) * a.nq1 + i % HEADKV_D] : 0.0f;
    }
}

// one threadgroup per (chunk, head); stats [head][chunk][query][2]
[[kernel, max_total_threads_per_threadgroup(HEADKV_METAL_THREADS)]] void headkv_stats(
        constant headkv_metal_score & a [[buffer(0)]],
        device const float * queries [[buffer(1)]],
        device const char * keys [[buffer(2)]],
        device const int32_t * cells [[buffer(3)]],
        device float * stats [[buffer(4)]],
        threadgroup float * q [[threadgroup(0)]], // QUERIES*D
        threadgroup float * p [[threadgroup(1)]], // TILE*QUERIES
        uint3 group [[threadgroup_position_in_grid]],
        uint thread_index [[thread_index_in_threadgroup]],
        uint simd_index [[simdgroup_index_in_threadgroup]],
        uint lane_index [[thread_index_in_simdgroup]]) {
    enum {
        NQ = HEADKV_METAL_QUERIES,
        N_WARPS = HEADKV_METAL_THREADS / HEADKV_METAL_SIMD
    };

    const int head = (int) group.y;
    const int first = (int) group.x * HEADKV_METAL_CHUNK;
    const int last = min(first + (int) HEADKV_METAL_CHUNK, a.n_kv);
    const int n_query = a.n_window * a.n_group;
    const int tid = (int) thread_index;
    const int warp = (int) simd_index;
    const int lane = (int) lane_index;

    for (int j0 = 0; j0 < n_query; j0 += NQ) {
        load_queries(a, queries, head, j0, q, tid);
        float m[NQ / N_WARPS]; // of queries warp, warp + N_WARPS, ..
        float s[NQ / N_WARPS];
        for (int i = 0; i < NQ / N_WARPS; ++i) {
            m[i] = LOWEST;
            s[i] = 0.0f;
        }
        for (int r0 = first; r0 < last; r0 += HEADKV_METAL_TILE) {
            const int n = min((int) HEADKV_METAL_TILE, last - r0);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            rows_listed rows;
            rows.rows = cells + r0;
            tile_dots<NQ>(q, keys + head * a.nb_head, a.nb_k, rows, n, p, tid);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (int i = 0; i < NQ / N_WARPS; ++i) {
                const int j = warp + i * N_WARPS;
                const int visible = a.n_kv - a.n_window + (j0 + j) / a.n_group + 1 - r0; // rows from r0 on
                float mt = m[i];
                for (int r = lane; r < n; r += HEADKV_METAL_SIMD) {
                    mt = r < visible ? max(mt, logit(p[r * NQ + j], a.scale, a.softcap)) : mt;
                }
                mt = simd_max(mt);
                float st = 0.0f;
                for (int r = lane; r < n; r += HEADKV_METAL_SIMD) {
                    st += r < visible ? precise::exp(logit(p[r * NQ + j], a.scale, a.softcap) - mt) : 0.0f;
                }
                s[i] = s[i] * precise::exp(m[i] - mt) + simd_sum(st);
                m[i] = mt;
            }
        }
        for (int i = 0; i < NQ / N_WARPS; ++i) {
            const int j = j0 + warp + i * N_WARPS;
            if (lane == 0 && j < n_query) {
                device float * out = stats + (((ulong) head * a.n_chunk + group.x) * n_query + j) * 2;
                out[0] = m[i];
                out[1] = s[i];
            }
        }
    }
}

// Largest logit and 1/sum of exponentials of query j over all chunks and the sink, by a whole SIMD group
inline void load_total(constant headkv_metal_score & a, device const float * stats, device const float * sinks, int head, int j, threadgroup float * total, int lane) {
    const ulong step = (ulong) a.n_window * a.n_group * 2; // from chunk to chunk
    device const float * of = stats + (ulong) head * a.n_chunk * step + j * 2;

    float m = LOWEST;
    for (int c = lane; c < a.n_chunk; c += HEADKV_METAL_SIMD) {
        m = max(m, of[c * step]);
    }
    m = simd_max(m);
    float s = 0.0f;
    for (int c = lane; c < a.n_chunk; c += HEADKV_METAL_SIMD) {
        s += of[c * step + 1] * precise::exp(of[c * step] - m);
    }
    s = simd_sum(s);
    if (a.has_sinks) {
        float f;
        s = with_sink(s, sinks[head * a.n_group + j % a.n_group], m, f);
    }
    if (lane == 0) {
        total[0] = m;
        total[1] = 1.0f / s;
    }
}

// One threadgroup per (tile of keys, head). Tiles overlap by the neighbours that pooling takes; a thread owns a key. scores [head][n_prefix]
[[kernel, max_total_threads_per_threadgroup(HEADKV_METAL_THREADS)]] void headkv_pooled(
        constant headkv_metal_score & a [[buffer(0)]],
        device const float * queries [[buffer(1)]],
        device const char * keys [[buffer(2)]],
        device const int32_t * cells [[buffer(3)]],
        device const float * stats [[buffer(4)]],
        device const float * sinks [[buffer(5)]],
        device float * scores [[buffer(6)]],
        threadgroup float * q [[threadgroup(0)]],      // QUERIES*D
        threadgroup float * p [[threadgroup(1)]],      // TILE*QUERIES
        threadgroup float * mean [[threadgroup(2)]],   // TILE
        threadgroup float * totals [[threadgroup(3)]], // 2*QUERIES
        uint3 group [[threadgroup_position_in_grid]],
        uint thread_index [[thread_index_in_threadgroup]],
        uint simd_index [[simdgroup_index_in_threadgroup]],
        uint lane_index [[thread_index_in_simdgroup]]) {
    enum {
        NQ = HEADKV_METAL_QUERIES,
        N_WARPS = HEADKV_METAL_THREADS / HEADKV_METAL_SIMD
    };

    const int head = (int) group.y;
    const int n_query = a.n_window * a.n_group;
    const int half_kernel = a.pool_kernel / 2;
    const int first = (int) group.x * (HEADKV_METAL_TILE - 2 * half_kernel); // of the scores
    const int r0 = max(first - half_kernel, 0);                             // of the keys
    const int n = min(r0 + (int) HEADKV_METAL_TILE, a.n_prefix) - r0;
    const int r = (int) thread_index;

    float sum = 0.0f;
    for (int j0 = 0; j0 < n_query; j0 += NQ) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        load_queries(a, queries, head, j0, q, r);
        for (int j = (int) simd_index; j < min((int) NQ, n_query - j0); j += N_WARPS) {
            load_total(a, stats, sinks, head, j0 + j, totals + 2 * j, (int) lane_index);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        rows_listed rows;
        rows.rows = cells + r0;
        tile_dots<NQ>(q, keys + head * a.nb_head, a.nb_k, rows, n, p, r);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (r < n) {
            for (int j = 0; j < min((int) NQ, n_query - j0); ++j) {
                const int visible = a.n_kv - a.n_window + (j0 + j) / a.n_group + 1 - r0;
                float x = r < visible ? precise::exp(logit(p[r * NQ + j], a.scale, a.softcap) - totals[2 * j]) * totals[2 * j + 1] : 0.0f;
                for (int i = 0; i < a.n_square; ++i) {
                    x *= x;
                }
                sum += x;
            }
        }
    }
    sum /= n_query;
    for (int i = 0; i < a.n_square; ++i) {
        sum = sqrt(sum);
    }
    mean[r] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const int i = first + r; // position
    if (r >= HEADKV_METAL_TILE - 2 * half_kernel || i >= a.n_prefix) {
        return;
    }
    // max leaves out the neighbours that do not exist, avg counts them as zero
    float res = 0.0f; // no score is less
    for (int o = max(i - half_kernel, 0); o <= min(i + half_kernel, a.n_prefix - 1); ++o) {
        const float x = mean[o - r0];
        res = a.pool_max ? max(res, x) : res + x;
    }
    scores[(ulong) head * a.n_prefix + i] = a.pool_max ? res : res / a.pool_kernel;
}
