#include "headkv-generated.h"

#include "llama-kv-cache-ragged.h"

#include "headkv-budget.h"
#include "headkv-compress.h"
#include "headkv-error.h"
#include "headkv-stages.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <numeric>
#include <stdexcept>

//
// queries
//

headkv_queries::headkv_queries(const std::vector<headkv_layer_shape> & shapes, llama_pos n_ring, uint32_t n_seq_max, bool no_alloc) :
    n(n_ring), n_seq_max(n_seq_max) {
    for (const auto & shape : shapes) {
        buffer_t & buffer = buffers[shape.buft];
        if (!buffer.ctx) {
            ggml_init_params params = { /*.mem_size =*/shapes.size() * ggml_tensor_overhead(), /*.mem_buffer =*/nullptr, /*.no_alloc =*/true };
            buffer.ctx.reset(ggml_init(params));
        }
        ggml_tensor * ring = ggml_new_tensor_2d(buffer.ctx.get(), GGML_TYPE_F16, (int64_t) shape.n_embd_head_k * shape.n_head, n_slots());
        ggml_format_name(ring, "headkv_queries_l%d", shape.il);
        rings[shape.il] = ring;
    }
    for (auto & [buft, buffer] : buffers) {
        if (no_alloc) {
            buffer.buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
            for (ggml_tensor * t = ggml_get_first_tensor(buffer.ctx.get()); t; t = ggml_get_next_tensor(buffer.ctx.get(), t)) {
                t->buffer = buffer.buf.get();
            }
            continue;
        }
        buffer.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(buffer.ctx.get(), buft));
        if (!buffer.buf) {
            throw std::bad_alloc();
        }
        ggml_backend_buffer_clear(buffer.buf.get(), 0);
    }
}

size_t headkv_queries::n_bytes() const {
    size_t res = 0;
    for (const auto & it : buffers) {
        res += ggml_backend_buffer_get_size(it.second.buf.get());
    }
    return res;
}

void headkv_queries::add_to(std::map<ggml_backend_buffer_type_t, size_t> & breakdown) const {
    for (const auto & [buft, buffer] : buffers) {
        breakdown[buft] += ggml_backend_buffer_get_size(buffer.buf.get());
    }
}

//
// budget and rank
//

headkv_cells headkv_generated_budget(const headkv_config & cfg, const headkv_generated & bound, const headkv_heads & heads,
        uint32_t n_prompt, int64_t n_candidates) {
    headkv_config of_generated = cfg;
    of_generated.kv_size = bound.n_cells + (bound.scope == HEADKV_SCOPE_ALL ? n_prompt : 0);
    of_generated.recent = bound.n_window;
    if (bound.scope != HEADKV_SCOPE_ALL) {
        of_generated.spans.clear(); // of the prompt
    }
    const auto cells = cfg.budget->keeps_all ? headkv_budget_uniform : cfg.budget->cells;
    return cells(of_generated, heads, n_candidates);
}

void headkv_rank_redundancy(float * scores, int64_t n, std::vector<float> cosine) {
    constexpr double SHARE = 0.07;
    constexpr float NEAR = 0.5f;
    std::vector<double> near(n, 0.0); // to the others, on average
    for (int64_t i = 0; i < n; ++i) {
        float * row = cosine.data() + i * n;
        row[i] = 0.0f;
        for (int64_t j = n - 1; j >= 0; --j) {
            if (row[j] > NEAR) {
                row[j] = 0.0f;
                break;
            }
        }
        for (int64_t j = 0; j < n; ++j) {
            near[j] += (double) row[j] / n;
        }
    }
    double sum_near = 0.0;
    for (double & x : near) {
        x = std::exp(x); // of a mean of cosines: no need to subtract the largest
        sum_near += x;
    }
    const double sum = std::accumulate(scores, scores + n, 0.0);
    for (int64_t j = 0; j < n; ++j) {
        scores[j] = (float) (SHARE * scores[j] / (sum > 0.0 ? sum : 1.0) - (1.0 - SHARE) * near[j] / sum_near);
    }
}

//
// eviction
//

