#include "headkv.h"

#include "headkv-api.h"
#include "headkv-budget.h"
#include "headkv-config.h"
#include "headkv-error.h"
#include "headkv-policy.h"
#include "llama-kv-cache-ragged.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>

struct headkv_params headkv_default_params(void) {
    struct headkv_params params = {
        /*.size            =*/sizeof(struct headkv_params),
        /*.policy          =*/"auto",
        /*.budget          =*/nullptr,
        /*.rank            =*/nullptr,
        /*.fit             =*/nullptr,
        /*.question        =*/"known",
        /*.kv_size         =*/128,
        /*.window          =*/64,
        /*.recent          =*/8,
        /*.power           =*/4,
        /*.pool            =*/HEADKV_POOL_MAX,
        /*.pool_kernel     =*/0,
        /*.beta            =*/0.0,
        /*.n_tail          =*/16,
        /*.attend          =*/HEADKV_ATTEND_AUTO,
        /*.n_buckets       =*/1,
        /*.prefill         =*/HEADKV_PREFILL_AUTO,
        /*.hidden_f16      =*/0,
        /*.sinks           =*/-1,
        /*.protect         =*/nullptr,
        /*.n_protect       =*/0,
        /*.surplus         =*/HEADKV_SURPLUS_LOST,
        /*.pyramid_exact   =*/1,
        /*.adakv_floor     =*/-1.0,
        /*.adakv_normalize =*/0,
        /*.importance      =*/nullptr,
        /*.n_layer         =*/0,
        /*.n_head          =*/0,
        /*.importance_gguf =*/nullptr,
        /*.model_gguf      =*/nullptr,
        /*.replay          =*/nullptr,
        /*.shares          =*/nullptr,
        /*.n_shares        =*/0,
        /*.n_head_kv       =*/0,
        /*.kv_generated    =*/0,
        /*.generated_slack =*/128,
        /*.generated_scope =*/HEADKV_SCOPE_GENERATED,
        /*.generated_rank  =*/HEADKV_GENERATED_ATTENTION,
    };
    return params;
}

// cfg has what headkv_policy_set() sets
static headkv_policy_info info_of(const headkv_config & cfg) {
    static std::set<std::string> names;
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto & b = *cfg.budget;
    return { names.insert(cfg.policy).first->c_str(), b.name, cfg.rank->name, headkv_fit_name(cfg.fit), b.by_importance, b.by_beta, b.by_replay,
        cfg.rank->by_window, cfg.rank->by_sums || headkv_needs_refs(cfg), b.keeps_all };
}

int32_t headkv_find_policy(const char * policy, const char * budget, const char * rank, const char * fit, struct headkv_policy_info * dst) {
    return guarded([&]() -> int32_t {
        headkv_config cfg = {};
        headkv_policy_set(cfg, policy ? policy : "", budget, rank, fit);
        if (dst) {
            *dst = info_of(cfg);
        }
        return 0;
    });
}

int32_t headkv_policies(struct headkv_policy_info * dst, int32_t n) {
    return guarded([&]() -> int32_t {
        const auto & policies = headkv_policy_list();
        if (dst && (size_t) std::max(n, 0) < policies.size()) {
            return fail(format("room for %d policies, %zu are needed", n, policies.size()));
        }
        for (size_t i = 0; dst && i < policies.size(); ++i) {
            headkv_config cfg = {};
            headkv_policy_set(cfg, policies[i].name, nullptr, nullptr, nullptr);
            dst[i] = info_of(cfg);
        }
        return (int32_t) policies.size();
    });
}

int32_t headkv_set_params(const struct headkv_params * params) {
    return guarded([&]() -> int32_t {
        headkv_thread_config().reset();
        headkv_note_thread(false);
        if (!params) {
            return 0; // the reason of a failed llama_init_from_model() stays
        }
        headkv_set_error("");
        headkv_thread_config() = std::make_shared<const headkv_config>(headkv_config_from_params(*params));
        headkv_note_thread(true);
        return 0;
    });
}

int32_t headkv_configure(struct llama_context * ctx, const struct headkv_params * params) {
    return guarded([&]() -> int32_t {
        llama_kv_cache_ragged & kv = cache_of(ctx, 0);
        if (!params) {
            throw std::invalid_argument("no parameters");
        }
        kv.configure(std::make_shared<const headkv_config>(headkv_config_from_params(*params)));
        return 0;
    });
}

