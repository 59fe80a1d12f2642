// Stage 2, budget: how many cells each KV head may keep after the prompt.
#pragma once

#include "headkv-config.h"

// Prefix cells (window excluded) of n_heads query heads: the authors' formula bit for bit, float floor division and
// half-even rounding included (HeadKV, Eq. 4 and its code). importance may be empty for policies that need none.
std::vector<int64_t> headkv_budget_query_heads(const headkv_config & cfg, const std::vector<double> & importance, int32_t n_heads);

// Mean over the GQA group, rounded half to even; window added. values: the n_head entries of one layer.
std::vector<uint32_t> headkv_budget_kv_heads(const int64_t * values, int32_t n_head, int32_t n_head_kv, uint32_t window);

// Cells of each KV head, window included, [il][ih]; n_head and n_head_kv per layer, both may be 0.
// Throws std::invalid_argument when the importance does not fit the layers.
std::vector<std::vector<uint32_t>> headkv_budget(const headkv_config & cfg,
        const std::vector<int32_t> & n_head, const std::vector<int32_t> & n_head_kv);
