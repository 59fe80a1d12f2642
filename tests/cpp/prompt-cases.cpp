// Attention of prompts against its definition in double precision, beside ggml's own flash attention on the same rows.

#include "op-graph.h"

#include "headkv-attend-prompt.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

namespace {

constexpr int N_THREADS = 3; // work spaces; some runs have more threads, and some fewer

struct prompt_case {
    std::string kernel;
    ggml_type type;
    int D, G, H;
    int n_past; // cells before the tokens
    int n_tokens;
    float softcap = 0.0f;
    std::string sinks = "";
    int n_window = 0; // cells that a token sees, 0 = all
    int n_value = 0;  // elements of V, 0 = D

    int D_v() const { return n_value > 0 ? n_value : D; }
    int n() const { return n_past + n_tokens; }

    std::string name() const {
        return "prompt," + kernel + "," + ggml_type_name(type) + ",D=" + std::to_string(D) + "/" + std::to_string(D_v()) + ",G=" + std::to_string(G) + ",H=" + std::to_string(H) +
                ",past=" + std::to_string(n_past) + ",tokens=" + std::to_string(n_tokens) + ",softcap=" + std::to_string((int) softcap) + ",sinks=" + sinks + ",window=" + std::to_string(n_window);
    }
};

// the tensors of a case, filled
struct prompt_data {
    ggml_tensor *q, *k, *v, *cells, *seen, *sinks;
    ggml_tensor *sums = nullptr, *fresh = nullptr;
    std::vector<float> qf, kf, vf, sinksf;
    std::vector<int32_t> cellsf, seenf;

    prompt_data(ggml_context * ctx, const prompt_case & c, int n_cells) {
        q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.D, c.G * c.H, c.n_tokens);
        k = ggml_new_tensor_3d(ctx, c.type, c.D, c.H, n_cells);
        v = ggml_new_tensor_3d(ctx, c.type, c.D_v(), c.H, n_cells);
        cells = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_cells);
        seen = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, c.n_tokens);
        sinksf = make_sinks(c.sinks, c.G * c.H);
        sinks = sinksf.empty() ? nullptr : ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.G * c.H);
    }

    // shuffled: cells of the sequence are anywhere, and what lies between them is NaN
    void set(const prompt_case & c, bool shuffled) {
        const int n_cells = (int) cells->ne[0];
        cellsf.resize(n_cells);
        std::iota(cellsf.begin(), cellsf.end(), 0);
        if (shuffled) {
            std::shuffle(cellsf.begin(), cellsf.end(), rng);
        }
        for (int t = 0; t < c.n_tokens; ++t) {
            const int end = c.n_past + t + 1;
            seenf.push_back(c.n_window > 0 ? std::max(0, end - c.n_window) : 0);
            seenf.push_back(end);
        }
        qf = random_floats(ggml_nelements(q), 2.0f);
        set_quantized(k, random_floats(ggml_nelements(k)));
        set_quantized(v, random_floats(ggml_nelements(v)));
        ggml_backend_tensor_set(q, qf.data(), 0, ggml_nbytes(q));
        for (ggml_tensor * t : { k, v }) {
            const std::vector<uint8_t> poison(t->nb[2], 0xff);
            for (int i = c.n(); i < n_cells; ++i) {
                ggml_backend_tensor_set(t, poison.data(), (size_t) cellsf[i] * poison.size(), poison.size());
            }
        }
        std::fill(cellsf.begin() + c.n(), cellsf.end(), -1);
        ggml_backend_tensor_set(cells, cellsf.data(), 0, ggml_nbytes(cells));
        ggml_backend_tensor_set(seen, seenf.data(), 0, ggml_nbytes(seen));
        if (sinks) {
            ggml_backend_tensor_set(sinks, sinksf.data(), 0, ggml_nbytes(sinks));
        }
        kf = get_floats(k);
        vf = get_floats(v);
    }

    void make_sums(ggml_context * ctx, const prompt_case & c) {
        sums = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, cells->ne[0], c.H);
        fresh = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, c.n_tokens);
    }

    // 1 everywhere, which the cells of the tokens are to forget
    void set_sums(const prompt_case & c) const {
        const std::vector<float> ones(ggml_nelements(sums), 1.0f);
        ggml_backend_tensor_set(sums, ones.data(), 0, ggml_nbytes(sums));
        const std::vector<int64_t> own(cellsf.begin() + c.n_past, cellsf.begin() + c.n());
        ggml_backend_tensor_set(fresh, own.data(), 0, ggml_nbytes(fresh));
    }

    // answers; attention: that of each cell, [H][all cells], begun as by set_sums()
    std::vector<double> in_doubles(const prompt_case & c, std::vector<double> * attention = nullptr) const {
        std::vector<double> res;
        if (attention) {
            attention->assign(cells->ne[0] * c.H, 1.0);
            for (int i = 0; i < c.n_tokens * c.H; ++i) {
                (*attention)[i / c.n_tokens * cells->ne[0] + cellsf[c.n_past + i % c.n_tokens]] = 0.0;
            }
        }
        for (int t = 0; t < c.n_tokens; ++t) {
            for (int g = 0; g < c.G * c.H; ++g) {
                const float * query = qf.data() + ((size_t) t * c.G * c.H + g) * c.D;
                const int h = g / c.G;
                std::vector<double> s;
                for (int i = seenf[2 * t]; i < seenf[2 * t + 1]; ++i) {
                    double dot = 0.0;
                    for (int d = 0; d < c.D; ++d) {
                        dot += (double) query[d] * kf[((size_t) cellsf[i] * c.H + h) * c.D + d];
                    }
                    dot /= std::sqrt((double) c.D);
                    s.push_back(c.softcap > 0.0f ? c.softcap * std::tanh(dot / c.softcap) : dot);
                }
                if (!sinksf.empty()) {
                    s.push_back(sinksf[g]);
                }
                const double m = *std::max_element(s.begin(), s.end());
                double sum = 0.0;
                for (double & x : s) {
                    x = std::exp(x - m);
                    sum += x;
                }
                std::vector<double> o(c.D_v(), 0.0);
                for (int i = seenf[2 * t]; i < seenf[2 * t + 1]; ++i) {
                    if (attention) {
                        (*attention)[h * cells->ne[0] + cellsf[i]] += s[i - seenf[2 * t]] / sum;
                    }
                    for (int d = 0; d < c.D_v(); ++d) {
                        o[d] += s[i - seenf[2 * t]] / sum * vf[((size_t) cellsf[i] * c.H + h) * c.D_v() + d];
                    }
                }
                res.insert(res.end(), o.begin(), o.end());
            }
        }
        return res;
    }
};


