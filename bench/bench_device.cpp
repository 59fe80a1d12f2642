// What a device makes of the engine, without Python: a random model of the shape of Llama-3.1-8B is written, and processes
// that hold it take turns, so that other load on the machine hits both. Every ratio is the median of paired ratios.
//
//   bench_device devices                 lists them; exit code 3 if none is a GPU
//   bench_device same   KEY=VALUE ..     (a) without kv_size: unpatched llama.cpp and this one
//   bench_device decode KEY=VALUE ..     (b) after a prompt: compressed, against an empty context and a full cache
//   bench_device prompt KEY=VALUE ..     (c) reading a prompt in either order: time, compression, memory of the device
//
//   out=FILE.csv   default: standard output       commit=NAME     for its rows
//   stock=FOLDER   of unpatched libraries         device=NAME     default: the first GPU; CPU
//   shape=8b|1b|tiny   ftype=q4_0|q8_0|f16        model=FILE      is written if missing
//   prompt=N       kv_size=N                      rounds=N        threads=N

#include "headkv-testing.h"

#include "ggml-backend.h"
#include "gguf.h"

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using options = std::map<std::string, std::string>;

static int number(const options & o, const char * key) { return std::stoi(o.at(key)); }

static double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x.size() % 2 == 1 ? x[x.size() / 2] : (x[x.size() / 2 - 1] + x[x.size() / 2]) / 2;
}

//
// the model
//

struct shape {
    int n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_vocab;
};

static const std::map<std::string, shape> SHAPES = {
    { "8b", { 32, 4096, 32, 8, 128, 14336, 32000 } },
    { "1b", { 16, 2048, 32, 8, 64, 8192, 32000 } },
    { "tiny", { 4, 512, 8, 2, 64, 1024, 1024 } },
};

static ggml_type type_of(const std::string & name) {
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        if (name == ggml_type_name(type)) {
            return type;
        }
    }
    throw std::runtime_error("ftype=" + name + ": use f16, q8_0 or q4_0");
}

// rows of random numbers, as they are stored, one after the other until size bytes are written
static void write_random(FILE * file, const ggml_tensor * t, std::vector<uint8_t> & rows) {
    const bool is_vector = ggml_n_dims(t) == 1;
    const int64_t n = t->ne[0];
    const int64_t n_rows = std::min<int64_t>(64, ggml_nrows(t));
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt((float) n));
    std::vector<float> x(n * n_rows, 1.0f);
    if (!is_vector) {
        std::generate(x.begin(), x.end(), [&]() { return normal(random); });
    }
    rows.resize(n_rows * ggml_row_size(t->type, n));
    ggml_quantize_chunk(t->type, x.data(), rows.data(), 0, n_rows, n, nullptr);
    for (size_t left = ggml_nbytes(t); left > 0;) {
        const size_t part = std::min(left, rows.size());
        if (fwrite(rows.data(), 1, part, file) != part) {
            throw std::runtime_error("no room for the model: delete files or name another place with model=FILE");
        }
        left -= part;
    }
    for (size_t i = ggml_nbytes(t); i % GGUF_DEFAULT_ALIGNMENT != 0; ++i) {
        fputc(0, file);
    }
}

