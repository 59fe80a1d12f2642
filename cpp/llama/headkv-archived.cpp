// What the memory class does with an archive: which tokens of a prompt come from it, and when a prompt goes to it.

#include "llama-kv-cache-ragged.h"

#include "headkv-checksum.h"
#include "headkv-error.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

// All bytes of all tensors, as they lie in memory: backends rearrange matrices, and what another one has computed is another prompt.
static void add_weights(headkv_checksum & sum, const llama_model & model) {
    constexpr size_t n_piece = 16 << 20; // of what is on another device
    std::vector<uint8_t> raw;
    for (const auto & [name, t] : model.tensors_by_name) {
        if (!t->buffer || !t->data) {
            continue;
        }
        const ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(t->buffer);
        const ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
        const size_t n_bytes = std::min(ggml_nbytes(t), ggml_backend_buft_get_alloc_size(buft, t));
        if (ggml_backend_buffer_is_host(t->buffer) || !dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
            sum.add(headkv_checksum_words(0, t->data, n_bytes)); // a rearranged one cannot be asked for
            continue;
        }
        for (size_t i = 0; i < n_bytes; i += n_piece) {
            raw.resize(std::min(n_piece, n_bytes - i));
            ggml_backend_tensor_get(t, raw.data(), i, raw.size());
            sum.add(headkv_checksum_words(0, raw.data(), raw.size()));
        }
    }
}

uint64_t llama_kv_cache_ragged::archive_seed() const {
    headkv_checksum sum;
    sum.add(get_fingerprint());
    add_weights(sum, model);
    sum.add(cfg->hidden_f16);
    return sum.value;
}

void llama_kv_cache_ragged::set_archive(std::unique_ptr<headkv_blocks> blocks, int64_t max_bytes, ggml_type type) {
    if (is_called_back || the_pass || running) {
        throw std::invalid_argument("a prompt is being read: end or remove it first");
    }
    if (n_staged() > 0) {
        throw std::invalid_argument("a prompt is held that is not compressed: end or remove it first");
    }
    if (!blocks) {
        the_archive.reset();
        return;
    }
    if (the_beside) {
        throw std::invalid_argument("the archive holds K and V of global attention, and this model has layers with windows or recurrent states, "
                                    "which it would have to read again: use it without an archive");
    }
    if (cparams.n_ubatch < HEADKV_N_STEP) {
        throw std::invalid_argument(format("n_ubatch is %u: with an archive it must be at least %u, fewer tokens are computed in another way",
                cparams.n_ubatch, HEADKV_N_STEP));
    }
    headkv_archive_layout layout;
    layout.type = type;
    layout.model = model.name.empty() ? model.arch_name() : model.name;
    headkv_checksum sum;
    sum.add(archive_seed());
    for (const auto & layer : the_store.layers) {
        const int64_t n_k = (int64_t) layer.n_embd_head_k * layer.n_head_kv;
        const int64_t n_v = (int64_t) layer.n_embd_head_v * layer.n_head_kv;
        layout.layers.push_back({ layer.type_k, layer.type_v, n_k, n_v });
        for (const auto & [staged, n] : { std::make_pair(layer.type_k, n_k), std::make_pair(layer.type_v, n_v) }) {
            const ggml_type kept = layout.kept_as(staged);
            if (n % ggml_blck_size(kept) != 0) {
                throw std::invalid_argument(format("the archive cannot hold rows of %lld elements as %s: use f16", (long long) n, ggml_type_name(kept)));
            }
            sum.add(staged);
            sum.add(kept);
        }
        sum.add(layer.il);
        sum.add(n_k);
        if (n_v != n_k) { // else blocks are named as they always were
            sum.add(n_v);
        }
    }
    layout.seed = sum.value;
    the_archive = std::make_unique<headkv_archive>(std::move(blocks), max_bytes, std::move(layout));
}

//
// from the archive
//

std::vector<llama_token> llama_kv_cache_ragged::known_tokens(const headkv_split & split) const {
    const llama_seq_id s = split.to_staging[0].seq_id_unq[0];
    const headkv_seq & seq = seqs[s];
    const bool is_only = std::all_of(split.to_staging.begin(), split.to_staging.end(), [&](const llama_ubatch & u) { return u.seq_id_unq[0] == s; });
    if (!is_only || (seq.n_pos > 0 && seq.tokens.size() < (size_t) seq.n_pos)) {
        return {};
    }
    std::vector<llama_token> res(seq.tokens.begin(), seq.tokens.begin() + seq.n_pos);
    const auto more = split.tokens_to_staging();
    res.insert(res.end(), more.begin(), more.end());
    return more.size() == split.n_staging() ? res : std::vector<llama_token>();
}

// whether the cells are the positions: attention sums in the order of the cells
static bool is_in_order(const std::vector<int32_t> & cells) {
    for (size_t i = 0; i < cells.size(); ++i) {
        if (cells[i] != (int32_t) i) {
            return false;
        }
    }
    return true;
}

