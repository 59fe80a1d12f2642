// What the two ops of the fit share: the first answers the references with all cells, the second fits the values of a head.
#pragma once

#include "headkv-op.h"
#include "headkv-fit.h"
#include "headkv-refs.h"
#include "headkv-score.h"

#include "llama-impl.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>

namespace headkv_fitting {

constexpr int64_t N_KEYS = headkv_fit_kernel::N_KEYS;
constexpr int64_t N_ROWS = headkv_fit_kernel::N_ROWS;
constexpr int64_t N_ANSWERED = 64; // references that share the cells that are read for them
constexpr int64_t N_PANEL = 64; // queries or cells whose probabilities are there at a time
constexpr int64_t N_HELD = 4; // every so many queries one is held out

static_assert(N_KEYS == headkv_score_kernel::N_KEYS && N_ROWS == headkv_score_kernel::N_QUERIES);

// rows of an odd number of cache lines: columns of them must not share cache sets
inline int64_t n_spread(int64_t n) {
    return GGML_PAD(n, N_KEYS) + N_KEYS / 2;
}

// the sizes of a layer
struct sizes_t {
    int64_t D_k;
    int64_t D_v;
    int64_t n_value; // D_v, as columns
    int64_t n_refs;
    int64_t n_fit; // of them, those that are not held out
    int64_t n_unknown; // of a head at most
    int64_t n_most;    // values that are there at a time

    // n_kept: cells of a head at most
    sizes_t(int64_t D_k, int64_t D_v, int64_t n_refs, int64_t n_kept) :
        D_k(D_k), D_v(D_v), n_value(GGML_PAD(D_v, N_KEYS)), n_refs(n_refs), n_fit(n_refs - n_refs / N_HELD), n_unknown(std::min(n_fit, n_kept)),
        n_most(GGML_PAD(std::max(n_unknown, N_PANEL), N_KEYS)) {
    }

    // where reference i is, when those that are held out come last
    int64_t row(int64_t i) const { return i % N_HELD == N_HELD - 1 ? n_fit + i / N_HELD : i - i / N_HELD; }
    int64_t n_rows() const { return GGML_PAD(n_refs, N_ROWS) + N_ROWS; }
};

// what a thread needs to fit a head, allocated before the graph runs
struct workspace_t {
    std::vector<float> q;     // [n_rows][D_k] times the scale
    std::vector<float> error; // [n_rows][n_value] X V - Y
    std::vector<float> values; // [n_most][n_value] of cells
    std::vector<float> change; // [n_most][n_value] of values, or what it is made of
    std::vector<float> panel; // probabilities
    std::vector<float> logits; // [n_rows][N_KEYS]
    std::vector<float> keys;  // [D_k][N_KEYS]
    std::vector<float> tile;  // [N_KEYS][n_unknown or n_value]
    std::vector<float> block; // [N_PANEL][n_value] changes of values
    std::vector<float> largest; // [n_rows] logit
    std::vector<float> share;   // [n_rows] 1/sum of exponentials; 0 = it sees no kept cell
    std::vector<int64_t> n_seen; // [n_rows] kept cells
    std::vector<double> gram; // [n_unknown*(n_unknown + 1)/2]
    std::vector<double> rhs; // [n_unknown][n_value]

    explicit workspace_t(const sizes_t & s) :
        q(s.n_rows() * s.D_k), error(s.n_rows() * s.n_value), values(s.n_most * s.n_value), change(s.n_most * s.n_value),
        panel(N_PANEL * n_spread(s.n_refs)), logits(s.n_rows() * N_KEYS), keys(s.D_k * N_KEYS),
        tile(N_KEYS * std::max(GGML_PAD(s.n_unknown, N_KEYS), s.n_value)), block(N_PANEL * s.n_value), largest(s.n_rows()), share(s.n_rows()), n_seen(s.n_rows()),
        gram(s.n_unknown * (s.n_unknown + 1) / 2), rhs(s.n_unknown * s.n_value) {
    }

    size_t n_bytes() const {
        const size_t n_floats = q.size() + error.size() + values.size() + change.size() + panel.size() + logits.size() + keys.size() +
                tile.size() + block.size() + 2 * largest.size();
        return n_floats * sizeof(float) + (n_seen.size() + gram.size() + rhs.size()) * sizeof(double);
    }
};

// what a thread needs to answer some references, same
struct answers_t {
    std::vector<float> q;      // [N_ANSWERED][D_k] times the scale
    std::vector<float> keys;   // [D_k][N_KEYS]
    std::vector<float> values; // [N_KEYS][n_value]
    std::vector<float> x;      // [N_ANSWERED][N_KEYS] logits, then probabilities but for the sum
    std::vector<float> y;      // [N_ANSWERED][n_value]
    std::vector<float> largest; // [N_ANSWERED] logit
    std::vector<float> sum;    // [N_ANSWERED] of exponentials

