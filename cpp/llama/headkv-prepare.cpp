// How a batch begins: what was announced, what has to be done before it can be computed, and what its steps do to the sequences.

#include "llama-kv-cache-ragged.h"

#include "headkv-budget.h"
#include "headkv-error.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <utility>

std::vector<std::vector<uint32_t>> llama_kv_cache_ragged::checked_budgets(const headkv_config & b) const {
    const auto & a = *cfg;
    if (b.window > (uint32_t) the_staging.n_ring()) {
        throw std::invalid_argument(format("window is %u: the context has room for the queries of the last %d tokens, create another one",
                b.window, the_staging.n_ring()));
    }
    if (b.n_tail != a.n_tail || b.attend != a.attend || b.n_buckets != a.n_buckets ||
            b.prefill != a.prefill || b.hidden_f16 != a.hidden_f16) {
        throw std::invalid_argument("n_tail, attend, n_buckets, prefill and hidden_f16 cannot change: create another context");
    }
    if (b.generated.n_cells > 0 && !the_queries) {
        throw std::invalid_argument(format("kv_generated is %u: the context keeps no queries of generated tokens, create it with kv_generated", b.generated.n_cells));
    }
    headkv_config_check_ctx(b, n_ctx_seq);
    if (b.rank->by_sums && !the_staging.sums(the_store.layers[0].il, true)) {
        throw std::invalid_argument(format("policy '%s' looks at all tokens while they are read: create the context with it", b.policy.c_str()));
    }
    if (headkv_needs_refs(b) && the_staging.n_refs() == 0) {
        throw std::invalid_argument(format("%s looks at queries of the whole prompt while it is read: create the context with it", b.rank->by_refs ? "rank 'expected'" : "fit 'values'"));
    }
    for (const std::string & why_not : { why_no_fit(b), why_no_rank(b) }) {
        if (!why_not.empty()) {
            throw std::invalid_argument(why_not);
        }
    }
    return headkv_budget(b, heads);
}

void llama_kv_cache_ragged::configure(headkv_config_ptr other) {
    budgets = checked_budgets(*other);
    cfg = std::move(other);
}

void llama_kv_cache_ragged::announce(llama_seq_id seq_id, uint32_t n_tokens, bool whole, headkv_config_ptr with, bool keep) {
    headkv_seq & seq = seqs[seq_id];
    if (with) {
        if (seq.state != HEADKV_SEQ_EMPTY || is_reading(seq_id)) {
            throw std::invalid_argument(format("sequence %d is begun: it keeps the parameters that it was begun with, remove it first", seq_id));
        }
        checked_budgets(*with);
    } else if (keep && seq.n_next == n_tokens) {
        with = seq.cfg_next;
    }
    seq.cfg_next = std::move(with);
    seq.n_next = n_tokens;
    n_progress = std::min(n_tokens, n_ctx_seq);
    announced = { seq_id, n_progress, whole && seq.state == HEADKV_SEQ_EMPTY };
}

llama_memory_context_ptr llama_kv_cache_ragged::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);
    try {
        if (auto res = prepare(balloc, n_ubatch)) {
            return res;
        }
    } catch (const std::exception & e) { // nothing of upstream's catches it
        headkv_fail(headkv_reason(e));
    }
    return std::make_unique<llama_kv_cache_ragged_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
}