// flash attention of ggml as upstream's graphs call it, on cells in their natural order
ggml_tensor * build_flash_attn(ggml_context * ctx, const prompt_case & c, const prompt_data & x, ggml_tensor ** mask) {
    *mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, x.k->ne[2], c.n_tokens);
    ggml_tensor * res = ggml_flash_attn_ext(ctx, ggml_permute(ctx, x.q, 0, 2, 1, 3), ggml_permute(ctx, x.k, 0, 2, 1, 3), ggml_permute(ctx, x.v, 0, 2, 1, 3), *mask,
            1.0f / std::sqrt((float) c.D), 0.0f, c.softcap);
    ggml_flash_attn_ext_add_sinks(res, x.sinks);
    ggml_prec_set_acc(res, GGML_PREC_F32);
    return res;
}

void set_mask(ggml_tensor * mask, const prompt_data & x) {
    std::vector<ggml_fp16_t> data(ggml_nelements(mask), ggml_fp32_to_fp16(-INFINITY));
    for (int t = 0; t < (int) mask->ne[1]; ++t) {
        std::fill(data.begin() + t * mask->ne[0] + x.seenf[2 * t], data.begin() + t * mask->ne[0] + x.seenf[2 * t + 1], ggml_fp32_to_fp16(0.0f));
    }
    ggml_backend_tensor_set(mask, data.data(), 0, ggml_nbytes(mask));
}

double nmse_of(const std::vector<float> & got, const std::vector<double> & want) {
    double err = 0.0, ref = 0.0;
    for (size_t i = 0; i < want.size(); ++i) {
        err += (want[i] - got[i]) * (want[i] - got[i]);
        ref += want[i] * want[i];
    }
    return err / ref;
}

