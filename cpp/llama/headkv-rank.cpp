#include "headkv-rank.h"

#include "headkv-stages.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

std::vector<float> headkv_rank_recent(int64_t n_prefix) {
    std::vector<float> res(n_prefix);
    std::iota(res.begin(), res.end(), 0.0f); // exact below 2^24
    return res;
}

void headkv_rank_value(headkv_scored & layer) {
    layer.scores = layer.values;
}

void headkv_rank_product(headkv_scored & layer) {
    std::transform(layer.scores.begin(), layer.scores.end(), layer.values.begin(), layer.scores.begin(),
            [](float s, float v) { return s < HEADKV_PROTECTED ? s * v : s; });
}

void headkv_rank_expected(headkv_scored & layer) {
    std::transform(layer.scores.begin(), layer.scores.end(), layer.values.begin(), layer.scores.begin(),
            [](float s, float v) { return s < HEADKV_PROTECTED ? (s + HEADKV_EXPECTED_EPSILON) * v : s; });
}

void headkv_rank_outlying(headkv_scored & layer) {
    const int64_t n = layer.n_prefix;
    std::vector<double> & tokens = *layer.tokens;
    tokens.resize(n, 0.0);
    for (size_t ih = 0; ih < layer.n_keep.size() && n > HEADKV_N_FIRST; ++ih) {
        const float * first = layer.values.data() + ih * n + HEADKV_N_FIRST;
        const float * last = layer.values.data() + (ih + 1) * n;
        const double mean = std::accumulate(first, last, 0.0) / (double) (last - first);
        const double squares = std::accumulate(first, last, 0.0, [&](double sum, float x) { return sum + (x - mean) * (x - mean); });
        const double deviation = std::sqrt(squares / (double) (last - first));
        for (int64_t i = HEADKV_N_FIRST; i < n && deviation > 0.0; ++i) {
            tokens[i] += (layer.values[ih * n + i] - mean) / deviation;
        }
    }
    std::vector<float> spans(tokens.begin(), tokens.end());
    headkv_pool_scores(spans.data(), n, HEADKV_POOL_AVG, HEADKV_SPAN);
    headkv_pool_scores(spans.data(), n, HEADKV_POOL_MAX, HEADKV_SPAN);
    for (size_t ih = 0; ih < layer.n_keep.size(); ++ih) {
        float * scores = layer.scores.data() + ih * n;
        std::transform(scores, scores + n, spans.begin(), scores, [](float s, float span) { return s < HEADKV_PROTECTED ? span : s; });
    }
}

// The best n_first of a head are certain, the others score what `rest` makes of their score and their value.
static void certain_first(headkv_scored & layer, size_t ih, int64_t n_first, std::vector<int64_t> & order, const std::function<float(float, float)> & rest) {
    const int64_t n = layer.n_prefix;
    float * scores = layer.scores.data() + ih * n;
    const float * values = layer.values.data() + ih * n;
    std::replace_if(scores, scores + n, [](float s) { return std::isnan(s); }, std::numeric_limits<float>::lowest());
    order.resize(n);
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(order.begin(), order.begin() + n_first, order.end(),
            [&](int64_t a, int64_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; });
    for (int64_t i = 0; i < n; ++i) {
        scores[order[i]] = i < n_first ? HEADKV_CERTAIN : rest(scores[order[i]], values[order[i]]);
    }
}

void headkv_rank_outlying_first(headkv_scored & layer) {
    headkv_rank_outlying(layer);
    std::vector<int64_t> order;
    for (size_t ih = 0; ih < layer.n_keep.size(); ++ih) {
        certain_first(layer, ih, std::max(std::min(layer.n_keep[ih], layer.n_mean), layer.n_protected), order, [](float, float v) { return v; });
    }
}

void headkv_rank_attention_first(headkv_scored & layer) {
    std::vector<float> attention = layer.scores;
    headkv_rank_outlying(layer);
    layer.values = std::move(layer.scores); // what the rest is ranked by
    layer.scores = std::move(attention);
    std::vector<int64_t> order;
    for (size_t ih = 0; ih < layer.n_keep.size(); ++ih) {
        const int64_t n_keep = layer.n_keep[ih];
        const int64_t n_attended = n_keep * HEADKV_N_ATTENDED / std::max<int64_t>(layer.n_mean, HEADKV_N_ATTENDED);
        const int64_t n_first = std::max({ n_keep - n_keep / 2, n_attended, layer.n_protected });
        certain_first(layer, ih, n_first, order, [](float, float span) { return span; });
    }
}

void headkv_rank_critical(headkv_scored & layer) {
    std::vector<int64_t> order;
    for (size_t ih = 0; ih < layer.n_keep.size(); ++ih) {
        const int64_t n_first = std::max(layer.n_keep[ih] - layer.n_keep[ih] / 2, layer.n_protected);
        certain_first(layer, ih, n_first, order, [](float s, float v) { return s * v; });
    }
}
