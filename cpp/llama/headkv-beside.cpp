#include "headkv-beside.h"

#include "headkv-staging.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <typeinfo>

//
// whose layers are whose
//

bool headkv_layer_owners::any_beside() const {
    return std::count(windowed.begin(), windowed.end(), true) + std::count(recurrent.begin(), recurrent.end(), true) > 0;
}

headkv_layer_owners headkv_owners_of(const llama_memory_i & memory, const llama_hparams & hparams) {
    const llama_kv_cache * global = nullptr;
    const llama_kv_cache_iswa * iswa = nullptr;
    const llama_memory_recurrent * recurrent = nullptr;

    const std::type_info & type = typeid(memory);
    if (type == typeid(llama_kv_cache)) {
        global = static_cast<const llama_kv_cache *>(&memory);
    } else if (type == typeid(llama_kv_cache_iswa)) {
        iswa = static_cast<const llama_kv_cache_iswa *>(&memory);
    } else if (type == typeid(llama_memory_hybrid)) {
        const auto & hybrid = static_cast<const llama_memory_hybrid &>(memory);
        global = hybrid.get_mem_attn();
        recurrent = hybrid.get_mem_recr();
    } else if (type == typeid(llama_memory_hybrid_iswa)) {
        const auto & hybrid = static_cast<const llama_memory_hybrid_iswa &>(memory);
        iswa = hybrid.get_mem_attn();
        recurrent = hybrid.get_mem_recr();
    } else if (type == typeid(llama_memory_recurrent)) {
        throw std::runtime_error("all of its layers are recurrent: they keep a state of one size, there is nothing to compress");
    } else {
        throw std::runtime_error("its cache holds something else than K and V of each head for the attention of all tokens");
    }

    const size_t n_layer = hparams.n_layer();
    headkv_layer_owners res = { std::vector<bool>(n_layer), std::vector<bool>(n_layer), std::vector<bool>(n_layer), std::vector<int32_t>(n_layer, -1) };
    for (uint32_t il : (iswa ? iswa->get_base() : global)->get_layer_ids()) {
        if (il < n_layer && hparams.n_head_kv(il) > 0) {
            res.ours[il] = true;
        }
    }
    if (iswa) {
        for (uint32_t il : iswa->get_swa()->get_layer_ids()) {
            if (il < n_layer) {
                res.windowed[il] = true;
            }
        }
    }
    for (size_t il = 0; il < n_layer; ++il) {
        // upstream: those of the last layer of its kind that has cells
        res.shared[il] = hparams.has_kv(il) ? -1 : hparams.n_layer_kv_from_start - (hparams.is_swa(il) ? 2 : 1);
    }
    for (size_t il = 0; recurrent && il < std::min(n_layer, recurrent->r_l.size()); ++il) {
        res.recurrent[il] = recurrent->r_l[il] != nullptr;
    }
    return res;
}

//
// contexts
//

bool headkv_beside_context::apply() const {
    return (!windowed || windowed->apply()) && (!recurrent || recurrent->apply());
}

headkv_beside_context headkv_beside::full() const {
    headkv_beside_context res;
    if (windowed) {
        res.windowed = std::make_unique<llama_kv_cache_context>(windowed.get());
    }
    if (recurrent) {
        res.recurrent = std::make_unique<llama_memory_recurrent_context>(recurrent.get());
    }
    return res;
}

std::vector<headkv_beside_context> headkv_beside::prepare(const std::vector<llama_ubatch> & ubatches) const {
    llama_kv_cache::slot_info_vec_t sinfos;
    if (windowed && !ubatches.empty()) {
        sinfos = windowed->prepare(ubatches);
        if (sinfos.empty()) {
            throw std::runtime_error(format("the ring of the windowed layers has no room for %u tokens beside the window of %u", ubatches[0].n_tokens, n_swa));
        }
    }
    std::vector<headkv_beside_context> res;
    for (size_t i = 0; i < ubatches.size(); ++i) {
        auto & context = res.emplace_back();
        if (windowed) {
            context.windowed = std::make_unique<llama_kv_cache_context>(windowed.get(), llama_kv_cache::slot_info_vec_t{ sinfos[i] }, std::vector<llama_ubatch>{ ubatches[i] });
        }
        if (recurrent) {
            context.recurrent = std::make_unique<llama_memory_recurrent_context>(recurrent.get(), std::vector<llama_ubatch>{ ubatches[i] });
        }
    }
    return res;
}

//
// headkv_beside
//

