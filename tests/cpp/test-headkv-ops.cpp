// The CPU ops, and the CUDA and Metal kernels run on the CPU, against definitions in double precision, on shapes with empty, short,
// long and cut ranges.
//
//   test-headkv-ops [test]    every case, exit code 1 if one fails; prints the cases that fail as arguments for -c
//   test-headkv-ops perf      time per op of the attend kernels
//   test-headkv-ops perf score   time per layer of score, composed and fused
//   test-headkv-ops perf sinks   time per op of attend, without and with sinks
//   test-headkv-ops perf prompt  attention of a prompt: ours and flash attention of ggml in turn, and the rate of the machine
//   test-headkv-ops perf isa     the instruction sets of this machine in turn
//   test-headkv-ops kept      which cells each kernel keeps, for scripts/compare_kept.py
//   test-headkv-ops -c NAME   one case
//   test-headkv-ops -k PART   cases with this in their names
//   test-headkv-ops device    on the first GPU: the composed paths and, if it is CUDA or Metal, our kernels
//   .. --out FILE             behind any of the tests: what ran, as JSON

#include "op-graph.h"

#include "headkv-attend.h"
#include "headkv-fit-ops.h"
#include "headkv-fit.h"
#include "headkv-refs.h"
#include "headkv-score.h"
#include "headkv-stages.h"
#include "headkv-store.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <numeric>
#include <stdexcept>
#include <tuple>

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

// cuda-on-cpu.cpp; descending: the order in which the threads of a block run
bool cuda_on_cpu_supports(const ggml_tensor * op);
void cuda_on_cpu_compute(ggml_tensor * op, bool descending);

// as those of metal-on-cpu-door.h
int cuda_on_cpu_n_barriers();
const char * cuda_on_cpu_barrier(int i);
void cuda_on_cpu_leave_out(int i);

#ifdef HEADKV_METAL_ON_CPU
#include "ggml-metal.h"
#include "metal-on-cpu-door.h"
#endif

// the device of the cases of a kernel, null = the CPU
static ggml_backend_dev_t device_of(const std::string & kernel) {
    return kernel == "metal" ? metal : kernel == "cuda" || kernel == "composed" ? gpu
                                                                                : nullptr;
}

// where the cases of Metal run on the CPU, run i has the other order of threads than run i - 1
static void set_metal_order(int i) {
#ifdef HEADKV_METAL_ON_CPU
    metal_on_cpu_order(i % 2 == 0);
#else
    GGML_UNUSED(i);
#endif
}

//
// attend
//

// of ALiBi: 8, for example, is 1/2, 1/4 .. 1/256 for 8 heads, and 2^-0.5, 2^-1.5 .. for those behind them
static double slope_in_doubles(double max_bias, int n_head, int ih) {
    const int n = 1 << (int) std::log2(n_head);
    return std::pow(2.0, -max_bias * (ih < n ? ih + 1.0 : ih - n + 0.5) / n);
}

struct attend_case {
    std::string kernel;
    ggml_type type;
    int D, G;
    std::vector<int> lens; // [n_head_kv*n_seqs]
    int n_seqs = 1;
    int n_tps = 1;
    float softcap = 0.0f;
    bool bias = false;
    std::string sinks = "";
    int n_value = 0; // elements of V, 0 = D
    float max_bias = 0.0f; // of ALiBi

    int D_v() const { return n_value > 0 ? n_value : D; }

    std::string name() const {
        std::string res = kernel + "," + ggml_type_name(type) + ",D=" + std::to_string(D) + "/" + std::to_string(D_v()) + ",G=" + std::to_string(G) +
                ",seqs=" + std::to_string(n_seqs) + ",tps=" + std::to_string(n_tps) + ",softcap=" + std::to_string((int) softcap) + ",bias=" + std::to_string(bias) + ",sinks=" + sinks + ",alibi=" + std::to_string((int) max_bias) + ",lens=";
        for (int len : lens) {
            res += std::to_string(len) + "/";
        }
        return res;
    }
};

static std::vector<double> attend_in_doubles(const attend_case & c, const std::vector<float> & qf, const std::vector<float> & kf, const std::vector<float> & vf,
        const std::vector<int32_t> & ranges, const std::vector<float> & bias, const std::vector<float> & sinks, const std::vector<float> & pos) {
    const int H = (int) c.lens.size() / c.n_seqs;
    const int n_head = c.G * H;
    std::vector<double> res;
    for (int j = 0; j < c.n_tps * c.n_seqs * n_head; ++j) {
        const int t = j / n_head;
        const int i = t / c.n_tps * H + j % n_head / c.G;
        const int len = std::max(0, c.lens[i] - (c.n_tps - 1 - t % c.n_tps));
        std::vector<double> s(len);
        for (int r = 0; r < len; ++r) {
            double dot = 0.0;
            for (int d = 0; d < c.D; ++d) {
                dot += (double) qf[(size_t) j * c.D + d] * kf[(size_t) (ranges[2 * i] + r) * c.D + d];
            }
            dot *= 1.0f / std::sqrt((float) c.D);
            s[r] = (c.softcap > 0.0f ? c.softcap * std::tanh(dot / c.softcap) : dot) + (r == 0 ? bias[i] : 0.0);
            s[r] += c.max_bias > 0.0f ? slope_in_doubles(c.max_bias, n_head, j % n_head) * pos[ranges[2 * i] + r] : 0.0;
        }
        if (!sinks.empty()) {
            s.push_back(sinks[j % n_head]);
        }
        const double m = s.empty() ? 0.0 : *std::max_element(s.begin(), s.end());
        double sum = 0.0;
        for (double x : s) {
            sum += std::exp(x - m);
        }
        std::vector<double> o(c.D_v(), 0.0);
        for (int r = 0; r < len; ++r) {
            for (int d = 0; d < c.D_v(); ++d) {
                o[d] += std::exp(s[r] - m) / sum * vf[(size_t) (ranges[2 * i] + r) * c.D_v() + d];
            }
        }
        res.insert(res.end(), o.begin(), o.end());
    }
    return res;
}

static bool test_attend(const attend_case & c) {
    const bool cuda = c.kernel == "cuda";
    const bool on_device = cuda || c.kernel == "metal"; // or on the CPU, thread by thread
    setenv("HEADKV_KERNEL", on_device ? "portable" : c.kernel.c_str(), 1);
    if (!headkv_attend_kernel_find(c.type, c.type, c.D, c.D_v(), getenv("HEADKV_KERNEL"))) {
        return true; // not on this machine or not for this type
    }
    const int H = (int) c.lens.size() / c.n_seqs;
    headkv_attend_state state(c.D, c.D_v(), c.G * H, H, c.n_seqs, c.type, c.type);
    state.scale = 1.0f / std::sqrt((float) c.D);
    state.softcap = c.softcap;
    state.max_bias = c.max_bias;

    // ranges in a pool with gaps of NaN between them
    std::vector<int32_t> ranges;
    int n_rows = 3;
    for (int len : c.lens) {
        ranges.push_back(n_rows);
        ranges.push_back(len);
        n_rows += len + 3;
    }
    const int T = c.n_tps * c.n_seqs;

    op_graph g(device_of(c.kernel));
    ggml_context * ctx = g.ctx.get();
    ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.D, c.G * H, T);
    ggml_tensor * k = ggml_new_tensor_2d(ctx, c.type, c.D, n_rows);
    ggml_tensor * v = ggml_new_tensor_2d(ctx, c.type, c.D_v(), n_rows);
    ggml_tensor * r = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, 2, H, c.n_seqs);
    ggml_tensor * b = c.bias ? ggml_new_tensor_2d(ctx, GGML_TYPE_F32, H, c.n_seqs) : nullptr;
    const std::vector<float> sinks = make_sinks(c.sinks, c.G * H);
    ggml_tensor * si = sinks.empty() ? nullptr : ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.G * H);
    ggml_tensor * po = c.max_bias > 0.0f ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_rows) : nullptr;
    ggml_tensor * out = headkv_build_attend_fused(ctx, &state, q, k, v, r, b, si, po);
    if (on_device && !(cuda ? cuda_on_cpu_supports(out->view_src) : ggml_backend_supports_op(g.backend.get(), out->view_src))) {
        printf("  not supported\n");
        return false;
    }
    g.alloc(out);

    set_quantized(k, random_floats((size_t) c.D * n_rows));
    set_quantized(v, random_floats((size_t) c.D_v() * n_rows));
    const std::vector<float> qf = random_floats(ggml_nelements(q), 2.0f);
    ggml_backend_tensor_set(q, qf.data(), 0, ggml_nbytes(q));
    ggml_backend_tensor_set(r, ranges.data(), 0, ggml_nbytes(r));
    std::vector<float> bias(c.lens.size(), 0.0f);
    if (b) {
        for (size_t i = 0; i < bias.size(); ++i) {
            bias[i] = i % 3 == 0 ? 0.0f : std::log((float) (1 + rng() % 3000)); // none, or as many cells as a long range
        }
        ggml_backend_tensor_set(b, bias.data(), 0, ggml_nbytes(b));
    }
    if (si) {
        ggml_backend_tensor_set(si, sinks.data(), 0, ggml_nbytes(si));
    }
    std::vector<float> pos(n_rows, NAN); // of gaps
    for (size_t i = 0; i < c.lens.size(); ++i) {
        float before = 0.0f; // ever more cells are missing towards the beginning
        for (int row = c.lens[i] - 1; row >= 0; --row) {
            pos[ranges[2 * i] + row] = before;
            before -= 1.0f + rng() % (1 + (c.lens[i] - row) / 4);
        }
    }
    if (po) {
        ggml_backend_tensor_set(po, pos.data(), 0, ggml_nbytes(po));
    }
    const std::vector<float> kf = get_floats(k);
    const std::vector<float> vf = get_floats(v);
    // rows outside of the ranges must not be read
    std::vector<bool> used(n_rows, false);
    for (size_t i = 0; i < c.lens.size(); ++i) {
        std::fill(used.begin() + ranges[2 * i], used.begin() + ranges[2 * i] + c.lens[i], true);
    }
    for (ggml_tensor * t : { k, v }) {
        const std::vector<uint8_t> poison(t->nb[1], 0xff);
        for (int i = 0; i < n_rows; ++i) {
            if (!used[i]) {
                ggml_backend_tensor_set(t, poison.data(), i * poison.size(), poison.size());
            }
        }
    }

    double err = 0.0;
    double ref = 0.0;
    std::vector<float> first;
    for (int n_threads : { 1, 2, 3, 4, 7 }) {
        if (on_device && n_threads > 2) {
            break;
        }
        ggml_backend_tensor_memset(out->view_src, 0xff, 0, ggml_nbytes(out->view_src)); // the last run's must not matter
        if (cuda && !gpu) {
            cuda_on_cpu_compute(out->view_src, n_threads == 2);
        } else {
            set_metal_order(n_threads);
            g.run(n_threads);
        }
        const std::vector<float> got = get_floats(out);
        if (first.empty()) {
            first = got;
        } else if (memcmp(first.data(), got.data(), got.size() * sizeof(float)) != 0) {
            printf(on_device ? "  depends on the order of the threads\n" : "  differs with %d threads\n", n_threads);
            return false;
        }
    }
    const std::vector<double> want = attend_in_doubles(c, qf, kf, vf, ranges, bias, sinks, pos);
    for (size_t i = 0; i < want.size(); ++i) {
        err += (want[i] - first[i]) * (want[i] - first[i]);
        ref += want[i] * want[i];
    }
    const double limit = gpu ? 1e-6 : 1e-11;
    const double nmse = ref > 0.0 ? err / ref : err;
    if (!(nmse <= limit)) {
        printf("  nmse %g > %g\n", nmse, limit);
        return false;
    }
    return true;
}

