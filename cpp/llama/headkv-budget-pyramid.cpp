// PyramidKV: budgets fall linearly with the depth of the layer.
#include "headkv-budget.h"

#include <algorithm>

// the last layer is meant to get this part of the mean, the paper's beta; its authors' code ignores other values too
static constexpr int64_t BETA = 20;

headkv_cells headkv_budget_pyramid(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix) {
    const int64_t base = (int64_t) cfg.kv_size - cfg.recent;

    int64_t n_layer = 0; // with KV heads
    int64_t n_heads = 0;
    for (int32_t n : heads.n_head_kv) {
        n_layer += n > 0;
        n_heads += n;
    }

    int64_t last = base / BETA;
    int64_t first = 2 * base - last;
    if (first > n_prefix) {
        first = std::max(n_prefix, base);
        last = 2 * base - first;
    }
    const int64_t n_steps = std::max<int64_t>(1, n_layer - 1);
    const int64_t step = (first - last) / n_steps; // the authors': its floor gives the layers more than the mean

    headkv_cells res;
    int64_t rest = base * n_heads;
    int64_t i = 0;
    for (int32_t n : heads.n_head_kv) {
        const int64_t cells = n_layer == 1 ? base
                : cfg.pyramid_exact        ? last + (first - last) * (n_steps - i) / n_steps
                                           : first - i * step;
        res.emplace_back(n, cells);
        rest -= n * cells;
        i += n > 0;
    }
    if (cfg.pyramid_exact) {
        headkv_budget_spread(res, rest, std::max(n_prefix, base));
    }
    return res;
}