llama_memory_context_ptr llama_kv_cache_ragged::prepare(llama_batch_allocr & balloc, uint32_t n_ubatch) {
    check_usable();

    if (the_pass && !the_pass->begun) {
        drop_unbegun(); // what came before it in its batch failed
    }
    headkv_split split;
    const auto is_stored = [this](llama_seq_id s) {
        return seqs[s].state == HEADKV_SEQ_COMPRESSED || (seqs[s].state == HEADKV_SEQ_LAYERED && !is_reading(s));
    };
    if (!headkv_split_batch(split, balloc, n_ubatch, is_stored)) {
        return nullptr;
    }
    const bool reads = !split.to_staging.empty();
    const bool resumed = reads && the_pass;
    if (resumed) {
        const bool same = seqs[the_pass->seq_id].adapters == adapters;
        const std::string why_not = same ? the_pass->why_not_resumed(split, n_layer()) : "other adapters were set";
        if (!why_not.empty()) {
            throw std::runtime_error(format("sequence %d is being read layer by layer and %s: give its whole prompt again, or remove it first",
                    the_pass->seq_id, why_not.c_str()));
        }
    }

    const bool compresses = want_last_layers(split); // what is staged leaves the staging before the batch
    const bool too_short = want_tails(split, resumed);
    const bool layered = resumed || (reads && is_layered(split, compresses));
    const auto tokens = reads && !resumed ? known_tokens(split) : std::vector<llama_token>();
    if (reads && !resumed) {
        drop_left_cells();
    }
    const headkv_archive_hit archived = found.blocks.empty() ? find_archived(split, tokens) : std::exchange(found, {});
    const bool no_room = reads && !resumed && want_staging(split, compresses, layered ? split.n_staging() - archived.n_tokens : 0);
    if (compresses || too_short || no_room) {
        found = archived; // what goes meanwhile is found to be gone when it is restored
        return nullptr; // after the update that follows
    }

    llama_kv_cache::slot_info_vec_t sinfos;
    if (reads) {
        if (!resumed) {
            for (const auto & ubatch : split.to_staging) {
                seqs[ubatch.seq_id_unq[0]].tokens = the_archive ? tokens : std::vector<llama_token>();
            }
            take_archived(split, archived, layered);
            sinfos = the_staging.cache().prepare(split.to_staging);
            if (sinfos.empty()) {
                return nullptr;
            }
        }
        for (const auto & it : split.n_new) {
            headkv_seq & seq = seqs[it.first];
            if (seq.state == HEADKV_SEQ_EMPTY && !is_reading(it.first)) {
                seq.cfg = seq.cfg_next;
                if (!seq.cfg && layered) {
                    seq.cfg = cfg; // of all layers
                }
            }
        }
        announced = announced_t();
        if (n_staged() == 0) {
            n_bytes_peak = 0;
        }
        note_peak();
    }
    if (layered && !resumed) {
        auto beside = the_beside ? the_beside->prepare(split.to_staging) : std::vector<headkv_beside_context>();
        the_pass = std::make_unique<headkv_pass>(split.to_staging[0].seq_id_unq[0], the_staging.cache(), split.to_staging, sinfos, std::move(beside), tokens, archived);
    } else if (resumed) {
        split.drop(the_pass->n_archived());
    }
    if (!split.to_store.empty()) {
        const bool all_fused = the_store.is_all_fused();
        split.to_store = headkv_merge(split.to_store, lctx->n_ubatch(), [&](llama_seq_id before, llama_seq_id next) {
            return all_fused && (!the_beside || the_beside->fits_behind(before, next));
        });
    }
    auto beside = prepare_beside(split, layered);
    headkv_order_outputs(balloc, split.to_store, split.to_staging);
    return std::make_unique<llama_kv_cache_ragged_context>(this, std::move(split), std::move(sinfos), std::move(beside), layered);
}

std::vector<headkv_beside_context> llama_kv_cache_ragged::prepare_beside(const headkv_split & split, bool layered) const {
    if (!the_beside) {
        return {};
    }
    auto res = the_beside->prepare(split.to_store);
    if (!layered) {
        // of other sequences, which have rings of their own
        auto of_staging = the_beside->prepare(split.to_staging);
        std::move(of_staging.begin(), of_staging.end(), std::back_inserter(res));
    }
    return res;
}

void llama_kv_cache_ragged::check_usable() const {
    if (is_called_back) {
        throw std::runtime_error("nothing can be decoded while the progress is told");
    }
    if (!broken.empty()) {
        throw std::runtime_error(broken);
    }
    if (cparams.embeddings) {
        throw std::runtime_error("embeddings were asked for, which a compressed context does not give: create another one, without compression");
    }
    if (!cparams.causal_attn) {
        throw std::runtime_error("causal attention was switched off: prompts are read with it, switch it on or create another context, without compression");
    }
}

bool llama_kv_cache_ragged::want_last_layers(const headkv_split & split) {
    bool res = false;
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if (seqs[s].state == HEADKV_SEQ_LAYERED && !is_reading(s) && (split.n_new.count(s) || !split.to_staging.empty())) {
            seqs[s].compress_to = s;
            res = true;
        }
    }
    return res;
}

