#include "headkv-store.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>

size_t headkv_layer_shape::n_bytes_cell() const {
    return (ggml_row_size(type_k, n_embd_head_k) + ggml_row_size(type_v, n_embd_head_v)) * n_head_kv;
}

const headkv_store_layer * headkv_store::find(int32_t il) const {
    for (const auto & layer : layers) {
        if (layer.il == il) {
            return &layer;
        }
    }
    return nullptr;
}

headkv_store_layer * headkv_store::find(int32_t il) {
    return const_cast<headkv_store_layer *>(static_cast<const headkv_store *>(this)->find(il));
}

std::vector<uint32_t> headkv_bucket_sizes(const std::vector<uint32_t> & n_rows, uint32_t n_buckets) {
    const size_t n = n_rows.size();
    n_buckets = std::min<size_t>(n_buckets, n);

    // cost[b][i]: least padding of the first i heads in b runs; the longest head of a run is its last
    const uint64_t inf = std::numeric_limits<uint64_t>::max() / 2;
    std::vector<std::vector<uint64_t>> cost(n_buckets + 1, std::vector<uint64_t>(n + 1, inf));
    std::vector<std::vector<size_t>> from(n_buckets + 1, std::vector<size_t>(n + 1, 0));
    cost[0][0] = 0;
    for (uint32_t b = 1; b <= n_buckets; ++b) {
        for (size_t i = 1; i <= n; ++i) {
            uint64_t pad = 0;
            for (size_t j = i; j-- > 0;) {
                pad += n_rows[i - 1] - n_rows[j];
                if (cost[b - 1][j] + pad < cost[b][i]) {
                    cost[b][i] = cost[b - 1][j] + pad;
                    from[b][i] = j;
                }
            }
        }
    }
    uint32_t best = 1;
    for (uint32_t b = 2; b <= n_buckets; ++b) {
        if (cost[b][n] < cost[best][n]) {
            best = b;
        }
    }
    std::vector<uint32_t> sizes;
    for (size_t i = n, b = best; b > 0; --b) {
        sizes.push_back((uint32_t) (i - from[b][i]));
        i = from[b][i];
    }
    std::reverse(sizes.begin(), sizes.end());
    return sizes;
}

// where the heads of one sequence go, starting at row off; returns the first free row
static uint32_t layout_exact(std::vector<headkv_range> & ranges, uint32_t off) {
    for (auto & r : ranges) {
        r.off = off;
        off += r.n_cap;
    }
    return off;
}

static uint32_t layout_buckets(std::vector<headkv_range> & ranges, std::vector<headkv_bucket> & buckets,
        uint32_t off, uint32_t n_buckets) {
    std::vector<int32_t> order(ranges.size());
    std::iota(order.begin(), order.end(), 0);
    if (n_buckets > 1) {
        // ascending, so that the views of short heads overhang into longer ones; a single bucket keeps the natural order
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return ranges[a].n_cap < ranges[b].n_cap; });
    }
    std::vector<uint32_t> n_rows;
    for (int32_t h : order) {
        n_rows.push_back(ranges[h].n_cap);
    }
    const std::vector<uint32_t> sizes = n_buckets > 1 ? headkv_bucket_sizes(n_rows, n_buckets)
                                                      : std::vector<uint32_t>(1, (uint32_t) n_rows.size());
    buckets.clear();
    uint32_t first = 0;
    for (uint32_t size : sizes) {
        headkv_bucket b;
        b.heads.assign(order.begin() + first, order.begin() + first + size);
        b.off = off;
        b.cap = (uint32_t) GGML_PAD(*std::max_element(n_rows.begin() + first, n_rows.begin() + first + size), 8);
        b.n_kv = (uint32_t) GGML_PAD(b.cap, 256); // the step that the fast kernels of the GPU backends ask for
        for (int32_t h : b.heads) {
            ranges[h].off = off;
            off += b.cap;
        }
        buckets.push_back(b);
        first += size;
    }
    return off;
}

// rows that the overlapping views reach beyond the last range
static uint32_t n_rows_viewed(const std::vector<headkv_bucket> & buckets) {
    uint32_t res = 0;
    for (const auto & b : buckets) {
        res = std::max<uint32_t>(res, b.off + b.n_kv * (uint32_t) b.heads.size());
    }
    return res;
}

