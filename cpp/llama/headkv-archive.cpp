#include "headkv-archive.h"

#include "headkv-checksum.h"

#include "ggml-backend.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

static constexpr uint32_t MAGIC = 0x62616b68; // "hkab"
static constexpr uint32_t VERSION = 1;

namespace {

struct fixed_header {
    uint32_t magic;
    uint32_t version;
    uint32_t n_rows;
    uint32_t n_layers;
    uint64_t seed;
    uint64_t n_tokens;
    char model[64];
};
static_assert(sizeof(fixed_header) == 96, "no padding");

struct timer {
    int64_t & sum;
    const int64_t start = ggml_time_us();

    explicit timer(int64_t & sum) :
        sum(sum) {}
    ~timer() { sum += ggml_time_us() - start; }
};

} // namespace

static size_t n_bytes_header(size_t n_layers, size_t n_tokens) {
    return sizeof(fixed_header) + n_layers * 2 * sizeof(int64_t) + n_tokens * sizeof(llama_token) + sizeof(uint64_t);
}

//
// layout
//

size_t headkv_archive_layout::n_bytes(size_t i_layer, bool v) const {
    const layer_t & layer = layers[i_layer];
    return ggml_row_size(kept_as(v ? layer.type_v : layer.type_k), v ? layer.n_v : layer.n_k);
}

size_t headkv_archive_layout::n_bytes_staged(size_t i_layer, bool v) const {
    const layer_t & layer = layers[i_layer];
    return ggml_row_size(v ? layer.type_v : layer.type_k, v ? layer.n_v : layer.n_k);
}

size_t headkv_archive_layout::n_bytes_section(size_t i_layer, uint32_t n_rows) const {
    return n_rows * (n_bytes(i_layer, false) + n_bytes(i_layer, true)) + sizeof(uint64_t);
}

size_t headkv_archive_layout::n_bytes_block(uint32_t n_tokens, uint32_t n_rows) const {
    return offset(layers.size(), n_tokens, n_rows);
}

size_t headkv_archive_layout::offset(size_t i_layer, uint32_t n_tokens, uint32_t n_rows) const {
    size_t res = n_bytes_header(layers.size(), n_tokens);
    for (size_t i = 0; i < i_layer; ++i) {
        res += n_bytes_section(i, n_rows);
    }
    return res;
}

// rows of one type as another one
static void convert(ggml_type from, const uint8_t * src, ggml_type to, uint8_t * dst, int64_t n_rows, int64_t n_row) {
    if (from == to) {
        std::memcpy(dst, src, n_rows * ggml_row_size(from, n_row));
        return;
    }
    std::vector<float> values(n_rows * n_row);
    if (from == GGML_TYPE_F32) {
        std::memcpy(values.data(), src, values.size() * sizeof(float));
    } else {
        ggml_get_type_traits(from)->to_float(src, values.data(), (int64_t) values.size());
    }
    ggml_quantize_chunk(to, values.data(), dst, 0, n_rows, n_row, nullptr);
}

//
// names
//

headkv_archive::headkv_archive(std::unique_ptr<headkv_blocks> blocks, int64_t max_bytes, headkv_archive_layout layout) :
    blocks(std::move(blocks)), layout(std::move(layout)) {
    numbers.size = sizeof(numbers);
    numbers.max_bytes = max_bytes;
    count();
}

uint64_t headkv_archive::begin_chain(uint64_t adapters) const {
    return headkv_checksum_words(layout.seed, &adapters, sizeof(adapters));
}

static constexpr size_t N_NAME = 16; // digits of a checksum

// what the names of the blocks begin with that follow a chain
static std::string name_of(uint64_t chain) {
    return format("%016llx-", (unsigned long long) chain);
}

headkv_archive::named_t headkv_archive::next_block(uint64_t & chain, const std::vector<llama_token> & tokens, uint32_t n_tokens, uint32_t n_rows) const {
    const uint64_t seed = chain;
    chain = headkv_checksum_words(chain, tokens.data() + n_tokens - n_rows, n_rows * sizeof(llama_token));

    named_t res;
    res.name = name_of(seed) + name_of(chain).substr(0, N_NAME);
    res.header.resize(n_bytes_header(layout.layers.size(), n_tokens));

    fixed_header fixed = { MAGIC, VERSION, n_rows, (uint32_t) layout.layers.size(), seed, n_tokens, {} };
    std::memcpy(fixed.model, layout.model.data(), std::min(layout.model.size(), sizeof(fixed.model) - 1));
    uint8_t * to = res.header.data();
    const auto add = [&to](const void * data, size_t n) { std::memcpy(to, data, n); to += n; };
    add(&fixed, sizeof(fixed));
    for (size_t i = 0; i < layout.layers.size(); ++i) {
        for (bool v : { false, true }) {
            const int64_t n = (int64_t) (n_rows * layout.n_bytes(i, v));
            add(&n, sizeof(n));
        }
    }
    add(tokens.data(), n_tokens * sizeof(llama_token));
    res.sum = headkv_checksum_words(0, res.header.data(), to - res.header.data());
    add(&res.sum, sizeof(res.sum));
    return res;
}

