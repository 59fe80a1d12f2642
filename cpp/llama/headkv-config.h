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

// Share of a prompt that each KV head needs, when the mean over all of them is shares[i].
struct headkv_replay {
    int32_t n_layer = 0;
    int32_t n_head_kv = 0; // of the layer with most
    std::vector<double> shares; // ascending, in (0, 1)
    std::vector<double> values; // [n_shares][n_layer][n_head_kv], in [0, 1]; empty = none given
};

// what is known of the heads of a model
struct headkv_known {
    headkv_importance importance;
    headkv_replay replay;
};

// what becomes of the values of kept cells
enum headkv_fit {
    HEADKV_FIT_NONE,
    HEADKV_FIT_MEAN,   // one of a head's cells stands for all that it drops, if it drops any: their mean
    HEADKV_FIT_VALUES, // they answer the prompt's own queries as the full cache does, as nearly as they can
};

// how many cells generated tokens may have, and which ones; headkv-generated.h
struct headkv_generated {
    uint32_t n_cells = 0; // per KV head on average, 0 = any number
    uint32_t n_slack = 0; // tokens beyond that before cells are dropped
    uint32_t n_window = 0; // last tokens, whose queries score, and whose cells stay
    headkv_scope scope = HEADKV_SCOPE_GENERATED;
    headkv_generated_rank rank = HEADKV_GENERATED_ATTENTION;

    bool operator!=(const headkv_generated & other) const {
        const bool same = n_slack == other.n_slack && n_window == other.n_window && scope == other.scope && rank == other.rank;
        return n_cells != other.n_cells || (n_cells > 0 && !same);
    }
};

struct headkv_budget_kind; // headkv-policy.h
struct headkv_rank_kind;

constexpr int32_t HEADKV_MAX_CELLS = 1 << 26; // of a head

struct headkv_config {
    std::string policy; // name of the three, or "budget/rank/fit"
    const headkv_budget_kind * budget;
    const headkv_rank_kind * rank;
    headkv_fit fit;
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

    headkv_importance importance; // empty where the budget does not look at it
    headkv_replay replay; // same
    headkv_known known; // of the heads, used or not

    headkv_generated generated;

    // Fingerprint of what decides which cells are kept, but for kv_size and spans; never 0.
    uint64_t selection;

    // positions that every head keeps, sinks included: disjoint [start, end), ascending
    std::vector<std::pair<int32_t, int32_t>> spans;
};

using headkv_config_ptr = std::shared_ptr<const headkv_config>;

// Throws std::invalid_argument naming value, limit and remedy.
// known: what is taken where the parameters say nothing of the heads
headkv_config headkv_config_from_params(const headkv_params & params, const headkv_known * known = nullptr);

// throws std::invalid_argument when a prompt in a sequence of n_ctx tokens cannot be what the configuration asks for
void headkv_config_check_ctx(const headkv_config & cfg, uint32_t n_ctx);

// the configuration of the contexts that this thread creates; null = off
headkv_config_ptr & headkv_thread_config();

// Says whether this thread has one, between the creations of its contexts too.
void headkv_note_thread(bool is_on);

bool headkv_is_for_another_thread(); // another one has, and this one has not
