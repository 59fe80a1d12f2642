// The attention of a graph: how a layer attends while a prompt is read and while tokens are generated.

#include "headkv-graph.h"
#include "headkv-hooks.h"

#include "headkv-attend-prompt.h"
#include "headkv-error.h"
#include "headkv-expected.h"
#include "headkv-refs.h"
#include "headkv-stages.h"
#include "llama-kv-cache-ragged.h"

#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <map>
#include <stdexcept>

//
// what the memory class learns of it
//

void llama_kv_cache_ragged::refuse(const std::string & why) const {
    const std::string what = format("KV compression is not possible for architecture %s: %s", model.arch_name().c_str(), why.c_str());
    headkv_set_error(what);
    throw std::runtime_error(what);
}

std::string llama_kv_cache_ragged::why_no_rank(const headkv_config & c) const {
    for (const auto & layer : the_store.layers) {
        if (c.rank->values == HEADKV_VALUES_OUTPUT && !layer.wo) {
            return format("policy '%s' needs the output matrix of layer %d, which is not applied to the attention as it is: use policy 'snapkv'",
                    c.policy.c_str(), layer.il);
        }
    }
    return c.rank->by_refs ? headkv_why_no_expected(the_store.layers) : "";
}

void llama_kv_cache_ragged::note_layers(const std::string & why_not) {
    why_not_cut = why_not;
    choose_order();
}

void llama_kv_cache_ragged::choose_order() {
    token_major = why_not_cut;
    if (!token_major.empty() || !the_beside || cfg->prefill != HEADKV_PREFILL_AUTO) {
        return;
    }
    // of a token: in one layer at a time, in all of them
    size_t n_layer_bytes = 0;
    for (const auto & layer : the_store.layers) {
        n_layer_bytes = std::max(n_layer_bytes, layer.n_bytes_cell());
    }
    size_t n_ring = 0; // what windowed layers keep for the archive
    size_t n_rings = 0;
    for (int32_t il : the_archive ? windowed_ils() : std::vector<int32_t>()) {
        const size_t n = the_beside->n_bytes_row(il, false) + the_beside->n_bytes_row(il, true);
        n_ring = std::max(n_ring, n);
        n_rings += n;
    }
    const size_t n_hidden_bytes = hparams.n_embd * (cfg->hidden_f16 ? sizeof(ggml_fp16_t) : sizeof(float));
    if (n_hidden_bytes + n_layer_bytes + n_ring > bytes_cell() + n_rings) {
        token_major = format("of a token, the hidden state and K and V of one layer take %zu bytes, K and V of all layers that are compressed%s %zu",
                n_hidden_bytes + n_layer_bytes + n_ring, n_rings > 0 ? " or archived" : "", bytes_cell() + n_rings);
    }
}

int32_t llama_kv_cache_ragged::layer_of(const ggml_tensor * t) const {
    for (const auto & layer : the_store.layers) {
        if (t == the_staging.sums(layer.il, false) || t == the_staging.sums(layer.il, true)) {
            return layer.il;
        }
    }
    return the_beside ? the_beside->layer_of_state(t) : -1;
}

void llama_kv_cache_ragged::note_graph(const std::vector<int32_t> & built) {
    std::vector<int32_t> sorted(built), ils;
    std::sort(sorted.begin(), sorted.end());
    for (const auto & layer : the_store.layers) {
        ils.push_back(layer.il);
    }
    graph_complete = sorted == ils;
}

//
// attention
//

// Flash attention of heads that lie side by side; q [n_embd_head_k, n_tokens, n_group, n_heads]. Returns rows of n_group*n_embd_head_v,
// (head, token). It takes one sink per head of its second batch dimension, the same for all of the third: with sinks it is called head by head.
static ggml_tensor * build_flash_attn(const llm_graph_context & gctx, const std::vector<int32_t> & heads,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * mask, ggml_tensor * sinks, float kq_scale) {
    ggml_context * ctx = gctx.ctx0;
    const int64_t n_once = sinks ? 1 : q->ne[3];
    const auto part = [&](ggml_tensor * x, int64_t first) {
        return n_once == x->ne[3] ? x : ggml_view_4d(ctx, x, x->ne[0], x->ne[1], x->ne[2], n_once, x->nb[1], x->nb[2], x->nb[3], first * x->nb[3]);
    };
    ggml_tensor * res = nullptr;
    for (int64_t first = 0; first < q->ne[3]; first += n_once) {
        ggml_tensor * cur = ggml_flash_attn_ext(ctx, part(q, first), part(k, first), part(v, first), part(mask, first), kq_scale, 0.0f,
                gctx.hparams.attn_soft_cap ? gctx.hparams.f_attn_logit_softcapping : 0.0f);
        ggml_flash_attn_ext_add_sinks(cur, headkv_sinks_of_head(ctx, sinks, q->ne[2], heads[first]));
        ggml_prec_set_acc(cur, GGML_PREC_F32);
        cur = ggml_reshape_2d(ctx, cur, v->ne[0] * q->ne[2], q->ne[1] * n_once);
        res = res ? ggml_concat(ctx, res, cur, 1) : cur;
    }
    return res;
}