//
// reading
//

void headkv_archive_hit::cut(uint32_t n) {
    n_tokens = n;
    while (!blocks.empty() && blocks.back().n_tokens - blocks.back().n_rows >= n) {
        blocks.pop_back();
    }
}

headkv_archive_hit headkv_archive::find(const std::vector<llama_token> & tokens, uint32_t n_max, uint64_t adapters) {
    headkv_archive_hit res;
    std::vector<std::string> names;
    uint64_t chain = begin_chain(adapters);
    n_max -= n_max % HEADKV_N_STEP;
    while (res.n_tokens < n_max) {
        const uint32_t n = res.n_tokens + HEADKV_N_BLOCK;
        uint64_t next = chain;
        const named_t block = n <= tokens.size() ? next_block(next, tokens, n, HEADKV_N_BLOCK) : named_t();
        if (!block.name.empty() && has(block, n, HEADKV_N_BLOCK)) {
            res.blocks.push_back({ block.name, block.sum, n, HEADKV_N_BLOCK });
            res.n_tokens = std::min(n, n_max);
            chain = next;
            names.push_back(block.name);
            continue;
        }
        const partial_t partial = find_partial(chain, tokens, res.n_tokens);
        const uint32_t n_common = std::min(res.n_tokens + partial.n_common, n_max) - res.n_tokens;
        if (n_common >= HEADKV_N_STEP) {
            res.blocks.push_back(partial.block);
            res.n_tokens += n_common - n_common % HEADKV_N_STEP;
            names.push_back(partial.block.name);
        }
        break;
    }
    touch(names);
    return res;
}

// Of the blocks behind the same tokens, the one that has most in common with the prompt.
headkv_archive::partial_t headkv_archive::find_partial(uint64_t chain, const std::vector<llama_token> & tokens, uint32_t n_before) {
    partial_t res;
    for (const auto & name : blocks->names(name_of(chain))) {
        fixed_header fixed = {};
        std::vector<llama_token> its(tokens.begin(), tokens.begin() + n_before);
        const bool has_rows = blocks->read(name, 0, &fixed, sizeof(fixed)) && fixed.n_rows > 0 && fixed.n_rows <= HEADKV_N_BLOCK;
        const uint32_t n = n_before + (has_rows ? fixed.n_rows : 0);
        its.resize(n);
        const int64_t offset = (int64_t) (n_bytes_header(layout.layers.size(), n_before) - sizeof(uint64_t));
        uint64_t next = chain;
        const bool is_read = has_rows && blocks->read(name, offset, its.data() + n_before, fixed.n_rows * sizeof(its[0]));
        const named_t block = is_read ? next_block(next, its, n, fixed.n_rows) : named_t();
        if (block.name != name) {
            note_damaged(name);
            continue;
        }
        const auto differ = std::mismatch(its.begin() + n_before, its.end(), tokens.begin() + n_before, tokens.end());
        const auto n_common = (uint32_t) (differ.first - its.begin()) - n_before;
        if (n_common > res.n_common && has(block, n, fixed.n_rows)) {
            res = { { name, block.sum, n, fixed.n_rows }, n_common };
        }
    }
    return res;
}

bool headkv_archive::has(const named_t & block, uint32_t n_tokens, uint32_t n_rows) {
    const int64_t n_bytes = blocks->size(block.name);
    if (n_bytes < 0) {
        return false;
    }
    std::vector<uint8_t> found(block.header.size());
    if (n_bytes == (int64_t) layout.n_bytes_block(n_tokens, n_rows) && blocks->read(block.name, 0, found.data(), found.size()) && found == block.header) {
        return true;
    }
    note_damaged(block.name);
    return false;
}