static void write_model(const std::string & path, const shape & s, ggml_type type) {
    gguf_context * gguf = gguf_init_empty();
    gguf_set_val_str(gguf, "general.architecture", "llama");
    gguf_set_val_str(gguf, "tokenizer.ggml.model", "none");
    const auto set = [&](const char * key, int value) { gguf_set_val_u32(gguf, ("llama." + std::string(key)).c_str(), value); };
    set("vocab_size", s.n_vocab);
    set("context_length", 131072);
    set("embedding_length", s.n_embd);
    set("block_count", s.n_layer);
    set("feed_forward_length", s.n_ff);
    set("attention.head_count", s.n_head);
    set("attention.head_count_kv", s.n_head_kv);
    set("attention.key_length", s.head_dim);
    set("attention.value_length", s.head_dim);
    set("rope.dimension_count", s.head_dim);
    gguf_set_val_f32(gguf, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    gguf_set_val_f32(gguf, "llama.rope.freq_base", 500000.0f);
    // few heads hold most of it, as in real models
    std::mt19937 random(1);
    std::gamma_distribution<float> gamma(0.3f);
    std::vector<float> importance(s.n_layer * s.n_head);
    std::generate(importance.begin(), importance.end(), [&]() { return gamma(random); });
    const uint32_t shape_of_it[] = { (uint32_t) s.n_layer, (uint32_t) s.n_head };
    gguf_set_arr_data(gguf, "llama.attention.head_importance", GGUF_TYPE_FLOAT32, importance.data(), importance.size());
    gguf_set_arr_data(gguf, "llama.attention.head_importance.shape", GGUF_TYPE_UINT32, shape_of_it, 2);
    set("attention.head_importance.version", 1);

    ggml_context * ctx = ggml_init({ (16 + 16 * (size_t) s.n_layer) * ggml_tensor_overhead(), nullptr, true });
    const auto add = [&](const std::string & name, int64_t n_in, int64_t n_out) {
        ggml_tensor * t = n_out == 0 ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_in) : ggml_new_tensor_2d(ctx, type, n_in, n_out);
        gguf_add_tensor(gguf, ggml_set_name(t, (name + ".weight").c_str()));
    };
    add("token_embd", s.n_embd, s.n_vocab);
    add("output_norm", s.n_embd, 0);
    add("output", s.n_embd, s.n_vocab);
    for (int il = 0; il < s.n_layer; ++il) {
        const std::string blk = "blk." + std::to_string(il) + ".";
        add(blk + "attn_norm", s.n_embd, 0);
        add(blk + "attn_q", s.n_embd, s.n_head * s.head_dim);
        add(blk + "attn_k", s.n_embd, s.n_head_kv * s.head_dim);
        add(blk + "attn_v", s.n_embd, s.n_head_kv * s.head_dim);
        add(blk + "attn_output", s.n_head * s.head_dim, s.n_embd);
        add(blk + "ffn_norm", s.n_embd, 0);
        add(blk + "ffn_gate", s.n_embd, s.n_ff);
        add(blk + "ffn_up", s.n_embd, s.n_ff);
        add(blk + "ffn_down", s.n_ff, s.n_embd);
    }
    const std::string part = path + ".part";
    FILE * file = fopen(part.c_str(), "wb");
    if (!file || !gguf_write_to_file_ptr(gguf, file, true)) {
        throw std::runtime_error("cannot write " + part);
    }
    std::vector<uint8_t> rows;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        write_random(file, t, rows);
    }
    if (fclose(file) != 0 || rename(part.c_str(), path.c_str()) != 0) {
        throw std::runtime_error("cannot write " + path);
    }
    ggml_free(ctx);
    gguf_free(gguf);
}

//
// a process with the model and one kind of cache: it reads commands, and answers each with a number
//

// a function of ours, which unpatched libraries lack
template <typename F>
static F * ours(const char * name) {
    F * f = (F *) dlsym(RTLD_DEFAULT, name);
    if (!f) {
        throw std::runtime_error(std::string(name) + " is missing: these are unpatched libraries");
    }
    return f;
}
#define OURS(f) ours<decltype(f)>(#f)

static ggml_backend_dev_t find_device(const std::string & name) {
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        if (name.empty() ? ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_GPU : name == ggml_backend_dev_name(dev)) {
            return dev;
        }
    }
    return nullptr;
}

