#include "llama-kv-cache-ragged.h"

#include "headkv-budget.h"
#include "headkv-op.h"
#include "headkv-stages.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

//
// construction
//

static ggml_backend_buffer_type_t layer_buft(const llama_model & model, int32_t il, bool offload) {
    return offload ? ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type();
}

static bool is_cpu(ggml_backend_buffer_type_t buft) {
    const ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
    return ggml_backend_buft_is_host(buft) && (!dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU);
}

static bool device_supports(ggml_backend_buffer_type_t buft, const ggml_tensor * op) {
    const ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
    return dev && ggml_backend_dev_supports_op(dev, op);
}

// whether the device of a layer runs the fused op: a CPU calls its function, any other has to know the op
static bool can_attend_fused(const headkv_store_layer & layer) {
    if (!layer.attend->kernel) {
        return false;
    }
    if (is_cpu(layer.buft)) {
        return true;
    }
    ggml_init_params params = { 16*ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true };
    ggml_context_ptr ctx(ggml_init(params));
    ggml_tensor * q = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, layer.n_embd_head, layer.n_head, 1);
    ggml_tensor * k = ggml_new_tensor_2d(ctx.get(), layer.type_k, layer.n_embd_head, 256);
    ggml_tensor * v = ggml_new_tensor_2d(ctx.get(), layer.type_v, layer.n_embd_head, 256);
    ggml_tensor * r = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_I32, 2, layer.n_head_kv, 1);
    ggml_tensor * op = headkv_build_attend_fused(ctx.get(), layer.attend.get(), q, k, v, r)->view_src;
    if (!device_supports(layer.buft, op)) {
        return false;
    }
    // a device that says the same of a function that it cannot know says it of everything, as RPC does
    headkv_op unknown;
    unknown.tag = 0;
    headkv_op_set(op, unknown);
    return !device_supports(layer.buft, op);
}

// a layer-major batch: which step comes next
struct llama_kv_cache_ragged::reading_t {
    llama_seq_id             seq_id;
    headkv_config_ptr        cfg; // of its compression
    std::vector<llama_token> tokens;

    std::vector<std::unique_ptr<llama_kv_cache_context>> stage_ctxs; // of its ubatches

    bool    begun    = false;
    bool    paused   = false;
    int32_t i_layer  = 0;
    size_t  i_ubatch = 0;
    int64_t i_token  = 0; // tokens before the ubatch
};

// Rows that a head gets for generated tokens at a time: when they are full, all cells are copied.
static uint32_t n_tail_of(const headkv_config & cfg, int64_t n_prompt) {
    return std::max<uint32_t>(cfg.n_tail, (uint32_t) std::min<int64_t>(cfg.kv_size, n_prompt)/16);
}

llama_kv_cache_ragged::llama_kv_cache_ragged(
        const llama_model & model,
                ggml_type   type_k,
                ggml_type   type_v,
      const llama_cparams & cparams,
        headkv_config_ptr   cfg) :
    model(model), hparams(model.hparams), cfg(std::move(cfg)), hparams_plan(model.hparams),
    offload(cparams.offload_kqv), n_ctx(cparams.n_ctx), n_ctx_seq(cparams.n_ctx_seq), cparams(cparams), type_k(type_k), type_v(type_v),
    with_sums(this->cfg->policy->needs_sums), n_ring((llama_pos) this->cfg->window) {
    const auto & c = *this->cfg;

    hparams_plan.no_alloc = true;

    seqs.resize(cparams.n_seq_max);

    budgets = headkv_budget(c, heads());

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (hparams.n_head_kv(il) == 0) {
            continue;
        }
        ils.push_back(il);
        for (headkv_store * s : { &store, &store_plan }) {
            headkv_store_layer layer;
            layer.il          = il;
            layer.n_head      = hparams.n_head(il);
            layer.n_head_kv   = hparams.n_head_kv(il);
            layer.n_embd_head = hparams.n_embd_head_k(il);
            layer.type_k      = type_k;
            layer.type_v      = type_v;
            layer.buft        = layer_buft(model, il, offload);
            layer.attend      = std::make_unique<headkv_attend_state>(layer.n_embd_head, layer.n_head, layer.n_head_kv, (int) seqs.size(), type_k, type_v);

            const bool can_fuse = can_attend_fused(layer);
            if (c.attend == HEADKV_ATTEND_FUSED && !can_fuse) {
                throw std::invalid_argument(format("attend 'fused' is not possible in layer %u with heads of %d, K of type %s and V of type %s on %s: "
                            "the CPU has it for types with a dot product, CUDA for heads of 64, 80, 96, 128 and 256 and K and V both f16, bf16 or q8_0; use 'composed'",
                            il, layer.n_embd_head, ggml_type_name(type_k), ggml_type_name(type_v), ggml_backend_buft_name(layer.buft)));
            }
            layer.fused = can_fuse && c.attend != HEADKV_ATTEND_COMPOSED;
            s->layers.push_back(std::move(layer));
        }
    }

    stage_plan = make_stage(n_ctx, true, false);
    make_rings(rings_plan, ring_of_layer_plan, true, false);
    make_sums(sums_plan, sums_of_layer_plan, true, n_ctx);

    store_plan.no_alloc = true;
    for (auto & layer : store_plan.layers) {
        std::vector<uint32_t> n_kept;
        for (int32_t ih = 0; ih < layer.n_head_kv; ++ih) {
            // the fused op's scratch grows with the rows, the composed graph with the longest range
            const auto & b = budgets[layer.il];
            const bool     moves  = c.policy->refine || c.surplus != HEADKV_SURPLUS_LOST;
            const uint32_t n_most = moves ? std::accumulate(b.begin(), b.end(), 0u) : b[ih];
            const uint32_t n_sure = (uint32_t) headkv_n_protected(c, n_ctx_seq) + c.recent;
            n_kept.push_back(layer.fused || c.policy->compensates ? n_ctx_seq : std::min(n_ctx_seq, std::max(n_most, n_sure)));
        }
        for (size_t s = 0; s < seqs.size(); ++s) {
            store_plan.relayout(layer, { { (int32_t) s, { n_kept, n_tail_of(c, n_ctx_seq), {} } } }, c.n_buckets);
        }
    }

    uint64_t n_cells = 0;
    uint64_t n_heads = 0;
    for (int32_t il : ils) {
        for (uint32_t b : budgets[il]) {
            n_cells += b;
            n_heads += 1;
        }
    }
    const int n_fused = (int) std::count_if(store.layers.begin(), store.layers.end(), [](const headkv_store_layer & l) { return l.fused; });
    LLAMA_LOG_INFO("%s: policy %s, kv_size %u: %.1f cells per KV head of %llu, window %u, power %d, recent %u, beta %g, attend fused in %d of %d layers, else composed\n", __func__,
            c.policy->name, c.kv_size, (double) n_cells/n_heads, (unsigned long long) n_heads,
            c.window, 1 << c.n_square, c.recent, c.beta, n_fused, (int) store.layers.size());
}

llama_kv_cache_ragged::~llama_kv_cache_ragged() = default;

headkv_heads llama_kv_cache_ragged::heads() const {
    headkv_heads res;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        res.n_head_kv.push_back(hparams.n_head_kv(il));
        res.n_head   .push_back(hparams.n_head_kv(il) > 0 ? hparams.n_head(il) : 0);
    }
    return res;
}

std::unique_ptr<llama_kv_cache> llama_kv_cache_ragged::make_stage(uint32_t n_cells, bool plan, bool one_layer) const {
    // layers after the last one belong to draft heads (MTP)
    const int32_t n_layer = (int32_t) hparams.n_layer();

    // in a staging for one layer, each layer maps to the first one of its kind on its device
    const auto physical = [this](int32_t il) {
        for (int32_t il0 : ils) {
            if (layer_buft(model, il0, offload) == layer_buft(model, il, offload) &&
                    hparams.n_embd_k_gqa(il0) == hparams.n_embd_k_gqa(il) && hparams.n_embd_v_gqa(il0) == hparams.n_embd_v_gqa(il)) {
                return il0;
            }
        }
        return il;
    };

    // upstream allocates what the filter lets pass and then asks which layers reuse others, filter included
    bool allocating = true;
    layer_filter_cb filter = nullptr;
    layer_reuse_cb  reuse  = nullptr;
    if (one_layer) {
        filter = [&](int32_t il) { return il < n_layer && (!allocating || physical(il) == il); };
        reuse  = [&](int32_t il) { allocating = false; return il < n_layer && physical(il) != il ? physical(il) : -1; };
    } else if (hparams.n_layer_nextn > 0) {
        filter = [n_layer](int32_t il) { return il < n_layer; };
    }
    return std::make_unique<llama_kv_cache>(model, plan ? hparams_plan : hparams, type_k, type_v, /*v_trans =*/ false, offload, /*unified =*/ true,
            n_cells, (uint32_t) seqs.size(), /*n_pad =*/ 1, /*n_swa =*/ 0, LLAMA_SWA_TYPE_NONE, nullptr, filter, reuse, nullptr);
}

int64_t llama_kv_cache_ragged::n_slots() const {
    return (int64_t) n_ring*seqs.size() + 1;
}

void llama_kv_cache_ragged::make_rings(std::vector<ring_t> & rings, std::vector<ggml_tensor *> & of_layer, bool plan, bool one_layer) const {
    make_tensors(rings, of_layer, plan, one_layer, "headkv_window", [this](const headkv_store_layer & l) {
        return std::array<int64_t, 3>{ (int64_t) l.n_embd_head*l.n_head, n_slots(), 1 };
    });
}

void llama_kv_cache_ragged::make_sums(std::vector<ring_t> & bufs, std::vector<ggml_tensor *> & of_layer, bool plan, uint32_t n_cells) const {
    if (with_sums) {
        make_tensors(bufs, of_layer, plan, false, "headkv_sums", [n_cells](const headkv_store_layer & l) {
            return std::array<int64_t, 3>{ 1, n_cells, l.n_head_kv };
        });
    }
}

void llama_kv_cache_ragged::make_tensors(std::vector<ring_t> & rings, std::vector<ggml_tensor *> & of_layer, bool plan, bool one_layer, const char * name,
        const std::function<std::array<int64_t, 3>(const headkv_store_layer &)> & shape) const {
    std::map<ggml_backend_buffer_type_t, ring_t> by_buft;
    of_layer.assign(hparams.n_layer(), nullptr);
    for (const auto & layer : store.layers) {
        ring_t & ring = by_buft[layer.buft];
        if (!ring.ctx) {
            ggml_init_params params = { /*.mem_size =*/ store.layers.size()*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };
            ring.ctx.reset(ggml_init(params));
        }
        const auto ne = shape(layer);
        for (ggml_tensor * t = ggml_get_first_tensor(ring.ctx.get()); one_layer && t; t = ggml_get_next_tensor(ring.ctx.get(), t)) {
            if (std::equal(ne.begin(), ne.end(), t->ne)) {
                of_layer[layer.il] = t; // what it holds is not needed when the next layer begins
            }
        }
        if (of_layer[layer.il]) {
            continue;
        }
        of_layer[layer.il] = ggml_new_tensor_3d(ring.ctx.get(), GGML_TYPE_F32, ne[0], ne[1], ne[2]);
        ggml_format_name(of_layer[layer.il], "%s_l%d", name, layer.il);
    }
    rings.clear();
    for (auto & [buft, ring] : by_buft) {
        if (plan || hparams.no_alloc) {
            ring.buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
            for (ggml_tensor * t = ggml_get_first_tensor(ring.ctx.get()); t; t = ggml_get_next_tensor(ring.ctx.get(), t)) {
                t->buffer = ring.buf.get();
            }
        } else {
            ring.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ring.ctx.get(), buft));
            if (!ring.buf) {
                throw std::runtime_error(format("no memory for %s", name));
            }
            ggml_backend_buffer_clear(ring.buf.get(), 0);
        }
        rings.push_back(std::move(ring));
    }
}

