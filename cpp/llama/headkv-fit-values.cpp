#include "headkv-fit-ops.h"

#include <cstring>
#include <functional>

namespace headkv_fitting {

namespace {

// One head. Its system has as many unknowns as it keeps cells, or as there are queries to fit, whichever are fewer: (X'X + rI)^-1 X' is
// X' (XX' + rI)^-1. Panels are all cells of some queries or all queries of some cells, element (query, cell) at
// query*q_step + cell*c_step; they are computed again when they are needed again.
struct head_fit {
    const job_t & job;
    const sizes_t & s;
    workspace_t & w;
    const int64_t ih;
    const headkv_range & range;
    const int64_t n_kept;
    const bool by_cells; // the unknowns are the cells
    const int64_t n_unknown;
    const int64_t n_row; // of the panel
    const int64_t q_step;
    const int64_t c_step;

    head_fit(const job_t & job, workspace_t & w, int64_t ih) :
        job(job), s(job.sizes), w(w), ih(ih), range(job.layer.ranges[ih]), n_kept((int64_t) range.pos.size()),
        by_cells(n_kept <= s.n_fit), n_unknown(by_cells ? n_kept : s.n_fit), n_row(n_spread(by_cells ? n_kept : s.n_refs)),
        q_step(by_cells ? n_row : 1), c_step(by_cells ? 1 : n_row) {
    }

    char * kept(const ggml_tensor * pool, int64_t cell) const { return (char *) pool->data + (range.off + cell) * pool->nb[1]; }

    void load_queries(const float * answers) {
        std::fill(w.error.begin(), w.error.end(), 0.0f);
        for (int64_t i = 0; i < s.n_refs; ++i) {
            const int64_t row = s.row(i);
            job.load_query(i, ih, w.q.data() + row * s.D_k);
            w.n_seen[row] = std::upper_bound(range.pos.begin(), range.pos.end(), job.layer.pos[i]) - range.pos.begin();
            if (w.n_seen[row] > 0) { // else it has nothing to say
                std::transform(answers + i * s.n_value, answers + (i + 1) * s.n_value, w.error.data() + row * s.n_value, std::negate<float>());
            }
        }
    }

    // queries first to first + n - 1 and up to N_KEYS cells
    void load_logits(int64_t first, int64_t n, int64_t cell) {
        const int64_t n_now = std::min(N_KEYS, n_kept - cell);
        load_keys(job.score, job.layer.k->type, s.D_k, n_now, [&](int64_t i) { return kept(job.layer.k, cell + i); }, w.keys.data());
        job.score.logits(w.q.data() + first * s.D_k, (int) GGML_PAD(n, N_ROWS), w.keys.data(), (int) s.D_k, w.logits.data());
        job.cap(w.logits.data(), n * N_KEYS);
    }

    void sum_exponentials() {
        std::fill(w.largest.begin(), w.largest.end(), -INFINITY);
        std::fill(w.share.begin(), w.share.end(), 0.0f);
        for (int64_t cell = 0; cell < n_kept; cell += N_KEYS) {
            load_logits(0, s.n_refs, cell);
            for (int64_t j = 0; j < s.n_refs; ++j) {
                float * x = w.logits.data() + j * N_KEYS;
                std::fill(x + std::clamp<int64_t>(w.n_seen[j] - cell, 0, N_KEYS), x + N_KEYS, -INFINITY);
                job.score.add_stats(x, &w.largest[j], &w.share[j]);
            }
        }
        for (int64_t i = 0; i < s.n_refs; ++i) {
            float & share = w.share[s.row(i)];
            share = share > 0.0f ? 1.0f / job.with_sink(share, w.largest[s.row(i)], i, ih) : 0.0f;
        }
    }

