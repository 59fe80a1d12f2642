#include "llama-kv-cache-ragged.h"

#include "headkv-attend-prompt.h"
#include "headkv-budget.h"
#include "headkv-error.h"
#include "headkv-refs.h"
#include "headkv-runner.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <tuple>

//
// construction
//

static headkv_heads heads_of(const llama_hparams & hparams, const headkv_layer_owners & owners) {
    headkv_heads res;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        res.n_head_kv.push_back(owners.ours[il] ? hparams.n_head_kv(il) : 0);
        res.n_head.push_back(owners.ours[il] ? hparams.n_head(il) : 0);
    }
    return res;
}

llama_kv_cache_ragged::llama_kv_cache_ragged(
        const llama_model & model,
        headkv_layer_owners owners,
        ggml_type type_k,
        ggml_type type_v,
        const llama_cparams & cparams,
        headkv_config_ptr cfg) :
    model(model), hparams(model.hparams), cfg(std::move(cfg)), n_ctx_seq(cparams.n_ctx_seq), cparams(cparams), type_k(type_k), type_v(type_v),
    owners(std::move(owners)), heads(heads_of(hparams, this->owners)), budgets(headkv_budget(*this->cfg, heads)), seqs(cparams.n_seq_max),
    the_staging(model, staging_params(), shapes(), this->owners.shared) {
    make_layers(the_store);
    make_layers(the_store_twin);
    make_twin();
    if (this->owners.any_beside()) {
        the_beside = std::make_unique<headkv_beside>(model, this->owners, type_k, type_v, cparams);
    }
    if (this->cfg->generated.n_cells > 0) {
        if (hparams.use_alibi) {
            refuse("kv_generated is not built for ALiBi, whose bias the scores of generated cells would lack: leave it out");
        }
        the_queries = std::make_unique<headkv_queries>(shapes(), (llama_pos) this->cfg->window + HEADKV_N_DRAFT, cparams.n_seq_max, hparams.no_alloc);
    }
    if (const std::string why_not = why_no_fit(*this->cfg); !why_not.empty()) {
        throw std::invalid_argument(why_not);
    }
    log_created();
}

llama_kv_cache_ragged::~llama_kv_cache_ragged() = default;

std::string llama_kv_cache_ragged::why_no_fit(const headkv_config & c) const {
    if (hparams.use_alibi && c.fit != HEADKV_FIT_NONE) {
        return format("policy '%s' changes the values of cells, which is not built for ALiBi: use policy 'headkv' or 'snapkv'", c.policy.c_str());
    }
    return c.fit == HEADKV_FIT_VALUES ? headkv_why_no_fit(the_store.layers) : "";
}

headkv_staging::params_t llama_kv_cache_ragged::staging_params() const {
    return { type_k, type_v, cparams.offload_kqv, cparams.n_ctx, cparams.n_seq_max, (llama_pos) cfg->window,
        headkv_needs_refs(*cfg) ? std::min<int64_t>(HEADKV_REF_SLOTS, n_ctx_seq) : 0, cfg->rank->by_sums, cfg->hidden_f16, masks() };
}

std::vector<headkv_layer_shape> llama_kv_cache_ragged::shapes() const {
    std::vector<headkv_layer_shape> res;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!owners.ours[il]) {
            continue;
        }
        headkv_layer_shape shape;
        shape.il = il;
        shape.n_head = hparams.n_head(il);
        shape.n_head_kv = hparams.n_head_kv(il);
        shape.n_embd_head_k = hparams.n_embd_head_k(il);
        shape.n_embd_head_v = hparams.n_embd_head_v(il);
        shape.type_k = type_k;
        shape.type_v = type_v;
        shape.buft = cparams.offload_kqv ? ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type();
        res.push_back(shape);
    }
    return res;
}

// whether the prompt's attention in a layer is the fused op: not where existing ggml ops are asked for, its memory is not the CPU's, or with ALiBi
bool llama_kv_cache_ragged::reads_fused(const headkv_layer_shape & shape) const {
    return cfg->attend != HEADKV_ATTEND_COMPOSED && !hparams.use_alibi && headkv_is_cpu(shape.buft) && headkv_prompt_takes(shape.type_k, shape.type_v);
}

