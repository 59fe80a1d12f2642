// The reference queries of a prompt, by which the values of kept cells are fitted (headkv-fit.h) and attention is expected
// (headkv-expected.h): those of tokens spread evenly over it, one query head of each group. Nobody has to know how long it will be:
// whenever it has outgrown the slots, twice as far apart is close enough, and every second one of those that are there makes
// room for a later one.
#pragma once

#include "llama.h"

#include <cstdint>
#include <utility>
#include <vector>

struct llama_ubatch;

constexpr int32_t HEADKV_REF_SLOTS = 1024; // of a sequence, a power of two
constexpr int32_t HEADKV_MAX_REFS = 512;   // that are looked at, of those that are there

// Slot that the query of a position goes to, in the order of the positions; -1 = none.
int32_t headkv_ref_slot(llama_pos pos);

// Positions of the references of a prompt of n tokens, ascending: min(n, HEADKV_MAX_REFS), the last one near its end.
std::vector<llama_pos> headkv_ref_positions(llama_pos n);

// Which query head of the group of KV head ih is taken at a position.
int32_t headkv_ref_head(llama_pos pos, int32_t ih, int32_t n_head_kv, int32_t n_group);

// What a ubatch leaves: first the rows of its queries [n_head, n_tokens], then their rows of the references
// [n_head_kv, n_slots] of all sequences, whose last slot takes what nobody needs. n*n_head_kv of each.
std::pair<std::vector<int32_t>, std::vector<int64_t>> headkv_ref_rows(const llama_ubatch & ubatch, int64_t n, int32_t n_head, int32_t n_head_kv,
        int64_t n_slots_of_seq, int64_t n_slots);
