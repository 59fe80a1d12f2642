#include "headkv-server.h"

#include "headkv-args.h"
#include "headkv.h"

#include "server-common.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <vector>

// a request and its answer
struct turn_t {
    int32_t id_task = 0;
    int32_t n_prompt = 0;
    int32_t n_archived = 0;  // of them, from the archive
    int32_t n_continued = 0; // held by the slot already
    int32_t n_read = 0;      // the others, as far as they are read
    double read_ms = 0;
    int32_t n_generated = 0;
    double generate_ms = 0;
    double per_second = 0; // generated tokens
    int64_t n_bytes = 0; // as last seen
    int64_t n_bytes_full = 0;
    const char * state = "reading";
};

// what a head holds: the listed positions, and all from the tail on
struct head_t {
    int32_t il;
    int32_t ih;
    std::vector<int32_t> listed; // ascending; a first -1 stands for those that were dropped
    int32_t tail;
};

struct held_t {
    int32_t state = 0;
    int32_t n_prompt = 0;
    std::vector<llama_token> tokens;
    std::vector<head_t> heads;
};

static constexpr size_t MAX_TURNS = 32; // of a slot
static constexpr int64_t MAX_LOOK_US = 60 * 1000 * 1000; // after which nobody looks any more
static std::atomic<int64_t> t_look_us = -MAX_LOOK_US;
static std::vector<held_t> past; // of slots whose cells were given back while somebody looked; for the thread of the context

// one server per process
static struct {
    std::mutex mutex; // of what is noted for other threads
    std::vector<headkv_slot_info> slots;
    std::vector<std::vector<std::vector<int32_t>>> heads; // of a slot: [n_layer][KV heads] cells, of layers that are not compressed none
    std::vector<std::deque<turn_t>> turns;
    int64_t bytes_store = 0;
    int64_t bytes_staging = 0;
    int64_t bytes_beside = 0;
    int64_t n_compressions = 0;
    int64_t n_evicted = 0; // cells
    int64_t n_evictions = 0; // of generated tokens
    int64_t n_evicted_generated = 0; // cells
    int64_t t_compress_us = 0;
    headkv_archive_stats archive = {};

    int32_t n_batch = 0; // that was asked for
    int32_t n_ctx = 0; // of a slot, as upstream made it
    std::atomic<int32_t> n_ctx_seq{ 0 }; // that a sequence of the context may have, 0 = it is not there yet
    std::string question; // "known", "both" or "later", where a request does not say
    std::map<std::string, std::string> policies; // of each, never "auto"
} server;

static const char * const STATES[] = { "empty", "staged", "compressed", "layered" }; // as in headkv_stats

//
// start
//

// what was asked for and cannot be had with compression, empty = nothing
static std::string refusal(const common_params & params) {
    const common_params def = {};

    if (params.embedding || (params.pooling_type != LLAMA_POOLING_TYPE_NONE && params.pooling_type != LLAMA_POOLING_TYPE_UNSPECIFIED)) {
        return "--embeddings, --reranking, --pooling: there is no generation to speed up";
    }
    if (params.ctx_shift) {
        return "--context-shift: a compressed cell has no successor to shift, use a larger -c";
    }
    if (params.grp_attn_n != 1) {
        return "--grp-attn-n: positions cannot be divided";
    }
    if (params.n_cache_reuse > 0) {
        return "--cache-reuse: positions cannot be shifted, use --kv-reuse to continue on the compressed past";
    }
    if (params.speculative.has_dft() || params.speculative.has_synth() ||
            std::any_of(params.speculative.types.begin(), params.speculative.types.end(), [](auto t) { return t != COMMON_SPECULATIVE_TYPE_NONE; })) {
        return "--spec-type, --model-draft: speculative decoding is not supported";
    }
    if (!params.mmproj.path.empty()) {
        return "--mmproj: images and audio are not supported, use --no-mmproj";
    }
    if (params.swa_full && server.n_batch == 0) { // not of an earlier start
        return "--swa-full: layers with windowed attention hold their window, only the others are compressed";
    }
    if (!params.slot_save_path.empty() && !headkv_server_reuses()) {
        return "--slot-save-path: nothing would continue on a restored slot, use --kv-reuse";
    }
    if (params.cache_ram_mib != 0 && params.cache_ram_mib != def.cache_ram_mib && !headkv_server_reuses()) {
        return "--cache-ram: nothing would continue on a cached prompt, use --kv-reuse or --cache-ram 0";
    }
    if (params.n_ctx_checkpoints > 0 && params.n_ctx_checkpoints != def.n_ctx_checkpoints) {
        return "--ctx-checkpoints: they are taken within a prompt, before it is compressed, use --ctx-checkpoints 0";
    }
    if (headkv_get_args().is_lossless() && headkv_get_args().params.kv_size > 0) {
        return "--kv-policy lossless: it keeps all cells, leave --kv-size out";
    }
    if (!headkv_get_args().question.empty() && !headkv_get_args().asks_question()) {
        return "--kv-question: a policy that is named does not look at it, use --kv-policy auto";
    }
    if (!headkv_get_args().importance.empty() && !std::ifstream(headkv_get_args().importance)) {
        return "--kv-importance " + headkv_get_args().importance + ": it cannot be read";
    }
    if (headkv_get_args().has_archive() && headkv_server_reuses()) {
        return "--kv-archive: with --kv-reuse prompts continue on the compressed past and are not read again, leave one of them out";
    }
    if (headkv_get_args().has_archive() && std::min(params.n_ubatch, params.n_batch) < 64) {
        return "--kv-archive: it needs -ub and -b of 64 at least, fewer tokens are computed in another way";
    }
    if (!headkv_get_args().has_archive() && (headkv_get_args().archive_params.max_bytes > 0 || headkv_get_args().archive_params.type >= 0)) {
        return "--kv-archive-size, --kv-archive-type: there is no archive, use --kv-archive DIR";
    }
    if (headkv_get_args().params.kv_generated == 0) {
        for (const std::string & flag : headkv_get_args().given) {
            if (flag == "--kv-limit") {
                return flag + ": answers end with the context, use --kv-generated";
            }
            if (flag.rfind("--kv-generated-", 0) == 0) {
                return flag + ": nothing that is generated is evicted, use --kv-generated, or leave it out";
            }
        }
    }
    if (params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
        return "-fa off: compression needs flash attention";
    }
    return "";
}