bool has_kernel(const std::string & kernel) {
    setenv("HEADKV_KERNEL", kernel.c_str(), 1);
    return headkv_prompt_kernel_find(kernel.c_str()) != nullptr;
}

bool test_prompt(const prompt_case & c) {
    if (!has_kernel(c.kernel)) {
        return true; // not on this machine
    }
    headkv_attend_state state(c.D, c.D_v(), c.G * c.H, c.H, 1, c.type, c.type);
    state.scale = 1.0f / std::sqrt((float) c.D);
    state.softcap = c.softcap;
    op_graph g;
    prompt_data x(g.ctx.get(), c, c.n() + 37);
    x.make_sums(g.ctx.get(), c);
    ggml_tensor * out = headkv_build_attend_prompt(g.ctx.get(), &state, N_THREADS, x.q, x.k, x.v, x.cells, x.seen, x.sinks, x.sums, x.fresh);
    g.alloc(out);
    x.set(c, true);
    std::vector<float> first, first_sums;
    for (int n_threads : { 1, 3, 8 }) {
        x.set_sums(c);
        g.run(n_threads);
        const std::vector<float> got = get_floats(out);
        const std::vector<float> got_sums = get_floats(x.sums);
        if (first.empty()) {
            first = got;
            first_sums = got_sums;
        } else if (memcmp(first.data(), got.data(), got.size() * sizeof(float)) != 0 || memcmp(first_sums.data(), got_sums.data(), got_sums.size() * sizeof(float)) != 0) {
            printf("  differs with %d threads\n", n_threads);
            return false;
        }
    }
    std::vector<double> attention;
    const double nmse = nmse_of(first, x.in_doubles(c, &attention));
    if (!(nmse <= 2e-11)) {
        printf("  nmse %g\n", nmse);
        return false;
    }
    for (size_t i = 0; i < attention.size(); ++i) {
        const double rounding = 0.5 / HEADKV_PROMPT_ONE * c.n_tokens * c.G; // each query's share is a whole number
        if (!(std::abs(attention[i] - first_sums[i]) <= 1e-5 * attention[i] + rounding)) {
            printf("  sum %zu is %g, not %g\n", i, first_sums[i], attention[i]);
            return false;
        }
    }
    // the last tokens alone, without sums: the same bits
    const int n_last = std::min(c.n_tokens, 5);
    op_graph last;
    prompt_data y(last.ctx.get(), c, c.n() + 37);
    ggml_tensor * q = ggml_view_3d(last.ctx.get(), y.q, c.D, c.G * c.H, n_last, y.q->nb[1], y.q->nb[2], (c.n_tokens - n_last) * y.q->nb[2]);
    ggml_tensor * seen = ggml_view_2d(last.ctx.get(), y.seen, 2, n_last, y.seen->nb[1], (c.n_tokens - n_last) * y.seen->nb[1]);
    ggml_tensor * out_last = headkv_build_attend_prompt(last.ctx.get(), &state, N_THREADS, q, y.k, y.v, y.cells, seen, y.sinks);
    last.alloc(out_last);
    for (const auto & [to, from] : { std::make_pair(y.q, x.q), { y.k, x.k }, { y.v, x.v }, { y.cells, x.cells }, { y.seen, x.seen }, { y.sinks, x.sinks } }) {
        if (to) {
            memcpy(to->data, from->data, ggml_nbytes(to));
        }
    }
    last.run(2);
    const std::vector<float> got = get_floats(out_last);
    if (memcmp(first.data() + (first.size() - got.size()), got.data(), got.size() * sizeof(float)) != 0) {
        printf("  the last %d tokens alone differ\n", n_last);
        return false;
    }
    return true;
}

