// HeadKV and AdaKV mixed: importance decides how many cells a layer has and how many of them each head is sure of, the
// prompt at hand divides the others within the layer. With the default floor of one half, each head has the mean of its
// HeadKV budget and of what AdaKV gives it out of the layer's HeadKV budgets.
#include "headkv-budget.h"

static headkv_cells budget(const headkv_config & cfg, const headkv_heads & heads, int64_t) {
    return headkv_budget_importance(cfg, heads);
}

static void refine(const headkv_config & cfg, headkv_scored & layer) {
    headkv_budget_adapt(layer, cfg.adakv_floor, cfg.adakv_normalize);
}

headkv_policy headkv_policy_headkv_adakv() {
    headkv_policy res = {};
    res.name = "headkv+adakv";
    res.needs_importance = true;
    res.uses_beta = true;
    res.adakv_floor = 0.5;
    res.budget = budget;
    res.refine = refine;
    return res;
}
