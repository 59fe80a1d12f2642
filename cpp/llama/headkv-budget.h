// Stage 2, budget: how many cells each KV head may keep after the prompt. The kinds of budgets, and what is done with each.
#pragma once

#include "headkv-policy.h"

// kv_size without the recent cells for every head
headkv_cells headkv_budget_uniform(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix);

// Importance of the query heads that exist, layer after layer.
// Throws std::invalid_argument when the importance does not fit the layers.
std::vector<double> headkv_budget_query_importance(const headkv_config & cfg, const headkv_heads & heads);

// By importance: the authors' formula bit for bit, float floor division and half-even rounding included (HeadKV, Eq. 4 and
// its code); then the mean over the GQA group, rounded half to even.
// Throws std::invalid_argument when the importance does not fit the layers.
headkv_cells headkv_budget_importance(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix);

// By the table of shares (KVzip's threshold for a whole model, measured once): between two of its rows linearly, and from
// nothing at 0 to everything at 1. What every head keeps anyway comes first, the sum is that of kv_size.
// Throws std::invalid_argument when the table does not fit the layers.
headkv_cells headkv_budget_replay(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix);

// The mean of the two.
headkv_cells headkv_budget_mix(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix);

// The authors fix the budgets with the first prompt of a process; here each prompt has its own.
headkv_cells headkv_budget_pyramid(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix);

headkv_cells headkv_budget_whole(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix);

headkv_cells headkv_budget_all(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix);

// Gives n more cells (fewer if negative) to the heads, the same number to each that has less than limit (more than 0), what
// does not divide to the first ones; as often as it takes. Returns what no head could take.
int64_t headkv_budget_spread(headkv_cells & cells, int64_t n, int64_t limit);

// Cells of a prompt of n_prefix cells before the recent ones. What a head may keep beyond them is lost, or goes evenly to the
// other heads of its layer, and what these cannot take to those of all layers. Then each head gets at least n_protected.
void headkv_budget_fit(headkv_cells & cells, int64_t n_prefix, int64_t n_protected, headkv_surplus surplus);

// The positions before the recent ones that every head keeps, [start, end) and ascending, and how many they are.
std::vector<std::pair<int32_t, int32_t>> headkv_protected(const headkv_config & cfg, int64_t n_prefix);
int64_t headkv_n_protected(const headkv_config & cfg, int64_t n_prefix);

// Moves cells between the heads of a layer to where the scores are high. Each head is guaranteed the share floor of its
// cells, rounded down, and its protected cells. What is left is divided in proportion to how many of the layer's n best
// cells, n = sum of n_keep, are the head's: ties go to the lower head, then to the lower position.
// normalize: the scores of a head are first multiplied by the share that its n/n_head_kv best cells have of their sum.
// The authors (Ada-KV) round each head by itself, so that their layers lose cells; here the largest remainders are rounded
// up, ties to the lower head, and the sum stays.
void headkv_budget_adapt(headkv_scored & layer, double floor, bool normalize);

// Budgets of the policy, recent ones included, [il][ih]; those of long prompts may be more than a shorter one has.
std::vector<std::vector<uint32_t>> headkv_budget(const headkv_config & cfg, const headkv_heads & heads, int64_t n_prefix = std::numeric_limits<int64_t>::max());

// Whether every head keeps all of a prompt: the authors' test, it fits into the average budget; or the policy says so.
bool headkv_keeps_all(const headkv_config & cfg, int64_t n_prompt);

// Rows that a head gets for generated tokens at a time: when they are full, all cells are copied.
uint32_t headkv_n_tail(const headkv_config & cfg, int64_t n_prompt);
