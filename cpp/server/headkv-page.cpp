// The page that shows what the slots hold, and where it gets it from. Compiled into llama-server-impl, which has HTTP and upstream's chat.
//
// GET /kv, /kv/kv.css, .js, .svg     files of a folder, see --kv-page; they need no key
// GET /kv/positions?slot=0           the text of a slot's tokens and how many heads hold each; layer=, head=: of one head; first=, n=: which
//
// The answer to the last one is made by the thread that owns the context, between two batches, as that of /slots is. It has the text of
// prompts: it goes to pages of this server alone, and with --kv-positions auto to this machine alone.

#include "headkv-args.h"
#include "headkv-server.h"
#include "headkv.h"

#include "log.h"
#include "server-context.h"
#include "server-http.h"
#include "ui.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <numeric>

static constexpr int32_t MAX_TOKENS = 2048; // of an answer
static constexpr int32_t MAX_WAITING = 8;   // questions, beyond them and the next number they are refused
static constexpr double MAX_PER_SECOND = 20;
static constexpr int64_t MAX_WAIT_US = 10 * 1000 * 1000; // while a batch is computed

static const char * const STATES[] = { "empty", "staged", "compressed", "layered" }; // as in headkv_stats

void headkv_server_add_paths(std::unordered_set<std::string> & paths) {
    if (headkv_server_has_page()) {
        paths.insert({ "/kv", "/kv/kv.css", "/kv/kv.js", "/kv/kv.svg" });
    }
}

//
// who may ask
//

// "localhost:8080", "[::1]:8080", "127.0.0.1" -> without the port
static std::string host_of(std::string authority) {
    const size_t end = authority.rfind(':');
    if (end != std::string::npos && authority.find(']', end) == std::string::npos) {
        authority.resize(end);
    }
    return authority;
}

static bool is_this_machine(const std::string & host) {
    const bool is_v4 = host.compare(0, 4, "127.") == 0 && host.find_first_not_of("0123456789.") == std::string::npos;
    return is_v4 || host == "localhost" || host == "::1" || host == "[::1]" || string_ends_with(host, ".sock");
}

static bool listens_here_alone(const common_params & params) {
    return std::all_of(params.hostnames.begin(), params.hostnames.end(), is_this_machine);
}

static std::string header_of(const server_http_req & req, const std::string & name) {
    for (const auto & [key, value] : req.headers) {
        if (key.size() == name.size() && std::equal(key.begin(), key.end(), name.begin(), [](char a, char b) { return std::tolower(a) == b; })) {
            return value;
        }
    }
    return "";
}

// Why a page of another origin, or of a name that was made to point here, gets no answer; empty = it is one of ours.
static std::string why_not_answered(const server_http_req & req, bool here_alone) {
    const std::string host = header_of(req, "host");
    const std::string origin = header_of(req, "origin");
    const std::string site = header_of(req, "sec-fetch-site");
    const size_t scheme = origin.find("://");
    if (!origin.empty() && (scheme == std::string::npos || origin.substr(scheme + 3) != host)) {
        return "it is for pages of this server alone, not of " + origin;
    }
    if (!site.empty() && site != "same-origin" && site != "none") {
        return "it is for pages of this server alone";
    }
    if (here_alone && !host.empty() && !is_this_machine(host_of(host))) {
        return "it is told to this machine alone, which " + host + " is no name of";
    }
    return "";
}

// as many questions in a second as MAX_PER_SECOND, at once or not
class rate_limit {
public:
    bool allows() {
        std::lock_guard<std::mutex> lock(mutex);
        const int64_t now = ggml_time_us();
        n_left = std::min(MAX_PER_SECOND, n_left + (now - t_last) * MAX_PER_SECOND / 1e6);
        t_last = now;
        if (n_left < 1) {
            return false;
        }
        n_left -= 1;
        return true;
    }

private:
    std::mutex mutex;
    double n_left = MAX_PER_SECOND;
    int64_t t_last = 0;
};

