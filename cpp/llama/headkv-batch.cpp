#include "headkv-batch.h"

#include "llama-kv-cache-ragged.h"

#include "headkv-error.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

//
// ubatches
//

uint32_t headkv_split::n_staging() const {
    uint32_t res = 0;
    for (const auto & ubatch : to_staging) {
        res += ubatch.n_tokens;
    }
    return res;
}

static bool has_output(const llama_ubatch & ubatch, uint32_t i) {
    return ubatch.output[i] != 0;
}

static void append_tokens(std::vector<llama_token> & dst, const llama_ubatch & ubatch) {
    if (ubatch.token) {
        dst.insert(dst.end(), ubatch.token, ubatch.token + ubatch.n_tokens);
    }
}

std::vector<llama_token> headkv_split::tokens_to_staging() const {
    std::vector<llama_token> res;
    for (const auto & ubatch : to_staging) {
        append_tokens(res, ubatch);
    }
    return res;
}

uint32_t headkv_split::n_silent() const {
    uint32_t res = 0;
    for (const auto & ubatch : to_staging) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i, ++res) {
            if (has_output(ubatch, i)) {
                return res;
            }
        }
    }
    return res;
}

uint32_t headkv_split::n_outputs() const {
    uint32_t res = 0;
    for (const auto & ubatch : to_staging) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            res += has_output(ubatch, i);
        }
    }
    return res;
}

bool headkv_split_batch(headkv_split & res, llama_batch_allocr & balloc, uint32_t n_ubatch, const std::function<bool(llama_seq_id)> & is_stored) {
    balloc.split_reset();
    while (true) {
        auto ubatch = balloc.split_seq(n_ubatch);
        if (ubatch.n_tokens == 0) {
            break;
        }
        if (ubatch.n_seqs_unq != 1) {
            throw std::runtime_error("a token belongs to more than one sequence, which the ragged cache cannot do");
        }
        if (ubatch.n_pos > 1 && ubatch.embd) {
            throw std::runtime_error("the batch holds embeddings with positions of several dimensions, as those of an image are: with compression a prompt "
                                     "is text, use a context without it");
        }
        ubatch.data->pos.resize(ubatch.n_tokens); // that of a text is the same in all dimensions, which upstream does again
        ubatch.n_pos = 1;
        ubatch.b_equal_seqs = 1; // it is one, which recurrent layers ask for
        const llama_seq_id s = ubatch.seq_id_unq[0];
        res.n_new[s] += ubatch.n_tokens;
        (is_stored(s) ? res.to_store : res.to_staging).push_back(std::move(ubatch)); // NOLINT
    }
    return balloc.get_n_used() >= balloc.get_n_tokens();
}

// a ubatch over other data, whose pointers to the sequences are made here
static llama_ubatch with_data(llama_ubatch res, std::shared_ptr<llama_ubatch::data_t> data) {
    for (auto & id : data->seq_id_data) {
        data->seq_id.push_back(&id);
    }
    res.n_tokens = res.n_seqs * res.n_seq_tokens;
    res.token = res.token ? data->token.data() : nullptr;
    res.embd = res.embd ? data->embd.data() : nullptr;
    res.pos = data->pos.data();
    res.n_seq_id = data->n_seq_id.data();
    res.seq_id = data->seq_id.data();
    res.seq_id_unq = data->seq_id_unq.data();
    res.seq_idx = data->seq_idx.data();
    res.output = data->output.data();
    res.data = std::move(data);
    return res;
}