//
// numbers
//

int32_t llama_kv_cache_ragged::n_layer() const {
    return (int32_t) hparams.n_layer();
}

int32_t llama_kv_cache_ragged::n_head_kv_max() const {
    size_t res = 0;
    for (const auto & b : budgets) {
        res = std::max(res, b.size());
    }
    return (int32_t) res;
}

int32_t llama_kv_cache_ragged::n_head_max() const {
    int32_t res = 0;
    for (const auto & layer : store.layers) {
        res = std::max(res, layer.n_head);
    }
    return res;
}

bool llama_kv_cache_ragged::has_fused() const {
    return std::any_of(store.layers.begin(), store.layers.end(), [](const headkv_store_layer & l) { return l.fused; });
}

size_t llama_kv_cache_ragged::bytes_cell() const {
    size_t res = 0;
    for (const auto & l : store.layers) {
        res += (ggml_row_size(type_k, l.n_embd_head) + ggml_row_size(type_v, l.n_embd_head))*l.n_head_kv;
    }
    return res;
}

static size_t sum_bytes(const std::map<ggml_backend_buffer_type_t, size_t> & breakdown) {
    size_t res = 0;
    for (const auto & it : breakdown) {
        res += it.second;
    }
    return res;
}

size_t llama_kv_cache_ragged::bytes_staging() const {
    size_t res = stage ? sum_bytes(stage->memory_breakdown()) : 0;
    for (const auto * bufs : { &rings, &sums }) {
        for (const auto & it : *bufs) {
            res += ggml_backend_buffer_get_size(it.buf.get());
        }
    }
    return res + (hidden_buf.buf ? ggml_backend_buffer_get_size(hidden_buf.buf.get()) : 0);
}

void llama_kv_cache_ragged::note_peak(size_t n_scratch) {
    n_bytes_peak = std::max(n_bytes_peak, bytes_staging() + store.n_bytes() + n_scratch);
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_ragged::memory_breakdown() const {
    if (hparams.no_alloc) {
        return stage_plan->memory_breakdown(); // the peak while a prompt of n_ctx tokens is read
    }
    std::map<ggml_backend_buffer_type_t, size_t> res;
    if (stage) {
        res = stage->memory_breakdown();
    }
    for (const auto * bufs : { &rings, &sums }) {
        for (const auto & it : *bufs) {
            res[ggml_backend_buffer_get_type(it.buf.get())] += ggml_backend_buffer_get_size(it.buf.get());
        }
    }
    for (const auto & layer : store.layers) {
        if (layer.buf) {
            res[layer.buft] += ggml_backend_buffer_get_size(layer.buf.get());
        }
    }
    return res;
}

ggml_tensor * llama_kv_cache_ragged::get_sums(int32_t il, bool plan) const {
    const auto & of_layer = plan ? sums_of_layer_plan : sums_of_layer;
    return of_layer.empty() ? nullptr : of_layer[il];
}

ggml_tensor * llama_kv_cache_ragged::get_ring(int32_t il) const {
    return ring_of_layer.empty() ? nullptr : ring_of_layer[il];
}

void llama_kv_cache_ragged::refuse(const std::string & why) const {
    const std::string what = format("KV compression is not possible for architecture %s: %s", model.arch_name().c_str(), why.c_str());
    headkv_set_error(what);
    throw std::runtime_error(what);
}

std::string llama_kv_cache_ragged::why_no_values(const headkv_config & c) const {
    for (const auto & layer : store.layers) {
        if (c.policy->needs_values && !layer.wo) {
            return format("policy '%s' needs the output matrix of layer %d, which is not applied to the attention as it is: use policy 'snapkv'",
                    c.policy->name, layer.il);
        }
    }
    return "";
}

void llama_kv_cache_ragged::note_graph(const std::vector<int32_t> & built) {
    std::vector<int32_t> sorted(built);
    std::sort(sorted.begin(), sorted.end());
    graph_complete = sorted == ils;
}

static const char * const NO_MEMORY = "not enough memory";

static const char * reason(const std::exception & e) {
    return dynamic_cast<const std::bad_alloc *>(&e) ? NO_MEMORY : e.what();
}

bool llama_kv_cache_ragged::fail(const std::string & what) const {
    LLAMA_LOG_ERROR("headkv: %s\n", what.c_str());
    error_msg = what;
    headkv_set_error(what); // failures inside of llama_decode() have no other way out
    return false;
}

//
// sequences
//

bool llama_kv_cache_ragged::get_can_shift() const {
    return false; // a cell has no single successor to shift
}

bool llama_kv_cache_ragged::is_staged(llama_seq_id seq_id) const {
    const seq_t & seq = seqs[seq_id];
    return seq.state == STAGED || seq.state == LAYERED;
}

bool llama_kv_cache_ragged::is_staging() const {
    return n_staged() > 0;
}

uint32_t llama_kv_cache_ragged::n_staged() const {
    uint32_t res = 0;
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        res += is_staged(s) ? seqs[s].n_pos : 0;
    }
    return res;
}

void llama_kv_cache_ragged::clear(bool data) {
    GGML_UNUSED(data); // memory is cleared when it is allocated
    abort_compression();
    reading.reset();
    for (auto & seq : seqs) {
        seq = seq_t();
    }
    if (stage) {
        stage->clear(false);
    }
    broken.clear();
    release_idle_stage();
    release_idle_store();
}

bool llama_kv_cache_ragged::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id < 0) {
        bool res = true;
        for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
            res = seq_rm(s, p0, p1) && res;
        }
        return res;
    }
    if ((size_t) seq_id >= seqs.size()) {
        return false;
    }
    seq_t & seq = seqs[seq_id];

    if (p0 >= 0 && is_reading(seq_id) && reading->paused) {
        return true; // it counts as empty; only the removal of everything gives the prompt up
    }
    p0 = std::max<llama_pos>(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    if (p0 >= std::min(p1, seq.n_pos) && !is_reading(seq_id)) {
        release_idle_stage(); // a prompt that failed with its first ubatch has left it
        return true;
    }
    if (p1 < seq.n_pos) {
        return false; // a hole
    }
    if (is_reading(seq_id) || seq.state == LAYERED) {
        // upstream cleans up after a failed or aborted ubatch: no part of the prompt is complete
        reading.reset();
        abort_compression();
        stage->clear(false);
        seq = seq_t();
        release_idle_stage();
        release_idle_store();
        return p0 == 0;
    }
    if (seq.state == STORED && p0 > 0) {
        if (p0 < seq.n_prompt - seq.n_whole) {
            return false; // the heads have lost most of these positions
        }
        if (p0 < seq.n_prompt) {
            truncate_prompt(seq_id, p0);
        }
        seq.n_pos = p0;
        return true;
    }
    if (is_staged(seq_id)) {
        stage->seq_rm(seq_id, p0, p1);
    }
    if (p0 == 0) {
        seq = seq_t();
        release_idle_stage();
        release_idle_store();
        drop_seq(seq_id);
        return true;
    }
    // the queries that these overwrote in the ring are gone: headkv_end_prompt() will say so if it needs them
    for (llama_pos & pos : seq.window) {
        pos = pos >= p0 ? -1 : pos;
    }
    seq.has_sums = false; // they have the attention of the removed tokens
    seq.n_pos    = p0;
    return true;
}

void llama_kv_cache_ragged::truncate_prompt(llama_seq_id seq_id, llama_pos p0) {
    seq_t & seq = seqs[seq_id];
    const llama_pos n_gone = seq.n_prompt - p0;

    // the last cells of every head
    for (auto & layer : store.layers) {
        for (auto & range : layer.ranges[seq_id]) {
            range.n_kept -= n_gone;
            range.pos.resize(range.n_kept);
        }
    }
    seq.n_prompt = p0;
    seq.n_whole -= n_gone;
    seq.n_tail  += n_gone;
}

void llama_kv_cache_ragged::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    if (seq_id_src != seq_id_dst) {
        broken = format("sequence %d was copied to %d, which the ragged cache cannot do", seq_id_src, seq_id_dst);
        fail(broken);
    }
}

void llama_kv_cache_ragged::seq_keep(llama_seq_id seq_id) {
    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if (s != seq_id) {
            seq_rm(s, -1, -1);
        }
    }
}

void llama_kv_cache_ragged::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    if (shift != 0) {
        broken = format("the positions of sequence %d were shifted, which the ragged cache cannot do", seq_id);
        fail(broken);
    }
}

void llama_kv_cache_ragged::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    if (d != 1) {
        broken = format("the positions of sequence %d were divided, which the ragged cache cannot do", seq_id);
        fail(broken);
    }
}

llama_pos llama_kv_cache_ragged::seq_pos_min(llama_seq_id seq_id) const {
    if (seq_id < 0 || (size_t) seq_id >= seqs.size()) {
        return -1; // nothing of upstream's catches an exception here
    }
    const seq_t & seq = seqs[seq_id];
    if (seq.n_pos == 0 || is_reading(seq_id)) {
        return -1;
    }
    // below the recent cells nothing can be removed or continued
    return seq.state == STORED ? std::min(seq.n_prompt - seq.n_whole, seq.n_pos - 1) : 0;
}

llama_pos llama_kv_cache_ragged::seq_pos_max(llama_seq_id seq_id) const {
    const bool is_known = seq_id >= 0 && (size_t) seq_id < seqs.size();
    return !is_known || is_reading(seq_id) ? -1 : seqs[seq_id].n_pos - 1; // logical, whatever number of cells is left
}

//
// batches
//

// the authors' test: a prompt that fits into the average budget is kept by every head
static bool keeps_all(const headkv_config & cfg, int64_t n_prompt) {
    return cfg.policy->keeps_all || (int64_t) cfg.kv_size - cfg.recent > std::max<int64_t>(0, n_prompt - cfg.recent);
}

std::string llama_kv_cache_ragged::why_not_continued(llama_seq_id seq_id) const {
    const seq_t & seq = seqs[seq_id];
    if (seq.state != STORED) {
        return format("sequence %d is not compressed", seq_id);
    }
    if (seq.adapters != adapters) {
        return "it was computed with other adapters (LoRA with its scale, control vector) than those that are set";
    }
    if (seq.kv_size != cfg->kv_size && !(seq.n_whole == seq.n_prompt && keeps_all(*cfg, seq.n_prompt))) {
        return format("it was compressed with kv_size %u, that of now is %u", seq.kv_size, cfg->kv_size);
    }
    if (seq.spans != headkv_protected(*cfg, seq.n_prompt - seq.n_whole)) {
        return "it was compressed with other protected cells than those of now";
    }
    return "";
}

void llama_kv_cache_ragged::configure(headkv_config_ptr other) {
    const auto & a = *cfg;
    const auto & b = *other;
    if (b.window > (uint32_t) n_ring) {
        throw std::invalid_argument(format("window is %u: the context has room for the queries of the last %d tokens, create another one",
                    b.window, n_ring));
    }
    if (b.n_tail != a.n_tail || b.attend != a.attend || b.n_buckets != a.n_buckets ||
            b.prefill != a.prefill || b.hidden_f16 != a.hidden_f16) {
        throw std::invalid_argument("n_tail, attend, n_buckets, prefill and hidden_f16 cannot change: create another context");
    }
    headkv_config_check_ctx(b, n_ctx_seq);
    if (b.policy->needs_sums && !with_sums) {
        throw std::invalid_argument(format("policy '%s' looks at all tokens while they are read: create the context with it", b.policy->name));
    }
    const std::string why_not = why_no_values(b);
    if (!why_not.empty()) {
        throw std::invalid_argument(why_not);
    }
    budgets = headkv_budget(b, heads());
    cfg     = std::move(other);
}

