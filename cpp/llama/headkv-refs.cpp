#include "headkv-refs.h"

#include "llama-batch.h"

#include <algorithm>

// Tokens are counted from 1 here. At level i the references are the multiples of 2^i, up to HEADKV_REF_SLOTS of them.
static int level_of(int64_t token) {
    int res = 0;
    while (token > (int64_t) HEADKV_REF_SLOTS << res) {
        res++;
    }
    return res;
}

int32_t headkv_ref_slot(llama_pos pos) {
    int64_t token = (int64_t) pos + 1;
    int level = level_of(token);
    if (token % ((int64_t) 1 << level) != 0) {
        return -1;
    }
    for (; level > 0; level = level_of(token)) {
        // that of the level before which is no reference any more
        token = (2 * ((token >> level) - HEADKV_REF_SLOTS / 2) - 1) << (level - 1);
    }
    return (int32_t) token - 1;
}

std::vector<llama_pos> headkv_ref_positions(llama_pos n) {
    const int level = level_of(n);
    const int64_t n_held = n >> level;
    const int64_t n_refs = std::min<int64_t>(n_held, HEADKV_MAX_REFS);
    std::vector<llama_pos> res;
    for (int64_t i = 1; i <= n_refs; ++i) {
        res.push_back((llama_pos) ((i * n_held / n_refs) << level) - 1);
    }
    return res;
}

int32_t headkv_ref_head(llama_pos pos, int32_t ih, int32_t n_head_kv, int32_t n_group) {
    // multiples of the golden ratio spread over the group, whatever the distance of the positions is
    const uint64_t i = (uint64_t) pos * n_head_kv + ih + 1;
    return (int32_t) ((i * 0x9e3779b97f4a7c15u >> 40) % (uint64_t) n_group);
}

std::pair<std::vector<int32_t>, std::vector<int64_t>> headkv_ref_rows(const llama_ubatch & ubatch, int64_t n, int32_t n_head, int32_t n_head_kv,
        int64_t n_slots_of_seq, int64_t n_slots) {
    const int32_t n_group = n_head / n_head_kv;
    std::vector<int32_t> rows;
    std::vector<int64_t> slots;
    std::vector<bool> taken(n_slots, false);
    const auto add = [&](int64_t i_token, llama_pos pos, int64_t slot) {
        for (int32_t ih = 0; ih < n_head_kv; ++ih) {
            rows.push_back((int32_t) (i_token * n_head + ih * n_group + headkv_ref_head(pos, ih, n_head_kv, n_group)));
            slots.push_back(slot * n_head_kv + ih);
        }
    };
    // the last one that goes to a slot stays
    for (int64_t i = (int64_t) ubatch.n_tokens - 1; i >= 0; --i) {
        const int32_t slot = headkv_ref_slot(ubatch.pos[i]);
        const int64_t of_all = ubatch.seq_id[i][0] * n_slots_of_seq + slot;
        if (slot >= 0 && !taken[of_all]) {
            taken[of_all] = true;
            add(i, ubatch.pos[i], of_all);
        }
    }
    while ((int64_t) rows.size() < n * n_head_kv) {
        add(0, 0, n_slots - 1);
    }
    return { rows, slots };
}