// Heads as the third batch dimension of flash attention: overlapping views give every head its own range, masks its length.
static ggml_tensor * build_attend_composed(const llm_graph_context & gctx, headkv_input & inp, const headkv_store_layer & layer,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * sinks, float kq_scale) {
    ggml_context * ctx = gctx.ctx0;

    const int64_t D = layer.n_embd_head_k;
    const int64_t D_v = layer.n_embd_head_v;
    const int64_t H = layer.n_head_kv;
    const int64_t G = layer.n_head / layer.n_head_kv;
    const int64_t T = q->ne[2];

    const auto & buckets = layer.buckets.at(inp.seq);
    const bool natural = buckets.size() == 1;

    ggml_tensor * order = nullptr;
    ggml_tensor * inverse = nullptr;
    if (!natural) {
        // rows of a GQA group are gathered bucket by bucket, (head, token) within, and put back afterwards
        headkv_input::order_t o = { headkv_new_input_1d(ctx, GGML_TYPE_I32, H * T, "headkv_order"), std::vector<int32_t>() };
        headkv_input::order_t i = { headkv_new_input_1d(ctx, GGML_TYPE_I32, H * T, "headkv_inverse"), std::vector<int32_t>(H * T) };
        for (const auto & b : buckets) {
            for (int32_t h : b.heads) {
                for (int64_t t = 0; t < T; ++t) {
                    i.values[t * H + h] = (int32_t) o.values.size();
                    o.values.push_back((int32_t) (t * H + h));
                }
            }
        }
        order = o.tensor;
        inverse = i.tensor;
        inp.orders.push_back(std::move(o));
        inp.orders.push_back(std::move(i));
        q = ggml_get_rows(ctx, ggml_reshape_2d(ctx, q, D * G, H * T), order);
    }

    ggml_tensor * res = nullptr;
    int64_t first = 0;
    for (size_t ib = 0; ib < buckets.size(); ++ib) {
        const auto & b = buckets[ib];
        const int64_t n = (int64_t) b.heads.size();

        // [D, T, G, n]
        ggml_tensor * qb = natural
                ? ggml_permute(ctx, ggml_reshape_4d(ctx, q, D, G, H, T), 0, 2, 3, 1)
                : ggml_permute(ctx, ggml_view_4d(ctx, q, D, G, T, n, D * q->nb[0], q->nb[1], T * q->nb[1], first * T * q->nb[1]), 0, 2, 1, 3);
        ggml_tensor * kb = ggml_view_4d(ctx, k, D, b.n_kv, 1, n, k->nb[1], b.cap * k->nb[1], b.cap * k->nb[1], b.off * k->nb[1]);
        ggml_tensor * vb = ggml_view_4d(ctx, v, D_v, b.n_kv, 1, n, v->nb[1], b.cap * v->nb[1], b.cap * v->nb[1], b.off * v->nb[1]);

        ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, b.n_kv, T, 1, n);
        ggml_set_input(mask);
        ggml_format_name(mask, "headkv_mask_l%d_b%d", layer.il, (int) ib);
        inp.masks.push_back({ mask, layer.il, ib });

        ggml_tensor * cur = build_flash_attn(gctx, b.heads, qb, kb, vb, mask, sinks, kq_scale);
        if (natural && T > 1) {
            cur = ggml_cont(ctx, ggml_permute(ctx, ggml_reshape_4d(ctx, cur, D_v * G, T, n, 1), 0, 2, 1, 3));
        }
        cur = ggml_reshape_2d(ctx, cur, D_v * G, T * n);
        res = res ? ggml_concat(ctx, res, cur, 1) : cur;
        first += n;
    }
    if (!natural) {
        res = ggml_get_rows(ctx, res, inverse);
    }
    return ggml_reshape_2d(ctx, res, D_v * G * H, T);
}