void headkv_copy_rows(ggml_tensor * src, uint32_t off_src, ggml_tensor * dst, uint32_t off_dst, uint32_t n_rows) {
    if (n_rows == 0) {
        return;
    }
    ggml_init_params params = { /*.mem_size =*/2 * ggml_tensor_overhead(), /*.mem_buffer =*/nullptr, /*.no_alloc =*/true };
    ggml_context_ptr ctx(ggml_init(params));
    ggml_tensor * a = ggml_view_2d(ctx.get(), src, src->ne[0], n_rows, src->nb[1], off_src * src->nb[1]);
    ggml_tensor * b = ggml_view_2d(ctx.get(), dst, dst->ne[0], n_rows, dst->nb[1], off_dst * dst->nb[1]);
    ggml_backend_view_init(a);
    ggml_backend_view_init(b);
    ggml_backend_tensor_copy(a, b);
}

void headkv_gather_rows(ggml_tensor * t, uint32_t first, const std::vector<int32_t> & rows, std::vector<uint8_t> & raw) {
    if (rows.empty()) {
        return;
    }
    const size_t nb = t->nb[1];
    const bool is_host = ggml_backend_buffer_is_host(t->buffer);
    uint8_t * data = is_host ? (uint8_t *) t->data + first * nb : raw.data();
    if (!is_host) {
        ggml_backend_tensor_get(t, data, first * nb, (rows.back() + 1) * nb);
    }
    for (size_t i = 0; i < rows.size(); ++i) {
        memmove(data + i * nb, data + rows[i] * nb, nb); // never backwards
    }
    if (!is_host) {
        ggml_backend_tensor_set(t, data, first * nb, rows.size() * nb);
    }
}

// K and V of a layer for n_rows rows, which are zero
struct pools_t {
    ggml_context_ptr ctx;
    ggml_backend_buffer_ptr buf;
    ggml_tensor * k = nullptr;
    ggml_tensor * v = nullptr;
};

static pools_t make_pools(const headkv_store_layer & layer, uint32_t n_rows, bool no_alloc) {
    pools_t res;
    if (n_rows == 0) {
        return res;
    }
    ggml_init_params params = { /*.mem_size =*/2 * ggml_tensor_overhead(), /*.mem_buffer =*/nullptr, /*.no_alloc =*/true };
    res.ctx.reset(ggml_init(params));
    res.k = ggml_new_tensor_2d(res.ctx.get(), layer.type_k, layer.n_embd_head_k, n_rows);
    res.v = ggml_new_tensor_2d(res.ctx.get(), layer.type_v, layer.n_embd_head_v, n_rows);
    ggml_format_name(res.k, "headkv_k_l%d", layer.il);
    ggml_format_name(res.v, "headkv_v_l%d", layer.il);
    if (no_alloc) {
        res.buf.reset(ggml_backend_buft_alloc_buffer(layer.buft, 0));
        res.k->buffer = res.buf.get();
        res.v->buffer = res.buf.get();
        return res;
    }
    res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(res.ctx.get(), layer.buft));
    if (!res.buf) {
        throw std::bad_alloc();
    }
    // the composed path multiplies masked rows by zero: they must be finite
    ggml_backend_buffer_clear(res.buf.get(), 0);
    return res;
}

