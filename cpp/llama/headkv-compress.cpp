#include "headkv-compress.h"

#include "headkv-budget.h"
#include "headkv-rank.h"
#include "headkv-refs.h"
#include "headkv-stages.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

std::vector<ggml_fp16_t> headkv_causal_mask(int64_t n, int64_t n_queries) {
    std::vector<ggml_fp16_t> res(n * n_queries, ggml_fp32_to_fp16(0.0f));
    for (int64_t i = 0; i < n_queries; ++i) {
        std::fill(res.begin() + (i + 1) * n - (n_queries - 1 - i), res.begin() + (i + 1) * n, ggml_fp32_to_fp16(-INFINITY));
    }
    return res;
}

ggml_tensor * headkv_queries_of_head(ggml_context * ctx, ggml_tensor * ring, ggml_tensor * slots, const headkv_layer_shape & layer, int64_t ih) {
    const int64_t D = layer.n_embd_head_k;
    const int64_t G = layer.n_group();
    ggml_tensor * q = ggml_get_rows(ctx, ring, slots);
    q = ggml_view_3d(ctx, q, D, G, slots->ne[0], D * q->nb[0], q->nb[1], ih * G * D * q->nb[0]);
    return ggml_cont(ctx, ggml_permute(ctx, q, 0, 2, 1, 3));
}

// one layer on its way from the staging to the store
struct headkv_compression::work_t {
    headkv_store_layer & layer;

    const int64_t D_k;
    const int64_t D_v;
    const int64_t H;
    const int64_t G;

    ggml_tensor * k_all; // staged, [D_k*H, n_cells]
    ggml_tensor * v_all; // [D_v*H, n_cells]

    std::vector<int64_t> n_keep;  // [H] prefix cells
    int64_t n_total; // cells, recent ones included; the sum stays

    // known when there is room in the store
    std::vector<int32_t> plan_select; // [2, H] first element of t_kept, number of prefix cells
    std::vector<int32_t> plan;        // [3, H] first element of t_kept, number, first row in the pool
    std::vector<int32_t> n_comp;      // [H] 1 = a cell for those that are dropped comes first

    headkv_scratch scratch;
    ggml_tensor * t_scores; // F32 [n_prefix, H]
    ggml_tensor * t_kept;   // I32 [n_total] positions, head after head
    ggml_tensor * t_cells;  // I32 [n] staged cell of each position
    ggml_tensor * t_slots;  // I32 [n_window]
    ggml_tensor * t_select; // I32 [2, H]
    ggml_tensor * t_plan;   // I32 [3, H]
    ggml_tensor * t_recent; // F32 [n_recent] positions

    work_t(headkv_store_layer & layer, const headkv_compression & c) :
        layer(layer), D_k(layer.n_embd_head_k), D_v(layer.n_embd_head_v), H(layer.n_head_kv), G(layer.n_group()),
        k_all(c.staging.rows(layer.il, false)), v_all(c.staging.rows(layer.il, true)),
        n_keep(c.n_keep[layer.il]), n_total(std::accumulate(n_keep.begin(), n_keep.end(), H * c.n_recent)) {
        t_scores = scratch.new_tensor(GGML_TYPE_F32, std::max<int64_t>(c.n_prefix, 1), H);
        t_kept = scratch.new_tensor(GGML_TYPE_I32, n_total);
        t_cells = scratch.new_tensor(GGML_TYPE_I32, c.n);
        t_slots = scratch.new_tensor(GGML_TYPE_I32, c.n_window);
        t_select = scratch.new_tensor(GGML_TYPE_I32, 2, H);
        t_plan = scratch.new_tensor(GGML_TYPE_I32, 3, H);
        t_recent = scratch.new_tensor(GGML_TYPE_F32, c.n_recent);
        scratch.alloc(layer.buft);
        headkv_set_data(t_cells, c.cells);
        std::vector<float> recent(c.n_recent);
        std::iota(recent.begin(), recent.end(), (float) c.n_prefix);
        headkv_set_data(t_recent, recent);
    }