    void load_panel(int64_t first, int64_t n, int64_t cell, int64_t n_cells) {
        std::fill(w.panel.begin(), w.panel.end(), 0.0f);
        for (int64_t c = cell; c < cell + n_cells; c += N_KEYS) {
            load_logits(first, n, c);
            for (int64_t j = 0; j < n; ++j) {
                const int64_t n_seen = std::clamp<int64_t>(w.n_seen[first + j] - c, 0, N_KEYS);
                float p[N_KEYS] = {};
                if (n_seen > 0) {
                    job.score.add_probs(w.logits.data() + j * N_KEYS, w.largest[first + j], w.share[first + j], 0, p);
                }
                for (int64_t i = 0; i < n_seen; ++i) {
                    w.panel[j * q_step + (c - cell + i) * c_step] = p[i];
                }
            }
        }
    }

    void load_values(int64_t cell, int64_t n) {
        for (int64_t c = 0; c < n; ++c) {
            headkv_to_floats(job.layer.v->type, kept(job.layer.v, cell + c), w.values.data() + c * s.n_value, s.D_v);
        }
    }

    // the rows of error of n queries of the panel get what these cells answer them; first: of the panel
    void add_answers(int64_t first, int64_t row, int64_t n, const std::vector<float> & values, int64_t n_cells) {
        job.fit.add_product(w.panel.data() + first * q_step, q_step, c_step, (int) GGML_PAD(n, N_ROWS), values.data(), s.n_value, (int) n_cells,
                (int) s.n_value, w.error.data() + row * s.n_value, s.n_value);
    }

    // n: rows of the panel
    void add_gram(int64_t n) {
        for (int64_t first = 0; first < n_unknown; first += N_KEYS) {
            const int64_t n_columns = first + N_KEYS;
            std::fill(w.tile.begin(), w.tile.end(), 0.0f);
            job.fit.add_product(w.panel.data() + first, 1, n_row, N_KEYS, w.panel.data(), n_row, (int) n, (int) n_columns, w.tile.data(), n_columns);
            for (int64_t i = first; i < std::min(n_columns, n_unknown); ++i) {
                const float * src = w.tile.data() + (i - first) * n_columns;
                double * dst = w.gram.data() + i * (i + 1) / 2;
                std::transform(src, src + i + 1, dst, dst, [](float x, double sum) { return sum + x; });
            }
        }
    }

    // by cells; n: queries of the panel, the first of them in row
    void add_rhs(int64_t row, int64_t n) {
        for (int64_t first = 0; first < n_kept; first += N_KEYS) {
            std::fill(w.tile.begin(), w.tile.end(), 0.0f);
            job.fit.add_product(w.panel.data() + first, c_step, q_step, N_KEYS, w.error.data() + row * s.n_value, s.n_value, (int) n,
                    (int) s.n_value, w.tile.data(), s.n_value);
            double * dst = w.rhs.data() + first * s.n_value;
            std::transform(dst, dst + std::min(N_KEYS, n_kept - first) * s.n_value, w.tile.begin(), dst, std::plus<double>());
        }
    }

    double squares_held() const {
        double res = 0.0;
        for (int64_t i = s.n_fit * s.n_value; i < s.n_refs * s.n_value; ++i) {
            res += (double) w.error[i] * w.error[i];
        }
        return res;
    }

    // X'X or XX', the residuals, and what the system is to be solved for
    void build() {
        std::fill(w.gram.begin(), w.gram.end(), 0.0);
        std::fill(w.rhs.begin(), w.rhs.end(), 0.0);
        if (by_cells) {
            load_values(0, n_kept);
            for (int64_t first = 0; first < s.n_refs; first += N_PANEL) {
                const int64_t n = std::min(N_PANEL, s.n_refs - first);
                const int64_t n_fit = std::clamp<int64_t>(s.n_fit - first, 0, n);
                load_panel(first, n, 0, n_kept);
                add_answers(0, first, n, w.values, n_kept);
                add_gram(n_fit);
                add_rhs(first, n_fit);
            }
            return;
        }
        for (int64_t cell = 0; cell < n_kept; cell += N_PANEL) {
            const int64_t n = std::min(N_PANEL, n_kept - cell);
            load_panel(0, s.n_refs, cell, n);
            load_values(cell, n);
            add_answers(0, 0, s.n_refs, w.values, n);
            add_gram(n);
        }
        std::copy_n(w.error.begin(), n_unknown * s.n_value, w.rhs.begin());
    }

