// Saved sequences: what llama_state_*() write and read of a ragged cache. Numbers as they are in memory.
//
//   u32 magic, u32 version, and what is added to it, u32 kind (1 = one sequence, 2 = the whole context)
//   u64 fingerprint of the model; u32 type_k, u32 type_v, u32 layers; of each layer: i32 il, n_head, n_head_kv,
//   n_embd_head_k, and where K and V of any layer are of different sizes, n_embd_head_v
//   u32 sequences; of each one:
//     u32 seq_id, i32 n_pos, n_prompt, n_whole, u32 kv_size, u64 fingerprints of the options and of the
//     adapters, u32 spans, i32 [start, end) of each
//     where generated tokens can be bounded: headkv-generated-state.cpp
//     of each layer and KV head: u32 n_kept, i32 pos[n_kept], rows of K and then of V, [n_kept + tokens in the tail]
//     where the model has layers that are not ours: u64 n, u8 [n] what upstream writes of them
//   u64 checksum of all that
//
// A sequence is saved when it is compressed; one that is being read cannot be. Everything is read, bounded by what the context
// can hold and in steps, so that a length that lies allocates no more than the file has, and checked before anything changes.
// Where memory is too short for what was checked, the sequence is empty.

#include "llama-kv-cache-ragged.h"

#include "headkv-checksum.h"
#include "headkv-error.h"
#include "headkv-state-io.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>
#include <map>
#include <stdexcept>

static constexpr uint32_t STATE_MAGIC = 0x76736b68; // "hksv"
static constexpr uint32_t STATE_VERSION = 5;
static constexpr uint32_t STATE_BESIDE = 1; // added to it: with layers that are not ours
static constexpr uint32_t STATE_TWO_SIZES = 2; // and heads whose K and V are of different sizes
static constexpr uint32_t STATE_GENERATED = 4; // and generated tokens that can be bounded

enum state_kind_t : uint32_t { STATE_SEQUENCE = 1,
    STATE_CONTEXT = 2 };

namespace {

struct saved_head {
    std::vector<int32_t> pos;
    std::vector<uint8_t> k, v; // rows
};

struct saved_seq {
    llama_seq_id seq_id;
    headkv_seq seq;
    std::vector<std::vector<saved_head>> heads; // [i_layer][ih]
    headkv_saved_queries generated;
    std::vector<uint8_t> beside;
};

bool has_two_sizes(const headkv_store & store) {
    return std::any_of(store.layers.begin(), store.layers.end(), [](const headkv_store_layer & l) { return l.n_embd_head_k != l.n_embd_head_v; });
}

// so that states of other models are what they always were
uint32_t version_of(const headkv_store & store, bool with_beside, bool with_generated) {
    return STATE_VERSION + (with_beside ? STATE_BESIDE : 0) + (has_two_sizes(store) ? STATE_TWO_SIZES : 0) + (with_generated ? STATE_GENERATED : 0);
}

} // namespace

