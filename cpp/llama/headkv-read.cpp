#include "headkv-read.h"

#include "llama-kv-cache-ragged.h"

#include "headkv-error.h"
#include "headkv-op.h"
#include "headkv-stages.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <tuple>

//
// random contents
//

// one megabyte of random rows is repeated: what they hold does not matter to a benchmark
static void fill_rows(ggml_tensor * t, int64_t n_rows, const std::function<float()> & next) {
    const int64_t n_random = std::min<int64_t>(n_rows, std::max<int64_t>(1, (1 << 20) / (int64_t) t->nb[1]));
    std::vector<float> x(t->ne[0] * n_random);
    for (float & v : x) {
        v = next();
    }
    const size_t nb = ggml_row_size(t->type, t->ne[0]);
    std::vector<uint8_t> raw(nb * n_random);
    ggml_quantize_chunk(t->type, x.data(), raw.data(), 0, n_random, t->ne[0], nullptr);
    for (int64_t i = 0; i < n_rows; i += n_random) {
        ggml_backend_tensor_set(t, raw.data(), i * t->nb[1], nb * std::min(n_random, n_rows - i));
    }
}

bool headkv_fill(llama_kv_cache_ragged & kv, llama_context * lctx, llama_seq_id seq_id, uint32_t n_tokens, uint32_t seed) {
    headkv_seq & seq = kv.seq(seq_id);
    if (seq.state != HEADKV_SEQ_EMPTY) {
        throw std::invalid_argument("only an empty sequence can be filled");
    }
    if (kv.beside()) {
        throw std::invalid_argument("layers with windows or recurrent states cannot be filled: read a prompt");
    }
    if (!kv.make_room(lctx, n_tokens)) {
        return false;
    }
    headkv_staging & staging = kv.staging();
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal(0.0f, 1.0f);
    const auto next = [&]() { return normal(rng); };
    for (const auto & layer : kv.store().layers) {
        fill_rows(staging.rows(layer.il, false), n_tokens, next);
        fill_rows(staging.rows(layer.il, true), n_tokens, next);
        fill_rows(staging.ring(layer.il), staging.n_slots(), next);
        if (ggml_tensor * refs = staging.refs(layer.il)) {
            fill_rows(refs, refs->ne[1], next);
        }
    }
    for (uint32_t i = 0; i < n_tokens; ++i) {
        staging.occupy(seq_id, i, i + 1);
        seq.add(HEADKV_EV_STAGE, (llama_pos) i, seq.adapters, staging.n_ring(), staging.n_refs());
    }
    return true;
}

//
// attention
//

// mass in the marked positions of the n_top largest probabilities, and where the largest one is; of equals, the first ones count
static std::pair<float, int32_t> reduce_row(const float * row, const std::vector<bool> & inside, int32_t n_top, std::vector<float> & best) {
    const int64_t n = (int64_t) inside.size();
    best.assign(row, row + n);
    std::nth_element(best.begin(), best.begin() + n_top - 1, best.end(), std::greater<float>());
    const float least = best[n_top - 1];
    int64_t n_equal = n_top - std::count_if(row, row + n, [&](float x) { return x > least; });
    double sum = 0.0;
    for (int64_t pos = 0; pos < n; ++pos) {
        if (row[pos] > least || (row[pos] == least && n_equal-- > 0)) {
            sum += inside[pos] ? row[pos] : 0.0f;
        }
    }
    return { (float) sum, (int32_t) (std::max_element(row, row + n) - row) };
}

static std::vector<bool> mark_spans(const std::vector<std::pair<int32_t, int32_t>> & spans, llama_pos n) {
    std::vector<bool> res(n, false);
    for (const auto & [start, end] : spans) {
        if (start < 0 || end <= start || end > n) {
            throw std::invalid_argument(format("span [%d, %d) of %d tokens: it must not be empty and lie within them", start, end, n));
        }
        std::fill(res.begin() + start, res.begin() + end, true);
    }
    return res;
}

