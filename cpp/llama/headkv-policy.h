// A policy decides which cells of a prompt each KV head keeps: how many (budget), which ones are best (score), and what
// only the scores of the prompt at hand can tell (refine). One file headkv-policy-<name>.cpp and one line here for each.
#pragma once

#include "headkv-config.h"

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

// in the order in which they are listed to users
#define HEADKV_POLICIES(X) \
    X(headkv)              \
    X(snapkv)              \
    X(streaming)           \
    X(pyramidkv)           \
    X(adakv)               \
    X(headkv_adakv)        \
    X(criticalkv)          \
    X(h2o)                 \
    X(razor)               \
    X(lossless)

// heads of each layer, both 0 where a layer has no KV heads
struct headkv_heads {
    std::vector<int32_t> n_head;    // [il] query heads
    std::vector<int32_t> n_head_kv; // [il]
};

// [il][ih] cells before the recent ones
using headkv_cells = std::vector<std::vector<int64_t>>;

// what is known of a layer when its cells are scored
struct headkv_scored {
    int64_t n_prefix;
    int64_t n_protected; // cells of each head that it keeps whatever they score
    std::vector<float> scores; // [n_head_kv][n_prefix], HEADKV_PROTECTED for these
    std::vector<float> values; // [n_head_kv][n_prefix], L1 norm of the value projected by the layer's output matrix, mean over
                                 // the query heads; empty unless the policy needs it
    std::vector<int64_t> n_keep; // [n_head_kv], at least n_protected, at most n_prefix
};

// above every other score
constexpr float HEADKV_PROTECTED = std::numeric_limits<float>::max();

struct headkv_policy {
    const char * name;
    bool needs_importance; // of the query heads, in the configuration
    bool uses_beta;        // a share of the budget that it says is given out by importance
    bool needs_values;     // headkv_scored has them
    bool needs_sums;       // scores are the attention that all queries of the prompt pay to a cell, not pooled
    bool keeps_all;        // every cell of every head; kv_size does not count
    bool compensates;      // one of a head's cells stands for all that it drops, if it drops any: their mean
    double adakv_floor;      // default of the option
    int32_t n_sinks;          // same

    // Cells of each KV head, for prompts of n_prefix cells before the recent ones. May be more than that.
    // Throws std::invalid_argument when the importance does not fit the layers.
    headkv_cells (*budget)(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix);

    // Scores [n_prefix] of a policy that does not look at the queries, the same for all heads; null = the attention that
    // the window pays to each cell.
    std::vector<float> (*score)(int64_t n_prefix);

    // May move cells between the heads of a layer and change scores; not called for a prompt that is kept as a whole.
    // The sum of n_keep must stay, and protected cells too. null = nothing of that.
    void (*refine)(const headkv_config & cfg, headkv_scored & layer);
};

// what policy "auto" means when the importance of the heads is known, and when it is not
constexpr const char * HEADKV_AUTO_IMPORTANCE = "headkv";
constexpr const char * HEADKV_AUTO_UNKNOWN = "adakv";

const std::vector<headkv_policy> & headkv_policy_list();

// by name; throws std::invalid_argument with the known ones
const headkv_policy & headkv_policy_find(const std::string & name);

// a headkv_policy::score: later cells score higher
std::vector<float> headkv_score_recent(int64_t n_prefix);

#define HEADKV_DECLARE_POLICY(name) headkv_policy headkv_policy_##name();
HEADKV_POLICIES(HEADKV_DECLARE_POLICY)
#undef HEADKV_DECLARE_POLICY
