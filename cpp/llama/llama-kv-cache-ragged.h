#pragma once

#include "llama-adapter.h"
#include "llama-kv-cache.h"

#include "headkv-config.h"
#include "headkv-policy.h"
#include "headkv-store.h"

#include <array>
#include <functional>
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
//
//   EMPTY -- first token --> STAGED -- headkv_end_prompt() --> STORED -- seq_rm(all) --> EMPTY
//
// A prompt that is announced as a whole and comes in one batch is read layer by layer: all its ubatches go through layer
// il, that layer is compressed, and the next layer reuses its staging memory. The sequence is LAYERED in between: only
// its last layer is still staged, and it can do nothing but be compressed. The reading can be paused after any step and
// goes on when the same batch comes again; until then the sequence counts as empty, and others can be decoded.
//
// Sequences are independent of each other: some can be read while others are decoded, in one batch. Tokens of stored
// sequences share their ubatches. One sequence at a time is read layer by layer, and only while no other one is staged.
//
// Positions always are the logical ones. A stored sequence can be truncated as far as every head still has its last cells:
// those that are kept because they are recent.

class llama_kv_cache_ragged : public llama_memory_i {
public:
    llama_kv_cache_ragged(
            const llama_model & model,
                    ggml_type   type_k,
                    ggml_type   type_v,
          const llama_cparams & cparams,
            headkv_config_ptr   cfg);

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

    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // headkv-state.cpp
    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    // llama_kv_cache_ragged specific API

    enum state_t { EMPTY = 0, STAGED = 1, STORED = 2, LAYERED = 3 };

    struct seq_t {
        state_t   state    = EMPTY;
        llama_pos n_pos    = 0; // logical tokens
        llama_pos n_prompt = 0; // of them at compression; the rest was generated
        llama_pos n_whole  = 0; // last tokens of the prompt that every head kept
        uint32_t  n_tail   = 0; // rows reserved per head for generated tokens
        uint32_t  kv_size  = 0; // that it was compressed with
        std::vector<std::pair<int32_t, int32_t>> spans; // of its prompt before the last n_whole tokens, that every head kept as protected
        uint64_t  adapters = 0; // that its tokens were computed with, see note_adapters()

        // what the next update has to do
        llama_seq_id compress_to = -1; // compress it as this sequence, itself or an empty one
        uint32_t     n_tail_next = 0;  // rows reserved per head, 0 = enough

        std::vector<llama_pos> window; // [n_ring] position whose query is in a slot of the ring, -1 = none
        bool      has_sums = true; // the sums of attention are those of its tokens
    };

    // the adapters that the tokens to come are computed with; headkv-state.cpp
    void note_adapters(const llama_adapter_loras & loras, const llama_adapter_cvec & cvec);

    // why a STORED sequence is not what the parameters and the adapters that are set would have left, empty = it is
    std::string why_not_continued(llama_seq_id seq_id) const;

    // Limits of a sequence that is restored, 0 = only those of the context. See headkv_limit_restore().
    struct limits_t {
        int32_t kv_size     = 0;
        int32_t n_protected = 0;
        int32_t n_tokens    = 0;
    };
    void limit_restore(const limits_t & other) { limits = other; }

    // parameters for the compressions to come; throws std::invalid_argument
    void configure(headkv_config_ptr other);

    // announce the size of a sequence; whole: the next batch is a prompt from its first to its last token
    void reserve(llama_seq_id seq_id, uint32_t n_tokens, bool whole);

    // told (layer, layers, tokens, tokens of the prompt) before each step; false = abort
    using progress_fn = bool (*)(int32_t il, int32_t n_layer, int32_t i_token, int32_t n_tokens, void * user_data);
    void set_progress(progress_fn fn, void * user_data) { progress = fn; progress_data = user_data; }

    // The time (ggml_time_us) at which a layer-major batch pauses, one step or more after it was begun or resumed, and in any
    // case before its last step; 0 = it does not.
    void set_pause(int64_t t_us) { t_pause = t_us; }

    bool is_reading(llama_seq_id seq_id) const;
    int64_t n_steps_left(llama_seq_id seq_id, int64_t n_tokens, int64_t n_ubatch) const; // of its layer-major batch

    // why prompts are not read layer by layer, empty = they are
    const std::string & why_token_major() const { return token_major; }

    // compress a sequence now, as itself or as an empty one, and then it stays as it is; false: error() says why and nothing has changed
    bool compress(llama_context * lctx, llama_seq_id seq_id, llama_seq_id seq_id_dst);

