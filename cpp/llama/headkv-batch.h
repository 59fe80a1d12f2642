// One llama_decode() call: its ubatches, in the order in which they are computed, and what their graphs are told.
#pragma once

#include "llama-kv-cache.h"

#include "headkv-archive.h"
#include "headkv-beside.h"
#include "headkv-config.h"
#include "headkv-seq.h"
#include "headkv-store.h"

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

class llama_kv_cache_ragged;

// the tokens of a batch, in ubatches of one sequence each
struct headkv_split {
    std::vector<llama_ubatch> to_store;   // of compressed sequences
    std::vector<llama_ubatch> to_staging; // of prompts
    std::map<llama_seq_id, uint32_t> n_new; // tokens of each sequence

    uint32_t n_staging() const; // tokens
    std::vector<llama_token> tokens_to_staging() const; // those that have an id
    uint32_t n_silent() const; // first tokens of prompts without an output

    // Leaves out the first n tokens of its only prompt, whose cells come from the archive.
    void drop(uint32_t n);
    uint32_t n_left(uint32_t n) const; // tokens that this leaves of the ubatch that it cuts; a lot if it cuts none
    uint32_t n_outputs() const; // of prompts
};

// Throws when a token belongs to several sequences or has several positions; false: upstream could not split it.
bool headkv_split_batch(headkv_split & res, llama_batch_allocr & balloc, uint32_t n_ubatch, const std::function<bool(llama_seq_id)> & is_stored);

// The fused op attends for all sequences of a ubatch at once, the composed path for one. Sequences with as many tokens
// share a ubatch of at most n_ubatch if each fits behind the one before it; a sequence keeps the order of its own ubatches.
std::vector<llama_ubatch> headkv_merge(const std::vector<llama_ubatch> & ubatches, uint32_t n_ubatch,
        const std::function<bool(llama_seq_id before, llama_seq_id next)> & fits_behind);

// upstream reads the outputs in the order in which the ubatches are computed
void headkv_order_outputs(llama_batch_allocr & balloc, const std::vector<llama_ubatch> & first, const std::vector<llama_ubatch> & second);

// A layer-major pass over a prompt: all its ubatches go through one layer after the other. It can wait after any step, and
// goes on when the same batch comes again.
struct headkv_pass {
    llama_seq_id seq_id;
    std::vector<llama_token> tokens; // of the whole prompt
    headkv_archive_hit archived; // of the first ones, whose cells are restored layer by layer
    int64_t n_tokens; // of the whole prompt

    std::vector<std::unique_ptr<llama_kv_cache_context>> staging_ctxs; // of its ubatches
    std::vector<headkv_beside_context> beside_ctxs; // same; empty = all layers are ours

    bool begun = false;
    bool paused = false;
    int32_t i_layer = 0;
    size_t i_ubatch = 0;
    int64_t i_token; // tokens before the ubatch
    int32_t i_ready = -1; // layer whose cells before the first ubatch are there

    headkv_pass(llama_seq_id seq_id, llama_kv_cache & cache, const std::vector<llama_ubatch> & ubatches,
            const llama_kv_cache::slot_info_vec_t & sinfos, std::vector<headkv_beside_context> beside, std::vector<llama_token> tokens, headkv_archive_hit archived);

    uint32_t n_archived() const { return archived.n_tokens; }

    void advance(const std::vector<llama_ubatch> & ubatches); // to the next step

    bool is_last_step(int32_t n_layer) const { return i_layer == n_layer - 1 && i_ubatch == staging_ctxs.size() - 1; }

    // why a batch is not the one that it waits for; empty = it is
    std::string why_not_resumed(const headkv_split & split, int32_t n_layer) const;
};

// the memory of one llama_decode call: ubatches that go to the store, then ubatches that go to the staging
class llama_kv_cache_ragged_context : public llama_memory_context_i {
public:
    // used for errors
    llama_kv_cache_ragged_context(llama_memory_status status);