static ggml_tensor * rows_2d(ggml_context * ctx, ggml_tensor * x) {
    // [n_embd_head_k or n_embd_head_v, n_head, n_tokens] -> one row per head and token; a fused QKV projection leaves strided views
    return ggml_is_contiguous(x) ? ggml_reshape_2d(ctx, x, x->ne[0], x->ne[1] * x->ne[2])
                                 : ggml_cont_2d(ctx, x, x->ne[0], x->ne[1] * x->ne[2]);
}

// What the graph says of a layer; a worst-case graph is built when the context is created: a refusal ends up there.
static void note_layer(const llm_graph_context & gctx, headkv_input & inp, ggml_tensor * wo, ggml_tensor * wo_s,
        const ggml_tensor * q_cur, ggml_tensor * v_cur, bool is_flat, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il) {
    const auto * mctx = inp.mctx_ragged;
    auto * kv = mctx->get_kv();
    headkv_store_layer * layer = kv->store().find(il);

    if (kq_b) {
        kv->refuse(format("layer %d adds a bias to its attention", il));
    }
    if (sinks && gctx.hparams.use_alibi) {
        kv->refuse(format("layer %d has sinks beside ALiBi", il));
    }
    if (!layer) {
        kv->refuse(format("it attends in layer %d, which has no KV heads", il));
    }
    if (v_cur->ne[0] != layer->n_embd_head_v) {
        kv->refuse(format("the V of layer %d comes in rows of %lld, which is not what its cache holds", il, (long long) v_cur->ne[0]));
    }
    if (is_flat && !layer->fused_prompt) {
        kv->refuse("V that comes in rows of all heads needs attend 'fused' on the CPU: use attend 'auto', and no GPU layers");
    }
    inp.ils_built.push_back(il);
    if (mctx->is_full()) {
        kv->note_graph(inp.ils_built);
    }
    // adapters on top of wo are left out
    layer->wo = wo && wo->ne[0] == (int64_t) layer->n_embd_head_v * layer->n_head ? wo : nullptr;
    layer->wo_s = wo_s;
    layer->sinks = sinks;
    layer->rope = headkv_rope_of(q_cur);
    if (mctx->is_full() && kv->is_graph_complete()) {
        const std::string why_not = kv->why_no_rank(kv->config());
        if (!why_not.empty()) {
            kv->refuse(why_not);
        }
    }
    const bool is_grok = gctx.arch == LLM_ARCH_GROK; // its scale stands in the attention of upstream, and kq_scale is 1
    layer->attend->scale = is_grok ? kq_scale * gctx.hparams.f_attn_out_scale : kq_scale;
    layer->attend->softcap = is_grok || gctx.hparams.attn_soft_cap ? gctx.hparams.f_attn_logit_softcapping : 0.0f;
    layer->attend->max_bias = gctx.hparams.f_max_alibi_bias;
}

static const headkv_input::refs_t & refs_of(const llm_graph_context & gctx, headkv_input & inp, const headkv_layer_shape & layer) {
    const auto heads = std::make_pair(layer.n_head, layer.n_head_kv);
    if (!inp.refs.count(heads)) {
        const int64_t n = std::min<int64_t>(gctx.ubatch.n_tokens, inp.mctx_ragged->get_kv()->staging().n_refs() * gctx.ubatch.n_seqs_unq) * layer.n_head_kv;
        inp.refs[heads] = { headkv_new_input_1d(gctx.ctx0, GGML_TYPE_I32, n, "headkv_ref_rows"), headkv_new_input_1d(gctx.ctx0, GGML_TYPE_I64, n, "headkv_ref_slots") };
    }
    return inp.refs.at(heads);
}

// while a prompt is read: its last queries go to the ring, some of all to the references, its attention to the sums
static void build_capture(const llm_graph_context & gctx, headkv_input & inp, ggml_tensor * q_cur, ggml_tensor * k_cur, int il) {
    ggml_context * ctx = gctx.ctx0;
    const auto * mctx = inp.mctx_ragged;
    ggml_build_forward_expand(gctx.gf, headkv_build_window(ctx, q_cur, inp.self_k_rot, mctx->get_ring(il), inp.tokens, inp.slots));
    if (ggml_tensor * refs = mctx->get_kv()->staging().refs(il, mctx->is_full())) {
        const auto & to = refs_of(gctx, inp, *mctx->get_layer(il));
        ggml_build_forward_expand(gctx.gf, headkv_build_refs(ctx, q_cur, inp.self_k_rot, refs, to.rows, to.slots));
    }
    const headkv_store_layer & layer = *mctx->get_kv()->store().find(il);
    if (ggml_tensor * sums = mctx->get_sums(il); sums && !layer.fused_prompt) { // else attention adds to them itself
        const auto * staging = mctx->get_staging();
        ggml_tensor * q = inp.self_k_rot ? llama_mul_mat_hadamard(ctx, q_cur, inp.self_k_rot) : q_cur;
        ggml_tensor * k = inp.self_k_rot ? llama_mul_mat_hadamard(ctx, k_cur, inp.self_k_rot) : k_cur;
        ggml_build_forward_expand(gctx.gf, staging->cpy_k(ctx, k, inp.self_k_idxs, il)); // upstream will do it again
        headkv_build_sums(ctx, gctx.gf, q, staging->get_k(ctx, il), inp.self_kq_mask_cnv, sums, inp.self_k_idxs, layer.attend->scale, layer.attend->softcap, layer.sinks, layer.attend->max_bias);
    }
}