// a token has the bits that it has alone, whatever number of tokens comes with it
static bool test_attend_at_once(const std::string & kernel, ggml_type type, int n_tps) {
    setenv("HEADKV_KERNEL", kernel.c_str(), 1);
    const int D = 64, G = 3, H = 3;
    if (!headkv_attend_kernel_find(type, type, D, D, getenv("HEADKV_KERNEL"))) {
        return true;
    }
    headkv_attend_state state(D, D, G * H, H, 1, type, type);
    state.scale = 0.125f;
    const std::vector<int32_t> ranges = { 0, 40, 40, 500, 540, 129 };
    const std::vector<float> kf = random_floats((size_t) D * 700), vf = random_floats(kf.size()), qf = random_floats((size_t) D * G * H * n_tps);
    const std::vector<float> bias = { 0.0f, 3.0f, 2.0f };
    std::vector<float> got[2];
    for (const bool alone : { false, true }) {
        op_graph g;
        ggml_context * ctx = g.ctx.get();
        const int n = alone ? 1 : n_tps;
        ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, G * H, n);
        ggml_tensor * k = ggml_new_tensor_2d(ctx, type, D, 700);
        ggml_tensor * v = ggml_new_tensor_2d(ctx, type, D, 700);
        ggml_tensor * r = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, 2, H, 1);
        ggml_tensor * b = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, H, 1);
        ggml_tensor * out = headkv_build_attend_fused(ctx, &state, q, k, v, r, b);
        g.alloc(out);
        set_quantized(k, kf);
        set_quantized(v, vf);
        ggml_backend_tensor_set(q, qf.data() + (size_t) (n_tps - n) * D * G * H, 0, ggml_nbytes(q));
        ggml_backend_tensor_set(r, ranges.data(), 0, ggml_nbytes(r));
        ggml_backend_tensor_set(b, bias.data(), 0, ggml_nbytes(b));
        g.run(2);
        got[alone] = get_floats(out);
    }
    const std::vector<float> last(got[0].end() - (ptrdiff_t) got[1].size(), got[0].end());
    if (memcmp(last.data(), got[1].data(), last.size() * sizeof(float)) != 0) {
        printf("  the last one of %d differs\n", n_tps);
        return false;
    }
    return true;
}

// a NaN among the keys of a head is seen in all that it gives, and in nothing else
static bool test_attend_nan(const std::string & kernel, ggml_type type, int i_nan) {
    setenv("HEADKV_KERNEL", kernel.c_str(), 1);
    const int D = 64, G = 3, H = 2, n = 300;
    if (!headkv_attend_kernel_find(type, type, D, D, getenv("HEADKV_KERNEL"))) {
        return true;
    }
    headkv_attend_state state(D, D, G * H, H, 1, type, type);
    state.scale = 0.125f;
    op_graph g;
    ggml_context * ctx = g.ctx.get();
    ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, G * H, 1);
    ggml_tensor * k = ggml_new_tensor_2d(ctx, type, D, H * n);
    ggml_tensor * v = ggml_new_tensor_2d(ctx, type, D, H * n);
    ggml_tensor * r = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, 2, H, 1);
    ggml_tensor * out = headkv_build_attend_fused(ctx, &state, q, k, v, r, nullptr);
    g.alloc(out);
    std::vector<float> kf = random_floats((size_t) D * H * n);
    kf[(size_t) i_nan * D + 5] = NAN;
    set_quantized(k, kf);
    set_quantized(v, random_floats((size_t) D * H * n));
    const std::vector<float> qf = random_floats(D * G * H);
    const std::vector<int32_t> ranges = { 0, n, n, n };
    ggml_backend_tensor_set(q, qf.data(), 0, ggml_nbytes(q));
    ggml_backend_tensor_set(r, ranges.data(), 0, ggml_nbytes(r));
    g.run(2);
    const std::vector<float> got = get_floats(out);
    for (int i = 0; i < D * G * H; ++i) {
        if (std::isnan(got[i]) != (i < D * G)) {
            printf("  value %d of %d is %g\n", i, D * G * H, got[i]);
            return false;
        }
    }
    return true;
}

// a sink that is far below every logit leaves the bits as they are without one
static bool test_attend_low_sinks(const std::string & kernel, ggml_type type, int n_tps) {
    setenv("HEADKV_KERNEL", kernel.c_str(), 1);
    const int D = 64, G = 5, H = 3;
    if (!headkv_attend_kernel_find(type, type, D, D, getenv("HEADKV_KERNEL"))) {
        return true;
    }
    const std::vector<int32_t> ranges = { 0, 300, 300, 0, 300, 77 };
    headkv_attend_state state(D, D, G * H, H, 1, type, type);
    state.scale = 0.125f;
    const auto qf = random_floats((size_t) D * G * H * n_tps), kf = random_floats((size_t) D * 377), vf = random_floats((size_t) D * 377);
    std::vector<float> got[2];
    for (int with : { 0, 1 }) {
        op_graph g;
        ggml_context * ctx = g.ctx.get();
        ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, G * H, n_tps);
        ggml_tensor * k = ggml_new_tensor_2d(ctx, type, D, 377);
        ggml_tensor * v = ggml_new_tensor_2d(ctx, type, D, 377);
        ggml_tensor * r = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, 2, H, 1);
        ggml_tensor * s = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, G * H);
        ggml_tensor * out = headkv_build_attend_fused(ctx, &state, q, k, v, r, nullptr, with ? s : nullptr);
        g.alloc(out);
        set_quantized(k, kf);
        set_quantized(v, vf);
        ggml_backend_tensor_set(q, qf.data(), 0, ggml_nbytes(q));
        ggml_backend_tensor_set(r, ranges.data(), 0, ggml_nbytes(r));
        const std::vector<float> low = make_sinks("-1e30", G * H);
        ggml_backend_tensor_set(s, low.data(), 0, ggml_nbytes(s));
        g.run(2);
        got[with] = get_floats(out);
    }
    return memcmp(got[0].data(), got[1].data(), got[0].size() * sizeof(float)) == 0;
}

//
// score
//

struct score_case {
    std::string kernel;
    ggml_type type;
    int D, G, n_window, n_kv, pool_kernel;
    headkv_pool pool = HEADKV_POOL_MAX;
    float softcap = 0.0f;
    int n_recent = 0; // 0 = n_window
    int n_square = 0;
    std::string sinks = "";
    float max_bias = 0.0f; // of ALiBi

    std::string name() const {
        return "score," + kernel + "," + ggml_type_name(type) + ",D=" + std::to_string(D) + ",G=" + std::to_string(G) + ",w=" +
                std::to_string(n_window) + ",n=" + std::to_string(n_kv) + ",pool=" + std::to_string(pool) + "/" + std::to_string(pool_kernel) +
                ",softcap=" + std::to_string((int) softcap) + ",recent=" + std::to_string(n_recent) + ",square=" + std::to_string(n_square) + ",sinks=" + sinks + ",alibi=" + std::to_string((int) max_bias);
    }
};

static bool test_score(const score_case & c) {
    const bool cuda = c.kernel == "cuda";
    const bool on_device = cuda || c.kernel == "metal";
    const bool composed = c.kernel == "composed"; // of ggml ops, head by head
    setenv("HEADKV_KERNEL", on_device || composed ? "portable" : c.kernel.c_str(), 1);
    if (!headkv_score_kernel_find(getenv("HEADKV_KERNEL"))) {
        return true; // not on this machine
    }
    const int H = 2;
    const int n_cells = c.n_kv + 5;
    const int n_prefix = c.n_kv - (c.n_recent > 0 ? c.n_recent : c.n_window);
    const int n_query = c.n_window * c.G;

    op_graph g(device_of(c.kernel));
    ggml_context * ctx = g.ctx.get();
    ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.D, c.G * H, c.n_window);
    ggml_tensor * k = ggml_new_tensor_2d(ctx, c.type, c.D * H, n_cells);
    ggml_tensor * p = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, c.n_kv);
    const float scale = 1.0f / std::sqrt((float) c.D);
    ggml_tensor * mask = nullptr;
    ggml_tensor * out = nullptr;
    ggml_tensor * stats = nullptr;
    const std::vector<float> sinks = make_sinks(c.sinks, c.G * H);
    ggml_tensor * si = sinks.empty() ? nullptr : ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.G * H);
    if (composed) {
        mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, c.n_kv, c.n_window);
        out = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_prefix, H);
        for (int h = 0; h < H; ++h) {
            ggml_tensor * qh = ggml_view_3d(ctx, q, c.D, c.G, c.n_window, q->nb[1], q->nb[2], h * c.G * q->nb[1]);
            ggml_tensor * kh = ggml_view_2d(ctx, k, c.D, n_cells, k->nb[1], h * ggml_row_size(c.type, c.D));
            ggml_tensor * sh = headkv_build_score(ctx, g.gf, ggml_cont(ctx, ggml_permute(ctx, qh, 0, 2, 1, 3)), ggml_get_rows(ctx, kh, p), mask,
                    n_prefix, scale, c.softcap, c.n_square, c.pool, c.pool_kernel, headkv_sinks_of_head(ctx, si, c.G, h));
            ggml_build_forward_expand(g.gf, ggml_cpy(ctx, sh, ggml_view_1d(ctx, out, n_prefix, h * out->nb[1])));
        }
    } else {
        out = headkv_build_score_fused(ctx, q, k, p, n_prefix, scale, c.softcap, c.n_square, c.pool, c.pool_kernel, si, c.max_bias);
        stats = out->src[3];
    }
    g.alloc(out);
    if (composed && g.is_skipped()) {
        return true;
    }

    if (mask) {
        std::vector<ggml_fp16_t> causal((size_t) c.n_kv * c.n_window, ggml_fp32_to_fp16(0.0f));
        for (int i = 0; i < c.n_window; ++i) {
            std::fill(causal.begin() + i * c.n_kv + c.n_kv - c.n_window + i + 1, causal.begin() + (i + 1) * c.n_kv, ggml_fp32_to_fp16(-INFINITY));
        }
        ggml_backend_tensor_set(mask, causal.data(), 0, ggml_nbytes(mask));
    }
    std::vector<int32_t> cells(n_cells);
    for (int i = 0; i < n_cells; ++i) {
        cells[i] = i;
    }
    std::shuffle(cells.begin(), cells.end(), rng);
    set_quantized(k, random_floats(ggml_nelements(k)));
    const std::vector<float> qf = random_floats(ggml_nelements(q), 2.0f);
    const std::vector<float> kf = get_floats(k);
    ggml_backend_tensor_set(q, qf.data(), 0, ggml_nbytes(q));
    ggml_backend_tensor_set(p, cells.data(), 0, ggml_nbytes(p));
    if (si) {
        ggml_backend_tensor_set(si, sinks.data(), 0, ggml_nbytes(si));
    }

    std::vector<float> first;
    for (int n_threads : { 1, 2, 4, 7 }) {
        if (on_device && n_threads > 2) {
            break;
        }
        if (c.kernel == "metal" && !(ggml_backend_supports_op(g.backend.get(), stats) && ggml_backend_supports_op(g.backend.get(), out))) {
            printf("  not supported\n");
            return false;
        }
        for (ggml_tensor * t : { stats, out }) {
            if (t) {
                ggml_backend_tensor_memset(t, 0xff, 0, ggml_nbytes(t));
            }
        }
        if (!cuda || gpu) {
            set_metal_order(n_threads);
            g.run(n_threads);
        } else if (cuda_on_cpu_supports(stats) && cuda_on_cpu_supports(out)) {
            cuda_on_cpu_compute(stats, n_threads == 2);
            cuda_on_cpu_compute(out, n_threads == 2);
        } else {
            printf("  not supported\n");
            return false;
        }
        const std::vector<float> got = get_floats(out);
        first = first.empty() ? got : first;
        if (memcmp(first.data(), got.data(), got.size() * sizeof(float)) != 0) {
            printf("  depends on the threads\n");
            return false;
        }
    }

    double err = 0.0;
    double ref = 0.0;
    for (int h = 0; h < H; ++h) {
        std::vector<double> mean(n_prefix, 0.0);
        std::vector<double> x(c.n_kv);
        for (int j = 0; j < n_query; ++j) {
            const int n = c.n_kv - c.n_window + j / c.G + 1;
            const double slope = c.max_bias > 0.0f ? slope_in_doubles(c.max_bias, c.G * H, h * c.G + j % c.G) : 0.0;
            double sum = sinks.empty() ? 0.0 : std::exp((double) sinks[h * c.G + j % c.G]);
            for (int i = 0; i < n; ++i) {
                double dot = 0.0;
                for (int d = 0; d < c.D; ++d) {
                    dot += (double) qf[((size_t) (j / c.G) * c.G * H + h * c.G + j % c.G) * c.D + d] * kf[(size_t) cells[i] * c.D * H + h * c.D + d];
                }
                dot *= scale;
                x[i] = std::exp((c.softcap > 0.0f ? c.softcap * std::tanh(dot / c.softcap) : dot) - slope * (n - 1 - i));
                sum += x[i];
            }
            for (int i = 0; i < std::min(n, n_prefix); ++i) {
                mean[i] += std::pow(x[i] / sum, 1 << c.n_square) / n_query;
            }
        }
        for (double & m : mean) {
            m = std::pow(m, 1.0 / (1 << c.n_square));
        }
        for (int i = 0; i < n_prefix; ++i) {
            double want = 0.0;
            for (int o = std::max(0, i - c.pool_kernel / 2); o <= std::min(n_prefix - 1, i + c.pool_kernel / 2); ++o) {
                want = c.pool == HEADKV_POOL_MAX ? std::max(want, mean[o]) : want + mean[o] / c.pool_kernel;
            }
            const double got = first[(size_t) h * n_prefix + i];
            err += (want - got) * (want - got);
            ref += want * want;
        }
    }
    // the products of a device may round the queries to the type of K
    if (!(err <= (gpu ? composed ? 1e-4 : 1e-6 : 1e-11) * ref)) {
        printf("  nmse %g\n", err / ref);
        return false;
    }
    return true;
}

