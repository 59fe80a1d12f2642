#include "headkv-staging.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

headkv_staging::headkv_staging(const llama_model & model, const params_t & params, std::vector<headkv_layer_shape> shapes, std::vector<int32_t> shared) :
    model(model), hparams(model.hparams), hparams_plan(model.hparams), params(params), shapes(std::move(shapes)), shared(std::move(shared)) {
    hparams_plan.no_alloc = true;

    plan.cache = make_cache(params.n_ctx, true, false);
    plan.rings = make_rings(true, false);
    plan.refs = make_refs(true, false);
    plan.sums = make_sums(true, params.n_ctx);
}

//
// memory
//

std::unique_ptr<llama_kv_cache> headkv_staging::make_cache(uint32_t n_cells, bool is_plan, bool share) const {
    // not those of draft heads (MTP), nor those whose cells are upstream's
    const auto is_ours = [this](int32_t il) { return std::any_of(shapes.begin(), shapes.end(), [il](const headkv_layer_shape & s) { return s.il == il; }); };

    // in a staging for one layer, each layer maps to the first one of its kind on its device
    const auto physical = [this](int32_t il) {
        const auto of_il = [il](const headkv_layer_shape & s) { return s.il == il; };
        const auto shape = std::find_if(shapes.begin(), shapes.end(), of_il);
        if (shape == shapes.end()) {
            return il;
        }
        for (const auto & first : shapes) {
            if (first.buft == shape->buft && hparams.n_embd_k_gqa(first.il) == hparams.n_embd_k_gqa(il) && hparams.n_embd_v_gqa(first.il) == hparams.n_embd_v_gqa(il)) {
                return first.il;
            }
        }
        return il;
    };

    // upstream allocates what the filter lets pass and then asks which layers reuse others, filter included
    bool allocating = true;
    llama_memory_i::layer_filter_cb filter = nullptr;
    llama_memory_i::layer_reuse_cb reuse = nullptr;
    if (share) {
        filter = [&](int32_t il) { return is_ours(il) && (!allocating || physical(il) == il); };
        reuse = [&](int32_t il) { allocating = false; return is_ours(il) && physical(il) != il ? physical(il) : -1; };
    } else {
        // a layer without cells of its own sees those of another one; such a prompt is not read layer by layer
        const auto seen = [this](int32_t il) { return (size_t) il < shared.size() ? shared[il] : -1; };
        filter = [=](int32_t il) { return is_ours(il) || is_ours(seen(il)); };
        reuse = [=](int32_t il) { return is_ours(seen(il)) ? seen(il) : -1; };
    }
    return std::make_unique<llama_kv_cache>(model, is_plan ? hparams_plan : hparams, params.type_k, params.type_v, /*v_trans =*/false, params.offload,
            /*unified =*/true, n_cells, params.n_seq_max, /*n_pad =*/1, /*n_swa =*/0, LLAMA_SWA_TYPE_NONE, nullptr, filter, reuse, nullptr);
}

headkv_staging::tensors_t headkv_staging::make_rings(bool is_plan, bool share) const {
    return make_tensors("headkv_window", GGML_TYPE_F32, is_plan, share, [this](const headkv_layer_shape & s) {
        return std::array<int64_t, 3>{ (int64_t) s.n_embd_head_k * s.n_head, n_slots(), 1 };
    });
}

headkv_staging::tensors_t headkv_staging::make_refs(bool is_plan, bool share) const {
    if (params.n_refs == 0) {
        return {};
    }
    return make_tensors("headkv_refs", GGML_TYPE_F16, is_plan, share, [this](const headkv_layer_shape & s) {
        return std::array<int64_t, 3>{ s.n_embd_head_k, s.n_head_kv * n_ref_slots(), 1 };
    });
}