static ggml_tensor * rotated(ggml_context * ctx, ggml_tensor * x, ggml_tensor * rot) {
    return x && rot ? llama_mul_mat_hadamard(ctx, x, rot) : x;
}

// together, so that the scheduler does not split between them
static void expand_together(ggml_cgraph * gf, ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur) {
    ggml_build_forward_expand(gf, q_cur);
    if (k_cur) {
        ggml_build_forward_expand(gf, v_cur);
        ggml_build_forward_expand(gf, k_cur);
    }
}

// while a prompt is read: its rows go to the staging, and every token attends to what comes before it; without k_cur they are there
static ggml_tensor * build_attend_prompt(const llm_graph_context & gctx, const headkv_input & inp, const headkv_store_layer & layer,
        ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * sinks) {
    ggml_context * ctx = gctx.ctx0;
    q_cur = rotated(ctx, q_cur, inp.self_k_rot);
    k_cur = rotated(ctx, k_cur, inp.self_k_rot);
    v_cur = rotated(ctx, v_cur, inp.self_v_rot);
    expand_together(gctx.gf, q_cur, k_cur, v_cur);

    const auto * staging = inp.mctx_ragged->get_staging();
    if (k_cur) {
        ggml_build_forward_expand(gctx.gf, staging->cpy_k(ctx, k_cur, inp.self_k_idxs, layer.il));
        ggml_build_forward_expand(gctx.gf, staging->cpy_v(ctx, v_cur, inp.self_v_idxs, layer.il));
    }
    auto * attend = inp.mctx_ragged->get_kv()->store().find(layer.il)->attend.get();
    ggml_tensor * sums = k_cur ? inp.mctx_ragged->get_sums(layer.il) : nullptr; // of the layer whose cells they are
    return headkv_build_attend_prompt(ctx, attend, gctx.cparams.n_threads_batch, q_cur, staging->get_k(ctx, layer.il), staging->get_v(ctx, layer.il), inp.cells,
            ggml_reshape_2d(ctx, inp.seen, 2, gctx.n_tokens), sinks, sums, sums ? inp.self_k_idxs : nullptr);
}

// while tokens are generated: their rows go to the store, and every head attends to its own; without k_cur they are there
static ggml_tensor * build_attend(const llm_graph_context & gctx, headkv_input & inp, const headkv_store_layer & layer,
        ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * sinks, float kq_scale) {
    ggml_context * ctx = gctx.ctx0;
    q_cur = rotated(ctx, q_cur, inp.self_k_rot);
    k_cur = rotated(ctx, k_cur, inp.self_k_rot);
    v_cur = rotated(ctx, v_cur, inp.self_v_rot);
    expand_together(gctx.gf, q_cur, k_cur, v_cur);

    ggml_tensor * k = layer.k;
    ggml_tensor * v = layer.v;
    if (k_cur) {
        ggml_tensor * rows = inp.rows_of_layer(gctx, layer);
        k = ggml_set_rows(ctx, k, rows_2d(ctx, k_cur), rows);
        v = ggml_set_rows(ctx, v, rows_2d(ctx, v_cur), rows);
    }

    ggml_tensor * q = ggml_is_contiguous(q_cur) ? q_cur : ggml_cont(ctx, q_cur);
    if (inp.queries && k_cur) {
        ggml_tensor * ring = inp.mctx_ragged->get_kv()->queries()->of_layer(layer.il);
        ggml_build_forward_expand(gctx.gf, ggml_set_rows(ctx, ring, ggml_reshape_2d(ctx, q, ring->ne[0], q->ne[2]), inp.queries));
    }
    auto * attend = inp.mctx_ragged->get_kv()->store().find(layer.il)->attend.get(); // that of the twin computes nothing
    return layer.fused
            ? headkv_build_attend_fused(ctx, attend, q, k, v, inp.ranges_of_layer(gctx, layer), inp.bias_of_layer(gctx, layer), sinks, inp.pos_of_layer(gctx, layer))
            : build_attend_composed(gctx, inp, layer, q, k, v, sinks, kq_scale);
}

