// Generated tokens that are bounded: the queries of the last ones, and what becomes of their cells when there are too many.
//
// While a sequence generates, the queries of its last tokens go to a ring, of every layer. When its tail is n_slack longer than it may
// be, its cells are scored by these queries as those of a prompt are, each head keeps as many as the policy's budget gives it, and the
// rows of these move to the front of the head's range. The tail begins with the last n_window tokens then, which all heads have.
// Positions stay what they were, and lengths are data of the graphs, so that these go on.
#pragma once

#include "headkv-config.h"
#include "headkv-policy.h"
#include "headkv-runner.h"
#include "headkv-seq.h"
#include "headkv-store.h"

#include <cstdint>
#include <map>
#include <vector>

// tokens that can be drafted and taken back without a query of the window being lost, which would delay an eviction
constexpr llama_pos HEADKV_N_DRAFT = 32;

// queries of the last generated tokens of each sequence
class headkv_queries {
public:
    headkv_queries(const std::vector<headkv_layer_shape> & shapes, llama_pos n_ring, uint32_t n_seq_max, bool no_alloc); // throws std::bad_alloc

    ggml_tensor * of_layer(int32_t il) const { return rings.at(il); } // F16 [n_embd_head_k*n_head, n_slots()]

    const std::map<int32_t, ggml_tensor *> & layers() const { return rings; }

    llama_pos n_ring() const { return n; } // queries of a sequence
    int64_t n_slots() const { return (int64_t) n * n_seq_max + 1; } // the last one takes what nobody needs

    size_t n_bytes() const;
    void add_to(std::map<ggml_backend_buffer_type_t, size_t> & breakdown) const;

private:
    struct buffer_t {
        ggml_context_ptr ctx;
        ggml_backend_buffer_ptr buf;
    };

    const llama_pos n;
    const uint32_t n_seq_max;
    std::map<ggml_backend_buffer_type_t, buffer_t> buffers;
    std::map<int32_t, ggml_tensor *> rings;
};

// Cells of each KV head before the last n_window tokens, [il][ih]. n_candidates: of a head that has lost none; n_prompt: cells per head
// on average that the prompt has of its own. Throws std::invalid_argument when the budget does not fit the layers.
headkv_cells headkv_generated_budget(const headkv_config & cfg, const headkv_generated & bound, const headkv_heads & heads,
        uint32_t n_prompt, int64_t n_candidates);

// Scores of the cells of one head that are near to others of it lose: share * s_j / sum(s) - (1 - share) * r_j with r = softmax of the
// mean cosine of key j to the others; of those that are nearer than 0.5 to key i, the last one does not count (R-KV).
//   cosine [n][n]
void headkv_rank_redundancy(float * scores, int64_t n, std::vector<float> cosine);

// one eviction: what is dropped is decided for all layers before anything moves
class headkv_eviction {
public:
    // n_most: cells that a head may hold afterwards. Throws when the queries are missing, memory is short, or a graph cannot be computed.
    headkv_eviction(llama_context * lctx, const headkv_queries & queries, headkv_store & store, const headkv_heads & heads,
            const headkv_seq & seq, llama_seq_id seq_id, uint32_t n_most);

    void apply(); // moves the rows of what stays; never fails

    void finish(headkv_seq & seq) const; // what the sequence is then, but for the rows of its tail

private:
    struct head_t {
        uint32_t first; // cells that compete: [first, end) of the range
        uint32_t end;
        std::vector<int32_t> rows; // of them and of the window, which stay; ascending, counted from first
        std::vector<int32_t> pos; // of the range, when the others are gone
    };

    void decide(headkv_store_layer & layer, const std::vector<int64_t> & n_keep);
    // [H][n_max], NaN behind the cells of a head
    std::vector<float> score(headkv_store_layer & layer, const std::vector<head_t> & of_layer, int64_t n_max, const std::vector<int64_t> & n_keep);
    void score_by_attention(headkv_store_layer & layer, const std::vector<head_t> & of_layer, int64_t n_max, std::vector<float> & scores);
    std::vector<float> cosines(const headkv_store_layer & layer, uint32_t row, int64_t n); // of the keys in n rows of the pool, [n][n]

    headkv_store & store;
    const headkv_queries & queries;
    const headkv_config & cfg;
    const headkv_generated bound;
    const uint32_t n_most;
    const llama_seq_id seq_id;
    const llama_pos n_pos;
    const llama_pos n_prompt;
    const llama_pos tail_begin;
    const std::vector<std::pair<int32_t, int32_t>> spans;
    const std::vector<int32_t> slots; // of the ring, in position order

    std::map<int32_t, std::vector<head_t>> heads; // by layer
    std::vector<uint8_t> raw; // rows on their way
    int64_t n_dropped = 0;

    headkv_runner runner;
};