headkv_eviction::headkv_eviction(llama_context * lctx, const headkv_queries & queries, headkv_store & store, const headkv_heads & all_heads,
        const headkv_seq & seq, llama_seq_id seq_id, uint32_t n_most) :
    store(store), queries(queries), cfg(*seq.bound_cfg), bound(seq.bound), n_most(n_most), seq_id(seq_id), n_pos(seq.n_pos), n_prompt(seq.n_prompt), tail_begin(seq.tail_begin()),
    spans(seq.bound_spans), slots(seq.window_slots(seq_id, (llama_pos) bound.n_window)), runner(lctx) {
    if (slots.size() != bound.n_window) {
        throw std::runtime_error("queries of the last tokens are missing");
    }
    const bool all = bound.scope == HEADKV_SCOPE_ALL;
    const auto n_cells_prompt = (uint32_t) std::min<int64_t>(seq.kv_size, n_prompt);
    const int64_t n_candidates = seq.n_generated() - bound.n_window + (all ? n_prompt : 0);
    const headkv_cells n_keep = headkv_generated_budget(cfg, bound, all_heads, n_cells_prompt, n_candidates);
    for (auto & layer : store.layers) {
        decide(layer, n_keep[layer.il]);
    }
}

void headkv_eviction::decide(headkv_store_layer & layer, const std::vector<int64_t> & n_keep) {
    const auto & ranges = layer.ranges[seq_id];
    const auto pos_of = [&](const headkv_range & range, uint32_t i) { return i < range.n_kept ? range.pos[i] : tail_begin + (int32_t) (i - range.n_kept); };

    std::vector<head_t> of_layer(ranges.size());
    int64_t n_max = 0;
    for (size_t ih = 0; ih < ranges.size(); ++ih) {
        const auto & range = ranges[ih];
        const auto begin = range.pos.begin();
        of_layer[ih].first = bound.scope == HEADKV_SCOPE_ALL ? 0 : (uint32_t) (std::lower_bound(begin, range.pos.end(), n_prompt) - begin);
        of_layer[ih].end = range.n_used(n_pos - tail_begin) - bound.n_window;
        n_max = std::max<int64_t>(n_max, of_layer[ih].end - of_layer[ih].first);
    }

    headkv_scored scored = { n_max, 0, {}, {}, n_keep };
    scored.scores = score(layer, of_layer, n_max, n_keep);
    for (size_t ih = 0; ih < ranges.size(); ++ih) {
        const head_t & head = of_layer[ih];
        const int64_t n = head.end - head.first;
        float * scores = scored.scores.data() + ih * n_max;
        int64_t n_protected = 0;
        for (int64_t i = 0; i < n; ++i) {
            const int32_t pos = pos_of(ranges[ih], head.first + i);
            if (std::any_of(spans.begin(), spans.end(), [pos](const auto & span) { return span.first <= pos && pos < span.second; })) {
                scores[i] = HEADKV_PROTECTED;
                n_protected++;
            }
        }
        scored.n_protected = std::max(scored.n_protected, n_protected); // the same of all heads
        scored.n_keep[ih] = std::max(std::min(n_keep[ih], n), n_protected);
    }
    if (cfg.budget->adapts) {
        headkv_budget_adapt(scored, cfg.adakv_floor, cfg.adakv_normalize);
    }
    for (size_t ih = 0; ih < ranges.size(); ++ih) {
        head_t & head = of_layer[ih];
        const int64_t n = head.end - head.first;
        const int64_t n_room = (int64_t) n_most - head.first - bound.n_window; // of a head that the budget gives more than the context has
        const int64_t n_keep_now = std::min({ scored.n_keep[ih], n, std::max<int64_t>(n_room, 0) });
        head.rows = headkv_select_cells(scored.scores.data() + ih * n_max, n, n_keep_now);
        n_dropped += n - (int64_t) head.rows.size();
        head.pos.assign(ranges[ih].pos.begin(), ranges[ih].pos.begin() + head.first);
        for (int32_t i : head.rows) {
            head.pos.push_back(pos_of(ranges[ih], head.first + i));
        }
        for (uint32_t i = 0; i < bound.n_window; ++i) {
            head.rows.push_back((int32_t) (n + i));
        }
        const size_t n_bytes = std::max(layer.k->nb[1], layer.v->nb[1]) * (n + bound.n_window);
        raw.resize(std::max(raw.size(), n_bytes));
    }
    heads[layer.il] = std::move(of_layer);
}