// the probabilities of the queries of a ubatch in double precision, summed over queries and query heads; k in the order of the cells
static std::vector<double> sums_in_doubles(const std::vector<float> & qf, const std::vector<float> & kf, int D, int G, int H, int n_kv, int n_tokens,
        float softcap, const std::vector<float> & sinks, float max_bias) {
    std::vector<double> res((size_t) n_kv * H, 0.0);
    for (int j = 0; j < n_tokens * G * H; ++j) {
        const int h = j % (G * H);
        std::vector<double> x;
        for (int i = 0; i < n_kv - n_tokens + j / (G * H) + 1; ++i) {
            double dot = 0.0;
            for (int d = 0; d < D; ++d) {
                dot += (double) qf[(size_t) j * D + d] * kf[((size_t) i * H + h / G) * D + d] / std::sqrt((double) D);
            }
            const int n_before = n_kv - n_tokens + j / (G * H) - i;
            x.push_back(std::exp((softcap > 0.0f ? softcap * std::tanh(dot / softcap) : dot) - (max_bias > 0.0f ? slope_in_doubles(max_bias, G * H, h) * n_before : 0.0)));
        }
        const double sum = std::accumulate(x.begin(), x.end(), sinks.empty() ? 0.0 : std::exp((double) sinks[h]));
        for (size_t i = 0; i < x.size(); ++i) {
            res[(size_t) h / G * n_kv + i] += x[i] / sum;
        }
    }
    return res;
}

// the last cells are those of the ubatch, which begin with zero; the others have sums already
static bool test_sums(int n_kv, int n_tokens, float softcap, const std::string & kind, float max_bias = 0.0f) {
    const int D = 64, G = 3, H = 2, n_cells = n_kv + 7;
    op_graph g;
    ggml_context * ctx = g.ctx.get();
    ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, G * H, n_tokens);
    ggml_tensor * k = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, D, H, n_kv);
    ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, n_tokens);
    ggml_tensor * sums = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, n_cells, H);
    ggml_tensor * cells = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens);
    ggml_tensor * si = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, G * H);
    headkv_build_sums(ctx, g.gf, q, k, mask, sums, cells, 1.0f / std::sqrt((float) D), softcap, kind.empty() ? nullptr : si, max_bias);
    g.alloc(ggml_graph_node(g.gf, -1));

    const std::vector<float> sinks = make_sinks(kind, G * H);
    ggml_backend_tensor_set(si, sinks.data(), 0, sinks.size() * sizeof(float));
    const float old = kind == "20" ? 1e-6f : 3.0f; // what is added to it must be seen
    const std::vector<float> qf = random_floats(ggml_nelements(q), 2.0f), before(ggml_nelements(sums), old);
    ggml_backend_tensor_set(q, qf.data(), 0, ggml_nbytes(q));
    set_quantized(k, random_floats(ggml_nelements(k)));
    std::vector<ggml_fp16_t> causal((size_t) n_kv * n_tokens, ggml_fp32_to_fp16(0.0f));
    std::vector<int64_t> own;
    for (int i = 0; i < n_tokens; ++i) {
        std::fill(causal.begin() + i * n_kv + n_kv - n_tokens + i + 1, causal.begin() + (i + 1) * n_kv, ggml_fp32_to_fp16(-INFINITY));
        for (int j = 0; j <= n_kv - n_tokens + i && max_bias > 0.0f; ++j) {
            causal[(size_t) i * n_kv + j] = ggml_fp32_to_fp16((float) (j - (n_kv - n_tokens + i)));
        }
        own.push_back(n_kv - n_tokens + i);
    }
    ggml_backend_tensor_set(mask, causal.data(), 0, ggml_nbytes(mask));
    ggml_backend_tensor_set(cells, own.data(), 0, ggml_nbytes(cells));

    const std::vector<double> want = sums_in_doubles(qf, get_floats(k), D, G, H, n_kv, n_tokens, softcap, sinks, max_bias);
    std::vector<float> first;
    for (int n_threads : { 1, 2, 4 }) {
        ggml_backend_tensor_set(sums, before.data(), 0, ggml_nbytes(sums));
        g.run(n_threads);
        const std::vector<float> got = get_floats(sums);
        first = first.empty() ? got : first;
        if (memcmp(first.data(), got.data(), got.size() * sizeof(float)) != 0) {
            printf("  depends on the threads\n");
            return false;
        }
    }
    double err = 0.0, ref = 0.0;
    for (int i = 0; i < n_kv * H; ++i) {
        const double got = first[i / n_kv * n_cells + i % n_kv] - (i % n_kv < n_kv - n_tokens ? old : 0.0f);
        err += (got - want[i]) * (got - want[i]);
        ref += want[i] * want[i];
    }
    // the queries are rounded to F16
    return err <= 1e-5 * ref || (printf("  nmse %g\n", err / ref), false);
}

//
// select
//

static bool test_select(int n_prefix, int H, int n_recent, bool ties, const std::string & kernel) {
    std::vector<float> scores = random_floats((size_t) n_prefix * H);
    for (float & s : scores) {
        s = ties ? std::floor(2.0f * s) / 2.0f : s; // plateaus, also of -0 and 0
    }
    if (n_prefix > 4) {
        scores[3] = NAN; // the worst score, whatever its sign
        scores[1] = -NAN;
    }
    std::vector<int32_t> plan;
    int n_total = 0;
    for (int h = 0; h < H; ++h) {
        const int k = h == 0 ? 0 : h == 1 ? n_prefix
                                          : (int) (rng() % (n_prefix + 1));
        plan.push_back(n_total);
        plan.push_back(k);
        n_total += k + n_recent;
    }
    op_graph g(device_of(kernel));
    ggml_tensor * s = ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_F32, n_prefix, H);
    ggml_tensor * p = ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_I32, 2, H);
    ggml_tensor * out = headkv_build_select(g.ctx.get(), s, p, n_recent, n_total);
    g.alloc(out);
    ggml_backend_tensor_set(s, scores.data(), 0, ggml_nbytes(s));
    ggml_backend_tensor_set(p, plan.data(), 0, ggml_nbytes(p));

    std::vector<int32_t> want;
    for (int h = 0; h < H; ++h) {
        const float * sh = scores.data() + (size_t) h * n_prefix;
        std::vector<int32_t> order(n_prefix);
        for (int i = 0; i < n_prefix; ++i) {
            order[i] = i;
        }
        const auto value = [&](int i) { return std::isnan(sh[i]) ? -INFINITY : sh[i]; };
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return value(a) > value(b); });
        order.resize(plan[2 * h + 1]);
        std::sort(order.begin(), order.end());
        want.insert(want.end(), order.begin(), order.end());
        for (int i = 0; i < n_recent; ++i) {
            want.push_back(n_prefix + i);
        }
    }
    for (int n_threads : { 1, 2, 5 }) {
        ggml_backend_tensor_memset(out->view_src, 0xff, 0, ggml_nbytes(out->view_src));
        if (kernel == "cuda" && !gpu) {
            cuda_on_cpu_compute(out->view_src, n_threads == 2);
        } else {
            set_metal_order(n_threads);
            g.run(n_threads);
        }
        std::vector<int32_t> got(n_total);
        ggml_backend_tensor_get(out, got.data(), 0, ggml_nbytes(out));
        if (got != want) {
            return false;
        }
    }
    return true;
}

//
// compact
//

struct compact_case {
    std::string kernel;
    ggml_type type;
    int D;
    std::vector<int> n_keep; // of each head; -1 = all
    int n_pos;
    bool is_cut = false; // pool and cells are parts of larger tensors, aligned to no more than a block

    std::string name() const {
        std::string res = "compact," + kernel + "," + ggml_type_name(type) + ",D=" + std::to_string(D) + ",n=" + std::to_string(n_pos) + ",cut=" + std::to_string(is_cut) + ",keep=";
        if (n_keep.size() > 8) {
            return res + std::to_string(n_keep[0]) + "x" + std::to_string(n_keep.size());
        }
        for (int n : n_keep) {
            res += n < 0 ? "all/" : std::to_string(n) + "/";
        }
        return res;
    }
};

static std::vector<uint8_t> random_bytes(size_t n) {
    std::vector<uint8_t> res(n);
    for (uint8_t & x : res) {
        x = (uint8_t) rng();
    }
    return res;
}

// rows of n, or the same of a larger tensor, a block behind its beginning and with a block between rows
static ggml_tensor * new_rows(ggml_context * ctx, ggml_type type, int64_t n, int64_t n_rows, bool is_cut) {
    const int64_t n_block = is_cut ? ggml_blck_size(type) : 0;
    ggml_tensor * whole = ggml_new_tensor_2d(ctx, type, n + n_block, n_rows + is_cut);
    return is_cut ? ggml_view_2d(ctx, whole, n, n_rows, whole->nb[1], ggml_type_size(type)) : whole;
}