void llama_kv_cache_ragged::reserve(llama_seq_id seq_id, uint32_t n_tokens, bool whole) {
    reserved_seq = seq_id;
    want_reserve = n_announced = std::min(n_tokens, n_ctx_seq);
    want_whole   = whole && seqs[seq_id].state == EMPTY;
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
        append(data->token,       part.data->token);
        append(data->embd,        part.data->embd);
        append(data->pos,         part.data->pos); // one position per token: others are refused
        append(data->n_seq_id,    part.data->n_seq_id);
        append(data->output,      part.data->output);
        append(data->batch_idxs,  part.data->batch_idxs);
        append(data->seq_id_data, part.data->seq_id_data);
        data->seq_idx[part.seq_id_unq[0]] = (int32_t) data->seq_id_unq.size();
        append(data->seq_id_unq,  part.data->seq_id_unq);
    }
    for (auto & id : data->seq_id_data) {
        data->seq_id.push_back(&id);
    }
    llama_ubatch res = parts[0];
    res.n_seqs     = res.n_seqs_unq = (uint32_t) parts.size();
    res.n_tokens   = res.n_seqs*res.n_seq_tokens;
    res.token      = res.token ? data->token.data() : nullptr;
    res.embd       = res.embd  ? data->embd.data()  : nullptr;
    res.pos        = data->pos.data();
    res.n_seq_id   = data->n_seq_id.data();
    res.seq_id     = data->seq_id.data();
    res.seq_id_unq = data->seq_id_unq.data();
    res.seq_idx    = data->seq_idx.data();
    res.output     = data->output.data();
    res.data       = std::move(data);
    return res;
}

// The fused op attends for all sequences of a ubatch at once, the composed path for one. Sequences with as many tokens
// share a ubatch; a sequence keeps the order of its own ubatches.
std::vector<llama_ubatch> llama_kv_cache_ragged::merge_store(const std::vector<llama_ubatch> & ubatches) const {
    const bool one_by_one = std::any_of(store.layers.begin(), store.layers.end(), [](const headkv_store_layer & l) { return !l.fused; });

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
            parts.push_back(ubatch);
            if (one_by_one || ubatch.n_tokens*(parts.size() + 1) > lctx->n_ubatch()) {
                res.push_back(concat_ubatches(parts));
                parts.clear();
            }
        }
        if (!parts.empty()) {
            res.push_back(concat_ubatches(parts));
        }
    }
    return res;
}

llama_memory_context_ptr llama_kv_cache_ragged::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);
    try {
        return prepare(balloc, n_ubatch);
    } catch (const std::exception & e) { // nothing of upstream's catches it
        fail(reason(e));
        return std::make_unique<llama_kv_cache_ragged_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
}

llama_memory_context_ptr llama_kv_cache_ragged::prepare(llama_batch_allocr & balloc, uint32_t n_ubatch) {
    const auto failed = []() {
        return std::make_unique<llama_kv_cache_ragged_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    };

    if (!broken.empty()) {
        fail(broken);
        return failed();
    }
    if (!cparams.causal_attn || cparams.embeddings) {
        fail(cparams.embeddings ? "embeddings were asked for, which a compressed context does not give: create another one, without compression"
                                : "causal attention was switched off: prompts are read with it, switch it on or create another context, without compression");
        return failed();
    }

    // ubatches of one sequence each
    std::vector<llama_ubatch> to_store;
    std::vector<llama_ubatch> to_stage;
    std::map<llama_seq_id, uint32_t> n_new;
    balloc.split_reset();
    while (true) {
        auto ubatch = balloc.split_seq(n_ubatch);
        if (ubatch.n_tokens == 0) {
            break;
        }
        if (ubatch.n_seqs_unq != 1) {
            fail("a token belongs to more than one sequence, which the ragged cache cannot do");
            return failed();
        }
        const llama_seq_id s = ubatch.seq_id_unq[0];
        n_new[s] += ubatch.n_tokens;
        (seqs[s].state == STORED || (seqs[s].state == LAYERED && !is_reading(s)) ? to_store : to_stage).push_back(std::move(ubatch)); // NOLINT
    }
    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return failed();
    }
    if (reading && !reading->begun) {
        reading.reset(); // what came before it in its batch failed
    }
    const bool resumed = reading && !to_stage.empty();
    if (resumed) {
        const std::string why_not = why_not_resumed(to_stage);
        if (!why_not.empty()) {
            fail(format("sequence %d is being read layer by layer and %s: give its whole prompt again, or remove it first",
                        reading->seq_id, why_not.c_str()));
            return failed();
        }
    }

    bool is_ready   = true;
    bool compresses = false; // what is staged leaves the staging before the batch

    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if (seqs[s].state == LAYERED && !is_reading(s) && (n_new.count(s) || !to_stage.empty())) {
            seqs[s].compress_to = s; // its last layer, before anything else
            compresses = true;
            is_ready   = false;
        }
    }
    for (const auto & [s, n] : n_new) {
        seq_t & seq = seqs[s];
        if (resumed && is_reading(s)) {
            continue;
        }
        if ((uint64_t) seq.n_pos + n > n_ctx_seq) {
            fail(format("the context is full: %d tokens and %u new ones do not fit into n_ctx = %u", seq.n_pos, n, n_ctx_seq));
            return failed();
        }
        if (seq.state == STORED || seq.state == LAYERED) {
            const uint32_t n_have = seq.state == STORED ? seq.n_tail : n_tail_running();
            const uint32_t n_tail = n + (seq.state == STORED ? seq.n_pos - seq.n_prompt : 0);
            if (n_tail > n_have) {
                // grown in the update that follows a failed preparation
                seq.n_tail_next = std::max(n_tail, n_have + std::max(n_have/4, n_tail_of(*cfg, seq.state == STORED ? seq.n_prompt : seq.n_pos)));
                is_ready        = false;
            }
        }
    }

    bool layered = resumed;
    llama_kv_cache::slot_info_vec_t sinfos;
    if (!to_stage.empty() && !resumed) {
        const llama_seq_id s0 = to_stage[0].seq_id_unq[0];
        uint32_t n_stage = 0;
        uint32_t n_out   = 0;
        for (const auto & ubatch : to_stage) {
            n_stage += ubatch.n_tokens;
            n_out   += (uint32_t) std::count_if(ubatch.output, ubatch.output + ubatch.n_tokens, [](int8_t x) { return x != 0; });
        }
        uint32_t n_to_come = 0;
        if (n_new.count(reserved_seq)) {
            const uint32_t n = seqs[reserved_seq].n_pos + n_new[reserved_seq];
            n_to_come = want_reserve - std::min(want_reserve, n);
        }

        // logits of all tokens would need all outputs at once; other sequences in the staging need all of its layers
        layered = want_whole && s0 == reserved_seq && seqs[s0].state == EMPTY && n_stage == n_new[s0] && n_stage == want_reserve && n_stage > 1 &&
            n_out < n_stage && (n_staged() == 0 || compresses) && cfg->prefill != HEADKV_PREFILL_TOKEN && token_major.empty();
        if (t_pause > 0 && !layered) {
            fail(format("sequence %d cannot be read layer by layer now: it must be empty, and no other one in the staging", s0));
            return failed();
        }

        const uint32_t n_cells = (compresses ? 0 : n_staged()) + n_stage;
        if (!stage || stage->get_size() < n_cells || compresses || is_layered != layered || (layered && (!hidden || hidden->ne[1] < n_stage))) {
            if (n_staged() > 0 && !compresses && is_layered != layered) {
                fail("the staging holds a prompt that is read in another order");
                return failed();
            }
            want_stage   = std::max(n_cells + n_to_come, stage && !layered && !compresses ? 2*stage->get_size() : 0);
            want_layered = layered;
            is_ready     = false;
        }
    }
    if (!is_ready) {
        return failed();
    }
    if (!to_stage.empty()) {
        if (!resumed) {
            sinfos = stage->prepare(to_stage);
            if (sinfos.empty()) {
                return failed();
            }
        }
        want_whole   = false;
        want_reserve = 0;
        reserved_seq = -1;
        if (n_staged() == 0) {
            n_bytes_peak = 0;
        }
        note_peak(0);
    }
    if (layered && !resumed) {
        reading = std::make_unique<reading_t>();
        reading->seq_id = to_stage[0].seq_id_unq[0];
        reading->cfg    = cfg;
        for (size_t i = 0; i < to_stage.size(); ++i) {
            if (to_stage[i].token) {
                reading->tokens.insert(reading->tokens.end(), to_stage[i].token, to_stage[i].token + to_stage[i].n_tokens);
            }
            reading->stage_ctxs.push_back(std::make_unique<llama_kv_cache_context>(stage.get(),
                        llama_kv_cache::slot_info_vec_t{ sinfos[i] }, std::vector<llama_ubatch>{ to_stage[i] }));
        }
    }

    // upstream reads the outputs in the order in which the ubatches are computed
    to_store = merge_store(to_store);
    std::vector<int32_t> & out_ids = balloc.get_out_ids();
    out_ids.clear();
    for (const auto * ubatches : { &to_store, &to_stage }) {
        for (const auto & ubatch : *ubatches) {
            for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
                if (ubatch.output[i]) {
                    out_ids.push_back(ubatch.data->batch_idxs[i]);
                }
            }
        }
    }
    return std::make_unique<llama_kv_cache_ragged_context>(this, std::move(to_store), std::move(to_stage), std::move(sinfos), layered);
}

std::string llama_kv_cache_ragged::why_not_resumed(const std::vector<llama_ubatch> & ubatches) const {
    std::vector<llama_token> tokens;
    if (seqs[reading->seq_id].adapters != adapters) {
        return "other adapters were set";
    }
    for (size_t i = 0; i < ubatches.size(); ++i) {
        const llama_ubatch & ubatch = ubatches[i];
        if (ubatch.seq_id_unq[0] != reading->seq_id) {
            return format("sequence %d has to wait", ubatch.seq_id_unq[0]);
        }
        if (ubatch.token) {
            tokens.insert(tokens.end(), ubatch.token, ubatch.token + ubatch.n_tokens);
        }
        const bool is_done = reading->i_layer == n_layer() - 1 && i < reading->i_ubatch;
        if (is_done && std::any_of(ubatch.output, ubatch.output + ubatch.n_tokens, [](int8_t x) { return x != 0; })) {
            return "outputs were asked for that it has passed";
        }
    }
    return tokens.empty() || tokens != reading->tokens ? "other tokens came" : "";
}

bool llama_kv_cache_ragged::is_reading(llama_seq_id seq_id) const {
    return reading && reading->seq_id == seq_id;
}

int64_t llama_kv_cache_ragged::n_steps_left(llama_seq_id seq_id, int64_t n_tokens, int64_t n_ubatch) const {
    const int64_t n_ubatches = (n_tokens + n_ubatch - 1)/n_ubatch;
    const bool    in_progress = is_reading(seq_id) && reading->begun;
    return n_layer()*n_ubatches - (in_progress ? reading->i_layer*n_ubatches + (int64_t) reading->i_ubatch : 0);
}

llama_memory_context_ptr llama_kv_cache_ragged::init_full() {
    return std::make_unique<llama_kv_cache_ragged_context>(this);
}

//
// updates
//

class llama_kv_cache_ragged_update : public llama_memory_context_i {
public:
    llama_kv_cache_ragged_update(llama_kv_cache_ragged * kv, llama_context * lctx) : kv(kv), lctx(lctx) {}

    bool next()  override { return false; }
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
    }
    this->lctx = lctx;
    return std::make_unique<llama_kv_cache_ragged_update>(this, lctx);
}

bool llama_kv_cache_ragged::has_update() const {
    return want_stage > 0 || std::any_of(seqs.begin(), seqs.end(), [](const seq_t & seq) { return seq.compress_to >= 0 || seq.n_tail_next > 0; });
}

