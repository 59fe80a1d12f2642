#include "headkv-policy.h"

#include "headkv-budget.h"
#include "headkv-rank.h"

#include "llama-impl.h"

#include <stdexcept>

static const char * const FITS[] = { "none", "mean", "values" }; // enum headkv_fit

bool headkv_needs_refs(const headkv_config & cfg) {
    return cfg.rank->by_refs || cfg.fit == HEADKV_FIT_VALUES;
}

const char * headkv_fit_name(headkv_fit fit) {
    return FITS[fit];
}

const std::vector<headkv_budget_kind> & headkv_budget_list() {
    static const std::vector<headkv_budget_kind> kinds = {
        // name, by importance, beta, replay, keeps all, adapts, floor, cells
        { "uniform", false, false, false, false, false, 0.0, headkv_budget_uniform },
        { "importance", true, true, false, false, false, 0.0, headkv_budget_importance },
        { "replay", false, false, true, false, false, 0.0, headkv_budget_replay },
        { "mix", true, true, true, false, false, 0.0, headkv_budget_mix },
        { "adaptive", false, false, false, false, true, 0.2, headkv_budget_uniform },
        { "importance+adaptive", true, true, false, false, true, 0.5, headkv_budget_importance },
        { "pyramid", false, false, false, false, false, 0.0, headkv_budget_pyramid },
        { "whole", true, false, false, false, false, 0.0, headkv_budget_whole },
        { "all", false, false, false, true, false, 0.0, headkv_budget_all },
    };
    return kinds;
}

const std::vector<headkv_rank_kind> & headkv_rank_list() {
    static const std::vector<headkv_rank_kind> kinds = {
        // name, window, sums, references, values, sinks
        { "attention", true, false, false, HEADKV_VALUES_NONE, 0, nullptr, nullptr },
        { "value", false, false, false, HEADKV_VALUES_NORM, 4, nullptr, headkv_rank_value },
        { "attention*value", true, false, false, HEADKV_VALUES_NORM, 4, nullptr, headkv_rank_product },
        { "expected", false, false, true, HEADKV_VALUES_NORM, 4, nullptr, headkv_rank_expected },
        { "outlying", false, false, false, HEADKV_VALUES_DISTANCE, 4, nullptr, headkv_rank_outlying },
        { "outlying+value", false, false, false, HEADKV_VALUES_DISTANCE, 4, nullptr, headkv_rank_outlying_first },
        { "attention+outlying", true, false, false, HEADKV_VALUES_DISTANCE, 0, nullptr, headkv_rank_attention_first },
        { "output", false, false, false, HEADKV_VALUES_OUTPUT, 4, nullptr, headkv_rank_value },
        { "critical", true, false, false, HEADKV_VALUES_OUTPUT, 0, nullptr, headkv_rank_critical },
        { "sums", false, true, false, HEADKV_VALUES_NONE, 0, nullptr, nullptr },
        { "recent", false, false, false, HEADKV_VALUES_NONE, 4, headkv_rank_recent, nullptr },
    };
    return kinds;
}

const std::vector<headkv_policy> & headkv_policy_list() {
    static const std::vector<headkv_policy> policies = {
        { "headkv", "importance", "attention", HEADKV_FIT_NONE },                // ICLR 2025
        { "snapkv", "uniform", "attention", HEADKV_FIT_NONE },                   // SnapKV
        { "streaming", "uniform", "recent", HEADKV_FIT_NONE },                   // StreamingLLM
        { "pyramidkv", "pyramid", "attention", HEADKV_FIT_NONE },                // PyramidKV
        { "adakv", "adaptive", "attention", HEADKV_FIT_NONE },                   // Ada-KV
        { "headkv+adakv", "importance+adaptive", "attention", HEADKV_FIT_NONE }, // ours
        { "criticalkv", "uniform", "critical", HEADKV_FIT_NONE },                // CriticalKV
        { "h2o", "uniform", "sums", HEADKV_FIT_NONE },                           // H2O; nothing is evicted while tokens are generated
        { "razor", "whole", "recent", HEADKV_FIT_MEAN },                         // RazorAttention
        { "lossless", "all", "recent", HEADKV_FIT_NONE },
    };
    return policies;
}

template <class T>
static const T & find(const std::vector<T> & kinds, const char * what, const std::string & name) {
    std::string known;
    for (const T & kind : kinds) {
        if (name == kind.name) {
            return kind;
        }
        known += (known.empty() ? "" : ", ") + std::string(kind.name);
    }
    throw std::invalid_argument(format("%s is '%s': it must be one of %s", what, name.c_str(), known.c_str()));
}

static headkv_fit find_fit(const std::string & name) {
    for (size_t i = 0; i < std::size(FITS); ++i) {
        if (name == FITS[i]) {
            return (headkv_fit) i;
        }
    }
    throw std::invalid_argument(format("fit is '%s': it must be one of none, mean, values", name.c_str()));
}

void headkv_policy_set(headkv_config & cfg, const std::string & name, const char * budget, const char * rank, const char * fit) {
    const size_t first = name.find('/');
    if (first == std::string::npos) {
        const headkv_policy & policy = find(headkv_policy_list(), "policy", name);
        cfg.budget = &find(headkv_budget_list(), "budget", policy.budget);
        cfg.rank = &find(headkv_rank_list(), "rank", policy.rank);
        cfg.fit = policy.fit;
    } else {
        const size_t second = name.find('/', first + 1);
        cfg.budget = &find(headkv_budget_list(), "budget", name.substr(0, first));
        cfg.rank = &find(headkv_rank_list(), "rank", name.substr(first + 1, second - first - 1));
        cfg.fit = second == std::string::npos ? HEADKV_FIT_NONE : find_fit(name.substr(second + 1));
    }
    if (budget && *budget) {
        cfg.budget = &find(headkv_budget_list(), "budget", budget);
    }
    if (cfg.budget->keeps_all && ((rank && *rank) || (fit && *fit))) {
        throw std::invalid_argument(format("%s '%s' keeps all cells: it takes no rank and no fit", budget && *budget ? "budget" : "policy",
                budget && *budget ? budget : name.c_str()));
    }
    if (rank && *rank) {
        cfg.rank = &find(headkv_rank_list(), "rank", rank);
    }
    if (fit && *fit) {
        cfg.fit = find_fit(fit);
    }
    if (cfg.budget->keeps_all) { // whatever they would do
        cfg.rank = &find(headkv_rank_list(), "rank", "recent");
        cfg.fit = HEADKV_FIT_NONE;
    }

    cfg.policy = format("%s/%s", cfg.budget->name, cfg.rank->name) + (cfg.fit == HEADKV_FIT_NONE ? "" : format("/%s", FITS[cfg.fit]));
    for (const headkv_policy & policy : headkv_policy_list()) {
        if (cfg.budget->name == std::string(policy.budget) && cfg.rank->name == std::string(policy.rank) && cfg.fit == policy.fit) {
            cfg.policy = policy.name;
        }
    }
}
