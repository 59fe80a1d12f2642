// The inputs of a graph: of the layers that are ours, and what the files of graphs share of them.
#pragma once

#include "headkv-batch.h"
#include "headkv-store.h"

#include "llama-graph.h"

#include <map>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

// what the names of attention masks begin with
constexpr const char * HEADKV_MASK_NAME = "attn_inp_kq_mask";

class headkv_input : public llm_graph_input_attn_kv {
public:
    headkv_input(const llama_hparams & hparams, const llama_cparams & cparams, const llama_kv_cache_ragged_context * mctx, bool store);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    // the ubatch's share of a packed input that belongs to the layer
    ggml_tensor * rows_of_layer(const llm_graph_context & gctx, const headkv_store_layer & layer);
    ggml_tensor * ranges_of_layer(const llm_graph_context & gctx, const headkv_store_layer & layer);
    ggml_tensor * bias_of_layer(const llm_graph_context & gctx, const headkv_store_layer & layer);
    ggml_tensor * pos_of_layer(const llm_graph_context & gctx, const headkv_store_layer & layer);

    // An input in the memory of the layer's device: copied there once, not piece by piece for every layer.
    ggml_tensor * on_device(const llm_graph_context & gctx, ggml_tensor * input, const headkv_store_layer & layer);

    const llama_kv_cache_ragged_context * mctx_ragged;

    const bool store;
    const uint64_t generation;

    // prompt: which tokens of the ubatch go to which slots of the window
    ggml_tensor * tokens = nullptr; // I32 [n]
    ggml_tensor * slots = nullptr; // I64 [n]
    struct refs_t {
        ggml_tensor * rows; // I32 [n], see headkv_build_refs()
        ggml_tensor * slots; // I64 [n]
    };
    std::map<std::pair<int32_t, int32_t>, refs_t> refs; // of layers with so many query and KV heads
    ggml_tensor * banded = nullptr; // the mask, if it is a window into the band
    ggml_tensor * cells = nullptr; // I32 [cells of the staging], see headkv-attend-prompt.h; null = no layer takes them
    ggml_tensor * seen = nullptr; // I32 [2, n_tokens], same

    // decode: where the new rows go and what each head sees, all layers one after the other
    ggml_tensor * rows = nullptr; // I32, per layer [n_head_kv, n_tokens]
    ggml_tensor * ranges = nullptr; // I32, per layer [2, n_head_kv, n_seqs]
    ggml_tensor * bias = nullptr; // F32, per layer [n_head_kv, n_seqs], of the first row; null = no head has one
    ggml_tensor * pos = nullptr; // F32, per layer [n_rows], see headkv-attend.h; null = no ALiBi
    ggml_tensor * queries = nullptr; // I64 [n_tokens], slots of the queries; null = they are not kept
    std::unordered_map<int32_t, int64_t> first_head; // of a layer, counted over all layers
    std::unordered_map<int32_t, int64_t> first_row; // the same of the pools, with ALiBi
    int64_t n_head_kv_all = 0;
    uint32_t n_seqs = 0;
    llama_seq_id seq = 0; // the first one; the composed path attends for one

    struct mask_t {
        ggml_tensor * mask;
        int32_t il;
        size_t i_bucket;
    };
    struct order_t {
        ggml_tensor * tensor;
        std::vector<int32_t> values;
    };
    std::vector<mask_t> masks;
    std::vector<order_t> orders;

    std::map<std::pair<ggml_tensor *, ggml_backend_buffer_type_t>, ggml_tensor *> copies; // see on_device()

    std::vector<int32_t> ils_built; // layers whose attention went through the hook
};

// a tensor that the input of a graph fills
ggml_tensor * headkv_new_input_1d(ggml_context * ctx, ggml_type type, int64_t n, const char * name);

// the input of the layers that are ours; null = the memory of the graph is not ours
std::unique_ptr<llm_graph_input_attn_kv> headkv_new_input(const llm_graph_context & gctx);