void llama_kv_cache_ragged::forget_updates() {
    for (auto & seq : seqs) {
        seq.compress_to = -1;
        seq.n_tail_next = 0;
    }
    want_stage = 0;
}

bool llama_kv_cache_ragged::apply_update(llama_context * lctx) {
    lctx->synchronize(); // buffers are about to be replaced

    bool res = true;
    std::string what_for;
    try {
        for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size() && res; ++s) {
            if (seqs[s].compress_to >= 0) {
                did_compress = res = compress_impl(s);
            }
        }
        for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size() && res; ++s) {
            if (seqs[s].n_tail_next > 0) {
                what_for += format("%s%u generated tokens of sequence %d", what_for.empty() ? " for " : ", ", seqs[s].n_tail_next, s);
            }
        }
        if (res) {
            grow_tails();
        }
        if (want_stage > 0 && res) {
            const double n_bytes = (double) bytes_cell()*want_stage/(want_layered ? ils.size() : 1);
            what_for = format(" for a prompt of %u tokens, whose K and V take %.1f MiB while it is read%s", want_stage, n_bytes/1024/1024,
                    want_layered ? "" : ", less with prefill 'layer'");
            alloc_stage(want_stage);
        }
    } catch (const std::exception & e) {
        const std::string what = reason(e);
        res = fail(NO_MEMORY + what_for + (what == NO_MEMORY ? "" : " (" + what + ")"));
        release_idle_stage(); // what was allocated before the failure
    }
    forget_updates();
    return res;
}

void llama_kv_cache_ragged::drop_seq(llama_seq_id seq_id) {
    for (auto & layer : store.layers) {
        if ((size_t) seq_id < layer.ranges.size() && !layer.ranges[seq_id].empty()) {
            if (lctx) {
                lctx->synchronize();
            }
            store.remove(layer, seq_id, cfg->n_buckets);
        }
    }
}

void llama_kv_cache_ragged::grow_tails() {
    for (auto & seq : seqs) {
        seq.n_tail_next = std::min<uint32_t>(seq.n_tail_next, n_ctx_seq - seq.n_prompt);
    }
    for (auto & layer : store.layers) {
        std::map<int32_t, headkv_rows> changes;
        for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
            const seq_t & seq = seqs[s];
            if (seq.n_tail_next == 0) {
                continue;
            }
            headkv_rows & rows = changes[s];
            rows.n_tail = seq.n_tail_next;
            for (const auto & r : layer.ranges[s]) {
                rows.n_kept.push_back(r.n_kept);
                rows.n_used.push_back(r.n_kept + (seq.n_pos - seq.n_prompt));
            }
        }
        if (changes.empty()) {
            return;
        }
        // layers that were grown before a failure keep their longer tails, which does no harm
        store.relayout(layer, changes, cfg->n_buckets);
    }
    for (auto & seq : seqs) {
        seq.n_tail = seq.n_tail_next > 0 ? seq.n_tail_next : seq.n_tail;
    }
}

// upstream hands out K as it is stored and V as a view
static ggml_tensor * storage_of(const llama_kv_cache & cache, int32_t il, bool v) {
    if (!v) {
        return cache.get_k_storage(il);
    }
    ggml_init_params params = { /*.mem_size =*/ ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };
    ggml_context_ptr ctx(ggml_init(params));
    return cache.get_v(ctx.get(), il, 1, {})->view_src;
}

// marks a cell as the one of a position
static void occupy(llama_kv_cache & cache, uint32_t i_cell, llama_seq_id seq_id, llama_pos pos) {
    llama_seq_id * ids   = &seq_id;
    int32_t        n_ids = 1;

    llama_ubatch ubatch = {};
    ubatch.n_tokens = ubatch.n_seq_tokens = ubatch.n_seqs = ubatch.n_seqs_unq = ubatch.n_pos = 1;
    ubatch.pos      = &pos;
    ubatch.n_seq_id = &n_ids;
    ubatch.seq_id   = &ids;

    llama_kv_cache::slot_info sinfo = {};
    sinfo.resize(1);
    sinfo.idxs[0] = { i_cell };
    cache.apply_ubatch(sinfo, ubatch);
}

void llama_kv_cache_ragged::alloc_stage(uint32_t n_cells) {
    const uint32_t n_tokens = n_cells;
    n_cells = std::min<uint32_t>(GGML_PAD(n_cells, 256), n_ctx); // upstream attends multiples of 256 cells

    for (llama_seq_id s = 0; s < (llama_seq_id) seqs.size(); ++s) {
        if (seqs[s].state != STORED) {
            drop_seq(s);
        }
    }
    if (!is_staging()) {
        stage.reset(); // the old memory goes before the new one comes
        rings.clear();
        sums.clear();
        sums_of_layer.clear();
        hidden_buf = ring_t();
        hidden = band = nullptr;
    }
    if (rings.empty()) {
        make_rings(rings, ring_of_layer, false, want_layered);
    }
    auto res = make_stage(n_cells, false, want_layered);
    std::vector<ring_t> new_sums;
    std::vector<ggml_tensor *> new_sums_of_layer;
    make_sums(new_sums, new_sums_of_layer, false, n_cells);
    if (want_layered) {
        alloc_hidden(n_tokens);
    }
    is_layered = want_layered;

    if (stage) {
        // rows and cells of the part that was read already
        const auto & cells = stage->get_cells(0);
        const uint32_t n = cells.used_max_p1();

        for (int32_t il : ils) {
            for (bool v : { false, true }) {
                headkv_copy_rows(storage_of(*stage, il, v), 0, storage_of(*res, il, v), 0, n);
            }
            for (int64_t ih = 0; with_sums && ih < sums_of_layer[il]->ne[2]; ++ih) {
                headkv_copy_rows(sums_of_layer[il], ih*sums_of_layer[il]->ne[1], new_sums_of_layer[il], ih*n_cells, n);
            }
        }
        for (uint32_t i = 0; i < n; ++i) {
            if (!cells.is_empty(i)) {
                occupy(*res, i, cells.seq_get(i), cells.pos_get(i));
            }
        }
    }
    stage         = std::move(res);
    sums          = std::move(new_sums);
    sums_of_layer = std::move(new_sums_of_layer);
    store.generation++;
}

void llama_kv_cache_ragged::alloc_hidden(uint32_t n_tokens) {
    const int64_t n_ubatch = lctx->n_ubatch();
    const ggml_backend_buffer_type_t buft = store.layers[0].buft;

    ggml_init_params params = { /*.mem_size =*/ 2*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };
    hidden_buf.ctx.reset(ggml_init(params));
    hidden = ggml_new_tensor_2d(hidden_buf.ctx.get(), cfg->hidden_f16 ? GGML_TYPE_F16 : GGML_TYPE_F32, hparams.n_embd, n_tokens);
    // an odd number of cache lines: rows that are read together must not share cache sets
    const int64_t n_cols = GGML_PAD((ggml_backend_buft_is_host(buft) ? n_tokens : 0) + n_ubatch + 256, 64) + 32;
    band   = ggml_new_tensor_2d(hidden_buf.ctx.get(), GGML_TYPE_F16, n_cols, n_ubatch);
    hidden_buf.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(hidden_buf.ctx.get(), buft));
    if (!hidden_buf.buf) {
        hidden = band = nullptr;
        throw std::runtime_error("no memory for the hidden states of the prompt");
    }
    std::vector<ggml_fp16_t> row(n_cols, ggml_fp32_to_fp16(-INFINITY));
    std::fill(row.begin(), row.begin() + n_band(), ggml_fp32_to_fp16(0.0f));
    for (int64_t i = 0; i < n_ubatch; ++i) {
        row[n_band() + i] = ggml_fp32_to_fp16(0.0f);
        ggml_backend_tensor_set(band, row.data(), i*band->nb[1], band->nb[1]);
    }
}

void llama_kv_cache_ragged::release_idle_stage() {
    if (bytes_staging() > 0 && !is_staging()) {
        lctx->synchronize();
        release_stage();
    }
}

void llama_kv_cache_ragged::release_idle_store() {
    const bool idle = !running && std::none_of(seqs.begin(), seqs.end(), [](const seq_t & seq) { return seq.state == STORED || seq.state == LAYERED; });
    if (idle && store.n_bytes() > 0) {
        if (lctx) {
            lctx->synchronize();
        }
        store.clear();
    }
}

void llama_kv_cache_ragged::release_stage() {
    hidden_buf = ring_t();
    hidden = band = nullptr;
    is_layered = false;
    stage.reset();
    rings.clear();
    ring_of_layer.clear();
    sums.clear();
    sums_of_layer.clear();
    store.generation++;
#if defined(__GLIBC__)
    malloc_trim(0); // smaller stagings come from the heap, which keeps what is freed
#endif
}

//
// compression
//

bool llama_kv_cache_ragged::compress(llama_context * lctx, llama_seq_id seq_id, llama_seq_id seq_id_dst) {
    const seq_t & seq = seqs[seq_id];
    if (seq_id_dst != seq_id) {
        if (seq.state != STAGED) {
            return fail(format("sequence %d is not a prompt that is held as a whole: read it in upstream's order, do not compress it", seq_id));
        }
        if (seqs[seq_id_dst].state != EMPTY || is_reading(seq_id_dst)) {
            return fail(format("sequence %d is not empty: remove it first", seq_id_dst));
        }
    }
    if (seq.state == STORED) {
        return true;
    }
    if (seq.state == EMPTY) {
        return fail(format("sequence %d is empty: there is nothing to compress", seq_id));
    }
    if (!broken.empty()) {
        return fail(broken);
    }
    forget_updates();
    did_compress = false;
    seqs[seq_id].compress_to = seq_id_dst;
    lctx->memory_update(true);
    return did_compress;
}

std::vector<int32_t> llama_kv_cache_ragged::stage_cells(llama_seq_id seq_id) const {
    std::vector<int32_t> res(seqs[seq_id].n_pos, -1);
    const auto & cells = stage->get_cells(seq_id);
    for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
        if (!cells.is_empty(i) && cells.seq_has(i, seq_id) && (size_t) cells.pos_get(i) < res.size()) {
            res[cells.pos_get(i)] = (int32_t) i;
        }
    }
    return res;
}

std::vector<int32_t> llama_kv_cache_ragged::window_slots(llama_seq_id seq_id, llama_pos n_window) const {
    const seq_t & seq = seqs[seq_id];
    std::vector<int32_t> res;
    for (llama_pos pos = std::max(0, seq.n_pos - n_window); pos < seq.n_pos; ++pos) {
        if (seq.window.empty() || seq.window[pos % n_ring] != pos) {
            return {};
        }
        res.push_back(seq_id*n_ring + pos % n_ring);
    }
    return res;
}

namespace {

// tensors in a buffer of their own
struct scratch_t {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;

    scratch_t() {
        ggml_init_params params = { /*.mem_size =*/ 16*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };
        ctx.reset(ggml_init(params));
    }

    void alloc(ggml_backend_buffer_type_t buft) {
        buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        if (!buf) {
            throw std::bad_alloc();
        }
    }
};

// Runs small graphs on the backends of a context, with memory of its own that is gone afterwards.
struct runner_t {
    static constexpr int N_NODES = 1024;

    ggml_backend_sched_ptr sched;
    std::vector<uint8_t>   meta;
    ggml_context_ptr       ctx;
    ggml_cgraph          * gf = nullptr;
    ggml_status            status = GGML_STATUS_SUCCESS;