// Some positions of each head, ascending; their cells lie anywhere in the staging, the ranges of the heads in the pool in another order
// and with rows between them that nothing may touch.
static bool test_compact(const compact_case & c) {
    const int H = (int) c.n_keep.size();
    const int n_cells = c.n_pos + 5;
    std::vector<int32_t> kept, plan(3 * H), cell(n_cells), order(H);
    std::iota(cell.begin(), cell.end(), 0);
    std::shuffle(cell.begin(), cell.end(), rng);
    cell.resize(c.n_pos);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    for (int h = 0; h < H; ++h) {
        std::vector<int32_t> pos(c.n_pos);
        std::iota(pos.begin(), pos.end(), 0);
        std::shuffle(pos.begin(), pos.end(), rng);
        pos.resize(c.n_keep[h] < 0 ? c.n_pos : c.n_keep[h]);
        std::sort(pos.begin(), pos.end());
        plan[3 * h] = (int32_t) kept.size();
        plan[3 * h + 1] = (int32_t) pos.size();
        kept.insert(kept.end(), pos.begin(), pos.end());
    }
    int n_rows = 1;
    for (int h : order) {
        plan[3 * h + 2] = n_rows;
        n_rows += plan[3 * h + 1] + 2;
    }
    const size_t n_bytes = ggml_row_size(c.type, c.D);

    op_graph g(device_of(c.kernel));
    ggml_context * ctx = g.ctx.get();
    ggml_tensor * pool = new_rows(ctx, c.type, c.D, n_rows, c.is_cut);
    ggml_tensor * cells = new_rows(ctx, c.type, (int64_t) c.D * H, n_cells, c.is_cut);
    ggml_tensor * t_kept = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, std::max<int64_t>(kept.size(), 1));
    ggml_tensor * t_cell = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, c.n_pos);
    ggml_tensor * t_plan = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 3, H);
    ggml_tensor * out = headkv_build_compact(ctx, pool, cells, t_kept, t_cell, t_plan);
    const bool on_cpu = c.kernel == "cuda" && !gpu;
    if (on_cpu ? !cuda_on_cpu_supports(out) : !ggml_backend_supports_op(g.backend.get(), out)) {
        printf("  not supported\n");
        return false;
    }
    g.alloc(out);

    const std::vector<uint8_t> staged = random_bytes(ggml_nbytes(cells)), before = random_bytes(ggml_nbytes(pool->view_src ? pool->view_src : pool));
    ggml_backend_tensor_set(cells, staged.data(), 0, staged.size());
    ggml_backend_tensor_set(t_kept, kept.data(), 0, kept.size() * sizeof(int32_t));
    ggml_backend_tensor_set(t_cell, cell.data(), 0, ggml_nbytes(t_cell));
    ggml_backend_tensor_set(t_plan, plan.data(), 0, ggml_nbytes(t_plan));

    std::vector<uint8_t> want = before;
    for (int h = 0; h < H; ++h) {
        for (int i = 0; i < plan[3 * h + 1]; ++i) {
            memcpy(want.data() + pool->view_offs + (plan[3 * h + 2] + i) * pool->nb[1],
                    staged.data() + cell[kept[plan[3 * h] + i]] * cells->nb[1] + h * n_bytes, n_bytes);
        }
    }
    ggml_tensor * whole = pool->view_src ? pool->view_src : pool;
    for (int n_threads : { 1, 2, 5 }) {
        ggml_backend_tensor_set(whole, before.data(), 0, before.size());
        if (on_cpu) {
            cuda_on_cpu_compute(out, n_threads == 2);
        } else {
            set_metal_order(n_threads);
            g.run(n_threads);
        }
        std::vector<uint8_t> got(want.size());
        ggml_backend_tensor_get(whole, got.data(), 0, got.size());
        if (got != want) {
            printf("  other bytes\n");
            return false;
        }
    }
    return true;
}

// rows that lie beyond 4 GiB in pool and cells, of which nothing but these is memory
static bool test_compact_far(const std::string & kernel) {
    const int D = 64, H = 2, n_pos = 40;
    const int64_t n_far = ((int64_t) 5 << 30) / (D * H * sizeof(ggml_fp16_t)); // cells
    struct mapped {
        void * data;
        size_t size;
        explicit mapped(size_t size) :
            data(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)), size(size) {}
        ~mapped() { munmap(data, size); }
    };

    op_graph g(device_of(kernel));
    ggml_context * ctx = g.ctx.get();
    ggml_tensor * pool = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, D, H * n_far);
    ggml_tensor * cells = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, D * H, n_far);
    const ggml_backend_dev_t dev = ggml_backend_get_device(g.backend.get());
    mapped of_pool(ggml_nbytes(pool)), of_cells(ggml_nbytes(cells));
    if (of_pool.data == MAP_FAILED || of_cells.data == MAP_FAILED) {
        printf("  no addresses\n");
        return false;
    }
    for (auto & [t, at] : { std::make_pair(pool, &of_pool), std::make_pair(cells, &of_cells) }) {
        g.bufs.emplace_back(ggml_backend_dev_buffer_from_host_ptr(dev, at->data, at->size, at->size));
        ggml_backend_tensor_alloc(g.bufs.back().get(), t, ggml_backend_buffer_get_base(g.bufs.back().get()));
    }
    ggml_tensor * t_kept = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, H * n_pos);
    ggml_tensor * t_cell = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_pos);
    ggml_tensor * t_plan = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 3, H);
    ggml_tensor * out = headkv_build_compact(ctx, pool, cells, t_kept, t_cell, t_plan);
    for (ggml_tensor * t : { t_kept, t_cell, t_plan }) {
        g.bufs.emplace_back(ggml_backend_alloc_buffer(g.backend.get(), ggml_nbytes(t)));
        ggml_backend_tensor_alloc(g.bufs.back().get(), t, ggml_backend_buffer_get_base(g.bufs.back().get()));
    }
    ggml_backend_view_init(out);
    ggml_build_forward_expand(g.gf, out);

    // the last cells, backwards, and the last rows of the pool
    const int32_t last = (int32_t) n_far - n_pos, first_row = (int32_t) (H * n_far) - H * n_pos;
    std::vector<int32_t> kept(H * n_pos), cell(n_pos), plan;
    for (int i = 0; i < H * n_pos; ++i) {
        kept[i] = i % n_pos;
        cell[i % n_pos] = last + n_pos - 1 - i % n_pos;
    }
    for (int h = 0; h < H; ++h) {
        plan.insert(plan.end(), { h * n_pos, n_pos, first_row + h * n_pos });
    }
    ggml_backend_tensor_set(t_kept, kept.data(), 0, ggml_nbytes(t_kept));
    ggml_backend_tensor_set(t_cell, cell.data(), 0, ggml_nbytes(t_cell));
    ggml_backend_tensor_set(t_plan, plan.data(), 0, ggml_nbytes(t_plan));
    const std::vector<uint8_t> staged = random_bytes(n_pos * cells->nb[1]);
    ggml_backend_tensor_set(cells, staged.data(), last * cells->nb[1], staged.size());
    if (kernel == "cuda") {
        cuda_on_cpu_compute(out, false);
    } else {
        set_metal_order(1);
        g.run(1);
    }
    std::vector<uint8_t> got(H * n_pos * pool->nb[1]), want;
    ggml_backend_tensor_get(pool, got.data(), first_row * pool->nb[1], got.size());
    for (int h = 0; h < H; ++h) {
        for (int i = 0; i < n_pos; ++i) {
            const auto at = staged.begin() + (n_pos - 1 - i) * cells->nb[1] + h * pool->nb[1];
            want.insert(want.end(), at, at + (ptrdiff_t) pool->nb[1]);
        }
    }
    return got == want;
}

// a type that no cache has
static bool test_compact_refuses(const std::string & kernel) {
    op_graph g(device_of(kernel));
    ggml_context * ctx = g.ctx.get();
    const auto is_refused = [&](int D) {
        ggml_tensor * kept = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 2);
        ggml_tensor * plan = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 3, 2);
        ggml_tensor * out = headkv_build_compact(ctx, ggml_new_tensor_2d(ctx, GGML_TYPE_I8, D, 9), ggml_new_tensor_2d(ctx, GGML_TYPE_I8, 2 * D, 9), kept, kept, plan);
        return kernel == "cuda" && !gpu ? !cuda_on_cpu_supports(out) : !ggml_backend_supports_op(g.backend.get(), out);
    };
    return is_refused(3) && !is_refused(6);
}

// Attended twice, scored, selected and compacted by the CPU and by a device's kernels on the CPU: the same cells, in both orders of threads and,
// as the results of one op are what the next one reads, of ops.
static bool test_kept(const std::string & kernel, int n_kv, int n_window) {
    const int D = 64, G = 4, H = 4;
    const int n_prefix = n_kv - n_window;
    unsetenv("HEADKV_KERNEL"); // the fastest

    headkv_attend_state state(D, D, G * H, H, 1, GGML_TYPE_F16, GGML_TYPE_F16);
    state.scale = 0.125f;
    std::vector<int32_t> plan, of_compact;
    std::vector<int32_t> ranges;
    int n_total = 0;
    for (int h = 0; h < H; ++h) {
        plan.insert(plan.end(), { n_total, (h + 1) * n_prefix / (H + 1) });
        of_compact.insert(of_compact.end(), { n_total, plan.back() + n_window, n_total });
        n_total += plan.back() + n_window;
        ranges.insert(ranges.end(), { h * n_window, n_window });
    }
    std::vector<int32_t> cells(n_kv);
    std::iota(cells.begin(), cells.end(), 0);
    const std::vector<float> kf = random_floats((size_t) D * H * n_kv), pool = random_floats((size_t) D * H * n_window, 2.0f);
    const std::vector<float> qf = random_floats((size_t) D * G * H * n_window, 2.0f);

    std::vector<int32_t> want;
    std::vector<float> want_rows;
    for (int i = 0; i < 3; ++i) {
        op_graph g(device_of(i > 0 ? kernel : "cpu"));
        ggml_context * ctx = g.ctx.get();
        ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, G * H, n_window);
        ggml_tensor * kv = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, D, H * n_window);
        ggml_tensor * r = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, H);
        ggml_tensor * k = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, D * H, n_kv);
        ggml_tensor * c = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_kv);
        ggml_tensor * p = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, H);
        ggml_tensor * once = headkv_build_attend_fused(ctx, &state, q, kv, kv, r);
        ggml_tensor * twice = headkv_build_attend_fused(ctx, &state, ggml_reshape_3d(ctx, once, D, G * H, n_window), kv, kv, r);
        ggml_tensor * score = headkv_build_score_fused(ctx, ggml_reshape_3d(ctx, twice, D, G * H, n_window), k, c, n_prefix, 0.5f, 0.0f, 0, HEADKV_POOL_MAX, 7);
        ggml_tensor * kept = headkv_build_select(ctx, score, p, n_window, n_total);
        ggml_tensor * rows = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, D, n_total);
        ggml_tensor * p_compact = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 3, H);
        ggml_tensor * compacted = headkv_build_compact(ctx, rows, k, kept, c, p_compact);
        g.alloc(compacted);

        set_quantized(k, kf);
        set_quantized(kv, pool);
        ggml_backend_tensor_set(p_compact, of_compact.data(), 0, ggml_nbytes(p_compact));
        ggml_backend_tensor_set(q, qf.data(), 0, ggml_nbytes(q));
        ggml_backend_tensor_set(r, ranges.data(), 0, ggml_nbytes(r));
        ggml_backend_tensor_set(c, cells.data(), 0, ggml_nbytes(c));
        ggml_backend_tensor_set(p, plan.data(), 0, ggml_nbytes(p));
        if (i > 0 && kernel == "cuda") {
            for (ggml_tensor * op : { once->view_src, twice->view_src, score->src[3], score, kept->view_src, compacted }) {
                cuda_on_cpu_compute(op, i == 2);
            }
        } else {
            set_metal_order(i);
            g.run(1); // no threads, because test_barriers() forks
        }
        std::vector<int32_t> got(n_total);
        ggml_backend_tensor_get(kept, got.data(), 0, ggml_nbytes(kept));
        const std::vector<float> got_rows = get_floats(rows);
        want = i == 0 ? got : want;
        want_rows = i == 0 ? got_rows : want_rows;
        if (got != want || got_rows != want_rows) {
            printf("  other cells\n");
            return false;
        }
    }
    return true;
}

// composed of ggml ops, one head: the same cells, ties included
// more cells than its keys are exact for; nothing is allocated
static bool test_select_composed_refuses(int64_t n_prefix, bool is_refused) {
    ggml_init_params init = { /*.mem_size =*/64 * ggml_tensor_overhead(), /*.mem_buffer =*/nullptr, /*.no_alloc =*/true };
    ggml_context_ptr ctx(ggml_init(init));
    ggml_tensor * scores = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n_prefix);
    try {
        headkv_build_select_composed(ctx.get(), scores, 8, ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 2));
    } catch (const std::length_error &) {
        return is_refused;
    }
    return !is_refused;
}