bool llama_kv_cache_ragged::want_tails(const headkv_split & split, bool resumed) {
    bool res = false;
    for (const auto & [s, n] : split.n_new) {
        headkv_seq & seq = seqs[s];
        if (resumed && is_reading(s)) {
            continue;
        }
        const bool is_full = (uint64_t) n_held(s) + n > n_ctx_seq;
        const bool evicts = seq.is_eviction_due(s) || (is_full && seq.can_evict(s));
        if (is_full && !evicts) {
            const bool is_bounded = seq.state == HEADKV_SEQ_COMPRESSED && seq.bound.n_cells > 0;
            throw std::runtime_error(format("the context is full: %u tokens and %u new ones do not fit into n_ctx = %u: use a larger n_ctx%s", n_held(s), n, n_ctx_seq,
                    is_bounded ? format(", a head holds as many cells, and the last %u tokens (window) before one is evicted", seq.bound.n_window).c_str() : ""));
        }
        if (const uint32_t n_orig = cparams.n_ctx_orig_yarn; has_two_ropes() && n_ctx_seq <= n_orig && (uint64_t) seq.n_pos + n > n_orig) {
            throw std::runtime_error(format("%d tokens and %u new ones: beyond %u the model rotates by other factors, which are chosen when a context is created: use an n_ctx above that",
                    seq.n_pos, n, n_orig));
        }
        const bool is_compressed = seq.state == HEADKV_SEQ_COMPRESSED;
        if (is_compressed || seq.state == HEADKV_SEQ_LAYERED) {
            const uint32_t n_have = is_compressed ? seq.n_tail : running->n_tail();
            const uint32_t n_tail = n + (is_compressed ? seq.n_in_tail() : 0);
            if (evicts) {
                seq.n_new_next = n;
                res = true;
            } else if (n_tail > n_have) {
                seq.n_tail_next = std::max(n_tail, n_have + std::max(n_have / 4, headkv_n_tail(*cfg, is_compressed ? seq.n_prompt : seq.n_pos)));
                if (seq.bound.n_cells > 0) {
                    seq.n_tail_next = std::max(n_tail, std::min(seq.n_tail_next, seq.bound.n_cells + seq.bound.n_slack));
                }
                res = true;
            }
        }
    }
    return res;
}

bool llama_kv_cache_ragged::is_layered(const headkv_split & split, bool compresses) const {
    const llama_seq_id s = split.to_staging[0].seq_id_unq[0];
    const uint32_t n = split.n_staging();
    // logits of all tokens would need all outputs at once; other sequences in the staging need all of its layers
    const bool res = announced.whole && s == announced.seq_id && seqs[s].state == HEADKV_SEQ_EMPTY && n == split.n_new.at(s) && n == announced.n_tokens && n > 1 &&
            split.n_outputs() < n && (n_staged() == 0 || compresses) && cfg->prefill != HEADKV_PREFILL_TOKEN && token_major.empty();
    if (t_pause > 0 && !res) {
        throw std::runtime_error(format("sequence %d cannot be read layer by layer now: it must be empty, and no other one in the staging", s));
    }
    return res;
}

bool llama_kv_cache_ragged::want_staging(const headkv_split & split, bool compresses, uint32_t n_hidden) {
    uint32_t n_to_come = 0;
    if (split.n_new.count(announced.seq_id)) {
        const uint32_t n = seqs[announced.seq_id].n_pos + split.n_new.at(announced.seq_id);
        n_to_come = announced.n_tokens - std::min(announced.n_tokens, n);
    }
    const uint32_t n_cells = (compresses ? 0 : n_staged()) + split.n_staging();
    if (!compresses && the_staging.fits(n_cells, n_hidden)) {
        return false;
    }
    if (!compresses && n_staged() > 0 && the_staging.is_one_layer() != (n_hidden > 0)) {
        throw std::runtime_error("the staging holds a prompt that is read in another order");
    }
    wanted = { std::max(n_cells + n_to_come, n_hidden > 0 || compresses ? 0 : 2 * the_staging.n_cells()), n_hidden };
    return true;
}