    explicit runner_t(llama_context * lctx) {
        std::vector<ggml_backend_t> backends;
        std::vector<ggml_backend_buffer_type_t> bufts;
        for (int i = 0; i < ggml_backend_sched_get_n_backends(lctx->get_sched()); ++i) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(lctx->get_sched(), i);
            backends.push_back(backend);
            bufts.push_back(ggml_backend_sched_get_buffer_type(lctx->get_sched(), backend));

            ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
            auto * set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
            if (set_n_threads) {
                set_n_threads(backend, lctx->n_threads_batch());
            }
        }
        sched.reset(ggml_backend_sched_new(backends.data(), bufts.data(), (int) backends.size(), N_NODES, false, false));
        meta.resize(ggml_tensor_overhead()*N_NODES + ggml_graph_overhead_custom(N_NODES, false));
    }

    void begin() {
        ggml_init_params params = { /*.mem_size =*/ meta.size(), /*.mem_buffer =*/ meta.data(), /*.no_alloc =*/ true };
        ctx.reset(ggml_init(params));
        gf = ggml_new_graph_custom(ctx.get(), N_NODES, false);
    }

    size_t n_bytes() const {
        size_t res = 0;
        for (int i = 0; i < ggml_backend_sched_get_n_backends(sched.get()); ++i) {
            res += ggml_backend_sched_get_buffer_size(sched.get(), ggml_backend_sched_get_backend(sched.get(), i));
        }
        return res;
    }

    bool run() {
        ggml_backend_sched_reset(sched.get());
        if (!ggml_backend_sched_alloc_graph(sched.get(), gf)) {
            throw std::bad_alloc();
        }
        status = ggml_backend_sched_graph_compute(sched.get(), gf);
        return status == GGML_STATUS_SUCCESS;
    }
};

template <typename T>
void set_data(ggml_tensor * t, const std::vector<T> & data) {
    if (!data.empty()) {
        ggml_backend_tensor_set(t, data.data(), 0, data.size()*sizeof(T));
    }
}

// [n_queries][n] of the last n_queries of n tokens
std::vector<ggml_fp16_t> causal_mask(int64_t n, int64_t n_queries) {
    std::vector<ggml_fp16_t> res(n*n_queries, ggml_fp32_to_fp16(0.0f));
    for (int64_t i = 0; i < n_queries; ++i) {
        std::fill(res.begin() + (i + 1)*n - (n_queries - 1 - i), res.begin() + (i + 1)*n, ggml_fp32_to_fp16(-INFINITY));
    }
    return res;
}

// those of a KV head's group in some slots of the ring, [D, n_slots, G]
ggml_tensor * queries_of_head(ggml_context * ctx, ggml_tensor * ring, ggml_tensor * slots, const headkv_store_layer & layer, int64_t ih) {
    const int64_t D = layer.n_embd_head;
    const int64_t G = layer.n_head/layer.n_head_kv;
    ggml_tensor * q = ggml_get_rows(ctx, ring, slots);
    q = ggml_view_3d(ctx, q, D, G, slots->ne[0], D*q->nb[0], q->nb[1], ih*G*D*q->nb[0]);
    return ggml_cont(ctx, ggml_permute(ctx, q, 0, 2, 1, 3));
}

} // namespace

struct llama_kv_cache_ragged::compression {
    llama_seq_id      seq_id; // the prompt
    llama_seq_id      dst;    // what it is compressed as
    headkv_config_ptr cfg; // of all layers, whatever configure() does in between
    int64_t           t_us = 0; // spent so far

    int64_t n;        // tokens of the prompt
    int64_t n_window; // the last ones, whose queries score
    int64_t n_recent; // the last ones, which every head keeps
    int64_t n_prefix; // the others
    uint32_t n_tail;  // rows of each head that wait for generated tokens
    bool    keep_all;

    std::vector<int32_t> slots; // of the ring, in position order
    std::vector<int32_t> cells; // of the staging, in position order
    bool contiguous;

    headkv_cells n_keep;      // [il][ih] prefix cells
    int64_t      n_protected; // of them, of every head

    std::vector<float> recent_pos; // [n_recent]
    std::vector<float> scores;     // [n_prefix] of a policy that does not look at the queries

    runner_t runner;

    compression(llama_context * lctx, llama_seq_id seq_id, llama_seq_id dst, headkv_config_ptr cfg) : seq_id(seq_id), dst(dst), cfg(std::move(cfg)), runner(lctx) {}

    void run() {
        if (!runner.run()) {
            throw std::runtime_error(runner.status == GGML_STATUS_ABORTED ? "it was aborted" : "a graph could not be computed");
        }
    }
};

uint32_t llama_kv_cache_ragged::n_tail_running() const {
    return running->n_tail;
}

void llama_kv_cache_ragged::begin_compression(llama_seq_id seq_id, llama_seq_id seq_id_dst, headkv_config_ptr cfg) {
    running = std::make_unique<compression>(lctx, seq_id, seq_id_dst, cfg);
    compression & c = *running;

    c.n        = seqs[seq_id].n_pos;
    c.n_window = std::min<int64_t>(cfg->window, c.n);
    c.n_recent = std::min<int64_t>(cfg->recent, c.n);
    c.n_prefix = c.n - c.n_recent;

    c.keep_all = keeps_all(*cfg, c.n);
    c.n_tail   = n_tail_of(*cfg, c.n);

    c.slots = window_slots(seq_id, (llama_pos) cfg->window);
    c.cells = stage_cells(seq_id);
    if (cfg->policy->needs_sums && !c.keep_all && !seqs[seq_id].has_sums) {
        throw std::runtime_error(format("tokens were removed from the end of the prompt, whose attention policy '%s' has counted: "
                    "evaluate the prompt again", cfg->policy->name));
    }
    if (!cfg->policy->score && !cfg->policy->needs_sums && !c.keep_all && (int64_t) c.slots.size() != c.n_window) {
        throw std::runtime_error(format("queries of the last %d tokens are missing, because tokens were removed from the end of the prompt: "
                    "evaluate the prompt again", (int) c.n_window));
    }
    if (std::find(c.cells.begin(), c.cells.end(), -1) != c.cells.end()) {
        throw std::runtime_error("the prompt has holes: evaluate it again");
    }
    c.contiguous = c.cells.back() - c.cells.front() == c.n - 1 && std::is_sorted(c.cells.begin(), c.cells.end());

    for (int64_t i = 0; i < c.n_recent; ++i) {
        c.recent_pos.push_back((float) (c.n_prefix + i));
    }
    c.n_keep = cfg->policy->budget(*cfg, heads(), c.n_prefix);
    c.n_protected = headkv_n_protected(*cfg, c.n_prefix);
    headkv_budget_fit(c.n_keep, c.n_prefix, c.keep_all ? c.n_prefix : c.n_protected, cfg->surplus);
    if (cfg->policy->score) {
        c.scores = cfg->policy->score(c.n_prefix);
    }
}

std::vector<float> llama_kv_cache_ragged::value_norms(const headkv_store_layer & layer, ggml_tensor * cells) {
    compression & c = *running;

    const int64_t D  = layer.n_embd_head;
    const int64_t H  = layer.n_head_kv;
    const int64_t G  = layer.n_head/layer.n_head_kv;
    const int64_t DG = D*G;
    const int64_t n_prefix = c.n_prefix;
    // cells at a time: what their values add to the output takes 4 MiB
    const int64_t n_step   = std::max<int64_t>(64, (1 << 20)/(layer.wo->ne[1]*G));

    scratch_t scratch;
    ggml_tensor * t_columns = ggml_new_tensor_2d(scratch.ctx.get(), GGML_TYPE_F32, DG*H, DG);
    ggml_tensor * t_wo      = ggml_new_tensor_2d(scratch.ctx.get(), GGML_TYPE_F32, D, layer.wo->ne[1]*G);
    ggml_tensor * t_values  = ggml_new_tensor_2d(scratch.ctx.get(), GGML_TYPE_F32, 1, n_prefix*H);
    scratch.alloc(layer.buft);

    // quantised values are rotated
    scratch_t scratch_rot;
    ggml_tensor * t_rot = stage_plan->build_input_v_rot(scratch_rot.ctx.get());
    if (t_rot) {
        scratch_rot.alloc(ggml_backend_cpu_buffer_type());
        stage_plan->set_input_v_rot(t_rot);
    }

    ggml_tensor * v_all = storage_of(*stage, layer.il, true);
    std::vector<float> columns;
    for (int64_t ih = 0; ih < H; ++ih) {
        columns.assign(DG*H*DG, 0.0f);
        for (int64_t i = 0; i < DG; ++i) {
            columns[i*DG*H + ih*DG + i] = 1.0f;
        }
        set_data(t_columns, columns);

        c.runner.begin();
        ggml_context * ctx = c.runner.ctx.get();
        ggml_tensor * wo = headkv_build_output_matrix(ctx, layer.wo, layer.wo_s, t_columns, D);
        ggml_build_forward_expand(c.runner.gf, ggml_cpy(ctx, wo, t_wo));
        c.run();

        for (int64_t i = 0; i < n_prefix; i += n_step) {
            const int64_t n = std::min(n_step, n_prefix - i);
            c.runner.begin();
            ctx = c.runner.ctx.get();
            ggml_tensor * v_head = ggml_view_2d(ctx, v_all, D, v_all->ne[1], v_all->nb[1], ih*ggml_row_size(v_all->type, D));
            ggml_tensor * v = ggml_get_rows(ctx, v_head, ggml_view_1d(ctx, cells, n, i*sizeof(int32_t)));
            if (t_rot) {
                v = llama_mul_mat_hadamard(ctx, v, t_rot);
            }
            ggml_tensor * norms = headkv_build_value_norm(ctx, v, t_wo, G);
            ggml_tensor * dst   = ggml_view_2d(ctx, t_values, 1, n, t_values->nb[1], (ih*n_prefix + i)*t_values->nb[1]);
            ggml_build_forward_expand(c.runner.gf, ggml_cpy(ctx, norms, dst));
            c.run();
        }
    }
    note_peak(ggml_backend_buffer_get_size(cells->buffer) + ggml_backend_buffer_get_size(scratch.buf.get()) + c.runner.n_bytes());

    std::vector<float> res(n_prefix*H);
    ggml_backend_tensor_get(t_values, res.data(), 0, res.size()*sizeof(float));
    return res;
}