bool llama_kv_cache_ragged::masks() const {
    const auto all = shapes();
    return !std::all_of(all.begin(), all.end(), [this](const headkv_layer_shape & s) { return reads_fused(s); });
}

// what a layer has that our op may not take, and what it takes
static std::string why_composed(const headkv_store_layer & layer) {
    return format("layer %d with K heads of %d and V heads of %d, of types %s and %s, on %s: "
                  "the CPU has it for types with a dot product, CUDA and Metal for K and V of one size, 64, 80, 96, 128 or 256, and both f16, bf16 or q8_0",
            layer.il, layer.n_embd_head_k, layer.n_embd_head_v, ggml_type_name(layer.type_k), ggml_type_name(layer.type_v), ggml_backend_buft_name(layer.buft));
}

void llama_kv_cache_ragged::make_layers(headkv_store & store) const {
    for (const auto & shape : shapes()) {
        headkv_store_layer layer;
        static_cast<headkv_layer_shape &>(layer) = shape;
        layer.attend = std::make_unique<headkv_attend_state>(layer.n_embd_head_k, layer.n_embd_head_v, layer.n_head, layer.n_head_kv, (int) seqs.size(), type_k, type_v);

        const bool can_fuse = headkv_can_attend_fused(layer);
        if (cfg->attend == HEADKV_ATTEND_FUSED && !can_fuse) {
            throw std::invalid_argument(format("attend 'fused' is not possible in %s; use 'composed'", why_composed(layer).c_str()));
        }
        layer.fused = can_fuse && cfg->attend != HEADKV_ATTEND_COMPOSED;
        layer.fused_prompt = reads_fused(layer);
        const char * what = hparams.use_alibi ? "ALiBi" : model.arch == LLM_ARCH_GROK ? "its cap of logits"
                                                                                      : nullptr;
        if (what && !(layer.fused && headkv_is_cpu(layer.buft))) {
            refuse(format("%s needs attend 'fused' on the CPU: use attend 'auto', types with a dot product, and no GPU layers", what));
        }
        store.layers.push_back(std::move(layer));
    }
}

// the store as it is at its largest
void llama_kv_cache_ragged::make_twin() {
    const auto & c = *cfg;
    the_store_twin.no_alloc = true;
    for (auto & layer : the_store_twin.layers) {
        std::vector<uint32_t> n_kept;
        for (int32_t ih = 0; ih < layer.n_head_kv; ++ih) {
            // the fused op's scratch grows with the rows, the composed graph with the longest range
            const auto & b = budgets[layer.il];
            const bool moves = c.budget->adapts || c.budget->by_replay || c.surplus != HEADKV_SURPLUS_LOST;
            const uint32_t n_most = moves ? std::accumulate(b.begin(), b.end(), 0u) : b[ih];
            const uint32_t n_sure = (uint32_t) headkv_n_protected(c, n_ctx_seq) + c.recent;
            n_kept.push_back(layer.fused || c.fit == HEADKV_FIT_MEAN ? n_ctx_seq : std::min(n_ctx_seq, std::max(n_most, n_sure)));
        }
        for (size_t s = 0; s < seqs.size(); ++s) {
            the_store_twin.relayout(layer, { { (int32_t) s, { n_kept, headkv_n_tail(c, n_ctx_seq), {} } } }, c.n_buckets);
        }
    }
}