    ggml_tensor * scores_of_head(ggml_context * ctx, int64_t n_prefix, int64_t ih) const {
        return ggml_view_1d(ctx, t_scores, n_prefix, ih * t_scores->nb[1]);
    }
};

headkv_compression::headkv_compression(llama_context * lctx, headkv_staging & staging, headkv_store & store, headkv_config_ptr config,
        const headkv_heads & heads, const headkv_seq & seq, llama_seq_id seq_id, llama_seq_id dst) :
    seq_id(seq_id), dst(dst), lctx(lctx), staging(staging), store(store), cfg(std::move(config)), runner(lctx) {
    n = seq.n_pos;
    n_window = std::min<int64_t>(cfg->window, n);
    n_recent = std::min<int64_t>(cfg->recent, n);
    n_prefix = n - n_recent;

    keep_all = headkv_keeps_all(*cfg, n);
    n_tail_ = headkv_n_tail(*cfg, n);

    slots = seq.window_slots(seq_id, (llama_pos) cfg->window);
    cells = staging.cells_of(seq_id, seq.n_pos);
    if (cfg->rank->by_sums && !keep_all && !seq.has_sums) {
        throw std::runtime_error(format("tokens were removed from the end of the prompt, or came from the archive, whose attention policy '%s' counts: "
                                        "configure the policy before the prompt, and evaluate it again",
                cfg->policy.c_str()));
    }
    if (cfg->rank->by_window && !keep_all && (int64_t) slots.size() != n_window) {
        throw std::runtime_error(format("queries of the last %d tokens are missing, because tokens were removed from the end of the prompt, or it is "
                                        "shorter than it was said to be and came from the archive: evaluate the prompt again, announced as it is",
                (int) n_window));
    }
    if (std::find(cells.begin(), cells.end(), -1) != cells.end()) {
        throw std::runtime_error("the prompt has holes: evaluate it again");
    }
    if (headkv_needs_refs(*cfg) && !keep_all) {
        auto of_refs = seq.ref_slots(seq_id);
        if (of_refs.empty()) {
            const bool for_rank = cfg->rank->by_refs;
            throw std::runtime_error(format("queries that %s looks at are missing, because tokens were removed from the end of the prompt, or came "
                                            "from the archive: configure the %s before the prompt, and evaluate it again",
                    for_rank ? "rank 'expected'" : "fit 'values'", for_rank ? "rank" : "fit"));
        }
        const auto at = headkv_ref_positions(seq.n_pos);
        if (cfg->rank->by_refs) {
            expected = std::make_unique<headkv_expected>(at, of_refs, n, staging.twin());
        }
        if (cfg->fit == HEADKV_FIT_VALUES) {
            fit = std::make_unique<headkv_values_fit>(at, std::move(of_refs), lctx->n_threads_batch());
        }
    }
    contiguous = cells.back() - cells.front() == n - 1 && std::is_sorted(cells.begin(), cells.end());

    n_keep = cfg->budget->cells(*cfg, heads, n_prefix);
    n_protected = headkv_n_protected(*cfg, n_prefix);
    headkv_budget_fit(n_keep, n_prefix, keep_all ? n_prefix : n_protected, cfg->surplus);
    if (cfg->rank->score) {
        scores = cfg->rank->score(n_prefix);
    }
}

void headkv_compression::layer(headkv_store_layer & layer) {
    const int64_t t_start = ggml_time_us();

    work_t w(layer, *this);
    score(w);
    protect(w);
    refine(w);
    make_room(w);
    if (!keep_fused(w)) {
        keep_composed(w);
    }
    note_kept(w);
    fit_values(w);
    compensate(w);
    note_peak(w.scratch.n_bytes() + runner.n_bytes());

    t_us_ += ggml_time_us() - t_start;
}

void headkv_compression::abort() {
    lctx->synchronize();
    store.remove(dst, cfg->n_buckets);
}