// what the library says of a parameter, by the flag that sets it: "window is 300: .."
static std::string by_flags(const std::string & error) {
    const std::string name = error.substr(0, error.find(" is "));
    for (const std::string flag : { "kv_size", "kv_generated", "kv_generated_slack", "kv_generated_scope", "policy", "budget", "rank", "fit", "question", "window", "recent",
                 "power", "pool_kernel", "beta", "sinks" }) {
        if (name == flag) {
            std::string res = flag.rfind("kv_", 0) == 0 ? "--" + flag : "--kv-" + flag;
            std::replace(res.begin(), res.end(), '_', '-');
            return res + error.substr(name.size());
        }
    }
    return error;
}

static constexpr int32_t MAX_CELLS = 1 << 26; // of a head, beyond every context

// largest kv_size of a request
static int32_t kv_size_max() {
    const headkv_args & args = headkv_get_args();
    return args.is_lossless() ? MAX_CELLS : args.kv_size_max > 0 ? args.kv_size_max
                                                                 : args.params.kv_size;
}

// What the prompt of a request is compressed by. The importance is that of the context.
class request_params {
public:
    explicit request_params(const headkv_request & request) {
        const headkv_args & args = headkv_get_args();
        params = args.params;
        params.policy = server.policies.at(request.question.empty() ? server.question : request.question).c_str(); // with budget, rank and fit
        params.kv_size = request.kv_size > 0 ? request.kv_size : args.is_lossless() ? MAX_CELLS
                                                                                    : args.params.kv_size;
        params.kv_generated = request.kv_generated >= 0 ? request.kv_generated : args.params.kv_generated;
        for (const auto & [start, end] : request.protect) {
            spans.insert(spans.end(), { start, end });
        }
        params.protect = spans.data();
        params.n_protect = (int32_t) request.protect.size();
    }
    request_params(const request_params &) = delete;

    const headkv_params & get() const { return params; }

private:
    headkv_params params;
    std::vector<int32_t> spans; // it points to them
};

// What a model has in layers that are not compressed, of enum headkv_kept_aside; it is looked at without its weights. 0 where it cannot
// be compressed or loaded, which its context says.
static int32_t kept_aside(const common_params & params) {
    llama_model_params p = llama_model_default_params();
    p.no_alloc = true;
    p.load_mode = LLAMA_LOAD_MODE_NONE;
    p.n_gpu_layers = 0;
    p.kv_overrides = params.kv_overrides.empty() ? nullptr : params.kv_overrides.data();
    const llama_model_ptr model(llama_model_load_from_file(params.model.path.c_str(), p));
    const int32_t n = model ? headkv_get_heads(model.get(), nullptr, nullptr, nullptr, nullptr, nullptr, 0) : 0;
    std::vector<int32_t> unused(std::max(0, n));
    std::vector<int32_t> beside(std::max(0, n));
    const bool known = n > 0 && headkv_get_heads(model.get(), unused.data(), unused.data(), unused.data(), unused.data(), beside.data(), n) == n;
    return known ? std::accumulate(beside.begin(), beside.end(), 0, std::bit_or<int32_t>()) : 0;
}

// there is no context whose cells these are; with the lock
static void forget_held(size_t n_slots) {
    server.slots.assign(n_slots, {});
    server.heads.assign(n_slots, {});
    server.bytes_store = server.bytes_staging = server.bytes_beside = 0;
}

bool headkv_server_open(common_params & params) {
    const headkv_args & args = headkv_get_args();
    if (!headkv_server_is_on()) {
        if (!args.given.empty()) {
            SRV_ERR("%s has no effect without --kv-size: add --kv-size N, or --kv-policy lossless\n", args.given[0].c_str());
        }
        return args.given.empty();
    }
    const std::string why = refusal(params);
    if (!why.empty()) {
        SRV_ERR("not possible with %s: %s\n", args.amount().c_str(), why.c_str());
        return false;
    }
    const int32_t aside = kept_aside(params);
    if (args.has_archive() && (aside & HEADKV_BESIDE_STATE)) {
        SRV_ERR("--kv-archive: it holds K and V of tokens, and %s has recurrent layers, whose state is right at one position alone: leave it out\n", params.model.path.c_str());
        return false;
    }
    if (kv_size_max() < args.params.kv_size) {
        SRV_ERR("--kv-size-max %d: it must be at least --kv-size %d\n", args.kv_size_max, args.params.kv_size);
        return false;
    }
    headkv_params p = args.named();
    p.kv_size = kv_size_max(); // the context is made for the largest request
    p.importance_gguf = args.importance.empty() ? params.model.path.c_str() : args.importance.c_str();
    p.model_gguf = args.importance.empty() ? nullptr : params.model.path.c_str(); // has what the other lacks
    // contexts are made with what is set last
    const auto set = [&](const std::string & question) {
        p.question = question.c_str();
        if (headkv_set_params(&p) != 0) {
            SRV_ERR("%s: %s\n", args.amount().c_str(), by_flags(headkv_last_error()).c_str());
            return false;
        }
        server.policies[question] = headkv_get_policy(nullptr);
        return true;
    };
    if (args.policy != "auto") { // one that is named is the same for all
        if (!set("known")) {
            return false;
        }
        server.policies["both"] = server.policies["later"] = server.policies["known"];
    } else if (!set("both") || !set("later") || !set("known")) {
        return false;
    }
    headkv_policy_info known = {};
    headkv_find_policy(server.policies.at("known").c_str(), nullptr, nullptr, nullptr, &known);
    if (args.params.beta != 0.0 && (args.policy != "auto" || !args.budget.empty()) && !known.by_beta) {
        SRV_ERR("--kv-beta %g: policy %s does not look at it, leave one of them out\n", args.params.beta, server.policies.at("known").c_str());
        return false;
    }
    headkv_policy_info later = {};
    headkv_find_policy(server.policies.at("later").c_str(), nullptr, nullptr, nullptr, &later);
    server.question = !args.question.empty() ? args.question : args.policy == "auto" && args.reuse && later.by_replay ? "later"
                                                                                                                      : "known";
    if (server.question != "known" && !set(server.question)) {
        return false;
    }
    if (args.has_archive() && args.archive != HEADKV_ARCHIVE_RAM && headkv_archive_list(args.archive.c_str(), false, nullptr, nullptr) < 0) {
        SRV_ERR("--kv-archive: %s\n", headkv_last_error());
        return false;
    }

    if (params.n_ctx_checkpoints != 0) {
        SRV_WRN("%s", "--kv-size: context checkpoints (--ctx-checkpoints) are switched off, they are taken within a prompt, before it is compressed\n");
        params.n_ctx_checkpoints = 0;
    }
    if (!args.reuse && (params.cache_ram_mib != 0 || params.cache_idle_slots)) {
        SRV_WRN("%s", "--kv-size: the prompt cache in RAM (--cache-ram, --cache-idle-slots) is switched off, without --kv-reuse nothing would continue on it\n");
        params.cache_ram_mib = 0;
        params.cache_idle_slots = false;
    }
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    // The memory itself says from which position a sequence can be continued, windows included (llama_memory_seq_pos_min()): nothing
    // else is to be subtracted, and upstream's server does not where it takes the layers for full ones. They hold their windows.
    // Of models without windows it would say that it cannot.
    params.swa_full = aside & HEADKV_BESIDE_WINDOW;

    if (server.n_batch == 0) {
        server.n_batch = params.n_batch;
    }
    if (args.params.prefill != HEADKV_PREFILL_TOKEN) {
        // a prompt that is read layer by layer comes in one batch; the context limits it to its own size
        params.n_batch = std::max(server.n_batch, params.n_ctx > 0 ? params.n_ctx : 1 << 20);
    }
    SRV_INF("compression: policy %s (question %s), %s, %s\n", server.policies.at(server.question).c_str(), server.question.c_str(),
            args.amount().c_str(),
            args.reuse ? "prompts continue on the compressed past (--kv-reuse)" : args.has_archive() ? "prompts are read from where they differ from archived ones (--kv-archive)"
                                                                                                     : "every prompt is read from its beginning");

    std::lock_guard<std::mutex> lock(server.mutex);
    forget_held(std::max(1, params.n_parallel));
    server.turns.assign(server.slots.size(), {});
    past.assign(server.slots.size(), {});
    server.n_ctx = 0;
    return true;
}