    // put random data in place of a prompt
    bool fill(llama_context * lctx, llama_seq_id seq_id, uint32_t n_tokens, uint32_t seed);

    const std::string & error() const { return error_msg; }

    const headkv_config & config() const { return *cfg; }
    const seq_t & get_seq(llama_seq_id seq_id) const { return seqs.at(seq_id); }
    uint32_t n_seq_max() const { return (uint32_t) seqs.size(); }
    uint32_t n_ctx_seq_max() const { return n_ctx_seq; }
    llama_pos n_window_max() const { return n_ring; }

    int32_t n_head_kv_max() const;
    int32_t n_head_max() const;
    int32_t n_layer() const;

    const std::vector<uint32_t> & budget(int32_t il) const { return budgets[il]; }

    const headkv_store & get_store() const { return store; }

    size_t bytes_staging() const;
    size_t bytes_peak() const { return n_bytes_peak; } // of staging, hidden states, scratch and store during the last prompt
    size_t bytes_cell() const; // K and V of one token in all layers

    int64_t t_compress_us() const { return t_compress; }
    int64_t n_compress()    const { return n_compressions; }

    // attention of the last tokens of a staged sequence, see headkv_read_attention()
    bool read_attention(llama_context * lctx, llama_seq_id seq_id, int32_t n_queries, const std::vector<std::pair<int32_t, int32_t>> & spans,
            int32_t n_top, float * mass, int32_t * top);

    // rows converted to float; the number of rows, or -1 and error()
    int32_t read_window(llama_seq_id seq_id, int32_t il, float * dst, int64_t n) const;
    int32_t read_cells (llama_seq_id seq_id, int32_t il, int32_t ih, bool v, float * dst, int64_t n) const;

    // graph API, used by the hooks

    headkv_store_layer * layer(int32_t il) { return store.find(il); }

    ggml_tensor * get_ring(int32_t il) const; // null while nothing is staged
    int64_t n_slots() const; // rows of the ring, the last one takes what nobody needs
    ggml_tensor * get_sums(int32_t il, bool plan) const; // null = the policy does not need them

    bool has_fused() const; // any layer decodes with the fused op

    ggml_tensor * build_input_k_rot(ggml_context * ctx) const { return stage_plan->build_input_k_rot(ctx); }
    ggml_tensor * build_input_v_rot(ggml_context * ctx) const { return stage_plan->build_input_v_rot(ctx); }
    void set_input_k_rot(ggml_tensor * dst) const { stage_plan->set_input_k_rot(dst); }
    void set_input_v_rot(ggml_tensor * dst) const { stage_plan->set_input_v_rot(dst); }

    // layer-major prefill: the hidden states [n_embd, n_tokens] of the whole prompt, the causal mask of all ubatches
    ggml_tensor * get_hidden() const { return hidden; }
    ggml_tensor * get_band()   const { return band; }
    int64_t n_band() const { return ggml_backend_buffer_is_host(band->buffer) ? hidden->ne[1] : 0; }

    // why the policy cannot have the values that it needs, empty = it can; after the first worst-case graph
    std::string why_no_values(const headkv_config & c) const;

    // The worst-case graph is not one that can be compressed; the creation of the context fails with it.
    [[noreturn]] void refuse(const std::string & why) const;

    // The worst-case graph of a ubatch: decides whether its layers can be cut apart.
    void note_layers(const std::string & why_not) { token_major = why_not; }

    // whether a worst-case graph went through the hooks for every layer with KV heads, each exactly once
    void note_graph(const std::vector<int32_t> & ils_built);
    bool is_graph_complete() const { return graph_complete; }

private:
    friend class llama_kv_cache_ragged_context;
    friend class llama_kv_cache_ragged_update;

    const llama_model   & model;
    const llama_hparams & hparams;
    headkv_config_ptr cfg;

    llama_hparams hparams_plan; // no_alloc set

    const bool      offload;
    const uint32_t  n_ctx;     // cells of the staging at most
    const uint32_t  n_ctx_seq; // tokens of a sequence at most
    const llama_cparams & cparams; // of the context
    const ggml_type type_k;
    const ggml_type type_v;

    std::vector<std::vector<uint32_t>> budgets; // [il][ih] window included, of long prompts
    std::vector<int32_t> ils; // layers with KV heads

    std::vector<seq_t> seqs;

