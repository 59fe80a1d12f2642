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
        archived_ils.clear();
        ring_rows.forget();
        choose_order();
        return;
    }
    if (the_beside && the_beside->has_states()) {
        throw std::invalid_argument("the archive holds K and V of tokens, and this model has recurrent layers, whose state is right at one position alone: "
                                    "use it without an archive");
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
    std::vector<int32_t> ils;
    for (int32_t il = 0; il < n_layer(); ++il) {
        const headkv_store_layer * layer = the_store.find(il);
        const bool has_ring = owners.windowed[il] && owners.shared[il] < 0;
        if (!layer && !has_ring) {
            continue;
        }
        ils.push_back(il);
        const int64_t n_k = layer ? (int64_t) layer->n_embd_head_k * layer->n_head_kv : the_beside->n_row(il, false);
        const int64_t n_v = layer ? (int64_t) layer->n_embd_head_v * layer->n_head_kv : the_beside->n_row(il, true);
        layout.layers.push_back({ type_k, type_v, n_k, n_v });
        for (const auto & [staged, n] : { std::make_pair(type_k, n_k), std::make_pair(type_v, n_v) }) {
            const ggml_type kept = layout.kept_as(staged);
            if (n % ggml_blck_size(kept) != 0) {
                throw std::invalid_argument(format("the archive cannot hold rows of %lld elements as %s: use f16", (long long) n, ggml_type_name(kept)));
            }
            sum.add(staged);
            sum.add(kept);
        }
        sum.add(il);
        sum.add(n_k);
        if (n_v != n_k) { // else blocks are named as they always were
            sum.add(n_v);
        }
        if (has_ring) {
            // sums are made in the order of its cells
            for (uint32_t x : { the_beside->n_ring(), the_beside->n_window(), (uint32_t) the_beside->type_window() }) {
                sum.add(x);
            }
        }
    }
    layout.seed = sum.value;
    the_archive = std::make_unique<headkv_archive>(std::move(blocks), max_bytes, std::move(layout));
    archived_ils = std::move(ils);
    ring_rows.forget();
    choose_order();
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
    // attention cannot be summed or expected, nor values fitted, without the queries of all tokens; other prompts are in the way
    if (with.rank->by_sums || headkv_needs_refs(with) || n_staged() != (uint32_t) seq.n_pos || (seq.n_pos > 0 && (seq.adapters != adapters || seq.n_alike != seq.n_pos))) {
        return {};
    }
    // the queries of the last ones score, and an output is computed
    const int64_t n_all = std::max<int64_t>(seq.n_next, tokens.size());
    const int64_t n_max = std::min<int64_t>({ n_all - the_staging.n_ring(), (int64_t) tokens.size() - HEADKV_N_STEP, seq.n_pos + (int64_t) split.n_silent() });
    const auto cells = seq.n_pos > 0 ? the_staging.cells_of(split.to_staging[0].seq_id_unq[0], seq.n_pos) : std::vector<int32_t>();
    if (!is_in_order(cells) || (the_beside && !the_beside->is_in_order(split.to_staging[0].seq_id_unq[0]))) {
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
    if (layered && the_beside) {
        the_beside->occupy(s, 0, (llama_pos) hit.n_tokens); // where the others will be; rows come layer by layer
    }
    if (!layered) {
        try {
            for (const auto & layer : the_store.layers) {
                restore_layer(hit, layer.il, n_past);
            }
            if (the_beside) {
                restore_rings(hit, s, (llama_pos) n_past, windowed_ils());
            }
        } catch (const std::exception & e) {
            LLAMA_LOG_WARN("headkv: %s: the tokens are read\n", headkv_reason(e));
            the_staging.cache().seq_rm(s, (llama_pos) n_past, -1);
            return;
        }
    }
    split.drop(hit.n_tokens - n_past);
}

std::vector<int32_t> llama_kv_cache_ragged::windowed_ils() const {
    std::vector<int32_t> res;
    for (int32_t il = 0; il < n_layer(); ++il) {
        if (owners.windowed[il] && owners.shared[il] < 0) {
            res.push_back(il);
        }
    }
    return res;
}

size_t llama_kv_cache_ragged::archive_index(int32_t il) const {
    return std::find(archived_ils.begin(), archived_ils.end(), il) - archived_ils.begin();
}

void llama_kv_cache_ragged::restore_layer(const headkv_archive_hit & hit, int32_t il, uint32_t n_skip) {
    if (hit.blocks.empty()) {
        return;
    }
    const size_t i_layer = archive_index(il);
    if (the_store.find(il)) {
        the_archive->restore(hit, i_layer, n_skip, [&](bool v, uint32_t first, uint32_t n_rows, const uint8_t * rows) {
            ggml_tensor * t = the_staging.rows(il, v);
            ggml_backend_tensor_set(t, rows, first * t->nb[1], n_rows * t->nb[1]);
        });
    }
    if (i_layer + 1 < archived_ils.size()) {
        const bool has_ring = owners.windowed[archived_ils[i_layer + 1]];
        the_archive->will_restore(hit, i_layer + 1, has_ring ? hit.n_tokens - std::min(hit.n_tokens, the_beside->n_ring()) : n_skip);
    }
}

void llama_kv_cache_ragged::restore_rings(const headkv_archive_hit & hit, llama_seq_id seq_id, llama_pos n_past, const std::vector<int32_t> & ils) {
    const auto n = (llama_pos) hit.n_tokens;
    const llama_pos in_ring = std::max(n_past, n - (llama_pos) the_beside->n_ring());
    const llama_pos in_block = n - n % (llama_pos) HEADKV_N_BLOCK; // a longer block may take the place of the last one
    const llama_pos first = std::min(in_ring, in_block);

    std::map<int32_t, std::array<std::vector<uint8_t>, 2>> found;
    for (int32_t il : ils) {
        the_archive->restore(hit, archive_index(il), (uint32_t) first, [&](bool v, uint32_t, uint32_t n_rows, const uint8_t * rows) {
            found[il][v].insert(found[il][v].end(), rows, rows + n_rows * the_beside->n_bytes_row(il, v));
        });
    }
    the_beside->occupy(seq_id, n_past, n);
    ring_rows.begin(seq_id, in_block, n, ils);
    for (auto & [il, of_layer] : found) {
        for (bool v : { false, true }) {
            const size_t nb = the_beside->n_bytes_row(il, v);
            the_beside->write_rows(il, v, seq_id, in_ring, n, of_layer[v].data() + (in_ring - first) * nb);
            of_layer[v].erase(of_layer[v].begin(), of_layer[v].begin() + (ptrdiff_t) ((in_block - first) * nb));
            ring_rows.put(il, v, std::move(of_layer[v]));
        }
    }
}

void llama_kv_cache_ragged::note_rings(const llama_ubatch & ubatch, bool layered) {
    if (!archives_rings()) {
        return;
    }
    const llama_seq_id s = ubatch.seq_id_unq[0];
    if (!layered && ubatch.pos[0] == 0) {
        ring_rows.begin(s, 0, 0, windowed_ils());
    }
    ring_rows.expect(s, ubatch.pos[0], ubatch.pos[0] + (llama_pos) ubatch.n_tokens);
}

void llama_kv_cache_ragged::take_rings() {
    if (ring_rows.expects()) {
        lctx->synchronize();
        ring_rows.take(*the_beside);
    }
}

void llama_kv_cache_ragged::drop_left_cells() {
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size() && the_staging.n_cells() > 0; ++s) {
        the_staging.cache().seq_rm(s, seqs[s].n_pos, -1);
    }
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if (seqs[s].state == HEADKV_SEQ_EMPTY && !is_reading(s)) {
            drop_beside(s);
        } else if (archives_rings() && seqs[s].state == HEADKV_SEQ_STAGED && !the_beside->remove(s, seqs[s].n_pos)) {
            throw std::runtime_error(format("sequence %d was aborted when tokens of it had come from the archive, and its windows are behind them: "
                                            "remove it and give its prompt again",
                    s));
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
    take_rings();
    const bool is_known = prompt.tokens.size() >= (size_t) prompt.n_pos && prompt.adapters != HEADKV_SEVERAL_ADAPTERS;
    if (!the_archive || !is_known || !is_in_order(running->cells_of_prompt())) {
        return;
    }
    if (the_beside && !(ring_rows.is_of(running->seq_id) && ring_rows.end() >= prompt.n_alike)) {
        return;
    }
    writing = std::make_unique<headkv_archive_writer>(*the_archive,
            std::vector<llama_token>(prompt.tokens.begin(), prompt.tokens.begin() + prompt.n_alike), prompt.adapters,
            the_pass ? the_pass->archived : headkv_archive_hit(), the_beside ? (uint32_t) ring_rows.first() : 0);
}

void llama_kv_cache_ragged::archive_layer(int32_t il) {
    const size_t i_layer = archive_index(il);
    if (!writing || i_layer == archived_ils.size()) {
        return;
    }
    take_rings();
    writing->layer(i_layer, [&](bool v, uint32_t first, uint32_t n_rows, uint8_t * rows) {
        if (owners.windowed[il]) {
            ring_rows.read(il, v, (llama_pos) first, n_rows, rows, n_rows * the_beside->n_bytes_row(il, v));
            return;
        }
        ggml_tensor * t = the_staging.rows(il, v);
        ggml_backend_tensor_get(t, rows, first * t->nb[1], n_rows * t->nb[1]);
    });
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