headkv_archive_hit llama_kv_cache_ragged::find_archived(const headkv_split & split, const std::vector<llama_token> & tokens) const {
    if (!the_archive || tokens.empty() || n_lost_blocks > 1) {
        return {};
    }
    const headkv_seq & seq = seqs[split.to_staging[0].seq_id_unq[0]];
    const headkv_config & with = *(seq.cfg ? seq.cfg : seq.cfg_next ? seq.cfg_next
                                                                    : cfg);
    // attention cannot be summed, nor values fitted, without the queries of all tokens; other prompts are in the way
    if (with.rank->by_sums || with.fit == HEADKV_FIT_VALUES || n_staged() != (uint32_t) seq.n_pos || (seq.n_pos > 0 && (seq.adapters != adapters || seq.n_alike != seq.n_pos))) {
        return {};
    }
    // the queries of the last ones score, and an output is computed
    const int64_t n_all = std::max<int64_t>(seq.n_next, tokens.size());
    const int64_t n_max = std::min<int64_t>({ n_all - the_staging.n_ring(), (int64_t) tokens.size() - HEADKV_N_STEP, seq.n_pos + (int64_t) split.n_silent() });
    const auto cells = seq.n_pos > 0 ? the_staging.cells_of(split.to_staging[0].seq_id_unq[0], seq.n_pos) : std::vector<int32_t>();
    if (!is_in_order(cells)) {
        return {};
    }
    headkv_archive_hit res;
    try {
        res = the_archive->find(tokens, (uint32_t) std::max<int64_t>(0, n_max), adapters);
    } catch (const std::exception & e) {
        LLAMA_LOG_WARN("headkv: the archive cannot be read: %s\n", headkv_reason(e));
        return {};
    }
    // what is left of a ubatch is computed as the whole of it
    while (res.n_tokens > (uint32_t) seq.n_pos && split.n_left(res.n_tokens - (uint32_t) seq.n_pos) < HEADKV_N_STEP) {
        res.cut(res.n_tokens - HEADKV_N_STEP);
    }
    return res.n_tokens > (uint32_t) seq.n_pos ? res : headkv_archive_hit();
}

void llama_kv_cache_ragged::take_archived(headkv_split & split, const headkv_archive_hit & hit, bool layered) {
    if (hit.blocks.empty()) {
        return;
    }
    const llama_seq_id s = split.to_staging[0].seq_id_unq[0];
    const auto n_past = (uint32_t) seqs[s].n_pos;
    the_staging.occupy(s, n_past, hit.n_tokens);
    if (!layered) {
        try {
            for (const auto & layer : the_store.layers) {
                restore_layer(hit, layer.il, n_past);
            }
        } catch (const std::exception & e) {
            LLAMA_LOG_WARN("headkv: %s: the tokens are read\n", headkv_reason(e));
            the_staging.cache().seq_rm(s, (llama_pos) n_past, -1);
            return;
        }
    }
    split.drop(hit.n_tokens - n_past);
}

void llama_kv_cache_ragged::restore_layer(const headkv_archive_hit & hit, int32_t il, uint32_t n_skip) {
    const headkv_store_layer * layer = the_store.find(il);
    if (hit.blocks.empty() || !layer) {
        return;
    }
    const size_t i_layer = layer - the_store.layers.data();
    the_archive->restore(hit, i_layer, n_skip, the_staging.rows(il, false), the_staging.rows(il, true));
    if (i_layer + 1 < the_archive->n_layers()) {
        the_archive->will_restore(hit, i_layer + 1);
    }
}

void llama_kv_cache_ragged::drop_left_cells() {
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size() && the_staging.n_cells() > 0; ++s) {
        the_staging.cache().seq_rm(s, seqs[s].n_pos, -1);
    }
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if (seqs[s].state == HEADKV_SEQ_EMPTY && !is_reading(s)) {
            drop_beside(s);
        }
    }
}

void llama_kv_cache_ragged::drop_unbegun() {
    the_pass.reset();
    if (the_staging.n_cells() > 0) {
        the_staging.cache().clear(false);
    }
}

//
// to the archive
//

void llama_kv_cache_ragged::begin_archiving(const headkv_seq & prompt) {
    writing.reset();
    const bool is_known = prompt.tokens.size() >= (size_t) prompt.n_pos && prompt.adapters != HEADKV_SEVERAL_ADAPTERS;
    if (the_archive && is_known && is_in_order(running->cells_of_prompt())) {
        writing = std::make_unique<headkv_archive_writer>(*the_archive,
                std::vector<llama_token>(prompt.tokens.begin(), prompt.tokens.begin() + prompt.n_alike), prompt.adapters,
                the_pass ? the_pass->archived : headkv_archive_hit());
    }
}

void llama_kv_cache_ragged::archive_layer(const headkv_store_layer & layer) {
    if (writing) {
        writing->layer(&layer - the_store.layers.data(), the_staging.rows(layer.il, false), the_staging.rows(layer.il, true));
    }
}

void llama_kv_cache_ragged::end_archiving(const headkv_seq & compressed, bool counts) {
    n_lost_blocks = 0;
    if (!writing) {
        return;
    }
    writing->commit();
    writing.reset();
    if (counts) {
        the_archive->note_prompt(compressed.n_archived, (uint32_t) compressed.n_prompt - compressed.n_archived);
    }
}