// one ubatch out of several: sequence after sequence, each with the same number of tokens
static llama_ubatch concat_ubatches(const std::vector<llama_ubatch> & parts) {
    if (parts.size() == 1) {
        return parts[0];
    }
    auto data = std::make_shared<llama_ubatch::data_t>();
    const auto append = [](auto & dst, const auto & src) { dst.insert(dst.end(), src.begin(), src.end()); };

    data->seq_idx.assign(LLAMA_MAX_SEQ, -1);
    for (const auto & part : parts) {
        append(data->token, part.data->token);
        append(data->embd, part.data->embd);
        append(data->pos, part.data->pos);
        append(data->n_seq_id, part.data->n_seq_id);
        append(data->output, part.data->output);
        append(data->batch_idxs, part.data->batch_idxs);
        append(data->seq_id_data, part.data->seq_id_data);
        data->seq_idx[part.seq_id_unq[0]] = (int32_t) data->seq_id_unq.size();
        append(data->seq_id_unq, part.data->seq_id_unq);
    }
    llama_ubatch res = parts[0];
    res.n_seqs = res.n_seqs_unq = (uint32_t) parts.size();
    return with_data(res, std::move(data));
}

// the last tokens of a ubatch of one sequence
static llama_ubatch tail_of(const llama_ubatch & ubatch, uint32_t n_first) {
    auto data = std::make_shared<llama_ubatch::data_t>(*ubatch.data);
    const auto cut = [&](auto & v) { v.erase(v.begin(), v.begin() + (ptrdiff_t) (v.size() / ubatch.n_tokens * n_first)); };
    cut(data->token);
    cut(data->embd);
    cut(data->pos);
    cut(data->n_seq_id);
    cut(data->output);
    cut(data->batch_idxs);
    cut(data->seq_id_data);
    data->seq_id.clear();

    llama_ubatch res = ubatch;
    res.n_seq_tokens -= n_first;
    return with_data(res, std::move(data));
}

uint32_t headkv_split::n_left(uint32_t n) const {
    for (const auto & ubatch : to_staging) {
        if (n < ubatch.n_tokens) {
            return n > 0 ? ubatch.n_tokens - n : UINT32_MAX;
        }
        n -= ubatch.n_tokens;
    }
    return UINT32_MAX;
}

void headkv_split::drop(uint32_t n) {
    size_t i = 0;
    for (; i < to_staging.size() && n >= to_staging[i].n_tokens; ++i) {
        n -= to_staging[i].n_tokens;
    }
    to_staging.erase(to_staging.begin(), to_staging.begin() + (ptrdiff_t) i);
    if (n > 0) {
        to_staging[0] = tail_of(to_staging[0], n);
    }
}

std::vector<llama_ubatch> headkv_merge(const std::vector<llama_ubatch> & ubatches, uint32_t n_ubatch,
        const std::function<bool(llama_seq_id before, llama_seq_id next)> & fits_behind) {
    // (how many of its sequence came before, tokens) -> ubatches in order of their sequences
    std::map<std::pair<uint32_t, uint32_t>, std::map<llama_seq_id, llama_ubatch>> groups;
    std::map<llama_seq_id, uint32_t> n_before;
    for (const auto & ubatch : ubatches) {
        const llama_seq_id s = ubatch.seq_id_unq[0];
        groups[{ n_before[s]++, ubatch.n_tokens }][s] = ubatch;
    }
    std::vector<llama_ubatch> res;
    for (const auto & [key, of_seq] : groups) {
        std::vector<llama_ubatch> parts;
        for (const auto & [s, ubatch] : of_seq) {
            if (!parts.empty() && (ubatch.n_tokens * (parts.size() + 1) > n_ubatch || !fits_behind(parts.back().seq_id_unq[0], s))) {
                res.push_back(concat_ubatches(parts));
                parts.clear();
            }
            parts.push_back(ubatch);
        }
        res.push_back(concat_ubatches(parts));
    }
    return res;
}

void headkv_order_outputs(llama_batch_allocr & balloc, const std::vector<llama_ubatch> & first, const std::vector<llama_ubatch> & second) {
    std::vector<int32_t> & out_ids = balloc.get_out_ids();
    out_ids.clear();
    for (const auto * ubatches : { &first, &second }) {
        for (const auto & ubatch : *ubatches) {
            for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
                if (has_output(ubatch, i)) {
                    out_ids.push_back(ubatch.data->batch_idxs[i]);
                }
            }
        }
    }
}

