// What an update does between two batches: compressions that were asked for, longer tails, a larger staging.

#include "llama-kv-cache-ragged.h"

#include "headkv-error.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <map>

class llama_kv_cache_ragged_update : public llama_memory_context_i {
public:
    llama_kv_cache_ragged_update(llama_kv_cache_ragged * kv, llama_context * lctx) :
        kv(kv), lctx(lctx) {}

    bool next() override { return false; }
    bool apply() override { return kv->apply_update(lctx); }

    llama_memory_status get_status() const override {
        return kv->has_update() ? LLAMA_MEMORY_STATUS_SUCCESS : LLAMA_MEMORY_STATUS_NO_UPDATE;
    }

    const llama_ubatch & get_ubatch() const override { GGML_ABORT("an update has no ubatch"); }

private:
    llama_kv_cache_ragged * kv;
    llama_context * lctx;
};

llama_memory_context_ptr llama_kv_cache_ragged::init_update(llama_context * lctx, bool optimize) {
    if (!optimize) {
        forget_updates(); // the beginning of a batch: what the one before has left failed with it
        found = headkv_archive_hit();
    }
    this->lctx = lctx;
    return std::make_unique<llama_kv_cache_ragged_update>(this, lctx);
}

bool llama_kv_cache_ragged::has_update() const {
    return wanted.n_cells > 0 || std::any_of(seqs.begin(), seqs.end(), [](const headkv_seq & seq) { return seq.compress_to >= 0 || seq.n_tail_next > 0 || seq.n_new_next > 0; });
}

void llama_kv_cache_ragged::forget_updates() {
    for (auto & seq : seqs) {
        seq.compress_to = -1;
        seq.n_tail_next = 0;
        seq.n_new_next = 0;
    }
    wanted = wanted_t();
}

bool llama_kv_cache_ragged::apply_update(llama_context * lctx) {
    lctx->synchronize(); // buffers are about to be replaced

    bool res = true;
    std::string needed; // memory for what
    try {
        for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size() && res; ++s) {
            if (seqs[s].compress_to >= 0) {
                did_compress = res = compress_now(s);
            }
        }
        for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size() && res; ++s) {
            if (seqs[s].n_new_next > 0) {
                needed = format(" to evict generated tokens of sequence %d", s);
                evict(s, seqs[s].n_new_next);
            }
        }
        if (res) {
            needed = for_tails();
            grow_tails();
        }
        if (res && wanted.n_cells > 0) {
            needed = for_staging();
            for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
                if (seqs[s].state != HEADKV_SEQ_COMPRESSED) {
                    drop_rows(s); // what could not be given back when it was removed
                }
            }
            the_staging.alloc(wanted.n_cells, n_staged() > 0, wanted.n_hidden, lctx->n_ubatch());
        }
    } catch (const std::exception & e) {
        const std::string what = headkv_reason(e);
        res = headkv_fail(HEADKV_NO_MEMORY + needed + (what == HEADKV_NO_MEMORY ? "" : " (" + what + ")"));
        release_idle(); // what was allocated before the failure
    }
    forget_updates();
    return res;
}

std::string llama_kv_cache_ragged::for_tails() const {
    std::string res;
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if (seqs[s].n_tail_next > 0) {
            res += format("%s%u generated tokens of sequence %d", res.empty() ? " for " : ", ", seqs[s].n_tail_next, s);
        }
    }
    return res;
}

std::string llama_kv_cache_ragged::for_staging() const {
    const double n_bytes = (double) bytes_cell() * wanted.n_cells / (wanted.n_hidden > 0 ? the_store.layers.size() : 1);
    return format(" for a prompt of %u tokens, whose K and V take %.1f MiB while it is read%s", wanted.n_cells, n_bytes / 1024 / 1024,
            wanted.n_hidden > 0 ? "" : ", less with prefill 'layer'");
}

void llama_kv_cache_ragged::grow_tails() {
    for (auto & seq : seqs) {
        if (seq.bound.n_cells == 0) {
            seq.n_tail_next = std::min<uint32_t>(seq.n_tail_next, n_ctx_seq - seq.n_prompt);
        }
    }
    for (auto & layer : the_store.layers) {
        std::map<int32_t, headkv_rows> changes;
        for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
            const headkv_seq & seq = seqs[s];
            if (seq.n_tail_next == 0) {
                continue;
            }
            headkv_rows & rows = changes[s];
            rows.n_tail = seq.n_tail_next;
            for (const auto & r : layer.ranges[s]) {
                rows.n_kept.push_back(r.n_kept);
                rows.n_used.push_back(r.n_used(seq.n_in_tail()));
            }
        }
        if (changes.empty()) {
            return;
        }
        // layers that were grown before a failure keep their longer tails, which does no harm
        the_store.relayout(layer, changes, cfg->n_buckets);
    }
    for (auto & seq : seqs) {
        seq.n_tail = seq.n_tail_next > 0 ? seq.n_tail_next : seq.n_tail;
    }
}

bool llama_kv_cache_ragged::make_room(llama_context * lctx, uint32_t n_tokens) {
    forget_updates();
    wanted = { n_tokens, 0 };
    lctx->memory_update(true);
    return the_staging.fits(n_tokens, 0);
}
