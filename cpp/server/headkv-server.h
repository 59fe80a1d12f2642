// What llama-server does when it was started with --kv-size; without it each of these functions does nothing.
// The slots themselves are in headkv-slots.h, which needs upstream's definition of them.
#pragma once

#include "json.h"
#include "llama.h"

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

struct common_params;
struct server_context;
struct server_http_context;
struct server_slot_stats;
struct server_tokens;

// What a sequence holds, as last seen between two batches; timings have that of the moment of compression.
struct headkv_slot_info {
    int32_t state = 0; // as in headkv_stats
    int32_t n_prompt = 0; // prompt tokens at compression, 0 before
    int32_t n_past = 0; // tokens in the sequence
    int32_t cells_min = 0; // per head, generated tokens included
    int32_t cells_median = 0;
    int32_t cells_max = 0;
    int64_t n_bytes = 0; // K and V of these cells
    int64_t n_bytes_full = 0; // of as many cells in every head
    int64_t n_bytes_beside = 0; // of the layers that are not compressed
    int64_t n_evicted = 0; // cells that they have more
    double compress_ms = 0; // of its last compression
    bool by_layer = false; // its prompt is read ahead, layer by layer
    int32_t n_read = 0;     // tokens of that prompt: the share of the steps that are done
    int32_t n_archived = 0; // first tokens of the prompt that came from the archive
    int32_t kv_generated = 0; // cells per KV head that its generated tokens may have on average, 0 = any number
    int32_t n_evictions = 0; // of generated tokens
    int64_t n_evicted_generated = 0; // cells that were dropped with that
};

// What is shown of the prompt and the answer of a slot: n tokens from the first one on, and which heads hold them.
struct headkv_view {
    int32_t id_slot = 0;
    int32_t il = -1; // of one head, or of all
    int32_t ih = -1;
    int32_t first = 0;
    int32_t n = 0;

    std::string error;      // why there is no answer, empty = there is one
    int32_t state = 0;      // as in headkv_stats
    bool is_past = false;   // the cells were given back when the answer ended, this is what they were
    int32_t n_tokens = 0;
    int32_t n_prompt = 0;   // of them
    int32_t n_heads = 0;    // that could hold a token
    int32_t n_seen = 0;     // tokens that one of them holds
    std::vector<std::string> text; // [n]
    std::vector<int32_t> held;     // [n] heads that hold it
    std::vector<std::vector<int32_t>> cells; // [n_layer][KV heads] of each head, of layers that are not compressed none
    std::vector<float> overview;   // of all tokens, in as many equal parts: the mean share of the heads
};

// What a request may choose.
struct headkv_request {
    int32_t kv_size = 0; // 0 = that of the server
    int32_t kv_generated = -1; // same, 0 = generated tokens all stay; -1 = that of the server
    std::string question; // as in headkv_params, empty = that of the server
    std::vector<std::pair<int32_t, int32_t>> protect; // [start, end) positions of the prompt that every head keeps
    std::vector<std::pair<int32_t, int32_t>> drop; // same, whose cells all heads let go of when the prompt is compressed, or continued on
    std::shared_ptr<headkv_view> view; // it is no completion, but asks for this
};

// Before a model is loaded: checks the flags against upstream's, adapts these, and makes the contexts of this thread
// compressed ones. false: it was logged what cannot be combined.
bool headkv_server_open(common_params & params);

bool headkv_server_is_on();
bool headkv_server_reuses();
const std::string & headkv_server_question(); // as in headkv_params, where a request does not say
bool headkv_server_only_layer(); // --kv-prefill layer
bool headkv_server_by_layer(const llama_context * ctx); // prompts are read layer by layer
int32_t headkv_server_n_batch();    // prompt tokens per batch where they are not

// Puts what a request chooses into what its form was converted to.
void headkv_server_keep_fields(common_json & body, const common_json & request);

// What a completion request chooses for its prompt of n_tokens. Throws std::invalid_argument with field, value and range.
headkv_request headkv_server_check_request(const common_json & body, int32_t n_completions, int32_t n_tokens);

