// The instruction sets of this machine in turn, on the same memory: what each is worth.

#include "op-graph.h"

#include "headkv-attend-prompt.h"
#include "headkv-attend.h"
#include "headkv-stages.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <numeric>

namespace {

using times = std::vector<std::vector<double>>; // us of each kernel, by rounds

// n_rounds of all, each round in another order
times in_turn(int n_rounds, const std::vector<std::string> & kernels, const std::function<void(size_t)> & run) {
    times res(kernels.size());
    for (int i = -1; i < n_rounds; ++i) { // the first one is not counted
        for (size_t j = 0; j < kernels.size(); ++j) {
            const size_t k = (i % 2 == 0 ? j : kernels.size() - 1 - j);
            setenv("HEADKV_KERNEL", kernels[k].c_str(), 1);
            const auto t0 = std::chrono::steady_clock::now();
            run(k);
            if (i >= 0) {
                res[k].push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - t0).count());
            }
        }
    }
    return res;
}

double median(std::vector<double> x) {
    std::nth_element(x.begin(), x.begin() + x.size() / 2, x.end());
    return x[x.size() / 2];
}

void print_row(const char * op, ggml_type type, int D, int G, int n, const std::vector<std::string> & kernels, const times & us) {
    for (size_t k = 0; k < kernels.size(); ++k) {
        std::vector<double> ratio; // of the speed to that of the kernel before it
        for (size_t i = 0; i < us[k].size(); ++i) {
            ratio.push_back(us[k > 0 ? k - 1 : 0][i] / us[k][i]);
        }
        printf("%s,%s,%d,%d,%d,%s,%.1f,%s,%.3f\n", op, ggml_type_name(type), D, G, n, kernels[k].c_str(), median(us[k]), k > 0 ? kernels[k - 1].c_str() : "",
                median(ratio));
    }
    fflush(stdout);
}

ggml_tensor * view_of(ggml_context * ctx, ggml_tensor * t) { return t ? ggml_view_tensor(ctx, t) : nullptr; }

// a graph for each kernel over the tensors of the first one: where memory lies decides more than the instructions
struct graphs {
    std::vector<std::unique_ptr<op_graph>> of;

    explicit graphs(size_t n) {
        for (size_t k = 0; k < n; ++k) {
            of.push_back(std::make_unique<op_graph>());
        }
    }
};

void fill(ggml_tensor * t) {
    const auto x = random_floats(ggml_nelements(t));
    t->type == GGML_TYPE_F32 ? ggml_backend_tensor_set(t, x.data(), 0, ggml_nbytes(t)) : set_quantized(t, x);
}

void set_ints(ggml_tensor * t, const std::vector<int32_t> & x) { ggml_backend_tensor_set(t, x.data(), 0, x.size() * sizeof(int32_t)); }

constexpr int N_HEAD_KV = 8;

void attend(const std::vector<std::string> & kernels, ggml_type type, int D, int G, int len) {
    graphs g(kernels.size());
    std::vector<std::unique_ptr<headkv_attend_state>> states;
    ggml_tensor *q = nullptr, *k = nullptr, *v = nullptr, *r = nullptr;
    for (size_t i = 0; i < kernels.size(); ++i) {
        setenv("HEADKV_KERNEL", kernels[i].c_str(), 1);
        states.push_back(std::make_unique<headkv_attend_state>(D, D, G * N_HEAD_KV, N_HEAD_KV, 1, type, type));
        states[i]->scale = 1.0f / std::sqrt((float) D);
        ggml_context * ctx = g.of[i]->ctx.get();
        ggml_tensor * qi = q ? view_of(ctx, q) : q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, G * N_HEAD_KV, 1);
        ggml_tensor * ki = k ? view_of(ctx, k) : k = ggml_new_tensor_2d(ctx, type, D, (int64_t) N_HEAD_KV * len);
        ggml_tensor * vi = v ? view_of(ctx, v) : v = ggml_new_tensor_2d(ctx, type, D, (int64_t) N_HEAD_KV * len);
        ggml_tensor * ri = r ? view_of(ctx, r) : r = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, 2, N_HEAD_KV, 1);
        g.of[i]->alloc(headkv_build_attend_fused(ctx, states[i].get(), qi, ki, vi, ri));
    }
    fill(q), fill(k), fill(v);
    std::vector<int32_t> ranges;
    for (int h = 0; h < N_HEAD_KV; ++h) {
        ranges.insert(ranges.end(), { h * len, len });
    }
    set_ints(r, ranges);
    print_row("attend", type, D, G, len, kernels, in_turn(31, kernels, [&](size_t i) { g.of[i]->run(1); }));
}

