// What the tests of ops share: a graph on one backend, and random tensors.
#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

// name and what runs it; false = it failed
using op_cases = std::vector<std::pair<std::string, std::function<bool()>>>;

// prompt-cases.cpp
void add_prompt_cases(op_cases & cases);
void perf_prompt();

// perf-isa.cpp
void perf_isa();

// kept-cells.cpp
void print_kept();

inline std::mt19937 rng(1);

inline std::vector<float> random_floats(size_t n, float stdev = 1.0f) {
    std::normal_distribution<float> normal(0.0f, stdev);
    std::vector<float> res(n);
    for (float & x : res) {
        x = normal(rng);
    }
    return res;
}

inline ggml_backend_dev_t gpu = nullptr;   // where the cases of CUDA and the composed ones run, null: on the CPU
inline ggml_backend_dev_t metal = nullptr; // where those of Metal run: the GPU, or a Metal device that is the CPU; null: nowhere
inline int n_skip = 0;                   // cases that the device cannot run

// a graph on the CPU backend or on the GPU
struct op_graph {
    ggml_backend_ptr backend;
    ggml_context_ptr ctx;
    std::vector<ggml_backend_buffer_ptr> bufs;
    ggml_cgraph * gf;

    // dev: null = the CPU
    explicit op_graph(ggml_backend_dev_t dev = nullptr) :
        backend(dev ? ggml_backend_dev_init(dev, nullptr) : ggml_backend_cpu_init()) {
        ggml_init_params params = { 256 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
        ctx.reset(ggml_init(params));
        gf = ggml_new_graph(ctx.get());
    }

    void alloc(ggml_tensor * out) {
        ggml_build_forward_expand(gf, out);
        if (metal && ggml_backend_get_device(backend.get()) == metal) {
            // every tensor in memory of its own, for the address sanitizer
            const ggml_backend_buffer_type_t buft = ggml_backend_get_default_buffer_type(backend.get());
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
                if (t->view_src) {
                    ggml_backend_view_init(t);
                } else {
                    bufs.emplace_back(ggml_backend_buft_alloc_buffer(buft, ggml_backend_buft_get_alloc_size(buft, t)));
                    ggml_backend_tensor_alloc(bufs.back().get(), t, ggml_backend_buffer_get_base(bufs.back().get()));
                }
            }
        } else {
            bufs.emplace_back(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
        }
        // what an op does not write must not matter
        for (const auto & buf : bufs) {
            ggml_backend_buffer_clear(buf.get(), 0xff);
        }
    }

    // an engine sends what the device lacks elsewhere, this graph runs on one backend
    bool is_skipped() const {
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            if (!ggml_backend_supports_op(backend.get(), ggml_graph_node(gf, i))) {
                printf("  skipped: the device does not run %s\n", ggml_op_name(ggml_graph_node(gf, i)->op));
                n_skip++;
                return true;
            }
        }
        return false;
    }

    void run(int n_threads) {
        if (ggml_backend_is_cpu(backend.get())) {
            ggml_backend_cpu_set_n_threads(backend.get(), n_threads);
        }
        if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
            abort();
        }
    }
};

inline void set_quantized(ggml_tensor * t, const std::vector<float> & x) {
    std::vector<uint8_t> raw(ggml_nbytes(t));
    ggml_quantize_chunk(t->type, x.data(), raw.data(), 0, ggml_nrows(t), t->ne[0], nullptr);
    ggml_backend_tensor_set(t, raw.data(), 0, raw.size());
}

inline std::vector<float> get_floats(const ggml_tensor * t) {
    std::vector<uint8_t> raw(ggml_nbytes(t));
    ggml_backend_tensor_get(t, raw.data(), 0, raw.size());
    std::vector<float> res(ggml_nelements(t));
    if (t->type == GGML_TYPE_F32) {
        memcpy(res.data(), raw.data(), raw.size());
    } else {
        ggml_get_type_traits(t->type)->to_float(raw.data(), res.data(), res.size());
    }
    return res;
}

// of so many query heads: "" = none, "mixed" = of each head another one, else the same number
inline std::vector<float> make_sinks(const std::string & kind, size_t n) {
    if (kind.empty()) {
        return {};
    }
    std::vector<float> res = random_floats(n, 3.0f);
    if (kind != "mixed") {
        res.assign(n, std::stof(kind));
    }
    return res;
}