    // staging: the stock cache and the ring of window queries, only while a prompt is being read
    struct ring_t {
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
    };
    std::unique_ptr<llama_kv_cache> stage;
    std::unique_ptr<llama_kv_cache> stage_plan; // without memory, for worst-case graphs
    std::vector<ring_t>             rings;      // one per buffer type
    std::vector<ring_t>             rings_plan;
    std::vector<ggml_tensor *>      ring_of_layer, ring_of_layer_plan; // [il]

    // attention that each staged cell got from all queries, F32 [1, n_cells, n_head_kv]
    const bool                 with_sums;
    const llama_pos            n_ring; // queries of a sequence that a ring has room for
    std::vector<ring_t>        sums, sums_plan;
    std::vector<ggml_tensor *> sums_of_layer, sums_of_layer_plan; // [il]

    headkv_store store;
    headkv_store store_plan; // without memory

    // what was announced
    llama_seq_id reserved_seq = -1;
    uint32_t     want_reserve = 0;     // tokens
    bool         want_whole   = false; // the next batch is a whole prompt
    uint32_t     n_announced  = 0;     // tokens, for progress

    // what the next update has to do after compressions and longer tails, see seq_t
    uint32_t     want_stage   = 0; // cells
    bool         did_compress = false;

    bool        graph_complete = false;
    mutable std::string error_msg;
    std::string broken; // an operation that has no answer was asked for; nothing is decoded until clear()

    int64_t t_compress     = 0;
    int64_t n_compressions = 0;

    // layer-major prefill
    progress_fn   progress      = nullptr;
    void        * progress_data = nullptr;
    std::string   token_major   = "no graph was examined";
    bool          want_layered  = false; // the wanted staging is one layer
    bool          is_layered    = false; // what the staging is
    ring_t        hidden_buf;
    ggml_tensor * hidden = nullptr; // F32 or F16 [n_embd, n_tokens] of the whole prompt
    ggml_tensor * band   = nullptr; // F16 [n_band + n_ubatch + 256, n_ubatch], 0 up to column n_band + row, then -inf
    struct reading_t;
    std::unique_ptr<reading_t> reading; // the layer-major batch in progress
    int64_t       t_pause = 0;
    llama_context * lctx = nullptr; // of the last update
    size_t        n_bytes_peak = 0;

    struct compression; // of one sequence, in progress
    std::unique_ptr<compression> running;
    uint32_t n_tail_running() const;

    llama_memory_context_ptr prepare(llama_batch_allocr & balloc, uint32_t n_ubatch); // throws
    void alloc_hidden(uint32_t n_tokens);
    void note_peak(size_t n_scratch);
    void begin_compression(llama_seq_id seq_id, llama_seq_id seq_id_dst, headkv_config_ptr cfg); // throws
    std::string why_not_resumed(const std::vector<llama_ubatch> & ubatches) const; // empty = it is the batch in progress
    void compress_layer(headkv_store_layer & layer); // throws
    // writes the means of the cells that heads drop; cells: I32 [n], as for value_norms()
    void compensate(headkv_store_layer & layer, ggml_tensor * cells);
    // headkv_scored::values of the layer; cells: I32 [n], the staged cell of each position
    std::vector<float> value_norms(const headkv_store_layer & layer, ggml_tensor * cells);
    void end_compression();
    void abort_compression(); // the store is as it was before
    bool end_layer(int32_t il); // all ubatches of a layered prompt went through it

    headkv_heads heads() const; // of the layers with KV heads
    std::unique_ptr<llama_kv_cache> make_stage(uint32_t n_cells, bool plan, bool one_layer) const;
    // one tensor per layer, of the type F32; one_layer: layers of one shape share it
    void make_tensors(std::vector<ring_t> & bufs, std::vector<ggml_tensor *> & of_layer, bool plan, bool one_layer, const char * name,
            const std::function<std::array<int64_t, 3>(const headkv_store_layer &)> & shape) const;
    void make_rings(std::vector<ring_t> & rings, std::vector<ggml_tensor *> & of_layer, bool plan, bool one_layer) const;
    void make_sums (std::vector<ring_t> & bufs,  std::vector<ggml_tensor *> & of_layer, bool plan, uint32_t n_cells) const;

