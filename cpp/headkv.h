// headkv: a KV cache in which every (layer, KV head) owns its own range of cells and its own budget.
//
// The door for callers. Usage:
//
//   struct headkv_params p = headkv_default_params();
//   p.kv_size = 128;                                   // mean cells per KV head, recent ones included
//   if (headkv_set_params(&p)) { puts(headkv_last_error()); }
//   llama_context * ctx = llama_init_from_model(...);   // this thread's next contexts use the parameters
//   headkv_set_params(NULL);
//   ... llama_decode(prompt) ...                        // full attention over the whole prompt
//   headkv_end_prompt(ctx, 0);                          // compresses sequence 0
//   ... llama_decode(one token) ...                     // attends over what each head kept, and evicts with kv_generated
//
// Every function that can fail returns a negative number and leaves the reason in headkv_last_error().
// Nothing here keeps a pointer of the caller after it returned.
//
// llama_state_*() save and restore compressed sequences, with the adapters set that they were computed with. What they refuse,
// they name in headkv_last_error(), and nothing has changed; only when memory is short the sequence is empty then.
#pragma once

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum headkv_pool {
    HEADKV_POOL_MAX = 0, // max over the neighbours that exist
    HEADKV_POOL_AVG = 1, // sum over the neighbours, divided by the kernel size
};

// how tokens attend: those of a prompt over the staging, generated ones over the store
enum headkv_attend {
    HEADKV_ATTEND_AUTO = 0, // fused where the layer's memory is on the CPU or, for generated tokens, its device has the op, else composed
    HEADKV_ATTEND_FUSED = 1, // ops of ours; an error where generated tokens cannot have theirs
    HEADKV_ATTEND_COMPOSED = 2, // existing ggml ops; every backend; a prompt is read with the bits of the stock cache
};

// order in which a prompt is read; the results are the same
enum headkv_prefill {
    HEADKV_PREFILL_AUTO = 0, // layer where it applies and takes less, else token
    HEADKV_PREFILL_TOKEN = 1, // each ubatch through all layers: every layer's full cache is alive at the end
    HEADKV_PREFILL_LAYER = 2, // all ubatches through one layer after the other: only one layer's full cache is ever alive
};

// what becomes of the cells that a head may keep beyond the length of the prompt
enum headkv_surplus {
    HEADKV_SURPLUS_LOST = 0, // as in the authors' code
    HEADKV_SURPLUS_REDISTRIBUTE = 1, // evenly to the other heads of its layer, then to those of the other layers
};

// which cells compete when there are more generated tokens than kv_generated
enum headkv_scope {
    HEADKV_SCOPE_GENERATED = 0, // those of generated tokens; the prompt's stay
    HEADKV_SCOPE_ALL = 1, // all but protected ones; a head keeps kv_size + kv_generated on average
};

// and which of them stay
enum headkv_generated_rank {
    HEADKV_GENERATED_ATTENTION = 0, // by the attention of the last `window` queries, as of prompts
    HEADKV_GENERATED_RECENT = 1, // the last ones
    HEADKV_GENERATED_REDUNDANCY = 2, // by attention, less for a key that others are near to (after R-KV)
};