void headkv_archive::restore(const headkv_archive_hit & hit, size_t i_layer, uint32_t n_skip, const take_fn & take) {
    const timer t(numbers.t_read_us);
    const auto & layer = layout.layers[i_layer];
    std::vector<uint8_t> raw, staged;
    for (const auto & block : hit.blocks) {
        if (block.n_tokens <= n_skip) {
            continue;
        }
        const size_t n_k = block.n_rows * layout.n_bytes(i_layer, false);
        raw.resize(layout.n_bytes_section(i_layer, block.n_rows));
        const bool is_there = blocks->read(block.name, (int64_t) layout.offset(i_layer, block.n_tokens, block.n_rows), raw.data(), raw.size());
        const size_t n_rows = raw.size() - sizeof(uint64_t); // bytes
        uint64_t sum = 0;
        std::memcpy(&sum, raw.data() + n_rows, sizeof(sum));
        if (!is_there || sum != headkv_checksum_words(block.sum + i_layer, raw.data(), n_rows)) {
            note_damaged(block.name);
            throw std::runtime_error(format("block %s of the archive is %s", block.name.c_str(), is_there ? "damaged" : "gone"));
        }
        numbers.bytes_read += (int64_t) raw.size();
        for (bool is_v : { false, true }) {
            const ggml_type type = is_v ? layer.type_v : layer.type_k;
            const uint8_t * from = raw.data() + (is_v ? n_k : 0);
            if (layout.kept_as(type) != type) {
                staged.resize(block.n_rows * layout.n_bytes_staged(i_layer, is_v));
                convert(layout.kept_as(type), from, type, staged.data(), block.n_rows, is_v ? layer.n_v : layer.n_k);
                from = staged.data();
            }
            const uint32_t first = block.n_tokens - block.n_rows;
            const uint32_t begin = std::max(first, n_skip);
            take(is_v, begin, std::min(block.n_tokens, hit.n_tokens) - begin, from + (begin - first) * layout.n_bytes_staged(i_layer, is_v));
        }
    }
}

void headkv_archive::will_restore(const headkv_archive_hit & hit, size_t i_layer, uint32_t n_skip) const {
    for (const auto & block : hit.blocks) {
        if (block.n_tokens <= n_skip) {
            continue;
        }
        blocks->will_read(block.name, (int64_t) layout.offset(i_layer, block.n_tokens, block.n_rows), layout.n_bytes_section(i_layer, block.n_rows));
    }
}

void headkv_archive::note_prompt(uint32_t n_restored, uint32_t n_computed) {
    numbers.n_restored += n_restored;
    numbers.n_computed += n_computed;
}

void headkv_archive::note_damaged(const std::string & name) {
    LLAMA_LOG_WARN("headkv: block %s of the archive is damaged, foreign or gone: it is removed, and its tokens are read\n", name.c_str());
    blocks->remove(name);
    numbers.n_damaged++;
}

//
// room
//

void headkv_archive::touch(const std::vector<std::string> & names) {
    std::for_each(names.rbegin(), names.rend(), [this](const std::string & name) { blocks->touch(name); });
}

static void sort_by_use(std::vector<headkv_block_file> & files) {
    std::sort(files.begin(), files.end(), [](const auto & a, const auto & b) { return std::tie(a.t_used_us, a.name) < std::tie(b.t_used_us, b.name); });
}

static int64_t sum_bytes(const std::vector<headkv_block_file> & files) {
    return std::accumulate(files.begin(), files.end(), (int64_t) 0, [](int64_t sum, const auto & file) { return sum + file.n_bytes; });
}

int64_t headkv_prune_blocks(headkv_blocks & blocks, int64_t max_bytes, const std::set<std::string> & stay) {
    auto files = blocks.list();
    int64_t n_held = sum_bytes(files);
    int64_t res = 0;
    sort_by_use(files);
    for (const auto & file : files) {
        if (n_held <= max_bytes) {
            break;
        }
        if (stay.count(file.name) == 0 && blocks.remove(file.name)) {
            n_held -= file.n_bytes;
            res++;
        }
    }
    return res;
}

void headkv_archive::make_room(int64_t n_bytes, const std::vector<std::string> & chain) {
    numbers.n_evicted += headkv_prune_blocks(*blocks, numbers.max_bytes - n_bytes - blocks->bytes_begun(), { chain.begin(), chain.end() });
}

void headkv_archive::count() {
    const auto files = blocks->list();
    numbers.n_blocks = (int64_t) files.size();
    numbers.bytes = sum_bytes(files);
}

