// Stage 6, compact, see headkv-stages.h: rows as raw bytes, in words as long as they are aligned to. A head's rows are dealt out to its
// threadgroups, a threadgroup takes as many at once as it has threads for.

// words from on to the end of a row that are a thread's
template <class Word>
inline void copy_words(device char * to, device const char * from, int first, int n_lanes, int n_words) {
    for (int w = first; w < n_words; w += n_lanes) {
        const Word t = ((device const Word *) from)[w];
        ((device Word *) to)[w] = t;
    }
}

// plan [head][3]: first element of kept, number, first row in pool
[[kernel, max_total_threads_per_threadgroup(HEADKV_METAL_COMPACT)]] void headkv_compact(
        constant headkv_metal_compact & a [[buffer(0)]],
        device const char * all_cells [[buffer(1)]],
        device const int32_t * all_kept [[buffer(2)]],
        device const int32_t * cell [[buffer(3)]],
        device const int32_t * plans [[buffer(4)]],
        device char * pool [[buffer(5)]],
        uint3 group [[threadgroup_position_in_grid]],
        uint thread_index [[thread_index_in_threadgroup]],
        uint simd_index [[simdgroup_index_in_threadgroup]],
        uint lane_index [[thread_index_in_simdgroup]]) {
    const int n_words = (int) a.nb_head / a.n_word;                // of a row
    const int n_lanes = min(n_words, (int) HEADKV_METAL_COMPACT);  // threads of a row
    const int n_rows = HEADKV_METAL_COMPACT / n_lanes;             // of a threadgroup at a time
    const int row = (int) thread_index / n_lanes;
    const int first = (int) thread_index % n_lanes;
    if (row >= n_rows) {
        return;
    }
    device const int32_t * plan = plans + group.y * a.n_plan;
    device const int32_t * kept = all_kept + plan[0];
    device const char * cells = all_cells + group.y * a.nb_head;
    const int n = plan[1];

    for (int i = (int) group.x * n_rows + row; i < n; i += a.n_groups * n_rows) {
        device const char * from = cells + (ulong) cell[kept[i]] * a.nb_cells;
        device char * to = pool + ((ulong) plan[2] + i) * a.nb_pool;
        if (a.n_word == 16) {
            copy_words<uint4>(to, from, first, n_lanes, n_words);
        } else if (a.n_word == 8) {
            copy_words<uint2>(to, from, first, n_lanes, n_words);
        } else if (a.n_word == 4) {
            copy_words<uint>(to, from, first, n_lanes, n_words);
        } else {
            copy_words<ushort>(to, from, first, n_lanes, n_words);
        }
    }
}