struct headkv_params {
    size_t size;        // sizeof(struct headkv_params)
    const char * policy;      // "auto" (what is best for what is known of the heads and for the question), the name of a policy, see
                              // headkv_policies(), or "budget/rank" or "budget/rank/fit"
    const char * budget;      // how many cells each head keeps, instead of the policy's own; NULL = that one. "uniform",
                              // "importance" (of the query heads), "replay" (a table of shares), "mix" (the mean of both), "adaptive"
                              // (uniform, but the prompt decides within a layer), "importance+adaptive", "pyramid" (fewer in deeper
                              // layers), "whole" (the most important heads keep all, the others what is protected and one), "all"
    const char * rank;        // which ones, same: "attention" (of the window), "value" (norm of the value), "attention*value", "expected"
                              // (attention that queries like those of the prompt are expected to pay, and the value; on the CPU),
                              // "outlying" (tokens whose values, in all layers up to this one, are far from the mean), "outlying+value"
                              // (these, and in heads that keep more than the mean their own farthest), "attention+outlying" (half by
                              // attention, above 128 cells, the other half these), "output" (of what the value adds to the output of
                              // the layer), "critical" (half by attention, half by attention times output), "sums"
                              // (attention of all tokens of the prompt), "recent" (the last ones)
    const char * fit;         // what becomes of their values, same: "none", "mean" (one cell stands for those that are dropped), "values"
                              // (fitted to the answers that the prompt's own queries get from the full cache)
    const char * question;    // for "auto": "known" (the prompt ends with it), "both" (it does, and others follow it) or "later" (a
                              // document for questions to come); NULL = known
    int32_t kv_size;     // mean cells per KV head, recent ones included
    int32_t window;      // queries of the last tokens, which score the prompt: 1..256; the paper's numbers of this and of
                              // the next four are 8, 8, 1, max, 7
    int32_t recent;      // last cells of a prompt that every head keeps, >= 1
    int32_t power;       // 1, 2, 4 or 8: a cell's score is mean(p^power)^(1/power) over the queries, 1 = their mean
    int32_t pool;        // enum headkv_pool
    int32_t pool_kernel; // odd, 1..31; 1 = no pooling; 0 = a quarter of the cells of each head, 3..31
    double beta;        // > 1; larger = more uniform; 0 = the one stored with the importance, else 1.2
    int32_t n_tail;      // rows per head for generated tokens that the store grows by at a time, at least (or 1/16 of its
                              // cells), >= 1
    int32_t attend;      // enum headkv_attend
    int32_t n_buckets;   // attention calls per layer of the composed path, 1..8
    int32_t prefill;     // enum headkv_prefill
    int32_t hidden_f16;  // 1 = hidden states between layers in f16: half the memory, rounded results
    int32_t sinks;       // first cells of a prompt that every head keeps; -1 = the rank's own (4 of all but attention, critical and sums, as far
                              // as kv_size reaches, else 0)
    const int32_t * protect;  // n_protect spans [start, end) of positions whose cells every head keeps, sinks too: they count
    int32_t n_protect;   // as part of its budget, and a head whose budget they exceed grows
    int32_t surplus;     // enum headkv_surplus
    int32_t pyramid_exact; // 0 = the authors' rounding, which holds more than kv_size (32 layers: 13 % at 64, 5 % at 128)
    double adakv_floor; // share of its budget that the prompt cannot take from a head, 0..1; -1 = the policy's own
    int32_t adakv_normalize; // 1 = heads whose attention is concentrated count more
    // importance of each query head, row-major [n_layer][n_head]; NULL = read it from the files below
    const double * importance;
    int32_t n_layer;
    int32_t n_head;
    const char * importance_gguf; // GGUF file with {arch}.attention.head_importance and .head_replay, usually the model itself; may be NULL
    const char * model_gguf; // another one, for what the first lacks, which must have one of both then; may be NULL
    // share of a prompt that each KV head needs when the mean over the heads is shares[i], row-major [n_shares][n_layer][n_head_kv]; 0
    // for a head that is not there; NULL = read it from the files above
    const double * replay;
    const double * shares; // ascending, between 0 and 1
    int32_t n_shares;
    int32_t n_head_kv;     // of the layer that has most
    // What becomes of generated tokens. When a sequence has generated_slack more of them than kv_generated, the heads keep cells of
    // kv_generated on average, divided by the policy's budget; the last `window` tokens are among them and stay. 0 = all stay.
    int32_t kv_generated;  // 0, or more than window
    int32_t generated_slack; // >= 1
    int32_t generated_scope; // enum headkv_scope
    int32_t generated_rank;  // enum headkv_generated_rank
};