void llama_kv_cache_ragged::compress_layer(headkv_store_layer & layer) {
    compression & c = *running;
    const headkv_config & cfg = *c.cfg;
    const int64_t t_start = ggml_time_us();

    const int64_t n        = c.n;
    const int64_t n_window = c.n_window;
    const int64_t n_recent = c.n_recent;
    const int64_t n_prefix = c.n_prefix;

    const int64_t D = layer.n_embd_head;
    const int64_t H = layer.n_head_kv;
    const int64_t G = layer.n_head/layer.n_head_kv;

    std::vector<int64_t> n_keep = c.n_keep[layer.il]; // prefix cells
    const int64_t n_total = std::accumulate(n_keep.begin(), n_keep.end(), H*n_recent);

    scratch_t scratch;
    ggml_tensor * t_scores = ggml_new_tensor_2d(scratch.ctx.get(), GGML_TYPE_F32, std::max<int64_t>(n_prefix, 1), H);
    ggml_tensor * t_kept   = ggml_new_tensor_1d(scratch.ctx.get(), GGML_TYPE_I32, n_total);
    ggml_tensor * t_cells  = ggml_new_tensor_1d(scratch.ctx.get(), GGML_TYPE_I32, n);
    ggml_tensor * t_slots  = ggml_new_tensor_1d(scratch.ctx.get(), GGML_TYPE_I32, n_window);
    ggml_tensor * t_select = ggml_new_tensor_2d(scratch.ctx.get(), GGML_TYPE_I32, 2, H);
    ggml_tensor * t_plan   = ggml_new_tensor_2d(scratch.ctx.get(), GGML_TYPE_I32, 3, H);
    ggml_tensor * t_recent = ggml_new_tensor_1d(scratch.ctx.get(), GGML_TYPE_F32, n_recent);
    scratch.alloc(layer.buft);
    set_data(t_cells,  c.cells);
    set_data(t_recent, c.recent_pos);

    ggml_tensor * k_all = storage_of(*stage, layer.il, false);
    ggml_tensor * v_all = storage_of(*stage, layer.il, true);

    // keys or values of one head in position order [D, n]
    const auto head_cells = [&](ggml_context * ctx, ggml_tensor * all, int64_t ih) {
        const size_t nb = ggml_row_size(all->type, D);
        ggml_tensor * res = ggml_view_2d(ctx, all, D, c.contiguous ? n : all->ne[1], all->nb[1], ih*nb + (c.contiguous ? c.cells[0]*all->nb[1] : 0));
        return c.contiguous ? res : ggml_get_rows(ctx, res, t_cells);
    };

    // score
    if (cfg.policy->score) {
        for (int64_t ih = 0; ih < H && n_prefix > 0; ++ih) {
            ggml_backend_tensor_set(t_scores, c.scores.data(), ih*t_scores->nb[1], n_prefix*sizeof(float));
        }
    } else if (cfg.policy->needs_sums && !c.keep_all) {
        c.runner.begin();
        ggml_context * ctx = c.runner.ctx.get();
        ggml_tensor * all = sums_of_layer[layer.il];
        for (int64_t ih = 0; ih < H; ++ih) {
            ggml_tensor * of_head = ggml_view_2d(ctx, all, 1, all->ne[1], all->nb[1], ih*all->nb[2]);
            ggml_tensor * s = ggml_get_rows(ctx, of_head, ggml_view_1d(ctx, t_cells, n_prefix, 0));
            ggml_build_forward_expand(c.runner.gf, ggml_cpy(ctx, ggml_reshape_1d(ctx, s, n_prefix), ggml_view_1d(ctx, t_scores, n_prefix, ih*t_scores->nb[1])));
        }
        c.run();
    } else if (!c.keep_all) {
        set_data(t_slots, c.slots);

        // all heads by the fused ops
        c.runner.begin();
        bool scored = false;
        const bool on_cpu = is_cpu(layer.buft);
        if ((on_cpu || layer.fused) && n_prefix > 0) {
            ggml_context * ctx = c.runner.ctx.get();
            ggml_tensor * q = ggml_get_rows(ctx, ring_of_layer[layer.il], t_slots);
            ggml_tensor * s = headkv_build_score_fused(ctx, ggml_reshape_3d(ctx, q, D, G*H, n_window), k_all, t_cells,
                    n_prefix, layer.attend->scale, layer.attend->softcap, cfg.n_square, cfg.pool, std::max(1, (int) cfg.pool_kernel));
            scored = on_cpu || (device_supports(layer.buft, s->src[3]) && device_supports(layer.buft, s));
            if (scored) {
                ggml_build_forward_expand(c.runner.gf, ggml_cpy(ctx, s, t_scores));
                c.run();
            }
        }

        // composed: one head at a time, because its probabilities are the largest part of the scratch memory
        scratch_t scratch_mask;
        ggml_tensor * t_mask = nullptr; // causal within the window
        if (!scored) {
            t_mask = ggml_new_tensor_2d(scratch_mask.ctx.get(), GGML_TYPE_F16, n, n_window);
            scratch_mask.alloc(layer.buft);
            set_data(t_mask, causal_mask(n, n_window));
        }
        for (int64_t ih = 0; ih < H && !scored; ++ih) {
            c.runner.begin();
            ggml_context * ctx = c.runner.ctx.get();

            ggml_tensor * q = queries_of_head(ctx, ring_of_layer[layer.il], t_slots, layer, ih);
            ggml_tensor * s = headkv_build_score(ctx, c.runner.gf, q, head_cells(ctx, k_all, ih), t_mask,
                    n_prefix, layer.attend->scale, layer.attend->softcap, cfg.n_square, cfg.pool, std::max(1, (int) cfg.pool_kernel));
            ggml_build_forward_expand(c.runner.gf, ggml_cpy(ctx, s, ggml_view_1d(ctx, t_scores, n_prefix, ih*t_scores->nb[1])));
            c.run();
        }
        if (t_mask) {
            note_peak(ggml_backend_buffer_get_size(scratch.buf.get()) + ggml_backend_buffer_get_size(scratch_mask.buf.get()) + c.runner.n_bytes());
        }
        if (cfg.pool_kernel == 0) {
            std::vector<float> scores(n_prefix*H);
            ggml_backend_tensor_get(t_scores, scores.data(), 0, scores.size()*sizeof(float));
            for (int64_t ih = 0; ih < H; ++ih) {
                headkv_pool_scores(scores.data() + ih*n_prefix, n_prefix, cfg.pool, headkv_pool_kernel(n_keep[ih]));
            }
            ggml_backend_tensor_set(t_scores, scores.data(), 0, scores.size()*sizeof(float));
        }
    }

    const std::vector<float> protect(c.n_protected, HEADKV_PROTECTED);
    for (const auto & [start, end] : headkv_protected(cfg, n_prefix)) {
        for (int64_t ih = 0; ih < H; ++ih) {
            ggml_backend_tensor_set(t_scores, protect.data(), ih*t_scores->nb[1] + start*sizeof(float), (end - start)*sizeof(float));
        }
    }
    if (cfg.policy->refine && !c.keep_all) {
        headkv_scored scored = { n_prefix, c.n_protected, std::vector<float>(n_prefix*H), {}, std::move(n_keep) };
        ggml_backend_tensor_get(t_scores, scored.scores.data(), 0, n_prefix*H*sizeof(float));
        if (cfg.policy->needs_values) {
            scored.values = value_norms(layer, t_cells);
        }
        cfg.policy->refine(cfg, scored);
        n_keep = std::move(scored.n_keep);
        ggml_backend_tensor_set(t_scores, scored.scores.data(), 0, n_prefix*H*sizeof(float));
    }

    // budgets are known: make room, select and compact
    std::vector<uint32_t> n_kept;     // with the recent ones
    std::vector<int32_t> plan_select; // [2, H]
    std::vector<int32_t> n_comp;      // [H] 1 = a cell for those that are dropped comes first
    int32_t n_before = 0;
    for (int64_t ih = 0; ih < H; ++ih) {
        n_kept.push_back((uint32_t) (n_keep[ih] + n_recent));
        n_comp.push_back(cfg.policy->compensates && n_keep[ih] > 0 && n_keep[ih] < n_prefix);
        n_keep[ih] -= n_comp[ih];
        plan_select.insert(plan_select.end(), { n_before + n_comp[ih], (int32_t) n_keep[ih] });
        n_before += (int32_t) n_kept[ih];
    }
    GGML_ASSERT(n_before == n_total);
    set_data(t_select, plan_select);
    store.relayout(layer, { { c.dst, { n_kept, c.n_tail, {} } } }, cfg.n_buckets);
    auto & ranges = layer.ranges[c.dst];

    std::vector<int32_t> plan;
    for (int64_t ih = 0; ih < H; ++ih) {
        plan.insert(plan.end(), { plan_select[2*ih], (int32_t) n_kept[ih] - n_comp[ih], (int32_t) ranges[ih].off + n_comp[ih] });
    }
    set_data(t_plan, plan);

    c.runner.begin();
    ggml_context * ctx = c.runner.ctx.get();
    ggml_tensor * scores = ggml_view_2d(ctx, t_scores, n_prefix, H, t_scores->nb[1], 0);

    if (is_cpu(layer.buft)) {
        ggml_tensor * kept = ggml_cpy(ctx, headkv_build_select(ctx, scores, t_select, n_recent, n_total), t_kept);
        ggml_build_forward_expand(c.runner.gf, headkv_build_compact(ctx, layer.k, k_all, kept, t_cells, t_plan));
        ggml_build_forward_expand(c.runner.gf, headkv_build_compact(ctx, layer.v, v_all, kept, t_cells, t_plan));
        c.run();
    } else {
        ggml_tensor * all_kept = headkv_build_select(ctx, scores, t_select, n_recent, n_total);
        const bool selected = layer.fused && device_supports(layer.buft, all_kept->view_src);
        if (selected) {
            ggml_build_forward_expand(c.runner.gf, ggml_cpy(ctx, all_kept, t_kept));
            c.run();
        }
        for (int64_t ih = 0; ih < H; ++ih) {
            c.runner.begin();
            ctx = c.runner.ctx.get();
            const int64_t n_rows = plan[3*ih + 1];
            ggml_tensor * kept = ggml_view_1d(ctx, t_kept, n_rows, plan_select[2*ih]*sizeof(int32_t));
            if (!selected) {
                scores = ggml_view_1d(ctx, t_scores, n_prefix, ih*t_scores->nb[1]);
                kept = ggml_cpy(ctx, n_keep[ih] == n_prefix
                    ? ggml_cast(ctx, ggml_arange(ctx, 0.0f, (float) n, 1.0f), GGML_TYPE_I32)
                    : headkv_build_select_composed(ctx, scores, n_keep[ih], t_recent), kept);
            }
            ggml_build_forward_expand(c.runner.gf, kept);
            for (auto & [pool, all] : { std::make_pair(layer.k, k_all), std::make_pair(layer.v, v_all) }) {
                ggml_tensor * rows = ggml_get_rows(ctx, head_cells(ctx, all, ih), kept); // F32
                ggml_build_forward_expand(c.runner.gf, ggml_cpy(ctx, rows, ggml_view_2d(ctx, pool, D, n_rows, pool->nb[1], plan[3*ih + 2]*pool->nb[1])));
            }
            c.run();
        }
    }

    std::vector<int32_t> kept(n_total);
    ggml_backend_tensor_get(t_kept, kept.data(), 0, n_total*sizeof(int32_t));
    for (int64_t ih = 0; ih < H; ++ih) {
        ranges[ih].pos.assign(n_comp[ih], -1);
        ranges[ih].pos.insert(ranges[ih].pos.end(), kept.begin() + plan[3*ih], kept.begin() + plan[3*ih] + plan[3*ih + 1]);
    }
    compensate(layer, t_cells);

    note_peak(ggml_backend_buffer_get_size(scratch.buf.get()) + c.runner.n_bytes());

    c.t_us += ggml_time_us() - t_start;
}

void llama_kv_cache_ragged::compensate(headkv_store_layer & layer, ggml_tensor * cells) {
    compression & c = *running;
    const int64_t n = c.n_prefix;
    const int64_t D = layer.n_embd_head;
    for (int64_t ih = 0; ih < layer.n_head_kv; ++ih) {
        const auto & range = layer.ranges[c.dst][ih];
        if (!range.compensates()) {
            continue;
        }
        std::vector<float> share(n, 1.0f/(c.n - (range.n_kept - 1)));
        for (size_t i = 1; i < range.pos.size() && range.pos[i] < n; ++i) {
            share[range.pos[i]] = 0.0f;
        }
        scratch_t scratch;
        ggml_tensor * t_share = ggml_new_tensor_1d(scratch.ctx.get(), GGML_TYPE_F32, n);
        scratch.alloc(layer.buft);
        set_data(t_share, share);

        c.runner.begin();
        ggml_context * ctx = c.runner.ctx.get();
        for (bool v : { false, true }) {
            ggml_tensor * all  = storage_of(*stage, layer.il, v);
            ggml_tensor * pool = v ? layer.v : layer.k;
            ggml_tensor * rows = ggml_view_2d(ctx, all, D, all->ne[1], all->nb[1], ih*ggml_row_size(all->type, D));
            rows = ggml_get_rows(ctx, rows, ggml_view_1d(ctx, cells, n, 0)); // F32
            ggml_tensor * dst = ggml_view_2d(ctx, pool, D, 1, pool->nb[1], range.off*pool->nb[1]);
            ggml_build_forward_expand(c.runner.gf, ggml_cpy(ctx, headkv_build_mean(ctx, rows, t_share), dst));
        }
        c.run();
    }
}

