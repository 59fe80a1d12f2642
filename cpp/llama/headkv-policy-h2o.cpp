// H2O: the cells to which all queries of the prompt together paid most attention. Nothing is evicted while tokens are
// generated, and the last cells are those of the window, as in the HeadKV paper's comparison.
#include "headkv-budget.h"

static headkv_cells budget(const headkv_config & cfg, const headkv_heads & heads, int64_t) {
    return headkv_budget_uniform(cfg, heads);
}

headkv_policy headkv_policy_h2o() {
    headkv_policy res = {};
    res.name = "h2o";
    res.needs_sums = true;
    res.budget = budget;
    return res;
}
