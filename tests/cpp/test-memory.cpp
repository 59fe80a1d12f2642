// The life of a sequence and the store, without a model: every event in every state against the table in headkv-seq.h,
// and random walks of sequences that come, grow, are cut and go, with an allocator that fails for good while it is told to.
//
//   test-memory [STEPS]    exit code 1 if something is not as it has to be

#include "headkv-refs.h"
#include "headkv-seq.h"
#include "headkv-store.h"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <new>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

static int n_checks = 0;
static int n_failed = 0;

static void check(bool ok, const char * what, const std::string & where) {
    n_checks++;
    if (!ok) {
        n_failed++;
        printf("FAIL %s: %s\n", where.c_str(), what);
    }
}

//
// the table
//

static const std::map<std::string, headkv_seq_state> STATES = {
    { "EMPTY", HEADKV_SEQ_EMPTY },
    { "STAGED", HEADKV_SEQ_STAGED },
    { "LAYERED", HEADKV_SEQ_LAYERED },
    { "COMPRESSED", HEADKV_SEQ_COMPRESSED },
};

static const std::map<std::string, headkv_seq_event> EVENTS = {
    { "STAGE", HEADKV_EV_STAGE },
    { "PASS", HEADKV_EV_PASS },
    { "STORE", HEADKV_EV_STORE },
    { "DECODE", HEADKV_EV_DECODE },
    { "CUT", HEADKV_EV_CUT },
    { "REMOVE", HEADKV_EV_REMOVE },
};

// a sequence in a state, by the events that lead there
static headkv_seq in_state(headkv_seq_state state) {
    headkv_seq res;
    switch (state) {
        case HEADKV_SEQ_EMPTY: break;
        case HEADKV_SEQ_STAGED: res.on(HEADKV_EV_STAGE); break;
        case HEADKV_SEQ_LAYERED: res.on(HEADKV_EV_PASS); break;
        case HEADKV_SEQ_COMPRESSED: res.on(HEADKV_EV_STORE); break;
    }
    return res;
}

// what the comment of the header says: event -> the four states in the order of its first line, "-" = none
static std::map<std::string, std::vector<std::string>> read_table(const std::string & path) {
    std::ifstream file(path);
    std::map<std::string, std::vector<std::string>> res;
    for (std::string line; std::getline(file, line);) {
        std::istringstream in(line);
        std::vector<std::string> words((std::istream_iterator<std::string>(in)), std::istream_iterator<std::string>());
        if (words.size() < 6 || words[0] != "//" || !(EVENTS.count(words[1]) || (words[1] == "event" && words[2] == "\\"))) {
            continue;
        }
        res[words[1]] = std::vector<std::string>(words.end() - 4, words.end());
    }
    return res;
}

static void test_table() {
    const auto table = read_table(HEADKV_SEQ_H);
    check(table.size() == EVENTS.size() + 1, "the header has a line for every event", "table");
    const auto columns = table.find("event");
    if (columns == table.end()) {
        return;
    }
    for (const auto & [name, event] : EVENTS) {
        const auto row = table.find(name);
        for (size_t i = 0; row != table.end() && i < 4; ++i) {
            const std::string & from = columns->second[i];
            headkv_seq seq = in_state(STATES.at(from));
            std::string next = "-";
            try {
                seq.on(event);
                for (const auto & [word, state] : STATES) {
                    next = state == seq.state ? word : next;
                }
            } catch (const std::logic_error &) {
                check(seq.state == STATES.at(from), "an event that is refused changes nothing", name + " in " + from);
            }
            check(next == row->second[i], ("it is " + next + ", the header says " + row->second[i]).c_str(), name + " in " + from);
        }
    }
}

static void test_what_is_pending_dies_with_its_sequence() {
    for (const auto & [name, state] : STATES) {
        headkv_seq seq = in_state(state);
        seq.compress_to = 3;
        seq.n_tail_next = 100;
        seq.window = { 1, 2, 3 };
        seq.has_sums = false;
        seq.on(HEADKV_EV_REMOVE);
        check(seq.compress_to == -1 && seq.n_tail_next == 0 && seq.window.empty() && seq.has_sums && seq.n_pos == 0, "it is a new one", "removed " + name);
    }
}

