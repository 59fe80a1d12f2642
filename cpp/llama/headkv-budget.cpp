#include "headkv-budget.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <limits>
#include <numeric>
#include <stdexcept>

// a // b of Python for positive floats: fmod first, so that 11 // 1.1 is 9 and not 10
static double floor_div(double a, double b) {
    const double mod = std::fmod(a, b);
    const double div = (a - mod) / b;
    const double res = std::floor(div);
    return div - res > 0.5 ? res + 1.0 : res;
}

// independent of the rounding mode of the process
static double round_half_even(double x) {
    const double lo = std::floor(x);
    const double diff = x - lo;
    if (diff < 0.5) {
        return lo;
    }
    if (diff > 0.5) {
        return lo + 1.0;
    }
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

headkv_cells headkv_budget_uniform(const headkv_config & cfg, const headkv_heads & heads, int64_t) {
    headkv_cells res;
    for (int32_t n : heads.n_head_kv) {
        res.emplace_back(n, (int64_t) cfg.kv_size - cfg.recent);
    }
    return res;
}

// prefix cells of each query head
static std::vector<int64_t> budget_query_heads(const headkv_config & cfg, const std::vector<double> & importance) {
    const double base = (double) cfg.kv_size - cfg.recent;

    const std::vector<double> share = normalized(normalized(importance));

    const double fd = floor_div(base, cfg.beta);
    const double pool = fd * share.size();
    const double min_num = base - fd;

    std::vector<int64_t> res;
    for (double s : share) {
        res.push_back((int64_t) round_half_even(s * pool + min_num));
    }
    return res;
}

std::vector<double> headkv_budget_query_importance(const headkv_config & cfg, const headkv_heads & heads) {
    const int32_t n_layer = (int32_t) heads.n_head.size();
    const int32_t n_head_max = *std::max_element(heads.n_head.begin(), heads.n_head.end());

    const auto & imp = cfg.importance;
    if (imp.n_layer != n_layer || imp.n_head != n_head_max) {
        throw std::invalid_argument(format("importance is for %d layers x %d heads, the model has %d x %d: "
                                           "measure it on this model",
                imp.n_layer, imp.n_head, n_layer, n_head_max));
    }
    std::vector<double> importance;
    for (int32_t il = 0; il < n_layer; ++il) {
        const auto row = imp.values.begin() + (size_t) il * imp.n_head;
        importance.insert(importance.end(), row, row + heads.n_head[il]);
    }
    return importance;
}

headkv_cells headkv_budget_all(const headkv_config &, const headkv_heads & heads, int64_t n_prefix) {
    headkv_cells res;
    for (int32_t n : heads.n_head_kv) {
        res.emplace_back(n, n_prefix);
    }
    return res;
}

headkv_cells headkv_budget_importance(const headkv_config & cfg, const headkv_heads & heads, int64_t) {
    const std::vector<int64_t> values = budget_query_heads(cfg, headkv_budget_query_importance(cfg, heads));

    headkv_cells res(heads.n_head.size());
    const int64_t * p = values.data();
    for (size_t il = 0; il < res.size(); ++il) {
        for (int32_t ih = 0; ih < heads.n_head_kv[il]; ++ih) {
            const int32_t n_group = heads.n_head[il] / heads.n_head_kv[il];
            int64_t sum = 0;
            for (int32_t g = 0; g < n_group; ++g) {
                sum += p[ih * n_group + g];
            }
            res[il].push_back((int64_t) std::max(0.0, round_half_even((double) sum / n_group)));
        }
        p += heads.n_head[il];
    }
    return res;
}

int64_t headkv_budget_spread(headkv_cells & cells, int64_t n, int64_t limit) {
    const bool add = n > 0;
    const auto room = [&](int64_t x) { return std::max<int64_t>(0, add ? limit - x : x); };
    int64_t n_left = std::abs(n);
    while (n_left > 0) {
        int64_t n_open = 0;
        for (const auto & layer : cells) {
            n_open += std::count_if(layer.begin(), layer.end(), [&](int64_t x) { return room(x) > 0; });
        }
        if (n_open == 0) {
            break;
        }
        const int64_t share = std::max<int64_t>(1, n_left / n_open);
        for (auto & layer : cells) {
            for (int64_t & x : layer) {
                const int64_t d = std::min({ share, room(x), n_left });
                x += add ? d : -d;
                n_left -= d;
            }
        }
    }
    return add ? n_left : -n_left;
}

void headkv_budget_fit(headkv_cells & cells, int64_t n_prefix, int64_t n_protected, headkv_surplus surplus) {
    int64_t n_left = 0;
    for (auto & layer : cells) {
        int64_t n_surplus = 0;
        for (int64_t & x : layer) {
            n_surplus += std::max<int64_t>(0, x - n_prefix);
            x = std::min(x, n_prefix);
        }
        if (surplus == HEADKV_SURPLUS_REDISTRIBUTE) {
            headkv_cells one = { std::move(layer) };
            n_left += headkv_budget_spread(one, n_surplus, n_prefix);
            layer = std::move(one[0]);
        }
    }
    headkv_budget_spread(cells, n_left, n_prefix);
    for (auto & layer : cells) {
        for (int64_t & x : layer) {
            x = std::max(x, n_protected);
        }
    }
}

std::vector<std::pair<int32_t, int32_t>> headkv_protected(const headkv_config & cfg, int64_t n_prefix) {
    std::vector<std::pair<int32_t, int32_t>> res;
    for (const auto & [start, end] : cfg.spans) {
        if (start < n_prefix) {
            res.push_back({ start, (int32_t) std::min<int64_t>(end, n_prefix) });
        }
    }
    return res;
}

int64_t headkv_n_protected(const headkv_config & cfg, int64_t n_prefix) {
    int64_t res = 0;
    for (const auto & [start, end] : headkv_protected(cfg, n_prefix)) {
        res += end - start;
    }
    return res;
}

// the factor of a head's scores that makes heads with concentrated attention count more; protected cells do not matter
static double concentration(const float * scores, int64_t n, int64_t n_best) {
    std::vector<float> free;
    std::copy_if(scores, scores + n, std::back_inserter(free), [](float s) { return s < HEADKV_CERTAIN; }); // nor NaN
    const double sum = std::accumulate(free.begin(), free.end(), 0.0);

    std::vector<float> best(n_best);
    std::partial_sort_copy(free.begin(), free.end(), best.begin(), best.end(), std::greater<float>());
    const double top = std::accumulate(best.begin(), best.end(), 0.0);
    return sum > 0.0 ? top / sum : 1.0;
}

void headkv_budget_adapt(headkv_scored & layer, double floor, bool normalize) {
    const int64_t H = (int64_t) layer.n_keep.size();
    const int64_t n = layer.n_prefix;
    const int64_t n_total = std::accumulate(layer.n_keep.begin(), layer.n_keep.end(), (int64_t) 0);
    if (n_total == 0 || n_total == H * n) {
        return;
    }

    // how many of the best cells of the layer each head has
    std::vector<double> scores(H * n);
    std::vector<int64_t> order(H * n);
    for (int64_t ih = 0; ih < H; ++ih) {
        const double factor = normalize ? concentration(layer.scores.data() + ih * n, n, n_total / H) : 1.0;
        for (int64_t i = ih * n; i < (ih + 1) * n; ++i) {
            const float s = layer.scores[i];
            scores[i] = s >= HEADKV_CERTAIN ? std::numeric_limits<double>::infinity()
                    : std::isnan(s)         ? -std::numeric_limits<double>::infinity()
                                            : s * factor;
        }
    }
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(order.begin(), order.begin() + n_total, order.end(),
            [&](int64_t a, int64_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; });
    std::vector<int64_t> n_best(H, 0);
    for (int64_t i = 0; i < n_total; ++i) {
        n_best[order[i] / n]++;
    }

    int64_t n_shared = n_total;
    for (int64_t & x : layer.n_keep) {
        x = std::max((int64_t) (floor * x), layer.n_protected);
        n_shared -= x;
    }
    int64_t n_left = n_total;
    for (int64_t ih = 0; ih < H; ++ih) {
        layer.n_keep[ih] = std::min(n, layer.n_keep[ih] + n_best[ih] * n_shared / n_total);
        n_left -= layer.n_keep[ih];
    }
    std::vector<int64_t> by_remainder(H);
    std::iota(by_remainder.begin(), by_remainder.end(), 0);
    std::stable_sort(by_remainder.begin(), by_remainder.end(),
            [&](int64_t a, int64_t b) { return n_best[a] * n_shared % n_total > n_best[b] * n_shared % n_total; });
    for (int64_t i = 0; n_left > 0; i = (i + 1) % H) {
        int64_t & x = layer.n_keep[by_remainder[i]];
        if (x < n) {
            x++;
            n_left--;
        }
    }
}

std::vector<std::vector<uint32_t>> headkv_budget(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix) {
    std::vector<std::vector<uint32_t>> res;
    for (const auto & layer : cfg.budget->cells(cfg, heads, n_prefix)) {
        res.emplace_back();
        for (int64_t n : layer) {
            res.back().push_back((uint32_t) std::min<int64_t>(n, HEADKV_MAX_CELLS) + cfg.recent);
        }
    }
    return res;
}

bool headkv_keeps_all(const headkv_config & cfg, int64_t n_prompt) {
    return cfg.budget->keeps_all || (int64_t) cfg.kv_size - cfg.recent > std::max<int64_t>(0, n_prompt - cfg.recent);
}

uint32_t headkv_n_tail(const headkv_config & cfg, int64_t n_prompt) {
    return std::max<uint32_t>(cfg.n_tail, (uint32_t) std::min<int64_t>(cfg.kv_size, n_prompt) / 16);
}