headkv_beside::headkv_beside(const llama_model & model, const headkv_layer_owners & owners, ggml_type type_k, ggml_type type_v, const llama_cparams & cparams) :
    n_swa(model.hparams.n_swa), swa_type(model.hparams.swa_type) {
    const auto has_any = [](const std::vector<bool> & layers) { return std::find(layers.begin(), layers.end(), true) != layers.end(); };
    const auto filter_of = [](const std::vector<bool> & layers) { return [&layers](int32_t il) { return (size_t) il < layers.size() && layers[il]; }; };
    const auto sharing = [&](int32_t il) { return (size_t) il < owners.shared.size() && owners.shared[il] >= 0 && owners.windowed[owners.shared[il]]; };
    if (has_any(owners.windowed)) {
        // as many cells as upstream gives a sequence of its own
        const uint32_t n_cells = GGML_PAD(std::min(cparams.n_ctx_seq, n_swa + cparams.n_ubatch), 256);
        windowed = std::make_unique<llama_kv_cache>(model, model.hparams, type_k, type_v, /*v_trans =*/false, cparams.offload_kqv, /*unified =*/false, n_cells, cparams.n_seq_max, /*n_pad =*/1, n_swa, swa_type, nullptr, [&](int32_t il) { return filter_of(owners.windowed)(il) || sharing(il); }, [&](int32_t il) { return sharing(il) ? owners.shared[il] : -1; }, nullptr);
    }
    if (has_any(owners.recurrent)) {
        recurrent = std::make_unique<llama_memory_recurrent>(model, GGML_TYPE_F32, GGML_TYPE_F32, cparams.offload_kqv, cparams.n_seq_max, cparams.n_seq_max,
                cparams.n_rs_seq, filter_of(owners.recurrent));
    }
}

bool headkv_beside::fits_behind(llama_seq_id before, llama_seq_id next) const {
    // neither is upstream able to attend to streams that are apart, nor may a state move to another cell
    const bool rings = !windowed || next == before + 1;
    const bool states = !recurrent || (recurrent->cells[before].tail >= 0 && recurrent->cells[next].tail == recurrent->cells[before].tail + 1);
    return rings && states;
}

void headkv_beside::rewind(llama_seq_id seq_id) {
    if (windowed) {
        windowed->seq_rm(seq_id, -1, -1);
    }
    if (recurrent && recurrent->cells[seq_id].tail >= 0) {
        // in the same cell, with the state that upstream gives a sequence without tokens
        auto & cell = recurrent->cells[recurrent->cells[seq_id].tail];
        cell.pos = -1;
        cell.src = -1;
    }
}

bool headkv_beside::remove(llama_seq_id seq_id, llama_pos p0) {
    if (p0 > 0 && windowed && p0 < windowed->seq_pos_max(seq_id) + 1 && p0 < pos_min_windowed(seq_id)) {
        return false;
    }
    if (recurrent && !recurrent->seq_rm(seq_id, p0, -1)) {
        return false;
    }
    return !windowed || windowed->seq_rm(seq_id, p0, -1);
}

void headkv_beside::clear() {
    if (windowed) {
        windowed->clear(false);
    }
    if (recurrent) {
        recurrent->clear(false);
    }
}

llama_pos headkv_beside::pos_min_windowed(llama_seq_id seq_id) const {
    const llama_pos first = windowed->seq_pos_min(seq_id);
    return first > 0 ? first + (llama_pos) n_swa - 1 : 0; // the window of a token ends with itself
}

llama_pos headkv_beside::pos_min(llama_seq_id seq_id) const {
    const llama_pos of_ring = windowed ? pos_min_windowed(seq_id) : 0;
    const llama_pos of_state = recurrent ? recurrent->seq_pos_min(seq_id) : 0;
    return std::max({ of_ring, of_state, 0 });
}

//
// state
//

namespace {

struct memory_writer : llama_io_write_i {
    std::vector<uint8_t> data;

    void write(const void * src, size_t size) override { data.insert(data.end(), (const uint8_t *) src, (const uint8_t *) src + size); }
    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        data.resize(data.size() + size);
        ggml_backend_tensor_get(tensor, data.data() + data.size() - size, offset, size);
    }
    size_t n_bytes() override { return data.size(); }
};

struct memory_reader : llama_io_read_i {
    const std::vector<uint8_t> & data;
    size_t n_read = 0;

    memory_reader(const std::vector<uint8_t> & data) :
        data(data) {}

    const uint8_t * take(size_t size) {
        if (size > data.size() - n_read) {
            throw std::runtime_error("it is damaged (layers that are not compressed)");
        }
        n_read += size;
        return data.data() + n_read - size;
    }
    void read(void * dst, size_t size) override { memcpy(dst, take(size), size); }
    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override { ggml_backend_tensor_set(tensor, take(size), offset, size); }
    size_t n_bytes() override { return n_read; }
};

} // namespace

// Upstream writes of a sequence: u32 streams of the cache, then of each stream u32 cells and, if there are any, what they hold. Only
// one stream has any: it is kept alone, so that a context of more or fewer sequences can take it.

static std::vector<uint8_t> one_stream(std::vector<uint8_t> all, uint32_t n_stream, uint32_t i_stream) {
    all.resize(all.size() - (n_stream - 1 - i_stream) * sizeof(uint32_t));
    all.erase(all.begin(), all.begin() + (1 + i_stream) * sizeof(uint32_t));
    return all;
}

static std::vector<uint8_t> all_streams(const uint8_t * data, size_t n, uint32_t n_stream) {
    std::vector<uint8_t> res((const uint8_t *) &n_stream, (const uint8_t *) (&n_stream + 1));
    res.insert(res.end(), data, data + n);
    res.resize(res.size() + (n_stream - 1) * sizeof(uint32_t), 0);
    return res;
}