void headkv_store::relayout(headkv_store_layer & layer, const std::map<int32_t, headkv_rows> & changes, uint32_t n_buckets) {
    auto ranges = layer.ranges;
    auto buckets = layer.buckets;
    for (const auto & [s, rows] : changes) {
        if (ranges.size() <= (size_t) s) {
            ranges.resize(s + 1);
            buckets.resize(s + 1);
        }
        ranges[s].resize(rows.n_kept.size());
        for (size_t h = 0; h < rows.n_kept.size(); ++h) {
            ranges[s][h].n_kept = rows.n_kept[h];
            ranges[s][h].n_cap = rows.n_kept[h] + rows.n_tail;
        }
    }

    uint32_t n_rows = 0;
    uint32_t n_view = 0;
    for (size_t i = 0; i < ranges.size(); ++i) {
        if (ranges[i].empty()) {
            buckets[i].clear();
            continue;
        }
        if (layer.fused) {
            n_rows = layout_exact(ranges[i], n_rows);
        } else {
            n_rows = layout_buckets(ranges[i], buckets[i], n_rows, n_buckets);
            n_view = std::max(n_view, n_rows_viewed(buckets[i]));
        }
    }
    n_rows = std::max(n_rows, n_view);

    pools_t pools = make_pools(layer, n_rows, no_alloc);

    for (size_t i = 0; i < ranges.size() && layer.k && !no_alloc; ++i) {
        if (i >= layer.ranges.size()) {
            break;
        }
        const auto change = changes.find((int32_t) i);
        for (size_t h = 0; h < layer.ranges[i].size() && h < ranges[i].size(); ++h) {
            const auto & src = layer.ranges[i][h];
            const auto & dst = ranges[i][h];
            const uint32_t n = change == changes.end() ? std::min(src.n_cap, dst.n_cap) : change->second.n_used.empty() ? 0
                                                                                                                        : change->second.n_used[h];
            headkv_copy_rows(layer.k, src.off, pools.k, dst.off, n);
            headkv_copy_rows(layer.v, src.off, pools.v, dst.off, n);
        }
    }

    layer.ranges = std::move(ranges);
    layer.buckets = std::move(buckets);
    layer.ctx = std::move(pools.ctx);
    layer.buf = std::move(pools.buf);
    layer.k = pools.k;
    layer.v = pools.v;

    generation++;
}

void headkv_store::remove(int32_t s, uint32_t n_buckets) {
    for (auto & layer : layers) {
        if ((size_t) s >= layer.ranges.size() || layer.ranges[s].empty()) {
            continue;
        }
        try {
            relayout(layer, { { s, {} } }, n_buckets);
        } catch (const std::bad_alloc &) {
            layer.ranges[s].clear();
            layer.buckets[s].clear();
        }
    }
}

bool headkv_store::has(int32_t s) const {
    return std::any_of(layers.begin(), layers.end(), [s](const headkv_store_layer & l) { return (size_t) s < l.ranges.size() && !l.ranges[s].empty(); });
}

uint32_t headkv_store::n_tail(int32_t s) const {
    uint32_t res = std::numeric_limits<uint32_t>::max();
    for (const auto & layer : layers) {
        for (const auto & range : layer.ranges[s]) {
            res = std::min(res, range.n_cap - range.n_kept);
        }
    }
    return res;
}

void headkv_store::cut(int32_t s, uint32_t n) {
    for (auto & layer : layers) {
        for (auto & range : layer.ranges[s]) {
            range.n_kept -= n;
            range.pos.resize(range.n_kept);
        }
    }
}

bool headkv_store::has_fused() const {
    return std::any_of(layers.begin(), layers.end(), [](const headkv_store_layer & l) { return l.fused; });
}

void headkv_store::clear() {
    for (auto & layer : layers) {
        layer.ranges.clear();
        layer.buckets.clear();
        layer.k = nullptr;
        layer.v = nullptr;
        layer.buf.reset();
        layer.ctx.reset();
    }
    generation++;
}

bool headkv_store::compensates() const {
    for (const auto & layer : layers) {
        for (const auto & ranges : layer.ranges) {
            if (std::any_of(ranges.begin(), ranges.end(), [](const headkv_range & r) { return r.compensates(); })) {
                return true;
            }
        }
    }
    return false;
}

bool headkv_store::is_all_fused() const {
    return std::all_of(layers.begin(), layers.end(), [](const headkv_store_layer & l) { return l.fused; });
}

bool headkv_store::has_fused_prompt() const {
    return std::any_of(layers.begin(), layers.end(), [](const headkv_store_layer & l) { return l.fused_prompt; });
}

size_t headkv_store::n_bytes() const {
    size_t res = 0;
    for (const auto & layer : layers) {
        res += layer.buf ? ggml_backend_buffer_get_size(layer.buf.get()) : 0;
    }
    return res;
}