class engine {
public:
    explicit engine(const options & o) {
        dev = find_device(o.at("device"));
        if (!dev) {
            throw std::runtime_error("device=" + o.at("device") + " is not there");
        }
        is_gpu = ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_GPU;
        base = used();
        ggml_backend_dev_t devices[] = { dev, nullptr };
        llama_model_params mp = llama_model_default_params();
        mp.n_gpu_layers = is_gpu ? 99 : 0;
        if (is_gpu) {
            mp.devices = devices;
        }
        model = llama_model_load_from_file(o.at("model").c_str(), mp);
        llama_context_params cp = llama_context_default_params();
        cp.n_ctx = number(o, "prompt") + 256;
        cp.n_batch = number(o, "prompt") + 256; // a prompt is one call, so that it can be read layer by layer
        cp.n_ubatch = 512;
        cp.n_threads = cp.n_threads_batch = number(o, "threads");
        cp.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        if (number(o, "kv_size") > 0) {
            headkv_params p = OURS(headkv_default_params)();
            p.kv_size = number(o, "kv_size");
            p.importance_gguf = o.at("model").c_str();
            p.prefill = o.at("prefill") == "layer" ? HEADKV_PREFILL_LAYER : o.at("prefill") == "token" ? HEADKV_PREFILL_TOKEN
                                                                                                       : HEADKV_PREFILL_AUTO;
            check(OURS(headkv_set_params)(&p));
        }
        ctx = model ? llama_init_from_model(model, cp) : nullptr;
        if (!ctx) {
            throw std::runtime_error(number(o, "kv_size") > 0 ? OURS(headkv_last_error)() : "the model cannot be loaded: the log says why");
        }
    }

    double run(const std::string & name, int n) {
        if (name == "fill") { // as if n tokens had been read
            clear();
            check(OURS(headkv_fill_prompt)(ctx, 0, n, 1));
            n_past = n;
            return 0;
        }
        if (name == "read") {
            clear();
            std::vector<llama_token> tokens(n);
            std::mt19937 random(2);
            for (llama_token & token : tokens) {
                token = random() % 1000;
            }
            return decode(tokens);
        }
        if (name == "compress") {
            check(OURS(headkv_end_prompt)(ctx, 0));
            return stats().t_compress_us / 1e6;
        }
        if (name == "decode") {
            const double start = seconds();
            for (int i = 0; i < n; ++i) {
                decode({ 7 });
            }
            return (seconds() - start) / n;
        }
        if (name == "truncate") {
            if (!llama_memory_seq_rm(llama_get_memory(ctx), 0, n, -1)) {
                throw std::runtime_error("tokens cannot be removed");
            }
            n_past = n;
            return 0;
        }
        if (name == "clear") {
            clear();
            return decode({ 1 });
        }
        if (name == "store") {
            return stats().bytes_store;
        }
        if (name == "held") {
            return used() - base;
        }
        if (name == "peak") { // of reading, and compressing if there is something to compress with
            std::atomic<bool> done = { false };
            double most = 0;
            std::thread watch([&]() {
                while (!done) {
                    most = std::max(most, used());
                    std::this_thread::sleep_for(std::chrono::milliseconds(2));
                }
            });
            run("read", n);
            if (dlsym(RTLD_DEFAULT, "headkv_end_prompt") && OURS(headkv_get_policy)(ctx) != std::string("full")) {
                run("compress", 0);
            }
            done = true;
            watch.join();
            return most - base;
        }
        throw std::runtime_error("unknown command " + name);
    }

private:
    ggml_backend_dev_t dev;
    bool is_gpu = false;
    double base = 0;
    llama_model * model = nullptr;
    llama_context * ctx = nullptr;
    int n_past = 0;

    static void check(int rc) {
        if (rc < 0) {
            throw std::runtime_error(OURS(headkv_last_error)());
        }
    }

    double used() const {
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(dev, &free, &total);
        return is_gpu ? (double) (total - free) : 0;
    }

    void clear() {
        llama_memory_clear(llama_get_memory(ctx), false);
        n_past = 0;
    }

    headkv_stats stats() {
        headkv_stats res;
        res.size = sizeof(res);
        check(OURS(headkv_get_stats)(ctx, 0, &res));
        return res;
    }

