// Of a saved sequence, where generated tokens can be bounded:
//
//   u32 kv_generated, slack, window, scope, rank; i32 n_settled, i64 cells that were evicted, i32 evictions,
//   u32 spans, i32 [start, end) of each, u32 queries
//   of each layer: F16 [queries][n_embd_head_k*n_head], those of the last tokens

#include "headkv-state-io.h"

// last tokens whose queries are in the ring one after the other
static uint32_t n_queries(const headkv_seq & seq) {
    const auto n_ring = (llama_pos) seq.window.size();
    uint32_t res = 0;
    while (res < seq.bound.n_window && (llama_pos) res < n_ring && seq.n_pos > (llama_pos) res) {
        const llama_pos pos = seq.n_pos - 1 - (llama_pos) res;
        if (seq.window[pos % n_ring] != pos) {
            break;
        }
        res++;
    }
    return res;
}

void headkv_write_generated(headkv_writer & to, const headkv_seq & seq, llama_seq_id seq_id, const headkv_queries & queries, const headkv_store & store) {
    const auto & bound = seq.bound;
    for (uint32_t x : { bound.n_cells, bound.n_slack, bound.n_window, (uint32_t) bound.scope, (uint32_t) bound.rank }) {
        to.number(x);
    }
    to.number(seq.n_settled);
    to.number(seq.n_evicted);
    to.number(seq.n_evictions);
    to.number((uint32_t) seq.bound_spans.size());
    for (const auto & [start, end] : seq.bound_spans) {
        to.number(start);
        to.number(end);
    }
    const uint32_t n = n_queries(seq);
    to.number(n);
    const auto slots = seq.window_slots(seq_id, (llama_pos) n);
    for (const auto & layer : store.layers) {
        for (int32_t slot : slots) {
            to.rows(queries.of_layer(layer.il), slot, 1);
        }
    }
}

headkv_saved_queries headkv_read_generated(headkv_reader & from, headkv_seq & seq, const headkv_queries & queries, const headkv_store & store, const headkv_config_ptr & cfg) {
    headkv_saved_queries res;
    auto & bound = seq.bound;
    bound.n_cells = from.number<uint32_t>();
    bound.n_slack = from.number<uint32_t>();
    bound.n_window = from.number<uint32_t>();
    const auto scope = from.number<uint32_t>();
    const auto rank = from.number<uint32_t>();
    seq.n_settled = from.number<llama_pos>();
    seq.n_evicted = from.number<int64_t>();
    seq.n_evictions = from.number<int32_t>();
    const auto bounds = from.array<int32_t>(2 * (size_t) from.number<uint32_t>());
    for (size_t i = 0; i < bounds.size(); i += 2) {
        if (bounds[i] < (i > 0 ? bounds[i - 1] : 0) || bounds[i + 1] <= bounds[i] || bounds[i + 1] > seq.n_prompt) {
            throw std::runtime_error("it is damaged (protected cells)");
        }
        seq.bound_spans.push_back({ bounds[i], bounds[i + 1] });
    }
    res.n = from.number<uint32_t>();
    const bool is_none = bound.n_cells == 0 && res.n == 0;
    const bool is_bound = bound.n_cells > bound.n_window && bound.n_cells <= (uint32_t) HEADKV_MAX_CELLS && bound.n_slack > 0 && bound.n_slack <= 1 << 20 &&
            bound.n_window > 0 && scope <= HEADKV_SCOPE_ALL && rank <= HEADKV_GENERATED_REDUNDANCY;
    const bool ok = (is_none || is_bound) && seq.n_settled >= 0 && seq.n_settled <= seq.n_generated() && seq.n_evicted >= 0 && seq.n_evictions >= 0 &&
            (seq.n_settled > 0 || seq.n_evictions == 0) && res.n <= bound.n_window && (llama_pos) res.n <= seq.n_generated();
    if (!ok) {
        throw std::runtime_error("it is damaged (generated tokens)");
    }
    bound.scope = (headkv_scope) scope;
    bound.rank = (headkv_generated_rank) rank;
    if (bound.n_cells > 0) {
        if (bound.n_window > (uint32_t) (queries.n_ring() - HEADKV_N_DRAFT)) {
            throw std::runtime_error(format("its generated tokens are scored by %u queries, the context has room for %d (window)", bound.n_window, queries.n_ring() - HEADKV_N_DRAFT));
        }
        if (seq.selection != cfg->selection) {
            throw std::runtime_error("its generated tokens are bounded by the budgets of another policy, or with other options of it, than those of now");
        }
        seq.bound_cfg = cfg;
    }
    for (const auto & layer : store.layers) {
        const ggml_tensor * ring = queries.of_layer(layer.il);
        const auto & rows = res.of_layer.emplace_back(from.array<uint8_t>(res.n * ring->nb[1]));
        if (!ggml_validate_row_data(ring->type, rows.data(), rows.size())) {
            throw std::runtime_error("it is damaged (a query is not finite)");
        }
    }
    return res;
}

void headkv_put_queries(const headkv_saved_queries & saved, llama_seq_id seq_id, headkv_seq & seq, const headkv_queries & queries) {
    if (seq.bound.n_cells == 0) {
        return;
    }
    seq.window.assign(queries.n_ring(), -1);
    size_t i_layer = 0;
    for (const auto & [il, ring] : queries.layers()) {
        const auto & rows = saved.of_layer.at(i_layer++);
        for (uint32_t i = 0; i < saved.n; ++i) {
            const llama_pos pos = seq.n_pos - (llama_pos) (saved.n - i);
            const int64_t slot = (int64_t) seq_id * queries.n_ring() + pos % queries.n_ring();
            ggml_backend_tensor_set(ring, rows.data() + i * ring->nb[1], slot * ring->nb[1], ring->nb[1]);
            seq.window[pos % queries.n_ring()] = pos;
        }
    }
}