headkv_seq headkv_compression::finish(const headkv_seq & seq) const {
    headkv_seq res;
    res.on(HEADKV_EV_STORE);
    res.n_pos = seq.n_pos;
    res.n_prompt = seq.n_pos;
    res.n_whole = keep_all ? seq.n_pos : (llama_pos) n_recent;
    res.n_tail = n_tail_;
    res.kv_size = cfg->kv_size;
    res.selection = cfg->selection;
    res.spans = headkv_protected(*cfg, seq.n_pos - res.n_whole);
    res.fit = fit ? fit->stats() : headkv_fit_stats();
    res.adapters = seq.adapters;
    res.n_archived = seq.n_archived;
    res.bound = cfg->generated;
    if (cfg->generated.n_cells > 0) {
        res.bound_cfg = cfg;
        res.bound_spans = headkv_protected(*cfg, seq.n_pos); // of a prompt that is kept whole too
    }
    return res;
}

void headkv_compression::note_peak(size_t n_scratch) {
    n_peak_ = std::max(n_peak_, staging.n_bytes() + store.n_bytes() + n_scratch);
}

ggml_tensor * headkv_compression::head_cells(work_t & w, ggml_tensor * all, int64_t ih) {
    const int64_t D = all->ne[0] / w.H;
    const size_t nb = ggml_row_size(all->type, D);
    ggml_context * ctx = runner.ctx.get();
    ggml_tensor * res = ggml_view_2d(ctx, all, D, contiguous ? n : all->ne[1], all->nb[1], ih * nb + (contiguous ? cells[0] * all->nb[1] : 0));
    return contiguous ? res : ggml_get_rows(ctx, res, w.t_cells);
}

//
// score
//

void headkv_compression::score(work_t & w) {
    if (cfg->rank->score) {
        for (int64_t ih = 0; ih < w.H && n_prefix > 0; ++ih) {
            ggml_backend_tensor_set(w.t_scores, scores.data(), ih * w.t_scores->nb[1], n_prefix * sizeof(float));
        }
    } else if (keep_all) {
        return;
    } else if (cfg->rank->by_sums) {
        score_by_sums(w);
    } else if (expected) {
        score_expected(w);
    } else if (cfg->rank->by_window) {
        headkv_set_data(w.t_slots, slots);
        if (!score_fused(w)) {
            score_composed(w);
        }
        if (cfg->pool_kernel == 0) {
            pool_by_budget(w);
        }
    } else {
        headkv_set_data(w.t_scores, std::vector<float>(ggml_nelements(w.t_scores), 0.0f)); // the rank refines what protect() marks
    }
}

void headkv_compression::score_by_sums(work_t & w) {
    runner.begin();
    ggml_context * ctx = runner.ctx.get();
    ggml_tensor * all = staging.sums(w.layer.il);
    for (int64_t ih = 0; ih < w.H; ++ih) {
        ggml_tensor * of_head = ggml_view_2d(ctx, all, 1, all->ne[1], all->nb[1], ih * all->nb[2]);
        ggml_tensor * s = ggml_get_rows(ctx, of_head, ggml_view_1d(ctx, w.t_cells, n_prefix, 0));
        ggml_build_forward_expand(runner.gf, ggml_cpy(ctx, ggml_reshape_1d(ctx, s, n_prefix), w.scores_of_head(ctx, n_prefix, ih)));
    }
    runner.run();
}

void headkv_compression::score_expected(work_t & w) {
    headkv_set_data(w.t_scores, expected->layer(runner, w.layer, staging.refs(w.layer.il), w.k_all, w.t_cells, n_prefix));
    note_peak(w.scratch.n_bytes() + expected->n_bytes() + runner.n_bytes());
}

// all heads at once; false: the device lacks the ops
bool headkv_compression::score_fused(work_t & w) {
    const bool on_cpu = headkv_is_cpu(w.layer.buft);
    if ((!on_cpu && !w.layer.fused) || n_prefix == 0) {
        return false;
    }
    runner.begin();
    ggml_context * ctx = runner.ctx.get();
    ggml_tensor * q = ggml_get_rows(ctx, staging.ring(w.layer.il), w.t_slots);
    ggml_tensor * s = headkv_build_score_fused(ctx, ggml_reshape_3d(ctx, q, w.D_k, w.G * w.H, n_window), w.k_all, w.t_cells,
            n_prefix, w.layer.attend->scale, w.layer.attend->softcap, cfg->n_square, cfg->pool, std::max(1, (int) cfg->pool_kernel), w.layer.sinks, w.layer.attend->max_bias);
    if (!on_cpu && !(headkv_device_supports(w.layer.buft, s->src[3]) && headkv_device_supports(w.layer.buft, s))) {
        return false;
    }
    ggml_build_forward_expand(runner.gf, ggml_cpy(ctx, s, w.t_scores));
    runner.run();
    return true;
}