// the error is not larger than that of ggml's own attention of the same rows
bool test_prompt_beside_ggml(const prompt_case & c) {
    if (!has_kernel(c.kernel)) {
        return true;
    }
    headkv_attend_state state(c.D, c.D_v(), c.G * c.H, c.H, 1, c.type, c.type);
    state.scale = 1.0f / std::sqrt((float) c.D);
    state.softcap = c.softcap;
    op_graph g;
    prompt_data x(g.ctx.get(), c, c.n());
    ggml_tensor * mask;
    ggml_tensor * ours = headkv_build_attend_prompt(g.ctx.get(), &state, N_THREADS, x.q, x.k, x.v, x.cells, x.seen, x.sinks);
    ggml_tensor * theirs = build_flash_attn(g.ctx.get(), c, x, &mask);
    ggml_build_forward_expand(g.gf, ours);
    g.alloc(theirs);
    x.set(c, false);
    set_mask(mask, x);
    g.run(2);
    const std::vector<double> want = x.in_doubles(c);
    const double err_ours = nmse_of(get_floats(ours), want);
    const double err_theirs = nmse_of(get_floats(theirs), want);
    const double slack = c.kernel == "portable" ? 1.05 : 1.0; // its products and sums are rounded apart
    if (!(err_ours <= slack * err_theirs)) {
        printf("  nmse %g, of ggml's attention %g\n", err_ours, err_theirs);
        return false;
    }
    return true;
}

// a NaN in a key is seen by the tokens that see the key, in the heads of its group, and by nothing else
bool test_prompt_nan(const std::string & kernel, ggml_type type, int i_nan) {
    const prompt_case c = { kernel, type, 64, 3, 2, 150, 70 };
    if (!has_kernel(kernel)) {
        return true;
    }
    headkv_attend_state state(c.D, c.D_v(), c.G * c.H, c.H, 1, c.type, c.type);
    state.scale = 0.125f;
    op_graph g;
    prompt_data x(g.ctx.get(), c, c.n());
    x.make_sums(g.ctx.get(), c);
    ggml_tensor * out = headkv_build_attend_prompt(g.ctx.get(), &state, N_THREADS, x.q, x.k, x.v, x.cells, x.seen, nullptr, x.sums, x.fresh);
    g.alloc(out);
    x.set(c, false);
    x.set_sums(c);
    std::vector<float> kf = x.kf;
    kf[(size_t) i_nan * c.H * c.D + 5] = NAN;
    set_quantized(x.k, kf);
    g.run(2);
    const std::vector<float> got = get_floats(out);
    for (int t = 0; t < c.n_tokens; ++t) {
        for (int i = 0; i < c.D * c.G * c.H; ++i) {
            const bool sees = i < c.D * c.G && i_nan < x.seenf[2 * t + 1];
            if (std::isnan(got[(size_t) t * c.D * c.G * c.H + i]) != sees) {
                printf("  value %d of token %d is %g\n", i, t, got[(size_t) t * c.D * c.G * c.H + i]);
                return false;
            }
        }
    }
    const std::vector<float> sums = get_floats(x.sums);
    for (int i = 0; i < c.n() * c.H; ++i) {
        if (std::isnan(sums[i]) != (i < c.n())) {
            printf("  sum %d is %g\n", i, sums[i]);
            return false;
        }
    }
    return true;
}

// multiply-adds of F32 per second and thread, that a product of matrices which stay in the cache reaches with ggml
double gemm_rate() {
    op_graph g;
    const int n = 512;
    ggml_tensor * a = ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_F32, n, n);
    ggml_tensor * b = ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_F32, n, n);
    g.alloc(ggml_mul_mat(g.ctx.get(), a, b));
    set_quantized(a, random_floats(ggml_nelements(a)));
    set_quantized(b, random_floats(ggml_nelements(b)));
    double best = 0.0;
    for (int i = 0; i < 20; ++i) {
        const auto t0 = std::chrono::steady_clock::now();
        g.run(1);
        best = std::max(best, 2.0 * n * n * n / std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count());
    }
    return best;
}

} // namespace