    void alloc_stage(uint32_t n_cells);
    void release_stage();
    void release_idle_stage();
    void release_idle_store(); // the pools go with the last sequence
    void forget_updates(); // what the next update has to do
    bool is_staged(llama_seq_id seq_id) const; // it has cells in the staging
    bool is_staging() const;                   // any sequence has
    uint32_t n_staged() const;                 // cells in use
    void grow_tails(); // of the sequences whose n_tail_next says so, all at once; throws
    bool has_update() const;
    bool apply_update(llama_context * lctx);
    bool compress_impl(llama_seq_id seq_id);
    void truncate_prompt(llama_seq_id seq_id, llama_pos p0);
    void drop_seq(llama_seq_id seq_id); // frees the rows of a sequence in the store; where memory is short, with those of the next one

    static constexpr uint64_t SEVERAL_ADAPTERS = 1; // one after the other
    uint64_t adapters = 0; // fingerprint of those that are set, 0 = none

    limits_t limits;

    mutable uint64_t fingerprint = 0; // of what a saved cell depends on, 0 = not computed yet
    uint64_t get_fingerprint() const;
    std::vector<llama_ubatch> merge_store(const std::vector<llama_ubatch> & ubatches) const;

    bool fail(const std::string & what) const;

    // cells of the staging in position order
    std::vector<int32_t> stage_cells(llama_seq_id seq_id) const;

    // slots of the ring in position order, empty when a query of the window is missing
    std::vector<int32_t> window_slots(llama_seq_id seq_id, llama_pos n_window) const;
};

// the memory of one llama_decode call: ubatches that go to the store, then ubatches that go to the staging
class llama_kv_cache_ragged_context : public llama_memory_context_i {
public:
    // used for errors
    llama_kv_cache_ragged_context(llama_memory_status status);

    // used to create a full-cache context
    llama_kv_cache_ragged_context(llama_kv_cache_ragged * kv);

    // used to create a batch processing context from a batch
    llama_kv_cache_ragged_context(
            llama_kv_cache_ragged * kv,
            std::vector<llama_ubatch> ubatches_store,
            std::vector<llama_ubatch> ubatches_stage,
            llama_kv_cache::slot_info_vec_t sinfos,
            bool layered);

    bool next()  override;
    bool apply() override;

    llama_memory_status  get_status() const override;
    const llama_ubatch & get_ubatch() const override;

    // llama_kv_cache_ragged_context specific API

    llama_kv_cache_ragged * get_kv() const { return kv; }

    // the graph to build: a full-cache context answers for both kinds
    bool is_full()  const { return full; }
    bool is_store() const { return !full && i_cur < ubatches_store.size(); }

    // layer-major: the current step takes the current ubatch through one layer
    bool    is_layered() const { return layered && !is_store(); }
    int32_t layer_step() const;
    int64_t token_step() const; // tokens of the prompt before the ubatch

    // stock context of the current ubatch in the staging
    const llama_kv_cache_context * get_stage() const;

    headkv_store_layer * get_layer(int32_t il) const;
    ggml_tensor * get_ring(int32_t il) const;
    ggml_tensor * get_sums(int32_t il) const { return kv->get_sums(il, full); }
    uint64_t generation() const;

    // positions (first row, number of rows) after the current ubatch, for all layers of the store in order
    void set_input_ranges(ggml_tensor * dst, const llama_ubatch * ubatch) const; // I32 [2, n_head_kv, n_seqs] per layer
    void set_input_bias  (ggml_tensor * dst, const llama_ubatch * ubatch) const; // F32 [n_head_kv, n_seqs] per layer
    void set_input_rows  (ggml_tensor * dst, const llama_ubatch * ubatch) const; // I32 [n_head_kv, n_tokens] per layer
    // F16 [n_kv, n_tokens, 1, n_heads]
    void set_input_mask  (ggml_tensor * dst, const headkv_store_layer & layer, size_t i_bucket, const llama_ubatch * ubatch) const;

    // which tokens of the ubatch go to which slots of the ring
    void set_input_window(ggml_tensor * tokens, ggml_tensor * slots, const llama_ubatch * ubatch) const;

private:
    llama_kv_cache_ragged * kv = nullptr;

    llama_memory_status status;

    bool full    = false;
    bool layered = false;

    size_t i_cur = 0; // ubatch, those of the store first; layer-major: kv->reading knows which one of the staging

    // one stock context per ubatch, each with the number of cells that its ubatch attends; layer-major: in kv->reading
    std::vector<std::unique_ptr<llama_kv_cache_context>> stage_ctxs;

    std::vector<llama_ubatch> ubatches_store;
    std::vector<llama_ubatch> ubatches_stage;

    size_t i_stage() const;

    // layer-major: the ubatches without outputs, for all layers but the last
    std::vector<llama_ubatch> ubatches_silent;
    std::vector<int8_t>       no_output;
};