static void check_attention(const headkv_seq & seq, llama_seq_id seq_id, llama_pos n_ring, int32_t n_queries) {
    if (seq.state != HEADKV_SEQ_STAGED) {
        throw std::invalid_argument(format("sequence %d is not staged: attention is that of a prompt before its compression", seq_id));
    }
    const int32_t n_window = std::min<int32_t>(n_ring, seq.n_pos);
    if (n_queries < 1 || n_queries > n_window) {
        throw std::invalid_argument(format("attention of the last %d tokens: it must be in [1, %d], those whose queries the window has", n_queries, n_window));
    }
}

// the probabilities that one query of one query head gives to the cells of a sequence, in the order of their positions
struct attention_row {
    int32_t il;
    int64_t ih_kv;
    int64_t ih;
    int64_t i_query;
    const float * probs;
};

// The mask of m queries of so many at the end of n cells, for the query heads of a group, with what ALiBi adds to their logits.
static std::vector<float> alibi_mask(int64_t n, int64_t n_queries, int64_t first, int64_t m, const headkv_store_layer & layer, int64_t ih_kv) {
    std::vector<float> res;
    for (int64_t g = 0; g < layer.n_group(); ++g) {
        const float slope = headkv_alibi_slope(layer.attend->max_bias, layer.n_head, ih_kv * layer.n_group() + g);
        for (int64_t pos = n - n_queries + first; pos < n - n_queries + first + m; ++pos) {
            for (int64_t i = 0; i < n; ++i) {
                res.push_back(i <= pos ? slope * (float) (i - pos) : -INFINITY);
            }
        }
    }
    return res;
}

static constexpr int64_t N_QUERIES_AT_ONCE = 64; // of a group: what the probabilities take at a time

// all rows of the last n_queries tokens of a staged sequence
static void each_row(llama_kv_cache_ragged & kv, llama_context * lctx, llama_seq_id seq_id, int32_t n_queries, const std::function<void(const attention_row &)> & see) {
    const headkv_seq & seq = kv.seq(seq_id);
    const int64_t n = seq.n_pos;
    const auto slots = seq.window_slots(seq_id, n_queries);
    if (slots.empty()) {
        throw std::runtime_error("the queries of the last tokens are missing: evaluate them again");
    }
    const std::vector<int32_t> cells = kv.staging().cells_of(seq_id, seq.n_pos);
    const auto mask = headkv_causal_mask(n, n_queries);

    lctx->synchronize();
    headkv_runner runner(lctx);
    for (const auto & layer : kv.store().layers) {
        const int64_t D = layer.n_embd_head_k;
        const int64_t G = layer.n_group();
        ggml_tensor * k_all = kv.staging().rows(layer.il, false);
        for (int64_t first = 0; first < n_queries; first += N_QUERIES_AT_ONCE) {
            const int64_t m = std::min<int64_t>(N_QUERIES_AT_ONCE, n_queries - first);

            headkv_scratch scratch;
            ggml_tensor * t_cells = scratch.new_tensor(GGML_TYPE_I32, n);
            ggml_tensor * t_slots = scratch.new_tensor(GGML_TYPE_I32, m);
            const bool alibi = layer.attend->max_bias > 0.0f;
            ggml_tensor * t_mask = alibi ? scratch.new_tensor(GGML_TYPE_F32, n, m, G) : scratch.new_tensor(GGML_TYPE_F16, n, m);
            ggml_tensor * t_probs = scratch.new_tensor(GGML_TYPE_F32, n, m, G);
            scratch.alloc(layer.buft);
            headkv_set_data(t_cells, cells);
            headkv_set_data(t_slots, std::vector<int32_t>(slots.begin() + first, slots.begin() + first + m));
            if (!alibi) {
                headkv_set_data(t_mask, std::vector<ggml_fp16_t>(mask.begin() + first * n, mask.begin() + (first + m) * n));
            }

            for (int64_t ih = 0; ih < layer.n_head_kv; ++ih) {
                if (alibi) {
                    headkv_set_data(t_mask, alibi_mask(n, n_queries, first, m, layer, ih));
                }
                runner.begin();
                ggml_context * ctx = runner.ctx.get();
                ggml_tensor * q = headkv_queries_of_head(ctx, kv.staging().ring(layer.il), t_slots, layer, ih);
                ggml_tensor * k = ggml_view_2d(ctx, k_all, D, k_all->ne[1], k_all->nb[1], ih * ggml_row_size(k_all->type, D));
                ggml_tensor * p = ggml_mul_mat(ctx, ggml_get_rows(ctx, k, t_cells), ggml_reshape_2d(ctx, q, D, m * G));
                ggml_prec_set_acc(p, GGML_PREC_F32);
                p = headkv_build_soft_max(ctx, ggml_reshape_3d(ctx, p, n, m, G), t_mask, layer.attend->scale, layer.attend->softcap,
                        headkv_sinks_of_head(ctx, layer.sinks, G, ih));
                ggml_build_forward_expand(runner.gf, ggml_cpy(ctx, p, t_probs));
                runner.run();
                const auto probs = headkv_get_data<float>(t_probs, n * m * G);
                for (int64_t j = 0; j < m * G; ++j) {
                    see({ layer.il, ih, ih * G + j / m, first + j % m, probs.data() + j * n });
                }
            }
        }
    }
}