static void test_a_prompt_that_is_cut() {
    headkv_seq seq;
    for (llama_pos pos = 0; pos < 40; ++pos) {
        seq.add(HEADKV_EV_STAGE, pos, 7, 8);
    }
    check(seq.window_slots(2, 8) == std::vector<int32_t>({ 16, 17, 18, 19, 20, 21, 22, 23 }), "slots of the last 8", "staged");
    check(seq.cut(38) == 0 && seq.n_pos == 38 && !seq.has_sums && seq.window_slots(0, 8).empty(), "queries are missing", "staged, cut");
    check(seq.window_slots(0, 6).size() == 6, "those that are left", "staged, cut");
    seq.add(HEADKV_EV_STAGE, 38, 9, 8);
    check(seq.adapters == HEADKV_SEVERAL_ADAPTERS, "tokens of two adapters", "staged");

    headkv_seq kept;
    kept.on(HEADKV_EV_STORE);
    kept.n_pos = kept.n_prompt = 40;
    kept.n_whole = 8;
    kept.n_tail = 16;
    kept.add(HEADKV_EV_DECODE, 40, 0, 8);
    check(kept.cut(31) == -1 && kept.n_pos == 41 && kept.n_prompt == 40, "below the recent cells nothing can be cut", "compressed");
    check(kept.pos_min() == 32 && kept.cut(40) == 0 && kept.n_generated() == 0, "a generated token", "compressed, cut");
    check(kept.cut(35) == 5 && kept.n_prompt == 35 && kept.n_whole == 3 && kept.n_tail == 21, "five of the prompt, whose rows wait", "compressed, cut");
}

static void test_generated_tokens_that_are_bounded() {
    headkv_seq seq;
    seq.on(HEADKV_EV_STORE);
    seq.n_pos = seq.n_prompt = 40;
    seq.n_whole = 8;
    seq.bound.n_cells = 24;
    seq.bound.n_slack = 16;
    seq.bound.n_window = 8;
    const auto say = [&](llama_pos n) {
        for (llama_pos i = 0; i < n; ++i) {
            check(!seq.is_eviction_due(1), "it is not due yet", "position " + std::to_string(seq.n_pos));
            seq.add(HEADKV_EV_DECODE, seq.n_pos, 0, 12);
        }
    };
    say(40);
    check(seq.is_eviction_due(1) && seq.pos_min() == 32 && seq.can_cut(32), "it is due, and nothing is gone", "bounded");
    seq.n_settled = 32;
    check(seq.n_in_tail() == 8 && seq.tail_begin() == 72 && seq.pos_min() == 72 && !seq.can_cut(71), "the window is left", "bounded, evicted");
    say(15);
    seq.add(HEADKV_EV_DECODE, seq.n_pos, 0, 12);
    check(seq.is_eviction_due(1), "a slack later it is due again", "bounded, evicted");
    for (int i = 0; i < 5; ++i) {
        seq.add(HEADKV_EV_DECODE, seq.n_pos, 0, 12);
    }
    check(seq.cut(seq.n_pos - 5) == 0 && !seq.is_eviction_due(1), "a draft of more tokens than the ring has room for: queries are missing", "bounded, cut");
    say(1);
    check(seq.is_eviction_due(1), "a token later there are as many as are looked at", "bounded, cut");
    seq.on(HEADKV_EV_REMOVE);
    check(seq.bound.n_cells == 0 && seq.n_settled == 0, "it is a new one", "bounded, removed");
}