    double decode(std::vector<llama_token> tokens) {
        const double start = seconds();
        const int rc = llama_decode(ctx, llama_batch_get_one(tokens.data(), (int32_t) tokens.size()));
        llama_synchronize(ctx);
        if (rc != 0) {
            throw std::runtime_error("llama_decode() of " + std::to_string(tokens.size()) + " tokens after " + std::to_string(n_past) + " returned " + std::to_string(rc));
        }
        n_past += (int) tokens.size();
        return seconds() - start;
    }
};

static void serve(const options & o) {
    FILE * answers = fdopen(dup(1), "w");
    dup2(2, 1); // what else is printed is no answer
    engine e(o);
    fprintf(answers, "0\n");
    fflush(answers);
    char name[32];
    int n;
    while (scanf("%31s %d", name, &n) == 2) {
        fprintf(answers, "%.9g\n", e.run(name, n));
        fflush(answers);
    }
}

class process {
public:
    process(options o, const std::string & libraries, int kv_size, const std::string & prefill = "auto") {
        o["kv_size"] = std::to_string(kv_size);
        o["prefill"] = prefill;
        int to[2], from[2];
        if (pipe(to) != 0 || pipe(from) != 0) {
            throw std::runtime_error("no pipe");
        }
        pid = fork();
        if (pid == 0) {
            dup2(to[0], 0);
            dup2(from[1], 1);
            for (int fd : { to[0], to[1], from[0], from[1] }) {
                close(fd);
            }
#ifdef __APPLE__
            const char * variable = "DYLD_LIBRARY_PATH";
#else
            const char * variable = "LD_LIBRARY_PATH";
#endif
            if (!libraries.empty()) {
                const char * other = getenv(variable);
                setenv(variable, (libraries + (other && *other ? ":" + std::string(other) : "")).c_str(), 1);
            }
            std::vector<std::string> args = { o.at("self"), "worker" };
            for (const auto & [key, value] : o) {
                args.push_back(key + "=" + value);
            }
            std::vector<char *> argv;
            for (std::string & arg : args) {
                argv.push_back(arg.data());
            }
            argv.push_back(nullptr);
            execv(argv[0], argv.data());
            _exit(127);
        }
        close(to[0]);
        close(from[1]);
        in = fdopen(to[1], "w");
        out = fdopen(from[0], "r");
        answer("start");
    }

    double operator()(const char * name, int n = 0) {
        fprintf(in, "%s %d\n", name, n);
        fflush(in);
        return answer(name);
    }

    ~process() {
        fclose(in);
        fclose(out);
        waitpid(pid, nullptr, 0);
    }

    process(const process &) = delete;
    process & operator=(const process &) = delete;

private:
    pid_t pid;
    FILE * in;
    FILE * out;

    double answer(const char * name) {
        double res;
        if (fscanf(out, "%lf", &res) != 1) {
            throw std::runtime_error(std::string("a process ended at '") + name + "': its message is above");
        }
        return res;
    }
};

//
// measurements
//

class table {
public:
    table(const options & o, const std::string & command) :
        o(o), command(command) {
        file = o.at("out").empty() ? stdout : fopen(o.at("out").c_str(), "w");
        if (!file) {
            throw std::runtime_error("cannot write " + o.at("out"));
        }
        fprintf(file, "what,value,unit,speed_ratio,command,commit,machine\n");
        machine = ggml_backend_dev_description(find_device(o.at("device")));
    }

    // ratio: of speeds, 0 = none
    void row(const std::string & what, double value, const char * unit, double ratio = 0) {
        fprintf(file, "\"%s\",%.6g,%s,", what.c_str(), value, unit);
        if (ratio > 0) {
            fprintf(file, "%.4f", ratio);
        }
        fprintf(file, ",\"%s\",%s,\"%s\"\n", command.c_str(), o.at("commit").c_str(), machine.c_str());
        fflush(file);
        fprintf(stderr, "%s: %.6g %s\n", what.c_str(), value, unit);
    }

