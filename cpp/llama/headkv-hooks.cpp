#include "headkv-hooks.h"

#include "headkv-beside.h"
#include "headkv-error.h"
#include "llama-kv-cache-ragged.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

//
// memory
//

// why a model or a context cannot have a ragged cache; empty = it can
static std::string refusal(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    const auto & hparams = model.hparams;

    if (!cparams.flash_attn && model.arch != LLM_ARCH_GROK) { // whose logits have a cap that flash attention is not told: ours is
        return "flash attention is off and is required: use flash_attn=True or -fa on";
    }
    if (!cparams.causal_attn) {
        return "the attention is not causal";
    }
    if (cparams.embeddings || (cparams.pooling_type != LLAMA_POOLING_TYPE_NONE && cparams.pooling_type != LLAMA_POOLING_TYPE_UNSPECIFIED)) {
        return "contexts for embeddings or reranking have no generation to speed up";
    }
    if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || params.mem_other || cparams.ctx_other) {
        return "draft contexts that share another context's memory (MTP, EAGLE-3, DFlash) are not supported";
    }
    if (model.split_mode() == LLAMA_SPLIT_MODE_ROW || model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        return "split modes 'row' and 'tensor' are not supported, use 'layer' or 'none'";
    }
    if (llama_model_has_encoder(&model)) {
        return "encoder-decoder models are not supported";
    }
    if (hparams.is_mla()) {
        return "MLA caches one latent vector for all heads of a layer: there could be one budget per layer, which is not built; "
               "run it without kv_size, a smaller cache is one of type q8_0, for K and V";
    }
    if (hparams.swa_type == LLAMA_SWA_TYPE_SYMMETRIC) {
        return "its windows reach to tokens that come later";
    }
    if (hparams.ple_n_heads > 0) {
        return "n-gram embeddings read earlier tokens from the cache";
    }
    return "";
}

// why the layers that would be ours cannot be; empty = they can
static std::string refusal(const llama_hparams & hparams, const headkv_layer_owners & owners, uint32_t n_rs_seq) {
    if (std::find(owners.ours.begin(), owners.ours.end(), true) == owners.ours.end()) {
        return "none of its layers attends to all tokens";
    }
    if (n_rs_seq > 0 && std::find(owners.recurrent.begin(), owners.recurrent.end(), true) != owners.recurrent.end()) {
        return "recurrent states that can be rolled back (n_rs_seq, for drafts) are not supported: use 0";
    }
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        const int32_t shared = owners.shared[il];
        if (shared >= 0 && !(owners.windowed[shared] && hparams.is_swa(il)) && !(owners.ours[shared] && !hparams.is_swa(il))) {
            return format("layer %u attends to cells of layer %d, which is of another kind", il, shared);
        }
        if (owners.ours[il] && hparams.n_head(il) % hparams.n_head_kv(il) != 0) {
            return format("layer %u has %u query heads, which are no multiple of its %u KV heads", il, hparams.n_head(il), hparams.n_head_kv(il));
        }
    }
    return "";
}

static std::string not_possible(const llama_model & model, const std::string & why) {
    return format("KV compression is not possible for this context (architecture %s): %s", model.arch_name().c_str(), why.c_str());
}

// Asks upstream, on a small context, which memory the model gets.
static headkv_layer_owners ask_owners(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    llama_cparams cparams_probe = cparams;
    cparams_probe.n_ctx = 256;
    cparams_probe.n_ctx_seq = 256;
    cparams_probe.n_seq_max = 1;
    llama_memory_params params_probe = params;
    params_probe.swa_full = false; // what the windowed layers hold is not upstream's choice, which it would log

    const headkv_config_ptr cfg = headkv_thread_config();
    headkv_thread_config() = nullptr;
    std::unique_ptr<llama_memory_i> probe;
    try {
        probe.reset(model.create_memory(params_probe, cparams_probe));
    } catch (...) {
        headkv_thread_config() = cfg;
        throw;
    }
    headkv_thread_config() = cfg;
    if (!probe) {
        throw std::runtime_error(not_possible(model, "it has no cache"));
    }
    headkv_layer_owners res;
    std::string why;
    try {
        res = headkv_owners_of(*probe, model.hparams);
        why = refusal(model.hparams, res, cparams.n_rs_seq);
    } catch (const std::runtime_error & e) {
        why = e.what();
    }
    if (!why.empty()) {
        throw std::runtime_error(not_possible(model, why));
    }
    return res;
}

headkv_layer_owners headkv_owners_of_model(const llama_model & model) {
    llama_cparams cparams = {};
    cparams.n_ubatch = 32;
    cparams.flash_attn = true;
    cparams.causal_attn = model.hparams.causal_attn;
    llama_memory_params params = {};
    params.type_k = params.type_v = GGML_TYPE_F16;
    params.ctx_type = LLAMA_CONTEXT_TYPE_DEFAULT;
    const std::string why = refusal(model, params, cparams);
    if (!why.empty()) {
        throw std::runtime_error(not_possible(model, why));
    }
    return ask_owners(model, params, cparams);
}

llama_memory_i * headkv_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    const headkv_config_ptr cfg = headkv_thread_config();
    if (!cfg) {
        if (headkv_is_for_another_thread()) {
            LLAMA_LOG_WARN("headkv: this context has the stock cache: headkv_set_params() was called on another thread, and counts for the contexts that are created there\n");
        }
        return nullptr;
    }
    try {
        const std::string why = refusal(model, params, cparams);
        if (!why.empty()) {
            throw std::runtime_error(not_possible(model, why));
        }
        headkv_config_check_ctx(*cfg, cparams.n_ctx_seq);

        return new llama_kv_cache_ragged(model, ask_owners(model, params, cparams), params.type_k, params.type_v, cparams, cfg);
    } catch (const std::exception & e) {
        headkv_set_error(e.what());
        throw;
    }
}

void headkv_note_adapters(llama_memory_i * memory, const llama_adapter_loras & loras, const llama_adapter_cvec & cvec) {
    if (auto * kv = dynamic_cast<llama_kv_cache_ragged *>(memory)) {
        kv->note_adapters(loras, cvec);
    }
}