//
// answers
//

static server_http_res_ptr answer(int status, const std::string & type, std::string data) {
    auto res = std::make_unique<server_http_res>();
    res->status = status;
    res->content_type = type;
    res->data = std::move(data);
    res->headers = {
        { "Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'" },
        { "Cross-Origin-Resource-Policy", "same-origin" },
        { "X-Content-Type-Options", "nosniff" },
        { "Referrer-Policy", "no-referrer" },
        { "Cache-Control", "no-store" },
    };
    return res;
}

static server_http_res_ptr answer_json(int status, const json & data) {
    return answer(status, "application/json; charset=utf-8", safe_json_to_str(data));
}

static server_http_res_ptr refuse(error_type type, const std::string & message, int status = 0) {
    json error = format_error_response(message, type);
    if (status > 0) {
        error["code"] = status;
    }
    server_http_res_ptr res = answer_json(error.at("code").get<int>(), { { "error", error } });
    if (status == 429) {
        res->headers["Retry-After"] = "1";
    }
    return res;
}

static json to_json(const headkv_view & view) {
    json res = {
        { "slot", view.id_slot },
        { "state", STATES[view.state] },
        { "is_past", view.is_past },
        { "n_tokens", view.n_tokens },
        { "n_prompt", view.n_prompt },
        { "n_heads", view.n_heads },
        { "n_seen", view.n_seen },
        { "first", view.first },
        { "text", view.text },
        { "held", view.held },
        { "overview", view.overview },
    };
    json cells = json::array();
    for (const auto & layer : view.cells) {
        cells.push_back(layer);
    }
    res["cells"] = cells;
    if (view.il >= 0) {
        res["layer"] = view.il;
        res["head"] = view.ih;
    }
    return res;
}

// Reads the query into what is asked. Throws std::invalid_argument with name, value and range.
static void read_query(const server_http_req & req, headkv_view & view) {
    view.n = MAX_TOKENS;
    const struct {
        const char * name;
        int32_t * dst;
        int32_t min;
        int32_t max;
    } fields[] = {
        { "slot", &view.id_slot, 0, 1 << 16 },
        { "layer", &view.il, 0, 1 << 16 },
        { "head", &view.ih, 0, 1 << 16 },
        { "first", &view.first, 0, 1 << 30 },
        { "n", &view.n, 1, MAX_TOKENS },
    };
    for (const auto & [name, value] : req.params) {
        const auto field = std::find_if(std::begin(fields), std::end(fields), [&name = name](const auto & f) { return name == f.name; });
        if (field == std::end(fields)) {
            throw std::invalid_argument(string_format("%.32s: no such field, it takes slot, layer, head, first and n", name.c_str()));
        }
        const bool is_number = !value.empty() && value.size() < 10 && value.find_first_not_of("0123456789") == std::string::npos;
        const int32_t n = is_number ? std::atoi(value.c_str()) : -1;
        if (n < field->min || n > field->max) {
            throw std::invalid_argument(string_format("%s is %.32s: it must be an integer in [%d, %d]", name.c_str(), value.c_str(), field->min, field->max));
        }
        *field->dst = n;
    }
    if ((view.il < 0) != (view.ih < 0)) {
        throw std::invalid_argument("layer and head go together: give both, or none for the sum of all heads");
    }
}