    // times of a and b that were taken in turn: the ratio is a's speed over b's
    void pair(const std::string & what, const std::vector<double> & a, const std::vector<double> & b, double factor, const char * unit) {
        std::vector<double> ratios;
        for (size_t i = 0; i < a.size(); ++i) {
            ratios.push_back(b[i] / a[i]);
        }
        row(what, factor * median(a), unit, median(ratios));
    }

private:
    const options & o;
    std::string command, machine;
    FILE * file;
};

// f(i) for both, the other one first in every second round
template <typename A, typename B>
static std::pair<std::vector<double>, std::vector<double>> in_turn(int n_rounds, A a, B b) {
    std::pair<std::vector<double>, std::vector<double>> res;
    for (int i = 0; i < n_rounds; ++i) {
        if (i % 2 == 0) {
            res.first.push_back(a());
            res.second.push_back(b());
        } else {
            res.second.push_back(b());
            res.first.push_back(a());
        }
    }
    return res;
}

static void same(const options & o, table & t) {
    if (o.at("stock").empty()) {
        throw std::runtime_error("same: name the folder of the unpatched libraries with stock=FOLDER");
    }
    const int n_rounds = number(o, "rounds"), n_prompt = number(o, "prompt");
    process stock(o, o.at("stock"), 0), mine(o, "", 0);
    const auto decode = [&](process & p) { p("clear"); p("decode", 4); return p("decode", 64); };
    decode(stock), decode(mine);
    const auto [a, b] = in_turn(n_rounds, [&]() { return decode(mine); }, [&]() { return decode(stock); });
    t.pair("no kv_size: decode at empty context, against unpatched llama.cpp", a, b, 1000, "ms/token");
    const auto [c, d] = in_turn(n_rounds, [&]() { return mine("read", n_prompt); }, [&]() { return stock("read", n_prompt); });
    t.pair("no kv_size: reading " + o.at("prompt") + " tokens, against unpatched llama.cpp", c, d, 1, "s");
    const auto after = [&](process & p) { p("truncate", n_prompt); return p("decode", 32); };
    const auto [e, f] = in_turn(n_rounds, [&]() { return after(mine); }, [&]() { return after(stock); });
    t.pair("no kv_size: decode after " + o.at("prompt") + " tokens, against unpatched llama.cpp", e, f, 1000, "ms/token");
}

static void decode(const options & o, table & t) {
    const int n_rounds = number(o, "rounds"), n_prompt = number(o, "prompt");
    process full(o, "", 0), mine(o, "", number(o, "kv_size"));
    const std::string after = " after " + o.at("prompt") + " tokens";
    mine("fill", n_prompt);
    t.row("compression" + after, 1000 * mine("compress"), "ms");
    t.row("store" + after, mine("store"), "bytes");
    const auto compressed = [&]() { mine("truncate", n_prompt); return mine("decode", 64); };
    const auto empty = [&]() { full("clear"); return full("decode", 64); };
    compressed(), empty();
    const auto [a, b] = in_turn(n_rounds, compressed, empty);
    t.pair("kv_size=" + o.at("kv_size") + ": decode" + after + ", against an empty context without kv_size", a, b, 1000, "ms/token");
    t.row("no kv_size: decode at empty context", 1000 * median(b), "ms/token");
    full("read", n_prompt);
    const auto whole = [&]() { full("truncate", n_prompt); return full("decode", 32); };
    whole();
    const auto [c, d] = in_turn(n_rounds, compressed, whole);
    t.pair("kv_size=" + o.at("kv_size") + ": decode" + after + ", against upstream's flash attention over all of them", c, d, 1000, "ms/token");
    t.row("no kv_size: decode" + after, 1000 * median(d), "ms/token");
}