static bool test_select_composed(int n_prefix, int n_keep, int n_values) {
    std::vector<float> scores((size_t) n_prefix);
    for (float & s : scores) {
        s = (float) (rng() % n_values) / n_values;
    }
    const std::vector<int32_t> plan = { 0, n_keep };
    std::vector<int32_t> got[2];
    for (int composed : { 0, 1 }) {
        op_graph g(device_of(composed ? "composed" : "cpu"));
        ggml_tensor * s = ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_F32, n_prefix, 1);
        ggml_tensor * p = ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_I32, 2, 1);
        ggml_tensor * w = ggml_new_tensor_1d(g.ctx.get(), GGML_TYPE_F32, 1);
        ggml_tensor * out = composed
                ? headkv_build_select_composed(g.ctx.get(), ggml_view_1d(g.ctx.get(), s, n_prefix, 0), n_keep, w)
                : headkv_build_select(g.ctx.get(), s, p, 1, n_keep + 1);
        g.alloc(out);
        if (composed && g.is_skipped()) {
            return true;
        }
        const float recent = (float) n_prefix;
        ggml_backend_tensor_set(s, scores.data(), 0, ggml_nbytes(s));
        ggml_backend_tensor_set(composed ? w : p, composed ? (const void *) &recent : plan.data(), 0, composed ? sizeof(float) : ggml_nbytes(p));
        g.run(2);
        got[composed].resize(n_keep + 1);
        ggml_backend_tensor_get(out, got[composed].data(), 0, ggml_nbytes(out));
    }
    return got[0] == got[1];
}

//
// buckets
//

static bool test_buckets() {
    // all ways to cut 7 sorted heads, against the dynamic program
    for (int round = 0; round < 50; ++round) {
        std::vector<uint32_t> rows(7);
        for (auto & r : rows) {
            r = rng() % 100;
        }
        std::sort(rows.begin(), rows.end());
        for (uint32_t n = 1; n <= 7; ++n) {
            const auto padding = [&](const std::vector<uint32_t> & sizes) {
                uint64_t res = 0;
                size_t first = 0;
                for (uint32_t size : sizes) {
                    for (size_t i = first; i < first + size; ++i) {
                        res += rows[first + size - 1] - rows[i];
                    }
                    first += size;
                }
                return first == rows.size() ? res : UINT64_MAX;
            };
            uint64_t best = UINT64_MAX;
            for (uint32_t cuts = 0; cuts < 64; ++cuts) {
                std::vector<uint32_t> sizes(1, 1);
                for (int i = 0; i < 6; ++i) {
                    if (cuts >> i & 1) {
                        sizes.push_back(1);
                    } else {
                        sizes.back()++;
                    }
                }
                if (sizes.size() <= n) {
                    best = std::min(best, padding(sizes));
                }
            }
            const auto got = headkv_bucket_sizes(rows, n);
            if (got.size() > n || padding(got) != best) {
                return false;
            }
        }
    }
    return true;
}

static void perf() {
    // Llama-3.2-1B's layer; lengths with the skew of real budgets, and one long uniform cache
    const std::vector<std::vector<int>> lens = { { 20, 28, 35, 44, 60, 120, 190, 527 }, std::vector<int>(8, 1152), std::vector<int>(8, 8192) };
    printf("kernel,type,D,G,cells,us,ns_per_query_and_cell\n");
    for (const char * kernel : { "avx512", "avx2", "neon", "portable" }) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
            for (int D : { 64, 128 }) {
                for (const auto & l : lens) {
                    if (!headkv_attend_kernel_find(type, type, D, D, kernel)) {
                        continue;
                    }
                    setenv("HEADKV_KERNEL", kernel, 1);
                    headkv_attend_state state(D, D, 32, 8, 1, type, type);
                    state.scale = 0.1f;
                    op_graph g;
                    std::vector<int32_t> ranges;
                    int n_rows = 0;
                    for (int len : l) {
                        ranges.push_back(n_rows);
                        ranges.push_back(len);
                        n_rows += len;
                    }
                    ggml_tensor * q = ggml_new_tensor_3d(g.ctx.get(), GGML_TYPE_F32, D, 32, 1);
                    ggml_tensor * k = ggml_new_tensor_2d(g.ctx.get(), type, D, n_rows);
                    ggml_tensor * v = ggml_new_tensor_2d(g.ctx.get(), type, D, n_rows);
                    ggml_tensor * r = ggml_new_tensor_3d(g.ctx.get(), GGML_TYPE_I32, 2, 8, 1);
                    g.alloc(headkv_build_attend_fused(g.ctx.get(), &state, q, k, v, r));
                    set_quantized(k, random_floats(ggml_nelements(k)));
                    set_quantized(v, random_floats(ggml_nelements(v)));
                    const auto qf = random_floats(ggml_nelements(q));
                    ggml_backend_tensor_set(q, qf.data(), 0, ggml_nbytes(q));
                    ggml_backend_tensor_set(r, ranges.data(), 0, ggml_nbytes(r));
                    std::vector<double> us;
                    for (int i = 0; i < 30; ++i) {
                        const auto t0 = std::chrono::steady_clock::now();
                        g.run(1);
                        us.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - t0).count());
                    }
                    std::sort(us.begin(), us.end());
                    printf("%s,%s,%d,4,%d,%.1f,%.2f\n", kernel, ggml_type_name(type), D, n_rows, us[15], 1000 * us[15] / (4.0 * n_rows));
                }
            }
        }
    }
}

// what sinks cost in a layer of gpt-oss-20b, without and with them in turn
static void perf_sinks() {
    const int D = 64, n_head = 64, H = 8;
    printf("type,cells_of_head,without_us,with_us,with/without\n");
    unsetenv("HEADKV_KERNEL");
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (int len : { 128, 1024, 8192 }) {
            op_graph g[2];
            headkv_attend_state state(D, D, n_head, H, 1, type, type);
            state.scale = 0.125f;
            std::vector<int32_t> ranges;
            for (int h = 0; h < H; ++h) {
                ranges.insert(ranges.end(), { h * len, len });
            }
            ggml_tensor * k[2];
            ggml_tensor * v[2];
            for (int with : { 0, 1 }) {
                ggml_context * ctx = g[with].ctx.get();
                ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, n_head, 1);
                // the same memory, whose place decides more than the sinks
                k[with] = with ? ggml_view_tensor(ctx, k[0]) : ggml_new_tensor_2d(ctx, type, D, H * len);
                v[with] = with ? ggml_view_tensor(ctx, v[0]) : ggml_new_tensor_2d(ctx, type, D, H * len);
                ggml_tensor * r = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, 2, H, 1);
                ggml_tensor * s = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_head);
                g[with].alloc(headkv_build_attend_fused(ctx, &state, q, k[with], v[with], r, nullptr, with ? s : nullptr));
                set_quantized(k[with], random_floats(ggml_nelements(k[with])));
                set_quantized(v[with], random_floats(ggml_nelements(v[with])));
                const auto qf = random_floats(ggml_nelements(q)), sf = random_floats(n_head);
                ggml_backend_tensor_set(q, qf.data(), 0, ggml_nbytes(q));
                ggml_backend_tensor_set(s, sf.data(), 0, ggml_nbytes(s));
                ggml_backend_tensor_set(r, ranges.data(), 0, ggml_nbytes(r));
            }
            std::vector<double> us[2];
            for (int i = 0; i < 2 * 101; ++i) {
                const auto t0 = std::chrono::steady_clock::now();
                g[i % 2].run(1);
                us[i % 2].push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - t0).count());
            }
            for (auto & u : us) {
                std::sort(u.begin(), u.end());
            }
            printf("%s,%d,%.1f,%.1f,%.3f\n", ggml_type_name(type), len, us[0][50], us[1][50], us[1][50] / us[0][50]);
        }
    }
}

// scores of a layer of Llama-3.2-1B or 3.1-8B, by both paths in turn
static void perf_score() {
    const int H = 8;
    const int G = 4;
    printf("type,D,G,window,n_kv,composed_us,fused_us,composed_mib,fused_mib,fused/composed\n");
    unsetenv("HEADKV_KERNEL");
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (int D : { 64, 128 }) {
            for (int n_window : { 8, 64 }) {
                for (int n_kv : { 2048, 8192, 32768 }) {
                    op_graph g[2]; // composed: one head, as the engine computes them
                    ggml_tensor * k[2];
                    ggml_tensor * q[2];
                    double mib[2];
                    for (int fused : { 0, 1 }) {
                        ggml_context * ctx = g[fused].ctx.get();
                        k[fused] = ggml_new_tensor_2d(ctx, type, D * H, n_kv);
                        if (fused) {
                            q[1] = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, G * H, n_window);
                            ggml_tensor * cells = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_kv);
                            ggml_tensor * s = headkv_build_score_fused(ctx, q[1], k[1], cells, n_kv - 8, 0.125f, 0.0f, 2, HEADKV_POOL_MAX, 31);
                            mib[1] = (ggml_nbytes(s) + ggml_nbytes(s->src[3]) + ggml_nbytes(cells)) / 1048576.0;
                            g[1].alloc(s);
                            std::vector<int32_t> order(n_kv);
                            for (int i = 0; i < n_kv; ++i) {
                                order[i] = i;
                            }
                            ggml_backend_tensor_set(cells, order.data(), 0, ggml_nbytes(cells));
                        } else {
                            q[0] = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, n_window, G);
                            ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, n_window);
                            ggml_tensor * head = ggml_view_2d(ctx, k[0], D, n_kv, k[0]->nb[1], 0);
                            ggml_tensor * s = headkv_build_score(ctx, g[0].gf, q[0], head, mask, n_kv - 8, 0.125f, 0.0f, 2, HEADKV_POOL_MAX, 31);
                            ggml_build_forward_expand(g[0].gf, s);
                            // the graph allocator reuses what the context allocator does not: the products are the largest part
                            mib[0] = (4.0 * n_kv * n_window * G + ggml_nbytes(mask) + 4.0 * n_kv * H) / 1048576.0;
                            g[0].alloc(s);
                            ggml_backend_buffer_clear(g[0].bufs[0].get(), 0);
                        }
                        set_quantized(k[fused], random_floats(ggml_nelements(k[fused])));
                        const auto qf = random_floats(ggml_nelements(q[fused]));
                        ggml_backend_tensor_set(q[fused], qf.data(), 0, ggml_nbytes(q[fused]));
                    }
                    std::vector<double> us[2];
                    for (int i = 0; i < 2 * 7; ++i) {
                        const auto t0 = std::chrono::steady_clock::now();
                        for (int h = 0; h < (i % 2 ? 1 : H); ++h) {
                            g[i % 2].run(1);
                        }
                        us[i % 2].push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - t0).count());
                    }
                    for (auto & u : us) {
                        std::sort(u.begin(), u.end());
                    }
                    printf("%s,%d,%d,%d,%d,%.0f,%.0f,%.2f,%.2f,%.2f\n", ggml_type_name(type), D, G, n_window, n_kv, us[0][3], us[1][3], mib[0], mib[1], us[1][3] / us[0][3]);
                }
            }
        }
    }
}

//
// the loops of the fit
//

static bool is_close(const char * what, double err, double ref, double limit) {
    if (err <= limit * ref) {
        return true;
    }
    printf("  %s: error %.3g\n", what, err / ref);
    return false;
}

