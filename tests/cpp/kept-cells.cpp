// Which cells the kernels of this machine keep of the same queries and keys: lines that scripts/compare_kept.py compares with those of
// another machine, or of an emulated one. All that is drawn is exact in F32, so that no library of mathematics takes part.
#include "op-graph.h"

#include "headkv-score.h"
#include "headkv-stages.h"

#include <algorithm>

namespace {

constexpr int G = 4, H = 2, N_WINDOW = 64, N_RECENT = 8, N_SQUARE = 2;

// sums of four even numbers: nearly normal, multiples of 2^-23
std::vector<float> draw(std::mt19937 & rng, size_t n, float factor) {
    std::vector<float> res(n);
    for (float & x : res) {
        int32_t sum = 0;
        for (int i = 0; i < 4; ++i) {
            sum += (int32_t) (rng() >> 10) - (1 << 21);
        }
        x = factor * sum / (1 << 21);
    }
    return res;
}

uint64_t hash(const void * data, size_t n) { // FNV-1a
    uint64_t h = 14695981039346656037ull;
    for (size_t i = 0; i < n; ++i) {
        h = (h ^ ((const uint8_t *) data)[i]) * 1099511628211ull;
    }
    return h;
}

void print_case(const char * kernel, ggml_type type, int D, int n_kv, int n_keep, int seed) {
    std::mt19937 rng(seed);
    const int n_prefix = n_kv - N_RECENT;
    op_graph g;
    ggml_context * ctx = g.ctx.get();
    ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, G * H, N_WINDOW);
    ggml_tensor * k = ggml_new_tensor_2d(ctx, type, D * H, n_kv);
    ggml_tensor * p = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_kv);
    ggml_tensor * scores = headkv_build_score_fused(ctx, q, k, p, n_prefix, 1.0f / 8, 0.0f, N_SQUARE, HEADKV_POOL_MAX, headkv_pool_kernel(n_keep));
    g.alloc(scores);

    std::vector<int32_t> cells(n_kv);
    for (int i = 0; i < n_kv; ++i) {
        cells[i] = i;
    }
    const std::vector<float> qf = draw(rng, ggml_nelements(q), 1.0f), kf = draw(rng, ggml_nelements(k), 1.0f);
    set_quantized(k, kf);
    ggml_backend_tensor_set(q, qf.data(), 0, ggml_nbytes(q));
    ggml_backend_tensor_set(p, cells.data(), 0, ggml_nbytes(p));
    g.run(2);

    std::vector<uint8_t> raw(ggml_nbytes(k));
    ggml_backend_tensor_get(k, raw.data(), 0, raw.size());
    const std::vector<float> found = get_floats(scores);
    for (int h = 0; h < H; ++h) {
        const float * sh = found.data() + (size_t) h * n_prefix;
        const std::vector<int32_t> kept = headkv_select_cells(sh, n_prefix, n_keep);
        std::vector<float> sorted(sh, sh + n_prefix);
        std::sort(sorted.begin(), sorted.end(), std::greater<float>());
        printf("%s D=%d n=%d keep=%d seed=%d h=%d\t%s\t%016llx\t%.9g %.9g\t", ggml_type_name(type), D, n_kv, n_keep, seed, h, kernel,
                (unsigned long long) hash(raw.data(), raw.size()), sorted[n_keep - 1], sorted[n_keep]);
        for (int32_t i : kept) {
            printf(" %d", i);
        }
        printf("\n");
    }
}

} // namespace

void print_kept() {
    for (const char * kernel : { "portable", "avx2", "avx512", "neon" }) {
        if (!headkv_score_kernel_find(kernel)) {
            continue;
        }
        setenv("HEADKV_KERNEL", kernel, 1);
        for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            for (int D : { 64, 128 }) {
                for (int n_keep : { 24, 128, 512 }) {
                    for (int seed : { 1, 2, 3 }) {
                        print_case(kernel, type, D, 2048, n_keep, seed);
                    }
                }
            }
        }
    }
}
