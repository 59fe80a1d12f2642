// A policy is three choices: how many cells of a prompt each KV head keeps (budget), which ones (rank), and what becomes of
// the values of those it keeps (fit). Each choice has a table; a name that users know is one row of the third table.
#pragma once

#include "headkv-config.h"

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

// heads of each layer, both 0 where a layer has no KV heads
struct headkv_heads {
    std::vector<int32_t> n_head;    // [il] query heads
    std::vector<int32_t> n_head_kv; // [il]
};

// [il][ih] cells before the recent ones
using headkv_cells = std::vector<std::vector<int64_t>>;

// what is known of a layer when its cells are ranked
struct headkv_scored {
    int64_t n_prefix;
    int64_t n_protected; // cells of each head that it keeps whatever they score
    std::vector<float> scores; // [n_head_kv][n_prefix], HEADKV_PROTECTED for these
    std::vector<float> values; // [n_head_kv][n_prefix], see headkv_values; empty unless the rank needs them
    std::vector<int64_t> n_keep; // [n_head_kv], at least n_protected, at most n_prefix
    int64_t n_mean = 0; // cells of the prefix that a head keeps on average
    std::vector<double> * tokens = nullptr; // [n_prefix] what the layers before have noted of them, empty before the first one
};

// above every other score
constexpr float HEADKV_PROTECTED = std::numeric_limits<float>::max();
// what a rank is certain of: above every score, but a cell may move away from it
constexpr float HEADKV_CERTAIN = HEADKV_PROTECTED / 2;

struct headkv_budget_kind {
    const char * name;
    bool by_importance; // of the query heads, in the configuration
    bool by_beta;       // a share of the budget that it says is given out by importance
    bool by_replay;     // by the table of shares in the configuration
    bool keeps_all;     // every cell of every head; kv_size does not count
    bool adapts;        // the scores of a prompt move cells between the heads of a layer
    double adakv_floor; // default of the option

    // Cells of each KV head, for prompts of n_prefix cells before the recent ones. May be more than that.
    // Throws std::invalid_argument when importance or table do not fit the layers.
    headkv_cells (*cells)(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix);
};

// a number for each value
enum headkv_values {
    HEADKV_VALUES_NONE,
    HEADKV_VALUES_NORM,   // its L2 norm
    HEADKV_VALUES_DISTANCE, // how far it is from the mean of its head, L2
    HEADKV_VALUES_OUTPUT, // L1 norm of what it adds to the output of the layer, mean over the query heads
};

struct headkv_rank_kind {
    const char * name;
    bool by_window; // scores begin as the attention that the window pays to each cell
    bool by_sums;   // same, of all queries of the prompt, not pooled
    bool by_refs;   // as the attention that queries like the references are expected to pay
    headkv_values values;
    int32_t n_sinks; // default of the option

    // Scores [n_prefix] that look at nothing, the same for all heads; or null.
    std::vector<float> (*score)(int64_t n_prefix);

    // Scores out of scores and values; what is protected may lose its mark. null = they stay.
    void (*refine)(headkv_scored & layer);
};

struct headkv_policy {
    const char * name;
    const char * budget;
    const char * rank;
    headkv_fit fit;
};

// whether it looks at the reference queries of a prompt
bool headkv_needs_refs(const headkv_config & cfg);

const std::vector<headkv_budget_kind> & headkv_budget_list();
const std::vector<headkv_rank_kind> & headkv_rank_list();
const std::vector<headkv_policy> & headkv_policy_list(); // in the order in which they are listed to users

// what policy "auto" means when the question is known, by what is known of the heads
constexpr const char * HEADKV_AUTO_IMPORTANCE = "headkv";
constexpr const char * HEADKV_AUTO_UNKNOWN = "adakv";

// when others follow it
constexpr const char * HEADKV_BOTH_TABLES = "mix/attention+outlying";
constexpr const char * HEADKV_BOTH_IMPORTANCE = "importance/attention+outlying";
constexpr const char * HEADKV_BOTH_UNKNOWN = "uniform/attention+outlying";

// and when it comes later
constexpr const char * HEADKV_LATER_BOTH = "mix/outlying+value";
constexpr const char * HEADKV_LATER_REPLAY = "replay/outlying+value";
constexpr const char * HEADKV_LATER_IMPORTANCE = "importance/outlying";
constexpr const char * HEADKV_LATER_UNKNOWN = "uniform/outlying";

// Sets budget, rank, fit and name of the configuration from the name of a policy, or "budget/rank" or "budget/rank/fit", and
// choices that replace its own; null or empty = none. Throws std::invalid_argument with what is known.
void headkv_policy_set(headkv_config & cfg, const std::string & name, const char * budget, const char * rank, const char * fit);

const char * headkv_fit_name(headkv_fit fit);