    explicit answers_t(const sizes_t & s) :
        q(N_ANSWERED * s.D_k), keys(s.D_k * N_KEYS), values(N_KEYS * s.n_value), x(N_ANSWERED * N_KEYS), y(N_ANSWERED * s.n_value), largest(N_ANSWERED), sum(N_ANSWERED) {
    }

    size_t n_bytes() const {
        return (q.size() + keys.size() + values.size() + x.size() + y.size() + largest.size() + sum.size()) * sizeof(float);
    }
};

// what both ops share; they take jobs in turn
struct job_t {
    const headkv_fit_layer & layer;
    const sizes_t sizes;
    const int64_t n_head_kv;
    const headkv_score_kernel & score;
    const headkv_fit_kernel & fit;
    std::vector<answers_t> answers;  // [n_threads]
    std::vector<workspace_t> spaces; // as many heads are fitted at a time
    std::vector<headkv_fit_outcome> outcomes; // [n_head_kv]
    std::atomic<int64_t> n_answered{ 0 }; // jobs taken
    std::atomic<int64_t> n_fitted{ 0 };

    job_t(const headkv_fit_layer & l, int n_threads) :
        layer(l), sizes(l.k->ne[0], l.v->ne[0], (int64_t) l.pos.size(), most_kept(l)), n_head_kv((int64_t) l.ranges.size()),
        score(of_env(headkv_score_kernel_find)), fit(of_env(headkv_fit_kernel_find)), outcomes(n_head_kv) {
        answers.reserve(n_threads);
        spaces.reserve(std::min<int64_t>(n_threads, n_head_kv));
        for (int i = 0; i < n_threads; ++i) {
            answers.emplace_back(sizes);
            if (i < n_head_kv) {
                spaces.emplace_back(sizes);
            }
        }
    }

    static int64_t most_kept(const headkv_fit_layer & l) {
        size_t res = 0;
        for (const auto & range : l.ranges) {
            res = std::max(res, range.pos.size() < l.cells.size() ? range.pos.size() : 0);
        }
        return (int64_t) res;
    }

    // env: HEADKV_KERNEL, for tests and measurements
    template <typename K>
    static const K & of_env(const K * (*find)(const char *) ) {
        const K * res = find(getenv("HEADKV_KERNEL"));
        GGML_ASSERT(res && "HEADKV_KERNEL names no kernel of this build and machine");
        return *res;
    }

    size_t n_bytes() const { return answers.size() * answers[0].n_bytes() + spaces.size() * spaces[0].n_bytes(); }

    const ggml_fp16_t * query(int64_t i, int64_t ih) const {
        return (const ggml_fp16_t *) ((const char *) layer.refs->data + (layer.slots[i] * n_head_kv + ih) * layer.refs->nb[1]);
    }

    void load_query(int64_t i, int64_t ih, float * dst) const {
        ggml_fp16_to_fp32_row(query(i, ih), dst, sizes.D_k);
        std::transform(dst, dst + sizes.D_k, dst, [this](float x) { return x * layer.scale; });
    }

    // a sum of exponentials, of which m is the largest logit, and that of the sink of the query of reference i
    float with_sink(float sum, float m, int64_t i, int64_t ih) const {
        if (layer.sinks.empty()) {
            return sum;
        }
        const int64_t n_group = (int64_t) layer.sinks.size() / n_head_kv;
        return sum + std::exp(layer.sinks[ih * n_group + headkv_ref_head(layer.pos[i], (int32_t) ih, (int32_t) n_head_kv, (int32_t) n_group)] - m);
    }

    const char * staged(const ggml_tensor * all, int64_t pos, int64_t ih) const {
        return (const char *) all->data + layer.cells[pos] * all->nb[1] + ih * ggml_row_size(all->type, all->ne[0] / n_head_kv);
    }

    void cap(float * x, int64_t n) const {
        for (int64_t i = 0; i < n && layer.softcap > 0.0f; ++i) {
            x[i] = layer.softcap * std::tanh(x[i] / layer.softcap);
        }
    }
};

// up to N_KEYS keys as columns; row_of says where each is
template <typename F>
void load_keys(const headkv_score_kernel & score, ggml_type type, int64_t D, int64_t n, const F & row_of, float * dst) {
    const auto to_column = D % 32 == 0 ? score.find_to_column(type) : nullptr;
    std::vector<float> row(to_column ? 0 : D);
    for (int64_t i = 0; i < n; ++i) {
        if (to_column) {
            to_column(row_of(i), dst + i, (int) D);
            continue;
        }
        headkv_to_floats(type, row_of(i), row.data(), D);
        for (int64_t d = 0; d < D; ++d) {
            dst[d * N_KEYS + i] = row[d];
        }
    }
}

// F32 [n_value, n_refs, n_head_kv] out of refs, k_all and v_all; userdata is the job
void answers_op(ggml_tensor * dst, int ith, int nth, void * userdata);

// in place of the pool of V; out of the answers first
void values_op(ggml_tensor * dst, int ith, int nth, void * userdata);

} // namespace headkv_fitting