bool headkv_server_is_on() {
    return headkv_get_args().params.kv_size > 0 || headkv_get_args().is_lossless();
}

bool headkv_server_has_page() {
    return !headkv_get_args().page.empty();
}

bool headkv_server_reuses() {
    return headkv_server_is_on() && headkv_get_args().reuse;
}

const std::string & headkv_server_question() {
    return server.question;
}

bool headkv_server_only_layer() {
    return headkv_get_args().params.prefill == HEADKV_PREFILL_LAYER;
}

bool headkv_server_by_layer(const llama_context * ctx) {
    return *headkv_why_token_prefill(ctx) == '\0';
}

int32_t headkv_server_n_batch() {
    return server.n_batch;
}

//
// requests
//

static const size_t MAX_SPANS = 64;

static int32_t get_kv_size(const common_json & value, int32_t n_tokens) {
    const headkv_params & p = headkv_get_args().params;
    const int64_t n = value.is_number_integer() ? value.get<int64_t>() : -1;
    if (headkv_get_args().is_lossless() && n != 0) {
        throw std::invalid_argument(string_format("kv_size is %.32s: the server keeps all cells (--kv-policy lossless), leave it out",
                safe_json_to_str(value).c_str()));
    }
    if (n == 0) {
        if (n_tokens > kv_size_max()) {
            throw std::invalid_argument(string_format("kv_size is 0: this keeps the whole prompt, which is possible for prompts of up to %d tokens "
                                                      "(--kv-size-max), this one has %d",
                    kv_size_max(), n_tokens));
        }
        return std::max(p.recent, n_tokens) + 1; // such a prompt is kept by every head
    }
    if (n < p.recent + 1 || n > kv_size_max()) {
        throw std::invalid_argument(string_format("kv_size is %.32s: it must be an integer in [%d, %d], from the recent cells + 1 to the server's limit, or 0 = "
                                                  "keep the whole prompt",
                safe_json_to_str(value).c_str(), p.recent + 1, kv_size_max()));
    }
    return (int32_t) n;
}

static int32_t get_generated(const common_json & value) {
    const headkv_params & p = headkv_get_args().params;
    const int64_t n = value.is_number_integer() ? value.get<int64_t>() : -1;
    if (p.kv_generated == 0 && n != 0) {
        throw std::invalid_argument(string_format("kv_generated is %.32s: the server keeps no queries of generated tokens, start it with --kv-generated, or leave it out",
                safe_json_to_str(value).c_str()));
    }
    const int32_t n_most = (server.n_ctx_seq > 0 ? server.n_ctx_seq.load() : MAX_CELLS) - p.generated_slack - 1;
    if (n != 0 && (n <= p.window || n > n_most)) {
        throw std::invalid_argument(string_format("kv_generated is %.32s: it must be an integer in [%d, %d], more than --kv-window and less than the context without "
                                                  "--kv-generated-slack, or 0 = generated tokens all stay",
                safe_json_to_str(value).c_str(), p.window + 1, n_most));
    }
    return (int32_t) n;
}

static std::string get_question(const common_json & value) {
    const std::string name = value.is_string() ? value.get<std::string>() : "";
    if (server.policies.count(name) == 0) {
        throw std::invalid_argument(string_format("kv_question is %.32s: it must be known, both or later", safe_json_to_str(value).c_str()));
    }
    return name;
}

