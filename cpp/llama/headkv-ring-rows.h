// K and V that windowed layers had of a prompt, on their way to the archive: a ring forgets them before the prompt has ended. They are in
// host memory, of one layer while a prompt is read layer by layer, of all of them in upstream's order.
#pragma once

#include "headkv-beside.h"

#include <array>
#include <cstdint>
#include <map>
#include <vector>

class headkv_ring_rows {
public:
    // Forgets all; these layers have rows from position first on, of which those before end are put there now, and others come later.
    void begin(llama_seq_id seq_id, llama_pos first, llama_pos end, const std::vector<int32_t> & ils);
    void put(int32_t il, bool v, std::vector<uint8_t> rows);
    void forget();

    // The rows of positions [begin, end) are being computed, and in the ring until take() is called. They are ignored unless they come next.
    void expect(llama_seq_id seq_id, llama_pos begin, llama_pos end);
    void take(headkv_beside & beside); // what is expected

    void cut(llama_seq_id seq_id, llama_pos p0); // what is at p0 and behind it is removed

    bool is_of(llama_seq_id other) const { return seq_id >= 0 && seq_id == other; }
    bool expects() const { return n_pos > n_taken; }
    llama_pos first() const { return n_first; }
    llama_pos end() const { return n_pos; }

    // Rows of a layer. Throws std::runtime_error when they are not there.
    void read(int32_t il, bool v, llama_pos first, uint32_t n_rows, uint8_t * dst, size_t n_bytes) const;

    size_t n_bytes() const;

private:
    llama_seq_id seq_id = -1; // -1 = none
    llama_pos n_first = 0;
    llama_pos n_taken = 0; // first position that is still to be taken
    llama_pos n_pos = 0;   // first one that is not expected yet
    std::map<int32_t, std::array<std::vector<uint8_t>, 2>> of_layer; // K, V
};
