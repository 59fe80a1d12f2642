// The staging: full K and V of the prompts that are being read, in a stock cache, and what is noted beside them: the
// queries of the last tokens (ring) and of tokens all over (references), attention sums, and the hidden states between the layers of a layer-major prompt.
// It is there only while a prompt is read, and has a twin without memory for worst-case graphs.
#pragma once

#include "llama-kv-cache.h"

#include "headkv-store.h"

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

class headkv_staging {
public:
    struct params_t {
        ggml_type type_k;
        ggml_type type_v;
        bool offload;
        uint32_t n_ctx;      // cells at most
        uint32_t n_seq_max;
        llama_pos n_ring;     // queries of a sequence that the ring has room for
        int64_t n_refs;      // references of a sequence, 0 = none
        bool with_sums;  // attention that each cell got from all queries is summed
        bool hidden_f16; // hidden states in f16
        bool with_mask;  // a layer attends with a mask
    };

    // shapes: of the layers with KV heads; shared: [il] the layer whose cells another one attends to, -1 = its own or none.
    // The twin is made at once.
    headkv_staging(const llama_model & model, const params_t & params, std::vector<headkv_layer_shape> shapes, std::vector<int32_t> shared);

    // Makes room for n_tokens. keep: the cells that are there move over, else the old memory goes before the new one comes.
    // n_hidden: for the prompt of a layer-major pass of ubatches of n_ubatch tokens, whose layers share it, and of which so
    // many tokens are computed; 0 = for all layers.
    // Throws when memory is short; what was there and is kept is as before then.
    void alloc(uint32_t n_tokens, bool keep, uint32_t n_hidden, int64_t n_ubatch);
    void release();

    bool is_one_layer() const { return one_layer; }

    // whether n_tokens fit as they are to be read
    bool fits(uint32_t n_tokens, uint32_t n_hidden) const;

    uint32_t n_cells() const { return live.cache ? live.cache->get_size() : 0; }

    llama_kv_cache & cache() { return *live.cache; }
    llama_kv_cache & twin() { return *plan.cache; }

    ggml_tensor * rows(int32_t il, bool v) const; // K or V of a layer, [n_embd_head_k or n_embd_head_v*n_head_kv, n_cells]
    ggml_tensor * ring(int32_t il, bool of_twin = false) const; // F32 [n_embd_head_k*n_head, n_slots()], null while nothing is staged
    ggml_tensor * refs(int32_t il, bool of_twin = false) const; // F16 [n_embd_head_k, n_head_kv*n_ref_slots()], null unless there are references
    ggml_tensor * sums(int32_t il, bool of_twin = false) const; // F32 [1, n_cells, n_head_kv], null unless attention is summed

    int64_t n_slots() const { return (int64_t) params.n_ring * params.n_seq_max + 1; } // rows of the ring, the last one takes what nobody needs
    bool has_mask() const { return params.with_mask; }
    llama_pos n_ring() const { return params.n_ring; }
    int64_t n_ref_slots() const { return params.n_refs * params.n_seq_max + 1; } // same
    int64_t n_refs() const { return params.n_refs; }

    // layer-major: the hidden states of the tokens that are computed, F32 or F16 [n_embd, n_hidden]; null else
    ggml_tensor * hidden() const { return t_hidden; }

    // layer-major: the causal mask of all ubatches, F16 [n_band + n_ubatch + 256, n_ubatch], 0 up to column n_band + row, then -inf;
    // with ALiBi the distance to that column, negated, instead of 0; null = nobody needs it
    ggml_tensor * band() const { return t_band; }
    int64_t n_band() const { return n_before; }

    std::vector<int32_t> cells_of(llama_seq_id seq_id, llama_pos n_pos) const; // cell of each position, -1 = none

    // Marks cells [first, end) as those of the same positions. Throws if they are not free or not next.
    void occupy(llama_seq_id seq_id, uint32_t first, uint32_t end);

    size_t n_bytes() const; // as allocated
    int64_t hidden_bytes(int64_t n_tokens, int64_t n_ubatch, bool f16) const; // of hidden states and mask, where there is one, of such a prompt
    void add_to(std::map<ggml_backend_buffer_type_t, size_t> & breakdown) const; // of K, V, queries and sums

    // changes whenever memory is replaced, so that graphs over the old one are not reused
    uint64_t generation = 1;

private:
    struct buffer_t {
        ggml_context_ptr ctx;
        ggml_backend_buffer_ptr buf;
    };

    // one tensor per layer, in one buffer per type of memory
    struct tensors_t {
        std::vector<buffer_t> buffers;
        std::vector<ggml_tensor *> of_layer; // [il], empty = there are none
    };

    struct parts_t {
        std::unique_ptr<llama_kv_cache> cache;
        tensors_t rings;
        tensors_t refs;
        tensors_t sums;
    };

    const llama_model & model;
    const llama_hparams & hparams;
    llama_hparams hparams_plan; // no_alloc set
    const params_t params;

    const std::vector<headkv_layer_shape> shapes;
    const std::vector<int32_t> shared;

    parts_t live;
    parts_t plan; // the twin

    bool one_layer = false;
    buffer_t hidden_buf;
    ggml_tensor * t_hidden = nullptr;
    ggml_tensor * t_band = nullptr;
    int64_t n_before = 0;

    std::unique_ptr<llama_kv_cache> make_cache(uint32_t n_cells, bool is_plan, bool one_layer) const;
    // share: layers of one shape share a tensor
    tensors_t make_tensors(const char * name, ggml_type type, bool is_plan, bool share, const std::function<std::array<int64_t, 3>(const headkv_layer_shape &)> & shape) const;
    tensors_t make_rings(bool is_plan, bool share) const;
    tensors_t make_refs(bool is_plan, bool share) const;
    tensors_t make_sums(bool is_plan, uint32_t n_cells) const;

    int64_t n_columns(int64_t n_tokens, int64_t n_ubatch) const; // of the mask
    void alloc_hidden(uint32_t n_tokens, uint32_t n_hidden, int64_t n_ubatch);
    void release_hidden();
    void copy_to(llama_kv_cache & cache, const tensors_t & sums) const;
};

// Marks a cell of a cache as the one of a position.
void headkv_occupy_cell(llama_kv_cache & cache, uint32_t i_cell, llama_seq_id seq_id, llama_pos pos);

// K or V of a layer of a cache, all of its cells. Upstream hands out K as it is stored and V as a view.
ggml_tensor * headkv_rows_of(const llama_kv_cache & cache, int32_t il, bool v);