void headkv_archive::note_failure(const std::string & what) {
    numbers.n_failed++;
    if (what != last_failure) {
        LLAMA_LOG_WARN("headkv: the archive is not written: %s; prompts are read without it\n", what.c_str());
        last_failure = what;
    }
}

//
// writing
//

headkv_archive_writer::headkv_archive_writer(headkv_archive & archive, const std::vector<llama_token> & tokens, uint64_t adapters,
        const headkv_archive_hit & in_use, uint32_t n_known) :
    archive(archive) {
    const timer t(archive.numbers.t_write_us);
    try {
        uint64_t state = archive.begin_chain(adapters);
        int64_t n_chain = 0; // bytes
        int64_t n_new = 0;
        std::vector<headkv_archive::named_t> named;
        const auto n_all = (uint32_t) (tokens.size() - tokens.size() % HEADKV_N_STEP);
        for (uint32_t first = 0; first < n_all; first += HEADKV_N_BLOCK) {
            const uint32_t n_rows = std::min(HEADKV_N_BLOCK, n_all - first);
            const uint32_t n = first + n_rows;
            const uint64_t before = state;
            if (n_rows < HEADKV_N_BLOCK && archive.find_partial(before, tokens, first).n_common >= n_rows) {
                break; // a longer one has it
            }
            headkv_archive::named_t block = archive.next_block(state, tokens, n, n_rows);
            const int64_t n_bytes = (int64_t) archive.layout.n_bytes_block(n, n_rows);
            if (n_bytes > archive.numbers.max_bytes) {
                throw std::runtime_error(format("a block takes %lld bytes, and all of it may take %lld", (long long) n_bytes, (long long) archive.numbers.max_bytes));
            }
            if (n_chain + n_bytes > archive.numbers.max_bytes) {
                break; // a longer prompt than the archive holds: its beginning
            }
            n_chain += n_bytes;
            chain.push_back(block.name);
            if (archive.blocks->size(block.name) == n_bytes || first < n_known) {
                continue;
            }
            for (uint32_t n_end = HEADKV_N_STEP; n_end < n_rows; n_end += HEADKV_N_STEP) {
                uint64_t end = before;
                replaced.push_back(archive.next_block(end, tokens, first + n_end, n_end).name);
            }
            n_new += n_bytes;
            todo.push_back({ block.name, block.sum, n, n_rows });
            named.push_back(std::move(block));
        }
        auto stay = chain;
        std::transform(in_use.blocks.begin(), in_use.blocks.end(), std::back_inserter(stay), [](const auto & block) { return block.name; });
        archive.make_room(n_new, stay);
        for (size_t i = 0; i < todo.size(); ++i) {
            archive.blocks->begin(todo[i].name, (int64_t) archive.layout.n_bytes_block(todo[i].n_tokens, todo[i].n_rows));
            archive.blocks->write(todo[i].name, 0, named[i].header.data(), named[i].header.size());
        }
    } catch (const std::exception & e) {
        fail(e.what());
    }
}

headkv_archive_writer::~headkv_archive_writer() {
    discard();
}

void headkv_archive_writer::discard() {
    for (const auto & block : todo) {
        archive.blocks->discard(block.name);
    }
    todo.clear();
}

void headkv_archive_writer::fail(const std::string & what) {
    archive.note_failure(what);
    discard();
    failed = true;
}

void headkv_archive_writer::layer(size_t i_layer, const give_fn & give) {
    const timer t(archive.numbers.t_write_us);
    const auto & layout = archive.layout;
    const auto & shape = layout.layers[i_layer];
    std::vector<uint8_t> raw, staged;
    try {
        for (const auto & block : todo) {
            raw.resize(layout.n_bytes_section(i_layer, block.n_rows));
            for (bool is_v : { false, true }) {
                const ggml_type type = is_v ? shape.type_v : shape.type_k;
                uint8_t * to = raw.data() + (is_v ? block.n_rows * layout.n_bytes(i_layer, false) : 0);
                staged.resize(block.n_rows * layout.n_bytes_staged(i_layer, is_v));
                give(is_v, block.n_tokens - block.n_rows, block.n_rows, staged.data());
                convert(type, staged.data(), layout.kept_as(type), to, block.n_rows, is_v ? shape.n_v : shape.n_k);
            }
            const size_t n_rows = raw.size() - sizeof(uint64_t); // bytes
            const uint64_t sum = headkv_checksum_words(block.sum + i_layer, raw.data(), n_rows);
            std::memcpy(raw.data() + n_rows, &sum, sizeof(sum));
            archive.blocks->write(block.name, (int64_t) layout.offset(i_layer, block.n_tokens, block.n_rows), raw.data(), raw.size());
            archive.numbers.bytes_written += (int64_t) raw.size();
        }
    } catch (const std::exception & e) {
        fail(e.what());
    }
}

