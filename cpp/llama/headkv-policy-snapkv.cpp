// SnapKV: the same number of cells for every head.
#include "headkv-budget.h"

static headkv_cells budget(const headkv_config & cfg, const headkv_heads & heads, int64_t) {
    return headkv_budget_uniform(cfg, heads);
}

headkv_policy headkv_policy_snapkv() {
    headkv_policy res = {};
    res.name = "snapkv";
    res.budget = budget;
    return res;
}