std::vector<uint8_t> headkv_beside::save(llama_seq_id seq_id) const {
    memory_writer io;
    if (windowed) {
        memory_writer ring;
        windowed->state_write(ring, seq_id, 0);
        const auto data = one_stream(std::move(ring.data), windowed->get_n_stream(), windowed->get_stream(seq_id));
        const uint64_t n = data.size();
        io.write(&n, sizeof(n));
        io.write(data.data(), n);
    }
    if (recurrent) {
        recurrent->state_write(io, seq_id, 0);
    }
    return std::move(io.data);
}

void headkv_beside::restore(llama_seq_id seq_id, const std::vector<uint8_t> & state) {
    memory_reader io(state);
    if (windowed) {
        uint64_t n;
        io.read(&n, sizeof(n));
        const auto all = all_streams(io.take(n), n, windowed->get_n_stream());
        memory_reader ring(all);
        windowed->state_read(ring, seq_id, 0);
    }
    if (recurrent) {
        recurrent->state_read(io, seq_id, 0);
    }
    if (io.n_read != state.size()) {
        throw std::runtime_error("it is damaged (layers that are not compressed)");
    }
}

//
// rings
//

bool headkv_beside::is_in_order(llama_seq_id seq_id) const {
    const auto & cells = windowed->get_cells(seq_id);
    for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
        if (!cells.is_empty(i) && (uint32_t) cells.pos_get(i) % cells.size() != i) {
            return false;
        }
    }
    return true;
}

llama_pos headkv_beside::occupy(llama_seq_id seq_id, llama_pos first, llama_pos end) {
    const llama_pos n = (llama_pos) n_ring();
    first = std::max(first, end - n);
    for (llama_pos pos = first; pos < end; ++pos) {
        headkv_occupy_cell(*windowed, (uint32_t) (pos % n), seq_id, pos);
    }
    return first;
}

size_t headkv_beside::n_bytes_row(int32_t il, bool v) const {
    return headkv_rows_of(*windowed, il, v)->nb[1];
}

int64_t headkv_beside::n_row(int32_t il, bool v) const {
    return headkv_rows_of(*windowed, il, v)->ne[0];
}

void headkv_beside::each_piece(int32_t il, bool v, llama_seq_id seq_id, llama_pos first, llama_pos end, const piece_fn & tell) const {
    ggml_tensor * t = headkv_rows_of(*windowed, il, v);
    const llama_pos n = (llama_pos) n_ring();
    for (llama_pos pos = first; pos < end;) {
        const llama_pos n_rows = std::min(end - pos, n - pos % n);
        tell(t, windowed->get_stream(seq_id) * t->nb[2] + pos % n * t->nb[1], (pos - first) * t->nb[1], n_rows * t->nb[1]);
        pos += n_rows;
    }
}

bool headkv_beside::read_rows(int32_t il, bool v, llama_seq_id seq_id, llama_pos first, llama_pos end, uint8_t * dst) const {
    const auto & cells = windowed->get_cells(seq_id);
    for (llama_pos pos = first; pos < end; ++pos) {
        const uint32_t i = (uint32_t) pos % cells.size();
        if (cells.is_empty(i) || cells.pos_get(i) != pos) {
            return false;
        }
    }
    each_piece(il, v, seq_id, first, end, [dst](ggml_tensor * t, size_t offset, size_t i_byte, size_t n_bytes) { ggml_backend_tensor_get(t, dst + i_byte, offset, n_bytes); });
    return true;
}

void headkv_beside::write_rows(int32_t il, bool v, llama_seq_id seq_id, llama_pos first, llama_pos end, const uint8_t * src) {
    each_piece(il, v, seq_id, first, end, [src](ggml_tensor * t, size_t offset, size_t i_byte, size_t n_bytes) { ggml_backend_tensor_set(t, src + i_byte, offset, n_bytes); });
}

//
// memory
//

int32_t headkv_beside::layer_of_state(const ggml_tensor * t) const {
    for (size_t il = 0; recurrent && il < recurrent->r_l.size(); ++il) {
        if (t == recurrent->r_l[il] || t == recurrent->s_l[il] || t == recurrent->p_l[il]) {
            return (int32_t) il;
        }
    }
    return -1;
}

void headkv_beside::add_to(std::map<ggml_backend_buffer_type_t, size_t> & breakdown) const {
    for (const llama_memory_i * memory : { (const llama_memory_i *) windowed.get(), (const llama_memory_i *) recurrent.get() }) {
        if (!memory) {
            continue;
        }
        for (const auto & [buft, n] : memory->memory_breakdown()) {
            breakdown[buft] += n;
        }
    }
}

size_t headkv_beside::n_bytes() const {
    std::map<ggml_backend_buffer_type_t, size_t> breakdown;
    add_to(breakdown);
    size_t res = 0;
    for (const auto & it : breakdown) {
        res += it.second;
    }
    return res;
}