// A layer without cells of its own: to those of another one, which has been computed before, in the staging, the store, or a ring.
static ggml_tensor * build_attend_shared(const llm_graph_context & gctx, llm_graph_input_attn_kv * inp_kv, ggml_tensor * q_cur,
        ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il) {
    ggml_context * ctx = gctx.ctx0;
    if (auto * inp = dynamic_cast<headkv_input *>(inp_kv)) {
        auto * kv = inp->mctx_ragged->get_kv();
        const int32_t il_seen = kv->layer_seen_by(il);
        const headkv_store_layer & layer = *inp->mctx_ragged->get_layer(il_seen);
        if (kq_b || kv->store().find(il_seen)->attend->scale != kq_scale) {
            kv->refuse(format("layer %d attends to cells of layer %d in another way than that one", il, il_seen));
        }
        if (inp->store) {
            return build_attend(gctx, *inp, layer, q_cur, nullptr, nullptr, sinks, kq_scale);
        }
        if (layer.fused_prompt) {
            return build_attend_prompt(gctx, *inp, layer, q_cur, nullptr, nullptr, sinks);
        }
    }
    ggml_tensor * q = rotated(ctx, q_cur, inp_kv->self_k_rot);
    ggml_build_forward_expand(gctx.gf, q);
    ggml_tensor * k = inp_kv->mctx->get_k(ctx, il);
    ggml_tensor * v = inp_kv->mctx->get_v(ctx, il);
    return gctx.build_attn_mha(q, k, v, kq_b, inp_kv->get_kq_mask(), sinks, nullptr, 0, kq_scale, il);
}

ggml_tensor * headkv_build_attn(const llm_graph_context & gctx, llm_graph_input_attn_kv * inp_kv,
        ggml_tensor * wo, ggml_tensor * wo_b, ggml_tensor * wo_s,
        ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur,
        ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il) {
    auto * inp = dynamic_cast<headkv_input *>(inp_kv);
    ggml_context * ctx = gctx.ctx0;
    ggml_tensor * cur;
    if (!k_cur) {
        cur = build_attend_shared(gctx, inp_kv, q_cur, kq_b, sinks, kq_scale, il);
    } else if (!inp) {
        return nullptr;
    } else {
        const int64_t n_embd_head_v = gctx.hparams.n_embd_head_v(il);
        const bool is_flat = v_cur->ne[0] == n_embd_head_v * gctx.hparams.n_head_kv(il) && v_cur->ne[1] == gctx.n_tokens && n_embd_head_v != v_cur->ne[0];
        if (is_flat) {
            v_cur = ggml_reshape_3d(ctx, v_cur, n_embd_head_v, gctx.hparams.n_head_kv(il), gctx.n_tokens);
        }
        note_layer(gctx, *inp, wo, wo_s, q_cur, v_cur, is_flat, kq_b, sinks, kq_scale, il);
        if (!inp->store) {
            build_capture(gctx, *inp, q_cur, k_cur, il);
        }
        const headkv_store_layer & layer = *inp->mctx_ragged->get_layer(il);
        if (!inp->store && !layer.fused_prompt) {
            return nullptr;
        }
        cur = inp->store ? build_attend(gctx, *inp, layer, q_cur, k_cur, v_cur, sinks, kq_scale)
                         : build_attend_prompt(gctx, *inp, layer, q_cur, k_cur, v_cur, sinks);
    }
    gctx.cb(cur, "kqv_out", il);

    // from here on as upstream's build_attn()
    if (inp_kv->self_v_rot) {
        cur = llama_mul_mat_hadamard(ctx, cur, inp_kv->self_v_rot);
    }
    if (wo) {
        const bool acc_f32 = gctx.arch == LLM_ARCH_GLM4 || gctx.arch == LLM_ARCH_GLM4_MOE || gctx.arch == LLM_ARCH_JAIS2;
        cur = gctx.build_lora_mm(wo, cur, acc_f32 ? nullptr : wo_s);
        if (acc_f32) {
            ggml_prec_set_acc(cur, GGML_PREC_F32);
            cur = wo_s ? ggml_mul(ctx, cur, wo_s) : cur;
        }
    }
    return wo_b ? ggml_add(ctx, cur, wo_b) : cur;
}