// What a cell depends on besides the tokens. Of the weights, the vectors and the beginning of the token embeddings are looked at:
// they have one form on all devices, while backends rearrange matrices.
static uint64_t make_fingerprint(const llama_model & model, const llama_cparams & cparams) {
    headkv_checksum sum;
    std::map<std::string, std::string> keys(model.gguf_kv.begin(), model.gguf_kv.end());
    for (const auto & [key, value] : keys) {
        if (key.find(".head_importance") == std::string::npos) { // it can be added later
            sum.add(key.data(), key.size() + 1);
            sum.add(value.data(), value.size() + 1);
        }
    }
    sum.add(llama_model_n_params(&model));
    sum.add(llama_model_size(&model));
    std::vector<uint8_t> raw;
    for (const auto & [name, t] : model.tensors_by_name) {
        if ((ggml_is_vector(t) || t == model.tok_embd) && t->buffer) {
            raw.resize(std::min<size_t>(ggml_nbytes(t), 4096));
            ggml_backend_tensor_get(t, raw.data(), 0, raw.size());
            sum.add(raw.data(), raw.size());
        }
    }
    for (float x : { cparams.rope_freq_base, cparams.rope_freq_scale, cparams.yarn_ext_factor, cparams.yarn_attn_factor,
                 cparams.yarn_beta_fast, cparams.yarn_beta_slow }) {
        sum.add(x);
    }
    // what can be set beside the file
    const auto & h = model.hparams;
    for (float x : { h.f_norm_eps, h.f_norm_rms_eps, h.f_norm_group_eps, h.f_attention_scale, h.f_residual_scale, h.f_embedding_scale, h.f_clamp_kqv,
                 h.f_attn_out_scale, h.f_attn_value_scale, h.f_attn_temp_scale, h.f_attn_temp_offset, h.f_attn_logit_softcapping,
                 h.f_router_logit_softcapping, h.expert_group_scale, h.expert_weights_scale, h.rope_attn_factor, h.rope_scaling_alpha,
                 h.rope_yarn_log_mul, h.situ_beta, h.situ_linear_beta }) {
        sum.add(x);
    }
    for (uint32_t x : { h.n_rot_full, h.n_norm_groups, h.n_expert_groups, h.n_group_used, h.n_group_experts, h.expert_gating_func, h.moe_every_n_layers,
                 h.n_layer_dense_lead, h.n_moe_layer_step, h.n_no_rope_layer_step, h.n_attn_temp_floor_scale, h.attn_temp_length,
                 (uint32_t) h.expert_weights_norm, (uint32_t) h.use_par_res, (uint32_t) h.swin_norm, (uint32_t) h.use_kq_norm, (uint32_t) h.attn_soft_cap }) {
        sum.add(x);
    }
    for (uint32_t il = 0; il < h.n_layer(); ++il) {
        sum.add(h.n_expert_used(il));
        for (float x : { h.xielu_alpha_n[il], h.xielu_alpha_p[il], h.xielu_beta[il], h.xielu_eps[il] }) {
            sum.add(x);
        }
    }
    sum.add(cparams.n_ctx_orig_yarn);
    sum.add(cparams.rope_scaling_type);
    if (!model.layers.empty() && model.layers[0].rope_long) { // contexts of other sizes rotate by other factors
        sum.add(model.get_rope_factors(cparams, 0) == model.layers[0].rope_long);
    }
    return sum.value;
}

// Of the adapters all of every tensor: parts of them can be trained. Whatever the order in which they were set.
static uint64_t make_fingerprint(const llama_adapter_loras & loras, const llama_adapter_cvec & cvec, int32_t n_layer) {
    std::vector<uint8_t> raw;
    const auto add_tensor = [&](headkv_checksum & sum, const ggml_tensor * t) {
        raw.resize(ggml_nbytes(t));
        ggml_backend_tensor_get(t, raw.data(), 0, raw.size());
        sum.add(t->type);
        sum.add(t->ne);
        sum.add(headkv_checksum_words(0, raw.data(), raw.size()));
    };
    std::vector<uint64_t> parts;
    for (const auto & [lora, scale] : loras) {
        if (!lora) {
            continue; // a file that could not be loaded, which upstream ignores
        }
        headkv_checksum sum;
        const std::map<std::string, llama_adapter_lora_weight> weights(lora->ab_map.begin(), lora->ab_map.end());
        for (const auto & [name, weight] : weights) {
            sum.add(name.data(), name.size() + 1);
            add_tensor(sum, weight.a);
            add_tensor(sum, weight.b);
        }
        sum.add(lora->alpha);
        sum.add(scale);
        parts.push_back(sum.value);
    }
    std::sort(parts.begin(), parts.end());
    for (int32_t il = 0; il < n_layer; ++il) {
        if (const ggml_tensor * t = cvec.tensor_for(il)) {
            headkv_checksum sum;
            sum.add(il);
            add_tensor(sum, t);
            parts.push_back(sum.value);
        }
    }
    headkv_checksum sum;
    sum.add(parts.data(), parts.size() * sizeof(parts[0]));
    return parts.empty() ? 0 : sum.value;
}

void llama_kv_cache_ragged::note_adapters(const llama_adapter_loras & loras, const llama_adapter_cvec & cvec) {
    adapters = make_fingerprint(loras, cvec, n_layer());
}

uint64_t llama_kv_cache_ragged::get_fingerprint() const {
    if (!fingerprint) {
        fingerprint = make_fingerprint(model, cparams);
    }
    return fingerprint;
}

bool llama_kv_cache_ragged::has_two_ropes() const {
    return !model.layers.empty() && model.layers[0].rope_long != nullptr;
}