const char * headkv_last_error(void) {
    return headkv_get_error().c_str();
}

void headkv_clear_error(void) {
    headkv_set_error("");
}

bool headkv_enabled(const struct llama_context * ctx) {
    return get_kv(ctx) != nullptr;
}

// the configuration that parameters describe, with what the context knows of the heads if they say nothing; null = none are given
static headkv_config_ptr config_of(const llama_kv_cache_ragged & kv, const headkv_params * params) {
    return params ? std::make_shared<const headkv_config>(headkv_config_from_params(*params, &kv.config().known)) : nullptr;
}

static void announce(llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens, bool whole, const headkv_params * params, bool keep = false) {
    llama_kv_cache_ragged & kv = cache_of(ctx, seq_id);
    const bool is_bounded = kv.seq(seq_id).bound.n_cells > 0; // it is no prompt any more, and holds fewer cells
    if (n_tokens < 1 || (!is_bounded && (uint32_t) n_tokens > llama_n_ctx(ctx))) {
        throw std::invalid_argument(format("prompt of %d tokens: it must be in [1, n_ctx = %u]", n_tokens, llama_n_ctx(ctx)));
    }
    headkv_set_error(""); // what is found there after llama_decode() belongs to it
    kv.announce(seq_id, n_tokens, whole, config_of(kv, params), keep);
}

int32_t headkv_begin_prompt(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens, bool whole, const struct headkv_params * params) {
    return guarded([&]() -> int32_t {
        announce(ctx, seq_id, n_tokens, whole, params);
        return 0;
    });
}

// the whole prompt of a sequence in one batch, the last token with an output or none
static int32_t decode_prompt(llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens, bool output) {
    try {
        std::vector<llama_token> ids(tokens, tokens + n_tokens);
        std::vector<llama_pos> pos(n_tokens);
        std::vector<int32_t> n_seq_id(n_tokens, 1);
        std::vector<llama_seq_id *> seq_ids(n_tokens, &seq_id);
        std::vector<int8_t> outputs(n_tokens, 0);
        std::iota(pos.begin(), pos.end(), 0);
        outputs.back() = output;
        return llama_decode(ctx, { n_tokens, ids.data(), nullptr, pos.data(), n_seq_id.data(), seq_ids.data(), outputs.data() });
    } catch (const std::bad_alloc &) {
        fail(format("not enough memory for a batch of %d tokens", n_tokens));
        return -4;
    } catch (const std::exception & e) {
        return fail(e.what());
    }
}

// The same; a prompt whose archive was damaged is read again from its beginning. When it pauses, what its next step finds in the cache is there.
static int32_t decode_whole(llama_kv_cache_ragged & kv, llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens, bool output) {
    while (true) {
        const int32_t n_lost = kv.n_lost();
        int32_t res = decode_prompt(ctx, seq_id, tokens, n_tokens, output);
        if (res == 0 && kv.is_reading(seq_id) && !kv.begin_layer()) {
            kv.seq_rm(seq_id, 0, -1);
            res = -3;
        }
        if (res == 0 || kv.n_lost() == n_lost) {
            return res;
        }
        announce(ctx, seq_id, n_tokens, true, nullptr, true);
    }
}

// the cache, for a prompt from its beginning or one that was paused
static llama_kv_cache_ragged & begin_whole(llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens) {
    llama_kv_cache_ragged & kv = cache_of(ctx, seq_id);
    if (kv.seq(seq_id).n_pos > 0 && !kv.is_reading(seq_id)) {
        throw std::invalid_argument(format("sequence %d holds %d tokens: remove them first", seq_id, kv.seq(seq_id).n_pos));
    }
    announce(ctx, seq_id, n_tokens, true, nullptr, true);
    return kv;
}

int32_t headkv_read_prompt(struct llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens) {
    return guarded([&]() -> int32_t {
        llama_kv_cache_ragged & kv = begin_whole(ctx, seq_id, n_tokens);
        const int32_t res = decode_whole(kv, ctx, seq_id, tokens, n_tokens, true);
        if (res != 0) {
            kv.seq_rm(seq_id, -1, -1);
            if (!*headkv_last_error()) {
                fail(format("llama_decode returned %d", res));
            }
        }
        return res;
    });
}