    bool solve() {
        double trace = 0.0;
        for (int64_t i = 0; i < n_unknown; ++i) {
            trace += w.gram[i * (i + 3) / 2];
        }
        for (int64_t i = 0; i < n_unknown; ++i) {
            w.gram[i * (i + 3) / 2] += HEADKV_FIT_RIDGE * trace / n_kept;
        }
        if (!job.fit.cholesky(w.gram.data(), (int) n_unknown)) {
            return false;
        }
        job.fit.solve(w.gram.data(), (int) n_unknown, w.rhs.data(), (int) s.n_value);
        std::transform(w.rhs.begin(), w.rhs.begin() + n_unknown * s.n_value, w.change.begin(), [](double x) { return (float) -x; });
        return true;
    }

    void write(int64_t cell, int64_t n, const float * change) {
        std::vector<float> row(s.D_v);
        for (int64_t c = 0; c < n; ++c) {
            std::transform(change + c * s.n_value, change + c * s.n_value + s.D_v, w.values.begin() + c * s.n_value, row.begin(), std::plus<float>());
            ggml_quantize_chunk(job.layer.v->type, row.data(), kept(job.layer.v, cell + c), 0, 1, s.D_v, nullptr);
        }
    }

    void write_values() {
        if (by_cells) {
            for (int64_t row = s.n_fit; row < s.n_refs; row += N_PANEL) {
                const int64_t n = std::min(N_PANEL, s.n_refs - row);
                load_panel(row, n, 0, n_kept);
                add_answers(0, row, n, w.change, n_kept);
            }
            write(0, n_kept, w.change.data());
            return;
        }
        for (int64_t cell = 0; cell < n_kept; cell += N_PANEL) {
            const int64_t n = std::min(N_PANEL, n_kept - cell);
            load_panel(0, s.n_refs, cell, n);
            load_values(cell, n);
            std::fill(w.block.begin(), w.block.end(), 0.0f);
            job.fit.add_product(w.panel.data(), c_step, q_step, (int) GGML_PAD(n, N_ROWS), w.change.data(), s.n_value, (int) s.n_fit,
                    (int) s.n_value, w.block.data(), s.n_value);
            add_answers(s.n_fit, s.n_fit, s.n_refs - s.n_fit, w.block, n);
            write(cell, n, w.block.data());
        }
    }

    void write_back() {
        const size_t n_bytes = ggml_row_size(job.layer.v->type, s.D_v);
        for (int64_t c = 0; c < n_kept; ++c) {
            memcpy(kept(job.layer.v, c), job.staged(job.layer.v_all, range.pos[c], ih), n_bytes);
        }
    }

    headkv_fit_outcome run(const float * answers) {
        headkv_fit_outcome res;
        load_queries(answers);
        const double whole = squares_held();
        sum_exponentials();
        build();
        const double before = squares_held();
        double after = before;
        if (solve()) {
            write_values();
            after = squares_held();
            res.is_fitted = after < before;
            if (!res.is_fitted) {
                write_back();
                after = before;
            }
        }
        res.before = whole > 0.0 ? before / whole : 0.0;
        res.after = whole > 0.0 ? after / whole : 0.0;
        return res;
    }
};

} // namespace

void values_op(ggml_tensor * dst, int ith, int, void * userdata) {
    job_t & job = *(job_t *) userdata;
    const ggml_tensor * answers = dst->src[1];
    for (int64_t ih; (size_t) ith < job.spaces.size() && (ih = job.n_fitted++) < job.n_head_kv;) {
        if (job.layer.ranges[ih].pos.size() < job.layer.cells.size()) {
            job.outcomes[ih] = head_fit(job, job.spaces[ith], ih).run((const float *) ((const char *) answers->data + ih * answers->nb[2]));
        }
    }
}

} // namespace headkv_fitting