void llama_kv_cache_ragged::end_compression() {
    const llama_seq_id seq_id = running->seq_id;
    const llama_seq_id dst    = running->dst;
    const llama_pos    n_pos  = seqs[seq_id].n_pos;

    seq_t res;
    res.state    = STORED;
    res.n_pos    = n_pos;
    res.n_prompt = n_pos;
    res.n_whole  = running->keep_all ? n_pos : (llama_pos) running->n_recent;
    res.n_tail   = running->n_tail;
    res.kv_size  = running->cfg->kv_size;
    res.spans    = headkv_protected(*running->cfg, n_pos - res.n_whole);
    res.adapters = seqs[seq_id].adapters;
    res.n_tail_next = seqs[dst].n_tail_next; // of the batch that waits for the compression

    t_compress = running->t_us;
    n_compressions++;
    running.reset();

    if (dst == seq_id) {
        stage->seq_rm(seq_id, -1, -1);
    }
    seqs[dst] = std::move(res);
    if (!is_staging()) {
        release_stage();
    }

    LLAMA_LOG_INFO("headkv: sequence %d: %d tokens, %.2f MiB of K/V -> %.2f MiB in %.1f ms, peak %.2f MiB\n", dst, n_pos,
            bytes_cell()*(double) n_pos/1024/1024, store.n_bytes()/1024.0/1024.0, t_compress/1000.0, n_bytes_peak/1024.0/1024.0);
}

void llama_kv_cache_ragged::abort_compression() {
    if (running) {
        drop_seq(running->dst);
        running.reset();
    }
}

bool llama_kv_cache_ragged::end_layer(int32_t il) {
    lctx->synchronize(); // buffers are about to be read and replaced
    try {
        if (!running) {
            begin_compression(reading->seq_id, reading->seq_id, reading->cfg);
        }
        if (headkv_store_layer * layer = store.find(il)) {
            compress_layer(*layer);
        }
    } catch (const std::exception & e) {
        return fail(format("compression of layer %d failed: %s", il, reason(e)));
    }
    return true;
}

bool llama_kv_cache_ragged::compress_impl(llama_seq_id seq_id) {
    const bool layered = seqs[seq_id].state == LAYERED;
    try {
        if (!running) {
            begin_compression(seq_id, seqs[seq_id].compress_to, cfg);
        }
        for (auto & layer : store.layers) {
            // of a prompt that was read layer by layer, the last layer is left
            if (!layered || layer.il == n_layer() - 1) {
                compress_layer(layer);
            }
        }
    } catch (const std::exception & e) {
        if (!layered) {
            abort_compression(); // the sequence stays in the staging
        }
        return fail(format("compression failed: %s", reason(e)));
    }
    end_compression();
    return true;
}

//
// introspection
//

bool llama_kv_cache_ragged::fill(llama_context * lctx, llama_seq_id seq_id, uint32_t n_tokens, uint32_t seed) {
    seq_t & seq = seqs[seq_id];
    if (seq.state != EMPTY) {
        return fail("only an empty sequence can be filled");
    }
    forget_updates();
    want_stage   = n_tokens;
    want_layered = false;
    lctx->memory_update(true);
    if (!stage || stage->get_size() < n_tokens) {
        return false;
    }

    // one megabyte of random rows is repeated: what they hold does not matter to a benchmark
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal(0.0f, 1.0f);
    const auto fill_rows = [&](ggml_tensor * t, int64_t n_rows) {
        const int64_t n_random = std::min<int64_t>(n_rows, std::max<int64_t>(1, (1 << 20)/(int64_t) t->nb[1]));
        std::vector<float> x(t->ne[0]*n_random);
        for (float & v : x) {
            v = normal(rng);
        }
        std::vector<uint8_t> raw(ggml_row_size(t->type, t->ne[0])*n_random);
        ggml_quantize_chunk(t->type, x.data(), raw.data(), 0, n_random, t->ne[0], nullptr);
        for (int64_t i = 0; i < n_rows; i += n_random) {
            ggml_backend_tensor_set(t, raw.data(), i*t->nb[1], ggml_row_size(t->type, t->ne[0])*std::min(n_random, n_rows - i));
        }
    };
    for (int32_t il : ils) {
        fill_rows(storage_of(*stage, il, false), n_tokens);
        fill_rows(storage_of(*stage, il, true),  n_tokens);
        fill_rows(get_ring(il), n_slots());
    }
    for (uint32_t i = 0; i < n_tokens; ++i) {
        occupy(*stage, i, seq_id, (llama_pos) i);
    }
    seq.state = STAGED;
    seq.n_pos = (llama_pos) n_tokens;
    seq.window.assign(n_ring, -1);
    for (llama_pos pos = std::max(0, seq.n_pos - n_ring); pos < seq.n_pos; ++pos) {
        seq.window[pos % n_ring] = pos;
    }
    return true;
}

bool llama_kv_cache_ragged::read_attention(llama_context * lctx, llama_seq_id seq_id, int32_t n_queries,
        const std::vector<std::pair<int32_t, int32_t>> & spans, int32_t n_top, float * mass, int32_t * top) {
    const seq_t & seq = seqs[seq_id];
    if (seq.state != STAGED) {
        return fail(format("sequence %d is not staged: attention is that of a prompt before its compression", seq_id));
    }
    const int64_t n = seq.n_pos;
    const int32_t n_window = std::min<int32_t>(n_ring, seq.n_pos);
    if (n_queries < 1 || n_queries > n_window) {
        return fail(format("attention of the last %d tokens: it must be in [1, %d], those whose queries the window has", n_queries, n_window));
    }
    if (n_top < 1 || n_top > n - n_queries + 1) {
        return fail(format("%d largest probabilities of %d: it must be in [1, %d]", n_top, seq.n_pos, seq.n_pos - n_queries + 1));
    }
    std::vector<bool> inside(n, false);
    for (const auto & [start, end] : spans) {
        if (start < 0 || end <= start || end > n) {
            return fail(format("span [%d, %d) of %d tokens: it must not be empty and lie within them", start, end, seq.n_pos));
        }
        std::fill(inside.begin() + start, inside.begin() + end, true);
    }
    const auto slots = window_slots(seq_id, n_queries);
    if (slots.empty()) {
        return fail("the queries of the last tokens are missing: evaluate them again");
    }
    const std::vector<int32_t> cells = stage_cells(seq_id);

    const size_t n_row = n_head_max();
    const size_t n_all = n_row*n_layer(); // of one query
    std::fill(mass, mass + n_queries*n_all, 0.0f);
    std::fill(top,  top  + n_queries*n_all, -1);

    lctx->synchronize();
    runner_t runner(lctx);
    std::vector<float> probs, best;
    for (const auto & layer : store.layers) {
        const int64_t D = layer.n_embd_head;
        const int64_t H = layer.n_head_kv;
        const int64_t G = layer.n_head/layer.n_head_kv;

        scratch_t scratch;
        ggml_tensor * t_cells = ggml_new_tensor_1d(scratch.ctx.get(), GGML_TYPE_I32, n);
        ggml_tensor * t_slots = ggml_new_tensor_1d(scratch.ctx.get(), GGML_TYPE_I32, n_queries);
        ggml_tensor * t_mask  = ggml_new_tensor_2d(scratch.ctx.get(), GGML_TYPE_F16, n, n_queries);
        ggml_tensor * t_probs = ggml_new_tensor_3d(scratch.ctx.get(), GGML_TYPE_F32, n, n_queries, G);
        scratch.alloc(layer.buft);
        set_data(t_cells, cells);
        set_data(t_slots, slots);
        set_data(t_mask,  causal_mask(n, n_queries));

        ggml_tensor * k_all = storage_of(*stage, layer.il, false);
        for (int64_t ih = 0; ih < H; ++ih) {
            runner.begin();
            ggml_context * ctx = runner.ctx.get();
            ggml_tensor * q = queries_of_head(ctx, ring_of_layer[layer.il], t_slots, layer, ih);
            ggml_tensor * k = ggml_view_2d(ctx, k_all, D, k_all->ne[1], k_all->nb[1], ih*ggml_row_size(k_all->type, D));
            ggml_tensor * p = ggml_mul_mat(ctx, ggml_get_rows(ctx, k, t_cells), ggml_reshape_2d(ctx, q, D, n_queries*G));
            ggml_prec_set_acc(p, GGML_PREC_F32);
            p = headkv_build_soft_max(ctx, ggml_reshape_3d(ctx, p, n, n_queries, G), t_mask, layer.attend->scale, layer.attend->softcap);
            ggml_build_forward_expand(runner.gf, ggml_cpy(ctx, p, t_probs));
            if (!runner.run()) {
                return fail("a graph could not be computed");
            }
            probs.resize(n*n_queries*G);
            ggml_backend_tensor_get(t_probs, probs.data(), 0, probs.size()*sizeof(float));
            for (int64_t j = 0; j < n_queries*G; ++j) {
                const float * row = probs.data() + j*n;
                const size_t  i   = (j % n_queries)*n_all + layer.il*n_row + ih*G + j/n_queries;
                best.assign(row, row + n);
                std::nth_element(best.begin(), best.begin() + n_top - 1, best.end(), std::greater<float>());
                const float least = best[n_top - 1];
                int64_t n_equal = n_top - std::count_if(row, row + n, [&](float x) { return x > least; }); // of equals, the first ones
                double sum = 0.0;
                for (int64_t pos = 0; pos < n; ++pos) {
                    if (row[pos] > least || (row[pos] == least && n_equal-- > 0)) {
                        sum += inside[pos] ? row[pos] : 0.0f;
                    }
                }
                mass[i] = (float) sum;
                top [i] = (int32_t) (std::max_element(row, row + n) - row);
            }
        }
    }
    return true;
}

static void read_rows(ggml_tensor * t, size_t offset, size_t nb_row, int64_t n_embd, int64_t n_rows, float * dst) {
    std::vector<uint8_t> raw(ggml_row_size(t->type, n_embd));
    for (int64_t i = 0; i < n_rows; ++i) {
        ggml_backend_tensor_get(t, raw.data(), offset + i*nb_row, raw.size());
        if (t->type == GGML_TYPE_F32) {
            memcpy(dst + i*n_embd, raw.data(), raw.size());
        } else {
            ggml_get_type_traits(t->type)->to_float(raw.data(), dst + i*n_embd, n_embd);
        }
    }
}

int32_t llama_kv_cache_ragged::read_window(llama_seq_id seq_id, int32_t il, float * dst, int64_t n) const {
    const auto slots = window_slots(seq_id, (llama_pos) cfg->window);
    ggml_tensor * ring = get_ring(il);
    if (slots.empty() || !ring) {
        fail("no window queries: the sequence is not being read");
        return -1;
    }
    if ((int64_t) slots.size()*ring->ne[0] > n) {
        fail(format("room for %lld values, %lld are needed", (long long) n, (long long) slots.size()*ring->ne[0]));
        return -1;
    }
    for (size_t i = 0; i < slots.size(); ++i) {
        read_rows(ring, slots[i]*ring->nb[1], ring->nb[1], ring->ne[0], 1, dst + i*ring->ne[0]);
    }
    return (int32_t) slots.size();
}

