// StreamingLLM: the first cells and the last ones, whatever the queries look at.
#include "headkv-budget.h"

static headkv_cells budget(const headkv_config & cfg, const headkv_heads & heads, int64_t) {
    return headkv_budget_uniform(cfg, heads);
}

headkv_policy headkv_policy_streaming() {
    headkv_policy res = {};
    res.name = "streaming";
    res.n_sinks = 4; // as its authors
    res.budget = budget;
    res.score = headkv_score_recent;
    return res;
}
