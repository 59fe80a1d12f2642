// What the cache holds, as callers see it.

#include "headkv-testing.h"

#include "headkv-api.h"
#include "headkv-read.h"

int32_t headkv_fill_prompt(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens, uint32_t seed) {
    return guarded([&]() -> int32_t {
        llama_kv_cache_ragged & kv = cache_of(ctx, seq_id);
        if (n_tokens < 1 || (uint32_t) n_tokens > llama_n_ctx(ctx)) {
            return fail(format("prompt of %d tokens: it must be in [1, n_ctx = %u]", n_tokens, llama_n_ctx(ctx)));
        }
        return headkv_fill(kv, ctx, seq_id, n_tokens, seed) ? 0 : -1;
    });
}

int32_t headkv_read_window(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, float * dst, int64_t n) {
    return guarded([&]() -> int32_t {
        llama_kv_cache_ragged & kv = cache_of(ctx, seq_id);
        check_head(kv, il, 0);
        return headkv_window_of(kv, seq_id, il, dst, n);
    });
}

static void check_queries(const llama_kv_cache_ragged & kv, int32_t n_queries) {
    if (n_queries < 1 || n_queries > kv.staging().n_ring()) {
        throw std::invalid_argument(format("attention of the last %d tokens: it must be in [1, %d], the window of the context", n_queries, kv.staging().n_ring()));
    }
}

int32_t headkv_read_attention(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_queries, const int32_t * spans, int32_t n_spans,
        int32_t n_top, float * mass, int32_t * top, int32_t n) {
    return guarded([&]() -> int32_t {
        llama_kv_cache_ragged & kv = cache_of(ctx, seq_id);
        check_queries(kv, n_queries);
        const int32_t n_values = n_queries * kv.n_layer() * kv.n_head_max();
        if (!mass) {
            return n_values;
        }
        if (n < n_values || !top || (n_spans > 0 && !spans)) {
            return fail(format("room for %d values, %d are needed, and no pointer NULL", n, n_values));
        }
        std::vector<std::pair<int32_t, int32_t>> ranges;
        for (int32_t i = 0; i < n_spans; ++i) {
            ranges.push_back({ spans[2 * i], spans[2 * i + 1] });
        }
        headkv_attention_of(kv, ctx, seq_id, n_queries, ranges, n_top, mass, top);
        return n_values;
    });
}

int32_t headkv_read_attention_max(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_queries, int32_t n_positions, float * dst, int32_t n) {
    return guarded([&]() -> int32_t {
        llama_kv_cache_ragged & kv = cache_of(ctx, seq_id);
        check_queries(kv, n_queries);
        if (n_positions < 1 || (uint32_t) n_positions > llama_n_ctx(ctx)) {
            return fail(format("attention to the first %d positions: it must be in [1, n_ctx = %u]", n_positions, llama_n_ctx(ctx)));
        }
        const int64_t n_values = (int64_t) kv.n_layer() * kv.n_head_kv_max() * n_positions;
        if (n_values > INT32_MAX) {
            return fail(format("attention to the first %d positions of %d heads: it must be %d values at most", n_positions, kv.n_layer() * kv.n_head_kv_max(), INT32_MAX));
        }
        if (!dst) {
            return (int32_t) n_values;
        }
        if (n < n_values) {
            return fail(format("room for %d values, %lld are needed", n, (long long) n_values));
        }
        headkv_attention_max_of(kv, ctx, seq_id, n_queries, n_positions, dst);
        return (int32_t) n_values;
    });
}

int32_t headkv_read_cells(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t ih, bool v, float * dst, int64_t n) {
    return guarded([&]() -> int32_t {
        llama_kv_cache_ragged & kv = cache_of(ctx, seq_id);
        check_head(kv, il, ih);
        return headkv_cells_of(kv, seq_id, il, ih, v, dst, n);
    });
}

int32_t headkv_read_softmax(const struct llama_context * ctx, int32_t il, float * dst, int64_t n) {
    return guarded([&]() -> int32_t {
        llama_kv_cache_ragged & kv = cache_of(ctx, 0);
        check_head(kv, il, 0);
        return headkv_softmax_of(kv, il, dst, n);
    });
}

int32_t headkv_read_refs(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, float * dst, int64_t n) {
    return guarded([&]() -> int32_t {
        llama_kv_cache_ragged & kv = cache_of(ctx, seq_id);
        check_head(kv, il, 0);
        return headkv_refs_of(kv, seq_id, il, dst, n);
    });
}