// What a policy is, and what it looks at. Names live as long as the library.
struct headkv_policy_info {
    const char * name;
    const char * budget;
    const char * rank;
    const char * fit;
    bool by_importance;    // budgets by the importance of the heads, without which it is refused
    bool by_beta;          // of them, a share that beta says
    bool by_replay;        // budgets by the replay table, without which it is refused
    bool by_window;        // cells by the attention of the last queries; window, power, pool and pool_kernel count
    bool by_all_tokens;    // cells by the attention of all tokens while they are read: a context has to be made for it
    bool keeps_all;        // nothing is dropped; kv_size does not count
};

struct headkv_stats {
    size_t size;             // sizeof(struct headkv_stats), set by the caller
    int32_t state;            // 0 empty, 1 prompt is being read, 2 compressed, 3 read layer by layer, its end is pending
    int32_t n_prompt;         // prompt tokens at compression, 0 before
    int32_t n_past;           // logical tokens in the sequence
    int64_t bytes_store;      // K/V bytes allocated for compressed sequences, all layers
    int64_t bytes_staging;    // K/V, window and hidden-state bytes allocated for prompts, all layers
    int64_t bytes_peak;       // largest sum of staging, scratch and store during the last prompt
    int64_t bytes_full;       // K/V bytes that n_past uncompressed cells take
    int64_t t_compress_us;    // duration of the last compression
    int64_t n_compress;       // compressions since the context was created
    int32_t kv_size;          // with which the sequence was compressed, 0 before
    int32_t n_archived;       // first tokens of the prompt whose K and V came from the archive
    int32_t n_heads_fitted;   // KV heads whose values were fitted, of those that dropped cells
    double fit_before;        // what the kept cells miss of the answers of all, mean squares relative to these, of queries that the
    double fit_after;         // fit does not know, mean over these heads
    int64_t t_fit_us;         // of t_compress_us, the fit
    int64_t bytes_beside;     // allocated for layers that are not compressed: windows and recurrent states of all sequences
    int32_t kv_generated;     // cells per KV head that generated tokens of the sequence may have on average, 0 = any number
    int32_t n_evictions;      // how often its generated tokens were evicted since its compression
    int64_t n_evicted;        // cells of all heads that were dropped with that
    int64_t t_evict_us;       // and how long it took
    int64_t bytes_queries;    // allocated for queries of the last generated tokens, of all sequences
};

// Bytes of a prompt and what is generated behind it, as allocated.
struct headkv_footprint {
    size_t size;             // sizeof(struct headkv_footprint), set by the caller
    int64_t compute;          // compute buffers of the context, as it was created
    int64_t staging;          // K and V of the prompt while it is read
    int64_t hidden;           // hidden states, and mask where there is one, of a prompt that is read layer by layer
    int64_t ring;             // queries that are noted
    int64_t scratch;          // what a compression has besides, at most
    int64_t store;            // what is kept, and rows for generated tokens
    int64_t beside;           // layers that are not compressed: windows and recurrent states
};

// Where K and V of prompts are kept, so that one which begins like an earlier one is read from where it differs.
struct headkv_archive_params {
    size_t size;             // sizeof(struct headkv_archive_params)
    const char * folder;      // is made if missing, may be shared by processes; NULL = memory of this context
    int64_t max_bytes;        // what was not used for the longest time goes first; 0 = 20 GiB, and a quarter of all memory without a folder
    int32_t type;             // ggml type of archived rows; -1 = that of the cache, exact
};

struct headkv_archive_stats {
    size_t size;             // sizeof(struct headkv_archive_stats), set by the caller
    int64_t max_bytes;
    int64_t n_blocks;         // held, as counted when the last prompt was written
    int64_t bytes;
    int64_t n_restored;       // prompt tokens that came from it, since it was set
    int64_t n_computed;       // prompt tokens that were read
    int64_t bytes_read;
    int64_t bytes_written;
    int64_t t_read_us;
    int64_t t_write_us;
    int64_t n_evicted;        // blocks that had to make room
    int64_t n_damaged;        // blocks that were removed because they are none, or were gone while they were read
    int64_t n_failed;         // prompts that could not be written
};