// prompts of every length, read token by token
static void test_references_are_there_whatever_the_length() {
    headkv_seq seq;
    for (llama_pos pos = 0; pos < 20'000; ++pos) {
        seq.add(HEADKV_EV_STAGE, pos, 0, 8, HEADKV_REF_SLOTS);
        const bool is_told = pos < 2100 || pos % 97 == 0;
        if (!is_told) {
            continue;
        }
        const auto refs = headkv_ref_positions(pos + 1);
        const auto slots = seq.ref_slots(0);
        check((int32_t) refs.size() == std::min(pos + 1, HEADKV_MAX_REFS) && slots.size() == refs.size(), "references", std::to_string(pos + 1) + " tokens");
        for (size_t i = 0; i < refs.size(); ++i) {
            const double far = std::abs(refs[i] + 1 - (double) (i + 1) * (pos + 1) / refs.size()); // from where it would be if all were there
            check(seq.refs[slots[i]] == refs[i] && far <= std::max(1.0, (pos + 1.0) / HEADKV_REF_SLOTS * 4), "evenly", std::to_string(pos + 1) + " tokens");
        }
    }
    check(seq.cut(19'990) == 0 && seq.ref_slots(0).size() == HEADKV_MAX_REFS, "as close as before", "cut a little");
    check(seq.cut(8'000) == 0 && seq.ref_slots(0).empty(), "closer than they are there", "cut to less than half");
}

//
// the store
//

static bool allocation_fails = false;
static size_t n_held = 0; // bytes

static ggml_backend_buffer_t failing_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    if (allocation_fails) {
        return nullptr;
    }
    ggml_backend_buffer_t res = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    res->buft = buft;
    static void (*free_buffer)(ggml_backend_buffer_t);
    free_buffer = res->iface.free_buffer;
    res->iface.free_buffer = [](ggml_backend_buffer_t buffer) {
        n_held -= buffer->size;
        free_buffer(buffer);
    };
    n_held += size;
    return res;
}

// memory of the CPU that can run out
static ggml_backend_buffer_type_t failing_buft() {
    static ggml_backend_buffer_type buft = *ggml_backend_cpu_buffer_type();
    buft.iface.alloc_buffer = failing_alloc;
    return &buft;
}

// what a sequence has to hold: [layer][head] one number per row
using rows_t = std::vector<std::vector<std::vector<float>>>;

struct walk_t {
    static constexpr int D_k = 32;
    static constexpr int D_v = 24;
    static constexpr int H = 3;

    std::mt19937 rng;
    std::string where;
    uint32_t n_buckets;
    headkv_store store;

    std::map<int32_t, rows_t> held;
    std::map<int32_t, uint32_t> n_generated;
    std::map<int32_t, uint32_t> n_tail;
    float next = 1.0f;

    walk_t(int seed, bool fused, uint32_t n_buckets) :
        rng(seed), n_buckets(n_buckets) {
        for (int il : { 0, 2 }) {
            headkv_store_layer layer;
            layer.il = il;
            layer.n_head = 2 * H;
            layer.n_head_kv = H;
            layer.n_embd_head_k = D_k;
            layer.n_embd_head_v = D_v;
            layer.type_k = layer.type_v = GGML_TYPE_F32;
            layer.buft = failing_buft();
            layer.fused = fused;
            store.layers.push_back(std::move(layer));
        }
    }

    uint32_t below(uint32_t n) { return rng() % n; }

    void write(headkv_store_layer & layer, const headkv_range & range, uint32_t i, float x) {
        const std::vector<float> row(D_k, x), negative(D_v, -x);
        ggml_backend_tensor_set(layer.k, row.data(), (range.off + i) * layer.k->nb[1], D_k * sizeof(float));
        ggml_backend_tensor_set(layer.v, negative.data(), (range.off + i) * layer.v->nb[1], D_v * sizeof(float));
    }

    void add(int32_t s) {
        rows_t rows(store.layers.size(), std::vector<std::vector<float>>(H));
        n_tail[s] = 1 + below(9);
        for (size_t i = 0; i < store.layers.size(); ++i) {
            auto & layer = store.layers[i];
            std::vector<uint32_t> n_kept;
            for (int ih = 0; ih < H; ++ih) {
                n_kept.push_back(2 + below(40));
            }
            try {
                store.relayout(layer, { { s, { n_kept, n_tail[s], {} } } }, n_buckets);
            } catch (const std::bad_alloc &) {
                store.remove(s, n_buckets); // as a compression that is aborted
                check(!store.has(s), "nothing of it is left", where);
                return;
            }
            for (int ih = 0; ih < H; ++ih) {
                auto & range = layer.ranges[s][ih];
                for (uint32_t j = 0; j < n_kept[ih]; ++j) {
                    range.pos.push_back((int32_t) j);
                    rows[i][ih].push_back(next);
                    write(layer, range, j, next++);
                }
            }
        }
        held[s] = std::move(rows);
        n_generated[s] = 0;
    }

    void generate(int32_t s) {
        if (n_generated[s] >= n_tail[s] && !grow(s)) {
            return;
        }
        for (size_t i = 0; i < store.layers.size(); ++i) {
            for (int ih = 0; ih < H; ++ih) {
                const auto & range = store.layers[i].ranges[s][ih];
                check(range.n_used(n_generated[s]) < range.n_cap, "a free row", where);
                write(store.layers[i], range, range.n_used(n_generated[s]), next);
                held[s][i][ih].push_back(next++);
            }
        }
        n_generated[s]++;
    }

    bool grow(int32_t s) {
        const uint32_t n = n_tail[s] + 1 + below(8);
        for (auto & layer : store.layers) {
            headkv_rows rows;
            rows.n_tail = n;
            for (const auto & range : layer.ranges[s]) {
                rows.n_kept.push_back(range.n_kept);
                rows.n_used.push_back(range.n_used(n_generated[s]));
            }
            try {
                store.relayout(layer, { { s, rows } }, n_buckets);
            } catch (const std::bad_alloc &) {
                return false; // layers before this one have longer tails, which does no harm
            }
        }
        n_tail[s] = n;
        return true;
    }

    void cut(int32_t s) {
        const auto has_none = [](const auto & layer) { return std::any_of(layer.begin(), layer.end(), [](const auto & rows) { return rows.empty(); }); };
        if (n_generated[s] > 0 || std::any_of(held[s].begin(), held[s].end(), has_none)) {
            return; // a head has no prompt cell to let go of
        }
        store.cut(s, 1);
        n_tail[s]++;
        for (auto & layer : held[s]) {
            for (auto & rows : layer) {
                rows.pop_back();
            }
        }
    }

    // as an eviction: of the tail, each head keeps the first rows, as many as it likes
    void settle(int32_t s) {
        for (size_t i = 0; i < store.layers.size(); ++i) {
            for (int ih = 0; ih < H; ++ih) {
                auto & range = store.layers[i].ranges[s][ih];
                auto & rows = held[s][i][ih];
                range.n_kept += below(n_generated[s] + 1);
                range.pos.resize(range.n_kept);
                rows.resize(range.n_kept);
            }
        }
        n_generated[s] = 0;
        n_tail[s] = store.n_tail(s);
    }

    void verify() {
        for (size_t i = 0; i < store.layers.size(); ++i) {
            const auto & layer = store.layers[i];
            std::map<uint32_t, uint32_t> ends; // by first row
            for (const auto & [s, rows] : held) {
                for (int ih = 0; ih < H; ++ih) {
                    const auto & range = layer.ranges[s][ih];
                    ends[range.off] = range.off + range.n_cap;
                    bool same = range.pos.size() == range.n_kept && range.n_used(n_generated[s]) == rows[i][ih].size() && range.n_cap >= rows[i][ih].size();
                    std::vector<float> k(D_k), v(D_v);
                    for (size_t j = 0; same && j < rows[i][ih].size(); ++j) {
                        ggml_backend_tensor_get(layer.k, k.data(), (range.off + j) * layer.k->nb[1], D_k * sizeof(float));
                        ggml_backend_tensor_get(layer.v, v.data(), (range.off + j) * layer.v->nb[1], D_v * sizeof(float));
                        same = k[0] == rows[i][ih][j] && k[D_k - 1] == k[0] && v[0] == -k[0] && v[D_v - 1] == v[0];
                    }
                    check(same, "every row is what was written", where);
                }
            }
            uint32_t before = 0;
            for (const auto & [first, end] : ends) {
                check(first >= before && end <= (uint32_t) layer.k->ne[1], "ranges do not overlap and lie in the pool", where);
                before = end;
            }
        }
        check(store.n_bytes() == n_held, "the bytes that it says are those that are held", where);
    }

    void run(int n_steps) {
        for (int i = 0; i < n_steps; ++i) {
            where = "store, step " + std::to_string(i);
            if (below(40) == 0) {
                allocation_fails = !allocation_fails;
            }
            const int32_t s = (int32_t) below(5);
            if (!held.count(s)) {
                add(s);
            } else {
                switch (below(8)) {
                    case 0:
                        store.remove(s, n_buckets);
                        held.erase(s);
                        check(!store.has(s), "it is gone", where);
                        break;
                    case 1: cut(s); break;
                    case 2: settle(s); break;
                    default: generate(s);
                }
            }
            verify();
        }
        where = "store, end";
        allocation_fails = true; // removing everything needs no memory
        for (int32_t s = 0; s < 5; ++s) {
            store.remove(s, n_buckets);
            held.erase(s);
        }
        allocation_fails = false;
        store.clear();
        verify();
        check(n_held == 0, "all memory is given back", where);
    }
};

int main(int argc, char ** argv) {
    const int n_steps = argc > 1 ? atoi(argv[1]) : 2000;
    test_table();
    test_what_is_pending_dies_with_its_sequence();
    test_a_prompt_that_is_cut();
    test_generated_tokens_that_are_bounded();
    test_references_are_there_whatever_the_length();
    for (const auto & [fused, n_buckets] : std::vector<std::pair<bool, uint32_t>>{ { true, 1 }, { false, 1 }, { false, 3 } }) {
        walk_t(1 + (int) n_buckets + fused, fused, n_buckets).run(n_steps);
    }
    printf("%d of %d checks failed\n", n_failed, n_checks);
    return n_failed > 0;
}