static server_http_res_ptr answer_positions(const server_http_req & req, server_context & ctx_server) {
    static std::atomic<int32_t> n_waiting = 0;
    static rate_limit limit;

    if (!headkv_server_is_on()) {
        return refuse(ERROR_TYPE_NOT_SUPPORTED, "the cache is not compressed, every head holds every token: start the server with --kv-size N");
    }
    auto view = std::make_shared<headkv_view>();
    try {
        read_query(req, *view);
    } catch (const std::invalid_argument & e) {
        return refuse(ERROR_TYPE_INVALID_REQUEST, e.what());
    }
    headkv_server_note_look();
    const struct waiting_t {
        const int32_t n = ++n_waiting;
        ~waiting_t() { --n_waiting; }
    } waiting;
    if (waiting.n > MAX_WAITING || !limit.allows()) {
        return refuse(ERROR_TYPE_UNAVAILABLE, string_format("more than %.0f questions in a second: ask again later", MAX_PER_SECOND), 429);
    }
    server_response_reader reader = ctx_server.get_response_reader();
    server_task task(SERVER_TASK_TYPE_NEXT_RESPONSE); // it does nothing but what headkv_server_look() does
    task.id = reader.get_new_id();
    task.params.headkv.view = view;
    reader.post_task(std::move(task), true);
    const int64_t t_start = ggml_time_us();
    const auto result = reader.next([&]() { return req.should_stop() || ggml_time_us() - t_start > MAX_WAIT_US; });
    if (!result) {
        return refuse(ERROR_TYPE_UNAVAILABLE, "a batch is being computed, or the model is asleep: ask again later");
    }
    if (!view->error.empty()) {
        return refuse(ERROR_TYPE_INVALID_REQUEST, view->error);
    }
    return answer_json(200, to_json(*view));
}

// whether text is told, and why not
static std::string why_no_positions(const common_params & params) {
    const int32_t choice = headkv_get_args().positions;
    if (choice == HEADKV_POSITIONS_OFF) {
        return "it was switched off with --kv-positions off";
    }
    if (params.model.path.empty()) {
        return "this server hands requests on to one for each model, and holds no cells itself";
    }
    if (choice == HEADKV_POSITIONS_AUTO && !listens_here_alone(params)) {
        return "the server listens beyond this machine, and this tells the text of prompts: start it with --kv-positions on";
    }
    return "";
}

void headkv_server_add_routes(server_http_context & http, server_context & ctx_server, const common_params & params) {
#if !defined(LLAMA_UI_HAS_ASSETS)
    if (params.ui && params.public_path.empty()) {
        http.get("/", [](const server_http_req &) {
            return answer(501, "text/plain; charset=utf-8", // upstream replaces the text of a 404
                    std::string("This build has no web chat: 'make ui' builds it, 'make wheel' a wheel that has it.") +
                            (headkv_server_has_page() ? " What the cache holds: /kv\n" : "\n"));
        });
    }
#endif
    if (!headkv_server_has_page()) {
        return;
    }
    const auto add_file = [&](const char * path, const char * name, const char * type) {
        http.get(path, [name, type](const server_http_req &) { return answer(200, type, headkv_get_args().page.at(name)); });
    };
    add_file("/kv", "kv.html", "text/html; charset=utf-8");
    add_file("/kv/kv.css", "kv.css", "text/css; charset=utf-8");
    add_file("/kv/kv.js", "kv.js", "text/javascript; charset=utf-8");
    add_file("/kv/kv.svg", "kv.svg", "image/svg+xml");

    const std::string why_not = why_no_positions(params);
    const bool here_alone = listens_here_alone(params);
    http.get("/kv/positions", [why_not, here_alone, &ctx_server](const server_http_req & req) -> server_http_res_ptr {
        if (!why_not.empty()) {
            return refuse(ERROR_TYPE_PERMISSION, why_not);
        }
        if (const std::string why = why_not_answered(req, here_alone); !why.empty()) {
            return refuse(ERROR_TYPE_PERMISSION, why);
        }
        return answer_positions(req, ctx_server);
    });
}

//
// start
//

static std::string to_mib(int64_t n_bytes) {
    return string_format(n_bytes < 10 << 20 ? "%.2f MiB" : "%.0f MiB", n_bytes / 1048576.0);
}

static const std::map<std::string, std::string> ENDS = {
    { "known", "end the prompt" }, { "both", "end the prompt, and others follow" }, { "later", "come later" }
}; // question of headkv_params