//
// headkv_pass
//

static std::unique_ptr<llama_kv_cache_context> staging_context(llama_kv_cache & cache, const llama_ubatch & ubatch, const llama_kv_cache::slot_info & sinfo) {
    return std::make_unique<llama_kv_cache_context>(&cache, llama_kv_cache::slot_info_vec_t{ sinfo }, std::vector<llama_ubatch>{ ubatch });
}

headkv_pass::headkv_pass(llama_seq_id seq_id, llama_kv_cache & cache, const std::vector<llama_ubatch> & ubatches,
        const llama_kv_cache::slot_info_vec_t & sinfos, std::vector<headkv_beside_context> beside, std::vector<llama_token> tokens, headkv_archive_hit archived) :
    seq_id(seq_id), tokens(std::move(tokens)), archived(std::move(archived)), n_tokens(n_archived()), beside_ctxs(std::move(beside)), i_token(n_archived()) {
    for (size_t i = 0; i < ubatches.size(); ++i) {
        n_tokens += ubatches[i].n_tokens;
        staging_ctxs.push_back(staging_context(cache, ubatches[i], sinfos[i]));
    }
    if (sinfos.empty() || sinfos[0].idxs[0][0] != n_archived()) {
        throw std::logic_error("the cells of a prompt are not its positions");
    }
}

void headkv_pass::advance(const std::vector<llama_ubatch> & ubatches) {
    i_token += ubatches[i_ubatch].n_tokens;
    if (++i_ubatch == ubatches.size()) {
        i_ubatch = 0;
        i_token = n_archived();
        ++i_layer;
    }
}

std::string headkv_pass::why_not_resumed(const headkv_split & split, int32_t n_layer) const {
    for (const auto & ubatch : split.to_staging) {
        if (ubatch.seq_id_unq[0] != seq_id) {
            return format("sequence %d has to wait", ubatch.seq_id_unq[0]);
        }
    }
    const auto others = split.tokens_to_staging();
    if (others.empty() || others != tokens) {
        return "other tokens came";
    }
    return split.n_silent() < (i_layer == n_layer - 1 ? i_token : n_archived()) ? "outputs were asked for that it has passed" : "";
}

//
// llama_kv_cache_ragged_context
//

llama_kv_cache_ragged_context::llama_kv_cache_ragged_context(llama_memory_status status) :
    status(status) {}

llama_kv_cache_ragged_context::llama_kv_cache_ragged_context(llama_kv_cache_ragged * kv) :
    kv(kv), status(LLAMA_MEMORY_STATUS_SUCCESS), full(true) {
    staging_ctxs.push_back(std::make_unique<llama_kv_cache_context>(&kv->staging().twin()));
    if (kv->beside()) {
        beside_ctxs.push_back(kv->beside()->full());
    }
}

llama_kv_cache_ragged_context::llama_kv_cache_ragged_context(
        llama_kv_cache_ragged * kv,
        headkv_split split,
        llama_kv_cache::slot_info_vec_t sinfos,
        std::vector<headkv_beside_context> beside,
        bool layered) :
    kv(kv), status(LLAMA_MEMORY_STATUS_SUCCESS), layered(layered), beside_ctxs(std::move(beside)),
    to_store(std::move(split.to_store)), to_staging(std::move(split.to_staging)) {
    for (size_t i = 0; i < sinfos.size() && !layered; ++i) {
        staging_ctxs.push_back(staging_context(kv->staging().cache(), to_staging[i], sinfos[i]));
    }
    if (layered) {
        for (const auto & ubatch : to_staging) {
            no_output.resize(std::max<size_t>(no_output.size(), ubatch.n_tokens), 0);
        }
        for (const auto & ubatch : to_staging) {
            silent.push_back(ubatch);
            silent.back().output = no_output.data();
        }
    }
}