void llama_kv_cache_ragged::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    GGML_UNUSED(flags); // there is no part of it that could be left out, and no device where it is faster to keep

    const auto refuse = [this](const std::string & why) {
        headkv_fail(format("the state cannot be saved: %s", why.c_str()));
        throw std::runtime_error(headkv_get_error());
    };
    if (seq_id >= (llama_seq_id) seqs.size()) {
        refuse(format("sequence %d, it must be in [0, %zu)", seq_id, seqs.size()));
    }
    std::vector<llama_seq_id> ids;
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        const bool is_empty = seqs[s].state == HEADKV_SEQ_EMPTY && !is_reading(s);
        if (is_empty || (seq_id >= 0 && s != seq_id)) {
            continue;
        }
        if (is_reading(s)) {
            refuse(format("sequence %d is being read layer by layer: give its whole prompt again until it is read, or remove it", s));
        }
        if (seqs[s].state != HEADKV_SEQ_COMPRESSED) {
            refuse(format("the prompt of sequence %d is not compressed, call headkv_end_prompt() first", s));
        }
        ids.push_back(s);
    }

    headkv_writer to = { io, {}, {} };
    to.number(STATE_MAGIC);
    to.number(version_of(the_store, the_beside != nullptr, the_queries != nullptr));
    to.number(seq_id < 0 ? STATE_CONTEXT : STATE_SEQUENCE);
    to.number(get_fingerprint());
    to.number((uint32_t) type_k);
    to.number((uint32_t) type_v);
    to.number((uint32_t) the_store.layers.size());
    for (const auto & layer : the_store.layers) {
        for (int32_t x : { layer.il, layer.n_head, layer.n_head_kv, layer.n_embd_head_k }) {
            to.number(x);
        }
        if (has_two_sizes(the_store)) {
            to.number(layer.n_embd_head_v);
        }
    }
    to.number((uint32_t) ids.size());
    for (llama_seq_id s : ids) {
        const headkv_seq & seq = seqs[s];
        to.number((uint32_t) s);
        to.number(seq.n_pos);
        to.number(seq.n_prompt);
        to.number(seq.n_whole);
        to.number(seq.kv_size);
        to.number(seq.selection);
        to.number(seq.adapters);
        to.number((uint32_t) seq.spans.size());
        for (const auto & [start, end] : seq.spans) {
            to.number(start);
            to.number(end);
        }
        if (the_queries) {
            headkv_write_generated(to, seq, s, *the_queries, the_store);
        }
        for (const auto & layer : the_store.layers) {
            for (const auto & range : layer.ranges[s]) {
                const uint32_t n_rows = range.n_used(seq.n_in_tail());
                to.number(range.n_kept);
                to.bytes(range.pos.data(), range.pos.size() * sizeof(range.pos[0]));
                to.rows(layer.k, range.off, n_rows);
                to.rows(layer.v, range.off, n_rows);
            }
        }
        if (the_beside) {
            const auto beside = the_beside->save(s);
            to.number((uint64_t) beside.size());
            to.bytes(beside.data(), beside.size());
        }
    }
    const uint64_t sum = to.sum.value;
    to.number(sum);
}