// ranges of tokens in a field, ascending
static std::vector<std::pair<int32_t, int32_t>> get_ranges(const char * name, const common_json & value, int32_t n_tokens) {
    const auto refuse = [&](const std::string & why) {
        throw std::invalid_argument(string_format("%s is %.64s: %s", name, safe_json_to_str(value).c_str(), why.c_str()));
    };
    if (!value.is_array() || value.size() > MAX_SPANS) {
        refuse(string_format("it must be a list of at most %zu [start, end) ranges of tokens", MAX_SPANS));
    }
    std::vector<std::pair<int32_t, int32_t>> res;
    for (const auto & span : value) {
        if (!span.is_array() || span.size() != 2 || !span.at(0).is_number_integer() || !span.at(1).is_number_integer()) {
            refuse("each range must be two integers, [start, end)");
        }
        const int64_t start = span.at(0).get<int64_t>();
        const int64_t end = span.at(1).get<int64_t>();
        if (start < 0 || end <= start || end > n_tokens) {
            refuse(string_format("each range must not be empty and lie in [0, %d], the tokens of the prompt", n_tokens));
        }
        res.push_back({ (int32_t) start, (int32_t) end });
    }
    std::sort(res.begin(), res.end());
    return res;
}

static std::vector<std::pair<int32_t, int32_t>> get_spans(const common_json & value, int32_t n_tokens) {
    const int32_t n_max = kv_size_max() - headkv_get_args().params.recent;
    const auto res = get_ranges("kv_protect", value, n_tokens);
    int64_t n_protected = 0;
    int64_t last = 0;
    for (const auto & [start, end] : res) { // cells of several ranges count once
        n_protected += std::max<int64_t>(0, end - std::max<int64_t>(start, last));
        last = std::max<int64_t>(last, end);
    }
    if (n_protected > n_max) {
        throw std::invalid_argument(string_format("kv_protect is %.64s: %lld tokens, it may be up to %d, the server's limit without the recent cells",
                safe_json_to_str(value).c_str(), (long long) n_protected, n_max));
    }
    return res;
}

static std::vector<std::pair<int32_t, int32_t>> get_drop(const common_json & value, int32_t n_tokens) {
    if (headkv_get_args().params.kv_generated == 0) {
        throw std::invalid_argument("kv_drop: the server tells cells of generated tokens apart with --kv-generated alone, start it with that, or leave the field out");
    }
    return get_ranges("kv_drop", value, n_tokens - 1);
}

static const char * const FIELDS[] = { "kv_size", "kv_protect", "kv_question", "kv_generated", "kv_drop" };

void headkv_server_keep_fields(common_json & body, const common_json & request) {
    for (const auto & [name, value] : request.items()) {
        if (name.rfind("kv_", 0) == 0) { // also one that is none of ours, which is refused
            body[name] = value;
        }
    }
}

// a field that is misspelt would do nothing
static void check_fields(const common_json & body) {
    for (const auto & [name, value] : body.items()) {
        if (name.rfind("kv_", 0) == 0 && std::find(std::begin(FIELDS), std::end(FIELDS), name) == std::end(FIELDS)) {
            std::string known;
            for (const char * field : FIELDS) {
                known += std::string(known.empty() ? "" : ", ") + field;
            }
            throw std::invalid_argument(string_format("%.64s: there is no such field, those of a request are %s; all else is chosen when the server is started", name.c_str(), known.c_str()));
        }
    }
}

headkv_request headkv_server_check_request(const common_json & body, int32_t n_completions, int32_t n_tokens) {
    headkv_request res;
    if (!headkv_server_is_on()) {
        return res;
    }
    check_fields(body);
    if (n_completions > 1) {
        throw std::invalid_argument(string_format("n is %d: it must be 1 with --kv-size, send the request several times", n_completions));
    }
    if (body.contains("kv_size") && !body.at("kv_size").is_null()) {
        res.kv_size = get_kv_size(body.at("kv_size"), n_tokens);
    }
    if (body.contains("kv_generated") && !body.at("kv_generated").is_null()) {
        res.kv_generated = get_generated(body.at("kv_generated"));
    }
    const int32_t kv_limit = headkv_get_args().kv_limit;
    if (res.kv_generated != 0 && kv_limit > 0 && n_tokens >= kv_limit) {
        throw std::invalid_argument(string_format("%d tokens of a prompt: answers end at --kv-limit %d, use a larger one or a shorter prompt", n_tokens, kv_limit));
    }
    if (body.contains("kv_question") && !body.at("kv_question").is_null() && !headkv_get_args().asks_question()) {
        throw std::invalid_argument(string_format("kv_question: the server has policy %s, which does not look at it, leave it out", server.policies.at("known").c_str()));
    }
    res.question = body.contains("kv_question") && !body.at("kv_question").is_null() ? get_question(body.at("kv_question")) : server.question;
    if (body.contains("kv_protect") && !body.at("kv_protect").is_null()) {
        res.protect = get_spans(body.at("kv_protect"), n_tokens);
    }
    if (body.contains("kv_drop") && !body.at("kv_drop").is_null()) {
        res.drop = get_drop(body.at("kv_drop"), n_tokens);
    }
    return res;
}

//
// prompts
//

static void check(int32_t code) {
    if (code < 0) {
        throw std::runtime_error(headkv_last_error());
    }
}

static headkv_stats get_stats(const llama_context * ctx, llama_seq_id seq_id) {
    headkv_stats stats = {};
    stats.size = sizeof(stats);
    check(headkv_get_stats(ctx, seq_id, &stats));
    return stats;
}

static headkv_archive_stats get_archive_stats(llama_context * ctx) {
    headkv_archive_stats res = {};
    res.size = sizeof(res);
    if (headkv_get_args().has_archive() && headkv_get_archive_stats(ctx, &res) != 0) {
        res = {}; // it was not set yet
    }
    return res;
}

// with the first prompt of a context
static void open_archive(llama_context * ctx) {
    const headkv_args & args = headkv_get_args();
    if (args.has_archive() && get_archive_stats(ctx).size == 0) {
        headkv_archive_params params = args.archive_params;
        params.folder = args.archive == HEADKV_ARCHIVE_RAM ? nullptr : args.archive.c_str();
        check(headkv_set_archive(ctx, &params));
    }
}

void headkv_server_announce(llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens, bool whole, const headkv_request & request) {
    open_archive(ctx);
    const request_params params(request);
    check(headkv_begin_prompt(ctx, seq_id, n_tokens, whole, &params.get()));
}

