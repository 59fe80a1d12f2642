// The inner loops of the fused score, one version for each instruction set. Keys are taken in blocks, transposed: element d
// of key i of a block is keys[d*N_KEYS + i], so that a vector holds the logits of neighbouring keys for one query.
#pragma once

#include "ggml.h"

struct headkv_score_kernel {
    static constexpr int N_KEYS = 32; // of a block
    static constexpr int N_QUERIES = 4;  // at a time

    // element d of a key to dst[d*N_KEYS], d < n
    typedef void (*to_column)(const char * key, float * dst, int n);
    to_column (*find_to_column)(ggml_type type);

    // x[j*N_KEYS + i] = q_j . k_i; q [n_query][n_embd_head], n_query a multiple of N_QUERIES
    void (*logits)(const float * q, int n_query, const float * keys, int n_embd_head, float * x);
    // adds the logits of a block, -INFINITY for keys that are not seen, to the largest, m, and to the sum s of exp(x - m)
    void (*add_stats)(const float * x, float * m, float * s);
    // sum[i] += (f*exp(x[i] - m))^(2^n_square); m is not below x[i]
    void (*add_probs)(const float * x, float m, float f, int n_square, float * sum);
};

const headkv_score_kernel * headkv_score_kernel_portable();

// the fastest one; name (may be null) asks for one of "portable", "avx2", "avx512", "neon"
const headkv_score_kernel * headkv_score_kernel_find(const char * name);
