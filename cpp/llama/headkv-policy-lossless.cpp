// Nothing is evicted: the cells of every head lie side by side, which decoding reads faster than rows of the full cache.
#include "headkv-budget.h"

static headkv_cells budget(const headkv_config &, const headkv_heads & heads, int64_t n_prefix) {
    headkv_cells res;
    for (int32_t n : heads.n_head_kv) {
        res.emplace_back(n, n_prefix);
    }
    return res;
}

headkv_policy headkv_policy_lossless() {
    headkv_policy res = {};
    res.name = "lossless";
    res.keeps_all = true;
    res.budget = budget;
    return res;
}