int64_t llama_kv_cache_ragged::n_steps_left(llama_seq_id seq_id, int64_t n_tokens, int64_t n_ubatch) const {
    const bool in_progress = is_reading(seq_id) && the_pass->begun;
    const int64_t n_ubatches = in_progress ? (int64_t) the_pass->staging_ctxs.size() : (n_tokens + n_ubatch - 1) / n_ubatch;
    return n_layer() * n_ubatches - (in_progress ? the_pass->i_layer * n_ubatches + (int64_t) the_pass->i_ubatch : 0);
}

//
// steps of a batch
//

bool llama_kv_cache_ragged::begin_step(const llama_ubatch & ubatch, bool layered) {
    if (layered) {
        the_pass->begun = true;
        the_pass->paused = false;
    }
    if (!progress) {
        return true;
    }
    const int32_t n_before = layered ? (int32_t) the_pass->i_token : ubatch.pos[0];
    const int32_t n_tokens = layered ? (int32_t) the_pass->n_tokens : (int32_t) std::max<uint32_t>(n_progress, ubatch.pos[0] + ubatch.n_tokens);
    is_called_back = true;
    const bool res = progress(layered ? the_pass->i_layer : 0, layered ? n_layer() : 1, n_before, n_tokens, progress_data);
    is_called_back = false;
    return res;
}

bool llama_kv_cache_ragged::next_step(const std::vector<llama_ubatch> & ubatches) {
    the_pass->advance(ubatches);
    if (the_pass->i_layer == n_layer()) {
        the_pass.reset();
        return false;
    }
    the_pass->paused = t_pause > 0 && (the_pass->is_last_step(n_layer()) || ggml_time_us() >= t_pause);
    return !the_pass->paused;
}

void llama_kv_cache_ragged::add_tokens(const llama_ubatch & ubatch, headkv_seq_event event) {
    headkv_seq & first = seqs[ubatch.seq_id[0][0]];
    if (event != HEADKV_EV_DECODE && ubatch.n_tokens >= HEADKV_N_STEP && first.n_alike == first.n_pos) {
        first.n_alike = ubatch.pos[ubatch.n_tokens - 1] + 1;
    }
    const llama_pos n_ring = event == HEADKV_EV_DECODE && the_queries ? the_queries->n_ring() : the_staging.n_ring();
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        seqs[ubatch.seq_id[i][0]].add(event, ubatch.pos[i], adapters, n_ring, the_staging.n_refs());
    }
}

bool llama_kv_cache_ragged::begin_layer() {
    headkv_pass & pass = *the_pass;
    if (pass.i_ubatch > 0 || pass.i_ready >= pass.i_layer) {
        return true;
    }
    bool res = pass.i_layer == 0 || end_layer(pass.i_layer - 1);
    try {
        if (res) {
            restore_layer(pass.archived, pass.i_layer, 0);
        }
    } catch (const std::exception & e) {
        n_lost_blocks++;
        res = headkv_fail(format("layer %d cannot be restored: %s", pass.i_layer, headkv_reason(e)));
    }
    pass.i_ready = pass.i_layer;
    pass.paused &= res; // what failed can be removed
    return res;
}

bool llama_kv_cache_ragged::begin_layer_beside() {
    if (!the_beside) {
        return true;
    }
    const headkv_pass & pass = *the_pass;
    the_beside->rewind(pass.seq_id);
    if (!archives_rings()) {
        return true;
    }
    const auto ils = owners.windowed[pass.i_layer] ? std::vector<int32_t>{ pass.i_layer } : std::vector<int32_t>();
    try {
        restore_rings(pass.archived, pass.seq_id, 0, ils);
    } catch (const std::exception & e) {
        n_lost_blocks++;
        return headkv_fail(format("layer %d cannot be restored: %s", pass.i_layer, headkv_reason(e)));
    }
    return true;
}

bool llama_kv_cache_ragged::end_layer(int32_t il) {
    lctx->synchronize(); // buffers are about to be read and replaced
    try {
        if (!running) {
            begin_compression(the_pass->seq_id, the_pass->seq_id);
        }
        if (headkv_store_layer * layer = the_store.find(il)) {
            running->layer(*layer);
        }
        archive_layer(il);
        note_peak();
    } catch (const std::exception & e) {
        return headkv_fail(format("compression of layer %d failed: %s", il, headkv_reason(e)));
    }
    return true;
}
