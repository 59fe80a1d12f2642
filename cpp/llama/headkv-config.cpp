#include "headkv-config.h"

#include "headkv-checksum.h"

#include "headkv-importance.h"
#include "headkv-policy.h"

#include "llama-impl.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>

static int32_t check_range(const char * name, int32_t value, int32_t lo, int32_t hi) {
    if (value < lo || value > hi) {
        throw std::invalid_argument(format("%s is %d: it must be in [%d, %d]", name, value, lo, hi));
    }
    return value;
}

// sinks and protected spans, sorted and merged
static std::vector<std::pair<int32_t, int32_t>> spans_of(const headkv_params & params, int32_t n_sinks) {
    std::vector<std::pair<int32_t, int32_t>> spans;
    if (n_sinks > 0) {
        spans.push_back({ 0, n_sinks });
    }
    if (params.n_protect < 0 || (params.n_protect > 0 && !params.protect)) {
        throw std::invalid_argument(format("n_protect is %d: it must be the number of spans in protect", params.n_protect));
    }
    for (int32_t i = 0; i < params.n_protect; ++i) {
        const int32_t start = params.protect[2 * i];
        const int32_t end = params.protect[2 * i + 1];
        if (start < 0 || end <= start) {
            throw std::invalid_argument(format("protect has the span [%d, %d): it must not be negative or empty", start, end));
        }
        spans.push_back({ start, end });
    }
    std::sort(spans.begin(), spans.end());

    std::vector<std::pair<int32_t, int32_t>> res;
    for (const auto & span : spans) {
        if (!res.empty() && span.first <= res.back().second) {
            res.back().second = std::max(res.back().second, span.second);
        } else {
            res.push_back(span);
        }
    }
    return res;
}

void headkv_config_check_ctx(const headkv_config & cfg, uint32_t n_ctx) {
    if (cfg.kv_size > n_ctx && !cfg.budget->keeps_all) {
        throw std::invalid_argument(format("kv_size is %u: it must not be larger than n_ctx = %u", cfg.kv_size, n_ctx));
    }
    if (cfg.generated.n_cells + cfg.generated.n_slack >= n_ctx && cfg.generated.n_cells > 0) {
        throw std::invalid_argument(format("kv_generated is %u, %u with kv_generated_slack: it must be less than n_ctx = %u, use a smaller one or leave it out",
                cfg.generated.n_cells, cfg.generated.n_cells + cfg.generated.n_slack, n_ctx));
    }
    if (!cfg.spans.empty() && (uint32_t) cfg.spans.back().second > n_ctx) {
        throw std::invalid_argument(format("sinks or protect reach to position %d: they must end at or before n_ctx = %u",
                cfg.spans.back().second, n_ctx));
    }
}

static uint64_t fingerprint(const headkv_config & cfg) {
    headkv_checksum sum;
    sum.add(cfg.policy.c_str(), cfg.policy.size() + 1);
    for (double x : { (double) cfg.window, (double) cfg.recent, (double) cfg.n_square, (double) cfg.pool, (double) cfg.pool_kernel, cfg.beta,
                 (double) cfg.surplus, (double) cfg.pyramid_exact, cfg.adakv_floor, (double) cfg.adakv_normalize }) {
        sum.add(x);
    }
    sum.add(cfg.importance.values.data(), cfg.importance.values.size() * sizeof(double));
    sum.add(cfg.replay.shares.data(), cfg.replay.shares.size() * sizeof(double));
    sum.add(cfg.replay.values.data(), cfg.replay.values.size() * sizeof(double));
    return sum.value | 1;
}

// what the parameters say of the heads
static headkv_known known_of(const headkv_params & params) {
    headkv_known res;
    if (params.importance) {
        res.importance.n_layer = check_range("n_layer of the importance", params.n_layer, 1, 65536);
        res.importance.n_head = check_range("n_head of the importance", params.n_head, 1, 65536);
        res.importance.values.assign(params.importance, params.importance + (size_t) params.n_layer * params.n_head);
        headkv_importance_check(res.importance);
    }
    if (params.replay) {
        res.replay.n_layer = check_range("n_layer of the replay table", params.n_layer, 1, 65536);
        res.replay.n_head_kv = check_range("n_head_kv of the replay table", params.n_head_kv, 1, 65536);
        const size_t n_shares = check_range("n_shares of the replay table", params.shares ? params.n_shares : 0, 1, 1024);
        res.replay.shares.assign(params.shares, params.shares + n_shares);
        res.replay.values.assign(params.replay, params.replay + n_shares * params.n_layer * params.n_head_kv);
        headkv_replay_check(res.replay);
    }
    return res;
}

static std::string text_of(const char * name) {
    return name ? name : "";
}

// whether the choices that were made need it
static bool may_need(const headkv_params & params, bool headkv_budget_kind::*what) {
    if (text_of(params.policy) == "auto" && text_of(params.budget).empty()) {
        return true;
    }
    headkv_config cfg = {};
    headkv_policy_set(cfg, text_of(params.policy) == "auto" ? HEADKV_AUTO_UNKNOWN : text_of(params.policy), params.budget, params.rank, params.fit);
    return cfg.budget->*what;
}