void headkv_attention_of(llama_kv_cache_ragged & kv, llama_context * lctx, llama_seq_id seq_id, int32_t n_queries,
        const std::vector<std::pair<int32_t, int32_t>> & spans, int32_t n_top, float * mass, int32_t * top) {
    const headkv_seq & seq = kv.seq(seq_id);
    check_attention(seq, seq_id, kv.staging().n_ring(), n_queries);
    if (n_top < 1 || n_top > seq.n_pos - n_queries + 1) {
        throw std::invalid_argument(format("%d largest probabilities of %d: it must be in [1, %d]", n_top, seq.n_pos, seq.n_pos - n_queries + 1));
    }
    const std::vector<bool> inside = mark_spans(spans, seq.n_pos);
    const size_t n_row = kv.n_head_max();
    const size_t n_all = n_row * kv.n_layer(); // of one query
    std::fill(mass, mass + n_queries * n_all, 0.0f);
    std::fill(top, top + n_queries * n_all, -1);
    std::vector<float> best;
    each_row(kv, lctx, seq_id, n_queries, [&](const attention_row & row) {
        const size_t i = row.i_query * n_all + row.il * n_row + row.ih;
        std::tie(mass[i], top[i]) = reduce_row(row.probs, inside, n_top, best);
    });
}

void headkv_attention_max_of(llama_kv_cache_ragged & kv, llama_context * lctx, llama_seq_id seq_id, int32_t n_queries, int32_t n_positions, float * dst) {
    const headkv_seq & seq = kv.seq(seq_id);
    check_attention(seq, seq_id, kv.staging().n_ring(), n_queries);
    if (n_positions < 1 || n_positions > seq.n_pos) {
        throw std::invalid_argument(format("attention to the first %d positions: it must be in [1, %d]", n_positions, seq.n_pos));
    }
    std::fill(dst, dst + (size_t) kv.n_layer() * kv.n_head_kv_max() * n_positions, 0.0f);
    each_row(kv, lctx, seq_id, n_queries, [&](const attention_row & row) {
        float * best = dst + ((size_t) row.il * kv.n_head_kv_max() + row.ih_kv) * n_positions;
        for (int32_t i = 0; i < n_positions; ++i) {
            best[i] = std::max(best[i], row.probs[i]);
        }
    });
}

//
// rows
//

static void read_rows(ggml_tensor * t, size_t offset, size_t nb_row, int64_t n_embd, int64_t n_rows, float * dst) {
    std::vector<uint8_t> raw(ggml_row_size(t->type, n_embd));
    for (int64_t i = 0; i < n_rows; ++i) {
        ggml_backend_tensor_get(t, raw.data(), offset + i * nb_row, raw.size());
        headkv_to_floats(t->type, raw.data(), dst + i * n_embd, n_embd);
    }
}

static void check_room(int64_t n, int64_t n_needed) {
    if (n_needed > n) {
        throw std::invalid_argument(format("room for %lld values, %lld are needed", (long long) n, (long long) n_needed));
    }
}