void headkv_server_announce_end(llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens) {
    check(headkv_begin_prompt(ctx, seq_id, n_tokens, true, nullptr));
}

bool headkv_server_read_ahead(llama_context * ctx, llama_seq_id seq_id, const std::vector<llama_token> & tokens, headkv_slot_info & info) {
    static constexpr int32_t MAX_MS = 250; // a step, one ubatch through one layer, may take longer

    const int32_t n_left = headkv_read_ahead(ctx, seq_id, tokens.data(), (int32_t) tokens.size(), MAX_MS);
    check(n_left);
    const int64_t n_tokens = (int64_t) tokens.size();
    const int64_t n_ubatch = llama_n_ubatch(ctx);
    info.n_archived = headkv_server_note(ctx, seq_id).n_archived;
    const int64_t n_archived = info.n_archived;
    const int64_t n_steps = llama_model_n_layer(llama_get_model(ctx)) * ((n_tokens + n_ubatch - 1) / n_ubatch - n_archived / n_ubatch);
    info.n_read = (int32_t) (n_archived + (n_tokens - n_archived) * std::max<int64_t>(0, n_steps - n_left) / n_steps);
    return n_left == 1;
}

headkv_slot_info headkv_server_compress(llama_context * ctx, llama_seq_id seq_id) {
    const int64_t n_before = get_stats(ctx, seq_id).n_compress;
    check(headkv_end_prompt(ctx, seq_id));

    const headkv_stats stats = get_stats(ctx, seq_id);
    headkv_slot_info info = headkv_server_note(ctx, seq_id);
    if (stats.n_compress > n_before) { // it was not compressed already
        std::lock_guard<std::mutex> lock(server.mutex);
        info.compress_ms = server.slots.at(seq_id).compress_ms = stats.t_compress_us / 1000.0;
        server.n_compressions += 1;
        server.n_evicted += info.n_evicted;
        server.t_compress_us += stats.t_compress_us;
    }
    return info;
}

headkv_slot_info headkv_server_note(llama_context * ctx, llama_seq_id seq_id) {
    if (!headkv_server_is_on()) {
        return {};
    }
    const headkv_stats stats = get_stats(ctx, seq_id);
    const headkv_archive_stats archive = get_archive_stats(ctx);

    // heads that a layer does not have count as empty here
    std::vector<int32_t> budget(std::max(0, headkv_get_budget(ctx, nullptr, 0)));
    std::vector<int32_t> table(budget.size());
    check(headkv_get_budget(ctx, budget.data(), (int32_t) budget.size()));
    check(headkv_get_n_cells(ctx, seq_id, table.data(), (int32_t) table.size()));
    std::vector<int32_t> cells;
    std::vector<std::vector<int32_t>> heads(headkv_server_has_page() ? llama_model_n_layer(llama_get_model(ctx)) : 0);
    int64_t n_cells = 0;
    for (size_t i = 0; i < table.size(); ++i) {
        if (budget[i] > 0) {
            cells.push_back(table[i]);
            n_cells += table[i];
            if (!heads.empty()) {
                heads[i * heads.size() / table.size()].push_back(table[i]);
            }
        }
    }
    std::sort(cells.begin(), cells.end());

    std::lock_guard<std::mutex> lock(server.mutex);
    headkv_slot_info & info = server.slots.at(seq_id);
    if (stats.state == 0) {
        info = {};
    }
    info.state = stats.state;
    info.n_prompt = stats.n_prompt;
    info.n_past = stats.n_past;
    info.n_archived = stats.n_archived;
    info.kv_generated = stats.kv_generated;
    if (stats.n_evictions > info.n_evictions) {
        server.n_evictions += stats.n_evictions - info.n_evictions;
        server.n_evicted_generated += stats.n_evicted - info.n_evicted_generated;
    }
    info.n_evictions = stats.n_evictions;
    info.n_evicted_generated = stats.n_evicted;
    if (!cells.empty()) {
        info.cells_min = cells.front();
        info.cells_median = cells[cells.size() / 2];
        info.cells_max = cells.back();
    }
    info.n_bytes_full = stats.bytes_full;
    info.n_bytes_beside = stats.bytes_beside / llama_n_seq_max(ctx);
    info.n_evicted = stats.n_past * (int64_t) cells.size() - n_cells;
    info.n_bytes = cells.empty() || stats.n_past == 0 ? 0 : (int64_t) ((double) stats.bytes_full * n_cells / ((double) stats.n_past * cells.size()));
    server.bytes_store = stats.bytes_store;
    server.bytes_staging = stats.bytes_staging;
    if (stats.bytes_beside != server.bytes_beside) { // it does not change while there is a context
        SRV_INF("compression: layers with windowed attention or a recurrent state are not compressed, they take %.2f MiB for all slots\n", stats.bytes_beside / 1048576.0);
        server.bytes_beside = stats.bytes_beside;
    }
    server.archive = archive;
    server.heads.at(seq_id) = std::move(heads);
    return info;
}

std::string headkv_server_why_not_continued(llama_context * ctx, llama_seq_id seq_id, int32_t n_past, int32_t n_tokens, const headkv_request & request) {
    const request_params params(request);
    if (headkv_can_continue(ctx, seq_id, &params.get()) != 0) {
        return headkv_last_error();
    }
    const llama_pos n_least = llama_memory_seq_pos_min(llama_get_memory(ctx), seq_id) + 1;
    if (n_past < n_least) {
        return string_format("its first %d tokens are those of the compressed past, which cannot be cut to fewer than %d", n_past, n_least);
    }
    const int32_t n_new = n_tokens - n_past;
    if (n_new > n_past && n_new > params.get().kv_size) {
        return string_format("every head would keep %d new tokens behind %d of the compressed past, kv_size is %d", n_new, n_past, params.get().kv_size);
    }
    return "";
}

void headkv_server_limit_restore(llama_context * ctx, int32_t n_ctx) {
    headkv_clear_error();
    check(headkv_limit_restore(ctx, kv_size_max(), kv_size_max() - headkv_get_args().params.recent, n_ctx));
}

