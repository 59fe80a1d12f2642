// The compression of one sequence: out of the staging and the ring, layer by layer, the cells that each KV head keeps, into
// the store. All or nothing: abort() gives back what it has written.
#pragma once

#include "headkv-expected.h"
#include "headkv-fit.h"
#include "headkv-policy.h"
#include "headkv-runner.h"
#include "headkv-seq.h"
#include "headkv-staging.h"
#include "headkv-store.h"

#include <cstdint>
#include <memory>
#include <vector>

class headkv_compression {
public:
    // seq: the prompt, with the id seq_id; dst: what it is compressed as, itself or an empty sequence.
    // Throws when queries, sums or cells of the prompt are missing, or the policy cannot give a budget.
    headkv_compression(llama_context * lctx, headkv_staging & staging, headkv_store & store, headkv_config_ptr cfg, const headkv_heads & heads,
            const headkv_seq & seq, llama_seq_id seq_id, llama_seq_id dst);

    void layer(headkv_store_layer & layer); // throws

    void abort(); // the store is as it was before

    // what dst is, when all layers went through; seq: the prompt
    headkv_seq finish(const headkv_seq & seq) const;

    const llama_seq_id seq_id;
    const llama_seq_id dst;

    const std::vector<int32_t> & cells_of_prompt() const { return cells; } // of the staging, in position order

    uint32_t n_tail() const { return n_tail_; }
    int64_t t_us() const { return t_us_; }
    size_t n_peak() const { return n_peak_; } // bytes of staging, store and scratch at most

private:
    struct work_t; // of one layer

    void score(work_t & w);
    void score_by_sums(work_t & w);
    void score_expected(work_t & w);
    bool score_fused(work_t & w);
    void score_composed(work_t & w);
    void pool_by_budget(work_t & w);
    void protect(work_t & w);
    void refine(work_t & w);
    void make_room(work_t & w);
    bool keep_fused(work_t & w);
    void keep_composed(work_t & w);
    void note_kept(work_t & w);
    void fit_values(work_t & w);
    void compensate(work_t & w); // writes the means of the cells that heads drop
    std::vector<float> number_values(work_t & w); // headkv_scored::values of the layer
    void output_columns(work_t & w, int64_t ih, ggml_tensor * t_columns, ggml_tensor * t_wo);
    void mean_value(work_t & w, int64_t ih, int64_t n_step, ggml_tensor * t_share, ggml_tensor * t_mean); // of what is ranked

    // keys or values of one head in position order, [n_embd_head_k or n_embd_head_v, n]
    ggml_tensor * head_cells(work_t & w, ggml_tensor * all, int64_t ih);

    void note_peak(size_t n_scratch);

    llama_context * lctx;
    headkv_staging & staging;
    headkv_store & store;
    const headkv_config_ptr cfg; // of all layers, whatever the context is configured to in between

    int64_t n;        // tokens of the prompt
    int64_t n_window; // the last ones, whose queries score
    int64_t n_recent; // the last ones, which every head keeps
    int64_t n_prefix; // the others
    uint32_t n_tail_;  // rows of each head that wait for generated tokens
    bool keep_all;

    std::vector<int32_t> slots; // of the ring, in position order
    std::vector<int32_t> cells; // of the staging, in position order
    bool contiguous;

    headkv_cells n_keep;      // [il][ih] prefix cells
    int64_t n_protected; // of them, of every head

    std::vector<double> tokens; // [n_prefix] what ranks note of them from layer to layer

    std::vector<float> scores; // [n_prefix] of a policy that does not look at the queries

    std::unique_ptr<headkv_expected> expected; // attention, if cells are ranked by it
    std::unique_ptr<headkv_values_fit> fit; // of the values, if they are fitted

    int64_t t_us_ = 0;
    size_t n_peak_ = 0;

    headkv_runner runner;
};

// [n_queries][n] of the last n_queries of n tokens
std::vector<ggml_fp16_t> headkv_causal_mask(int64_t n, int64_t n_queries);

// Queries of the group of a KV head in some slots of the ring, [n_embd_head_k, n_slots, n_group].
ggml_tensor * headkv_queries_of_head(ggml_context * ctx, ggml_tensor * ring, ggml_tensor * slots, const headkv_layer_shape & layer, int64_t ih);