int32_t llama_kv_cache_ragged_context::layer_step() const {
    return layered ? kv->pass()->i_layer : 0;
}

int64_t llama_kv_cache_ragged_context::token_step() const {
    return layered ? kv->pass()->i_token : 0;
}

int64_t llama_kv_cache_ragged_context::hidden_step() const {
    return layered ? kv->pass()->i_token - kv->pass()->n_archived() : 0;
}

size_t llama_kv_cache_ragged_context::i_staging() const {
    return layered ? kv->pass()->i_ubatch : i_cur - to_store.size();
}

bool llama_kv_cache_ragged_context::next() {
    return is_layered() ? kv->next_step(to_staging) : ++i_cur < to_store.size() + to_staging.size();
}

bool llama_kv_cache_ragged_context::apply() {
    const llama_ubatch & ubatch = get_ubatch();
    kv->take_rings();
    if (!is_store() && !kv->begin_step(ubatch, layered)) {
        return headkv_fail("aborted");
    }
    if (is_layered() && !kv->begin_layer()) {
        return false;
    }
    if (is_layered() && i_staging() == 0 && !kv->begin_layer_beside()) {
        return false;
    }
    if (kv->beside() && !get_beside().apply()) {
        return headkv_fail("the layers that are not compressed have no room for the batch");
    }
    if (!is_store()) {
        kv->note_rings(ubatch, layered);
    }
    if (is_layered()) {
        if (layer_step() > 0) {
            return true; // cells and positions are those of the first layer
        }
    }
    if (!is_store() && !(layered ? kv->pass()->staging_ctxs : staging_ctxs)[i_staging()]->apply()) {
        return false;
    }
    try {
        kv->add_tokens(ubatch, is_store() ? HEADKV_EV_DECODE : layered ? HEADKV_EV_PASS
                                                                       : HEADKV_EV_STAGE);
    } catch (const std::exception & e) { // nothing of upstream's catches it
        return headkv_fail(headkv_reason(e));
    }
    return true;
}

llama_memory_status llama_kv_cache_ragged_context::get_status() const {
    return status;
}

const llama_ubatch & llama_kv_cache_ragged_context::get_ubatch() const {
    if (is_store()) {
        return to_store[i_cur];
    }
    return layered && layer_step() < kv->n_layer() - 1 ? silent[i_staging()] : to_staging[i_staging()];
}

const llama_kv_cache_context * llama_kv_cache_ragged_context::get_staging() const {
    return (layered ? kv->pass()->staging_ctxs : staging_ctxs).at(i_staging()).get();
}

const headkv_beside_context & llama_kv_cache_ragged_context::get_beside() const {
    return is_layered() ? kv->pass()->beside_ctxs.at(i_staging()) : beside_ctxs.at(i_cur);
}

headkv_store_layer * llama_kv_cache_ragged_context::get_layer(int32_t il) const {
    return full ? kv->store_twin().find(il) : kv->store().find(il);
}

ggml_tensor * llama_kv_cache_ragged_context::get_ring(int32_t il) const {
    return kv->staging().ring(il, full);
}

ggml_tensor * llama_kv_cache_ragged_context::get_sums(int32_t il) const {
    return kv->staging().sums(il, full);
}

uint64_t llama_kv_cache_ragged_context::generation() const {
    return kv->store().generation + kv->staging().generation; // both grow
}

//
// graph inputs
//

void llama_kv_cache_ragged_context::set_input_rows(ggml_tensor * dst, const llama_ubatch * ubatch) const {
    std::vector<int32_t> data;
    data.reserve(dst->ne[0]);
    for (const auto & layer : kv->store().layers) {
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            const llama_seq_id s = ubatch->seq_id[i][0];
            const uint32_t i_tail = ubatch->pos[i] - kv->seq(s).tail_begin();
            for (const auto & range : layer.ranges[s]) {
                GGML_ASSERT(range.n_used(i_tail) < range.n_cap);
                data.push_back((int32_t) (range.off + range.n_used(i_tail)));
            }
        }
    }
    ggml_backend_tensor_set(dst, data.data(), 0, data.size() * sizeof(int32_t));
}

