// What the functions of the C API share.
#pragma once

#include "headkv-error.h"
#include "llama-kv-cache-ragged.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <stdexcept>
#include <string>

inline int32_t fail(const std::string & what) {
    headkv_set_error(what);
    return -1;
}

inline llama_kv_cache_ragged * get_kv(const llama_context * ctx) {
    return ctx ? dynamic_cast<llama_kv_cache_ragged *>(llama_get_memory(ctx)) : nullptr;
}

// nothing that is thrown crosses the C border
template <typename F> inline int32_t guarded(const F & run) {
    try {
        return run();
    } catch (const std::exception & e) {
        return fail(headkv_reason(e));
    }
}

// the ragged cache of a context; throws where there is none, or no such sequence
inline llama_kv_cache_ragged & cache_of(const llama_context * ctx, llama_seq_id seq_id) {
    llama_kv_cache_ragged * kv = get_kv(ctx);
    if (!kv) {
        throw std::invalid_argument("the context was created without headkv_set_params()");
    }
    if (seq_id < 0 || (uint32_t) seq_id >= kv->n_seq_max()) {
        throw std::invalid_argument(format("sequence %d: it must be in [0, %u)", seq_id, kv->n_seq_max()));
    }
    return *kv;
}

inline void check_head(const llama_kv_cache_ragged & kv, int32_t il, int32_t ih) {
    if (il < 0 || il >= kv.n_layer() || ih < 0 || (size_t) ih >= kv.budget(il).size()) {
        throw std::invalid_argument(format("layer %d, KV head %d: the model has %d layers with up to %d KV heads", il, ih, kv.n_layer(), kv.n_head_kv_max()));
    }
}