// the solution of a positive definite system, put in again; one that is not is refused
static bool test_solve(const headkv_fit_kernel & kernel, int n, int n_columns) {
    const int n_rank = std::max(1, n / 2); // the diagonal makes up for the rest
    const auto x = random_floats((size_t) n_rank * n), right = random_floats((size_t) n * n_columns);
    std::vector<double> full((size_t) n * n, 0.0), half, b(right.begin(), right.end());
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < n; ++j) {
            full[i * n + j] = i == j ? 0.01 : 0.0;
            for (int r = 0; r < n_rank; ++r) {
                full[i * n + j] += (double) x[r * n + i] * x[r * n + j];
            }
        }
        half.insert(half.end(), full.begin() + i * n, full.begin() + i * n + i + 1);
    }
    std::vector<double> broken = half;
    broken[(size_t) (n - 1) * (n + 2) / 2] = -1.0;
    if (kernel.cholesky(broken.data(), n) || !kernel.cholesky(half.data(), n)) {
        printf("  what is positive definite is not told\n");
        return false;
    }
    kernel.solve(half.data(), n, b.data(), n_columns);
    double err = 0.0;
    double ref = 0.0;
    for (int i = 0; i < n; ++i) {
        for (int d = 0; d < n_columns; ++d) {
            double sum = 0.0;
            for (int j = 0; j < n; ++j) {
                sum += full[i * n + j] * b[j * n_columns + d];
            }
            err += std::pow(sum - right[i * n_columns + d], 2);
            ref += std::pow(right[i * n_columns + d], 2);
        }
    }
    return is_close("solve", std::sqrt(err), std::sqrt(ref), 1e-9);
}

// a as it is and transposed
static bool test_add_product(const headkv_fit_kernel & kernel, int n_rows, int n_i, int n, bool transposed) {
    const int a_row = transposed ? 1 : n_i + 3, a_i = transposed ? n_rows + 5 : 1, b_i = n + 16, y_row = n + 8;
    const auto a = random_floats((size_t) n_rows * a_row + (size_t) n_i * a_i), b = random_floats((size_t) n_i * b_i), before = random_floats((size_t) n_rows * y_row);
    auto y = before;
    kernel.add_product(a.data(), a_row, a_i, n_rows, b.data(), b_i, n_i, n, y.data(), y_row);
    double err = 0.0;
    for (int j = 0; j < n_rows; ++j) {
        for (int d = 0; d < y_row; ++d) {
            double sum = before[j * y_row + d];
            for (int i = 0; i < n_i && d < n; ++i) {
                sum += (double) a[j * a_row + i * a_i] * b[i * b_i + d];
            }
            err = std::max(err, std::abs(sum - y[j * y_row + d]));
        }
    }
    return is_close("add_product", err, std::sqrt((double) n_i), 1e-5);
}

// keys block by block, whose largest logits grow and fall; some of a block, or all of it, are not seen
static bool test_soften(const headkv_fit_kernel & kernel, int n) {
    constexpr int N = headkv_fit_kernel::N_KEYS;
    const std::vector<int> n_seen = { 0, 1, N, N, 7, 0, N };
    float m = -INFINITY, s = 0.0f;
    std::vector<float> y(n, 0.0f), all;
    double err = 0.0;
    for (size_t i = 0; i < n_seen.size(); ++i) {
        auto x = random_floats(N, 5.0f + 5.0f * (i % 3));
        std::fill(x.begin() + n_seen[i], x.end(), -INFINITY);
        all.insert(all.end(), x.begin(), x.begin() + n_seen[i]);
        const auto logits = x;
        kernel.soften(x.data(), &m, &s, y.data(), n);
        for (int j = 0; j < n_seen[i]; ++j) {
            err = std::max<double>(err, std::abs(x[j] - std::exp(logits[j] - m)));
        }
        std::transform(y.begin(), y.end(), y.begin(), [&](float v) { return v + std::accumulate(x.begin(), x.begin() + n_seen[i], 0.0f); });
    }
    double sum = 0.0;
    for (float x : all) {
        sum += std::exp((double) x - m);
    }
    const bool is_largest = m == *std::max_element(all.begin(), all.end());
    return is_close("largest", !is_largest, 1.0, 0.5) && is_close("probabilities", err, 1.0, 1e-6) && is_close("sum", std::abs(s - sum), sum, 1e-5) &&
            is_close("what is scaled", std::abs(y[0] - sum) + std::abs(y[n - 1] - sum), sum, 1e-5);
}

static bool test_fit(const char * name, int n) {
    const headkv_fit_kernel * kernel = headkv_fit_kernel_find(name);
    if (!kernel) {
        return true; // not on this machine
    }
    bool res = test_solve(*kernel, n, 64) && test_solve(*kernel, n, 32) && test_soften(*kernel, GGML_PAD(n, 32));
    for (bool transposed : { false, true }) {
        res = res && test_add_product(*kernel, GGML_PAD(n, 4), n + 1, 96, transposed) && test_add_product(*kernel, 32, n, GGML_PAD(n, 32), transposed);
    }
    return res;
}

// what the references of a head are answered by some cells, ascending, in double precision; those that they do not see are left out
static std::vector<double> answers_in_doubles(const headkv_fit_layer & l, const std::vector<float> & qf, const std::vector<float> & kf, const std::vector<float> & vf,
        int64_t ih, const std::vector<int32_t> & cells) {
    const int64_t D = l.k->ne[0], D_v = l.v->ne[0], H = (int64_t) l.ranges.size(), G = (int64_t) l.sinks.size() / H;
    std::vector<double> res;
    for (size_t i = 0; i < l.pos.size(); ++i) {
        double sum = l.sinks.empty() ? 0.0 : std::exp((double) l.sinks[ih * G + headkv_ref_head(l.pos[i], (int32_t) ih, (int32_t) H, (int32_t) G)]);
        std::vector<double> y(D_v, 0.0);
        for (int32_t cell : cells) {
            if (cell > l.pos[i]) {
                break;
            }
            double dot = 0.0;
            for (int64_t d = 0; d < D; ++d) {
                dot += (double) qf[(l.slots[i] * H + ih) * D + d] * kf[(l.cells[cell] * H + ih) * D + d] * l.scale;
            }
            const double p = std::exp(l.softcap > 0.0f ? l.softcap * std::tanh(dot / l.softcap) : dot);
            sum += p;
            for (int64_t d = 0; d < D_v; ++d) {
                y[d] += p * vf[(l.cells[cell] * H + ih) * D_v + d];
            }
        }
        for (double & x : y) {
            res.push_back(sum > 0.0 ? x / sum : 0.0);
        }
    }
    return res;
}

// the answers of all cells, and the residual of those that are kept
static bool test_fit_answers(int n, float softcap, const std::string & kind, int D_v) {
    unsetenv("HEADKV_KERNEL");
    const int D = 64, H = 2, G = 3;
    const std::vector<llama_pos> pos = headkv_ref_positions(n);
    std::vector<int32_t> slots(pos.size()), cells(n);
    std::iota(slots.begin(), slots.end(), 0);
    std::iota(cells.begin(), cells.end(), 0);
    std::shuffle(slots.begin(), slots.end(), rng);
    std::shuffle(cells.begin(), cells.end(), rng);
    std::vector<headkv_range> ranges(H);
    for (int ih = 0; ih < H; ++ih) {
        ranges[ih].off = ih * n;
        for (int i = ih; i < n; i += ih + 2) {
            ranges[ih].pos.push_back(i);
        }
    }
    op_graph g;
    ggml_context * ctx = g.ctx.get();
    ggml_tensor * refs = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, D, (int64_t) H * pos.size());
    ggml_tensor * k_all = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, D * H, n);
    ggml_tensor * v_all = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, D_v * H, n);
    ggml_tensor * k = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, D, H * n);
    ggml_tensor * v = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, D_v, H * n);
    const headkv_fit_layer layer = { pos, slots, cells, ranges, refs, k_all, v_all, k, v, 0.125f, softcap, make_sinks(kind, G * H) };
    headkv_fitting::job_t job(layer, 2);
    ggml_tensor * args[] = { refs, k_all, v_all };
    ggml_tensor * answers = ggml_custom_4d(ctx, GGML_TYPE_F32, job.sizes.n_value, (int64_t) pos.size(), H, 1, args, 3, headkv_fitting::answers_op, GGML_N_TASKS_MAX, &job);
    ggml_tensor * more[] = { answers, refs, k, v_all };
    g.alloc(ggml_custom_inplace(ctx, v, more, 4, headkv_fitting::values_op, GGML_N_TASKS_MAX, &job));
    for (ggml_tensor * t : { refs, k_all, v_all }) {
        set_quantized(t, random_floats(ggml_nelements(t), t == refs ? 3.0f : 1.0f));
    }
    for (auto [pool, from] : { std::make_pair(k, k_all), std::make_pair(v, v_all) }) {
        const size_t nb = pool->nb[1];
        for (int ih = 0; ih < H; ++ih) {
            for (size_t i = 0; i < ranges[ih].pos.size(); ++i) {
                memcpy((char *) pool->data + (ranges[ih].off + i) * nb, (const char *) from->data + cells[ranges[ih].pos[i]] * from->nb[1] + ih * nb, nb);
            }
        }
    }
    g.run(2);

    const auto qf = get_floats(refs), kf = get_floats(k_all), vf = get_floats(v_all), got = get_floats(answers);
    std::vector<int32_t> all(n);
    std::iota(all.begin(), all.end(), 0);
    for (int ih = 0; ih < H; ++ih) {
        const auto y = answers_in_doubles(layer, qf, kf, vf, ih, all), x = answers_in_doubles(layer, qf, kf, vf, ih, ranges[ih].pos);
        double err = 0.0, ref = 0.0, before = 0.0, whole = 0.0;
        for (size_t i = 0; i < y.size(); ++i) {
            const size_t i_ref = i / D_v;
            err += std::pow(y[i] - got[(ih * pos.size() + i_ref) * job.sizes.n_value + i % D_v], 2);
            ref += y[i] * y[i];
            if (i_ref % headkv_fitting::N_HELD == headkv_fitting::N_HELD - 1 && pos[i_ref] >= ranges[ih].pos[0]) {
                before += std::pow(y[i] - x[i], 2);
                whole += y[i] * y[i];
            }
        }
        if (!is_close("answers", err, ref, 1e-10) || !is_close("residual", std::abs(job.outcomes[ih].before - before / whole), before / whole, 1e-5)) {
            return false;
        }
    }
    return true;
}

// of every stage: ranges that are cut and that are not, several tiles and chunks
static bool run_cases(const std::string & kernel) {
    std::vector<int> many(kernel == "cuda" ? 128 : 0, 0); // which does not cut so many ranges
    many.push_back(300);
    return test_attend({ kernel, GGML_TYPE_F16, 64, 8, { 140 } }) && test_attend({ kernel, GGML_TYPE_F16, 64, 1, many, 1, kernel == "cuda" ? 64 : 5 }) &&
            test_score({ kernel, GGML_TYPE_F16, 64, 3, 3, 600, 7 }) && test_select(600, 3, 8, true, kernel) && test_kept(kernel, 60, 8);
}

// Without any one of the barriers of the kernels, or of those between kernels, something is wrong in one of the orders of the threads. In
// processes of their own, because what is wrong may be an address.
static bool test_barriers(const std::string & kernel, int n_least, int (*n_barriers)(), const char * (*barrier)(int), void (*leave_out)(int)) {
    rng.seed(1);
    if (!run_cases(kernel)) {
        return false;
    }
    bool res = true;
    for (int i = 0; i < n_barriers(); ++i) {
        fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            alarm(30);
            if (!freopen("/dev/null", "w", stdout) || !freopen("/dev/null", "w", stderr)) {
                _exit(0);
            }
            leave_out(i);
            bool ok = true;
            for (int seed = 1; ok && seed <= 8; ++seed) { // what is drawn decides whether it shows, and not the cases before this one
                rng.seed(seed);
                ok = run_cases(kernel);
            }
            _exit(ok ? 0 : 1);
        }
        int status = 0;
        if (child < 0 || waitpid(child, &status, 0) != child || (WIFEXITED(status) && WEXITSTATUS(status) == 0)) {
            printf("  nothing is wrong without the barrier %s\n", barrier(i));
            res = false;
        }
    }
    if (n_barriers() < n_least) {
        printf("  only %d barriers are reached\n", n_barriers());
        return false;
    }
    return res;
}