void headkv_server_check_restore(size_t n_read) {
    if (headkv_server_is_on() && n_read == 0) {
        throw std::runtime_error(*headkv_last_error() ? headkv_last_error() : "the file cannot be read, or is not one of a slot");
    }
}

void headkv_server_check_restored(llama_context * ctx, llama_seq_id seq_id, size_t n_tokens) {
    const headkv_stats stats = get_stats(ctx, seq_id);
    if ((size_t) stats.n_past != n_tokens) {
        throw std::runtime_error(string_format("it names %zu tokens, its cache has %d", n_tokens, stats.n_past));
    }
    headkv_server_note(ctx, seq_id);
}

void headkv_server_drop_ranges(llama_context * ctx, llama_seq_id seq_id, const headkv_request & request, int32_t n_tokens) {
    for (const auto & [start, end] : request.drop) {
        if (start < n_tokens - 1) {
            check(headkv_drop(ctx, seq_id, start, std::min(end, n_tokens - 1)));
        }
    }
}

int32_t headkv_server_n_ctx_of_prompts(int32_t n_ctx) {
    if (server.n_ctx == 0) {
        server.n_ctx = n_ctx;
    }
    return server.n_ctx;
}

void headkv_server_note_context(const llama_context * ctx) {
    server.n_ctx_seq = (int32_t) llama_n_ctx_seq(ctx);
}

int32_t headkv_server_n_ctx(const llama_context * ctx, llama_seq_id seq_id, int32_t n_ctx) {
    return headkv_server_is_on() && get_stats(ctx, seq_id).kv_generated > 0 ? headkv_server_n_ctx_most(ctx, n_ctx) : n_ctx;
}

int32_t headkv_server_n_ctx_most(const llama_context * ctx, int32_t n_ctx) {
    if (headkv_get_args().params.kv_generated == 0) {
        return n_ctx;
    }
    const int32_t n_limit = headkv_get_args().kv_limit;
    return n_limit > 0 ? n_limit : std::max(n_ctx, llama_model_n_ctx_train(llama_get_model(ctx)));
}

static bool is_forgotten(llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens) {
    if (!headkv_server_reuses()) {
        return headkv_server_is_on();
    }
    const headkv_stats stats = get_stats(ctx, seq_id);
    return stats.state != 2 || stats.n_past != n_tokens;
}

//
// turns, and what is shown of them
//

void headkv_server_note_look() {
    t_look_us = ggml_time_us();
}

static bool is_looked_at() {
    return headkv_server_has_page() && ggml_time_us() - t_look_us < MAX_LOOK_US;
}

void headkv_server_begin_turn(llama_seq_id seq_id, int32_t id_task, int32_t n_prompt) {
    if (!headkv_server_has_page()) {
        return;
    }
    past.at(seq_id) = {};
    std::lock_guard<std::mutex> lock(server.mutex);
    auto & turns = server.turns.at(seq_id);
    if (turns.size() == MAX_TURNS) {
        turns.pop_front();
    }
    turns.emplace_back();
    turns.back().id_task = id_task;
    turns.back().n_prompt = n_prompt;
}

static void note_turn(llama_seq_id seq_id, const server_slot_stats & stats, bool is_over) {
    std::lock_guard<std::mutex> lock(server.mutex);
    if (!headkv_server_has_page() || server.turns.at(seq_id).empty()) {
        return;
    }
    turn_t & turn = server.turns.at(seq_id).back();
    const headkv_slot_info & info = stats.headkv_info;
    const bool is_read = stats.n_gen > 0 || info.state == 2; // info has a state when the prompt is compressed
    turn.n_archived = info.n_archived;
    turn.n_continued = (int32_t) stats.n_prompt_cached - (is_read || info.by_layer ? info.n_archived : 0);
    turn.n_read = is_read ? (int32_t) stats.n_prompt_processed : std::max(0, (info.by_layer ? info.n_read : (int32_t) stats.n_prompt_processed) - info.n_archived);
    turn.read_ms = stats.t_prompt_ms();
    turn.n_generated = (int32_t) stats.n_gen;
    turn.generate_ms = stats.t_gen_ms();
    turn.per_second = stats.n_gen_tps();
    turn.n_bytes = server.slots.at(seq_id).n_bytes;
    turn.n_bytes_full = server.slots.at(seq_id).n_bytes_full;
    turn.state = is_read ? (is_over ? "done" : "answering") : (is_over ? "given up" : "reading");
}

void headkv_server_note_turn(llama_seq_id seq_id, const server_slot_stats & stats) {
    note_turn(seq_id, stats, false);
}

// what the heads of a sequence hold; nothing where it is not compressed
static held_t read_held(const llama_context * ctx, llama_seq_id seq_id, const std::vector<llama_token> & tokens) {
    const headkv_stats stats = get_stats(ctx, seq_id);
    held_t res;
    res.state = stats.state;
    if (stats.state != 2) {
        return res;
    }
    const int32_t n_past = stats.n_past;
    res.n_prompt = stats.n_prompt;
    res.tokens.assign(tokens.begin(), tokens.begin() + std::min<size_t>(tokens.size(), n_past));
    std::vector<int32_t> budget(std::max(0, headkv_get_budget(ctx, nullptr, 0)));
    std::vector<int32_t> cells(budget.size());
    check(headkv_get_budget(ctx, budget.data(), (int32_t) budget.size()));
    check(headkv_get_n_cells(ctx, seq_id, cells.data(), (int32_t) cells.size()));
    const int32_t n_head = (int32_t) budget.size() / llama_model_n_layer(llama_get_model(ctx));
    for (int32_t i = 0; i < (int32_t) budget.size(); ++i) {
        if (budget[i] == 0) {
            continue;
        }
        head_t head = { i / n_head, i % n_head, {}, 0 };
        if (cells[i] < n_past) { // else it holds all
            const int32_t n = headkv_get_positions(ctx, seq_id, head.il, head.ih, nullptr, 0);
            check(n);
            head.listed.resize(n);
            check(headkv_get_positions(ctx, seq_id, head.il, head.ih, head.listed.data(), n));
            head.tail = n_past - (cells[i] - n);
        }
        res.heads.push_back(std::move(head));
    }
    return res;
}