void headkv_archive_writer::commit() {
    const timer t(archive.numbers.t_write_us);
    try {
        for (const auto & block : todo) {
            archive.blocks->commit(block.name);
        }
        todo.clear();
        if (!failed) {
            for (const auto & name : replaced) {
                archive.blocks->remove(name);
            }
            archive.touch(chain);
            archive.make_room(0, chain); // others may have written meanwhile
        }
        archive.count();
    } catch (const std::exception & e) {
        fail(e.what());
    }
}

//
// without a context
//

// why a block is none, empty = it is one; with what its header says
static std::string why_damaged(const headkv_blocks & blocks, headkv_archive_entry & entry, bool deep) {
    fixed_header fixed;
    if (!blocks.read(entry.file.name, 0, &fixed, sizeof(fixed)) || fixed.magic != MAGIC || fixed.version != VERSION) {
        return "it is none of this version";
    }
    fixed.model[sizeof(fixed.model) - 1] = 0;
    entry.model = fixed.model;
    entry.n_tokens = (int64_t) fixed.n_tokens;
    const uint64_t n_most = (uint64_t) entry.file.n_bytes;
    if (fixed.n_tokens > n_most / sizeof(llama_token) || fixed.n_layers > n_most / (2 * sizeof(int64_t)) ||
            n_bytes_header(fixed.n_layers, fixed.n_tokens) > n_most) {
        return "its header is longer than the file";
    }
    if (!deep) {
        return "";
    }
    std::vector<uint8_t> header(n_bytes_header(fixed.n_layers, fixed.n_tokens));
    uint64_t sum = 0;
    const bool is_read = blocks.read(entry.file.name, 0, header.data(), header.size());
    std::memcpy(&sum, header.data() + header.size() - sizeof(sum), sizeof(sum));
    if (!is_read || sum != headkv_checksum_words(0, header.data(), header.size() - sizeof(sum))) {
        return "its header is damaged";
    }
    const size_t n_own = std::min<uint64_t>(fixed.n_rows, fixed.n_tokens) * sizeof(llama_token);
    const uint64_t chain = headkv_checksum_words(fixed.seed, header.data() + header.size() - sizeof(sum) - n_own, n_own);
    if (entry.file.name != name_of(fixed.seed) + name_of(chain).substr(0, N_NAME)) {
        return "its name is that of another one";
    }
    std::vector<int64_t> sizes(2 * (size_t) fixed.n_layers);
    std::memcpy(sizes.data(), header.data() + sizeof(fixed), sizes.size() * sizeof(int64_t));
    std::vector<uint8_t> raw;
    int64_t offset = (int64_t) header.size();
    for (size_t i = 0; i < fixed.n_layers; ++i) {
        if (sizes[2 * i] < 0 || sizes[2 * i + 1] < 0 || sizes[2 * i] > (int64_t) n_most || sizes[2 * i + 1] > (int64_t) n_most) {
            return "its header is damaged";
        }
        const size_t n = (size_t) (sizes[2 * i] + sizes[2 * i + 1]);
        raw.resize(std::min<size_t>(n, n_most) + sizeof(uint64_t));
        uint64_t found = 0;
        const bool is_there = raw.size() == n + sizeof(found) && blocks.read(entry.file.name, offset, raw.data(), raw.size());
        std::memcpy(&found, raw.data() + raw.size() - sizeof(found), sizeof(found));
        if (!is_there || found != headkv_checksum_words(sum + i, raw.data(), n)) {
            return format("layer %zu of %u is damaged", i, fixed.n_layers);
        }
        offset += (int64_t) raw.size();
    }
    return offset == entry.file.n_bytes ? "" : "it is longer than its header says";
}

void headkv_list_blocks(const headkv_blocks & blocks, bool deep, const std::function<bool(const headkv_archive_entry &)> & tell) {
    auto files = blocks.list();
    sort_by_use(files);
    for (const auto & file : files) {
        headkv_archive_entry entry;
        entry.file = file;
        try {
            entry.damaged = why_damaged(blocks, entry, deep);
        } catch (const std::exception & e) {
            entry.damaged = format("it cannot be read: %s", e.what());
        }
        if (!tell(entry)) {
            return;
        }
    }
}
