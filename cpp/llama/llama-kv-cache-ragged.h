#pragma once

#include "llama-adapter.h"
#include "llama-memory.h"

#include "headkv-archive.h"
#include "headkv-batch.h"
#include "headkv-beside.h"
#include "headkv-compress.h"
#include "headkv-config.h"
#include "headkv-generated.h"
#include "headkv-policy.h"
#include "headkv-ring-rows.h"
#include "headkv-seq.h"
#include "headkv-staging.h"
#include "headkv-store.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

//
// llama_kv_cache_ragged
//

// A prompt is read into a stock, unified llama_kv_cache (the staging). When the prompt is complete, each KV head keeps
// the cells that the last queries look at, as many as its budget allows; they move to the store and the staging memory
// is released. From then on the sequence is decoded from the store, in which every (layer, KV head) has its own range.
// The states of a sequence and what leads from one to another: headkv-seq.h.
//
// A prompt that is announced as a whole and comes in one batch is read layer by layer: all its ubatches go through layer
// il, that layer is compressed, and the next layer reuses its staging memory. The sequence is LAYERED in between: only
// its last layer is still staged, and it can do nothing but be compressed. The pass can be paused after any step and
// goes on when the same batch comes again; until then the sequence counts as empty, and others can be decoded.
//
// Sequences are independent of each other: some can be read while others are decoded, in one batch. Tokens of compressed
// sequences share their ubatches. One sequence at a time is read layer by layer, and only while no other one is staged.
//
// Layers with windowed attention or a recurrent state are upstream's: every ubatch goes through them as well, and what they
// hold of a sequence goes with it.
//
// Positions always are the logical ones. A compressed sequence can be truncated as far as every head still has its last
// cells: those that are kept because they are recent.

class llama_kv_cache_ragged : public llama_memory_i {
public:
    llama_kv_cache_ragged(
            const llama_model & model,
            headkv_layer_owners owners,
            ggml_type type_k,
            ggml_type type_v,
            const llama_cparams & cparams,
            headkv_config_ptr cfg);

    ~llama_kv_cache_ragged() override;