// one sequence; throws when it is not what a compression could have left, or exceeds the limits
static saved_seq read_seq(headkv_reader & from, const headkv_store & store, uint32_t n_ctx_seq, uint64_t adapters,
        const llama_kv_cache_ragged::limits_t & limits, const headkv_queries * queries, const headkv_config_ptr & cfg) {
    saved_seq res;
    auto & seq = res.seq;
    res.seq_id = (llama_seq_id) from.number<uint32_t>();
    seq.n_pos = from.number<llama_pos>();
    seq.n_prompt = from.number<llama_pos>();
    seq.n_whole = from.number<llama_pos>();
    seq.kv_size = from.number<uint32_t>();
    seq.selection = from.number<uint64_t>();
    seq.adapters = from.number<uint64_t>();
    seq.state = HEADKV_SEQ_COMPRESSED;
    if (limits.kv_size > 0 && seq.kv_size > (uint32_t) limits.kv_size) {
        throw std::runtime_error(format("it was compressed with kv_size %u, the limit is %d", seq.kv_size, limits.kv_size));
    }
    if (seq.adapters != adapters) {
        throw std::runtime_error("it was computed with other adapters (LoRA with its scale, control vector): set the same ones first");
    }
    const bool ok = 0 < seq.n_prompt && seq.n_prompt <= seq.n_pos && 0 <= seq.n_whole && seq.n_whole <= seq.n_prompt;
    if (!ok) {
        throw std::runtime_error("it is damaged (tokens)");
    }
    if (seq.kv_size < 2 || seq.kv_size > (uint32_t) std::numeric_limits<int32_t>::max()) {
        throw std::runtime_error("it is damaged (kv_size)");
    }
    int64_t n_protected = 0;
    const uint32_t n_spans = from.number<uint32_t>();
    const auto bounds = from.array<int32_t>(2 * (size_t) n_spans);
    for (size_t i = 0; i < bounds.size(); i += 2) {
        if (bounds[i] < (i > 0 ? bounds[i - 1] : 0) || bounds[i + 1] <= bounds[i] || bounds[i + 1] > seq.n_prompt - seq.n_whole) {
            throw std::runtime_error("it is damaged (protected cells)");
        }
        seq.spans.push_back({ bounds[i], bounds[i + 1] });
        n_protected += bounds[i + 1] - bounds[i];
    }
    if (queries) {
        res.generated = headkv_read_generated(from, seq, *queries, store, cfg);
    }
    const llama_pos n_tokens = seq.bound.n_cells > 0 ? seq.n_prompt : seq.n_pos; // that a context bounds
    if (limits.n_tokens > 0 && n_tokens > limits.n_tokens) {
        throw std::runtime_error(format("it holds %d tokens, the limit is %d", n_tokens, limits.n_tokens));
    }
    if (n_tokens > (llama_pos) n_ctx_seq) {
        throw std::runtime_error(format("it holds %d tokens: use a context of at least as many, n_ctx is %u", n_tokens, n_ctx_seq));
    }
    if (limits.n_protected > 0 && n_protected > limits.n_protected) {
        throw std::runtime_error(format("every head keeps %lld protected cells, the limit is %d", (long long) n_protected, limits.n_protected));
    }
    int64_t n_left = 0; // cells that the heads may have: policies round by less than a cell per layer
    for (const auto & layer : store.layers) {
        n_left += layer.n_head_kv * (seq.kv_size + n_protected + (int64_t) store.layers.size() + seq.n_settled);
    }
    for (const auto & layer : store.layers) {
        auto & heads = res.heads.emplace_back(layer.n_head_kv);
        for (auto & head : heads) {
            const uint32_t n_kept = from.number<uint32_t>();
            n_left -= n_kept;
            const auto n_whole = (uint32_t) (seq.n_settled > 0 && seq.bound.scope == HEADKV_SCOPE_ALL ? 0 : seq.n_whole); // of them, the last of the prompt
            if (n_kept < n_whole || n_kept > (uint32_t) seq.tail_begin() || n_left < 0) {
                throw std::runtime_error("it is damaged (cells)");
            }
            const size_t n_rows = (size_t) n_kept + seq.n_in_tail();
            if (n_rows > n_ctx_seq) {
                throw std::runtime_error(format("a head of it holds %zu cells: use a context of at least as many, n_ctx is %u", n_rows, n_ctx_seq));
            }
            head.pos = from.array<int32_t>(n_kept);
            head.k = from.array<uint8_t>(n_rows * ggml_row_size(layer.type_k, layer.n_embd_head_k));
            head.v = from.array<uint8_t>(n_rows * ggml_row_size(layer.type_v, layer.n_embd_head_v));
            if (!ggml_validate_row_data(layer.type_k, head.k.data(), head.k.size()) || !ggml_validate_row_data(layer.type_v, head.v.data(), head.v.size())) {
                throw std::runtime_error("it is damaged (a value is not finite)");
            }
            const auto n_of_prompt = (uint32_t) (std::find_if(head.pos.begin(), head.pos.end(), [&](int32_t pos) { return pos >= seq.n_prompt; }) - head.pos.begin());
            for (uint32_t i = 0; i < n_kept; ++i) {
                const int32_t pos = head.pos[i];
                const bool whole = i >= n_of_prompt ? n_of_prompt >= n_whole : i + n_whole < n_of_prompt || pos == seq.n_prompt - (int32_t) (n_of_prompt - i);
                const bool misses = (llama_pos) n_kept - 1 < seq.n_prompt; // so that the first cell can stand for them
                if (pos < (i > 0 ? head.pos[i - 1] + 1 : misses ? -1
                                                                : 0) ||
                        pos >= seq.tail_begin() || !whole) {
                    throw std::runtime_error("it is damaged (positions)");
                }
            }
        }
    }
    return res;
}

static void put_layer(headkv_store & store, headkv_store_layer & layer, llama_seq_id seq_id, const std::vector<saved_head> & heads,
        uint32_t n_tail, uint32_t n_buckets) {
    std::vector<uint32_t> n_kept;
    for (const auto & head : heads) {
        n_kept.push_back((uint32_t) head.pos.size());
    }
    store.relayout(layer, { { seq_id, { n_kept, n_tail, {} } } }, n_buckets);
    for (size_t ih = 0; ih < heads.size(); ++ih) {
        auto & range = layer.ranges[seq_id][ih];
        range.pos = heads[ih].pos;
        if (!heads[ih].k.empty()) {
            ggml_backend_tensor_set(layer.k, heads[ih].k.data(), range.off * layer.k->nb[1], heads[ih].k.size());
            ggml_backend_tensor_set(layer.v, heads[ih].v.data(), range.off * layer.v->nb[1], heads[ih].v.size());
        }
    }
}

