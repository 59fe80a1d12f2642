// Budgets by a table that was measured once per model: which share of a text each KV head needs when the model repeats it.
#include "headkv-budget.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

static const double MEAN_WITHIN = 0.02; // of a share

// throws std::invalid_argument unless heads that are not there have nothing, and the mean of the others is the share
static void check_rows(const headkv_replay & table, const headkv_heads & heads) {
    const size_t n_heads = std::accumulate(heads.n_head_kv.begin(), heads.n_head_kv.end(), (size_t) 0);
    auto v = table.values.begin();
    for (double share : table.shares) {
        double sum = 0.0;
        double others = 0.0;
        for (int32_t n : heads.n_head_kv) {
            for (int32_t ih = 0; ih < table.n_head_kv; ++ih) {
                (ih < n ? sum : others) += *v++;
            }
        }
        if (others > 0.0 || std::abs(sum / n_heads - share) > MEAN_WITHIN * share) {
            throw std::invalid_argument(format("the replay table of the share %g has a mean of %g over the KV heads of the model, and %g for others: "
                                               "measure it on this model",
                    share, sum / n_heads, others));
        }
    }
}

// share of each KV head, layer after layer, when the mean of them is the given one
static std::vector<double> shares_at(const headkv_replay & table, const headkv_heads & heads, double mean) {
    const int32_t n_layer = (int32_t) heads.n_head_kv.size();
    const int32_t n_head_kv = *std::max_element(heads.n_head_kv.begin(), heads.n_head_kv.end());
    if (table.n_layer != n_layer || table.n_head_kv != n_head_kv) {
        throw std::invalid_argument(format("the replay table is for %d layers x %d KV heads, the model has %d x %d: measure it on this model",
                table.n_layer, table.n_head_kv, n_layer, n_head_kv));
    }
    check_rows(table, heads);
    const size_t n_row = (size_t) n_layer * n_head_kv;
    const size_t i = std::lower_bound(table.shares.begin(), table.shares.end(), mean) - table.shares.begin();
    const double lo = i > 0 ? table.shares[i - 1] : 0.0;
    const double hi = i < table.shares.size() ? table.shares[i] : 1.0;

    std::vector<double> res;
    for (int32_t il = 0; il < n_layer; ++il) {
        for (int32_t ih = 0; ih < heads.n_head_kv[il]; ++ih) {
            const size_t j = (size_t) il * n_head_kv + ih;
            const double a = i > 0 ? table.values[(i - 1) * n_row + j] : 0.0;
            const double b = i < table.shares.size() ? table.values[i * n_row + j] : 1.0;
            res.push_back(a + (b - a) * (mean - lo) / (hi - lo));
        }
    }
    return res;
}

headkv_cells headkv_budget_replay(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix) {
    const int64_t n_sure = headkv_n_protected(cfg, n_prefix);
    const int64_t n_mean = std::min(n_prefix, std::max<int64_t>(0, (int64_t) cfg.kv_size - cfg.recent)) - n_sure; // beyond them
    const int64_t n_most = n_prefix - n_sure;

    headkv_cells res = headkv_budget_all(cfg, heads, n_sure);
    if (n_mean <= 0) {
        return res;
    }
    const std::vector<double> shares = shares_at(cfg.replay, heads, (double) n_mean / n_most);
    const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
    int64_t n_left = n_mean * (int64_t) shares.size();
    const double n_all = (double) n_left;
    auto share = shares.begin();
    for (auto & layer : res) {
        for (int64_t & n : layer) {
            const int64_t more = (int64_t) std::min((double) n_most, sum > 0.0 ? *share / sum * n_all : 0.0);
            n += more;
            n_left -= more;
            ++share;
        }
    }
    headkv_budget_spread(res, n_left, n_prefix);
    return res;
}

headkv_cells headkv_budget_mix(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix) {
    headkv_cells res = headkv_budget_importance(cfg, heads, n_prefix);
    headkv_budget_fit(res, n_prefix, headkv_n_protected(cfg, n_prefix), HEADKV_SURPLUS_REDISTRIBUTE);
    const headkv_cells other = headkv_budget_replay(cfg, heads, n_prefix);
    int64_t n_odd = 0;
    for (size_t il = 0; il < res.size(); ++il) {
        for (size_t ih = 0; ih < res[il].size(); ++ih) {
            const int64_t sum = res[il][ih] + other[il][ih];
            res[il][ih] = sum / 2;
            n_odd += sum % 2;
        }
    }
    headkv_budget_spread(res, n_odd / 2, n_prefix);
    return res;
}