// A block as it is told by headkv_archive_list(); pointers are valid during the call.
struct headkv_archive_block {
    const char * name;
    const char * model;
    int64_t n_tokens;         // of the prompt, up to its end
    int64_t bytes;
    int64_t t_used_us;        // when it was last used, since 1970
    const char * damaged;     // why it is no block; empty = it is one, as far as was looked
};

LLAMA_API struct headkv_params headkv_default_params(void);

// The policies, in the order in which they are listed to users. Returns their number; dst may be NULL to ask for it.
LLAMA_API int32_t headkv_policies(struct headkv_policy_info * dst, int32_t n);

// One of them, by its name or as "budget/rank/fit", with choices that replace its own; any of the last three may be NULL.
LLAMA_API int32_t headkv_find_policy(const char * policy, const char * budget, const char * rank, const char * fit, struct headkv_policy_info * dst);

// Checks the parameters and makes them the ones of the contexts that this thread creates next. NULL = off. A context that another
// thread creates meanwhile has the stock cache, with a warning in the log.
LLAMA_API int32_t headkv_set_params(const struct headkv_params * params);

// Reason of the last failure on this thread; never NULL.
LLAMA_API const char * headkv_last_error(void);

// Empties it, before a function of llama.h that may leave its reason there.
LLAMA_API void headkv_clear_error(void);

// Other parameters for the compressions to come, but for prompts that were begun with parameters of their own or are being read
// layer by layer. A window may not be larger than the context was created with; n_tail, attend, n_buckets, prefill and hidden_f16 size
// what the context owns and must be those it was created with.
LLAMA_API int32_t headkv_configure(struct llama_context * ctx, const struct headkv_params * params);

// Whether the context has a ragged cache.
LLAMA_API bool headkv_enabled(const struct llama_context * ctx);

// Announces that the sequence will have n_tokens, so that staging is allocated once and not larger than needed.
// whole: the next llama_decode() call brings the whole prompt, which may then be read layer by layer; that takes a
// context with n_batch >= n_tokens, and outputs for fewer than all tokens.
// params: what the prompt is compressed by, within the limits of headkv_configure(); without importance, they have that of the
// context. NULL = those of the context. An error for a sequence that is not empty. A prompt that failed at its first tokens, or was read layer by
// layer, still has them when it comes again; llama_memory_seq_rm(.., -1, -1) drops them.
// Clears headkv_last_error(): what is found there after a failed llama_decode() is its reason.
LLAMA_API int32_t headkv_begin_prompt(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens, bool whole, const struct headkv_params * params);

// headkv_begin_prompt() and llama_decode() of a whole prompt into an empty sequence, with logits for its last token. Parameters
// that were announced for as many tokens of it are kept until it is removed.
// Returns what llama_decode() does; -4: not enough memory for the batch. The sequence is empty after a failure.
LLAMA_API int32_t headkv_read_prompt(struct llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens);

// Reads on in a whole prompt, layer by layer, for about max_ms, 0 = one step, but not its last step (one ubatch through one layer).
// Returns how many steps are left, 1 or more: when it is 1, headkv_read_prompt() or llama_decode() of the same whole prompt
// finishes it. In between the sequence counts as empty and other compressed ones can be decoded; the outcome is that of
// one call. llama_memory_seq_rm() of all of it gives up, but not from 0 on behind headkv_begin_prompt(), which announces its end:
// upstream's server removes what is there before the batch. Negative: failed, and the sequence is empty.
LLAMA_API int32_t headkv_read_ahead(struct llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens, int32_t max_ms);

// Why prompts are not read layer by layer in this context; empty = they are.
LLAMA_API const char * headkv_why_token_prefill(const struct llama_context * ctx);

// Called before each step of a prompt, and must not call back into the context: layer il of n_layer (0 of 1 when all layers are one step), tokens
// [i_token, ..) of n_tokens. Returning false aborts: llama_decode() fails, and the step's tokens are removed, or the
// whole prompt when it was read layer by layer.
typedef bool (*headkv_progress)(int32_t il, int32_t n_layer, int32_t i_token, int32_t n_tokens, void * user_data);
LLAMA_API int32_t headkv_set_progress(struct llama_context * ctx, headkv_progress progress, void * user_data);

