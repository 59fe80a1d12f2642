// One sequence: its state, what leads from one state to another, and what is pending for it. It knows positions and
// counts; the cells are in the staging or in the store, and the table says in which.
#pragma once

#include "headkv-config.h"

#include "llama.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// Where the cells of a sequence are, and who frees them when it leaves the state:
//
//   EMPTY       nowhere
//   STAGED      all of them in the staging, which goes with the last sequence that has cells there
//   LAYERED     its prompt was read layer by layer: those of the last layer in the staging, those of the others in the
//               store, as rows of the compression in progress, which gives them back when it is aborted
//   COMPRESSED  the kept ones and those of generated tokens in the store, whose rows go with the sequence
//
//   event \ state                     EMPTY        STAGED       LAYERED      COMPRESSED
//   STAGE    tokens went through      STAGED       STAGED       -            -
//            all layers, into the staging
//   PASS     tokens of a whole prompt LAYERED      -            LAYERED      -
//            went through its first layer
//   STORE    its kept cells are in    COMPRESSED   COMPRESSED   COMPRESSED   -
//            the store (EMPTY: those of another sequence, or of a file)
//   DECODE   a token was generated    -            -            -            COMPRESSED
//   CUT      tokens at its end were   -            STAGED       -            COMPRESSED
//            removed, some are left
//   REMOVE   nothing is left of it    EMPTY        EMPTY        EMPTY        EMPTY
//
// "-" is an error of ours and thrown: nothing is computed on a sequence that is not what the caller takes it for. What
// is pending for a sequence dies with it: REMOVE leaves a new one.
enum headkv_seq_state { HEADKV_SEQ_EMPTY = 0,
    HEADKV_SEQ_STAGED = 1,
    HEADKV_SEQ_COMPRESSED = 2,
    HEADKV_SEQ_LAYERED = 3 };

enum headkv_seq_event { HEADKV_EV_STAGE,
    HEADKV_EV_PASS,
    HEADKV_EV_STORE,
    HEADKV_EV_DECODE,
    HEADKV_EV_CUT,
    HEADKV_EV_REMOVE };

const char * headkv_seq_name(headkv_seq_state state);
const char * headkv_seq_name(headkv_seq_event event);

// what the fit of values did
struct headkv_fit_stats {
    int32_t n_heads = 0; // with new values
    double before = 0.0; // residual of the held-out queries, relative, mean over the heads that dropped cells
    double after = 0.0;  // same
    int64_t t_us = 0;
};

struct headkv_seq {
    headkv_seq_state state = HEADKV_SEQ_EMPTY;

    headkv_config_ptr cfg; // that its prompt is compressed by; null = that of the context then

    // announced for the prompt that it is to hold
    headkv_config_ptr cfg_next;
    uint32_t n_next = 0; // tokens

    llama_pos n_pos = 0; // logical tokens
    llama_pos n_prompt = 0; // of them at compression; the rest was generated
    llama_pos n_whole = 0; // last tokens of the prompt that every head kept
    uint32_t n_tail = 0; // rows reserved per head for generated tokens
    uint32_t kv_size = 0; // that it was compressed with
    uint64_t selection = 0; // same, of the configuration
    std::vector<std::pair<int32_t, int32_t>> spans; // of its prompt before the last n_whole tokens, that every head kept as protected
    std::vector<llama_token> tokens; // of a prompt that goes to the archive, n_pos or more
    uint32_t n_archived = 0; // first tokens of the prompt whose cells came from there
    llama_pos n_alike = 0; // first tokens that were computed as every reading computes them, and may be archived
    headkv_fit_stats fit; // of its compression

    // where generated tokens are bounded; headkv-generated.h
    headkv_generated bound; // by what
    headkv_config_ptr bound_cfg; // whose budgets they have
    std::vector<std::pair<int32_t, int32_t>> bound_spans; // of its prompt, whose cells stay whatever competes
    llama_pos n_settled = 0; // first generated tokens that are no longer in the tail: not all heads have their cells
    int64_t n_evicted = 0; // cells of all heads that were dropped since the compression
    int32_t n_evictions = 0;
    int64_t t_evict_us = 0; // of all of them

    uint64_t adapters = 0; // that its tokens were computed with, HEADKV_SEVERAL_ADAPTERS = one after the other

    // what the next update has to do
    llama_seq_id compress_to = -1; // compress it as this sequence, itself or an empty one
    uint32_t n_tail_next = 0;  // rows reserved per head, 0 = enough
    uint32_t n_new_next = 0; // evict, so that the tail has room for so many tokens; 0 = do not

    std::vector<llama_pos> window; // [queries that the ring has room for] position whose query is in a slot, -1 = none
    std::vector<llama_pos> refs; // [references that there is room for] same, headkv-refs.h
    bool has_sums = true;     // the sums of attention are those of its tokens

    // Takes the sequence from one state to the next. Throws std::logic_error where the table has none.
    void on(headkv_seq_event event);

    bool is_staged() const { return state == HEADKV_SEQ_STAGED || state == HEADKV_SEQ_LAYERED; } // it has cells in the staging

    llama_pos n_generated() const { return n_pos - n_prompt; } // tokens, of a compressed sequence
    llama_pos tail_begin() const { return n_prompt + n_settled; }
    llama_pos n_in_tail() const { return n_pos - tail_begin(); } // tokens that every head has behind its kept cells

    // Whether generated tokens can be evicted: there are some before the window, whose queries are in the ring.
    bool can_evict(llama_seq_id id) const;
    bool is_eviction_due(llama_seq_id id) const; // and whether there are more than their bound

    // A token at a position was computed: into the staging (STAGE or PASS), or behind what is stored (DECODE).
    void add(headkv_seq_event event, llama_pos pos, uint64_t adapters_set, llama_pos n_ring, int64_t n_refs = 0);

    // Whether what is at p0 and behind it, 0 < p0 < n_pos, can be removed: most heads have lost the cells before the last ones.
    bool can_cut(llama_pos p0) const;

    // Removes it. Returns how many prompt tokens of a compressed sequence went, or -1 and nothing has changed.
    llama_pos cut(llama_pos p0);

    // the first position from which it can be continued
    llama_pos pos_min() const;

    // Slots of the last n queries in the ring [window.size() per sequence], in position order; empty = one is missing.
    std::vector<int32_t> window_slots(llama_seq_id id, llama_pos n) const;

    // Slots of the references of its tokens [refs.size() per sequence], in position order; empty = one is missing.
    std::vector<int32_t> ref_slots(llama_seq_id id) const;

    // Why it is not what the configuration and the adapters would leave that are set now; empty = it is.
    std::string why_not_continued(llama_seq_id id, const headkv_config & cfg, uint64_t adapters_set) const;
};

constexpr uint64_t HEADKV_SEVERAL_ADAPTERS = 1;