headkv_staging::tensors_t headkv_staging::make_sums(bool is_plan, uint32_t n_cells) const {
    if (!params.with_sums) {
        return {};
    }
    return make_tensors("headkv_sums", GGML_TYPE_F32, is_plan, false, [n_cells](const headkv_layer_shape & s) {
        return std::array<int64_t, 3>{ 1, n_cells, s.n_head_kv };
    });
}

headkv_staging::tensors_t headkv_staging::make_tensors(const char * name, ggml_type type, bool is_plan, bool share,
        const std::function<std::array<int64_t, 3>(const headkv_layer_shape &)> & shape) const {
    std::map<ggml_backend_buffer_type_t, buffer_t> by_buft;
    tensors_t res;
    res.of_layer.assign(hparams.n_layer(), nullptr);
    for (const auto & layer : shapes) {
        buffer_t & buffer = by_buft[layer.buft];
        if (!buffer.ctx) {
            ggml_init_params init = { /*.mem_size =*/shapes.size() * ggml_tensor_overhead(), /*.mem_buffer =*/nullptr, /*.no_alloc =*/true };
            buffer.ctx.reset(ggml_init(init));
        }
        const auto ne = shape(layer);
        ggml_tensor *& mine = res.of_layer[layer.il];
        for (ggml_tensor * t = ggml_get_first_tensor(buffer.ctx.get()); share && t; t = ggml_get_next_tensor(buffer.ctx.get(), t)) {
            if (std::equal(ne.begin(), ne.end(), t->ne)) {
                mine = t; // what it holds is not needed when the next layer begins
            }
        }
        if (!mine) {
            mine = ggml_new_tensor_3d(buffer.ctx.get(), type, ne[0], ne[1], ne[2]);
            ggml_format_name(mine, "%s_l%d", name, layer.il);
        }
    }
    for (auto & [buft, buffer] : by_buft) {
        if (is_plan || hparams.no_alloc) {
            buffer.buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
            for (ggml_tensor * t = ggml_get_first_tensor(buffer.ctx.get()); t; t = ggml_get_next_tensor(buffer.ctx.get(), t)) {
                t->buffer = buffer.buf.get();
            }
        } else {
            buffer.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(buffer.ctx.get(), buft));
            if (!buffer.buf) {
                throw std::runtime_error(format("no memory for %s", name));
            }
            ggml_backend_buffer_clear(buffer.buf.get(), 0);
        }
        res.buffers.push_back(std::move(buffer));
    }
    return res;
}

bool headkv_staging::fits(uint32_t n_tokens, uint32_t n_hidden) const {
    const bool has_cells = live.cache && live.cache->get_size() >= n_tokens;
    const bool has_hidden = n_hidden > 0 && t_hidden && t_hidden->ne[1] >= n_hidden && (!t_band || n_before >= n_tokens || !ggml_backend_buffer_is_host(t_band->buffer));
    return has_cells && (one_layer ? has_hidden : n_hidden == 0);
}

void headkv_staging::alloc(uint32_t n_tokens, bool keep, uint32_t n_hidden, int64_t n_ubatch) {
    const bool share = n_hidden > 0;
    const uint32_t n_cells = std::min<uint32_t>(GGML_PAD(n_tokens, 256), params.n_ctx); // upstream attends multiples of 256 cells
    if (!keep) {
        live = parts_t();
        release_hidden();
    }
    if (live.rings.of_layer.empty()) {
        auto refs = make_refs(false, share);
        live.rings = make_rings(false, share);
        live.refs = std::move(refs);
    }
    auto cache = make_cache(n_cells, false, share);
    auto sums = make_sums(false, n_cells);
    if (share) {
        alloc_hidden(n_tokens, n_hidden, n_ubatch);
    }
    one_layer = share;
    if (live.cache) {
        copy_to(*cache, sums);
    }
    live.cache = std::move(cache);
    live.sums = std::move(sums);
    generation++;
}

