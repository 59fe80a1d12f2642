// Stages 3 to 6 as pieces of ggml graphs. The CPU versions of select and compact are custom ops and the definition;
// the composed versions run on every backend and select the same cells. (NaN, which a sound model does not score, is the
// lowest score of the former and unspecified in the latter.)
#pragma once

#include "ggml.h"

#include "headkv-config.h"

#include <vector>

// Stage 3, window: copies the queries of the last tokens of a ubatch into the ring.
//   q_cur  F32 [n_embd_head_k, n_head, n_tokens], post-RoPE
//   rot    the rotation that the cache applies to K, or null
//   ring   F32 [n_embd_head_k*n_head, n_slots]
//   tokens I32 [n], slots I64 [n]: ring[slots[i]] = q_cur[tokens[i]]
// Returns the written ring.
ggml_tensor * headkv_build_window(ggml_context * ctx, ggml_tensor * q_cur, ggml_tensor * rot, ggml_tensor * ring,
        ggml_tensor * tokens, ggml_tensor * slots);

// The same for references: one query head of each group, rounded to F16 as flash attention on the CPU does.
//   refs  F16 [n_embd_head_k, n_head_kv*n_slots]
//   rows  I32 [n] of q_cur [n_head*n_tokens], slots I64 [n]: refs[slots[i]] = q_cur[rows[i]]
ggml_tensor * headkv_build_refs(ggml_context * ctx, ggml_tensor * q_cur, ggml_tensor * rot, ggml_tensor * refs,
        ggml_tensor * rows, ggml_tensor * slots);

// Sinks of a layer, F32 [n_head]: a logit of each query head that is in the sum that its probabilities are divided by and belongs to no
// cell. Those of the group of a KV head, in memory of their own; null if the layer has none.
ggml_tensor * headkv_sinks_of_head(ggml_context * ctx, ggml_tensor * sinks, int64_t n_group, int64_t ih);

// Probabilities out of the products of keys and queries kq [n_kv, n_queries, n_head]; mask F16 [n_kv, ..] or null, softcap 0 = none,
// sinks F32 [n_head] or null; max_bias of ALiBi, 0 = none, else the mask has the distances, negated.
ggml_tensor * headkv_build_soft_max(ggml_context * ctx, ggml_tensor * kq, ggml_tensor * mask, float scale, float softcap, ggml_tensor * sinks,
        float max_bias = 0.0f);

// Stage 4, score: for one KV head, power mean over the window and the GQA group of softmax(q k), pooled over the prefix:
// mean(p^e)^(1/e) with e = 2^n_square. The prefix are the first n_prefix keys; what is behind it is always kept.
//   q    F32 [n_embd_head_k, n_window, n_group] the window queries, any order of rows that mask agrees with
//   k        [n_embd_head_k, n_kv] keys in position order, those of the window last
//   mask F16 [n_kv, n_window]
//   sinks F32 [n_group] or null
// Returns F32 [n_prefix]. Nodes are expanded into gf, because intermediate results are overwritten in place.
ggml_tensor * headkv_build_score(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
        int64_t n_prefix, float scale, float softcap, int n_square, headkv_pool pool, int pool_kernel, ggml_tensor * sinks = nullptr);

// Pooling of one head's scores in place, by a kernel of its own, which both of them leave out with pool_kernel 1.
void headkv_pool_scores(float * scores, int64_t n, headkv_pool pool, int kernel);

// the kernel of a head that keeps n_keep cells before the recent ones: odd, so that a few spans find room
int headkv_pool_kernel(int64_t n_keep);

// The same for all heads of a layer, without the probabilities [n_kv, n_window, n_head]: the first of two ops leaves the
// largest logit and the sum of exponentials of each chunk of keys, F32 [2, n_query, n_chunk, n_head_kv], the second takes
// the scores from them. Accumulation is in F32 and independent of the number of threads.
//   q     F32 [n_embd_head_k, n_head, n_window] queries in position order
//   k         [n_embd_head_k*n_head_kv, n_cells] staged keys of the layer
//   cells I32 [n_kv] cell of each position
//   sinks F32 [n_head] or null; the second op takes them
//   max_bias of ALiBi, 0 = none
// Returns F32 [n_prefix, n_head_kv].
ggml_tensor * headkv_build_score_fused(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * cells,
        int64_t n_prefix, float scale, float softcap, int n_square, headkv_pool pool, int pool_kernel, ggml_tensor * sinks = nullptr,
        float max_bias = 0.0f);

