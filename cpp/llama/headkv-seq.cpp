#include "headkv-seq.h"

#include "headkv-budget.h"
#include "headkv-refs.h"

#include "llama-impl.h"

#include <algorithm>
#include <stdexcept>

const char * headkv_seq_name(headkv_seq_state state) {
    switch (state) {
        case HEADKV_SEQ_EMPTY: return "empty";
        case HEADKV_SEQ_STAGED: return "staged";
        case HEADKV_SEQ_COMPRESSED: return "compressed";
        case HEADKV_SEQ_LAYERED: return "layered";
    }
    return "unknown";
}

const char * headkv_seq_name(headkv_seq_event event) {
    switch (event) {
        case HEADKV_EV_STAGE: return "stage";
        case HEADKV_EV_PASS: return "pass";
        case HEADKV_EV_STORE: return "store";
        case HEADKV_EV_DECODE: return "decode";
        case HEADKV_EV_CUT: return "cut";
        case HEADKV_EV_REMOVE: return "remove";
    }
    return "unknown";
}

// the table of headkv-seq.h: [event][state], -1 = none
static constexpr int NEXT[6][4] = {
    //           EMPTY                  STAGED                 COMPRESSED             LAYERED
    /* STAGE  */ { HEADKV_SEQ_STAGED, HEADKV_SEQ_STAGED, -1, -1 },
    /* PASS   */ { HEADKV_SEQ_LAYERED, -1, -1, HEADKV_SEQ_LAYERED },
    /* STORE  */ { HEADKV_SEQ_COMPRESSED, HEADKV_SEQ_COMPRESSED, -1, HEADKV_SEQ_COMPRESSED },
    /* DECODE */ { -1, -1, HEADKV_SEQ_COMPRESSED, -1 },
    /* CUT    */ { -1, HEADKV_SEQ_STAGED, HEADKV_SEQ_COMPRESSED, -1 },
    /* REMOVE */ { HEADKV_SEQ_EMPTY, HEADKV_SEQ_EMPTY, HEADKV_SEQ_EMPTY, HEADKV_SEQ_EMPTY },
};

void headkv_seq::on(headkv_seq_event event) {
    const int next = NEXT[event][state];
    if (next < 0) {
        throw std::logic_error(format("a sequence that is %s cannot %s", headkv_seq_name(state), headkv_seq_name(event)));
    }
    if (event == HEADKV_EV_REMOVE) {
        *this = headkv_seq();
        return;
    }
    state = (headkv_seq_state) next;
}

void headkv_seq::add(headkv_seq_event event, llama_pos pos, uint64_t adapters_set, llama_pos n_ring, int64_t n_refs) {
    on(event);
    adapters = n_pos == 0 || adapters == adapters_set ? adapters_set : HEADKV_SEVERAL_ADAPTERS;
    n_archived += std::max(0, pos - n_pos); // nothing else is left out
    has_sums = has_sums && pos <= n_pos; // archived cells have no attention
    n_pos = pos + 1;
    if (is_staged() || bound.n_cells > 0) {
        window.resize(n_ring, -1);
        window[pos % n_ring] = pos;
        const int32_t slot = is_staged() ? headkv_ref_slot(pos) : -1;
        if (n_refs > 0 && slot >= 0) {
            refs.resize(n_refs, -1);
            refs[slot] = pos;
        }
    }
}

bool headkv_seq::can_cut(llama_pos p0) const {
    return state != HEADKV_SEQ_COMPRESSED || p0 >= (n_settled > 0 ? tail_begin() : n_prompt - n_whole);
}

llama_pos headkv_seq::cut(llama_pos p0) {
    if (!can_cut(p0)) {
        return -1;
    }
    on(HEADKV_EV_CUT);
    llama_pos n_gone = 0;
    if (state == HEADKV_SEQ_COMPRESSED) {
        n_gone = std::max(0, n_prompt - p0);
        n_prompt -= n_gone;
        n_whole -= n_gone;
        n_tail += n_gone;
    }
    // the queries that these overwrote in the ring are gone: a compression will say so if it needs them, an eviction waits
    for (auto * queries : { &window, &refs }) {
        std::replace_if(queries->begin(), queries->end(), [p0](llama_pos pos) { return pos >= p0; }, -1);
    }
    if (state != HEADKV_SEQ_COMPRESSED) {
        has_sums = false; // they have the attention of the removed tokens
    }
    n_pos = p0;
    n_archived = std::min(n_archived, (uint32_t) p0);
    n_alike = std::min(n_alike, p0);
    return n_gone;
}

llama_pos headkv_seq::pos_min() const {
    if (n_pos == 0 || state == HEADKV_SEQ_LAYERED) {
        return n_pos - 1; // it is to be compressed first
    }
    // below the recent cells nothing can be removed or continued
    return state == HEADKV_SEQ_COMPRESSED ? std::min(n_settled > 0 ? tail_begin() : n_prompt - n_whole, n_pos - 1) : 0;
}

bool headkv_seq::can_evict(llama_seq_id id) const {
    return state == HEADKV_SEQ_COMPRESSED && bound.n_cells > 0 && n_in_tail() > (llama_pos) bound.n_window &&
            window_slots(id, (llama_pos) bound.n_window).size() == bound.n_window;
}

bool headkv_seq::is_eviction_due(llama_seq_id id) const {
    const int64_t n_most = (n_settled > 0 ? bound.n_window : bound.n_cells) + (int64_t) bound.n_slack; // in the tail
    return n_in_tail() >= n_most && can_evict(id);
}

std::vector<int32_t> headkv_seq::window_slots(llama_seq_id id, llama_pos n) const {
    const llama_pos n_ring = (llama_pos) window.size();
    std::vector<int32_t> res;
    for (llama_pos pos = std::max(0, n_pos - n); pos < n_pos; ++pos) {
        if (n_ring == 0 || window[pos % n_ring] != pos) {
            return {};
        }
        res.push_back(id * n_ring + pos % n_ring);
    }
    return res;
}

std::vector<int32_t> headkv_seq::ref_slots(llama_seq_id id) const {
    std::vector<int32_t> res;
    for (llama_pos pos : headkv_ref_positions(n_pos)) {
        const int32_t slot = headkv_ref_slot(pos);
        if ((size_t) slot >= refs.size() || refs[slot] != pos) {
            return {};
        }
        res.push_back(id * (int32_t) refs.size() + slot);
    }
    return res;
}

std::string headkv_seq::why_not_continued(llama_seq_id id, const headkv_config & cfg, uint64_t adapters_set) const {
    if (state != HEADKV_SEQ_COMPRESSED) {
        return format("sequence %d is not compressed", id);
    }
    if (adapters != adapters_set) {
        return "it was computed with other adapters (LoRA with its scale, control vector) than those that are set";
    }
    if (kv_size != cfg.kv_size && !(n_whole == n_prompt && headkv_keeps_all(cfg, n_prompt))) {
        return format("it was compressed with kv_size %u, that of now is %u", kv_size, cfg.kv_size);
    }
    if (selection != 0 && selection != cfg.selection && !(n_whole == n_prompt && headkv_keeps_all(cfg, n_prompt))) {
        return "it was compressed by another policy, or with other options of it, than those of now";
    }
    if (spans != headkv_protected(cfg, n_prompt - n_whole)) {
        return "it was compressed with other protected cells than those of now";
    }
    if (bound != cfg.generated) {
        return format("its generated tokens are bounded by kv_generated %u, that of now is %u, or with another scope, rank, slack or window",
                bound.n_cells, cfg.generated.n_cells);
    }
    return "";
}