void headkv_occupy_cell(llama_kv_cache & cache, uint32_t i_cell, llama_seq_id seq_id, llama_pos pos) {
    llama_seq_id * ids = &seq_id;
    int32_t n_ids = 1;

    llama_ubatch ubatch = {};
    ubatch.n_tokens = ubatch.n_seq_tokens = ubatch.n_seqs = ubatch.n_seqs_unq = ubatch.n_pos = 1;
    ubatch.pos = &pos;
    ubatch.n_seq_id = &n_ids;
    ubatch.seq_id = &ids;

    llama_kv_cache::slot_info sinfo = {};
    sinfo.resize(1);
    sinfo.s0 = sinfo.s1 = cache.get_stream(seq_id);
    sinfo.strm[0] = (llama_seq_id) sinfo.s0;
    sinfo.idxs[0] = { i_cell };
    cache.apply_ubatch(sinfo, ubatch);
}

ggml_tensor * headkv_rows_of(const llama_kv_cache & cache, int32_t il, bool v) {
    if (!v) {
        return cache.get_k_storage(il);
    }
    ggml_init_params init = { /*.mem_size =*/ggml_tensor_overhead(), /*.mem_buffer =*/nullptr, /*.no_alloc =*/true };
    ggml_context_ptr ctx(ggml_init(init));
    return cache.get_v(ctx.get(), il, 1, {})->view_src;
}

void headkv_staging::copy_to(llama_kv_cache & cache, const tensors_t & sums) const {
    const auto & cells = live.cache->get_cells(0);
    const uint32_t n = cells.used_max_p1();
    for (const auto & shape : shapes) {
        for (bool v : { false, true }) {
            headkv_copy_rows(rows(shape.il, v), 0, headkv_rows_of(cache, shape.il, v), 0, n);
        }
        if (params.with_sums) {
            ggml_tensor * src = live.sums.of_layer[shape.il];
            ggml_tensor * dst = sums.of_layer[shape.il];
            for (int64_t ih = 0; ih < src->ne[2]; ++ih) {
                headkv_copy_rows(src, ih * src->ne[1], dst, ih * dst->ne[1], n);
            }
        }
    }
    for (uint32_t i = 0; i < n; ++i) {
        if (!cells.is_empty(i)) {
            headkv_occupy_cell(cache, i, cells.seq_get(i), cells.pos_get(i));
        }
    }
}

int64_t headkv_staging::n_columns(int64_t n_tokens, int64_t n_ubatch) const {
    // an odd number of cache lines: rows that are read together must not share cache sets
    return GGML_PAD((ggml_backend_buft_is_host(shapes[0].buft) ? n_tokens : 0) + n_ubatch + 256, 64) + 32;
}

int64_t headkv_staging::hidden_bytes(int64_t n_tokens, int64_t n_ubatch, bool f16) const {
    const int64_t n_mask = params.with_mask ? n_ubatch * n_columns(n_tokens, n_ubatch) * sizeof(ggml_fp16_t) : 0;
    return n_tokens * hparams.n_embd * (f16 ? sizeof(ggml_fp16_t) : sizeof(float)) + n_mask;
}

void headkv_staging::alloc_hidden(uint32_t n_tokens, uint32_t n_hidden, int64_t n_ubatch) {
    const ggml_backend_buffer_type_t buft = shapes[0].buft;

    ggml_init_params init = { /*.mem_size =*/2 * ggml_tensor_overhead(), /*.mem_buffer =*/nullptr, /*.no_alloc =*/true };
    hidden_buf.ctx.reset(ggml_init(init));
    t_hidden = ggml_new_tensor_2d(hidden_buf.ctx.get(), params.hidden_f16 ? GGML_TYPE_F16 : GGML_TYPE_F32, hparams.n_embd, n_hidden);
    const int64_t n_cols = n_columns(n_tokens, n_ubatch);
    t_band = params.with_mask ? ggml_new_tensor_2d(hidden_buf.ctx.get(), GGML_TYPE_F16, n_cols, n_ubatch) : nullptr;
    hidden_buf.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(hidden_buf.ctx.get(), buft));
    if (!hidden_buf.buf) {
        t_hidden = t_band = nullptr;
        throw std::runtime_error("no memory for the hidden states of the prompt");
    }
    n_before = t_band && ggml_backend_buffer_is_host(t_band->buffer) ? n_tokens : 0;
    if (!t_band) {
        return;
    }
    std::vector<ggml_fp16_t> row(n_cols, ggml_fp32_to_fp16(-INFINITY));
    for (int64_t i = 0; i < n_ubatch; ++i) {
        for (int64_t j = hparams.use_alibi || i == 0 ? 0 : n_band() + i; j <= n_band() + i; ++j) {
            row[j] = ggml_fp32_to_fp16(hparams.use_alibi ? (float) (j - n_band() - i) : 0.0f);
        }
        ggml_backend_tensor_set(t_band, row.data(), i * t_band->nb[1], t_band->nb[1]);
    }
}