int32_t llama_kv_cache_ragged::read_cells(llama_seq_id seq_id, int32_t il, int32_t ih, bool v, float * dst, int64_t n) const {
    const seq_t & seq = seqs[seq_id];
    const headkv_store_layer * layer = const_cast<headkv_store &>(store).find(il);
    const int64_t D = layer->n_embd_head;

    if (seq.state == LAYERED) {
        fail(format("sequence %d was read layer by layer and is not compressed yet: call headkv_end_prompt() first", seq_id));
        return -1;
    }
    const int64_t n_rows = seq.state == STORED ? layer->ranges[seq_id][ih].n_kept + (seq.n_pos - seq.n_prompt) : seq.n_pos;
    if (n_rows*D > n) {
        fail(format("room for %lld values, %lld are needed", (long long) n, (long long) n_rows*D));
        return -1;
    }
    if (seq.state == STORED) {
        ggml_tensor * pool = v ? layer->v : layer->k;
        read_rows(pool, layer->ranges[seq_id][ih].off*pool->nb[1], pool->nb[1], D, n_rows, dst);
    } else if (seq.state == STAGED) {
        ggml_tensor * all = storage_of(*stage, il, v);
        const auto cells = stage_cells(seq_id);
        for (int64_t i = 0; i < n_rows; ++i) {
            read_rows(all, cells[i]*all->nb[1] + ih*ggml_row_size(all->type, D), all->nb[1], D, 1, dst + i*D);
        }
    }
    return (int32_t) n_rows;
}

//
// llama_kv_cache_ragged_context
//

llama_kv_cache_ragged_context::llama_kv_cache_ragged_context(llama_memory_status status) : status(status) {}

llama_kv_cache_ragged_context::llama_kv_cache_ragged_context(llama_kv_cache_ragged * kv) :
    kv(kv), status(LLAMA_MEMORY_STATUS_SUCCESS), full(true) {
    stage_ctxs.push_back(std::make_unique<llama_kv_cache_context>(kv->stage_plan.get()));
}

llama_kv_cache_ragged_context::llama_kv_cache_ragged_context(
        llama_kv_cache_ragged * kv,
        std::vector<llama_ubatch> ubatches_store,
        std::vector<llama_ubatch> ubatches_stage,
        llama_kv_cache::slot_info_vec_t sinfos,
        bool layered) :
    kv(kv), status(LLAMA_MEMORY_STATUS_SUCCESS), layered(layered),
    ubatches_store(std::move(ubatches_store)), ubatches_stage(std::move(ubatches_stage)) {
    for (size_t i = 0; i < sinfos.size() && !layered; ++i) {
        stage_ctxs.push_back(std::make_unique<llama_kv_cache_context>(kv->stage.get(),
                    llama_kv_cache::slot_info_vec_t{ sinfos[i] }, std::vector<llama_ubatch>{ this->ubatches_stage[i] }));
    }
    if (layered) {
        for (const auto & ubatch : this->ubatches_stage) {
            no_output.resize(std::max<size_t>(no_output.size(), ubatch.n_tokens), 0);
        }
        for (const auto & ubatch : this->ubatches_stage) {
            ubatches_silent.push_back(ubatch);
            ubatches_silent.back().output = no_output.data();
        }
    }
}

int32_t llama_kv_cache_ragged_context::layer_step() const {
    return layered ? kv->reading->i_layer : 0;
}

int64_t llama_kv_cache_ragged_context::token_step() const {
    return layered ? kv->reading->i_token : 0;
}

size_t llama_kv_cache_ragged_context::i_stage() const {
    return layered ? kv->reading->i_ubatch : i_cur - ubatches_store.size();
}

bool llama_kv_cache_ragged_context::next() {
    if (!is_layered()) {
        return ++i_cur < ubatches_store.size() + ubatches_stage.size();
    }
    auto & step = *kv->reading;
    step.i_token += ubatches_stage[step.i_ubatch].n_tokens;
    if (++step.i_ubatch == ubatches_stage.size()) {
        step.i_ubatch = 0;
        step.i_token  = 0;
        ++step.i_layer;
    }
    if (step.i_layer == kv->n_layer()) {
        kv->reading.reset();
        return false;
    }
    const bool is_last = step.i_layer == kv->n_layer() - 1 && step.i_ubatch == ubatches_stage.size() - 1;
    step.paused = kv->t_pause > 0 && (is_last || ggml_time_us() >= kv->t_pause);
    return !step.paused;
}

bool llama_kv_cache_ragged_context::apply() {
    const llama_ubatch & ubatch = get_ubatch();
    const int32_t i_layer = layer_step();
    if (is_layered()) {
        kv->reading->begun  = true;
        kv->reading->paused = false;
    }
    if (kv->progress && !is_store()) {
        const int32_t n_layer  = layered ? kv->n_layer() : 1;
        const int32_t n_before = layered ? (int32_t) token_step() : ubatch.pos[0];
        const int32_t n_tokens = layered ? (int32_t) kv->hidden->ne[1] : (int32_t) std::max<uint32_t>(kv->n_announced, ubatch.pos[0] + ubatch.n_tokens);
        if (!kv->progress(i_layer, n_layer, n_before, n_tokens, kv->progress_data)) {
            return kv->fail("aborted");
        }
    }
    if (is_layered() && i_layer > 0) {
        // cells and positions are those of the first layer
        return i_stage() > 0 || kv->end_layer(i_layer - 1);
    }
    if (!is_store() && !(layered ? kv->reading->stage_ctxs : stage_ctxs)[i_stage()]->apply()) {
        return false;
    }
    const llama_pos n_window = kv->n_ring;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        auto & seq = kv->seqs[ubatch.seq_id[i][0]];
        const bool same = seq.n_pos == 0 || seq.adapters == kv->adapters;
        seq.adapters = same ? kv->adapters : llama_kv_cache_ragged::SEVERAL_ADAPTERS;
        seq.n_pos = ubatch.pos[i] + 1;
        if (!is_store()) {
            seq.state = layered ? llama_kv_cache_ragged::LAYERED : llama_kv_cache_ragged::STAGED;
            seq.window.resize(n_window, -1);
            seq.window[ubatch.pos[i] % n_window] = ubatch.pos[i];
        }
    }
    return true;
}

llama_memory_status llama_kv_cache_ragged_context::get_status() const {
    return status;
}

const llama_ubatch & llama_kv_cache_ragged_context::get_ubatch() const {
    if (is_store()) {
        return ubatches_store[i_cur];
    }
    return layered && layer_step() < kv->n_layer() - 1 ? ubatches_silent[i_stage()] : ubatches_stage[i_stage()];
}

const llama_kv_cache_context * llama_kv_cache_ragged_context::get_stage() const {
    return (layered ? kv->reading->stage_ctxs : stage_ctxs).at(i_stage()).get();
}

headkv_store_layer * llama_kv_cache_ragged_context::get_layer(int32_t il) const {
    return full ? kv->store_plan.find(il) : kv->store.find(il);
}

ggml_tensor * llama_kv_cache_ragged_context::get_ring(int32_t il) const {
    return full ? kv->ring_of_layer_plan[il] : kv->get_ring(il);
}

uint64_t llama_kv_cache_ragged_context::generation() const {
    return kv->store.generation;
}

// rows of the range of a head after the ubatch was applied
static uint32_t n_rows_used(const headkv_range & range, const llama_kv_cache_ragged::seq_t & seq) {
    return range.n_kept + (seq.n_pos - seq.n_prompt);
}

void llama_kv_cache_ragged_context::set_input_rows(ggml_tensor * dst, const llama_ubatch * ubatch) const {
    std::vector<int32_t> data;
    data.reserve(dst->ne[0]);
    for (const auto & layer : kv->store.layers) {
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            const llama_seq_id s = ubatch->seq_id[i][0];
            const uint32_t i_tail = ubatch->pos[i] - kv->seqs[s].n_prompt;
            for (const auto & range : layer.ranges[s]) {
                GGML_ASSERT(range.n_kept + i_tail < range.n_cap);
                data.push_back((int32_t) (range.off + range.n_kept + i_tail));
            }
        }
    }
    ggml_backend_tensor_set(dst, data.data(), 0, data.size()*sizeof(int32_t));
}

void llama_kv_cache_ragged_context::set_input_ranges(ggml_tensor * dst, const llama_ubatch * ubatch) const {
    std::vector<int32_t> data;
    data.reserve(dst->ne[0]);
    for (const auto & layer : kv->store.layers) {
        for (uint32_t i = 0; i < ubatch->n_seqs_unq; ++i) {
            const llama_seq_id s = ubatch->seq_id_unq[i];
            for (const auto & range : layer.ranges[s]) {
                data.push_back((int32_t) range.off);
                data.push_back((int32_t) n_rows_used(range, kv->seqs[s]));
            }
        }
    }
    ggml_backend_tensor_set(dst, data.data(), 0, data.size()*sizeof(int32_t));
}

// what the first row of a range gets on top of its logit
static float first_bias(const headkv_range & range, const llama_kv_cache_ragged::seq_t & seq) {
    return range.compensates() ? std::log((float) (seq.n_prompt - ((llama_pos) range.n_kept - 1))) : 0.0f;
}

void llama_kv_cache_ragged_context::set_input_bias(ggml_tensor * dst, const llama_ubatch * ubatch) const {
    std::vector<float> data;
    data.reserve(dst->ne[0]);
    for (const auto & layer : kv->store.layers) {
        for (uint32_t i = 0; i < ubatch->n_seqs_unq; ++i) {
            const llama_seq_id s = ubatch->seq_id_unq[i];
            for (const auto & range : layer.ranges[s]) {
                data.push_back(first_bias(range, kv->seqs[s]));
            }
        }
    }
    ggml_backend_tensor_set(dst, data.data(), 0, data.size()*sizeof(float));
}

void llama_kv_cache_ragged_context::set_input_mask(ggml_tensor * dst, const headkv_store_layer & layer, size_t i_bucket, const llama_ubatch * ubatch) const {
    const llama_seq_id s = ubatch->seq_id[0][0];
    const auto & bucket  = layer.buckets[s][i_bucket];

    const int64_t n_kv     = dst->ne[0];
    const int64_t n_tokens = dst->ne[1];

    std::vector<ggml_fp16_t> data(ggml_nelements(dst), ggml_fp32_to_fp16(-INFINITY));
    for (size_t j = 0; j < bucket.heads.size(); ++j) {
        const headkv_range & range = layer.ranges[s][bucket.heads[j]];
        const int64_t n_used = n_rows_used(range, kv->seqs[s]);
        for (int64_t t = 0; t < n_tokens; ++t) {
            ggml_fp16_t * row = data.data() + (j*n_tokens + t)*n_kv;
            std::fill(row, row + std::max<int64_t>(0, n_used - (n_tokens - 1 - t)), ggml_fp32_to_fp16(0.0f));
            row[0] = ggml_fp32_to_fp16(n_used > n_tokens - 1 - t ? first_bias(range, kv->seqs[s]) : -INFINITY);
        }
    }
    ggml_backend_tensor_set(dst, data.data(), 0, ggml_nbytes(dst));
}

void llama_kv_cache_ragged_context::set_input_window(ggml_tensor * tokens, ggml_tensor * slots, const llama_ubatch * ubatch) const {
    const int64_t n_window = kv->n_ring;
    const int64_t n        = tokens->ne[0];

    std::vector<int32_t> data_tokens;
    std::vector<int64_t> data_slots;
    std::vector<int64_t> n_seen(kv->seqs.size(), 0);
    for (int64_t i = (int64_t) ubatch->n_tokens - 1; i >= 0 && (int64_t) data_tokens.size() < n; --i) {
        const llama_seq_id s = ubatch->seq_id[i][0];
        if (n_seen[s]++ < n_window) {
            data_tokens.push_back((int32_t) i);
            data_slots.push_back(s*n_window + ubatch->pos[i] % n_window);
        }
    }
    while ((int64_t) data_tokens.size() < n) {
        data_tokens.push_back(0);
        data_slots.push_back(kv->n_slots() - 1);
    }
    ggml_backend_tensor_set(tokens, data_tokens.data(), 0, n*sizeof(int32_t));
    ggml_backend_tensor_set(slots,  data_slots.data(),  0, n*sizeof(int64_t));
}