// Adds the attention that the queries of a ubatch pay to each cell to the sums over all queries. Its probabilities take
// n_kv*n_tokens*n_head*4 bytes.
//   q      F32 [n_embd_head_k, n_head, n_tokens]
//   k          [n_embd_head_k, n_head_kv, n_kv] cells of the staging
//   mask   F16 [n_kv, n_tokens]
//   sums   F32 [1, n_cells, n_head_kv]; those of the cells in cells, I64 [n_tokens], begin with zero
//   sinks  F32 [n_head] or null
//   max_bias of ALiBi, see headkv_build_soft_max()
void headkv_build_sums(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
        ggml_tensor * sums, ggml_tensor * cells, float scale, float softcap, ggml_tensor * sinks = nullptr,
        float max_bias = 0.0f);

// L1 norm of what each value adds to the output of the layer, per unit of attention, mean over the query heads of a group.
//   v        [n_embd_head_v, n] values of one KV head
//   wo   F32 [n_embd_head_v, n_embd*n_group] output matrix of its query heads
// Returns F32 [1, n].
ggml_tensor * headkv_build_output_norm(ggml_context * ctx, ggml_tensor * v, ggml_tensor * wo, int64_t n_group);

// L2 norm of each value, of the same shapes.
ggml_tensor * headkv_build_value_norm(ggml_context * ctx, ggml_tensor * v);

// wo for it, out of the matrix of the layer, in any type and any kind of memory that ggml_mul_mat() reads
//   wo           [n_embd_head_v*n_head, n_embd]
//   columns F32  [n_embd_head_v*n_head, n_embd_head_v*n_group] those of the unit matrix that belong to the query heads
ggml_tensor * headkv_build_output_matrix(ggml_context * ctx, ggml_tensor * wo, ggml_tensor * wo_s, ggml_tensor * columns, int64_t n_embd_head_v);

// Stage 5, select: positions of the n_keep[h] best scores of each head, ascending, ties to the lower position,
// followed by the n_recent positions behind the prefix.
//   scores F32 [n_prefix, n_head_kv]
//   plan   I32 [2, n_head_kv]: first element of dst, number of prefix cells to keep
//   dst    I32 [n_total]
ggml_tensor * headkv_build_select(ggml_context * ctx, ggml_tensor * scores, ggml_tensor * plan, int64_t n_recent, int64_t n_total);

// the same for one head, outside of a graph and without the recent ones
std::vector<int32_t> headkv_select_cells(const float * scores, int64_t n, int64_t n_keep);

// the same for one head, out of existing ops; scores F32 [n_prefix]; recent: F32 [n_recent] positions behind it. Its keys are exact
// up to so many cells; throws std::length_error beyond
constexpr int64_t HEADKV_MAX_SELECT_COMPOSED = 1 << 22;
ggml_tensor * headkv_build_select_composed(ggml_context * ctx, ggml_tensor * scores, int64_t n_keep, ggml_tensor * recent);

// The mean of some of the rows of one head, for the cell that stands for those that are dropped.
//   rows       [D, n], K or V
//   share  F32 [n] of each row
// Returns F32 [D, 1].
ggml_tensor * headkv_build_mean(ggml_context * ctx, ggml_tensor * rows, ggml_tensor * share);

// Stage 6, compact: pool row row[h] + i = cell kept[i] of head h, as raw bytes. Rows that no head takes stay as they are.
//   pool     [D, n_rows], of K or of V; no two heads take the same row
//   cells    [D*n_head_kv, n_cells] the staged ones of the layer
//   kept I32 [n_total], positions
//   cell I32 [n_pos]: cell of each position
//   plan I32 [3, n_head_kv]: first element in kept, number, first row in pool
// Returns the written pool.
ggml_tensor * headkv_build_compact(ggml_context * ctx, ggml_tensor * pool, ggml_tensor * cells, ggml_tensor * kept,
        ggml_tensor * cell, ggml_tensor * plan);