void llama_kv_cache_ragged_context::set_input_ranges(ggml_tensor * dst, const llama_ubatch * ubatch) const {
    std::vector<int32_t> data;
    data.reserve(dst->ne[0]);
    for (const auto & layer : kv->store().layers) {
        for (uint32_t i = 0; i < ubatch->n_seqs_unq; ++i) {
            const llama_seq_id s = ubatch->seq_id_unq[i];
            for (const auto & range : layer.ranges[s]) {
                data.push_back((int32_t) range.off);
                data.push_back((int32_t) range.n_used(kv->seq(s).n_in_tail()));
            }
        }
    }
    ggml_backend_tensor_set(dst, data.data(), 0, data.size() * sizeof(int32_t));
}

// what the first row of a range gets on top of its logit
static float first_bias(const headkv_range & range, const headkv_seq & seq) {
    return range.compensates() ? std::log((float) (seq.n_prompt - ((llama_pos) range.n_kept - 1))) : 0.0f;
}

void llama_kv_cache_ragged_context::set_input_bias(ggml_tensor * dst, const llama_ubatch * ubatch) const {
    std::vector<float> data;
    data.reserve(dst->ne[0]);
    for (const auto & layer : kv->store().layers) {
        for (uint32_t i = 0; i < ubatch->n_seqs_unq; ++i) {
            const llama_seq_id s = ubatch->seq_id_unq[i];
            for (const auto & range : layer.ranges[s]) {
                data.push_back(first_bias(range, kv->seq(s)));
            }
        }
    }
    ggml_backend_tensor_set(dst, data.data(), 0, data.size() * sizeof(float));
}

void llama_kv_cache_ragged_context::set_input_pos(ggml_tensor * dst, const llama_ubatch * ubatch) const {
    std::vector<float> data;
    data.reserve(dst->ne[0]);
    for (const auto & layer : kv->store().layers) {
        const size_t first = data.size();
        data.resize(first + layer.k->ne[1], 0.0f);
        for (uint32_t i = 0; i < ubatch->n_seqs_unq; ++i) {
            const headkv_seq & seq = kv->seq(ubatch->seq_id_unq[i]);
            for (const auto & range : layer.ranges[ubatch->seq_id_unq[i]]) {
                float * rows = data.data() + first + range.off;
                for (uint32_t r = 0; r < range.n_used(seq.n_in_tail()); ++r) {
                    // before the last token, near which floats are exact
                    rows[r] = (float) ((r < range.n_kept ? range.pos[r] : seq.tail_begin() + (llama_pos) (r - range.n_kept)) - (seq.n_pos - 1));
                }
            }
        }
    }
    ggml_backend_tensor_set(dst, data.data(), 0, data.size() * sizeof(float));
}

void llama_kv_cache_ragged_context::set_input_mask(ggml_tensor * dst, const headkv_store_layer & layer, size_t i_bucket, const llama_ubatch * ubatch) const {
    const llama_seq_id s = ubatch->seq_id[0][0];
    const auto & bucket = layer.buckets[s][i_bucket];

    const int64_t n_kv = dst->ne[0];
    const int64_t n_tokens = dst->ne[1];

    std::vector<ggml_fp16_t> data(ggml_nelements(dst), ggml_fp32_to_fp16(-INFINITY));
    for (size_t j = 0; j < bucket.heads.size(); ++j) {
        const headkv_range & range = layer.ranges[s][bucket.heads[j]];
        const int64_t n_used = range.n_used(kv->seq(s).n_in_tail());
        for (int64_t t = 0; t < n_tokens; ++t) {
            ggml_fp16_t * row = data.data() + (j * n_tokens + t) * n_kv;
            std::fill(row, row + std::max<int64_t>(0, n_used - (n_tokens - 1 - t)), ggml_fp32_to_fp16(0.0f));
            row[0] = ggml_fp32_to_fp16(n_used > n_tokens - 1 - t ? first_bias(range, kv->seq(s)) : -INFINITY);
        }
    }
    ggml_backend_tensor_set(dst, data.data(), 0, ggml_nbytes(dst));
}