int32_t headkv_read_ahead(struct llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens, int32_t max_ms) {
    return guarded([&]() -> int32_t {
        llama_kv_cache_ragged & kv = begin_whole(ctx, seq_id, n_tokens);
        const char * why_not = headkv_why_token_prefill(ctx);
        if (*why_not) {
            return fail(format("the prompt cannot be read layer by layer: %s", why_not));
        }
        if (n_tokens < 2 || max_ms < 0) {
            return fail(format("%d tokens in %d ms: it must be 2 tokens and 0 ms at least", n_tokens, max_ms));
        }
        const auto n_left = [&]() { return (int32_t) kv.n_steps_left(seq_id, n_tokens, llama_n_ubatch(ctx)); };
        if (n_left() > 1) {
            kv.set_pause(ggml_time_us() + 1000 * (int64_t) max_ms);
            const int32_t res = decode_whole(kv, ctx, seq_id, tokens, n_tokens, false);
            kv.set_pause(0);
            if (res != 0) {
                kv.seq_rm(seq_id, -1, -1);
                return *headkv_last_error() ? -1 : fail(format("llama_decode returned %d", res));
            }
        }
        return n_left();
    });
}

const char * headkv_why_token_prefill(const struct llama_context * ctx) {
    const llama_kv_cache_ragged * kv = get_kv(ctx);
    if (!kv) {
        return "the cache is the stock one";
    }
    return kv->config().prefill == HEADKV_PREFILL_TOKEN ? "prefill is 'token'" : kv->why_token_major().c_str();
}

int32_t headkv_set_progress(struct llama_context * ctx, headkv_progress progress, void * user_data) {
    return guarded([&]() -> int32_t {
        cache_of(ctx, 0).set_progress(progress, user_data);
        return 0;
    });
}

int32_t headkv_end_prompt(struct llama_context * ctx, llama_seq_id seq_id) {
    return headkv_compress_as(ctx, seq_id, seq_id);
}

int32_t headkv_compress_as(struct llama_context * ctx, llama_seq_id seq_id, llama_seq_id seq_id_dst) {
    return guarded([&]() -> int32_t {
        llama_kv_cache_ragged & kv = cache_of(ctx, seq_id);
        cache_of(ctx, seq_id_dst);
        return kv.compress(ctx, seq_id, seq_id_dst) ? 0 : -1;
    });
}

int32_t headkv_can_continue(const struct llama_context * ctx, llama_seq_id seq_id, const struct headkv_params * params) {
    return guarded([&]() -> int32_t {
        const llama_kv_cache_ragged & kv = cache_of(ctx, seq_id);
        const headkv_config_ptr with = config_of(kv, params);
        const std::string why_not = kv.why_not_continued(seq_id, with ? *with : kv.config());
        return why_not.empty() ? 0 : fail(why_not);
    });
}

int32_t headkv_limit_restore(struct llama_context * ctx, int32_t kv_size, int32_t n_protected, int32_t n_tokens) {
    return guarded([&]() -> int32_t {
        llama_kv_cache_ragged & kv = cache_of(ctx, 0);
        if (kv_size < 0 || n_protected < 0 || n_tokens < 0) {
            return fail(format("limits %d, %d and %d: they must not be negative", kv_size, n_protected, n_tokens));
        }
        kv.limit_restore({ kv_size, n_protected, n_tokens });
        return 0;
    });
}

int32_t headkv_drop(struct llama_context * ctx, llama_seq_id seq_id, int32_t p0, int32_t p1) {
    return guarded([&]() -> int32_t {
        cache_of(ctx, seq_id).drop(seq_id, p0, p1);
        return 0;
    });
}