bool headkv_server_forgets(llama_context * ctx, llama_seq_id seq_id, const server_tokens & tokens, const server_slot_stats & stats) {
    const bool res = is_forgotten(ctx, seq_id, (int32_t) tokens.size());
    if (headkv_server_is_on()) {
        note_turn(seq_id, stats, true);
        if (res && is_looked_at() && get_stats(ctx, seq_id).state == 2) { // compressed
            past.at(seq_id) = read_held(ctx, seq_id, tokens.get_tokens());
        }
    }
    return res;
}

// bytes at the end of a text that begin a character and do not end it
static size_t n_unfinished(const std::string & text) {
    for (size_t n = 1; n <= std::min<size_t>(3, text.size()); ++n) {
        const uint8_t c = text[text.size() - n];
        if (c >= 0xC0) {
            return n < (c >= 0xF0 ? 4u : c >= 0xE0 ? 3u
                                                   : 2u)
                    ? n
                    : 0;
        }
        if (c < 0x80) {
            return 0;
        }
    }
    return 0;
}

// The texts of tokens [first, first + n): a character that is made of several tokens stands at the last one. Ends early behind
// MAX_TEXT bytes.
static std::vector<std::string> read_text(const llama_vocab * vocab, const std::vector<llama_token> & tokens, int32_t first, int32_t n) {
    static constexpr size_t MAX_TEXT = 128 << 10;
    static constexpr int32_t MAX_PARTS = 8; // tokens of a character before its last one

    std::vector<std::string> res;
    std::string rest;
    size_t n_bytes = 0;
    for (int32_t i = std::max(0, first - MAX_PARTS); i < first + n && n_bytes < MAX_TEXT; ++i) {
        std::string text = rest + common_token_to_piece(vocab, tokens[i], true);
        const size_t n_rest = n_unfinished(text);
        rest = text.substr(text.size() - n_rest);
        text.resize(text.size() - n_rest);
        if (i >= first) {
            n_bytes += text.size();
            res.push_back(std::move(text));
        }
    }
    return res;
}

void headkv_server_fill_view(llama_context * ctx, const std::vector<llama_token> & tokens, headkv_view & view) {
    static constexpr int32_t MAX_PARTS = 256; // of the overview

    held_t now = read_held(ctx, view.id_slot, tokens);
    view.is_past = now.state == 0 && past.at(view.id_slot).state != 0;
    const held_t & held = view.is_past ? past.at(view.id_slot) : now;
    view.state = held.state;
    view.n_tokens = (int32_t) held.tokens.size();
    view.n_prompt = held.n_prompt;
    if (held.state != 2) {
        view.n = 0;
        return;
    }
    view.cells.resize(llama_model_n_layer(llama_get_model(ctx)));
    for (const head_t & head : held.heads) {
        view.cells[head.il].push_back((int32_t) head.listed.size() + std::max(0, view.n_tokens - head.tail));
    }
    std::vector<int32_t> n_held(view.n_tokens + 1); // first: how many heads more than at the position before
    for (const head_t & head : held.heads) {
        n_held[std::min(head.tail, view.n_tokens)] += view.il < 0 || (head.il == view.il && head.ih == view.ih);
    }
    for (int32_t i = 1; i < view.n_tokens; ++i) {
        n_held[i] += n_held[i - 1];
    }
    for (const head_t & head : held.heads) {
        if (view.il >= 0 && (head.il != view.il || head.ih != view.ih)) {
            continue;
        }
        view.n_heads += 1;
        for (int32_t pos : head.listed) {
            if (pos >= 0 && pos < std::min(head.tail, view.n_tokens)) {
                n_held[pos] += 1;
            }
        }
    }
    if (view.n_heads == 0) {
        view.error = string_format("layer %d, head %d: no such KV head is compressed", view.il, view.ih);
        return;
    }
    view.first = std::min(view.first, view.n_tokens);
    view.text = read_text(llama_model_get_vocab(llama_get_model(ctx)), held.tokens, view.first, std::min(view.n, view.n_tokens - view.first));
    view.n = (int32_t) view.text.size();
    view.held.assign(n_held.begin() + view.first, n_held.begin() + view.first + view.n);
    view.n_seen = view.n_tokens - (int32_t) std::count(n_held.begin(), n_held.end() - 1, 0);
    const int64_t n_parts = std::min(MAX_PARTS, view.n_tokens);
    for (int64_t i = 0; i < n_parts; ++i) {
        const int64_t begin = i * view.n_tokens / n_parts;
        const int64_t end = (i + 1) * view.n_tokens / n_parts;
        const int64_t sum = std::accumulate(n_held.begin() + begin, n_held.begin() + end, (int64_t) 0);
        view.overview.push_back((float) sum / ((end - begin) * view.n_heads));
    }
}

//
// reports
//

void headkv_server_add_info(common_json & timings, const headkv_slot_info & info) {
    if (info.state == 0) {
        return;
    }
    timings["kv"] = {
        { "state", STATES[info.state] },
        { "n_prompt", info.n_prompt },
        { "n_tokens", info.n_past },
        { "cells", common_json{ { "min", info.cells_min }, { "median", info.cells_median }, { "max", info.cells_max } } },
        { "bytes", info.n_bytes },
        { "bytes_full", info.n_bytes_full },
        { "compress_ms", info.compress_ms },
    };
    if (info.n_bytes_beside > 0) {
        timings["kv"]["bytes_beside"] = info.n_bytes_beside;
    }
    if (headkv_get_args().has_archive()) {
        timings["kv"]["n_archived"] = info.n_archived;
    }
    if (info.kv_generated > 0) {
        timings["kv"]["generated"] = { { "size", info.kv_generated }, { "evictions", info.n_evictions }, { "cells_evicted", info.n_evicted_generated } };
    }
}

static common_json slot_to_json(const headkv_slot_info & info) {
    common_json res;
    headkv_server_add_info(res, info);
    return res.contains("kv") ? res.at("kv") : common_json{ { "state", STATES[0] }, { "n_tokens", 0 }, { "bytes", 0 }, { "bytes_full", 0 } };
}

