// AdaKV: the cells of a layer go to those of its heads whose scores are highest in the prompt at hand.
#include "headkv-budget.h"

static headkv_cells budget(const headkv_config & cfg, const headkv_heads & heads, int64_t) {
    return headkv_budget_uniform(cfg, heads);
}

static void refine(const headkv_config & cfg, headkv_scored & layer) {
    headkv_budget_adapt(layer, cfg.adakv_floor, cfg.adakv_normalize);
}

headkv_policy headkv_policy_adakv() {
    headkv_policy res = {};
    res.name = "adakv";
    res.adakv_floor = 0.2;
    res.budget = budget;
    res.refine = refine;
    return res;
}
