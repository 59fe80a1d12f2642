// What a prompt takes, without reading it: the sizes of what the staging, a compression and the store allocate.
// Beside the code that allocates: headkv-staging.cpp, the work_t of headkv-compress.cpp, headkv-score.cpp, headkv-select.cpp.

#include "llama-kv-cache-ragged.h"

#include "headkv-budget.h"
#include "headkv-expected.h"
#include "headkv-op.h"
#include "headkv-refs.h"

#include <algorithm>
#include <set>
#include <utility>

// Over the layers; shared: those of one size in one kind of memory have it together, as where a prompt is read layer by layer.
template <typename F>
static int64_t sum_bytes(const headkv_store & store, bool shared, const F & bytes_of) {
    std::set<std::pair<ggml_backend_buffer_type_t, int64_t>> seen;
    int64_t res = 0;
    for (const auto & layer : store.layers) {
        const int64_t n = bytes_of(layer);
        res += !shared || seen.insert({ layer.buft, n }).second ? n : 0;
    }
    return res;
}

// the most that a compression has besides, in one layer: its tensors, and either the score op or the select op
static int64_t scratch_bytes(const headkv_layer_shape & layer, const headkv_config & cfg, int64_t n, int n_threads) {
    const int64_t H = layer.n_head_kv;
    const int64_t n_window = std::min<int64_t>(cfg.window, n);
    const int64_t n_kept = H * std::min<int64_t>(cfg.kv_size, n) * sizeof(int32_t);
    const int64_t n_query = (int64_t) layer.n_head * layer.n_embd_head_k;
    const int64_t n_chunk = (n + HEADKV_SCORE_CHUNK - 1) / HEADKV_SCORE_CHUNK;

    const int64_t tensors = n * (H + 1) * sizeof(float) + n_kept + (n_window + cfg.recent + 5 * H) * sizeof(int32_t) + 10 * 64; // and what aligns them
    const int64_t score = n_window * sizeof(float) * (n_query + 2 * layer.n_head * n_chunk) + n * H * sizeof(float); // queries, sums, result
    const int64_t select = 2 * n * H * sizeof(int32_t) + n_kept; // sort keys, result
    const int64_t expected = cfg.rank->by_refs ? headkv_expected_bytes(layer, n) : 0;
    const int64_t fit = cfg.fit == HEADKV_FIT_VALUES ? headkv_fit_bytes(layer, n, n_threads) : 0;
    return tensors + std::max({ score, select, expected }) + fit;
}

headkv_footprint llama_kv_cache_ragged::footprint(const headkv_config & with, uint32_t n_prompt, uint32_t n_predict, bool layered, int64_t n_ubatch) const {
    const int64_t n_cells = GGML_PAD((int64_t) n_prompt, 256); // upstream attends multiples of 256 cells
    const int64_t n_sure = headkv_n_protected(with, n_prompt) + with.recent;
    const int64_t n_kept = std::min<int64_t>(std::max<int64_t>(with.kv_size, n_sure), n_prompt);
    const auto & bound = with.generated;
    const uint32_t n_held = bound.n_cells > 0 ? std::min(n_predict, bound.n_cells + bound.n_slack) : n_predict;
    const int64_t n_tail = std::max<int64_t>(headkv_n_tail(with, n_prompt), n_held);

    const int64_t n_slots = (int64_t) with.window * seqs.size() + 1;
    const int64_t n_refs = headkv_needs_refs(with) ? std::min<int64_t>(HEADKV_REF_SLOTS, n_ctx_seq) * seqs.size() + 1 : 0;

    headkv_footprint res = {};
    res.size = sizeof(res);
    res.staging = n_cells * sum_bytes(the_store, layered, [](const headkv_layer_shape & s) { return (int64_t) s.n_bytes_cell(); });
    res.ring = sum_bytes(the_store, layered, [n_slots](const headkv_layer_shape & s) { return (int64_t) s.n_embd_head_k * s.n_head * n_slots * (int64_t) sizeof(float); });
    res.ring += sum_bytes(the_store, layered, [n_refs](const headkv_layer_shape & s) { return (int64_t) s.n_embd_head_k * s.n_head_kv * n_refs * (int64_t) sizeof(ggml_fp16_t); });
    res.ring += (int64_t) bytes_queries();
    res.hidden = layered ? the_staging.hidden_bytes(n_prompt, n_ubatch, with.hidden_f16) : 0;
    res.store = (n_kept + n_tail) * (int64_t) bytes_cell();
    res.beside = (int64_t) bytes_beside();
    for (const auto & layer : the_store.layers) {
        res.scratch = std::max(res.scratch, scratch_bytes(layer, with, n_prompt, (int) cparams.n_threads_batch));
    }
    return res;
}