void llama_kv_cache_ragged::log_created() const {
    uint64_t n_cells = 0;
    uint64_t n_heads = 0;
    for (const auto & of_layer : budgets) {
        n_cells = std::accumulate(of_layer.begin(), of_layer.end(), n_cells);
        n_heads += of_layer.size();
    }
    const auto & layers = the_store.layers;
    const int n_fused = (int) std::count_if(layers.begin(), layers.end(), [](const headkv_store_layer & l) { return l.fused; });
    LLAMA_LOG_INFO("%s: policy %s, kv_size %u: %.1f cells per KV head of %llu, window %u, power %d, recent %u, beta %g, attend fused in %d of %d layers, else composed\n", "llama_kv_cache_ragged",
            cfg->policy.c_str(), cfg->kv_size, (double) n_cells / n_heads, (unsigned long long) n_heads,
            cfg->window, 1 << cfg->n_square, cfg->recent, cfg->beta, n_fused, (int) layers.size());
    const auto first = std::find_if(layers.begin(), layers.end(), [](const headkv_store_layer & l) { return !l.fused; });
    if (first != layers.end() && cfg->attend == HEADKV_ATTEND_AUTO) {
        LLAMA_LOG_INFO("%s: attend is not fused in %s\n", "llama_kv_cache_ragged", why_composed(*first).c_str());
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
    for (const auto & layer : the_store.layers) {
        res = std::max(res, layer.n_head);
    }
    return res;
}

size_t llama_kv_cache_ragged::bytes_cell() const {
    size_t res = 0;
    for (const auto & layer : the_store.layers) {
        res += layer.n_bytes_cell();
    }
    return res;
}

void llama_kv_cache_ragged::note_peak() {
    n_bytes_peak = std::max({ n_bytes_peak, the_staging.n_bytes() + the_store.n_bytes() + ring_rows.n_bytes(), running ? running->n_peak() : 0 });
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_ragged::memory_breakdown() const {
    if (hparams.no_alloc) {
        auto res = const_cast<headkv_staging &>(the_staging).twin().memory_breakdown(); // the peak while a prompt of n_ctx tokens is read
        if (the_beside) {
            the_beside->add_to(res);
        }
        if (the_queries) {
            the_queries->add_to(res);
        }
        return res;
    }
    std::map<ggml_backend_buffer_type_t, size_t> res;
    if (the_beside) {
        the_beside->add_to(res);
    }
    if (the_queries) {
        the_queries->add_to(res);
    }
    the_staging.add_to(res);
    for (const auto & layer : the_store.layers) {
        if (layer.buf) {
            res[layer.buft] += ggml_backend_buffer_get_size(layer.buf.get());
        }
    }
    return res;
}

//
// sequences
//

bool llama_kv_cache_ragged::get_can_shift() const {
    return false; // a cell has no single successor to shift
}

uint32_t llama_kv_cache_ragged::n_staged() const {
    uint32_t res = 0;
    for (const auto & seq : seqs) {
        res += seq.is_staged() ? seq.n_pos : 0;
    }
    return res;
}

void llama_kv_cache_ragged::clear(bool data) {
    GGML_UNUSED(data); // memory is cleared when it is allocated
    if (is_called_back) {
        headkv_fail("the cache cannot be cleared while the progress is told: return false and clear it then");
        return;
    }
    abort_compression();
    the_pass.reset();
    for (auto & seq : seqs) {
        seq.on(HEADKV_EV_REMOVE);
    }
    if (the_beside) {
        the_beside->clear();
    }
    ring_rows.forget();
    broken.clear();
    release_idle();
}

void llama_kv_cache_ragged::drop_pass(llama_seq_id seq_id, bool gives_up) {
    the_pass.reset();
    abort_compression();
    the_staging.cache().clear(false);
    drop_beside(seq_id);
    headkv_seq & seq = seqs[seq_id];
    const auto announced_cfg = std::make_pair(seq.cfg_next, seq.n_next);
    seq.on(HEADKV_EV_REMOVE);
    if (!gives_up) {
        std::tie(seq.cfg_next, seq.n_next) = announced_cfg; // it failed and may come again
    }
    release_idle();
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
    headkv_seq & seq = seqs[seq_id];

    if (is_called_back) {
        return headkv_fail(format("sequence %d cannot be removed while the progress is told: return false and remove it then", seq_id));
    }
    if (is_reading(seq_id) && the_pass->paused && (p0 > 0 || (p0 == 0 && announced.seq_id == seq_id))) {
        return true; // it counts as empty, and upstream removes what is there before the batch that was announced
    }
    const bool gives_up = p0 < 0; // upstream clears with 0 what it is about to fill
    p0 = std::max<llama_pos>(p0, 0);
    ring_rows.cut(seq_id, p0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    if (p0 >= std::min(p1, seq.n_pos) && !is_reading(seq_id)) {
        if (gives_up && seq.state == HEADKV_SEQ_EMPTY) {
            seq.on(HEADKV_EV_REMOVE); // what was announced for it
        }
        release_idle(); // a prompt that failed with its first ubatch has left it
        return true;
    }
    if (p1 < seq.n_pos) {
        const bool can = why_not_dropped(seq_id, p0, p1).empty();
        if (can) {
            drop(seq_id, p0, p1);
        }
        return can;
    }
    if (seq.state == HEADKV_SEQ_LAYERED && !is_reading(seq_id) && p0 > 0) {
        return false; // it is to be compressed first
    }
    if (is_reading(seq_id) || seq.state == HEADKV_SEQ_LAYERED) {
        drop_pass(seq_id, gives_up); // upstream cleans up after a failed or aborted ubatch: no part of the prompt is complete
        return p0 == 0;
    }
    if (p0 == 0) {
        if (seq.is_staged()) {
            the_staging.cache().seq_rm(seq_id, -1, -1);
        }
        drop_beside(seq_id);
        seq.on(HEADKV_EV_REMOVE);
        release_idle();
        drop_rows(seq_id);
        return true;
    }
    if (!seq.can_cut(p0) || (the_beside && !the_beside->remove(seq_id, p0))) {
        return false;
    }
    const llama_pos n_gone = seq.cut(p0);
    if (seq.is_staged()) {
        the_staging.cache().seq_rm(seq_id, p0, -1);
    } else {
        the_store.cut(seq_id, n_gone);
    }
    return true;
}

void llama_kv_cache_ragged::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    if (seq_id_src != seq_id_dst) {
        broken = format("sequence %d was copied to %d, which the ragged cache cannot do", seq_id_src, seq_id_dst);
        headkv_fail(broken);
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
        headkv_fail(broken);
    }
}

void llama_kv_cache_ragged::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    if (d != 1) {
        broken = format("the positions of sequence %d were divided, which the ragged cache cannot do", seq_id);
        headkv_fail(broken);
    }
}

llama_pos llama_kv_cache_ragged::seq_pos_min(llama_seq_id seq_id) const {
    const bool is_known = seq_id >= 0 && (size_t) seq_id < seqs.size();
    if (!is_known || is_reading(seq_id) || seqs[seq_id].n_pos == 0) {
        return -1; // nothing of upstream's catches an exception here
    }
    const llama_pos beside = the_beside ? std::min(the_beside->pos_min(seq_id), seqs[seq_id].n_pos - 1) : 0;
    return std::max(seqs[seq_id].pos_min(), beside);
}

llama_pos llama_kv_cache_ragged::seq_pos_max(llama_seq_id seq_id) const {
    const bool is_known = seq_id >= 0 && (size_t) seq_id < seqs.size();
    return !is_known || is_reading(seq_id) ? -1 : seqs[seq_id].n_pos - 1; // logical, whatever number of cells is left
}

void llama_kv_cache_ragged::drop_rows(llama_seq_id seq_id) {
    if (the_store.has(seq_id)) {
        if (lctx) {
            lctx->synchronize();
        }
        the_store.remove(seq_id, cfg->n_buckets);
    }
}

void llama_kv_cache_ragged::drop_beside(llama_seq_id seq_id) {
    if (the_beside) {
        the_beside->remove(seq_id, 0);
    }
}

void llama_kv_cache_ragged::release_idle() {
    if (n_staged() == 0 && the_staging.n_bytes() > 0) {
        lctx->synchronize();
        the_staging.release();
    }
    const bool is_used = running || std::any_of(seqs.begin(), seqs.end(), [](const headkv_seq & seq) {
        return seq.state == HEADKV_SEQ_COMPRESSED || seq.state == HEADKV_SEQ_LAYERED;
    });
    if (!is_used && the_store.n_bytes() > 0) {
        if (lctx) {
            lctx->synchronize();
        }
        the_store.clear();
    }
}

llama_memory_context_ptr llama_kv_cache_ragged::init_full() {
    return std::make_unique<llama_kv_cache_ragged_context>(this);
}

//
// compression
//

bool llama_kv_cache_ragged::compress(llama_context * lctx, llama_seq_id seq_id, llama_seq_id seq_id_dst) {
    const headkv_seq & seq = seqs[seq_id];
    if (is_called_back) {
        return headkv_fail(format("sequence %d cannot be compressed while the progress is told", seq_id));
    }
    if (is_reading(seq_id)) {
        return headkv_fail(format("sequence %d is being read layer by layer: give its whole prompt again until it is read, or remove it", seq_id));
    }
    if (seq_id_dst != seq_id) {
        if (seq.state != HEADKV_SEQ_STAGED) {
            return headkv_fail(format("sequence %d is not a prompt that is held as a whole: read it in upstream's order, do not compress it", seq_id));
        }
        if (seqs[seq_id_dst].state != HEADKV_SEQ_EMPTY || is_reading(seq_id_dst)) {
            return headkv_fail(format("sequence %d is not empty: remove it first", seq_id_dst));
        }
    }
    if (seq.state == HEADKV_SEQ_COMPRESSED) {
        return true;
    }
    if (seq.state == HEADKV_SEQ_EMPTY) {
        return headkv_fail(format("sequence %d is empty: there is nothing to compress", seq_id));
    }
    if (!broken.empty()) {
        return headkv_fail(broken);
    }
    forget_updates();
    did_compress = false;
    seqs[seq_id].compress_to = seq_id_dst;
    lctx->memory_update(true);
    return did_compress;
}

void llama_kv_cache_ragged::begin_compression(llama_seq_id seq_id, llama_seq_id seq_id_dst) {
    const headkv_seq & seq = seqs[seq_id]; // copies are made by what the context is configured to
    const bool own = seq.cfg && seq_id == seq_id_dst;
    running = std::make_unique<headkv_compression>(lctx, the_staging, the_store, own ? seq.cfg : cfg, heads, seq, seq_id, seq_id_dst);
    begin_archiving(seq);
}

bool llama_kv_cache_ragged::compress_now(llama_seq_id seq_id) {
    const bool layered = seqs[seq_id].state == HEADKV_SEQ_LAYERED;
    try {
        if (!running) {
            begin_compression(seq_id, seqs[seq_id].compress_to);
        }
        for (auto & layer : the_store.layers) {
            // of a prompt that was read layer by layer, the last layer is left
            if (!layered || layer.il == n_layer() - 1) {
                running->layer(layer);
                note_peak();
            }
        }
        for (int32_t il : archived_ils) {
            if (!layered || il == n_layer() - 1) {
                archive_layer(il);
            }
        }
        if (the_beside && running->dst != seq_id) {
            the_beside->restore(running->dst, the_beside->save(seq_id));
        }
    } catch (const std::exception & e) {
        if (!layered) {
            abort_compression(); // the sequence stays in the staging
        }
        return headkv_fail(format("compression failed: %s", headkv_reason(e)));
    }
    end_compression();
    return true;
}

void llama_kv_cache_ragged::end_compression() {
    headkv_seq & prompt = seqs[running->seq_id];
    headkv_seq & dst = seqs[running->dst];
    const llama_seq_id id = running->dst;

    headkv_seq res = running->finish(prompt);
    res.n_tail_next = dst.n_tail_next; // of the batch that waits for the compression
    t_compress = running->t_us();
    n_compressions++;

    if (&dst == &prompt) {
        the_staging.cache().seq_rm(id, -1, -1);
    }
    dst.on(HEADKV_EV_STORE);
    dst = std::move(res);
    running.reset();
    end_archiving(dst, &dst == &prompt);
    if (&dst == &prompt && ring_rows.is_of(id)) {
        ring_rows.forget();
    }
    if (n_staged() == 0) {
        the_staging.release();
    }
    LLAMA_LOG_INFO("headkv: sequence %d: %d tokens, %.2f MiB of K/V -> %.2f MiB in %.1f ms, peak %.2f MiB\n", id, dst.n_pos,
            bytes_cell() * (double) dst.n_pos / 1024 / 1024, the_store.n_bytes() / 1024.0 / 1024.0, t_compress / 1000.0, n_bytes_peak / 1024.0 / 1024.0);
}

void llama_kv_cache_ragged::abort_compression() {
    if (running) {
        running->abort();
        if (running->dst != running->seq_id) {
            drop_beside(running->dst);
        }
        running.reset();
        writing.reset();
    }
}