static void complete_with(headkv_known & known, headkv_known && more) {
    if (known.importance.values.empty()) {
        known.importance = std::move(more.importance);
    }
    if (known.replay.values.empty()) {
        known.replay = std::move(more.replay);
    }
}

// what they do not say is in their files, or the context knows it
static void complete_known(headkv_known & known, const headkv_params & params, const headkv_known * of_context) {
    if (!params.importance_gguf && of_context) {
        complete_with(known, headkv_known(*of_context));
    }
    for (const char * path : { params.importance_gguf, params.model_gguf }) {
        const bool importance = known.importance.values.empty() && may_need(params, &headkv_budget_kind::by_importance);
        const bool replay = known.replay.values.empty() && may_need(params, &headkv_budget_kind::by_replay);
        if (!path || (!importance && !replay)) {
            continue;
        }
        const bool is_named = path == params.importance_gguf && params.model_gguf;
        headkv_known more = headkv_known_from_gguf(path, importance || is_named, replay || is_named);
        if (is_named && more.importance.values.empty() && more.replay.values.empty()) {
            throw std::invalid_argument(format("%s has neither importance nor a replay table of heads: measure them with 'pyheadkv score', or leave it out", path));
        }
        complete_with(known, std::move(more));
    }
}

static const char * choose_auto(const headkv_known & known, const std::string & question) {
    const bool has_importance = !known.importance.values.empty();
    const bool has_replay = !known.replay.values.empty();
    if (question == "both") {
        return !has_importance ? HEADKV_BOTH_UNKNOWN : has_replay ? HEADKV_BOTH_TABLES
                                                                  : HEADKV_BOTH_IMPORTANCE;
    }
    if (question != "later") {
        return has_importance ? HEADKV_AUTO_IMPORTANCE : HEADKV_AUTO_UNKNOWN;
    }
    if (has_replay) {
        return has_importance ? HEADKV_LATER_BOTH : HEADKV_LATER_REPLAY;
    }
    return has_importance ? HEADKV_LATER_IMPORTANCE : HEADKV_LATER_UNKNOWN;
}

// budget, rank and fit, and what they look at
static void choose_policy(headkv_config & cfg, const headkv_params & params, const headkv_known * of_context) {
    const std::string question = text_of(params.question);
    if (question != "" && question != "known" && question != "both" && question != "later") {
        throw std::invalid_argument(format("question is '%s': it must be one of known, both, later", question.c_str()));
    }
    complete_known(cfg.known, params, of_context);
    const std::string name = text_of(params.policy);
    headkv_policy_set(cfg, name == "auto" ? choose_auto(cfg.known, question) : name, params.budget, params.rank, params.fit);

    if (cfg.budget->by_importance) {
        cfg.importance = cfg.known.importance;
        if (cfg.importance.values.empty()) {
            throw std::invalid_argument(format("policy '%s' needs the importance of each head and nothing is known of this model's: measure it with "
                                               "'pyheadkv score MODEL.gguf --write OUT.gguf', pass importance= (llama-server: --kv-importance FILE), or use policy 'auto'",
                    cfg.policy.c_str()));
        }
    }
    if (cfg.budget->by_replay) {
        cfg.replay = cfg.known.replay;
        if (cfg.replay.values.empty()) {
            throw std::invalid_argument(format("policy '%s' needs the replay table of each head and nothing is known of this model's: measure it with "
                                               "'pyheadkv score MODEL.gguf --method replay', pass replay= (llama-server: --kv-importance FILE), or use policy 'auto'",
                    cfg.policy.c_str()));
        }
    }
}

static headkv_generated generated_of(const headkv_params & params, const headkv_config & cfg) {
    headkv_generated res;
    const int32_t n_slack = check_range("kv_generated_slack", params.generated_slack, 1, 1 << 20);
    const int32_t scope = check_range("kv_generated_scope", params.generated_scope, HEADKV_SCOPE_GENERATED, HEADKV_SCOPE_ALL);
    const int32_t rank = check_range("kv_generated_rank", params.generated_rank, HEADKV_GENERATED_ATTENTION, HEADKV_GENERATED_REDUNDANCY);
    if (params.kv_generated == 0) {
        return res;
    }
    if (params.kv_generated <= params.window || params.kv_generated > HEADKV_MAX_CELLS) {
        throw std::invalid_argument(format("kv_generated is %d: it counts the last %d tokens (window), so it must be at least %d (and at most %d): leave it out and all generated tokens stay",
                params.kv_generated, params.window, params.window + 1, HEADKV_MAX_CELLS));
    }
    if (cfg.fit == HEADKV_FIT_MEAN) {
        throw std::invalid_argument(format("kv_generated is %d: with fit 'mean' (policy '%s') a cell stands for many, and generated ones are not weighed against it: "
                                           "use another policy, or another fit",
                params.kv_generated, cfg.policy.c_str()));
    }
    res.n_cells = params.kv_generated;
    res.n_slack = n_slack;
    res.n_window = params.window;
    res.scope = (headkv_scope) scope;
    res.rank = (headkv_generated_rank) rank;
    if (res.scope == HEADKV_SCOPE_ALL && cfg.budget->keeps_all) {
        throw std::invalid_argument(format("kv_generated_scope is 'all': policy '%s' keeps all cells of prompts, use 'generated', or another policy", cfg.policy.c_str()));
    }
    return res;
}

