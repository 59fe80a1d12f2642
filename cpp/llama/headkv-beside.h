// The layers whose cells are not ours, beside those that are: windowed attention in upstream's ring, recurrent layers in
// upstream's states. Both keep as much of a sequence whatever its length, so there is nothing to compress.
//
// Every sequence has a ring of its own (a stream), and its recurrent state stays in the cell that it got: a prompt that is
// read layer by layer goes through the ring and the cells once per layer, and others can be decoded in between.
#pragma once

#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct llama_cparams;

// whose layers are whose; a layer can have attention and a recurrent state
struct headkv_layer_owners {
    std::vector<bool> ours;      // [il] global attention with KV heads
    std::vector<bool> windowed;  // [il]
    std::vector<bool> recurrent; // [il]
    std::vector<int32_t> shared; // [il] the layer whose cells it attends to because it has none of its own, -1 = it does not

    bool any_beside() const;
};

// As the memory has it that upstream makes for the model. Throws std::runtime_error with the reason where it is of a kind
// that has no K and V per head.
headkv_layer_owners headkv_owners_of(const llama_memory_i & memory, const llama_hparams & hparams);

// The same of a model that no context was made for yet. Throws with the reason where none can be compressed; headkv-hooks.cpp.
headkv_layer_owners headkv_owners_of_model(const llama_model & model);

// the contexts of one ubatch; what the model has not is null
struct headkv_beside_context {
    std::unique_ptr<llama_kv_cache_context> windowed;
    std::unique_ptr<llama_memory_recurrent_context> recurrent;

    bool apply() const;
};

class headkv_beside {
public:
    headkv_beside(const llama_model & model, const headkv_layer_owners & owners, ggml_type type_k, ggml_type type_v, const llama_cparams & cparams);

    headkv_beside_context full() const; // of worst-case graphs

    // Places for the ubatches, in the order in which they are computed. Throws when there are none.
    std::vector<headkv_beside_context> prepare(const std::vector<llama_ubatch> & ubatches) const;

    // Whether the next sequence of a ubatch can come after the one before it: their rings and states lie side by side.
    bool fits_behind(llama_seq_id before, llama_seq_id next) const;

    // A sequence is empty again, and its first tokens go through another layer.
    void rewind(llama_seq_id seq_id);

    // Removes what is at p0 and behind it, 0 = all. False and nothing has changed: what came before p0 is not there any more.
    bool remove(llama_seq_id seq_id, llama_pos p0);

    void clear();

    llama_pos pos_min(llama_seq_id seq_id) const; // the first position from which a sequence can be continued

    std::vector<uint8_t> save(llama_seq_id seq_id) const;
    void restore(llama_seq_id seq_id, const std::vector<uint8_t> & state); // throws

    //
    // rings; the cell of a position is the position modulo the size of a ring, as long as a sequence grows from empty
    //

    bool has_states() const { return recurrent != nullptr; }
    uint32_t n_ring() const { return windowed ? windowed->get_size() : 0; } // cells of a sequence
    uint32_t n_window() const { return n_swa; }
    llama_swa_type type_window() const { return swa_type; }

    bool is_in_order(llama_seq_id seq_id) const; // its cells are where they are expected

    // Positions [first, end) behind what is there are there too, as far as the ring would still have them; their rows are to be written.
    // Returns the first of these.
    llama_pos occupy(llama_seq_id seq_id, llama_pos first, llama_pos end);

    size_t n_bytes_row(int32_t il, bool v) const;
    int64_t n_row(int32_t il, bool v) const; // elements
    bool read_rows(int32_t il, bool v, llama_seq_id seq_id, llama_pos first, llama_pos end, uint8_t * dst) const; // false: not in order
    void write_rows(int32_t il, bool v, llama_seq_id seq_id, llama_pos first, llama_pos end, const uint8_t * src);

    int32_t layer_of_state(const ggml_tensor * t) const; // whose recurrent state is in a tensor, -1 = it is of no layer

    void add_to(std::map<ggml_backend_buffer_type_t, size_t> & breakdown) const;
    size_t n_bytes() const;

private:
    std::unique_ptr<llama_kv_cache> windowed;
    std::unique_ptr<llama_memory_recurrent> recurrent;
    const uint32_t n_swa;
    const llama_swa_type swa_type;

    llama_pos pos_min_windowed(llama_seq_id seq_id) const;

    // of the rows of positions [first, end): where they are, in pieces that lie together
    using piece_fn = std::function<void(ggml_tensor * t, size_t offset, size_t i_byte, size_t n_bytes)>;
    void each_piece(int32_t il, bool v, llama_seq_id seq_id, llama_pos first, llama_pos end, const piece_fn & tell) const;
};