// one head at a time, because its probabilities are the largest part of the scratch memory
void headkv_compression::score_composed(work_t & w) {
    headkv_scratch scratch;
    ggml_tensor * t_mask = scratch.new_tensor(GGML_TYPE_F16, n, n_window); // causal within the window
    scratch.alloc(w.layer.buft);
    headkv_set_data(t_mask, headkv_causal_mask(n, n_window));
    for (int64_t ih = 0; ih < w.H; ++ih) {
        runner.begin();
        ggml_context * ctx = runner.ctx.get();
        ggml_tensor * q = headkv_queries_of_head(ctx, staging.ring(w.layer.il), w.t_slots, w.layer, ih);
        ggml_tensor * s = headkv_build_score(ctx, runner.gf, q, head_cells(w, w.k_all, ih), t_mask,
                n_prefix, w.layer.attend->scale, w.layer.attend->softcap, cfg->n_square, cfg->pool, std::max(1, (int) cfg->pool_kernel),
                headkv_sinks_of_head(ctx, w.layer.sinks, w.G, ih));
        ggml_build_forward_expand(runner.gf, ggml_cpy(ctx, s, w.scores_of_head(ctx, n_prefix, ih)));
        runner.run();
    }
    note_peak(w.scratch.n_bytes() + scratch.n_bytes() + runner.n_bytes());
}

// by a kernel that grows with the cells of the head
void headkv_compression::pool_by_budget(work_t & w) {
    auto pooled = headkv_get_data<float>(w.t_scores, n_prefix * w.H);
    for (int64_t ih = 0; ih < w.H; ++ih) {
        headkv_pool_scores(pooled.data() + ih * n_prefix, n_prefix, cfg->pool, headkv_pool_kernel(w.n_keep[ih]));
    }
    headkv_set_data(w.t_scores, pooled);
}

void headkv_compression::protect(work_t & w) {
    const std::vector<float> best(n_protected, HEADKV_PROTECTED);
    for (const auto & [start, end] : headkv_protected(*cfg, n_prefix)) {
        for (int64_t ih = 0; ih < w.H; ++ih) {
            ggml_backend_tensor_set(w.t_scores, best.data(), ih * w.t_scores->nb[1] + start * sizeof(float), (end - start) * sizeof(float));
        }
    }
}

// scores that look at the values too, and cells that move to where the scores are high
void headkv_compression::refine(work_t & w) {
    if (keep_all || !(cfg->rank->refine || cfg->budget->adapts)) {
        return;
    }
    headkv_scored scored = { n_prefix, n_protected, headkv_get_data<float>(w.t_scores, n_prefix * w.H), {}, std::move(w.n_keep), std::max<int64_t>(0, (int64_t) cfg->kv_size - n_recent), &tokens };
    if (cfg->rank->refine) {
        scored.values = number_values(w);
        cfg->rank->refine(scored);
        for (const auto & [start, end] : headkv_protected(*cfg, n_prefix)) {
            for (int64_t ih = 0; ih < w.H; ++ih) {
                std::fill(scored.scores.begin() + ih * n_prefix + start, scored.scores.begin() + ih * n_prefix + end, HEADKV_PROTECTED);
            }
        }
    }
    if (cfg->budget->adapts) {
        headkv_budget_adapt(scored, cfg->adakv_floor, cfg->adakv_normalize);
    }
    w.n_keep = std::move(scored.n_keep);
    headkv_set_data(w.t_scores, scored.scores);
}

