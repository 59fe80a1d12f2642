// The archive: K and V of prompts as they were read, so that a prompt that begins like an earlier one is read from where it differs.
//
// It is made of blocks of 256 tokens, all layers of them, and for the end of a prompt one of 64, 128 or 192, which goes when
// the whole one comes. A block is named PARENT-OWN, by a chain of checksums over what its rows depend on and over all tokens
// up to its beginning and up to its end, which it also holds: two prompts share the blocks of what they share, of the first one in
// which they differ the tokens before that, and no name is believed. What is not exactly the block that is asked for is no block
// and is removed. Rows are what the staging holds (K behind the rotary embedding, quantised values rotated), or of another type.
// All integers as they are in memory:
//
//   header   u32 magic, version, tokens of it, layers; u64 seed; u64 tokens up to its end; char model[64];
//            of each layer i64 bytes of K, of V; i32 tokens[]; u64 checksum of all that
//   of each layer: rows of K, rows of V, u64 checksum, which begins with that of the header and the number of the layer
#pragma once

#include "headkv-blocks.h"
#include "headkv.h"

#include "ggml.h"
#include "llama.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

constexpr uint32_t HEADKV_N_BLOCK = 256; // tokens of a block
constexpr uint32_t HEADKV_N_STEP = 64; // so many are used at a time, and left to compute at least: attention of fewer rounds in another way

// what the rows depend on besides the tokens, and of which layers they are
struct headkv_archive_layout {
    struct layer_t {
        ggml_type type_k; // as staged
        ggml_type type_v;
        int64_t n_k; // elements of a row
        int64_t n_v;
    };
    uint64_t seed = 0;
    std::string model; // for people
    std::vector<layer_t> layers;
    ggml_type type = GGML_TYPE_COUNT; // that rows are archived as, GGML_TYPE_COUNT = that of the staging

    ggml_type kept_as(ggml_type staged) const { return type == GGML_TYPE_COUNT ? staged : type; }
    size_t n_bytes(size_t i_layer, bool v) const; // a row, as it is kept
    size_t n_bytes_staged(size_t i_layer, bool v) const;
    size_t n_bytes_section(size_t i_layer, uint32_t n_rows) const; // rows of a layer and their checksum
    size_t n_bytes_block(uint32_t n_tokens, uint32_t n_rows) const; // header and rows of the block that ends there
    size_t offset(size_t i_layer, uint32_t n_tokens, uint32_t n_rows) const; // of the rows of a layer in it
};

// the blocks of the first tokens of a prompt, up to the first one that is not there
struct headkv_archive_hit {
    struct block_t {
        std::string name;
        uint64_t sum; // of its header
        uint32_t n_tokens; // up to its end
        uint32_t n_rows; // tokens of it
    };
    std::vector<block_t> blocks;
    uint32_t n_tokens = 0; // that are used; the last block may have more

    void cut(uint32_t n); // to n tokens
};

class headkv_archive {
public:
    headkv_archive(std::unique_ptr<headkv_blocks> blocks, int64_t max_bytes, headkv_archive_layout layout);

    // What is there of the first n_max tokens, computed with these adapters; tokens: those behind them too.
    headkv_archive_hit find(const std::vector<llama_token> & tokens, uint32_t n_max, uint64_t adapters);

    // Tells the rows [n_skip, hit.n_tokens) of a layer, as they were staged, from the first one on.
    // Throws std::runtime_error when a block is damaged or gone; it is removed then.
    using take_fn = std::function<void(bool v, uint32_t first, uint32_t n_rows, const uint8_t * rows)>;
    void restore(const headkv_archive_hit & hit, size_t i_layer, uint32_t n_skip, const take_fn & take);
    void will_restore(const headkv_archive_hit & hit, size_t i_layer, uint32_t n_skip) const;

    const headkv_archive_stats & stats() const { return numbers; }
    void note_prompt(uint32_t n_restored, uint32_t n_computed);

private:
    friend class headkv_archive_writer;

    const std::unique_ptr<headkv_blocks> blocks;
    const headkv_archive_layout layout;
    headkv_archive_stats numbers = {};
    std::string last_failure;

    struct named_t {
        std::string name;
        std::vector<uint8_t> header;
        uint64_t sum;
    };
    named_t next_block(uint64_t & chain, const std::vector<llama_token> & tokens, uint32_t n_tokens, uint32_t n_rows) const;
    bool has(const named_t & block, uint32_t n_tokens, uint32_t n_rows); // what is there under the name and is not it is removed
    struct partial_t {
        headkv_archive_hit::block_t block;
        uint32_t n_common = 0; // tokens of it that the prompt begins with behind n_before, 0 = there is none
    };
    partial_t find_partial(uint64_t chain, const std::vector<llama_token> & tokens, uint32_t n_before);
    uint64_t begin_chain(uint64_t adapters) const;

    void touch(const std::vector<std::string> & chain); // the first one is used last: they go from the end
    void make_room(int64_t n_bytes, const std::vector<std::string> & chain); // removes others until there is room, or none is left
    void count();
    void note_failure(const std::string & what);
    void note_damaged(const std::string & name);
};

// A prompt on its way into the archive, layer by layer. What fails is logged, and then nothing of it is kept: prompts are read
// without it. What is not committed is discarded.
class headkv_archive_writer {
public:
    // in_use: blocks that have to stay meanwhile; n_known: rows before it are not known, and blocks that begin there not written
    headkv_archive_writer(headkv_archive & archive, const std::vector<llama_token> & tokens, uint64_t adapters, const headkv_archive_hit & in_use,
            uint32_t n_known);
    ~headkv_archive_writer();

    // all layers in any order; the rows of the tensors are the positions
    using give_fn = std::function<void(bool v, uint32_t first, uint32_t n_rows, uint8_t * rows)>; // throws where it has not got them
    void layer(size_t i_layer, const give_fn & give);

    void commit();

private:
    headkv_archive & archive;

    std::vector<headkv_archive_hit::block_t> todo;
    std::vector<std::string> replaced; // ends of prompts that whole blocks take the place of
    std::vector<std::string> chain; // of the prompt, as far as it is or will be there
    bool failed = false;

    void discard();
    void fail(const std::string & what);
};

// Without a context: what a folder holds. Told for each block; damaged: empty, or why; only looked at where deep is set, the whole
// of it. Returning false stops.
struct headkv_archive_entry {
    headkv_block_file file;
    std::string model;
    int64_t n_tokens = 0; // up to its end
    std::string damaged;
};
void headkv_list_blocks(const headkv_blocks & blocks, bool deep, const std::function<bool(const headkv_archive_entry &)> & tell);

// Removes the blocks that were not used for the longest time, but for some, until the others take max_bytes at most. Returns how many.
int64_t headkv_prune_blocks(headkv_blocks & blocks, int64_t max_bytes, const std::set<std::string> & stay = {});