// Compresses the sequence and releases the staging memory. A no-op for a compressed sequence.
// Afterwards llama_memory_seq_rm() can take back generated tokens and the prompt's last `recent` tokens, which every head
// keeps, but no more than these; with kv_generated, no more than the tokens since the last eviction and `window` before it.
LLAMA_API int32_t headkv_end_prompt(struct llama_context * ctx, llama_seq_id seq_id);

// Compresses the sequence as another one, which must be empty, by the parameters that the context is configured to; the prompt stays as it is and can be compressed again in another
// way, or truncated and read on. It must be held as a whole: read with prefill 'token', and not compressed.
LLAMA_API int32_t headkv_compress_as(struct llama_context * ctx, llama_seq_id seq_id, llama_seq_id seq_id_dst);

LLAMA_API struct headkv_archive_params headkv_default_archive_params(void);

// Sets the archive of a context with an n_ubatch of 64 or more while no prompt is being read or held; NULL = none, the default. From
// then on K and V of all tokens of a prompt go there when it is compressed, and prompts that begin like an archived one (same weights,
// adapters, rotary embedding, types) take them from there: llama_decode() of a whole prompt, or of one from its beginning, computes
// what differs, and at least the last `window` tokens. The outcome is that of reading all of it. Policies that look at all tokens
// ("h2o", any with fit "values") only write; tokens that were computed in ubatches of fewer than 64, or while other prompts were held, are not archived,
// since their cells differ in the last bits. What is damaged is removed and read; llama_decode() of a whole prompt that finds it in
// the middle fails once with the reason, and headkv_read_prompt() and headkv_read_ahead() begin it again. What cannot be written is
// logged. Generated tokens are not archived. Windowed layers are archived with the others; fails where a layer is recurrent.
LLAMA_API int32_t headkv_set_archive(struct llama_context * ctx, const struct headkv_archive_params * params);

LLAMA_API int32_t headkv_get_archive_stats(const struct llama_context * ctx, struct headkv_archive_stats * stats);

// Tells the blocks of a folder, those first that were not used for the longest time, and returns their number. deep: the whole of each one is checked.
typedef bool (*headkv_archive_tell)(const struct headkv_archive_block * block, void * user_data);
LLAMA_API int32_t headkv_archive_list(const char * folder, bool deep, headkv_archive_tell tell, void * user_data);

// Removes the blocks that were not used for the longest time until the rest takes max_bytes at most. Returns how many.
LLAMA_API int32_t headkv_archive_prune(const char * folder, int64_t max_bytes);

// Whether a compressed sequence is what a prompt read now with these parameters (NULL = those of the context) would have left:
// 0, or negative with the reason in headkv_last_error(), which can be another kv_size, other protected cells, another policy or
// other options of it, or other adapters (LoRA, control vector). llama_decode() continues on it in either case.
LLAMA_API int32_t headkv_can_continue(const struct llama_context * ctx, llama_seq_id seq_id, const struct headkv_params * params);

// Limits of the sequences that llama_state_*() restores from now on, which are refused beyond them; 0 = that of the context.
// n_protected: cells that every head keeps as protected, sinks included. n_tokens: of the prompt alone where generated tokens are bounded.
LLAMA_API int32_t headkv_limit_restore(struct llama_context * ctx, int32_t kv_size, int32_t n_protected, int32_t n_tokens);

// Takes tokens [p0, p1) out of a compressed sequence, before its last one: every head lets go of their cells, and the positions of the others
// stay. Takes a context with kv_generated. llama_memory_seq_rm() of tokens in the middle does the same, without a reason when it fails.
LLAMA_API int32_t headkv_drop(struct llama_context * ctx, llama_seq_id seq_id, int32_t p0, int32_t p1);

LLAMA_API int32_t headkv_get_stats(const struct llama_context * ctx, llama_seq_id seq_id, struct headkv_stats * stats);