// the part of the output matrix that multiplies the values of a KV head
void headkv_compression::output_columns(work_t & w, int64_t ih, ggml_tensor * t_columns, ggml_tensor * t_wo) {
    const int64_t DG = w.D_v * w.G;
    std::vector<float> columns(DG * w.H * DG, 0.0f);
    for (int64_t i = 0; i < DG; ++i) {
        columns[i * DG * w.H + ih * DG + i] = 1.0f;
    }
    headkv_set_data(t_columns, columns);
    runner.begin();
    ggml_context * ctx = runner.ctx.get();
    ggml_tensor * wo = headkv_build_output_matrix(ctx, w.layer.wo, w.layer.wo_s, t_columns, w.D_v);
    ggml_build_forward_expand(runner.gf, ggml_cpy(ctx, wo, t_wo));
    runner.run();
}

// values of a head and of some positions, F32
static ggml_tensor * values_of(ggml_context * ctx, const ggml_tensor * v_all, int64_t D, int64_t ih, ggml_tensor * cells) {
    ggml_tensor * of_head = ggml_view_2d(ctx, const_cast<ggml_tensor *>(v_all), D, v_all->ne[1], v_all->nb[1], ih * ggml_row_size(v_all->type, D));
    return ggml_get_rows(ctx, of_head, cells);
}

void headkv_compression::mean_value(work_t & w, int64_t ih, int64_t n_step, ggml_tensor * t_share, ggml_tensor * t_mean) {
    std::vector<double> sum(w.D_v, 0.0);
    for (int64_t i = 0; i < n_prefix; i += n_step) {
        const int64_t n_now = std::min(n_step, n_prefix - i);
        runner.begin();
        ggml_context * ctx = runner.ctx.get();
        ggml_tensor * v = values_of(ctx, w.v_all, w.D_v, ih, ggml_view_1d(ctx, w.t_cells, n_now, i * sizeof(int32_t)));
        ggml_tensor * part = headkv_build_mean(ctx, v, ggml_view_1d(ctx, t_share, n_now, i * sizeof(float)));
        ggml_build_forward_expand(runner.gf, ggml_cpy(ctx, part, t_mean));
        runner.run();
        const auto found = headkv_get_data<float>(t_mean, w.D_v);
        std::transform(sum.begin(), sum.end(), found.begin(), sum.begin(), std::plus<double>());
    }
    headkv_set_data(t_mean, std::vector<float>(sum.begin(), sum.end()));
}

std::vector<float> headkv_compression::number_values(work_t & w) {
    // cells at a time: what is made of their values takes 4 MiB
    const bool by_output = cfg->rank->values == HEADKV_VALUES_OUTPUT;
    const bool by_distance = cfg->rank->values == HEADKV_VALUES_DISTANCE;
    const int64_t n_out = by_output ? w.layer.wo->ne[1] * w.G : w.D_v;
    const int64_t n_step = std::max<int64_t>(64, (1 << 20) / n_out);

    headkv_scratch scratch;
    ggml_tensor * t_values = scratch.new_tensor(GGML_TYPE_F32, 1, n_prefix * w.H);
    ggml_tensor * t_columns = by_output ? scratch.new_tensor(GGML_TYPE_F32, w.D_v * w.G * w.H, w.D_v * w.G) : nullptr;
    ggml_tensor * t_wo = by_output ? scratch.new_tensor(GGML_TYPE_F32, w.D_v, n_out) : nullptr;
    ggml_tensor * t_mean = by_distance ? scratch.new_tensor(GGML_TYPE_F32, w.D_v, 1) : nullptr;
    ggml_tensor * t_share = by_distance ? scratch.new_tensor(GGML_TYPE_F32, n_prefix) : nullptr;
    scratch.alloc(w.layer.buft);
    if (by_distance) {
        std::vector<float> share(n_prefix, 1.0f / (float) std::max<int64_t>(1, n_prefix - HEADKV_N_FIRST));
        std::fill_n(share.begin(), std::min(n_prefix, HEADKV_N_FIRST), 0.0f);
        headkv_set_data(t_share, share);
    }

    // quantised values are rotated, which does not change their norms
    headkv_scratch scratch_rot;
    ggml_tensor * t_rot = by_output ? staging.twin().build_input_v_rot(scratch_rot.ctx.get()) : nullptr;
    if (t_rot) {
        scratch_rot.alloc(ggml_backend_cpu_buffer_type());
        staging.twin().set_input_v_rot(t_rot);
    }

    for (int64_t ih = 0; ih < w.H; ++ih) {
        if (by_output) {
            output_columns(w, ih, t_columns, t_wo);
        } else if (by_distance) {
            mean_value(w, ih, n_step, t_share, t_mean);
        }
        for (int64_t i = 0; i < n_prefix; i += n_step) {
            const int64_t n_now = std::min(n_step, n_prefix - i);
            runner.begin();
            ggml_context * ctx = runner.ctx.get();
            ggml_tensor * v = values_of(ctx, w.v_all, w.D_v, ih, ggml_view_1d(ctx, w.t_cells, n_now, i * sizeof(int32_t)));
            if (by_distance) {
                v = ggml_sub(ctx, v, t_mean);
            }
            if (t_rot) {
                v = llama_mul_mat_hadamard(ctx, v, t_rot);
            }
            ggml_tensor * norms = by_output ? headkv_build_output_norm(ctx, v, t_wo, w.G) : headkv_build_value_norm(ctx, v);
            ggml_tensor * to = ggml_view_2d(ctx, t_values, 1, n_now, t_values->nb[1], (ih * n_prefix + i) * t_values->nb[1]);
            ggml_build_forward_expand(runner.gf, ggml_cpy(ctx, norms, to));
            runner.run();
        }
    }
    note_peak(w.scratch.n_bytes() + scratch.n_bytes() + runner.n_bytes());
    return headkv_get_data<float>(t_values, n_prefix * w.H);
}

