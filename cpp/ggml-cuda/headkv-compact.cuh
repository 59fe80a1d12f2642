// Stage 6, compact, see headkv-stages.h: rows as raw bytes, in words as long as they are aligned to. A head's rows are dealt out to the
// blocks of its column of the grid, a block takes as many at once as it has threads for.
#pragma once

#include "headkv-device.cuh"
#include "headkv-op.h"

#include <algorithm>

namespace headkv {

constexpr int N_COMPACT = 256; // threads
constexpr int N_COMPACT_BLOCKS = 1024; // at most, of all heads; enough for every device

struct compact_params {
    char * pool;
    const char * cells;
    const int32_t * kept;
    const int32_t * cell;
    const int32_t * plan;   // [head][3]: first element of kept, number, first row in pool
    size_t nb_pool;         // bytes from row to row
    size_t nb_cells;        // from cell to cell
    size_t nb_head;         // from head to head of a cell: those of a row
    size_t n_plan;          // integers from head to head
};

template <int N_BYTES> using copied_t = std::conditional_t<N_BYTES == 2, uint16_t, words_t<N_BYTES>>;

template <class Word>
static __global__ void __launch_bounds__(N_COMPACT) compact_rows(const compact_params a) {
    const int n_words = (int) (a.nb_head / sizeof(Word)); // of a row
    const int n_lanes = min(n_words, N_COMPACT);          // threads of a row
    const int n_rows = N_COMPACT / n_lanes;               // of a block at a time
    const int row = threadIdx.x / n_lanes;
    if (row >= n_rows) {
        return;
    }
    const int32_t * plan = a.plan + blockIdx.y * a.n_plan;
    const int32_t * kept = a.kept + plan[0];
    const char * cells = a.cells + blockIdx.y * a.nb_head;
    char * pool = a.pool + (size_t) plan[2] * a.nb_pool;
    const int n = plan[1];

    for (int i = blockIdx.x * n_rows + row; i < n; i += gridDim.x * n_rows) {
        const Word * from = (const Word *) (cells + (size_t) a.cell[kept[i]] * a.nb_cells);
        Word * to = (Word *) (pool + (size_t) i * a.nb_pool);
        for (int w = threadIdx.x % n_lanes; w < n_words; w += n_lanes) {
            to[w] = from[w];
        }
    }
}

//
// host; tensors of the op: pool, cells, kept, cell, plan
//

inline bool compact_supports(const ggml_tensor * op) {
    return headkv_compact_word(op) >= 2 && op->src[2]->ne[0] < 1 << 30;
}

template <int N_BYTES, class Stream>
void compact_run(const compact_params & a, int n_head, int64_t n_kept, Stream stream) {
    const int n_words = (int) (a.nb_head / N_BYTES);
    const int64_t n_rows = N_COMPACT / std::min(n_words, N_COMPACT);
    // as if one head had all rows
    const int64_t n_blocks = std::min<int64_t>((n_kept + n_rows - 1) / n_rows, (N_COMPACT_BLOCKS + n_head - 1) / n_head);
    HEADKV_LAUNCH((compact_rows<copied_t<N_BYTES>>), dim3((unsigned) n_blocks, (unsigned) n_head, 1), dim3(N_COMPACT, 1, 1), stream, a);
}

template <class Stream>
void compact_run(ggml_tensor * dst, Stream stream) {
    const ggml_tensor * cells = dst->src[1];
    const ggml_tensor * kept = dst->src[2];
    const ggml_tensor * plan = dst->src[4];
    const int n_head = (int) plan->ne[1];
    if (kept->ne[0] == 0) {
        return;
    }

    compact_params a;
    a.pool = (char *) dst->data;
    a.cells = (const char *) cells->data;
    a.kept = (const int32_t *) kept->data;
    a.cell = (const int32_t *) dst->src[3]->data;
    a.plan = (const int32_t *) plan->data;
    a.nb_pool = dst->nb[1];
    a.nb_cells = cells->nb[1];
    a.nb_head = ggml_row_size(dst->type, dst->ne[0]);
    a.n_plan = plan->nb[1] / sizeof(int32_t);

    switch (headkv_compact_word(dst)) {
        case 16: return compact_run<16>(a, n_head, kept->ne[0], stream);
        case 8: return compact_run<8>(a, n_head, kept->ne[0], stream);
        case 4: return compact_run<4>(a, n_head, kept->ne[0], stream);
        default: return compact_run<2>(a, n_head, kept->ne[0], stream);
    }
}

} // namespace headkv
