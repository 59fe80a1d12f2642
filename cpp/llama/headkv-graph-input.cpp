// The input of the layers that are ours: where the rows of a ubatch go, and what each head sees.

#include "headkv-graph.h"
#include "headkv-hooks.h"
#include "headkv-refs.h"
#include "llama-kv-cache-ragged.h"

#include "llama-impl.h"

#include <algorithm>

headkv_input::headkv_input(const llama_hparams & hparams, const llama_cparams & cparams, const llama_kv_cache_ragged_context * mctx, bool store) :
    llm_graph_input_attn_kv(hparams, cparams, store ? nullptr : mctx->get_staging()),
    mctx_ragged(mctx), store(store), generation(mctx->generation()) {
}

void headkv_input::set_input(const llama_ubatch * ubatch) {
    if (!store) {
        llm_graph_input_attn_kv::set_input(ubatch);
        mctx_ragged->set_input_window(tokens, slots, ubatch);
        if (cells && cells->buffer) {
            mctx_ragged->set_input_cells(cells, seen, ubatch);
        }
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
    if (pos) {
        mctx_ragged->set_input_pos(pos, ubatch);
    }
    if (queries) {
        mctx_ragged->set_input_queries(queries, ubatch);
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

bool headkv_input::can_reuse(const llm_graph_params & params) {
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
    const bool same_mask = !self_kq_mask || (self_kq_mask->ne[0] == mctx->get_n_kv() && self_kq_mask->ne[1] == params.ubatch.n_tokens);
    return self_k_idxs->ne[0] == params.ubatch.n_tokens && same_mask;
}

ggml_tensor * headkv_input::rows_of_layer(const llm_graph_context & gctx, const headkv_store_layer & layer) {
    const int64_t n_tokens = gctx.n_tokens;
    return ggml_view_1d(gctx.ctx0, on_device(gctx, rows, layer), layer.n_head_kv * n_tokens, first_head.at(layer.il) * n_tokens * sizeof(int32_t));
}

ggml_tensor * headkv_input::ranges_of_layer(const llm_graph_context & gctx, const headkv_store_layer & layer) {
    return ggml_view_3d(gctx.ctx0, on_device(gctx, ranges, layer), 2, layer.n_head_kv, n_seqs, 2 * sizeof(int32_t), 2 * layer.n_head_kv * sizeof(int32_t),
            2 * first_head.at(layer.il) * n_seqs * sizeof(int32_t));
}

ggml_tensor * headkv_input::bias_of_layer(const llm_graph_context & gctx, const headkv_store_layer & layer) {
    return !bias ? nullptr : ggml_view_2d(gctx.ctx0, on_device(gctx, bias, layer), layer.n_head_kv, n_seqs, layer.n_head_kv * sizeof(float), first_head.at(layer.il) * n_seqs * sizeof(float));
}

ggml_tensor * headkv_input::pos_of_layer(const llm_graph_context & gctx, const headkv_store_layer & layer) {
    return !pos ? nullptr : ggml_view_1d(gctx.ctx0, pos, layer.k->ne[1], first_row.at(layer.il) * sizeof(float));
}

ggml_tensor * headkv_input::on_device(const llm_graph_context & gctx, ggml_tensor * input, const headkv_store_layer & layer) {
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

ggml_tensor * headkv_new_input_1d(ggml_context * ctx, ggml_type type, int64_t n, const char * name) {
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
    if (mctx.get_kv()->has_alibi()) {
        return nullptr;
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

static void build_mask(headkv_input & inp, const llama_kv_cache_ragged_context & mctx, const llm_graph_context & gctx) {
    ggml_context * ctx = gctx.ctx0;
    inp.self_kq_mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, mctx.get_staging()->get_n_kv(), gctx.ubatch.n_tokens, 1, 1);
    ggml_set_input(inp.self_kq_mask);
    ggml_set_name(inp.self_kq_mask, HEADKV_MASK_NAME);
    inp.self_kq_mask_cnv = inp.self_kq_mask;
    if (mctx.is_layered()) {
        if (ggml_tensor * mask = build_mask_of_step(ctx, inp, mctx, gctx.ubatch.n_tokens, inp.self_kq_mask, gctx.sched)) {
            ggml_set_name(mask, "headkv_mask");
            inp.self_kq_mask = nullptr; // nothing to fill
            inp.self_kq_mask_cnv = mask;
        }
    }
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
        inp->rows = headkv_new_input_1d(ctx, GGML_TYPE_I32, inp->n_head_kv_all * ubatch.n_tokens, "headkv_rows");
        if (kv->store().has_fused()) {
            inp->ranges = headkv_new_input_1d(ctx, GGML_TYPE_I32, inp->n_head_kv_all * inp->n_seqs * 2, "headkv_ranges");
            // ranges do not change without a new generation
            if (mctx->is_full() ? kv->config().fit == HEADKV_FIT_MEAN : kv->store().compensates()) {
                inp->bias = headkv_new_input_1d(ctx, GGML_TYPE_F32, inp->n_head_kv_all * inp->n_seqs, "headkv_bias");
            }
        }
        if (gctx.hparams.use_alibi) {
            int64_t n_rows = 0;
            for (const auto & layer : (mctx->is_full() ? kv->store_twin() : kv->store()).layers) {
                inp->first_row[layer.il] = n_rows;
                n_rows += layer.k->ne[1];
            }
            inp->pos = headkv_new_input_1d(ctx, GGML_TYPE_F32, n_rows, "headkv_pos");
        }
        if (kv->queries()) {
            inp->queries = headkv_new_input_1d(ctx, GGML_TYPE_I64, ubatch.n_tokens, "headkv_query_slots");
        }
        inp->self_k_rot = kv->staging().twin().build_input_k_rot(ctx);
        inp->self_v_rot = kv->staging().twin().build_input_v_rot(ctx);
    } else {
        const auto * staging = mctx->get_staging();
        inp->self_k_idxs = staging->build_input_k_idxs(ctx, ubatch);
        inp->self_v_idxs = staging->build_input_v_idxs(ctx, ubatch);
        if (kv->store().has_fused_prompt()) {
            const llama_kv_cache & cache = mctx->is_full() ? kv->staging().twin() : kv->staging().cache();
            inp->cells = headkv_new_input_1d(ctx, GGML_TYPE_I32, cache.get_size(), "headkv_cells");
            inp->seen = headkv_new_input_1d(ctx, GGML_TYPE_I32, 2 * (int64_t) ubatch.n_tokens, "headkv_seen");
        }
        if (kv->staging().has_mask()) {
            build_mask(*inp, *mctx, gctx);
        }
        inp->self_k_rot = staging->build_input_k_rot(ctx);
        inp->self_v_rot = staging->build_input_v_rot(ctx);

        const int64_t n = std::min<int64_t>(ubatch.n_tokens, (int64_t) kv->staging().n_ring() * ubatch.n_seqs_unq);
        inp->tokens = headkv_new_input_1d(ctx, GGML_TYPE_I32, n, "headkv_window_tokens");
        inp->slots = headkv_new_input_1d(ctx, GGML_TYPE_I64, n, "headkv_window_slots");
    }

    return inp;
}

llm_graph_input_attn_kv * headkv_build_inp(const llm_graph_context & gctx) {
    auto inp = headkv_new_input(gctx);
    return inp ? (llm_graph_input_attn_kv *) gctx.res->add_input(std::move(inp)) : nullptr;
}