void llama_kv_cache_ragged::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    GGML_UNUSED(flags);
    const bool one = seq_id >= 0;
    bool changed = false;
    try {
        if (seq_id >= (llama_seq_id) seqs.size()) {
            throw std::runtime_error(format("sequence %d: it must be in [0, %zu)", seq_id, seqs.size()));
        }
        headkv_reader from = { io, {} };
        if (from.number<uint32_t>() != STATE_MAGIC) {
            throw std::runtime_error("it is not one of a compressed cache");
        }
        const uint32_t version = version_of(the_store, the_beside != nullptr, the_queries != nullptr);
        if (const uint32_t x = from.number<uint32_t>(); x != version) {
            const char * why = version == x + STATE_GENERATED ? "it was saved without kv_generated, which this context has"
                    : x == version + STATE_GENERATED          ? "it was saved with kv_generated, which this context has not"
                                                              : "it is of another kind of model, or of another version of this library";
            throw std::runtime_error(format("its version is %u, that of this context is %u: %s", x, version, why));
        }
        if (from.number<uint32_t>() != (one ? STATE_SEQUENCE : STATE_CONTEXT)) {
            throw std::runtime_error(one ? "it is one of a whole context, not of a sequence" : "it is one of a sequence, not of a whole context");
        }
        const uint64_t fingerprint = from.number<uint64_t>();
        from.expect((uint32_t) type_k, "its type of K");
        from.expect((uint32_t) type_v, "its type of V");
        from.expect((uint32_t) the_store.layers.size(), "its number of layers");
        for (const auto & layer : the_store.layers) {
            from.expect(layer.il, "a layer of it");
            from.expect(layer.n_head, "its number of heads");
            from.expect(layer.n_head_kv, "its number of KV heads");
            from.expect(layer.n_embd_head_k, "its size of a head");
            if (has_two_sizes(the_store)) {
                from.expect(layer.n_embd_head_v, "its size of a V head");
            }
        }
        if (fingerprint != get_fingerprint()) {
            throw std::runtime_error("it is one of another model, or of this one with another rotary embedding");
        }
        const uint32_t n_seqs = from.number<uint32_t>();
        if (n_seqs > (one ? 1 : seqs.size())) {
            throw std::runtime_error(format("it holds %u sequences: use a context of at least as many, n_seq_max is %zu", n_seqs, seqs.size()));
        }
        std::vector<saved_seq> saved;
        std::vector<bool> seen(seqs.size(), false);
        for (uint32_t i = 0; i < n_seqs; ++i) {
            saved.push_back(read_seq(from, the_store, n_ctx_seq, adapters, limits, the_queries.get(), cfg));
            if (the_beside) {
                saved.back().beside = from.array<uint8_t>(from.number<uint64_t>());
            }
            llama_seq_id & s = saved.back().seq_id;
            s = one ? seq_id : s;
            if (s < 0 || s >= (llama_seq_id) seqs.size() || seen[s]) {
                throw std::runtime_error(format("it has sequence %d: it must be in [0, %zu), and there once", s, seqs.size()));
            }
            seen[s] = true;
        }
        const uint64_t sum = from.sum.value;
        if (from.number<uint64_t>() != sum) {
            throw std::runtime_error("it is damaged (checksum)");
        }

        if (lctx) {
            lctx->synchronize(); // buffers are about to be replaced
        }
        changed = true;
        if (one) {
            seq_rm(seq_id, -1, -1);
        } else {
            clear(true);
        }
        for (auto & it : saved) {
            const uint32_t n_tail = std::max<uint32_t>(cfg->n_tail, it.seq.n_in_tail());
            for (size_t i = 0; i < the_store.layers.size(); ++i) {
                put_layer(the_store, the_store.layers[i], it.seq_id, it.heads[i], n_tail, cfg->n_buckets);
            }
            if (the_beside) {
                the_beside->restore(it.seq_id, it.beside);
            }
            if (the_queries) {
                headkv_put_queries(it.generated, it.seq_id, it.seq, *the_queries);
            }
            seqs[it.seq_id] = it.seq;
            seqs[it.seq_id].n_tail = n_tail;
        }
    } catch (const std::exception & e) {
        if (changed && one) {
            seqs[seq_id] = headkv_seq();
            drop_rows(seq_id);
            drop_beside(seq_id);
        } else if (changed) {
            clear(true);
        }
        release_idle();
        headkv_fail(format("the state cannot be restored: %s", e.what()));
        throw;
    }
}
