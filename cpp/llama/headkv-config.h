// The validated form of headkv_params; every later stage trusts it.
#pragma once

#include "headkv.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

struct headkv_importance {
    int32_t n_layer = 0;
    int32_t n_head = 0;
    double beta = 0.0; // that suits the values; 0 = not known
    std::vector<double> values; // [n_layer*n_head], query heads, finite, >= 0, sum > 0; empty = none given
};

struct headkv_policy; // headkv-policy.h

constexpr int32_t HEADKV_MAX_CELLS = 1 << 26; // of a head

struct headkv_config {
    const headkv_policy * policy;
    uint32_t kv_size;
    uint32_t window;
    uint32_t recent;
    int n_square; // log2 of the power
    headkv_pool pool;
    uint32_t pool_kernel;
    double beta; // > 1
    uint32_t n_tail;
    headkv_attend attend;
    uint32_t n_buckets;
    headkv_prefill prefill;
    bool hidden_f16;
    headkv_surplus surplus;
    bool pyramid_exact;
    double adakv_floor; // in [0, 1]
    bool adakv_normalize;

    headkv_importance importance;

    // Fingerprint of what decides which cells are kept, but for kv_size and spans; never 0.
    uint64_t selection;

    // positions that every head keeps, sinks included: disjoint [start, end), ascending
    std::vector<std::pair<int32_t, int32_t>> spans;
};

using headkv_config_ptr = std::shared_ptr<const headkv_config>;

// Throws std::invalid_argument naming value, limit and remedy.
// known: the importance that is taken where the parameters name none
headkv_config headkv_config_from_params(const headkv_params & params, const headkv_importance * known = nullptr);

// throws std::invalid_argument when a prompt in a sequence of n_ctx tokens cannot be what the configuration asks for
void headkv_config_check_ctx(const headkv_config & cfg, uint32_t n_ctx);

// the configuration of the contexts that this thread creates; null = off
headkv_config_ptr & headkv_thread_config();

// Says whether this thread has one, between the creations of its contexts too.
void headkv_note_thread(bool is_on);

bool headkv_is_for_another_thread(); // another one has, and this one has not
