#include "headkv-args.h"

#include "headkv-workers.h"

#include "arg.h"

#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <limits>
#include <stdexcept>

static headkv_args default_args() {
    headkv_args res;
    res.params = headkv_default_params();
    res.policy = res.params.policy;
    res.params.kv_size = 0;
    res.archive_params = headkv_default_archive_params();
    return res;
}

headkv_args & headkv_get_args() {
    static headkv_args args = default_args();
    return args;
}

headkv_params headkv_args::named() const {
    headkv_params res = params;
    res.policy = policy.c_str();
    res.budget = budget.c_str();
    res.rank = rank.c_str();
    res.fit = fit.c_str();
    res.question = question.empty() ? params.question : question.c_str();
    return res;
}

bool headkv_args::is_lossless() const {
    headkv_policy_info info = {};
    const std::string name = policy == "auto" ? "snapkv" : policy; // any that drops cells
    return headkv_find_policy(name.c_str(), budget.c_str(), rank.c_str(), fit.c_str(), &info) >= 0 && info.keeps_all;
}

// ranges are checked by headkv_set_params()
static int32_t to_int(const std::string & value) {
    char * end = nullptr;
    errno = 0;
    const long res = std::strtol(value.c_str(), &end, 10);
    if (value.empty() || *end || errno || res < std::numeric_limits<int32_t>::min() || res > std::numeric_limits<int32_t>::max()) {
        throw std::invalid_argument("'" + value + "': it must be an integer");
    }
    return (int32_t) res;
}

static double to_double(const std::string & value) {
    char * end = nullptr;
    const double res = std::strtod(value.c_str(), &end);
    if (value.empty() || *end) {
        throw std::invalid_argument("'" + value + "': it must be a number");
    }
    return res;
}

// such as 20GiB; at least one byte
static int64_t to_bytes(const std::string & value) {
    static const std::pair<const char *, double> UNITS[] = { { "", 1 }, { "B", 1 }, { "KiB", 1 << 10 }, { "MiB", 1 << 20 }, { "GiB", 1 << 30 },
        { "TiB", 1099511627776.0 }, { "KB", 1e3 }, { "MB", 1e6 }, { "GB", 1e9 }, { "TB", 1e12 } };
    char * end = nullptr;
    const double n = std::strtod(value.c_str(), &end);
    const std::string unit = end;
    for (const auto & [name, n_bytes] : UNITS) {
        if (end != value.c_str() && unit == name && n * n_bytes >= 1 && n * n_bytes < 9e18) {
            return (int64_t) (n * n_bytes);
        }
    }
    throw std::invalid_argument("'" + value + "': it must be a positive size such as 20GiB, 512MiB, 6GB or a number of bytes");
}

static int32_t to_type(const std::string & value) {
    std::string known;
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        if (value == ggml_type_name(type)) {
            return type;
        }
        known += std::string(known.empty() ? "" : ", ") + ggml_type_name(type);
    }
    throw std::invalid_argument("'" + value + "': it must be one of " + known);
}

static const char * const POOLS[] = { "max", "avg" };            // enum headkv_pool
static const char * const PREFILLS[] = { "auto", "token", "layer" }; // enum headkv_prefill

static const char * const SCOPES[] = { "generated", "all" }; // enum headkv_scope
static const char * const GENERATED_RANKS[] = { "attention", "recent", "redundancy" }; // enum headkv_generated_rank

static const char * const QUESTIONS[] = { "known", "both", "later" };

static const char * const POSITIONS[] = { "auto", "on", "off" }; // enum headkv_tell_positions

static std::map<std::string, std::string> read_page(const std::string & folder) {
    std::map<std::string, std::string> res;
    for (const char * name : HEADKV_PAGE_FILES) {
        std::ifstream file(folder + "/" + name, std::ios::binary);
        res[name].assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        if (res[name].empty()) {
            throw std::invalid_argument("'" + folder + "': it has no file " + name + ", it must be the folder of a page, or off");
        }
    }
    return res;
}