void llama_kv_cache_ragged_context::set_input_cells(ggml_tensor * cells, ggml_tensor * seen, const llama_ubatch * ubatch) const {
    const llama_pos n_pos = ubatch->pos[ubatch->n_tokens - 1] + 1;
    const std::vector<int32_t> of_pos = kv->staging().cells_of(ubatch->seq_id_unq[0], n_pos);
    std::vector<int32_t> data_cells;
    std::vector<int32_t> n_before(n_pos + 1, 0);
    for (llama_pos p = 0; p < n_pos; ++p) {
        if (of_pos[p] >= 0) {
            data_cells.push_back(of_pos[p]);
        }
        n_before[p + 1] = (int32_t) data_cells.size();
    }
    std::vector<int32_t> data_seen;
    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        data_seen.push_back(0);
        data_seen.push_back(n_before.at(ubatch->pos[i] + 1));
    }
    ggml_backend_tensor_set(cells, data_cells.data(), 0, data_cells.size() * sizeof(int32_t));
    ggml_backend_tensor_set(seen, data_seen.data(), 0, data_seen.size() * sizeof(int32_t));
}

// Slot of each token in a ring of the last n_ring tokens of each sequence, -1 = there are as many behind it.
static std::vector<int64_t> ring_slots(const llama_ubatch & ubatch, int64_t n_ring, uint32_t n_seq_max) {
    std::vector<int64_t> res(ubatch.n_tokens, -1);
    std::vector<int64_t> n_seen(n_seq_max, 0);
    for (int64_t i = (int64_t) ubatch.n_tokens - 1; i >= 0; --i) {
        const llama_seq_id s = ubatch.seq_id[i][0];
        if (n_seen[s]++ < n_ring) {
            res[i] = s * n_ring + ubatch.pos[i] % n_ring;
        }
    }
    return res;
}

void llama_kv_cache_ragged_context::set_input_queries(ggml_tensor * slots, const llama_ubatch * ubatch) const {
    const headkv_queries & queries = *kv->queries();
    std::vector<int64_t> data = ring_slots(*ubatch, queries.n_ring(), kv->n_seq_max());
    std::replace(data.begin(), data.end(), (int64_t) -1, queries.n_slots() - 1);
    ggml_backend_tensor_set(slots, data.data(), 0, data.size() * sizeof(data[0]));
}

void llama_kv_cache_ragged_context::set_input_window(ggml_tensor * tokens, ggml_tensor * slots, const llama_ubatch * ubatch) const {
    const int64_t n = tokens->ne[0];
    const std::vector<int64_t> of_token = ring_slots(*ubatch, kv->staging().n_ring(), kv->n_seq_max());

    std::vector<int32_t> data_tokens;
    std::vector<int64_t> data_slots;
    for (int64_t i = (int64_t) ubatch->n_tokens - 1; i >= 0 && (int64_t) data_tokens.size() < n; --i) {
        if (of_token[i] >= 0) {
            data_tokens.push_back((int32_t) i);
            data_slots.push_back(of_token[i]);
        }
    }
    while ((int64_t) data_tokens.size() < n) {
        data_tokens.push_back(0);
        data_slots.push_back(kv->staging().n_slots() - 1);
    }
    ggml_backend_tensor_set(tokens, data_tokens.data(), 0, n * sizeof(int32_t));
    ggml_backend_tensor_set(slots, data_slots.data(), 0, n * sizeof(int64_t));
}
