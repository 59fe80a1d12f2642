// StreamingLLM: the first cells and the last ones, whatever the queries look at.
#include "headkv-budget.h"

#include <numeric>

static headkv_cells budget(const headkv_config & cfg, const headkv_heads & heads, int64_t) {
    return headkv_budget_uniform(cfg, heads);
}

// later cells score higher; the first ones are sinks
static std::vector<float> score(int64_t n_prefix) {
    std::vector<float> res(n_prefix);
    std::iota(res.begin(), res.end(), 0.0f); // exact below 2^24
    return res;
}

headkv_policy headkv_policy_streaming() {
    headkv_policy res = {};
    res.name    = "streaming";
    res.n_sinks = 4; // as its authors
    res.budget  = budget;
    res.score   = score;
    return res;
}
