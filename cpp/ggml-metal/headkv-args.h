// What the host tells the kernels: arguments, sizes of threadgroups, types. C++ and MSL read the same text.
#pragma once

#ifndef __METAL_VERSION__
#include <cstdint>
#endif

enum {
    HEADKV_METAL_SIMD = 32,      // threads of a SIMD group: all Apple GPUs from M1 on
    HEADKV_METAL_THREADS = 128,  // of a threadgroup of attend and score
    HEADKV_METAL_TILE = 128,     // rows that it scores at a time
    HEADKV_METAL_CHUNK = 512,    // keys that share an element of the statistics of score, HEADKV_SCORE_CHUNK
    HEADKV_METAL_QUERIES = 8,    // queries of score at a time
    HEADKV_METAL_SELECT = 512,   // threads of a threadgroup of select
    HEADKV_METAL_COMPACT = 256,  // same of compact
    HEADKV_METAL_WHOLE = 1 << 30 // rows of a chunk where ranges are not cut
};

// HEADKV_TYPE of K and V
#define HEADKV_F16 1
#define HEADKV_BF16 2
#define HEADKV_Q8_0 3

struct headkv_metal_attend {
    uint64_t nq1, nq2;   // floats from head to head, token to token
    uint64_t nb_k, nb_v; // bytes from row to row
    int32_t n_head_kv;
    int32_t n_ranges; // n_head_kv*n_seqs
    int32_t n_tps;
    int32_t n_group;
    int32_t n_rows_chunk;
    int32_t has_bias;
    int32_t has_sinks;
    float scale;
    float softcap; // 0 = none
};

struct headkv_metal_score {
    uint64_t nq1, nq2; // floats from head to head, token to token
    uint64_t nb_k;     // bytes from cell to cell
    uint64_t nb_head;  // from head to head
    int32_t n_head_kv;
    int32_t n_group;
    int32_t n_window;
    int32_t n_kv;
    int32_t n_prefix;
    int32_t n_chunk;
    int32_t n_square;
    int32_t pool_max;
    int32_t pool_kernel;
    int32_t has_sinks;
    float scale;
    float softcap;
};

struct headkv_metal_select {
    uint64_t n_scores; // floats from head to head
    uint64_t n_plan;   // integers from head to head
    int32_t n_prefix;
    int32_t n_recent;
};

struct headkv_metal_compact {
    uint64_t nb_pool;  // bytes from row to row
    uint64_t nb_cells; // from cell to cell
    uint64_t nb_head;  // from head to head of a cell: those of a row
    uint64_t n_plan;   // integers from head to head
    int32_t n_word;    // bytes that are copied at a time: 16, 8, 4 or 2
    int32_t n_groups;  // threadgroups of a head
};