void headkv_staging::release_hidden() {
    hidden_buf = buffer_t();
    t_hidden = t_band = nullptr;
    one_layer = false;
}

void headkv_staging::release() {
    release_hidden();
    live = parts_t();
    generation++;
#if defined(__GLIBC__)
    malloc_trim(0); // smaller stagings come from the heap, which keeps what is freed
#endif
}

//
// what is there
//

ggml_tensor * headkv_staging::rows(int32_t il, bool v) const {
    return headkv_rows_of(*live.cache, il, v);
}

ggml_tensor * headkv_staging::ring(int32_t il, bool of_twin) const {
    const auto & of_layer = (of_twin ? plan : live).rings.of_layer;
    return of_layer.empty() ? nullptr : of_layer[il];
}

ggml_tensor * headkv_staging::refs(int32_t il, bool of_twin) const {
    const auto & of_layer = (of_twin ? plan : live).refs.of_layer;
    return of_layer.empty() ? nullptr : of_layer[il];
}

ggml_tensor * headkv_staging::sums(int32_t il, bool of_twin) const {
    const auto & of_layer = (of_twin ? plan : live).sums.of_layer;
    return of_layer.empty() ? nullptr : of_layer[il];
}

std::vector<int32_t> headkv_staging::cells_of(llama_seq_id seq_id, llama_pos n_pos) const {
    std::vector<int32_t> res(n_pos, -1);
    const auto & cells = live.cache->get_cells(seq_id);
    for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
        if (!cells.is_empty(i) && cells.seq_has(i, seq_id) && (size_t) cells.pos_get(i) < res.size()) {
            res[cells.pos_get(i)] = (int32_t) i;
        }
    }
    return res;
}

void headkv_staging::occupy(llama_seq_id seq_id, uint32_t first, uint32_t end) {
    for (uint32_t i = first; i < end; ++i) {
        if (!live.cache->get_cells(0).is_empty(i)) {
            throw std::logic_error(format("cell %u of the staging is in use", i));
        }
        headkv_occupy_cell(*live.cache, i, seq_id, (llama_pos) i);
    }
}

void headkv_staging::add_to(std::map<ggml_backend_buffer_type_t, size_t> & breakdown) const {
    if (live.cache) {
        for (const auto & [buft, n] : live.cache->memory_breakdown()) {
            breakdown[buft] += n;
        }
    }
    for (const auto * tensors : { &live.rings, &live.refs, &live.sums }) {
        for (const auto & it : tensors->buffers) {
            breakdown[ggml_backend_buffer_get_type(it.buf.get())] += ggml_backend_buffer_get_size(it.buf.get());
        }
    }
}

size_t headkv_staging::n_bytes() const {
    std::map<ggml_backend_buffer_type_t, size_t> breakdown;
    add_to(breakdown);
    size_t res = hidden_buf.buf ? ggml_backend_buffer_get_size(hidden_buf.buf.get()) : 0;
    for (const auto & it : breakdown) {
        res += it.second;
    }
    return res;
}
