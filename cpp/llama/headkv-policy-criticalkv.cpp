// CriticalKV: half of a head's cells by attention alone, the other half by attention times what the value moves the output
// of the layer. Uniform budgets.
#include "headkv-budget.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

static headkv_cells budget(const headkv_config & cfg, const headkv_heads & heads, int64_t) {
    return headkv_budget_uniform(cfg, heads);
}

static void refine(const headkv_config &, headkv_scored & layer) {
    const int64_t n = layer.n_prefix;
    std::vector<int64_t> order(n);
    for (size_t ih = 0; ih < layer.n_keep.size(); ++ih) {
        float * scores = layer.scores.data() + ih * n;
        const float * values = layer.values.data() + ih * n;

        const int64_t n_first = std::max(layer.n_keep[ih] - layer.n_keep[ih] / 2, layer.n_protected);
        std::replace_if(scores, scores + n, [](float s) { return std::isnan(s); }, std::numeric_limits<float>::lowest());
        std::iota(order.begin(), order.end(), 0);
        std::nth_element(order.begin(), order.begin() + n_first, order.end(),
                [&](int64_t a, int64_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; });
        for (int64_t i = 0; i < n; ++i) {
            scores[order[i]] = i < n_first ? HEADKV_PROTECTED : scores[order[i]] * values[order[i]];
        }
    }
}

headkv_policy headkv_policy_criticalkv() {
    headkv_policy res = {};
    res.name = "criticalkv";
    res.needs_values = true;
    res.budget = budget;
    res.refine = refine;
    return res;
}