std::vector<float> headkv_eviction::score(headkv_store_layer & layer, const std::vector<head_t> & of_layer, int64_t n_max, const std::vector<int64_t> & n_keep) {
    std::vector<float> scores(n_max * of_layer.size(), std::numeric_limits<float>::quiet_NaN());
    if (bound.rank == HEADKV_GENERATED_RECENT) {
        for (size_t ih = 0; ih < of_layer.size(); ++ih) {
            std::iota(scores.begin() + ih * n_max, scores.begin() + ih * n_max + of_layer[ih].end - of_layer[ih].first, 0.0f);
        }
        return scores;
    }
    score_by_attention(layer, of_layer, n_max, scores);
    for (size_t ih = 0; ih < of_layer.size(); ++ih) {
        float * of_head = scores.data() + ih * n_max;
        const int64_t n = of_layer[ih].end - of_layer[ih].first;
        headkv_pool_scores(of_head, n, cfg.pool, cfg.pool_kernel > 0 ? (int) cfg.pool_kernel : headkv_pool_kernel(n_keep[ih]));
        if (bound.rank == HEADKV_GENERATED_REDUNDANCY && n > 0) {
            headkv_rank_redundancy(of_head, n, cosines(layer, layer.ranges[seq_id][ih].off + of_layer[ih].first, n));
        }
    }
    return scores;
}

void headkv_eviction::score_by_attention(headkv_store_layer & layer, const std::vector<head_t> & of_layer, int64_t n_max, std::vector<float> & scores) {
    const auto & ranges = layer.ranges[seq_id];
    const int64_t W = bound.n_window;
    const int64_t D = layer.n_embd_head_k;
    const int64_t G = layer.n_group();
    const auto H = (int64_t) of_layer.size();
    const bool on_cpu = headkv_is_cpu(layer.buft);
    const auto & attend = *layer.attend;

    uint32_t n_used = 0; // of the head that has most
    for (const auto & head : of_layer) {
        n_used = std::max<uint32_t>(n_used, head.end + W);
    }
    headkv_scratch scratch;
    ggml_tensor * t_slots = scratch.new_tensor(GGML_TYPE_I32, W);
    ggml_tensor * t_cells = scratch.new_tensor(GGML_TYPE_I32, n_used, H); // rows of the pool
    ggml_tensor * t_scores = scratch.new_tensor(GGML_TYPE_F32, n_used, H); // of all cells before the window
    ggml_tensor * t_mask = on_cpu ? nullptr : scratch.new_tensor(GGML_TYPE_F16, n_used, W);
    scratch.alloc(layer.buft);
    headkv_set_data(t_slots, slots);
    std::vector<int32_t> cells(n_used * H);
    for (int64_t ih = 0; ih < H; ++ih) {
        std::iota(cells.begin() + ih * n_used, cells.begin() + (ih + 1) * n_used, (int32_t) ranges[ih].off); // those behind its own are not looked at
    }
    headkv_set_data(t_cells, cells);

    for (int64_t ih = 0; ih < H; ++ih) {
        const int64_t n_prefix = of_layer[ih].end;
        const int64_t n = n_prefix + W;
        if (n_prefix == 0) {
            continue;
        }
        ggml_tensor * to = nullptr;
        const auto expand = [&](ggml_tensor * s) {
            to = ggml_view_1d(runner.ctx.get(), t_scores, n_prefix, ih * t_scores->nb[1]);
            ggml_build_forward_expand(runner.gf, ggml_cpy(runner.ctx.get(), ggml_reshape_1d(runner.ctx.get(), s, n_prefix), to));
            runner.run();
        };
        runner.begin();
        ggml_context * ctx = runner.ctx.get();
        ggml_tensor * sinks = headkv_sinks_of_head(ctx, layer.sinks, G, ih);
        if (on_cpu || layer.fused) {
            ggml_tensor * q = ggml_get_rows(ctx, queries.of_layer(layer.il), t_slots);
            q = ggml_view_3d(ctx, q, D, G, W, D * q->nb[0], q->nb[1], ih * G * D * q->nb[0]);
            ggml_tensor * s = headkv_build_score_fused(ctx, q, layer.k, ggml_view_1d(ctx, t_cells, n, ih * t_cells->nb[1]), n_prefix,
                    attend.scale, attend.softcap, cfg.n_square, cfg.pool, 1, sinks);
            if (on_cpu || (headkv_device_supports(layer.buft, s->src[3]) && headkv_device_supports(layer.buft, s))) {
                expand(s);
                continue;
            }
            runner.begin();
            ctx = runner.ctx.get();
            sinks = headkv_sinks_of_head(ctx, layer.sinks, G, ih);
        }
        ggml_tensor * mask = ggml_view_2d(ctx, t_mask, n, W, n * sizeof(ggml_fp16_t), 0);
        const auto data = headkv_causal_mask(n, W);
        ggml_backend_tensor_set(t_mask, data.data(), 0, data.size() * sizeof(data[0]));
        ggml_tensor * q = headkv_queries_of_head(ctx, queries.of_layer(layer.il), t_slots, layer, ih);
        ggml_tensor * k = ggml_view_2d(ctx, layer.k, D, n, layer.k->nb[1], ranges[ih].off * layer.k->nb[1]);
        expand(headkv_build_score(ctx, runner.gf, q, k, mask, n_prefix, attend.scale, attend.softcap, cfg.n_square, cfg.pool, 1, sinks));
    }

    const auto found = headkv_get_data<float>(t_scores, n_used * H);
    for (int64_t ih = 0; ih < H; ++ih) {
        const head_t & head = of_layer[ih];
        float * dst = scores.data() + ih * n_max;
        std::copy(found.begin() + ih * n_used + head.first, found.begin() + ih * n_used + head.end, dst);
    }
}