static common_json turns_to_json(const std::deque<turn_t> & turns) {
    common_json res = common_json::array();
    for (const turn_t & turn : turns) {
        res.push_back({
                { "id_task", turn.id_task },
                { "state", turn.state },
                { "n_prompt", turn.n_prompt },
                { "n_archived", turn.n_archived },
                { "n_continued", turn.n_continued },
                { "n_read", turn.n_read },
                { "read_ms", turn.read_ms },
                { "n_generated", turn.n_generated },
                { "generate_ms", turn.generate_ms },
                { "per_second", turn.per_second },
                { "bytes", turn.n_bytes },
                { "bytes_full", turn.n_bytes_full },
        });
    }
    return res;
}

void headkv_server_add_slot(common_json & slot, llama_seq_id seq_id) {
    if (headkv_server_is_on()) {
        std::lock_guard<std::mutex> lock(server.mutex);
        slot["kv"] = slot_to_json(server.slots.at(seq_id));
        if (server.slots.at(seq_id).kv_generated == 0 && server.n_ctx > 0) {
            slot["n_ctx"] = server.n_ctx; // the next prompt may have as many, whatever the last answer might
        }
        if (headkv_server_has_page()) {
            slot["kv_heads"] = common_json::array();
            for (const auto & layer : server.heads.at(seq_id)) {
                slot["kv_heads"].push_back(layer);
            }
            slot["kv_turns"] = turns_to_json(server.turns.at(seq_id));
        }
    }
}

void headkv_server_add_props(common_json & props) {
    if (!headkv_server_is_on()) {
        return;
    }
    const headkv_args & args = headkv_get_args();
    std::lock_guard<std::mutex> lock(server.mutex);
    if (props.value("is_sleeping", false)) { // asked for once, when the context is freed
        forget_held(server.slots.size());
    }
    common_json slots = common_json::array();
    for (const auto & info : server.slots) {
        slots.push_back(slot_to_json(info));
    }
    props["kv"] = {
        { "size", args.params.kv_size }, // 0 with the policy lossless
        { "policy", server.policies.at(server.question) },
        { "policy_known", server.policies.at("known") },
        { "policy_both", server.policies.at("both") },
        { "policy_later", server.policies.at("later") },
        { "window", args.params.window },
        { "recent", args.params.recent },
        { "power", args.params.power },
        { "reuse", args.reuse },
        { "generated", args.params.kv_generated }, // 0 = all stay
        { "bytes_held", server.bytes_store },
        { "bytes_staging", server.bytes_staging },
        { "bytes_beside", server.bytes_beside }, // 0 before the first prompt
        { "slots", slots },
    };
    if (args.has_archive()) {
        props["kv"]["archive"] = {
            { "folder", args.archive },
            { "max_bytes", server.archive.max_bytes }, // 0 before the first prompt
            { "blocks", server.archive.n_blocks },
            { "bytes", server.archive.bytes },
            { "damaged", server.archive.n_damaged },
            { "failed", server.archive.n_failed },
        };
    }
}

std::string headkv_server_metrics() {
    if (!headkv_server_is_on()) {
        return "";
    }
    std::lock_guard<std::mutex> lock(server.mutex);
    const headkv_archive_stats & archive = server.archive;
    struct item_t {
        const char * type;
        const char * name;
        const char * help;
        double value;
    };
    std::vector<item_t> items = {
        { "gauge", "kv_bytes_held", "Bytes of K and V allocated for compressed prompts", (double) server.bytes_store },
        { "gauge", "kv_bytes_staging", "Bytes allocated for prompts that are being read", (double) server.bytes_staging },
        { "gauge", "kv_bytes_beside", "Bytes of the layers that are not compressed: windows and recurrent states of all slots", (double) server.bytes_beside },
        { "counter", "kv_compressions_total", "Number of prompts compressed", (double) server.n_compressions },
        { "counter", "kv_cells_evicted_total", "Cells that compressed prompts do not hold, all heads", (double) server.n_evicted },
        { "counter", "kv_compress_seconds_total", "Time spent compressing prompts", server.t_compress_us / 1e6 },
    };
    if (headkv_get_args().params.kv_generated > 0) {
        items.push_back({ "counter", "kv_generated_evictions_total", "Number of evictions of generated tokens", (double) server.n_evictions });
        items.push_back({ "counter", "kv_generated_cells_evicted_total", "Cells of generated tokens that were dropped, all heads", (double) server.n_evicted_generated });
    }
    if (headkv_get_args().has_archive()) {
        const std::vector<item_t> more = {
            { "counter", "kv_archive_tokens_restored_total", "Prompt tokens that came from the archive", (double) archive.n_restored },
            { "counter", "kv_archive_tokens_computed_total", "Prompt tokens that were read", (double) archive.n_computed },
            { "counter", "kv_archive_read_bytes_total", "Bytes read from the archive", (double) archive.bytes_read },
            { "counter", "kv_archive_written_bytes_total", "Bytes written to the archive", (double) archive.bytes_written },
            { "counter", "kv_archive_read_seconds_total", "Time spent reading from the archive", archive.t_read_us / 1e6 },
            { "counter", "kv_archive_write_seconds_total", "Time spent writing to the archive", archive.t_write_us / 1e6 },
            { "counter", "kv_archive_evicted_blocks_total", "Blocks removed to make room", (double) archive.n_evicted },
            { "counter", "kv_archive_damaged_blocks_total", "Blocks removed because they were damaged", (double) archive.n_damaged },
            { "counter", "kv_archive_failed_prompts_total", "Prompts that could not be written", (double) archive.n_failed },
            { "gauge", "kv_archive_blocks", "Blocks held by the archive", (double) archive.n_blocks },
            { "gauge", "kv_archive_bytes", "Bytes held by the archive", (double) archive.bytes },
        };
        items.insert(items.end(), more.begin(), more.end());
    }
    std::string res;
    for (const auto & item : items) {
        res += string_format("# HELP llamacpp:%s %s\n# TYPE llamacpp:%s %s\nllamacpp:%s %.15g\n",
                item.name, item.help, item.name, item.type, item.name, item.value);
    }
    return res;
}