// The next functions are for the thread that owns the context, while nothing is decoded. Those that can fail throw.

// whole: the prompt may come in one batch; it is compressed by what its request chooses
void headkv_server_announce(llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens, bool whole, const headkv_request & request);

// before the batch that ends a prompt which was read ahead
void headkv_server_announce_end(llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens);

// Reads on in a whole prompt, for as long as other slots may have to wait. false: more is to be read; true: the batch with
// the whole prompt has one step left to do. info: of what is read, and what of it was archived.
bool headkv_server_read_ahead(llama_context * ctx, llama_seq_id seq_id, const std::vector<llama_token> & tokens, headkv_slot_info & info);

headkv_slot_info headkv_server_compress(llama_context * ctx, llama_seq_id seq_id);

headkv_slot_info headkv_server_note(llama_context * ctx, llama_seq_id seq_id);

// Why a prompt of n_tokens with this request, whose first n_past the sequence holds, does not continue on it, empty = it does.
std::string headkv_server_why_not_continued(llama_context * ctx, llama_seq_id seq_id, int32_t n_past, int32_t n_tokens, const headkv_request & request);

// Around the restoring of a slot of n_ctx tokens. The second one throws when it failed, the third one when what was restored
// is not a sequence of n_tokens.
void headkv_server_limit_restore(llama_context * ctx, int32_t n_ctx);
void headkv_server_check_restore(size_t n_read);
void headkv_server_check_restored(llama_context * ctx, llama_seq_id seq_id, size_t n_tokens);

// Whether a released slot of these tokens gives its cells back: nothing can be done with them, unless prompts may continue on
// them and they are those of its tokens. Where somebody looks at the page, it is noted before what they were.
bool headkv_server_forgets(llama_context * ctx, llama_seq_id seq_id, const server_tokens & tokens, const server_slot_stats & stats);

// Takes what a request drops out of a slot that holds its first n_tokens.
void headkv_server_drop_ranges(llama_context * ctx, llama_seq_id seq_id, const headkv_request & request, int32_t n_tokens);

// Tokens that prompts may have, which is the n_ctx of slots as upstream makes them: it is told before it is changed.
int32_t headkv_server_n_ctx_of_prompts(int32_t n_ctx);

// Tokens of a slot at which an answer ends: n_ctx, or more where its generated tokens are bounded; the most that any may have.
int32_t headkv_server_n_ctx(const llama_context * ctx, llama_seq_id seq_id, int32_t n_ctx);
int32_t headkv_server_n_ctx_most(const llama_context * ctx, int32_t n_ctx);

// When there is a context: what a request may choose depends on it.
void headkv_server_note_context(const llama_context * ctx);

// A turn is a request and its answer. The last ones of each slot are noted where there is a page.
void headkv_server_begin_turn(llama_seq_id seq_id, int32_t id_task, int32_t n_prompt);
void headkv_server_note_turn(llama_seq_id seq_id, const server_slot_stats & stats);

// Answers what a view asks of a slot of these tokens.
void headkv_server_fill_view(llama_context * ctx, const std::vector<llama_token> & tokens, headkv_view & view);

// What was noted; from any thread.
void headkv_server_add_slot(common_json & slot, llama_seq_id seq_id);
void headkv_server_add_info(common_json & timings, const headkv_slot_info & info);
void headkv_server_add_props(common_json & props);
std::string headkv_server_metrics(); // in the text format of Prometheus

// The page, see headkv-page.cpp; called once, by the thread that starts the server.

bool headkv_server_has_page();

// Paths that need no key: the files of the page.
void headkv_server_add_paths(std::unordered_set<std::string> & paths);

void headkv_server_add_routes(server_http_context & http, server_context & ctx_server, const common_params & params);

// Logs what was decided, and where the pages are, when the server listens.
void headkv_server_tell_start(server_context & ctx_server, const common_params & params, const std::vector<std::string> & addresses);

// Somebody looks at the page, as of now.
void headkv_server_note_look();