int32_t headkv_get_stats(const struct llama_context * ctx, llama_seq_id seq_id, struct headkv_stats * stats) {
    return guarded([&]() -> int32_t {
        const llama_kv_cache_ragged & kv = cache_of(ctx, seq_id);
        if (!stats || stats->size != sizeof(struct headkv_stats)) {
            return fail("headkv_stats.size does not match this library");
        }
        const auto & seq = kv.seq(seq_id);
        stats->state = seq.state;
        stats->n_prompt = seq.n_prompt;
        stats->n_past = seq.n_pos;
        stats->bytes_store = kv.store().n_bytes();
        stats->bytes_staging = kv.staging().n_bytes();
        stats->bytes_peak = kv.bytes_peak();
        stats->bytes_full = (int64_t) kv.bytes_cell() * seq.n_pos;
        stats->t_compress_us = kv.t_compress_us();
        stats->n_compress = kv.n_compress();
        stats->kv_size = seq.kv_size;
        stats->n_heads_fitted = seq.fit.n_heads;
        stats->fit_before = seq.fit.before;
        stats->fit_after = seq.fit.after;
        stats->t_fit_us = seq.fit.t_us;
        stats->bytes_beside = kv.bytes_beside();
        stats->kv_generated = (int32_t) seq.bound.n_cells;
        stats->n_evictions = seq.n_evictions;
        stats->n_evicted = seq.n_evicted;
        stats->t_evict_us = seq.t_evict_us;
        stats->bytes_queries = (int64_t) kv.bytes_queries();
        stats->n_archived = kv.is_reading(seq_id) ? kv.n_archived() : seq.n_archived;
        return 0;
    });
}

const char * headkv_get_policy(const struct llama_context * ctx) {
    if (!ctx) {
        return headkv_thread_config() ? headkv_thread_config()->policy.c_str() : "full";
    }
    const llama_kv_cache_ragged * kv = get_kv(ctx);
    return kv ? kv->config().policy.c_str() : "full";
}

int32_t headkv_get_heads(const struct llama_model * model, int32_t * n_head, int32_t * n_head_kv, int32_t * n_embd_head_k, int32_t * n_embd_head_v,
        int32_t * beside, int32_t n) {
    return guarded([&]() -> int32_t {
        if (!model) {
            return fail("the model is null");
        }
        const auto & hparams = model->hparams;
        const auto n_layer = (int32_t) hparams.n_layer();
        if (!n_head || !n_head_kv || !n_embd_head_k || !n_embd_head_v || !beside || n == 0) {
            return n_layer;
        }
        if (n < n_layer) {
            return fail(format("room for %d values, %d are needed", n, n_layer));
        }
        const headkv_layer_owners owners = headkv_owners_of_model(*model);
        for (int32_t il = 0; il < n_layer; ++il) {
            n_head[il] = owners.ours[il] ? (int32_t) hparams.n_head(il) : 0;
            n_head_kv[il] = owners.ours[il] ? (int32_t) hparams.n_head_kv(il) : 0;
            n_embd_head_k[il] = owners.ours[il] ? (int32_t) hparams.n_embd_head_k(il) : 0;
            n_embd_head_v[il] = owners.ours[il] ? (int32_t) hparams.n_embd_head_v(il) : 0;
            beside[il] = (owners.windowed[il] ? HEADKV_BESIDE_WINDOW : 0) + (owners.recurrent[il] ? HEADKV_BESIDE_STATE : 0);
        }
        return n_layer;
    });
}

int32_t headkv_get_budget(const struct llama_context * ctx, int32_t * dst, int32_t n) {
    return guarded([&]() -> int32_t {
        const llama_kv_cache_ragged & kv = cache_of(ctx, 0);
        const int32_t n_head_kv = kv.n_head_kv_max();
        const int32_t n_values = kv.n_layer() * n_head_kv;
        if (dst) {
            if (n < n_values) {
                return fail(format("room for %d values, %d are needed", n, n_values));
            }
            std::fill(dst, dst + n_values, 0);
            for (int32_t il = 0; il < kv.n_layer(); ++il) {
                std::transform(kv.budget(il).begin(), kv.budget(il).end(), dst + il * n_head_kv, [&](uint32_t x) {
                    return kv.config().budget->keeps_all ? (int32_t) kv.n_ctx_seq_max() : (int32_t) x;
                });
            }
        }
        return n_values;
    });
}