    // llama_memory_i

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    void clear(bool data) override;

    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    void seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // headkv-state.cpp
    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read(llama_io_read_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // for the API
    //

    // parameters for the prompts to come; throws std::invalid_argument
    void configure(headkv_config_ptr other);
    std::vector<std::vector<uint32_t>> checked_budgets(const headkv_config & other) const; // throws the same

    // Announces the size of a sequence; whole: the next batch is a prompt from its first to its last token.
    // with: what the prompt is compressed by, null = that of the context; keep: null = what was announced for as many tokens.
    void announce(llama_seq_id seq_id, uint32_t n_tokens, bool whole, headkv_config_ptr with, bool keep);

    // Compresses a sequence now, as itself or as an empty one, and then it stays as it is; false: headkv_last_error() says
    // why and nothing has changed.
    bool compress(llama_context * lctx, llama_seq_id seq_id, llama_seq_id seq_id_dst);

    // Takes tokens [p0, p1) out of a compressed sequence; headkv-drop.cpp. Throws std::invalid_argument with the reason when it cannot be.
    void drop(llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // makes room in the staging for a prompt in upstream's order
    bool make_room(llama_context * lctx, uint32_t n_tokens);

    // told (layer, layers, tokens, tokens of the prompt) before each step; false = abort
    using progress_fn = bool (*)(int32_t il, int32_t n_layer, int32_t i_token, int32_t n_tokens, void * user_data);
    void set_progress(progress_fn fn, void * user_data) {
        progress = fn;
        progress_data = user_data;
    }

    // The time (ggml_time_us) at which a layer-major pass pauses, one step or more after it was begun or resumed, and in any
    // case before its last step; 0 = it does not.
    void set_pause(int64_t t_us) { t_pause = t_us; }

    int64_t n_steps_left(llama_seq_id seq_id, int64_t n_tokens, int64_t n_ubatch) const; // of its layer-major pass

    // why prompts are not read layer by layer, empty = they are
    const std::string & why_token_major() const { return token_major; }

    // the adapters that the tokens to come are computed with; headkv-state.cpp
    void note_adapters(const llama_adapter_loras & loras, const llama_adapter_cvec & cvec);

    // why a compressed sequence is not what a configuration and the adapters that are set would have left, empty = it is
    std::string why_not_continued(llama_seq_id seq_id, const headkv_config & with) const { return seqs.at(seq_id).why_not_continued(seq_id, with, adapters); }

    // Limits of a sequence that is restored, 0 = only those of the context. See headkv_limit_restore().
    struct limits_t {
        int32_t kv_size = 0;
        int32_t n_protected = 0;
        int32_t n_tokens = 0;
    };
    void limit_restore(const limits_t & other) { limits = other; }

    //
    // the archive; headkv-archived.cpp
    //

    // Where prompts are kept from now on, null = nowhere. Throws std::invalid_argument for a type that rows cannot have.
    void set_archive(std::unique_ptr<headkv_blocks> blocks, int64_t max_bytes, ggml_type type);
    const headkv_archive * archive() const { return the_archive.get(); }

    // failures of blocks since the last compression: the prompt that was dropped with one may be read again, without it
    int32_t n_lost() const { return n_lost_blocks; }
    uint32_t n_archived() const { return the_pass ? the_pass->n_archived() : 0; } // first tokens of the pass

    //
    // numbers and parts
    //

    const headkv_config & config() const { return *cfg; }

    const headkv_seq & seq(llama_seq_id seq_id) const { return seqs.at(seq_id); }
    headkv_seq & seq(llama_seq_id seq_id) { return seqs.at(seq_id); }
    uint32_t n_seq_max() const { return (uint32_t) seqs.size(); }
    uint32_t n_ctx_seq_max() const { return n_ctx_seq; }

    int32_t n_layer() const;
    int32_t n_head_kv_max() const;
    int32_t n_head_max() const;

    const std::vector<uint32_t> & budget(int32_t il) const { return budgets[il]; }

    headkv_store & store() { return the_store; }
    const headkv_store & store() const { return the_store; }
    bool has_alibi() const { return hparams.use_alibi; }
    int32_t layer_seen_by(int32_t il) const { return owners.shared[il] >= 0 ? owners.shared[il] : il; } // whose cells it attends to
    headkv_store & store_twin() { return the_store_twin; } // without memory, for worst-case graphs
    headkv_staging & staging() { return the_staging; }
    const headkv_staging & staging() const { return the_staging; }
    headkv_beside * beside() { return the_beside.get(); } // null = all layers are ours
    const headkv_queries * queries() const { return the_queries.get(); } // of generated tokens; null = they are not bounded
    size_t bytes_queries() const { return the_queries ? the_queries->n_bytes() : 0; }
    size_t bytes_beside() const { return the_beside ? the_beside->n_bytes() : 0; }

    bool is_reading(llama_seq_id seq_id) const { return the_pass && the_pass->seq_id == seq_id; } // layer by layer, between its first and its last step

    size_t bytes_cell() const; // K and V of one token in all layers
    size_t bytes_peak() const { return n_bytes_peak; } // of staging, hidden states, scratch and store during the last prompt
    int64_t t_compress_us() const { return t_compress; }
    int64_t n_compress() const { return n_compressions; }

    // What a prompt of n_prompt tokens and n_predict generated ones takes; headkv-footprint.cpp.
    headkv_footprint footprint(const headkv_config & with, uint32_t n_prompt, uint32_t n_predict, bool layered, int64_t n_ubatch) const;

    //
    // for the graph
    //

    // why the policy's rank cannot have what it looks at, empty = it can; after the first worst-case graph
    std::string why_no_rank(const headkv_config & c) const;

    // the layer whose sums or states are in a tensor, -1 = those of none
    int32_t layer_of(const ggml_tensor * t) const;

    // The worst-case graph is not one that can be compressed; the creation of the context fails with it.
    [[noreturn]] void refuse(const std::string & why) const;

    // The worst-case graph of a ubatch: whether its layers can be cut apart, empty = they can.
    void note_layers(const std::string & why_not);

    // whether a worst-case graph went through the hooks for every layer with KV heads, each exactly once
    void note_graph(const std::vector<int32_t> & ils_built);
    bool is_graph_complete() const { return graph_complete; }

    //
    // for the batch that is being computed
    //

    headkv_pass * pass() { return the_pass.get(); }

    bool begin_step(const llama_ubatch & ubatch, bool layered); // tells the progress; false = abort
    bool next_step(const std::vector<llama_ubatch> & ubatches); // of the pass; false: it is complete or pauses
    bool begin_layer(); // before the current step of the pass, or while it waits for it: the cells that it finds are there
    bool begin_layer_beside(); // the same of what windowed and recurrent layers hold, before its first ubatch
    void note_rings(const llama_ubatch & ubatch, bool layered); // of a prompt that goes through windowed layers now
    void take_rings(); // what the last one has left there, for the archive
    void add_tokens(const llama_ubatch & ubatch, headkv_seq_event event);

private:
    friend class llama_kv_cache_ragged_update;

    const llama_model & model;
    const llama_hparams & hparams;
    headkv_config_ptr cfg;

    const uint32_t n_ctx_seq; // tokens of a sequence at most
    const llama_cparams & cparams; // of the context
    const ggml_type type_k;
    const ggml_type type_v;

    const headkv_layer_owners owners;
    const headkv_heads heads; // of the layers with KV heads
    std::vector<std::vector<uint32_t>> budgets; // [il][ih] window included, of long prompts

    std::vector<headkv_seq> seqs;

    headkv_staging the_staging;
    headkv_store the_store;
    headkv_store the_store_twin;
    std::unique_ptr<headkv_beside> the_beside;
    std::unique_ptr<headkv_queries> the_queries;

    std::unique_ptr<headkv_pass> the_pass; // the layer-major prompt in progress
    std::unique_ptr<headkv_compression> running;  // the compression in progress, of its layers or of one prompt

    std::unique_ptr<headkv_archive> the_archive;
    std::unique_ptr<headkv_archive_writer> writing; // what is compressed, on its way there
    std::vector<int32_t> archived_ils; // layers whose rows are in it, in its order
    headkv_ring_rows ring_rows; // of those that have windows
    int32_t n_lost_blocks = 0;
    headkv_archive_hit found; // for the batch that waits for an update, whose memory was sized by it

    // what was announced
    struct announced_t {
        llama_seq_id seq_id = -1;
        uint32_t n_tokens = 0;
        bool whole = false; // the next batch is a whole prompt
    };
    announced_t announced;
    uint32_t n_progress = 0; // tokens of the prompt, for the progress

    // what the next update has to do after compressions and longer tails, which are pending for their sequences
    struct wanted_t {
        uint32_t n_cells = 0; // of the staging
        uint32_t n_hidden = 0; // tokens of a prompt that is read layer by layer and not archived, 0 = it is not read so
    };
    wanted_t wanted;
    bool did_compress = false;

    bool graph_complete = false;
    std::string why_not_cut = "no graph was examined"; // into layers
    std::string token_major = why_not_cut;
    void choose_order();
    std::string broken; // an operation that has no answer was asked for; nothing is decoded until clear()

    int64_t t_compress = 0;
    int64_t n_compressions = 0;
    size_t n_bytes_peak = 0;

    progress_fn progress = nullptr;
    void * progress_data = nullptr;
    bool is_called_back = false; // the progress is being told: nothing may change
    int64_t t_pause = 0;

    llama_context * lctx = nullptr; // of the last update

    uint64_t adapters = 0; // fingerprint of those that are set, 0 = none
    limits_t limits;

    mutable uint64_t fingerprint = 0; // of what a saved cell depends on, 0 = not computed yet
    uint64_t get_fingerprint() const;

    std::string why_no_fit(const headkv_config & c) const; // empty = it is possible with the model

    std::vector<headkv_layer_shape> shapes() const;
    headkv_staging::params_t staging_params() const;
    bool reads_fused(const headkv_layer_shape & shape) const;
    bool masks() const; // attention of prompts is told by a mask in some layer
    void make_layers(headkv_store & store) const;
    void make_twin();
    void log_created() const;

    // prepares a batch; what it needs first is pending then, and it fails. All throw.
    llama_memory_context_ptr prepare(llama_batch_allocr & balloc, uint32_t n_ubatch);
    void check_usable() const;
    bool want_last_layers(const headkv_split & split); // prompts read layer by layer are compressed first; whether there are any
    bool want_tails(const headkv_split & split, bool resumed); // whether one is too short
    bool is_layered(const headkv_split & split, bool compresses) const; // whether a prompt is read layer by layer
    bool want_staging(const headkv_split & split, bool compresses, uint32_t n_hidden); // whether it has to be allocated

    std::vector<headkv_beside_context> prepare_beside(const headkv_split & split, bool layered) const; // throws

    bool end_layer(int32_t il); // all ubatches of the pass went through it
    void drop_unbegun(); // pass
    void drop_left_cells(); // of the staging, of batches that failed

    uint64_t archive_seed() const; // what its rows depend on besides tokens and adapters
    std::vector<llama_token> known_tokens(const headkv_split & split) const; // of its only prompt; empty = not all have an id
    headkv_archive_hit find_archived(const headkv_split & split, const std::vector<llama_token> & tokens) const;
    void take_archived(headkv_split & split, const headkv_archive_hit & hit, bool layered); // into the staging, out of the batch
    void restore_layer(const headkv_archive_hit & hit, int32_t il, uint32_t n_skip); // throws
    void begin_archiving(const headkv_seq & prompt);
    void restore_rings(const headkv_archive_hit & hit, llama_seq_id seq_id, llama_pos n_past, const std::vector<int32_t> & ils); // throws, and nothing has changed
    void archive_layer(int32_t il);
    bool archives_rings() const { return the_archive && the_beside; }
    std::vector<int32_t> windowed_ils() const;
    size_t archive_index(int32_t il) const; // archived_ils.size() = it is not there
    void end_archiving(const headkv_seq & compressed, bool counts); // a copy of a prompt does not

    void forget_updates();
    bool has_update() const;
    bool apply_update(llama_context * lctx);
    std::string for_tails() const; // what an update needs memory for
    std::string for_staging() const;
    void grow_tails(); // of the sequences whose n_tail_next says so, all at once; throws

    // headkv-generated.cpp
    void evict(llama_seq_id seq_id, uint32_t n_new); // generated tokens, before so many new ones; throws, and nothing is lost but what was dropped
    uint32_t n_held(llama_seq_id seq_id) const;
    bool has_two_ropes() const; // rotary factors for contexts of one length and for longer ones

    std::string why_not_dropped(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    bool compress_now(llama_seq_id seq_id);
    void begin_compression(llama_seq_id seq_id, llama_seq_id seq_id_dst); // throws
    void end_compression();
    void abort_compression();

    void drop_pass(llama_seq_id seq_id, bool gives_up); // a prompt that is read layer by layer; not given up: it may come again
    void drop_rows(llama_seq_id seq_id); // of the store
    void drop_beside(llama_seq_id seq_id); // what layers that are not ours hold
    uint32_t n_staged() const; // cells in use
    void release_idle(); // memory of the staging and of the store, where no sequence has any
    void note_peak();
};
