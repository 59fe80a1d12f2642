// New values for the cells that a head keeps, by which it answers the queries of its own prompt as if it had kept all.
//
// X: what the reference queries (headkv-refs.h) pay to the kept cells that they see; Y: what all cells that they see answer
// them, both beside the sink of their head, if it has one; R = Y - X V. The values become V + (X'X + ridge*I)^-1 X'R, a ridge regression that is pulled to the old ones. Every
// fourth query is held out, and a head whose squared residual on these does not become smaller keeps its values. K stays, and
// everything is done in the space of the cache, which may be rotated. On the CPU; the outcome does not depend on the number of threads.
#pragma once

#include "headkv-runner.h"
#include "headkv-seq.h"
#include "headkv-store.h"

#include "llama.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

constexpr double HEADKV_FIT_RIDGE = 0.1; // of the mean diagonal of X'X

// One version for each instruction set. Columns come in multiples of N_KEYS, rows in multiples of N_ROWS.
struct headkv_fit_kernel {
    static constexpr int N_KEYS = 32;
    static constexpr int N_ROWS = 4;

    // One query and N_KEYS keys of logits x, -INFINITY for those that it does not see: x becomes exp(x - m), s its sum with what it was
    // before; s and y [n] are scaled as the largest logit m grows.
    void (*soften)(float * x, float * m, float * s, float * y, int n);

    // y[j*y_row + d] += sum over i < n_i of a[j*a_row + i*a_i]*b[i*b_i + d], j < n_rows, d < n
    void (*add_product)(const float * a, int64_t a_row, int64_t a_i, int n_rows, const float * b, int64_t b_i, int n_i, int n, float * y, int64_t y_row);

    // A symmetric matrix, the rows of its lower half one after the other, becomes L of L L'; false: it is not positive definite.
    bool (*cholesky)(double * a, int n);
    // b [n][n_columns] becomes (L L')^-1 b
    void (*solve)(const double * l, int n, double * b, int n_columns);
};

const headkv_fit_kernel * headkv_fit_kernel_portable();

// the fastest one; name (may be null) asks for one of "portable", "avx2", "avx512", "neon"
const headkv_fit_kernel * headkv_fit_kernel_find(const char * name);

// of one head
struct headkv_fit_outcome {
    bool is_fitted = false;
    double before = 0.0; // mean squared residual of the held-out queries, relative to their answers; 0 = no cell was dropped
    double after = 0.0;  // same; as before where the fit was not taken
};

// what the fit of a layer looks at
struct headkv_fit_layer {
    const std::vector<llama_pos> & pos; // of the references, ascending
    const std::vector<int32_t> & slots; // of each, of refs
    const std::vector<int32_t> & cells; // of the staging, in position order
    const std::vector<headkv_range> & ranges; // of the heads in the pools
    ggml_tensor * refs;  // F16 [n_embd_head_k, n_head_kv*n_slots]
    ggml_tensor * k_all; // staged, [n_embd_head_k*n_head_kv, n_cells]
    ggml_tensor * v_all; // [n_embd_head_v*n_head_kv, n_cells]
    ggml_tensor * k; // pools, [n_embd_head_k, n_rows]
    ggml_tensor * v; // [n_embd_head_v, n_rows]
    float scale;
    float softcap;
    std::vector<float> sinks; // [n_head] of the layer, empty if it has none
};

// The fit of one compression, layer by layer.
class headkv_values_fit {
public:
    // pos and slots: of the references; cells: of the prompt, all in position order
    headkv_values_fit(std::vector<llama_pos> pos, std::vector<int32_t> slots, int n_threads);

    // dst: sequence of the kept cells, whose values are replaced. Throws when memory is short.
    void layer(headkv_runner & runner, const headkv_store_layer & layer, int32_t dst, ggml_tensor * refs,
            ggml_tensor * k_all, ggml_tensor * v_all, const std::vector<int32_t> & cells);

    headkv_fit_stats stats() const;
    size_t n_bytes() const { return n_bytes_; } // beside the graph, at most

private:
    const std::vector<llama_pos> pos;
    const std::vector<int32_t> slots;
    const int n_threads;

    std::vector<headkv_fit_outcome> outcomes; // of the heads that dropped cells
    int64_t t_us = 0;
    size_t n_bytes_ = 0;
};

// bytes of it for a layer, beside K, V and queries
int64_t headkv_fit_bytes(const headkv_layer_shape & layer, int64_t n, int n_threads);

// why values cannot be fitted in these layers; empty = they can
std::string headkv_why_no_fit(const std::vector<headkv_store_layer> & layers);