headkv_config headkv_config_from_params(const headkv_params & params, const headkv_known * known) {
    if (params.size != sizeof(headkv_params)) {
        throw std::invalid_argument(format("headkv_params.size is %zu, this library expects %zu", params.size, sizeof(headkv_params)));
    }

    headkv_config cfg = {};

    cfg.known = known_of(params);
    choose_policy(cfg, params, known);

    cfg.window = check_range("window", params.window, 1, 256);
    cfg.recent = check_range("recent", params.recent, 1, 1 << 20);
    while (cfg.n_square < 3 && 1 << cfg.n_square < params.power) {
        cfg.n_square++;
    }
    if (params.power != 1 << cfg.n_square) {
        throw std::invalid_argument(format("power is %d: it must be 1, 2, 4 or 8", params.power));
    }
    cfg.pool = (headkv_pool) check_range("pool", params.pool, HEADKV_POOL_MAX, HEADKV_POOL_AVG);
    cfg.pool_kernel = check_range("pool_kernel", params.pool_kernel, 0, 31);
    if (cfg.pool_kernel > 0 && cfg.pool_kernel % 2 == 0) {
        throw std::invalid_argument(format("pool_kernel is %d: it must be odd, so that the pooling is centred", params.pool_kernel));
    }
    if (!cfg.budget->keeps_all && (params.kv_size < params.recent + 1 || params.kv_size > HEADKV_MAX_CELLS)) {
        throw std::invalid_argument(format("kv_size is %d: it counts the %d recent cells, so it must be at least %d (and at most %d)",
                params.kv_size, params.recent, params.recent + 1, HEADKV_MAX_CELLS));
    }
    cfg.kv_size = cfg.budget->keeps_all ? HEADKV_MAX_CELLS : params.kv_size;
    cfg.n_tail = check_range("n_tail", params.n_tail, 1, 1 << 20);
    cfg.attend = (headkv_attend) check_range("attend", params.attend, HEADKV_ATTEND_AUTO, HEADKV_ATTEND_COMPOSED);
    cfg.n_buckets = check_range("n_buckets", params.n_buckets, 1, 8);
    cfg.prefill = (headkv_prefill) check_range("prefill", params.prefill, HEADKV_PREFILL_AUTO, HEADKV_PREFILL_LAYER);

    cfg.hidden_f16 = check_range("hidden_f16", params.hidden_f16, 0, 1) == 1;
    cfg.surplus = (headkv_surplus) check_range("surplus", params.surplus, HEADKV_SURPLUS_LOST, HEADKV_SURPLUS_REDISTRIBUTE);
    const int32_t n_sinks = check_range("sinks", params.sinks, -1, 1 << 26);
    cfg.spans = spans_of(params, n_sinks >= 0 ? n_sinks : std::min(cfg.rank->n_sinks, params.kv_size - params.recent - (cfg.fit == HEADKV_FIT_MEAN ? 1 : 0)));

    cfg.pyramid_exact = check_range("pyramid_exact", params.pyramid_exact, 0, 1) == 1;
    cfg.adakv_normalize = check_range("adakv_normalize", params.adakv_normalize, 0, 1) == 1;
    cfg.adakv_floor = params.adakv_floor == -1.0 ? cfg.budget->adakv_floor : params.adakv_floor;
    if (!(cfg.adakv_floor >= 0.0 && cfg.adakv_floor <= 1.0)) {
        throw std::invalid_argument(format("adakv_floor is %g: it must be in [0, 1], or -1 for the default of the policy", params.adakv_floor));
    }

    const double of_scores = cfg.importance.beta != 0.0 ? cfg.importance.beta : 1.2;
    cfg.beta = params.beta != 0.0 ? params.beta : of_scores;
    if (!std::isfinite(cfg.beta) || !(cfg.beta > 1.0)) {
        throw std::invalid_argument(format("beta is %g: it must be a finite number > 1 (larger = more uniform budgets)", cfg.beta));
    }

    cfg.selection = fingerprint(cfg);
    cfg.generated = generated_of(params, cfg);
    return cfg;
}

headkv_config_ptr & headkv_thread_config() {
    static thread_local headkv_config_ptr cfg;
    return cfg;
}

static std::atomic<int> n_threads_on{ 0 };

// of the thread; goes with it
struct headkv_thread_note {
    bool is_on = false;

    void set(bool on) {
        n_threads_on += (int) on - (int) is_on;
        is_on = on;
    }
    ~headkv_thread_note() { set(false); }
};

static thread_local headkv_thread_note thread_note;

void headkv_note_thread(bool is_on) {
    thread_note.set(is_on);
}

bool headkv_is_for_another_thread() {
    return !thread_note.is_on && n_threads_on > 0;
}