#ifdef HEADKV_METAL_ON_CPU

// what the CPU alone runs
static bool test_metal_refuses() {
    const auto is_refused = [](ggml_type type, int D, int D_v, float max_bias) {
        headkv_attend_state state(D, D_v, 8, 2, 1, type, type);
        state.max_bias = max_bias;
        op_graph g(metal);
        ggml_context * ctx = g.ctx.get();
        ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, 8, 1);
        ggml_tensor * k = ggml_new_tensor_2d(ctx, type, D, 10);
        ggml_tensor * v = ggml_new_tensor_2d(ctx, type, D_v, 10);
        ggml_tensor * r = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, 2);
        ggml_tensor * pos = max_bias > 0.0f ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 10) : nullptr;
        return !ggml_backend_supports_op(g.backend.get(), headkv_build_attend_fused(ctx, &state, q, k, v, r, nullptr, nullptr, pos)->view_src);
    };
    return is_refused(GGML_TYPE_F16, 128, 64, 0.0f) && is_refused(GGML_TYPE_F16, 64, 64, 8.0f) && is_refused(GGML_TYPE_F16, 32, 32, 0.0f) &&
            is_refused(GGML_TYPE_F32, 64, 64, 0.0f) && is_refused(GGML_TYPE_Q4_0, 64, 64, 0.0f) && !is_refused(GGML_TYPE_F16, 64, 64, 0.0f);
}

#endif

// CUDA's kernels know one size
static bool test_cuda_refuses_two_sizes() {
    headkv_attend_state state(128, 64, 8, 2, 1, GGML_TYPE_F16, GGML_TYPE_F16);
    op_graph g;
    ggml_context * ctx = g.ctx.get();
    ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 128, 8, 1);
    ggml_tensor * k = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, 128, 10);
    ggml_tensor * v = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, 64, 10);
    ggml_tensor * r = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, 2);
    return !cuda_on_cpu_supports(headkv_build_attend_fused(ctx, &state, q, k, v, r)->view_src);
}

// K and V of different sizes
static void add_two_sizes(op_cases & cases) {
    for (const char * kernel : { "portable", "avx2", "avx512", "neon" }) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            for (const auto & [D, D_v] : { std::make_pair(192, 128), std::make_pair(64, 96), std::make_pair(48, 32), std::make_pair(96, 80) }) {
                if (D % ggml_blck_size(type) != 0 || D_v % ggml_blck_size(type) != 0) {
                    continue;
                }
                const attend_case of_case[] = {
                    { kernel, type, D, 1, { 0, 1, 31, 255 }, 1, 1, 0.0f, false, "", D_v },
                    { kernel, type, D, 7, { 3, 3000 }, 1, 1, 30.0f, true, "mixed", D_v },
                    { kernel, type, D, 4, { 9, 300, 140, 10, 20, 131 }, 3, 2, 0.0f, true, "", D_v },
                    { kernel, type, D, 12, { 9, 300, 140, 10 }, 1, 9, 0.0f, false, "", D_v },
                };
                for (const attend_case & c : of_case) {
                    cases.push_back({ c.name(), [c]() { return test_attend(c); } });
                }
            }
        }
    }
    for (int D_v : { 48, 96 }) {
        for (const char * sinks : { "", "mixed" }) {
            cases.push_back({ "fit_answers,n=300,D_v=" + std::to_string(D_v) + ",sinks=" + sinks, [=]() { return test_fit_answers(300, 20.0f, sinks, D_v); } });
        }
    }
    cases.push_back({ "cuda refuses two sizes", test_cuda_refuses_two_sizes });
}

// kernel: cases run and failed; kernels of other machines are not among them, since their cases do nothing here
static void write_result(const char * path, const std::map<std::string, std::pair<int, int>> & of, int n_run, int n_fail) {
    FILE * file = fopen(path, "w");
    if (!file) {
        printf("cannot write %s\n", path);
        exit(2);
    }
    fprintf(file, "{\"run\": %d, \"failed\": %d, \"skipped\": %d, \"kernels\": {", n_run, n_fail, n_skip);
    for (auto it = of.begin(); it != of.end(); ++it) {
        fprintf(file, "%s\"%s\": [%d, %d]", it == of.begin() ? "" : ", ", it->first.c_str(), it->second.first, it->second.second);
    }
    fprintf(file, "}}\n");
    fclose(file);
}

static int usage(const std::string & what) {
    const bool is_asked = what == "-h" || what == "--help";
    fprintf(is_asked ? stdout : stderr, "%susage: test-headkv-ops [device | -c CASE | -k PART_OF_THE_NAMES | -s SHARE/SHARES] [--out FILE.json]\n"
                                        "       test-headkv-ops kept\n"
                                        "       test-headkv-ops perf [attend | score | sinks | prompt | isa]\n",
            is_asked ? "" : ("'" + what + "' is no option\n").c_str());
    return is_asked ? 0 : 2;
}

int main(int argc, char ** argv) {
    const char * out = nullptr;
    if (argc > 2 && strcmp(argv[argc - 2], "--out") == 0) {
        out = argv[argc - 1];
        argc -= 2;
    }
    if (argc > 1 && strcmp(argv[1], "kept") == 0) {
        print_kept();
        return 0;
    }
    if (argc > 1 && strcmp(argv[1], "perf") == 0) {
        const std::string what = argc > 2 ? argv[2] : "attend";
        for (const auto & [name, measure] : std::map<std::string, void (*)()>{
                     { "attend", perf }, { "score", perf_score }, { "sinks", perf_sinks }, { "prompt", perf_prompt }, { "isa", perf_isa } }) {
            if (what == name) {
                measure();
                return 0;
            }
        }
        return usage(argv[2]);
    }
    const bool on_gpu = argc == 2 && strcmp(argv[1], "device") == 0;
    const bool is_choice = argc == 3 && (strcmp(argv[1], "-c") == 0 || strcmp(argv[1], "-k") == 0 || strcmp(argv[1], "-s") == 0);
    if (argc > 1 && !on_gpu && !is_choice) {
        return usage(argv[1]);
    }
    if (on_gpu) {
        gpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU);
        if (!gpu) {
            printf("there is no GPU\n");
            return 1;
        }
        printf("%s: %s\n", ggml_backend_dev_name(gpu), ggml_backend_dev_description(gpu));
    }
    const std::string gpu_name = on_gpu ? ggml_backend_dev_name(gpu) : "";
    const std::string gpu_kernels = gpu_name.rfind("CUDA", 0) == 0 ? "cuda" : gpu_name.rfind("MTL", 0) == 0 ? "metal"
                                                                                                            : "";
    if (gpu_kernels == "metal") {
        metal = gpu;
    }
#ifdef HEADKV_METAL_ON_CPU
    metal = ggml_backend_reg_dev_get(ggml_backend_metal_reg(), 0);
