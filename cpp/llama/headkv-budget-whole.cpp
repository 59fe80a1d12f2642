// RazorAttention: the most important heads keep everything, the others what is protected, and one cell.
//
// Its authors choose a share of the heads; here kv_size says how many there are: what the others leave of the budget. The
// head that gets the last of it keeps its last cells.
#include "headkv-budget.h"

#include <algorithm>
#include <numeric>

headkv_cells headkv_budget_whole(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix) {
    const int64_t n_few = std::min(n_prefix, headkv_n_protected(cfg, n_prefix) + 1);

    headkv_cells res;
    std::vector<int64_t *> cells;   // of each head
    std::vector<double> matters; // each head
    const std::vector<double> importance = headkv_budget_query_importance(cfg, heads);
    auto first = importance.begin();
    for (size_t il = 0; il < heads.n_head_kv.size(); ++il) {
        res.emplace_back(heads.n_head_kv[il], n_few);
    }
    for (size_t il = 0; il < heads.n_head_kv.size(); ++il) {
        for (int64_t & n : res[il]) {
            const int32_t n_group = heads.n_head[il] / heads.n_head_kv[il];
            cells.push_back(&n);
            matters.push_back(std::accumulate(first, first + n_group, 0.0) / n_group);
            first += n_group;
        }
    }
    std::vector<size_t> order(cells.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return matters[a] > matters[b]; });

    int64_t rest = std::max<int64_t>(0, (int64_t) cfg.kv_size - cfg.recent - n_few) * (int64_t) cells.size();
    for (size_t i : order) {
        const int64_t n = std::min(rest, n_prefix - n_few);
        *cells[i] += n;
        rest -= n;
    }
    return res;
}