//
// select and compact
//

// budgets are known: the store gets rows for them
void headkv_compression::make_room(work_t & w) {
    std::vector<uint32_t> n_kept; // with the recent ones
    int32_t n_before = 0;
    for (int64_t ih = 0; ih < w.H; ++ih) {
        n_kept.push_back((uint32_t) (w.n_keep[ih] + n_recent));
        w.n_comp.push_back(cfg->fit == HEADKV_FIT_MEAN && w.n_keep[ih] > n_protected && w.n_keep[ih] < n_prefix); // beside what is protected
        w.n_keep[ih] -= w.n_comp[ih];
        w.plan_select.insert(w.plan_select.end(), { n_before + w.n_comp[ih], (int32_t) w.n_keep[ih] });
        n_before += (int32_t) n_kept[ih];
    }
    GGML_ASSERT(n_before == w.n_total);
    store.relayout(w.layer, { { dst, { n_kept, n_tail_, {} } } }, cfg->n_buckets);

    const auto & ranges = w.layer.ranges[dst];
    for (int64_t ih = 0; ih < w.H; ++ih) {
        w.plan.insert(w.plan.end(), { w.plan_select[2 * ih], (int32_t) n_kept[ih] - w.n_comp[ih], (int32_t) ranges[ih].off + w.n_comp[ih] });
    }
    headkv_set_data(w.t_select, w.plan_select);
    headkv_set_data(w.t_plan, w.plan);
}

// all heads at once, whatever attends to them; false: the device lacks the ops, or existing ones are asked for
bool headkv_compression::keep_fused(work_t & w) {
    const bool on_cpu = headkv_is_cpu(w.layer.buft);
    if (!on_cpu && cfg->attend == HEADKV_ATTEND_COMPOSED) {
        return false;
    }
    runner.begin();
    ggml_context * ctx = runner.ctx.get();
    ggml_tensor * of_prefix = ggml_view_2d(ctx, w.t_scores, n_prefix, w.H, w.t_scores->nb[1], 0);
    ggml_tensor * selected = headkv_build_select(ctx, of_prefix, w.t_select, n_recent, w.n_total);
    ggml_tensor * kept = ggml_cpy(ctx, selected, w.t_kept);
    ggml_tensor * k = headkv_build_compact(ctx, w.layer.k, w.k_all, kept, w.t_cells, w.t_plan);
    ggml_tensor * v = headkv_build_compact(ctx, w.layer.v, w.v_all, kept, w.t_cells, w.t_plan);
    for (const ggml_tensor * op : { selected->view_src, k, v }) {
        if (!on_cpu && !headkv_device_supports(w.layer.buft, op)) {
            return false;
        }
    }
    ggml_build_forward_expand(runner.gf, k);
    ggml_build_forward_expand(runner.gf, v);
    runner.run();
    return true;
}