#endif
    const std::string only = argc > 2 && strcmp(argv[1], "-c") == 0 ? argv[2] : "";
    const std::string part = argc > 2 && strcmp(argv[1], "-k") == 0 ? argv[2] : "";
    int share = 0;
    int n_shares = 1; // "-s 1/4": the second, sixth, tenth .. case, where processes share them
    if (argc > 2 && strcmp(argv[1], "-s") == 0 && (sscanf(argv[2], "%d/%d", &share, &n_shares) != 2 || share < 0 || share >= n_shares)) {
        printf("-s %s: want SHARE/SHARES, the first share is 0\n", argv[2]);
        return 1;
    }

    op_cases cases;
    for (bool is_refused : { false, true }) {
        cases.push_back({ is_refused ? "select_composed,refused" : "select_composed,longest",
                [=]() { return test_select_composed_refuses(HEADKV_MAX_SELECT_COMPOSED + is_refused, is_refused); } });
    }
    const auto add = [&](const attend_case & c) { cases.push_back({ c.name(), [c]() { return test_attend(c); } }); };

    const std::vector<std::vector<int>> lens = { { 0, 1, 31, 255 }, { 256, 257, 1, 0 }, { 3, 3000 }, { 127, 128, 129, 64 }, { 500 } };
    for (const char * kernel : { "portable", "avx2", "avx512", "neon" }) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            for (int D : { 32, 64, 80, 96, 128, 256 }) {
                if (D % ggml_blck_size(type) != 0) {
                    continue;
                }
                for (int G : { 1, 2, 3, 4, 5, 7, 8, 12 }) {
                    add({ kernel, type, D, G, lens[(D + G) % lens.size()] });
                }
            }
            for (int n_tps : { 2, 4, 5, 9 }) {
                add({ kernel, type, 64, 4, { 9, 300, 140, 10 }, 1, n_tps });
                add({ kernel, type, 64, 7, { 9, 300, 140, 10, 20, 131 }, 3, n_tps });
            }
            add({ kernel, type, 64, 4, { 5, 300 }, 1, 1, 30.0f });
            for (int n_tps : { 1, 3, 9 }) {
                add({ kernel, type, 64, 4, { 9, 1, 140, 0, 20, 131, 3, 300, 2 }, 3, n_tps, 0.0f, true });
            }
            add({ kernel, type, 128, 7, { 5, 300, 257 }, 1, 1, 30.0f, true });
        }
    }
    // ALiBi: the same, without them; numbers of heads that are a power of two and that are not
    for (const char * kernel : { "portable", "avx2", "avx512", "neon" }) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0 }) {
            for (float max_bias : { 8.0f, 2.0f }) {
                add({ kernel, type, 64, 1, { 0, 1, 127, 128, 129, 1000 }, 1, 1, 0.0f, false, "", 0, max_bias });
                add({ kernel, type, 64, 8, { 9, 1, 140, 0, 20, 131, 3, 300 }, 2, 3, 30.0f, false, "", 0, max_bias });
                add({ kernel, type, 96, 12, { 300, 140 }, 1, 9, 0.0f, false, "", 0, max_bias });
                add({ kernel, type, 32, 7, { 3000 }, 1, 1, 0.0f, false, "", 0, max_bias });
            }
        }
    }
    // sinks: ranges of no row up to several chunks, of several sequences, with softcap and bias
    // thread by thread, the other types of Metal's kernels run in every shape and once for what the types have in common
    const auto is_enough = [&](const char * kernel, ggml_type type) { return strcmp(kernel, "metal") == 0 && !on_gpu && type != GGML_TYPE_F16; };
    const auto is_device = [](const char * kernel) { return strcmp(kernel, "cuda") == 0 || strcmp(kernel, "metal") == 0; };
    for (const char * kernel : { "portable", "avx2", "avx512", "neon", "cuda", "metal" }) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0 }) {
            if (is_device(kernel) && type == GGML_TYPE_F32) {
                continue;
            }
            for (const char * sinks : { "-1e30", "0", "20", "mixed" }) {
                if (is_enough(kernel, type)) {
                    continue;
                }
                add({ kernel, type, 64, 8, { 0, 1, 127, 128, 129, 1000 }, 1, 1, 0.0f, false, sinks });
                add({ kernel, type, 64, 8, { 0, 1, 127, 128, 129, 1000 }, 3, 1, 30.0f, true, sinks });
                add({ kernel, type, 128, 3, { 0, 1000, 129, 1 }, 2, 3, 0.0f, true, sinks });
            }
            add({ kernel, type, 96, 5, { 9, 300, 140, 10 }, 1, 5, 20.0f, false, "mixed" });
            add({ kernel, type, 64, 12, { 7, 130 }, 1, 9, 0.0f, false, "mixed" });
        }
    }
    for (const char * kernel : { "portable", "avx2", "avx512", "neon" }) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
            for (int n_tps : { 1, 6 }) {
                cases.push_back({ std::string("low_sinks,") + kernel + "," + ggml_type_name(type) + ",tps=" + std::to_string(n_tps),
                        [=]() { return test_attend_low_sinks(kernel, type, n_tps); } });
            }
        }
    }
    for (const char * kernel : { "cuda", "metal" }) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0 }) {
            for (int D : { 64, 80, 96, 128, 256 }) {
                if (D % ggml_blck_size(type) == 0) {
                    for (int G : { 1, 4, 7 }) {
                        add({ kernel, type, D, G, lens[(D + G) % 2] });
                    }
                }
            }
            if (is_enough(kernel, type)) {
                continue;
            }
            add({ kernel, type, 64, 12, { 3, 3000 } }); // skew, and a group of more queries than a block takes
            add({ kernel, type, 128, 4, { 127, 0, 129, 0, 0, 385, 1, 1, 0, 2, 31, 255, 256, 257, 128, 1, 7 }, 17 }); // 17 sequences
            for (int n_tps : { 2, 5 }) {
                add({ kernel, type, 64, 7, { 9, 300, 140, 10, 20, 131 }, 3, n_tps, 0.0f, true });
            }
            add({ kernel, type, 64, 4, { 5, 300 }, 1, 1, 30.0f, true });
        }
        add({ kernel, GGML_TYPE_F16, 64, 4, std::vector<int>(40, 3), 20, 1, 0.0f, true }); // more ranges than a warp has lanes
        // so many tokens that ranges are not cut
        add({ kernel, GGML_TYPE_F16, 64, 4, { 7, 300 }, 1, strcmp(kernel, "cuda") == 0 || on_gpu ? 1030 : 17 });
    }
    const auto add_score = [&](const score_case & c) { cases.push_back({ c.name(), [c]() { return test_score(c); } }); };
    for (const char * kernel : { "portable", "avx2", "avx512", "neon", "composed", "cuda", "metal" }) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0 }) {
            for (int D : { 64, 80, 96, 128, 256 }) {
                if (D % ggml_blck_size(type) == 0) {
                    add_score({ kernel, type, D, D == 64 ? 7 : 2, 8, D == 128 ? 700 : 100, 7 });
                }
            }
            if (is_enough(kernel, type)) {
                continue;
            }
            for (int n_kv : { 2, 3, 32, 129, 256, 257, 513 }) {
                add_score({ kernel, type, 64, 3, std::min(8, n_kv - 1), n_kv, 5 });
            }
            add_score({ kernel, type, 64, 1, 1, 300, 31, HEADKV_POOL_AVG });
            add_score({ kernel, type, 64, 4, 3, 300, 1, HEADKV_POOL_AVG, 30.0f });
            add_score({ kernel, type, 64, 1, 32, 1000, 63 }); // a query sees none of a chunk but its beginning
            add_score({ kernel, type, 64, 4, is_device(kernel) && !on_gpu ? 9 : 64, 300, 31, HEADKV_POOL_MAX, 0.0f, 8, 2 });
            add_score({ kernel, type, 64, 3, 5, 300, 7, HEADKV_POOL_AVG, 0.0f, 20, 1 });
            add_score({ kernel, type, 64, 2, 40, 90, 1, HEADKV_POOL_MAX, 30.0f, 1, 3 });
            for (float max_bias : { 8.0f, 1.0f }) {
                if (strcmp(kernel, "composed") != 0 && !is_device(kernel)) {
                    add_score({ kernel, type, 64, 1, 8, 600, 7, HEADKV_POOL_MAX, 0.0f, 0, 0, "", max_bias });
                    add_score({ kernel, type, 64, 6, 9, 300, 31, HEADKV_POOL_AVG, 30.0f, 8, 2, "", max_bias });
                }
            }
            for (const char * sinks : { "-1e30", "0", "20", "mixed" }) {
                add_score({ kernel, type, 64, 8, 2, 600, 7, HEADKV_POOL_MAX, 0.0f, 0, 0, sinks });
                add_score({ kernel, type, 64, 3, 9, 300, 31, HEADKV_POOL_AVG, 30.0f, 8, 2, sinks });
            }
        }
    }
    for (const char * kernel : { "portable", "avx2", "avx512", "neon" }) {
        for (int n : { 1, 2, 15, 16, 17, 33, 129, 384 }) {
            cases.push_back({ std::string("fit,") + kernel + ",n=" + std::to_string(n), [=]() { return test_fit(kernel, n); } });
        }
    }
    cases.push_back({ "sums,n=200/33,alibi=8", [=]() { return test_sums(200, 33, 0.0f, "", 8.0f); } });
    for (const char * sinks : { "", "-1e30", "0", "20", "mixed" }) {
        for (float softcap : { 0.0f, 20.0f }) {
            const std::string of = ",softcap=" + std::to_string((int) softcap) + ",sinks=" + sinks;
            cases.push_back({ "sums,n=200/33" + of, [=]() { return test_sums(200, 33, softcap, sinks); } });
            cases.push_back({ "sums,n=64/64" + of, [=]() { return test_sums(64, 64, softcap, sinks); } });
            cases.push_back({ "fit_answers,n=300" + of, [=]() { return test_fit_answers(300, softcap, sinks, 64); } });
            cases.push_back({ "fit_answers,n=1300" + of, [=]() { return test_fit_answers(1300, softcap, sinks, 64); } });
        }
    }
    for (int n_prefix : { 1, 2, 31, 257, 5000 }) {
        for (bool ties : { false, true }) {
            for (const std::string kernel : { "cpu", "cuda", "metal" }) {
                cases.push_back({ "select," + kernel + ",n=" + std::to_string(n_prefix) + ",ties=" + std::to_string(ties),
                        [=]() { return test_select(n_prefix, 6, 8, ties, kernel); } });
            }
        }
    }
    for (const std::string kernel : { "cpu", "cuda", "metal" }) {
        const auto add_compact = [&](const compact_case & c) { cases.push_back({ c.name(), [c]() { return test_compact(c); } }); };
        for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL }) {
            for (int D : { 32, 64, 80, 96, 128, 256, 608 }) { // of the last one rows have more words of 2 bytes than a block has threads
                for (bool is_cut : { false, true }) {
                    if (D % ggml_blck_size(type) == 0) {
                        add_compact({ kernel, type, D, { 9, 0, -1, 1 }, 31, is_cut });
                    }
                }
            }
        }
        add_compact({ kernel, GGML_TYPE_F16, 128, { 0 }, 10 });
        add_compact({ kernel, GGML_TYPE_F16, 128, { 0, 0, 0 }, 10 });
        add_compact({ kernel, GGML_TYPE_F16, 64, { -1 }, 1 });
        add_compact({ kernel, GGML_TYPE_Q8_0, 128, { 1000, 3, 0, 5, 17, 200, 64, -1 }, 3000 });
        add_compact({ kernel, GGML_TYPE_Q8_0, 608, std::vector<int>(512, 5), 8 }); // two blocks of each head, which take a row at a time
        if (!on_gpu) {
            cases.push_back({ "compact," + kernel + ",far", [=]() { return test_compact_far(kernel); } });
        }
        if (kernel != "cpu") {
            cases.push_back({ "compact," + kernel + ",refused", [=]() { return test_compact_refuses(kernel); } });
        }
    }
    for (int n_prefix : { 1, 2, 31, 257, 5000 }) {
        for (int n_values : { 1, 3, 1 << 20 }) {
            for (int n_keep : { 1, n_prefix / 3, n_prefix - 1 }) {
                if (n_keep > 0) {
                    cases.push_back({ "select_composed,n=" + std::to_string(n_prefix) + ",values=" + std::to_string(n_values) + ",keep=" + std::to_string(n_keep),
                            [=]() { return test_select_composed(n_prefix, n_keep, n_values); } });
                }
            }
        }
    }
    for (int n_kv : { 40, 300, 1000 }) {
        for (const std::string kernel : { "cuda", "metal" }) {
            if (!on_gpu) { // whose scores differ in their last bits
                cases.push_back({ "kept," + kernel + ",n=" + std::to_string(n_kv), [=]() { return test_kept(kernel, n_kv, 8); } });
            }
        }
    }
    for (const char * kernel : { "portable", "avx2", "avx512", "neon" }) {
#ifndef NDEBUG
        if (strcmp(kernel, "portable") == 0) {
            continue; // ggml asserts that its dot products are numbers
        }
#endif
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16 }) {
            for (int i_nan : { 0, 200, 299 }) {
                cases.push_back({ std::string("nan,") + kernel + "," + ggml_type_name(type) + ",row=" + std::to_string(i_nan),
                        [=]() { return test_attend_nan(kernel, type, i_nan); } });
            }
        }
    }
    for (const char * kernel : { "portable", "avx2", "avx512", "neon" }) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
            for (int n_tps : { 2, 4, 5, 32 }) {
                cases.push_back({ std::string("at_once,") + kernel + "," + ggml_type_name(type) + ",tokens=" + std::to_string(n_tps), [=]() { return test_attend_at_once(kernel, type, n_tps); } });
            }
        }
    }
    cases.push_back({ "buckets", test_buckets });
    if (!on_gpu) {
        cases.push_back({ "cuda barriers", []() { return test_barriers("cuda", 15, cuda_on_cpu_n_barriers, cuda_on_cpu_barrier, cuda_on_cpu_leave_out); } });
    }
#ifdef HEADKV_METAL_ON_CPU
    cases.push_back({ "metal barriers", []() { return test_barriers("metal", 16, metal_on_cpu_n_barriers, metal_on_cpu_barrier, metal_on_cpu_leave_out); } });
    cases.push_back({ "metal refuses", test_metal_refuses });
#endif
    add_two_sizes(cases);
    add_prompt_cases(cases);

    std::vector<std::string> kernels; // those that the machine has; the cases of others do nothing
    for (const char * kernel : { "portable", "avx2", "avx512", "neon" }) {
        if (headkv_attend_kernel_find(GGML_TYPE_F16, GGML_TYPE_F16, 64, 64, kernel)) {
            kernels.push_back(kernel);
        }
    }
    std::map<std::string, std::pair<int, int>> of_kernel; // cases run and failed

    int n_fail = 0;
    int n_run = 0;
    for (size_t i = 0; i < cases.size(); ++i) {
        const auto & [name, run] = cases[i];
        const auto is_of = [&](const char * what) { return name.find(what) != std::string::npos; };
        if ((int) (i % n_shares) != share || (!only.empty() && name != only) || !is_of(part.c_str()) || (on_gpu && !is_of("composed") && !(!gpu_kernels.empty() && is_of(gpu_kernels.c_str())))) {
            continue;
        }
        if (!metal && is_of("metal")) {
            continue;
        }
        n_run++;
        const int n_skip_before = n_skip;
        unsetenv("HEADKV_KERNEL"); // what the case before asked for
        const bool ok = run();
        if (!ok) {
            printf("FAIL -c '%s'\n", name.c_str());
            n_fail++;
        }
        for (const std::string kernel : { "portable", "avx2", "avx512", "neon", "composed", "cuda", "metal" }) {
            const bool is_here = kernel == "composed" || kernel == "cuda" || kernel == "metal" || std::find(kernels.begin(), kernels.end(), kernel) != kernels.end();
            if (is_here && n_skip == n_skip_before && is_of(kernel.c_str())) {
                of_kernel[kernel].first++;
                of_kernel[kernel].second += !ok;
            }
        }
    }
    n_run -= n_skip;
    printf("kernels:");
    for (const std::string & kernel : kernels) {
        printf(" %s", kernel.c_str());
    }
    printf("\n%d of %d cases failed%s\n", n_fail, n_run, n_skip > 0 ? (", " + std::to_string(n_skip) + " skipped").c_str() : "");
    if (out) {
        write_result(out, of_kernel, n_run, n_fail);
    }
    return n_fail > 0 || n_run == 0;
}
