// The attention of a graph: its inputs, and how a layer attends while a prompt is read and while tokens are generated.

#include "headkv-graph.h"
#include "headkv-hooks.h"

#include "headkv-error.h"
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

std::string llama_kv_cache_ragged::why_no_values(const headkv_config & c) const {
    for (const auto & layer : the_store.layers) {
        if (c.rank->values == HEADKV_VALUES_OUTPUT && !layer.wo) {
            return format("policy '%s' needs the output matrix of layer %d, which is not applied to the attention as it is: use policy 'snapkv'",
                    c.policy.c_str(), layer.il);
        }
    }
    return "";
}

void llama_kv_cache_ragged::note_layers(const std::string & why_not) {
    token_major = why_not;
    size_t n_layer_bytes = 0; // of a token, in the largest layer
    for (const auto & layer : the_store.layers) {
        n_layer_bytes = std::max(n_layer_bytes, layer.n_bytes_cell());
    }
    const size_t n_hidden_bytes = hparams.n_embd * (cfg->hidden_f16 ? sizeof(ggml_fp16_t) : sizeof(float));
    if (why_not.empty() && cfg->prefill == HEADKV_PREFILL_AUTO && n_hidden_bytes + n_layer_bytes > bytes_cell()) {
        token_major = format("of a token, the hidden state and K and V of one layer take %zu bytes, K and V of all layers that are compressed %zu",
                n_hidden_bytes + n_layer_bytes, bytes_cell());
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
// graph input
//

class headkv_input : public llm_graph_input_attn_kv {
public:
    headkv_input(const llama_hparams & hparams, const llama_cparams & cparams, const llama_kv_cache_ragged_context * mctx, bool store) :
        llm_graph_input_attn_kv(hparams, cparams, store ? nullptr : mctx->get_staging()),
        mctx_ragged(mctx), store(store), generation(mctx->generation()) {
    }

    void set_input(const llama_ubatch * ubatch) override {
        if (!store) {
            llm_graph_input_attn_kv::set_input(ubatch);
            mctx_ragged->set_input_window(tokens, slots, ubatch);
            for (const auto & [heads, r] : refs) {
                const headkv_staging & staging = mctx_ragged->get_kv()->staging();
                const auto [from, to] = headkv_ref_rows(*ubatch, r.rows->ne[0] / heads.second, heads.first, heads.second, staging.n_refs(), staging.n_ref_slots());
                ggml_backend_tensor_set(r.rows, from.data(), 0, from.size() * sizeof(int32_t));
                ggml_backend_tensor_set(r.slots, to.data(), 0, to.size() * sizeof(int64_t));
            }
            if (banded) {
                const size_t nb = mctx_ragged->get_kv()->staging().band()->nb[1];
                banded->nb[1] = nb;
                banded->nb[2] = banded->nb[3] = nb * banded->ne[1];
            }
            return;
        }
        auto * kv = mctx_ragged->get_kv();
        if (self_k_rot) {
            kv->staging().twin().set_input_k_rot(self_k_rot);
        }
        if (self_v_rot) {
            kv->staging().twin().set_input_v_rot(self_v_rot);
        }
        mctx_ragged->set_input_rows(rows, ubatch);
        if (ranges) {
            mctx_ragged->set_input_ranges(ranges, ubatch);
        }
        if (bias) {
            mctx_ragged->set_input_bias(bias, ubatch);
        }
        // the output of a layer may be unused: what belongs to it is not part of the graph then
        for (const auto & m : masks) {
            if (!m.mask->buffer) {
                continue;
            }
            mctx_ragged->set_input_mask(m.mask, *kv->store().find(m.il), m.i_bucket, ubatch);
        }
        for (const auto & o : orders) {
            if (!o.tensor->buffer) {
                continue;
            }
            ggml_backend_tensor_set(o.tensor, o.values.data(), 0, o.values.size() * sizeof(int32_t));
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        const auto * mctx_new = dynamic_cast<const llama_kv_cache_ragged_context *>(params.mctx);
        if (!mctx_new || mctx_new->is_full() || mctx_new->is_layered() || mctx_new->is_store() != store || mctx_new->generation() != generation) {
            return false;
        }
        mctx_ragged = mctx_new;
        if (store) {
            // the views and masks of the composed path are those of a sequence
            const bool same_seq = masks.empty() || seq == params.ubatch.seq_id_unq[0];
            return rows->ne[0] == n_head_kv_all * params.ubatch.n_tokens && n_seqs == params.ubatch.n_seqs_unq && same_seq;
        }
        mctx = mctx_ragged->get_staging();
        return self_k_idxs->ne[0] == params.ubatch.n_tokens &&
                self_kq_mask->ne[0] == mctx->get_n_kv() &&
                self_kq_mask->ne[1] == params.ubatch.n_tokens;
    }

    // the ubatch's share of a packed input that belongs to the layer
    ggml_tensor * rows_of_layer(const llm_graph_context & gctx, const headkv_store_layer & layer) {
        const int64_t n_tokens = gctx.n_tokens;
        return ggml_view_1d(gctx.ctx0, on_device(gctx, rows, layer), layer.n_head_kv * n_tokens, first_head.at(layer.il) * n_tokens * sizeof(int32_t));
    }

    ggml_tensor * ranges_of_layer(const llm_graph_context & gctx, const headkv_store_layer & layer) {
        return ggml_view_3d(gctx.ctx0, on_device(gctx, ranges, layer), 2, layer.n_head_kv, n_seqs, 2 * sizeof(int32_t), 2 * layer.n_head_kv * sizeof(int32_t),
                2 * first_head.at(layer.il) * n_seqs * sizeof(int32_t));
    }

    ggml_tensor * bias_of_layer(const llm_graph_context & gctx, const headkv_store_layer & layer) {
        return !bias ? nullptr : ggml_view_2d(gctx.ctx0, on_device(gctx, bias, layer), layer.n_head_kv, n_seqs, layer.n_head_kv * sizeof(float), first_head.at(layer.il) * n_seqs * sizeof(float));
    }

    // An input in the memory of the layer's device: copied there once, not piece by piece for every layer.
    ggml_tensor * on_device(const llm_graph_context & gctx, ggml_tensor * input, const headkv_store_layer & layer) {
        const ggml_backend_dev_t dev = ggml_backend_buft_get_device(layer.buft);
        if (!dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU || !gctx.sched) {
            return input;
        }
        ggml_tensor *& res = copies[{ input, layer.buft }];
        for (int i = 0; !res && i < ggml_backend_sched_get_n_backends(gctx.sched); ++i) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(gctx.sched, i);
            if (ggml_backend_get_device(backend) != dev) {
                continue;
            }
            res = ggml_cont(gctx.ctx0, input);
            if (ggml_backend_supports_op(backend, res)) {
                ggml_backend_sched_set_tensor_backend(gctx.sched, res, backend);
            }
        }
        return res ? res : input;
    }

    const llama_kv_cache_ragged_context * mctx_ragged;

    const bool store;
    const uint64_t generation;

    // prompt: which tokens of the ubatch go to which slots of the window
    ggml_tensor * tokens = nullptr; // I32 [n]
    ggml_tensor * slots = nullptr; // I64 [n]
    struct refs_t {
        ggml_tensor * rows; // I32 [n], see headkv_build_refs()
        ggml_tensor * slots; // I64 [n]
    };
    std::map<std::pair<int32_t, int32_t>, refs_t> refs; // of layers with so many query and KV heads
    ggml_tensor * banded = nullptr; // the mask, if it is a window into the band

    // decode: where the new rows go and what each head sees, all layers one after the other
    ggml_tensor * rows = nullptr; // I32, per layer [n_head_kv, n_tokens]
    ggml_tensor * ranges = nullptr; // I32, per layer [2, n_head_kv, n_seqs]
    ggml_tensor * bias = nullptr; // F32, per layer [n_head_kv, n_seqs], of the first row; null = no head has one
    std::unordered_map<int32_t, int64_t> first_head; // of a layer, counted over all layers
    int64_t n_head_kv_all = 0;
    uint32_t n_seqs = 0;
    llama_seq_id seq = 0; // the first one; the composed path attends for one

    struct mask_t {
        ggml_tensor * mask;
        int32_t il;
        size_t i_bucket;
    };
    struct order_t {
        ggml_tensor * tensor;
        std::vector<int32_t> values;
    };
    std::vector<mask_t> masks;
    std::vector<order_t> orders;

    std::map<std::pair<ggml_tensor *, ggml_backend_buffer_type_t>, ggml_tensor *> copies; // see on_device()

    std::vector<int32_t> ils_built; // layers whose attention went through the hook
};

static ggml_tensor * new_input(ggml_context * ctx, ggml_type type, int64_t n, const char * name) {
    ggml_tensor * res = ggml_new_tensor_1d(ctx, type, n);
    ggml_set_input(res);
    ggml_set_name(res, name);
    return res;
}

// The mask of a ubatch of a prompt whose cells are its positions, without writing it for every step. In host memory: a
// window into the band, which has its own row stride; set_input() sets it, because ggml_flash_attn_ext() asks for
// contiguous rows when it is called. Elsewhere: zeros for the tokens before the ubatch, then the diagonal block; null where
// a backend lacks an op.
static ggml_tensor * build_mask_of_step(ggml_context * ctx, headkv_input & inp, const llama_kv_cache_ragged_context & mctx,
        int64_t n_tokens, const ggml_tensor * like, ggml_backend_sched_t sched) {
    ggml_tensor * band = mctx.get_kv()->staging().band();
    if (like->type != band->type) {
        return nullptr;
    }
    const int64_t n_kv = like->ne[0];
    const int64_t n_past = mctx.token_step();

    if (ggml_backend_buffer_is_host(band->buffer)) {
        const headkv_store_layer * layer = mctx.get_layer(mctx.layer_step());
        if (!layer || layer->buft != ggml_backend_buffer_get_type(band->buffer)) {
            return nullptr; // the mask is copied to another device, which takes contiguous rows
        }
        for (int i = 0; sched && i < ggml_backend_sched_get_n_backends(sched); ++i) {
            // with a GPU beside it, parts of a large ubatch are computed there even if the layer is not
            if (!ggml_backend_supports_buft(ggml_backend_sched_get_backend(sched, i), layer->buft)) {
                return nullptr;
            }
        }
        ggml_tensor * mask = ggml_new_tensor_2d(ctx, band->type, n_kv, n_tokens);
        ggml_backend_tensor_alloc(band->buffer, mask, (char *) band->data + (mctx.get_kv()->staging().n_band() - n_past) * band->nb[0]);
        inp.banded = mask;
        return mask;
    }
    ggml_tensor * mask = ggml_cont(ctx, ggml_view_2d(ctx, band, n_kv - n_past, n_tokens, band->nb[1], 0));
    if (n_past > 0) {
        ggml_tensor * zeros = ggml_fill_inplace(ctx, ggml_new_tensor_2d(ctx, band->type, n_past, n_tokens), 0.0f);
        mask = ggml_concat(ctx, zeros, mask, 0);
        const ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(band->buffer));
        if (!dev || !ggml_backend_dev_supports_op(dev, zeros) || !ggml_backend_dev_supports_op(dev, mask)) {
            return nullptr;
        }
    }
    return mask;
}

std::unique_ptr<llm_graph_input_attn_kv> headkv_new_input(const llm_graph_context & gctx) {
    const auto * mctx = dynamic_cast<const llama_kv_cache_ragged_context *>(gctx.mctx);
    if (!mctx) {
        return nullptr;
    }
    ggml_context * ctx = gctx.ctx0;
    const auto & ubatch = gctx.ubatch;

    // worst-case graphs: one token per sequence stands for decode
    const bool store = mctx->is_full() ? ubatch.n_tokens == ubatch.n_seqs : mctx->is_store();

    auto inp = std::make_unique<headkv_input>(gctx.hparams, gctx.cparams, mctx, store);
    auto * kv = mctx->get_kv();

    if (store) {
        inp->n_seqs = ubatch.n_seqs_unq;
        inp->seq = ubatch.seq_id_unq[0];
        for (const auto & layer : kv->store().layers) {
            inp->first_head[layer.il] = inp->n_head_kv_all;
            inp->n_head_kv_all += layer.n_head_kv;
        }
        inp->rows = new_input(ctx, GGML_TYPE_I32, inp->n_head_kv_all * ubatch.n_tokens, "headkv_rows");
        if (kv->store().has_fused()) {
            inp->ranges = new_input(ctx, GGML_TYPE_I32, inp->n_head_kv_all * inp->n_seqs * 2, "headkv_ranges");
            // ranges do not change without a new generation
            if (mctx->is_full() ? kv->config().fit == HEADKV_FIT_MEAN : kv->store().compensates()) {
                inp->bias = new_input(ctx, GGML_TYPE_F32, inp->n_head_kv_all * inp->n_seqs, "headkv_bias");
            }
        }
        inp->self_k_rot = kv->staging().twin().build_input_k_rot(ctx);
        inp->self_v_rot = kv->staging().twin().build_input_v_rot(ctx);
    } else {
        const auto * staging = mctx->get_staging();
        inp->self_k_idxs = staging->build_input_k_idxs(ctx, ubatch);
        inp->self_v_idxs = staging->build_input_v_idxs(ctx, ubatch);
        inp->self_kq_mask = ggml_new_tensor_4d(ctx, gctx.cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, staging->get_n_kv(), ubatch.n_tokens, 1, 1);
        ggml_set_input(inp->self_kq_mask);
        ggml_set_name(inp->self_kq_mask, HEADKV_MASK_NAME);
        inp->self_kq_mask_cnv = inp->self_kq_mask;
        if (mctx->is_layered()) {
            if (ggml_tensor * mask = build_mask_of_step(ctx, *inp, *mctx, ubatch.n_tokens, inp->self_kq_mask, gctx.sched)) {
                ggml_set_name(mask, "headkv_mask");
                inp->self_kq_mask = nullptr; // nothing to fill
                inp->self_kq_mask_cnv = mask;
            }
        }
        inp->self_k_rot = staging->build_input_k_rot(ctx);
        inp->self_v_rot = staging->build_input_v_rot(ctx);

        const int64_t n = std::min<int64_t>(ubatch.n_tokens, (int64_t) kv->staging().n_ring() * ubatch.n_seqs_unq);
        inp->tokens = new_input(ctx, GGML_TYPE_I32, n, "headkv_window_tokens");
        inp->slots = new_input(ctx, GGML_TYPE_I64, n, "headkv_window_slots");
    }

    return inp;
}

llm_graph_input_attn_kv * headkv_build_inp(const llm_graph_context & gctx) {
    auto inp = headkv_new_input(gctx);
    return inp ? (llm_graph_input_attn_kv *) gctx.res->add_input(std::move(inp)) : nullptr;
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
        headkv_input::order_t o = { new_input(ctx, GGML_TYPE_I32, H * T, "headkv_order"), std::vector<int32_t>() };
        headkv_input::order_t i = { new_input(ctx, GGML_TYPE_I32, H * T, "headkv_inverse"), std::vector<int32_t>(H * T) };
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
        ggml_tensor * v_cur, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il) {
    const auto * mctx = inp.mctx_ragged;
    auto * kv = mctx->get_kv();
    headkv_store_layer * layer = kv->store().find(il);

    if (kq_b) {
        kv->refuse(format("layer %d adds a bias to its attention", il));
    }
    if (!layer) {
        kv->refuse(format("it attends in layer %d, which has no KV heads", il));
    }
    if (v_cur->ne[0] != layer->n_embd_head_v) {
        kv->refuse(format("the V of layer %d comes in rows of %lld instead of heads of %d: llama.cpp aborts on that with flash attention, which is required",
                il, (long long) v_cur->ne[0], layer->n_embd_head_v));
    }
    inp.ils_built.push_back(il);
    if (mctx->is_full()) {
        kv->note_graph(inp.ils_built);
    }
    // adapters on top of wo are left out
    layer->wo = wo && wo->ne[0] == (int64_t) layer->n_embd_head_v * layer->n_head ? wo : nullptr;
    layer->wo_s = wo_s;
    layer->sinks = sinks;
    if (mctx->is_full() && kv->is_graph_complete()) {
        const std::string why_not = kv->why_no_values(kv->config());
        if (!why_not.empty()) {
            kv->refuse(why_not);
        }
    }
    layer->attend->scale = kq_scale;
    layer->attend->softcap = gctx.hparams.attn_soft_cap ? gctx.hparams.f_attn_logit_softcapping : 0.0f;
}

static const headkv_input::refs_t & refs_of(const llm_graph_context & gctx, headkv_input & inp, const headkv_layer_shape & layer) {
    const auto heads = std::make_pair(layer.n_head, layer.n_head_kv);
    if (!inp.refs.count(heads)) {
        const int64_t n = std::min<int64_t>(gctx.ubatch.n_tokens, inp.mctx_ragged->get_kv()->staging().n_refs() * gctx.ubatch.n_seqs_unq) * layer.n_head_kv;
        inp.refs[heads] = { new_input(gctx.ctx0, GGML_TYPE_I32, n, "headkv_ref_rows"), new_input(gctx.ctx0, GGML_TYPE_I64, n, "headkv_ref_slots") };
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
    if (ggml_tensor * sums = mctx->get_sums(il)) {
        const auto * staging = mctx->get_staging();
        const headkv_store_layer & layer = *mctx->get_kv()->store().find(il);
        ggml_tensor * q = inp.self_k_rot ? llama_mul_mat_hadamard(ctx, q_cur, inp.self_k_rot) : q_cur;
        ggml_tensor * k = inp.self_k_rot ? llama_mul_mat_hadamard(ctx, k_cur, inp.self_k_rot) : k_cur;
        ggml_build_forward_expand(gctx.gf, staging->cpy_k(ctx, k, inp.self_k_idxs, il)); // upstream will do it again
        headkv_build_sums(ctx, gctx.gf, q, staging->get_k(ctx, il), inp.self_kq_mask_cnv, sums, inp.self_k_idxs, layer.attend->scale, layer.attend->softcap, layer.sinks);
    }
}

// while tokens are generated: their rows go to the store, and every head attends to its own; without k_cur they are there
static ggml_tensor * build_attend(const llm_graph_context & gctx, headkv_input & inp, const headkv_store_layer & layer,
        ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * sinks, float kq_scale) {
    ggml_context * ctx = gctx.ctx0;
    const auto rotated = [ctx](ggml_tensor * x, ggml_tensor * rot) { return x && rot ? llama_mul_mat_hadamard(ctx, x, rot) : x; };
    q_cur = rotated(q_cur, inp.self_k_rot);
    k_cur = rotated(k_cur, inp.self_k_rot);
    v_cur = rotated(v_cur, inp.self_v_rot);

    // together, so that the scheduler does not split between them
    ggml_build_forward_expand(gctx.gf, q_cur);
    ggml_tensor * k = layer.k;
    ggml_tensor * v = layer.v;
    if (k_cur) {
        ggml_build_forward_expand(gctx.gf, v_cur);
        ggml_build_forward_expand(gctx.gf, k_cur);
        ggml_tensor * rows = inp.rows_of_layer(gctx, layer);
        k = ggml_set_rows(ctx, k, rows_2d(ctx, k_cur), rows);
        v = ggml_set_rows(ctx, v, rows_2d(ctx, v_cur), rows);
    }

    ggml_tensor * q = ggml_is_contiguous(q_cur) ? q_cur : ggml_cont(ctx, q_cur);
    auto * attend = inp.mctx_ragged->get_kv()->store().find(layer.il)->attend.get(); // that of the twin computes nothing
    return layer.fused
            ? headkv_build_attend_fused(ctx, attend, q, k, v, inp.ranges_of_layer(gctx, layer), inp.bias_of_layer(gctx, layer), sinks)
            : build_attend_composed(gctx, inp, layer, q, k, v, sinks, kq_scale);
}

// A layer without cells of its own: to those of another one, which has been computed before, in the staging, the store, or a ring.
static ggml_tensor * build_attend_shared(const llm_graph_context & gctx, llm_graph_input_attn_kv * inp_kv, ggml_tensor * q_cur,
        ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il) {
    auto * inp = dynamic_cast<headkv_input *>(inp_kv);
    if (inp && inp->store) {
        auto * kv = inp->mctx_ragged->get_kv();
        const int32_t il_seen = kv->layer_seen_by(il);
        if (kq_b || kv->store().find(il_seen)->attend->scale != kq_scale) {
            kv->refuse(format("layer %d attends to cells of layer %d in another way than that one", il, il_seen));
        }
        return build_attend(gctx, *inp, *inp->mctx_ragged->get_layer(il_seen), q_cur, nullptr, nullptr, sinks, kq_scale);
    }
    ggml_context * ctx = gctx.ctx0;
    ggml_tensor * q = inp_kv->self_k_rot ? llama_mul_mat_hadamard(ctx, q_cur, inp_kv->self_k_rot) : q_cur;
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
        note_layer(gctx, *inp, wo, wo_s, v_cur, kq_b, sinks, kq_scale, il);
        if (!inp->store) {
            build_capture(gctx, *inp, q_cur, k_cur, il);
            return nullptr;
        }
        cur = build_attend(gctx, *inp, *inp->mctx_ragged->get_layer(il), q_cur, k_cur, v_cur, sinks, kq_scale);
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