static void prompt(const options & o, table & t) {
    const int n_prompt = number(o, "prompt");
    const bool is_gpu = ggml_backend_dev_type(find_device(o.at("device"))) == GGML_BACKEND_DEVICE_TYPE_GPU;
    for (const char * how : { "stock cache", "layer", "token" }) {
        const bool is_stock = strcmp(how, "stock cache") == 0;
        process p(o, "", is_stock ? 0 : number(o, "kv_size"), is_stock ? "auto" : how); // alone, so that the memory is its own
        const std::string what = std::string(is_stock ? how : std::string("kv_size=") + o.at("kv_size") + ", prefill=" + how) + ": ";
        if (is_gpu) {
            t.row(what + "device memory, loaded", p("held"), "bytes");
            t.row(what + "device memory, peak of reading " + o.at("prompt") + " tokens", p("peak", n_prompt), "bytes");
        } else {
            p("peak", n_prompt); // warm
        }
        std::vector<double> reading, compressing;
        for (int i = 0; i < number(o, "rounds"); ++i) {
            const double read = p("read", n_prompt);
            const double start = seconds();
            if (!is_stock) {
                compressing.push_back(p("compress"));
            }
            reading.push_back(read + (is_stock ? 0 : seconds() - start));
        }
        t.row(what + (is_stock ? "reading" : "reading and compressing"), median(reading), "s");
        if (!is_stock) {
            t.row(what + "of it compression", median(compressing), "s");
            t.row(what + "compression / all of it", median(compressing) / median(reading), "share");
            if (is_gpu) {
                t.row(what + "device memory, after compression", p("held"), "bytes");
            }
        }
    }
}

static void list_devices() {
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        size_t free, total;
        ggml_backend_dev_memory(dev, &free, &total);
        printf("%s: %s, %zu MiB\n", ggml_backend_dev_name(dev), ggml_backend_dev_description(dev), total >> 20);
    }
}

int main(int argc, char ** argv) try {
    const std::string part = argc > 1 ? argv[1] : "";
    options o = { { "out", "" }, { "commit", "" }, { "stock", "" }, { "device", "" }, { "shape", "8b" }, { "ftype", "q4_0" }, { "model", "" },
        { "prompt", "32768" }, { "kv_size", "128" }, { "rounds", "5" }, { "threads", "4" }, { "prefill", "auto" }, { "self", argv[0] } };
    std::string command = "bench_device " + part;
    for (int i = 2; i < argc; ++i) {
        const char * equals = strchr(argv[i], '=');
        const std::string key(argv[i], equals ? equals - argv[i] : strlen(argv[i]));
        if (!equals || o.count(key) == 0) {
            throw std::runtime_error("unknown argument " + std::string(argv[i]) + ": the first lines of bench/bench_device.cpp name them");
        }
        o[key] = equals + 1;
        command += key == "out" || key == "commit" || key == "stock" || key == "model" ? "" : " " + std::string(argv[i]);
    }
    llama_backend_init();
    if (part == "worker") {
        serve(o);
        return 0;
    }
    if (part == "devices") {
        list_devices();
        return find_device("") ? 0 : 3;
    }
    if (!find_device(o["device"])) {
        throw std::runtime_error("device=" + o["device"] + ": there is no such device, and if none was named no GPU; 'bench_device devices' lists what there is");
    }
    o["device"] = ggml_backend_dev_name(find_device(o["device"]));
    if (SHAPES.count(o["shape"]) == 0) {
        throw std::runtime_error("shape=" + o["shape"] + ": use 8b, 1b or tiny");
    }
    if (o["model"].empty()) {
        o["model"] = "bench-" + o["shape"] + "-" + o["ftype"] + ".gguf";
    }
    if (access(o["model"].c_str(), R_OK) != 0) {
        write_model(o["model"], SHAPES.at(o["shape"]), type_of(o["ftype"]));
    }
    table t(o, command);
    part == "same"             ? same(o, t)
            : part == "decode" ? decode(o, t)
            : part == "prompt" ? prompt(o, t)
                               : throw std::runtime_error("use bench_device devices, same, decode or prompt, not '" + part + "'");
    return 0;
} catch (const std::exception & e) {
    fprintf(stderr, "bench_device: %s\n", e.what());
    return 1;
}