int32_t headkv_window_of(const llama_kv_cache_ragged & kv, llama_seq_id seq_id, int32_t il, float * dst, int64_t n) {
    const bool is_generated = kv.seq(seq_id).state == HEADKV_SEQ_COMPRESSED && kv.queries();
    const auto slots = kv.seq(seq_id).window_slots(seq_id, (llama_pos) kv.config().window);
    ggml_tensor * ring = is_generated ? kv.queries()->of_layer(il) : kv.staging().ring(il);
    if (slots.empty() || !ring) {
        throw std::runtime_error("no window queries: the sequence is not being read");
    }
    check_room(n, (int64_t) slots.size() * ring->ne[0]);
    for (size_t i = 0; i < slots.size(); ++i) {
        read_rows(ring, slots[i] * ring->nb[1], ring->nb[1], ring->ne[0], 1, dst + i * ring->ne[0]);
    }
    return (int32_t) slots.size();
}

int32_t headkv_softmax_of(const llama_kv_cache_ragged & kv, int32_t il, float * dst, int64_t n) {
    const headkv_store_layer & layer = *kv.store().find(il);
    const int64_t n_values = 3 + (layer.sinks ? layer.n_head : 0);
    check_room(n, n_values);
    dst[0] = layer.attend->scale;
    dst[1] = layer.attend->softcap;
    dst[2] = layer.attend->max_bias;
    if (layer.sinks) {
        ggml_backend_tensor_get(layer.sinks, dst + 3, 0, layer.n_head * sizeof(float));
    }
    return (int32_t) n_values;
}

int32_t headkv_refs_of(const llama_kv_cache_ragged & kv, llama_seq_id seq_id, int32_t il, float * dst, int64_t n) {
    const auto slots = kv.seq(seq_id).ref_slots(seq_id);
    ggml_tensor * refs = kv.staging().refs(il);
    if (slots.empty() || !refs) {
        throw std::runtime_error("no reference queries: values are not fitted, or the sequence is not being read");
    }
    const int64_t n_head_kv = kv.store().find(il)->n_head_kv;
    check_room(n, (int64_t) slots.size() * n_head_kv * refs->ne[0]);
    for (size_t i = 0; i < slots.size(); ++i) {
        read_rows(refs, slots[i] * n_head_kv * refs->nb[1], refs->nb[1], refs->ne[0], n_head_kv, dst + i * n_head_kv * refs->ne[0]);
    }
    return (int32_t) slots.size();
}

int32_t headkv_cells_of(const llama_kv_cache_ragged & kv, llama_seq_id seq_id, int32_t il, int32_t ih, bool v, float * dst, int64_t n) {
    const headkv_seq & seq = kv.seq(seq_id);
    const headkv_store_layer * layer = kv.store().find(il);
    const int64_t D = v ? layer->n_embd_head_v : layer->n_embd_head_k;

    if (seq.state == HEADKV_SEQ_LAYERED) {
        throw std::runtime_error(format("sequence %d was read layer by layer and is not compressed yet: call headkv_end_prompt() first", seq_id));
    }
    const bool is_compressed = seq.state == HEADKV_SEQ_COMPRESSED;
    const int64_t n_rows = is_compressed ? layer->ranges[seq_id][ih].n_used(seq.n_in_tail()) : seq.n_pos;
    check_room(n, n_rows * D);
    if (is_compressed) {
        ggml_tensor * pool = v ? layer->v : layer->k;
        read_rows(pool, layer->ranges[seq_id][ih].off * pool->nb[1], pool->nb[1], D, n_rows, dst);
    } else if (seq.state == HEADKV_SEQ_STAGED) {
        ggml_tensor * all = kv.staging().rows(il, v);
        const auto cells = kv.staging().cells_of(seq_id, seq.n_pos);
        for (int64_t i = 0; i < n_rows; ++i) {
            read_rows(all, cells[i] * all->nb[1] + ih * ggml_row_size(all->type, D), all->nb[1], D, 1, dst + i * D);
        }
    }
    return (int32_t) n_rows;
}