int32_t headkv_get_n_cells(const struct llama_context * ctx, llama_seq_id seq_id, int32_t * dst, int32_t n) {
    return guarded([&]() -> int32_t {
        const llama_kv_cache_ragged & kv = cache_of(ctx, seq_id);
        const int32_t n_head_kv = kv.n_head_kv_max();
        const int32_t n_values = kv.n_layer() * n_head_kv;
        if (!dst) {
            return n_values;
        }
        if (n < n_values) {
            return fail(format("room for %d values, %d are needed", n, n_values));
        }
        std::fill(dst, dst + n_values, 0);
        const auto & seq = kv.seq(seq_id);
        for (const auto & layer : kv.store().layers) {
            for (int32_t ih = 0; ih < layer.n_head_kv; ++ih) {
                // of a prompt that is read layer by layer, the first layers are compressed
                const bool is_stored = (size_t) seq_id < layer.ranges.size() && !layer.ranges[seq_id].empty();
                const int32_t n_more = seq.state == HEADKV_SEQ_COMPRESSED ? seq.n_in_tail() : 0;
                dst[layer.il * n_head_kv + ih] = is_stored ? layer.ranges[seq_id][ih].n_used(n_more) : seq.n_pos;
            }
        }
        return n_values;
    });
}

int32_t headkv_get_positions(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t ih, int32_t * dst, int32_t n) {
    return guarded([&]() -> int32_t {
        llama_kv_cache_ragged & kv = cache_of(ctx, seq_id);
        check_head(kv, il, ih);
        if (kv.seq(seq_id).state != HEADKV_SEQ_COMPRESSED) {
            return fail(format("sequence %d is not compressed: call headkv_end_prompt() first", seq_id));
        }
        const auto & pos = kv.store().find(il)->ranges[seq_id][ih].pos;
        if (dst) {
            if ((size_t) std::max(n, 0) < pos.size()) {
                return fail(format("room for %d values, %zu are needed", n, pos.size()));
            }
            std::copy(pos.begin(), pos.end(), dst);
        }
        return (int32_t) pos.size();
    });
}

int32_t headkv_plan(const struct headkv_params * params, int32_t n_layer, const int32_t * n_head, const int32_t * n_head_kv, int32_t n_tokens, int32_t * dst) {
    return guarded([&]() -> int32_t {
        if (!params || !n_head || !n_head_kv || !dst || n_layer < 1 || n_layer > 65536) {
            throw std::invalid_argument(format("%d layers: it must be in [1, 65536], and no pointer NULL", n_layer));
        }
        const std::vector<int32_t> heads(n_head, n_head + n_layer), heads_kv(n_head_kv, n_head_kv + n_layer);
        for (int32_t il = 0; il < n_layer; ++il) {
            const bool ok = heads_kv[il] == 0 ? heads[il] == 0 : heads_kv[il] > 0 && heads[il] > 0 && heads[il] <= 65536 && heads[il] % heads_kv[il] == 0;
            if (!ok) {
                throw std::invalid_argument(format("layer %d with %d heads and %d KV heads: both 0, or heads a multiple of KV heads",
                        il, heads[il], heads_kv[il]));
            }
        }
        const size_t n_row = *std::max_element(heads_kv.begin(), heads_kv.end());
        std::fill(dst, dst + n_layer * n_row, 0);
        const headkv_config cfg = headkv_config_from_params(*params);
        const int64_t n_prefix = n_tokens > 0 ? std::max<int64_t>(0, (int64_t) n_tokens - cfg.recent) : std::numeric_limits<int64_t>::max();
        for (const auto & layer : headkv_budget(cfg, { heads, heads_kv }, n_prefix)) {
            std::copy(layer.begin(), layer.end(), dst);
            dst += n_row;
        }
        return 0;
    });
}

int32_t headkv_get_footprint(const struct llama_context * ctx, const struct headkv_params * params, int32_t n_prompt, int32_t n_predict,
        int32_t n_ubatch, bool layered, struct headkv_footprint * dst) {
    return guarded([&]() -> int32_t {
        const llama_kv_cache_ragged & kv = cache_of(ctx, 0);
        if (!dst || dst->size != sizeof(struct headkv_footprint)) {
            return fail("headkv_footprint.size does not match this library");
        }
        if (!params || n_prompt < 1 || n_predict < 0 || n_ubatch < 1) {
            return fail(format("a prompt of %d tokens in ubatches of %d, %d generated: it must be 1, 1 and 0 at least, and parameters", n_prompt, n_ubatch, n_predict));
        }
        *dst = kv.footprint(*config_of(kv, params), n_prompt, n_predict, layered, n_ubatch);
        for (const auto & it : ctx->memory_breakdown()) {
            dst->compute += it.second.compute;
        }
        return 0;
    });
}