void add_prompt_cases(op_cases & cases) {
    const auto add = [&](const prompt_case & c) { cases.push_back({ c.name(), [c]() { return test_prompt(c); } }); };
    for (const char * kernel : { "portable", "avx2", "avx512", "neon" }) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            for (int D : { 32, 64, 80, 96, 128, 256 }) {
                if (D % ggml_blck_size(type) == 0) {
                    const int G = 1 + D / 16 % 7;
                    add({ kernel, type, D, G, 2, 100 + D, 20 });
                    add({ kernel, type, D, G, 1, 0, 17 });
                }
            }
            add({ kernel, type, 64, 7, 2, 700, 1 });
            add({ kernel, type, 64, 7, 1, 300, 50, 30.0f, "mixed" });
            add({ kernel, type, 64, 4, 3, 95, 97, 0.0f, "20" });
            add({ kernel, type, 64, 4, 2, 300, 90, 0.0f, "", 70 });
            add({ kernel, type, 128, 2, 2, 300, 90, 0.0f, "0", 200, 64 });
            add({ kernel, type, 64, 12, 1, 190, 40, 50.0f, "", 0, 32 });
        }
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32 }) {
            add({ kernel, type, 40, 3, 2, 96, 100 }); // no multiple of a vector
            add({ kernel, type, 36, 5, 1, 0, 96, 0.0f, "", 0, 44 });
            for (int i_nan : { 0, 149, 180, 219 }) {
                cases.push_back({ std::string("prompt,nan,") + kernel + "," + ggml_type_name(type) + ",cell=" + std::to_string(i_nan), [=]() { return test_prompt_nan(kernel, type, i_nan); } });
            }
        }
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            for (float softcap : { 0.0f, 30.0f }) {
                const prompt_case c = { kernel, type, 128, 4, 1, 320, 64, softcap };
                cases.push_back({ c.name() + ",beside ggml", [c]() { return test_prompt_beside_ggml(c); } });
            }
        }
    }
}

// one thread; layers of Qwen2.5-Coder-0.5B and -1.5B and of Llama-3.2-1B, the ubatch that ends a prompt of so many tokens
void perf_prompt() {
    const double rate = gemm_rate();
    printf("# product of F32 matrices, ggml, 1 thread: %.1f GFLOP/s\n", rate / 1e9);
    printf("kernel,type,D,G,H,cells,ms,ms_ggml,ratio,gflops,share_of_product\n");
    const int shapes[][3] = { { 64, 7, 2 }, { 128, 6, 2 }, { 64, 4, 8 } };
    for (const char * kernel : { "avx512", "avx2", "neon" }) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
            for (const auto & [D, G, H] : shapes) {
                for (int n : { 4096, 16384 }) {
                    if (!has_kernel(kernel) || (n > 4096 && type != GGML_TYPE_F16)) { // ggml takes seconds for quantised cells
                        continue;
                    }
                    const prompt_case c = { kernel, type, D, G, H, n - 256, 256 };
                    headkv_attend_state state(D, D, G * H, H, 1, type, type);
                    state.scale = 1.0f / std::sqrt((float) D);
                    op_graph ours, theirs;
                    prompt_data x(ours.ctx.get(), c, n), y(theirs.ctx.get(), c, n);
                    ggml_tensor * mask;
                    ours.alloc(headkv_build_attend_prompt(ours.ctx.get(), &state, N_THREADS, x.q, x.k, x.v, x.cells, x.seen));
                    theirs.alloc(build_flash_attn(theirs.ctx.get(), c, y, &mask));
                    x.set(c, false);
                    y.set(c, false);
                    set_mask(mask, y);
                    std::vector<double> ms, ms_ggml, ratio;
                    for (int i = 0; i < 3; ++i) {
                        for (auto * t : { &ms, &ms_ggml }) {
                            const auto t0 = std::chrono::steady_clock::now();
                            (t == &ms ? ours : theirs).run(1);
                            t->push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - t0).count());
                        }
                        ratio.push_back(ms.back() / ms_ggml.back());
                    }
                    for (auto * t : { &ms, &ms_ggml, &ratio }) {
                        std::sort(t->begin(), t->end());
                    }
                    const double flop = 4.0 * D * G * H * 256.0 * (n - 127.5);
                    const double got = flop / (ms[0] / 1e3);
                    printf("%s,%s,%d,%d,%d,%d,%.2f,%.2f,%.3f,%.1f,%.2f\n", kernel, ggml_type_name(type), D, G, H, n, ms[1], ms_ggml[1], ratio[1], got / 1e9, got / rate);
                    fflush(stdout);
                }
            }
        }
    }
}