template <size_t N>
static int32_t to_choice(const std::string & value, const char * const (&names)[N]) {
    std::string known;
    for (size_t i = 0; i < N; ++i) {
        if (value == names[i]) {
            return (int32_t) i;
        }
        known += std::string(i > 0 ? ", " : "") + names[i];
    }
    throw std::invalid_argument("'" + value + "': it must be one of " + known);
}

// the options, after noting that a flag was set
static headkv_args & set(const char * flag) {
    headkv_get_args().given.push_back(flag);
    return headkv_get_args();
}

static std::string with_default(const std::string & help, const std::string & value) {
    return help + " (default: " + value + ")";
}

void headkv_add_args(const std::function<void(common_arg)> & add_opt) {
    const headkv_args def = default_args();
    headkv_name_lost_workers(); // before --rpc is read, which connects to them

    const auto add = [&](common_arg arg, const char * env) {
        add_opt(arg.set_env(env).set_examples({ LLAMA_EXAMPLE_SERVER, LLAMA_EXAMPLE_CLI }));
    };
    add(common_arg({ "--kv-size" }, "N",
                "compress each prompt to N cells per KV head on average, recent ones included (default: 0 = off)",
                [](common_params &, const std::string & value) {
                    const int32_t n = to_int(value);
                    if (n < 0) {
                        throw std::invalid_argument("'" + value + "': it must be more than --kv-recent, or 0 = off");
                    }
                    headkv_get_args().params.kv_size = n;
                }),
            "LLAMA_ARG_KV_SIZE");
    add(common_arg({ "--kv-size-max" }, "N",
                "largest kv_size that a request to the server may ask for, and longest prompt that it may keep whole with kv_size 0 (default: --kv-size)",
                [](common_params &, const std::string & value) {
                    const int32_t n = to_int(value);
                    if (n < 1) {
                        throw std::invalid_argument("'" + value + "': it must be at least --kv-size");
                    }
                    set("--kv-size-max").kv_size_max = n;
                }),
            "LLAMA_ARG_KV_SIZE_MAX");
    add(common_arg({ "--kv-sinks" }, "N",
                "first tokens of each prompt that every KV head keeps (default: 4 with the ranks recent, value, output, expected, outlying, outlying+value and attention*value, else 0)",
                [](common_params &, const std::string & value) { set("--kv-sinks").params.sinks = to_int(value); }),
            "LLAMA_ARG_KV_SINKS");
    add(common_arg({ "--kv-policy" }, "NAME",
                with_default("which cells of a prompt each KV head keeps: auto = what is best for what is known of the heads and the question; headkv, headkv+adakv, razor = by importance; "
                             "snapkv, streaming, pyramidkv, adakv, criticalkv, h2o need none; lossless = all, without --kv-size; or BUDGET/RANK or BUDGET/RANK/FIT",
                        def.policy),
                [](common_params &, const std::string & value) { set("--kv-policy").policy = value; }),
            "LLAMA_ARG_KV_POLICY");
    add(common_arg({ "--kv-budget" }, "NAME",
                "how many cells each KV head keeps: uniform, importance, replay, mix (of both), adaptive, importance+adaptive, pyramid, whole (default: that of the policy)",
                [](common_params &, const std::string & value) { set("--kv-budget").budget = value; }),
            "LLAMA_ARG_KV_BUDGET");
    add(common_arg({ "--kv-rank" }, "NAME",
                "which ones: attention (of the window), value (norm), attention*value, expected (attention, of queries like those of the prompt), outlying (tokens with values far from the mean), outlying+value, attention+outlying, output (of value x output matrix), critical, sums, recent (default: that of the policy)",
                [](common_params &, const std::string & value) { set("--kv-rank").rank = value; }),
            "LLAMA_ARG_KV_RANK");
    add(common_arg({ "--kv-fit" }, "none|mean|values",
                "what becomes of their values: mean = one cell stands for those that are dropped, values = fitted to the answers of the full cache (default: that of the policy)",
                [](common_params &, const std::string & value) { set("--kv-fit").fit = value; }),
            "LLAMA_ARG_KV_FIT");
    add(common_arg({ "--kv-question" }, "known|both|later",
                "for --kv-policy auto: prompts end with the question, with the first of several about what was kept, or are documents for questions to come (default: later with --kv-reuse where the replay table is known, else known)",
                [](common_params &, const std::string & value) {
                    to_choice(value, QUESTIONS);
                    set("--kv-question").question = value;
                }),
            "LLAMA_ARG_KV_QUESTION");
    add(common_arg({ "--kv-beta" }, "X",
                "a share 1/X of the budget is given out by importance, X > 1 (default: the one stored with the importance, else 1.2)",
                [](common_params &, const std::string & value) { set("--kv-beta").params.beta = to_double(value); }),
            "LLAMA_ARG_KV_BETA");
    add(common_arg({ "--kv-window" }, "N",
                with_default("last tokens of a prompt whose queries score it, 1 to 256", std::to_string(def.params.window)),
                [](common_params &, const std::string & value) { set("--kv-window").params.window = to_int(value); }),
            "LLAMA_ARG_KV_WINDOW");
    add(common_arg({ "--kv-recent" }, "N",
                with_default("last tokens of a prompt that every KV head keeps", std::to_string(def.params.recent)),
                [](common_params &, const std::string & value) { set("--kv-recent").params.recent = to_int(value); }),
            "LLAMA_ARG_KV_RECENT");
    add(common_arg({ "--kv-power" }, "1|2|4|8",
                with_default("power mean of the queries' attention that scores a token: 1 = their mean, more = rather the largest", std::to_string(def.params.power)),
                [](common_params &, const std::string & value) { set("--kv-power").params.power = to_int(value); }),
            "LLAMA_ARG_KV_POWER");
    add(common_arg({ "--kv-pool" }, "max|avg",
                with_default("pooling of the scores along the prompt", POOLS[def.params.pool]),
                [](common_params &, const std::string & value) { set("--kv-pool").params.pool = to_choice(value, POOLS); }),
            "LLAMA_ARG_KV_POOL");
    add(common_arg({ "--kv-pool-kernel" }, "N",
                with_default("scores that are pooled, odd, 1 = none, 0 = a quarter of the cells of each head, 3 to 31", std::to_string(def.params.pool_kernel)),
                [](common_params &, const std::string & value) { set("--kv-pool-kernel").params.pool_kernel = to_int(value); }),
            "LLAMA_ARG_KV_POOL_KERNEL");
    add(common_arg({ "--kv-importance" }, "FILE",
                "GGUF with the importance of each head, or the replay table (default: the model)",
                [](common_params &, const std::string & value) { set("--kv-importance").importance = value; }),
            "LLAMA_ARG_KV_IMPORTANCE");
    add(common_arg({ "--kv-prefill" }, "auto|layer|token",
                with_default("order in which prompts are read: layer = one layer's full cache is alive at a time; "
                             "token = in batches through all layers; auto = layer where the model and the request allow it, else token",
                        PREFILLS[def.params.prefill]),
                [](common_params &, const std::string & value) { set("--kv-prefill").params.prefill = to_choice(value, PREFILLS); }),
            "LLAMA_ARG_KV_PREFILL");
    add(common_arg({ "--kv-generated" }, "N",
                "generated tokens may hold N cells per KV head on average, more than --kv-window; a request may choose another number (kv_generated), 0 = all stay (default: 0)",
                [](common_params &, const std::string & value) {
                    const int32_t n = to_int(value);
                    if (n < 0) {
                        throw std::invalid_argument("'" + value + "': it must be more than --kv-window, or 0 = generated tokens all stay");
                    }
                    set("--kv-generated").params.kv_generated = n;
                }),
            "LLAMA_ARG_KV_GENERATED");
    add(common_arg({ "--kv-generated-scope" }, "generated|all",
                with_default("which cells compete when there are more: those of generated tokens, or all but sinks and protected ones", SCOPES[def.params.generated_scope]),
                [](common_params &, const std::string & value) { set("--kv-generated-scope").params.generated_scope = to_choice(value, SCOPES); }),
            "LLAMA_ARG_KV_GENERATED_SCOPE");
    add(common_arg({ "--kv-generated-rank" }, "attention|recent|redundancy",
                with_default("which of them stay: by the attention of the last tokens, the last ones, or by attention less redundancy", GENERATED_RANKS[def.params.generated_rank]),
                [](common_params &, const std::string & value) { set("--kv-generated-rank").params.generated_rank = to_choice(value, GENERATED_RANKS); }),
            "LLAMA_ARG_KV_GENERATED_RANK");
    add(common_arg({ "--kv-generated-slack" }, "N",
                with_default("tokens from one eviction to the next", std::to_string(def.params.generated_slack)),
                [](common_params &, const std::string & value) { set("--kv-generated-slack").params.generated_slack = to_int(value); }),
            "LLAMA_ARG_KV_GENERATED_SLACK");
    add(common_arg({ "--kv-limit" }, "N",
                "tokens of a slot, prompt and answer, at which an answer ends where --kv-generated lets it go on beyond the context (default: those that the model was trained with)",
                [](common_params &, const std::string & value) {
                    const int32_t n = to_int(value);
                    if (n < 1) {
                        throw std::invalid_argument("'" + value + "': it must be a number of tokens");
                    }
                    set("--kv-limit").kv_limit = n;
                }),
            "LLAMA_ARG_KV_LIMIT");
    add(common_arg({ "--kv-reuse" }, { "--no-kv-reuse" },
                with_default("continue on the compressed past when a prompt begins with it, instead of reading it again", def.reuse ? "enabled" : "disabled"),
                [](common_params &, bool value) { set("--kv-reuse").reuse = value; }),
            "LLAMA_ARG_KV_REUSE");
    add(common_arg({ "--kv-archive" }, "DIR|ram",
                "keep K and V of all prompt tokens in a folder, or in memory: a prompt that begins like an earlier one, of any slot, is read from where it differs, "
                "with the same outcome; folders may be shared and outlive the server (default: off)",
                [](common_params &, const std::string & value) {
                    if (value.empty()) {
                        throw std::invalid_argument("an empty name: it must be a folder, or ram");
                    }
                    set("--kv-archive").archive = value;
                }),
            "LLAMA_ARG_KV_ARCHIVE");
    add(common_arg({ "--kv-archive-size" }, "SIZE",
                "bytes that the archive may take, such as 20GiB; what was not used for the longest time goes first (default: 20GiB, of ram a quarter of it)",
                [](common_params &, const std::string & value) { set("--kv-archive-size").archive_params.max_bytes = to_bytes(value); }),
            "LLAMA_ARG_KV_ARCHIVE_SIZE");
    add(common_arg({ "--kv-archive-type" }, "TYPE",
                "f16, bf16, q8_0 or q4_0: what the archive rounds K and V to; smaller, and no longer exact (default: as the cache has them)",
                [](common_params &, const std::string & value) { set("--kv-archive-type").archive_params.type = to_type(value); }),
            "LLAMA_ARG_KV_ARCHIVE_TYPE");

    const auto add_to_server = [&](common_arg arg, const char * env) {
        add_opt(arg.set_env(env).set_examples({ LLAMA_EXAMPLE_SERVER }));
    };
    add_to_server(common_arg({ "--kv-page" }, "DIR|off",
                          "serve the page of this folder at /kv, which shows what the slots hold (default: off, with pyheadkv serve its own)",
                          [](common_params &, const std::string & value) {
                              headkv_get_args().page = value == "off" ? std::map<std::string, std::string>() : read_page(value);
                          }),
            "LLAMA_ARG_KV_PAGE");
    add_to_server(common_arg({ "--kv-positions" }, "auto|on|off",
                          with_default("tell the page the text of prompts and which positions of it are held, at /kv/positions: auto = where the server listens on "
                                       "this machine alone",
                                  POSITIONS[def.positions]),
                          [](common_params &, const std::string & value) { headkv_get_args().positions = to_choice(value, POSITIONS); }),
            "LLAMA_ARG_KV_POSITIONS");
}
