// The store: one pool of K rows and one of V rows per layer, in which every (sequence, KV head) owns
// a range of consecutive rows: [kept cells in position order: of the prompt, of generated tokens | the tail: generated tokens
// that all heads have | free rows].
#pragma once

#include "ggml.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

#include "headkv-attend.h"

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

// the rows of one KV head of one sequence in the pools of its layer
struct headkv_range {
    uint32_t off = 0; // first row
    uint32_t n_kept = 0; // cells before the tail
    uint32_t n_cap = 0; // rows owned; those behind n_kept are for the tail
    std::vector<int32_t> pos; // [n_kept] positions, ascending; the first one is -1 if its cell stands for all that are missing

    bool compensates() const { return !pos.empty() && pos[0] < 0; }

    uint32_t n_used(int32_t n_in_tail) const { return n_kept + n_in_tail; } // rows that hold data
};

// what the heads of a sequence shall own: n_kept + n_tail rows each; no heads: it is removed
struct headkv_rows {
    std::vector<uint32_t> n_kept;
    uint32_t n_tail = 0;
    std::vector<uint32_t> n_used; // rows of each head that hold data now, empty = none
};

// consecutive heads (in storage order) that the composed path attends with one call
struct headkv_bucket {
    uint32_t off = 0; // first row of the first head
    uint32_t cap = 0; // rows from head to head
    uint32_t n_kv = 0; // cells that the view of each head spans, may overlap the next head
    std::vector<int32_t> heads;
};

// what a layer with KV heads caches, and where
struct headkv_layer_shape {
    int32_t il = 0;
    int32_t n_head = 0;
    int32_t n_head_kv = 0;
    int32_t n_embd_head_k = 0; // and of its queries
    int32_t n_embd_head_v = 0;
    ggml_type type_k = GGML_TYPE_F16;
    ggml_type type_v = GGML_TYPE_F16;
    ggml_backend_buffer_type_t buft = nullptr;

    int64_t n_group() const { return n_head / n_head_kv; }

    size_t n_bytes_cell() const; // K and V of one token
};

// how the graph rotates queries by their positions, see headkv_rope_of()
struct headkv_rope {
    bool is_known = false;
    std::array<int32_t, 16> params = {}; // of GGML_OP_ROPE, but that lengths stay
    ggml_tensor * factors = nullptr; // of its frequencies, or null

    bool operator==(const headkv_rope & other) const { return is_known == other.is_known && params == other.params && factors == other.factors; }
};

struct headkv_store_layer : headkv_layer_shape {
    bool fused = false; // decode with the fused op, else composed of ggml ops
    bool fused_prompt = false; // same, while a prompt is read

    ggml_context_ptr ctx;
    ggml_backend_buffer_ptr buf;
    ggml_tensor * k = nullptr; // [n_embd_head_k, n_rows]
    ggml_tensor * v = nullptr; // [n_embd_head_v, n_rows]

    std::vector<std::vector<headkv_range>> ranges;  // [seq][head], empty = the sequence is not in the store
    std::vector<std::vector<headkv_bucket>> buckets; // [seq], composed path only

    std::unique_ptr<headkv_attend_state> attend;

    // output matrix [n_embd_head_v*n_head, n_embd] and its scale, as the graph applies them to the attention; null = it does not
    ggml_tensor * wo = nullptr;
    ggml_tensor * wo_s = nullptr;

    headkv_rope rope;

    ggml_tensor * sinks = nullptr; // F32 [n_head] of its attention, see headkv-stages.h; null = it has none
};

class headkv_store {
public:
    std::vector<headkv_store_layer> layers; // only layers with KV heads

    // tensors without memory, for worst-case graphs
    bool no_alloc = false;

    // changes whenever a pool is replaced, so that graphs over old pools are not reused
    uint64_t generation = 1;

    headkv_store_layer * find(int32_t il); // null = it has no KV heads
    const headkv_store_layer * find(int32_t il) const;

    // Replaces the pools of a layer by ones in which the heads of some sequences own other rows, and those of all others what
    // they have now. Rows that survive are copied. Throws std::bad_alloc and leaves the layer as it was when memory is short.
    void relayout(headkv_store_layer & layer, const std::map<int32_t, headkv_rows> & changes, uint32_t n_buckets);

    // Frees the rows of sequence s. Never fails: where memory is too short for smaller pools, the rows go with the next relayout.
    void remove(int32_t s, uint32_t n_buckets);

    bool has(int32_t s) const; // any layer has rows of it

    uint32_t n_tail(int32_t s) const; // rows behind its kept cells that every head of a sequence has

    // Lets go of the last n prompt cells of every head of sequence s: their rows wait for generated tokens.
    void cut(int32_t s, uint32_t n);

    bool has_fused() const; // any layer decodes with the fused op
    bool is_all_fused() const;
    bool has_fused_prompt() const; // same, of prompts

    void clear(); // frees all pools

    size_t n_bytes() const; // as allocated

    bool compensates() const; // any range does
};

// Cuts heads, sorted by n_rows ascending, into at most n_buckets runs with the least padding.
// Returns the sizes of the runs.
std::vector<uint32_t> headkv_bucket_sizes(const std::vector<uint32_t> & n_rows_sorted, uint32_t n_buckets);

// Moves some of the rows of a 2-d tensor, [first + rows[i]], to its rows from first on; rows ascend. raw: room for all up to the last one,
// where the tensor is not in host memory.
void headkv_gather_rows(ggml_tensor * t, uint32_t first, const std::vector<int32_t> & rows, std::vector<uint8_t> & raw);

// copies rows of one 2-d tensor into another one of the same type and row length, on whatever device they are
void headkv_copy_rows(ggml_tensor * src, uint32_t off_src, ggml_tensor * dst, uint32_t off_dst, uint32_t n_rows);