void attend_prompt(const std::vector<std::string> & kernels, ggml_type type, int D, int G, int n) {
    const int H = 2, n_tokens = 256;
    graphs g(kernels.size());
    std::vector<std::unique_ptr<headkv_attend_state>> states;
    ggml_tensor *q = nullptr, *k = nullptr, *v = nullptr, *cells = nullptr, *seen = nullptr;
    for (size_t i = 0; i < kernels.size(); ++i) {
        setenv("HEADKV_KERNEL", kernels[i].c_str(), 1);
        states.push_back(std::make_unique<headkv_attend_state>(D, D, G * H, H, 1, type, type));
        states[i]->scale = 1.0f / std::sqrt((float) D);
        ggml_context * ctx = g.of[i]->ctx.get();
        ggml_tensor * qi = q ? view_of(ctx, q) : q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, G * H, n_tokens);
        ggml_tensor * ki = k ? view_of(ctx, k) : k = ggml_new_tensor_3d(ctx, type, D, H, n);
        ggml_tensor * vi = v ? view_of(ctx, v) : v = ggml_new_tensor_3d(ctx, type, D, H, n);
        ggml_tensor * ci = cells ? view_of(ctx, cells) : cells = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
        ggml_tensor * si = seen ? view_of(ctx, seen) : seen = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, n_tokens);
        g.of[i]->alloc(headkv_build_attend_prompt(ctx, states[i].get(), 1, qi, ki, vi, ci, si));
    }
    fill(q), fill(k), fill(v);
    std::vector<int32_t> order(n), ends;
    std::iota(order.begin(), order.end(), 0);
    for (int t = 0; t < n_tokens; ++t) {
        ends.insert(ends.end(), { 0, n - n_tokens + t + 1 });
    }
    set_ints(cells, order);
    set_ints(seen, ends);
    print_row("attend_prompt", type, D, G, n, kernels, in_turn(7, kernels, [&](size_t i) { g.of[i]->run(1); }));
}

// its kernel is looked up when it runs
void score(const std::vector<std::string> & kernels, ggml_type type, int D, int G, int n) {
    const int n_window = 64;
    op_graph g;
    ggml_context * ctx = g.ctx.get();
    ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, G * N_HEAD_KV, n_window);
    ggml_tensor * k = ggml_new_tensor_2d(ctx, type, D * N_HEAD_KV, n);
    ggml_tensor * cells = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    g.alloc(headkv_build_score_fused(ctx, q, k, cells, n - 8, 1.0f / std::sqrt((float) D), 0.0f, 2, HEADKV_POOL_MAX, 31));
    fill(q), fill(k);
    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    set_ints(cells, order);
    print_row("score", type, D, G, n, kernels, in_turn(7, kernels, [&](size_t) { g.run(1); }));
}

} // namespace

void perf_isa() {
    printf("op,type,D,G,cells,kernel,us,against,speed_ratio\n");
    std::vector<std::string> kernels, of_prompts; // attention of prompts has no portable one
    for (const char * kernel : { "portable", "avx2", "avx512", "neon" }) {
        if (headkv_attend_kernel_find(GGML_TYPE_F16, GGML_TYPE_F16, 64, 64, kernel)) {
            kernels.push_back(kernel);
        }
        if (headkv_prompt_kernel_find(kernel)) {
            of_prompts.push_back(kernel);
        }
    }
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (int D : { 64, 128 }) {
            for (int len : { 128, 1024, 8192 }) {
                attend(kernels, type, D, 4, len);
            }
            for (int n : { 2048, 8192 }) {
                if (!of_prompts.empty()) {
                    attend_prompt(of_prompts, type, D, 6, n);
                }
                score(kernels, type, D, 4, n);
            }
        }
    }
}
