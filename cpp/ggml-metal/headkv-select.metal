// Stage 5, select, see headkv-stages.h: one threadgroup per head finds the lowest score to keep digit by digit, then writes the
// positions in order. Nothing depends on the order in which threads run. Scores are read as bits: a NaN is a score like others.

// an integer in the order of the scores; -0 and 0 are one score, NaN is the lowest
inline uint score_key(uint bits) {
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return 0;
    }
    if ((bits & 0x7fffffffu) == 0) {
        return 0x80000000u;
    }
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// sum over the threads up to this one; total: over all
inline uint group_scan(uint x, threadgroup uint * sums, int warp, int lane, thread uint & total) {
    x = simd_prefix_inclusive_sum(x);
    if (lane == HEADKV_METAL_SIMD - 1) {
        sums[warp] = x;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    total = 0;
    uint before = 0;
    for (int w = 0; w < HEADKV_METAL_SELECT / HEADKV_METAL_SIMD; ++w) {
        before += w < warp ? sums[w] : 0;
        total += sums[w];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return before + x;
}

// plan [head][2]: first element of kept, cells to keep
[[kernel, max_total_threads_per_threadgroup(HEADKV_METAL_SELECT)]] void headkv_select(
        constant headkv_metal_select & a [[buffer(0)]],
        device const uint * all_scores [[buffer(1)]],
        device const int32_t * plan [[buffer(2)]],
        device int32_t * kept [[buffer(3)]],
        threadgroup atomic_int * count [[threadgroup(0)]], // 256: keys by digit
        threadgroup uint * sums [[threadgroup(1)]],        // SELECT/SIMD
        threadgroup uint * found [[threadgroup(2)]],       // the digits found so far; keys to take out of those with these digits
        uint3 group [[threadgroup_position_in_grid]],
        uint thread_index [[thread_index_in_threadgroup]],
        uint simd_index [[simdgroup_index_in_threadgroup]],
        uint lane_index [[thread_index_in_simdgroup]]) {
    device const uint * scores = all_scores + group.x * a.n_scores;
    const int n_keep = min(plan[group.x * a.n_plan + 1], a.n_prefix);
    device int32_t * out = kept + plan[group.x * a.n_plan];
    const int tid = (int) thread_index;

    for (int i = tid; i < a.n_recent; i += HEADKV_METAL_SELECT) {
        out[n_keep + i] = a.n_prefix + i;
    }
    if (n_keep == a.n_prefix) {
        for (int i = tid; i < n_keep; i += HEADKV_METAL_SELECT) {
            out[i] = i;
        }
        return;
    }
    if (n_keep == 0) {
        return;
    }

    uint limit = 0; // after the loop the lowest key to keep
    int n_left = n_keep;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = tid; i < 256; i += HEADKV_METAL_SELECT) {
            atomic_store_explicit(&count[i], 0, memory_order_relaxed);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int i = tid; i < a.n_prefix; i += HEADKV_METAL_SELECT) {
            const uint key = score_key(scores[i]);
            if (shift == 24 || (key ^ limit) >> (shift + 8) == 0) {
                atomic_fetch_add_explicit(&count[(key >> shift) & 255], 1, memory_order_relaxed);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (tid == 0) {
            int digit = 255;
            int n = atomic_load_explicit(&count[digit], memory_order_relaxed);
            while (n < n_left) {
                n_left -= n;
                n = atomic_load_explicit(&count[--digit], memory_order_relaxed);
            }
            found[0] = limit | (uint) digit << shift;
            found[1] = (uint) n_left;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        limit = found[0];
        n_left = (int) found[1];
    }

    // above the limit all keys, at the limit the first n_left
    uint n_above = 0;
    uint n_equal = 0;
    for (int i0 = 0; i0 < a.n_prefix; i0 += HEADKV_METAL_SELECT) {
        const int i = i0 + tid;
        const uint key = i < a.n_prefix ? score_key(scores[i]) : 0;
        const uint above = i < a.n_prefix && key > limit;
        const uint equal = i < a.n_prefix && key == limit;

        uint total;
        const uint sum = group_scan(above | equal << 16, sums, (int) simd_index, (int) lane_index, total);
        const uint above_before = n_above + (sum & 0xffff) - above;
        const uint equal_before = n_equal + (sum >> 16) - equal;
        if (above || (equal && equal_before < (uint) n_left)) {
            out[above_before + min(equal_before, (uint) n_left)] = i;
        }
        n_above += total & 0xffff;
        n_equal += total >> 16;
    }
}
