// HeadKV: cells by the importance of the heads (ICLR 2025).
#include "headkv-budget.h"

static headkv_cells budget(const headkv_config & cfg, const headkv_heads & heads, int64_t) {
    return headkv_budget_importance(cfg, heads);
}

headkv_policy headkv_policy_headkv() {
    headkv_policy res = {};
    res.name = "headkv";
    res.needs_importance = true;
    res.uses_beta = true;
    res.budget = budget;
    return res;
}