// one head at a time, because what existing ops select with is as large as its scores
void headkv_compression::keep_composed(work_t & w) {
    for (int64_t ih = 0; ih < w.H; ++ih) {
        runner.begin();
        ggml_context * ctx = runner.ctx.get();
        const int64_t n_rows = w.plan[3 * ih + 1];
        ggml_tensor * kept = w.n_keep[ih] == n_prefix ? ggml_cast(ctx, ggml_arange(ctx, 0.0f, (float) n, 1.0f), GGML_TYPE_I32) : headkv_build_select_composed(ctx, w.scores_of_head(ctx, n_prefix, ih), w.n_keep[ih], w.t_recent);
        kept = ggml_cpy(ctx, kept, ggml_view_1d(ctx, w.t_kept, n_rows, w.plan_select[2 * ih] * sizeof(int32_t)));
        ggml_build_forward_expand(runner.gf, kept);
        for (auto & [pool, all] : { std::make_pair(w.layer.k, w.k_all), std::make_pair(w.layer.v, w.v_all) }) {
            ggml_tensor * rows = ggml_get_rows(ctx, head_cells(w, all, ih), kept); // F32
            ggml_build_forward_expand(runner.gf, ggml_cpy(ctx, rows, ggml_view_2d(ctx, pool, pool->ne[0], n_rows, pool->nb[1], w.plan[3 * ih + 2] * pool->nb[1])));
        }
        runner.run();
    }
}

void headkv_compression::note_kept(work_t & w) {
    const auto kept = headkv_get_data<int32_t>(w.t_kept, w.n_total);
    auto & ranges = w.layer.ranges[dst];
    for (int64_t ih = 0; ih < w.H; ++ih) {
        ranges[ih].pos.assign(w.n_comp[ih], -1);
        ranges[ih].pos.insert(ranges[ih].pos.end(), kept.begin() + w.plan[3 * ih], kept.begin() + w.plan[3 * ih] + w.plan[3 * ih + 1]);
    }
}

void headkv_compression::fit_values(work_t & w) {
    if (fit) {
        fit->layer(runner, w.layer, dst, staging.refs(w.layer.il), w.k_all, w.v_all, cells);
        note_peak(w.scratch.n_bytes() + runner.n_bytes() + fit->n_bytes());
    }
}

void headkv_compression::compensate(work_t & w) {
    for (int64_t ih = 0; ih < w.H; ++ih) {
        const auto & range = w.layer.ranges[dst][ih];
        if (!range.compensates()) {
            continue;
        }
        std::vector<float> share(n_prefix, 1.0f / (n - (range.n_kept - 1)));
        for (size_t i = 1; i < range.pos.size() && range.pos[i] < n_prefix; ++i) {
            share[range.pos[i]] = 0.0f;
        }
        headkv_scratch scratch;
        ggml_tensor * t_share = scratch.new_tensor(GGML_TYPE_F32, n_prefix);
        scratch.alloc(w.layer.buft);
        headkv_set_data(t_share, share);

        runner.begin();
        ggml_context * ctx = runner.ctx.get();
        for (auto & [pool, all] : { std::make_pair(w.layer.k, w.k_all), std::make_pair(w.layer.v, w.v_all) }) {
            ggml_tensor * rows = ggml_view_2d(ctx, all, pool->ne[0], all->ne[1], all->nb[1], ih * ggml_row_size(all->type, pool->ne[0]));
            rows = ggml_get_rows(ctx, rows, ggml_view_1d(ctx, w.t_cells, n_prefix, 0)); // F32
            ggml_tensor * to = ggml_view_2d(ctx, pool, pool->ne[0], 1, pool->nb[1], range.off * pool->nb[1]);
            ggml_build_forward_expand(runner.gf, ggml_cpy(ctx, headkv_build_mean(ctx, rows, t_share), to));
        }
        runner.run();
    }
}