std::vector<float> headkv_eviction::cosines(const headkv_store_layer & layer, uint32_t row, int64_t n) {
    headkv_scratch scratch;
    ggml_tensor * t_rows = scratch.new_tensor(GGML_TYPE_I32, n);
    ggml_tensor * t_cosines = scratch.new_tensor(GGML_TYPE_F32, n, n);
    scratch.alloc(layer.buft);
    std::vector<int32_t> rows(n);
    std::iota(rows.begin(), rows.end(), (int32_t) row);
    headkv_set_data(t_rows, rows);
    runner.begin();
    ggml_context * ctx = runner.ctx.get();
    ggml_tensor * k = ggml_l2_norm(ctx, ggml_get_rows(ctx, layer.k, t_rows), 1e-12f); // F32
    ggml_tensor * x = ggml_mul_mat(ctx, k, k);
    ggml_prec_set_acc(x, GGML_PREC_F32);
    ggml_build_forward_expand(runner.gf, ggml_cpy(ctx, x, t_cosines));
    runner.run();
    return headkv_get_data<float>(t_cosines, n * n);
}

void headkv_eviction::apply() {
    for (auto & layer : store.layers) {
        for (size_t ih = 0; ih < heads[layer.il].size(); ++ih) {
            head_t & head = heads[layer.il][ih];
            headkv_range & range = layer.ranges[seq_id][ih];
            for (ggml_tensor * pool : { layer.k, layer.v }) {
                headkv_gather_rows(pool, range.off + head.first, head.rows, raw);
            }
            range.n_kept = (uint32_t) head.pos.size();
            range.pos = std::move(head.pos);
        }
    }
}

void headkv_eviction::finish(headkv_seq & seq) const {
    seq.n_settled = n_pos - (llama_pos) bound.n_window - n_prompt;
    seq.n_evicted += n_dropped;
    seq.n_evictions++;
}

//
// of the memory class
//

void llama_kv_cache_ragged::evict(llama_seq_id seq_id, uint32_t n_new) {
    const int64_t t_start = ggml_time_us();
    headkv_seq & seq = seqs[seq_id];
    const uint32_t n_more = seq.bound.n_slack + n_new - 1; // until the next one
    headkv_eviction eviction(lctx, *the_queries, the_store, heads, seq, seq_id, n_ctx_seq - std::min(n_ctx_seq, n_more));
    eviction.apply();
    eviction.finish(seq);
    seq.n_tail = the_store.n_tail(seq_id);

    // heads keep other numbers than they had: what they own is changed once, or as often as these change
    const uint32_t n_tail = (uint32_t) seq.n_in_tail() + n_more;
    for (auto & layer : the_store.layers) {
        headkv_rows rows;
        rows.n_tail = n_tail;
        bool fits = true;
        for (const auto & range : layer.ranges[seq_id]) {
            rows.n_kept.push_back(range.n_kept);
            rows.n_used.push_back(range.n_used(seq.n_in_tail()));
            fits &= range.n_cap - range.n_kept >= n_tail;
        }
        if (!fits) {
            the_store.relayout(layer, { { seq_id, rows } }, cfg->n_buckets);
        }
    }
    seq.n_tail = the_store.n_tail(seq_id);
    seq.t_evict_us += ggml_time_us() - t_start;
}

// Cells of the head of a sequence that has most, whatever was said before: what n_ctx bounds.
uint32_t llama_kv_cache_ragged::n_held(llama_seq_id seq_id) const {
    const headkv_seq & seq = seqs[seq_id];
    if (seq.state != HEADKV_SEQ_COMPRESSED || seq.bound.n_cells == 0) {
        return seq.n_pos;
    }
    uint32_t res = 0;
    for (const auto & layer : the_store.layers) {
        for (const auto & range : layer.ranges[seq_id]) {
            res = std::max(res, range.n_used(seq.n_in_tail()));
        }
    }
    return res;
}