// Name of the policy in use, never "auto"; "full" for the stock cache. NULL: that of the contexts which this thread creates next.
LLAMA_API const char * headkv_get_policy(const struct llama_context * ctx);

// Cells each head may keep of a long prompt, before its scores move them within a layer and without what protected cells
// add, recent ones included: [n_layer][n_head_kv_max] with 0 where a layer has fewer heads.
// Returns the number of values; dst may be NULL to ask for it.
LLAMA_API int32_t headkv_get_budget(const struct llama_context * ctx, int32_t * dst, int32_t n);

// what a layer has that is not compressed, whether or not its heads are
enum headkv_kept_aside {
    HEADKV_BESIDE_WINDOW = 1, // attention that ends at a window
    HEADKV_BESIDE_STATE = 2, // a recurrent state
};

// Heads of the layers that a context of the model compresses, each [n_layer], 0 for those that it does not: layers with windowed
// attention, a recurrent state, or no attention. beside: sums of enum headkv_kept_aside. n: values that there is room for; null or 0 =
// returns n_layer only. Fails with the reason where no context of the model can be compressed.
LLAMA_API int32_t headkv_get_heads(const struct llama_model * model, int32_t * n_head, int32_t * n_head_kv, int32_t * n_embd_head_k,
        int32_t * n_embd_head_v, int32_t * beside, int32_t n);

// Cells each head holds now, generated tokens included; same shape. Of a prompt that was read layer by layer, whose last layer
// waits for headkv_end_prompt(), the other layers hold what they kept.
LLAMA_API int32_t headkv_get_n_cells(const struct llama_context * ctx, llama_seq_id seq_id, int32_t * dst, int32_t n);

// Prompt positions that a head kept, ascending; a first -1 is the cell that stands for all that were dropped. Behind them those of
// generated tokens that evictions left; the tokens behind the last of these, which every head has, are not listed. Returns their number;
// dst may be NULL to ask for it.
LLAMA_API int32_t headkv_get_positions(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t ih, int32_t * dst, int32_t n);

// Budgets without a context, of prompts of n_tokens, 0 = long ones: the same function that contexts use. n_head and n_head_kv: of each layer, both may be 0;
// dst is [n_layer][largest n_head_kv], with 0 where a layer has fewer heads.
LLAMA_API int32_t headkv_plan(const struct headkv_params * params, int32_t n_layer, const int32_t * n_head, const int32_t * n_head_kv, int32_t n_tokens, int32_t * dst);

// What a prompt of n_prompt tokens, read in ubatches of n_ubatch, and n_predict generated ones would take in a context of this
// model and these types of K and V, but for the compute buffers, which are those of this one. layered: read layer by layer.
// Of policies that score by the window, with attend 'fused': the norms of "criticalkv", the sums of "h2o" and the padding of
// 'composed' come on top.
LLAMA_API int32_t headkv_get_footprint(const struct llama_context * ctx, const struct headkv_params * params, int32_t n_prompt, int32_t n_predict,
        int32_t n_ubatch, bool layered, struct headkv_footprint * dst);

// Attention of the last n_queries tokens, at most the window, over a sequence that is not compressed, reduced for each query
// head, [n_queries][n_layer][n_head_max]: mass: sum of those of the n_top largest probabilities whose positions are in one of
// n_spans spans [start, end); 0 in layers without KV heads; top: position of the largest one, -1 there. Of equal ones the first
// count. Returns the number of values; mass may be NULL to ask for it.
LLAMA_API int32_t headkv_read_attention(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_queries, const int32_t * spans,
        int32_t n_spans, int32_t n_top, float * mass, int32_t * top, int32_t n);

// Attention of the same tokens to the first n_positions positions: the largest probability that one of them gives to a position in
// one of the query heads of a group, [n_layer][n_head_kv_max][n_positions]; 0 where a layer has fewer heads. Returns the number of
// values; dst may be NULL to ask for it.
LLAMA_API int32_t headkv_read_attention_max(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_queries, int32_t n_positions,
        float * dst, int32_t n);

#ifdef __cplusplus
}
#endif
