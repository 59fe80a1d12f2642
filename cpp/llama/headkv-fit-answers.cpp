#include "headkv-fit-ops.h"

namespace headkv_fitting {

// references first to last - 1 of one head
static void answer(const job_t & job, answers_t & w, int64_t ih, int64_t first, int64_t last, float * dst) {
    const sizes_t & s = job.sizes;
    const auto & l = job.layer;
    const int64_t n = last - first;
    std::fill(w.y.begin(), w.y.end(), 0.0f);
    std::fill(w.sum.begin(), w.sum.end(), 0.0f);
    std::fill(w.largest.begin(), w.largest.end(), -INFINITY);
    for (int64_t j = 0; j < n; ++j) {
        job.load_query(first + j, ih, w.q.data() + j * s.D_k);
    }
    const int64_t n_cells = l.pos[last - 1] + 1;
    const int n_rows = (int) GGML_PAD(n, N_ROWS);
    for (int64_t cell = 0; cell < n_cells; cell += N_KEYS) {
        const int64_t n_now = std::min(N_KEYS, n_cells - cell);
        load_keys(job.score, l.k_all->type, s.D_k, n_now, [&](int64_t i) { return job.staged(l.k_all, cell + i, ih); }, w.keys.data());
        for (int64_t i = 0; i < n_now; ++i) {
            headkv_to_floats(l.v_all->type, job.staged(l.v_all, cell + i, ih), w.values.data() + i * s.n_value, s.D_v);
        }
        job.score.logits(w.q.data(), n_rows, w.keys.data(), (int) s.D_k, w.x.data());
        job.cap(w.x.data(), n * N_KEYS);
        for (int64_t j = 0; j < n; ++j) {
            float * row = w.x.data() + j * N_KEYS;
            std::fill(row + std::clamp<int64_t>(l.pos[first + j] + 1 - cell, 0, N_KEYS), row + N_KEYS, -INFINITY);
            job.fit.soften(row, &w.largest[j], &w.sum[j], w.y.data() + j * s.n_value, (int) s.n_value);
        }
        job.fit.add_product(w.x.data(), N_KEYS, 1, n_rows, w.values.data(), s.n_value, (int) n_now, (int) s.n_value, w.y.data(), s.n_value);
    }
    for (int64_t j = 0; j < n; ++j) {
        const float sum = job.with_sink(w.sum[j], w.largest[j], first + j, ih);
        std::transform(w.y.data() + j * s.n_value, w.y.data() + (j + 1) * s.n_value, dst + (first + j) * s.n_value, [&](float v) { return v / sum; });
    }
}

// F32 [n_value, n_refs, n_head_kv]; blocks of references, the last ones first, because they see most
void answers_op(ggml_tensor * dst, int ith, int, void * userdata) {
    job_t & job = *(job_t *) userdata;
    const int64_t n_blocks = (job.sizes.n_refs + N_ANSWERED - 1) / N_ANSWERED;
    for (int64_t i; (size_t) ith < job.answers.size() && (i = job.n_answered++) < n_blocks * job.n_head_kv;) {
        const int64_t ih = i % job.n_head_kv;
        if (job.layer.ranges[ih].pos.size() < job.layer.cells.size()) {
            const int64_t first = (n_blocks - 1 - i / job.n_head_kv) * N_ANSWERED;
            answer(job, job.answers[ith], ih, first, std::min(first + N_ANSWERED, job.sizes.n_refs), (float *) ((char *) dst->data + ih * dst->nb[2]));
        }
    }
}

} // namespace headkv_fitting
