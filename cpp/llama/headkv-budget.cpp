#include "headkv-budget.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

// a // b of Python for positive floats: fmod first, so that 11 // 1.1 is 9 and not 10
static double floor_div(double a, double b) {
    const double mod = std::fmod(a, b);
    const double div = (a - mod)/b;
    const double res = std::floor(div);
    return div - res > 0.5 ? res + 1.0 : res;
}

// independent of the rounding mode of the process
static double round_half_even(double x) {
    const double lo   = std::floor(x);
    const double diff = x - lo;
    if (diff < 0.5) { return lo; }
    if (diff > 0.5) { return lo + 1.0; }
    return std::fmod(lo, 2.0) == 0.0 ? lo : lo + 1.0;
}

static std::vector<double> normalized(const std::vector<double> & v) {
    // the order of the sum is free: no golden case is closer than 1e-6 to a rounding boundary
    double sum = 0.0;
    for (double x : v) {
        sum += x;
    }
    std::vector<double> res(v);
    for (double & x : res) {
        x /= sum;
    }
    return res;
}

std::vector<int64_t> headkv_budget_query_heads(const headkv_config & cfg, const std::vector<double> & importance, int32_t n_heads) {
    const double base = (double) cfg.kv_size - cfg.window;

    if (cfg.policy != HEADKV_POLICY_HEADKV) {
        return std::vector<int64_t>(n_heads, (int64_t) base);
    }

    const std::vector<double> share = normalized(normalized(importance));

    const double fd      = floor_div(base, cfg.beta);
    const double pool    = fd*n_heads;
    const double min_num = base - fd;

    std::vector<int64_t> res(n_heads);
    for (int32_t i = 0; i < n_heads; ++i) {
        res[i] = (int64_t) round_half_even(share[i]*pool + min_num);
    }
    return res;
}

std::vector<uint32_t> headkv_budget_kv_heads(const int64_t * values, int32_t n_head, int32_t n_head_kv, uint32_t window) {
    std::vector<uint32_t> res;
    if (n_head_kv == 0) {
        return res;
    }
    const int32_t n_group = n_head/n_head_kv;
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        int64_t sum = 0;
        for (int32_t g = 0; g < n_group; ++g) {
            sum += values[ih*n_group + g];
        }
        res.push_back((uint32_t) std::max(0.0, round_half_even((double) sum/n_group)) + window);
    }
    return res;
}

std::vector<std::vector<uint32_t>> headkv_budget(const headkv_config & cfg,
        const std::vector<int32_t> & n_head, const std::vector<int32_t> & n_head_kv) {
    const int32_t n_layer = (int32_t) n_head.size();

    int32_t n_heads    = 0;
    int32_t n_head_max = 0;
    for (int32_t n : n_head) {
        n_heads   += n;
        n_head_max = std::max(n_head_max, n);
    }

    std::vector<double> importance; // of the heads that exist
    if (cfg.policy == HEADKV_POLICY_HEADKV) {
        const auto & imp = cfg.importance;
        if (imp.n_layer != n_layer || imp.n_head != n_head_max) {
            throw std::invalid_argument(format("importance is for %d layers x %d heads, the model has %d x %d: "
                        "measure it on this model", imp.n_layer, imp.n_head, n_layer, n_head_max));
        }
        for (int32_t il = 0; il < n_layer; ++il) {
            importance.insert(importance.end(), imp.values.begin() + (size_t) il*imp.n_head, imp.values.begin() + (size_t) il*imp.n_head + n_head[il]);
        }
    }

    const std::vector<int64_t> values = headkv_budget_query_heads(cfg, importance, n_heads);

    std::vector<std::vector<uint32_t>> res;
    const int64_t * p = values.data();
    for (int32_t il = 0; il < n_layer; ++il) {
        res.push_back(headkv_budget_kv_heads(p, n_head[il], n_head_kv[il], cfg.window));
        p += n_head[il];
    }
    return res;
}