    // used to create a full-cache context
    llama_kv_cache_ragged_context(llama_kv_cache_ragged * kv);

    // used to create a batch processing context from a batch; layered: its prompt is the pass of the cache
    // beside: of the ubatches to the store and then, unless layered, of those to the staging
    llama_kv_cache_ragged_context(
            llama_kv_cache_ragged * kv,
            headkv_split split,
            llama_kv_cache::slot_info_vec_t sinfos,
            std::vector<headkv_beside_context> beside,
            bool layered);

    bool next() override;
    bool apply() override;

    llama_memory_status get_status() const override;
    const llama_ubatch & get_ubatch() const override;

    // llama_kv_cache_ragged_context specific API

    llama_kv_cache_ragged * get_kv() const { return kv; }

    // the graph to build: a full-cache context answers for both kinds
    bool is_full() const { return full; }
    bool is_store() const { return !full && i_cur < to_store.size(); }

    // layer-major: the current step takes the current ubatch through one layer
    bool is_layered() const { return layered && !is_store(); }
    int32_t layer_step() const;
    int64_t token_step() const; // tokens of the prompt before the ubatch
    int64_t hidden_step() const; // of them, those that are not archived

    // stock context of the current ubatch in the staging
    const llama_kv_cache_context * get_staging() const;

    // contexts of the current ubatch for the layers that are not ours, if there are any
    const headkv_beside_context & get_beside() const;

    headkv_store_layer * get_layer(int32_t il) const;
    ggml_tensor * get_ring(int32_t il) const;
    ggml_tensor * get_sums(int32_t il) const;
    uint64_t generation() const;

    // positions (first row, number of rows) after the current ubatch, for all layers of the store in order
    void set_input_ranges(ggml_tensor * dst, const llama_ubatch * ubatch) const; // I32 [2, n_head_kv, n_seqs] per layer
    void set_input_pos(ggml_tensor * dst, const llama_ubatch * ubatch) const; // with ALiBi
    void set_input_bias(ggml_tensor * dst, const llama_ubatch * ubatch) const; // F32 [n_head_kv, n_seqs] per layer
    void set_input_rows(ggml_tensor * dst, const llama_ubatch * ubatch) const; // I32 [n_head_kv, n_tokens] per layer
    // F16 [n_kv, n_tokens, 1, n_heads]
    void set_input_mask(ggml_tensor * dst, const headkv_store_layer & layer, size_t i_bucket, const llama_ubatch * ubatch) const;

    // the cells of the ubatch's sequence in the order of positions, and which of them each token sees, see headkv-attend-prompt.h
    void set_input_cells(ggml_tensor * cells, ggml_tensor * seen, const llama_ubatch * ubatch) const;

    // which slots the queries of generated tokens go to, I64 [n_tokens]
    void set_input_queries(ggml_tensor * slots, const llama_ubatch * ubatch) const;

    // which tokens of the ubatch go to which slots of the ring
    void set_input_window(ggml_tensor * tokens, ggml_tensor * slots, const llama_ubatch * ubatch) const;

private:
    llama_kv_cache_ragged * kv = nullptr;

    llama_memory_status status;

    bool full = false;
    bool layered = false;

    size_t i_cur = 0; // ubatch, those of the store first; layer-major: the pass knows which one of the staging

    // one stock context per ubatch, each with the number of cells that its ubatch attends; layer-major: in the pass
    std::vector<std::unique_ptr<llama_kv_cache_context>> staging_ctxs;

    std::vector<headkv_beside_context> beside_ctxs; // of all ubatches; layer-major: those of the staging are in the pass

    std::vector<llama_ubatch> to_store;
    std::vector<llama_ubatch> to_staging;

    size_t i_staging() const;

    // layer-major: the ubatches without outputs, for all layers but the last
    std::vector<llama_ubatch> silent;
    std::vector<int8_t> no_output;
};