// the policy in use, and why it is that one
static std::string policy_and_why(const llama_context * ctx) {
    const headkv_args & args = headkv_get_args();
    const std::string name = headkv_get_policy(ctx);
    headkv_policy_info info = {};
    if (args.policy != "auto" || !args.budget.empty() || headkv_find_policy(name.c_str(), nullptr, nullptr, nullptr, &info) < 0) {
        return name + ", as the flags say";
    }
    const std::string known = info.by_replay ? "the replay table of the model is known" : info.by_importance ? "the importance of its heads is known"
                                                                                                             : "nothing is known of its heads";
    return name + ", since " + known + " and questions " + ENDS.at(headkv_server_question());
}

void headkv_server_tell_start(server_context & ctx_server, const common_params & params, const std::vector<std::string> & addresses) {
    const llama_context * ctx = ctx_server.get_llama_context();
    const std::string base = addresses.empty() ? "" : addresses.front() + params.api_prefix;
    if (ctx) {
        char name[128] = "";
        const llama_model * model = llama_get_model(ctx);
        if (llama_model_meta_val_str(model, "general.name", name, sizeof(name)) < 0) {
            name[0] = '\0';
        }
        const int32_t n_slots = llama_n_seq_max(ctx);
        LOG_INF("pyheadkv: %s, %d slot%s of %d tokens\n", *name ? name : params.model.get_name().c_str(), n_slots, n_slots > 1 ? "s" : "", llama_n_ctx_seq(ctx));
    }
    if (ctx && headkv_server_is_on()) {
        headkv_server_note_context(ctx);
        std::vector<int32_t> budget(std::max(0, headkv_get_budget(ctx, nullptr, 0)));
        headkv_get_budget(ctx, budget.data(), (int32_t) budget.size());
        budget.erase(std::remove(budget.begin(), budget.end(), 0), budget.end());
        const int32_t n_prompt = llama_n_ctx_seq(ctx);
        headkv_params p = headkv_get_args().named();
        p.policy = headkv_get_policy(ctx);
        p.budget = p.rank = p.fit = nullptr;
        p.kv_size = headkv_get_args().is_lossless() ? n_prompt + 1 : p.kv_size;
        headkv_footprint of_slot = {};
        of_slot.size = sizeof(of_slot);
        LOG_INF("pyheadkv: policy %s\n", policy_and_why(ctx).c_str());
        if (!budget.empty() && headkv_get_footprint(ctx, &p, n_prompt, 0, llama_n_ubatch(ctx), false, &of_slot) == 0 && of_slot.staging > 0) {
            LOG_INF("pyheadkv: a full slot keeps %s, %.1f %% of the %s of a full cache; %zu KV heads, %s\n", to_mib(of_slot.store).c_str(),
                    100.0 * of_slot.store / of_slot.staging, to_mib(of_slot.staging).c_str(), budget.size(),
                    headkv_get_args().is_lossless() ? "all cells" : string_format("%d cells each on average", p.kv_size).c_str());
        } else {
            LOG_WRN("pyheadkv: what a slot keeps is not known: %s\n", headkv_last_error());
        }
    } else if (ctx) {
        LOG_INF("%s", "pyheadkv: the cache is not compressed: add --kv-size N, such as 128\n");
    }
#if defined(LLAMA_UI_HAS_ASSETS)
    const char * chat = params.ui ? "" : "switched off";
#else
    const char * chat = params.public_path.empty() ? "not in this build, 'make ui' builds it" : "";
#endif
    const std::string why_not = why_no_positions(params);
    LOG_INF("pyheadkv: chat %s; what the cache holds %s%s\n", *chat ? chat : (base + "/").c_str(),
            headkv_server_has_page() ? (base + "/kv").c_str() : "at /kv with --kv-page or pyheadkv serve",
            headkv_server_has_page() && !why_not.empty() ? ", without text: --kv-positions" : "");
}
