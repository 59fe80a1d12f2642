#include "headkv-blocks.h"

#include "llama-impl.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>

#if defined(_WIN32)
#include <io.h>
#include <process.h>
#else
#include <csignal>
#include <fcntl.h>
#include <unistd.h>
#endif

namespace fs = std::filesystem;

static int64_t now_us() {
    return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

//
// a folder
//

// NAME.kv is a block, NAME.PID-NUMBER.part one in the making. Nothing else in the folder is looked at.
static const std::string SUFFIX = ".kv";
static const std::string SUFFIX_PART = ".part";

static int64_t process_id() {
#if defined(_WIN32)
    return _getpid();
#else
    return getpid();
#endif
}

static bool is_running(int64_t pid) {
#if defined(_WIN32)
    (void) pid;
    return true; // its age will tell
#else
    return kill((pid_t) pid, 0) == 0 || errno != ESRCH;
#endif
}

// those of this process that are in the making: another one that had its number may have left some
static std::mutex own_mutex;
static std::set<fs::path> own_parts;

static void note_own(const fs::path & path, bool begins) {
    const std::lock_guard<std::mutex> lock(own_mutex);
    begins ? (void) own_parts.insert(path) : (void) own_parts.erase(path);
}

static bool is_own(const fs::path & path) {
    const std::lock_guard<std::mutex> lock(own_mutex);
    return own_parts.count(path) > 0;
}

// as the archive gives them: two numbers of 16 hexadecimal digits
static bool is_name(const std::string & stem) {
    const auto is_digit = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
    return stem.size() == 33 && stem[16] == '-' && std::all_of(stem.begin(), stem.begin() + 16, is_digit) && std::all_of(stem.begin() + 17, stem.end(), is_digit);
}

// NAME.PID-NUMBER; the process, 0 = it is none
static int64_t process_of(const std::string & stem) {
    const size_t dot = stem.find('.');
    if (dot == std::string::npos || !is_name(stem.substr(0, dot))) {
        return 0;
    }
    const size_t dash = stem.find('-', dot);
    const auto is_number = [](const std::string & s) { return !s.empty() && s.size() < 19 && s.find_first_not_of("0123456789") == std::string::npos; };
    const bool is_part = dash != std::string::npos && is_number(stem.substr(dot + 1, dash - dot - 1)) && is_number(stem.substr(dash + 1));
    return is_part ? std::atoll(stem.c_str() + dot + 1) : 0;
}

static bool ends_with(const std::string & text, const std::string & end) {
    return text.size() > end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

namespace {

using file_ptr = std::unique_ptr<FILE, int (*)(FILE *)>;

class folder : public headkv_blocks {
public:
    explicit folder(const std::string & path) :
        root(fs::absolute(fs::u8path(path))) {
        make();
        root = fs::canonical(root); // other spellings of it have the same parts
        remove_stale();
    }

    ~folder() override {
        while (!parts.empty()) {
            discard(parts.begin()->first);
        }
    }

    int64_t size(const std::string & name) const override {
        std::error_code error;
        const auto res = fs::file_size(block(name), error);
        return error ? -1 : (int64_t) res;
    }

    bool read(const std::string & name, int64_t offset, void * dst, size_t n) const override {
        const file_ptr file = open(block(name), "rb");
        check(file || errno == ENOENT || errno == ENOTDIR, block(name));
        return file && seek(file.get(), offset) && std::fread(dst, 1, n, file.get()) == n;
    }

    void will_read(const std::string & name, int64_t offset, size_t n) const override {
#if defined(POSIX_FADV_WILLNEED)
        if (const file_ptr file = open(block(name), "rb")) {
            posix_fadvise(fileno(file.get()), offset, (off_t) n, POSIX_FADV_WILLNEED);
        }
#else
        (void) name;
        (void) offset;
        (void) n;
#endif
    }

    void begin(const std::string & name, int64_t n_bytes) override {
        static std::atomic<int64_t> n_begun{ 0 };
        make();
        const fs::path path = root / (name + "." + std::to_string(process_id()) + "-" + std::to_string(n_begun++) + SUFFIX_PART);
        discard(name);
        parts[name] = path;
        note_own(path, true);
        file_ptr file(nullptr, std::fclose);
#if defined(_WIN32)
        file = open(path, "wbx");
#else
        const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        file.reset(fd < 0 ? nullptr : fdopen(fd, "wb"));
#endif
        check(file != nullptr, root); // not its own name, which is another one each time: what is said already is not said again
        file.reset();
        std::error_code error;
        fs::resize_file(path, (uintmax_t) n_bytes, error);
        if (error) {
            throw std::runtime_error(path.u8string() + ": " + error.message());
        }
    }

    void write(const std::string & name, int64_t offset, const void * src, size_t n) override {
        const fs::path & path = parts.at(name);
        file_ptr file = open(path, "r+b");
        check(file && seek(file.get(), offset) && std::fwrite(src, 1, n, file.get()) == n, root);
        check(std::fclose(file.release()) == 0, root);
    }

    void commit(const std::string & name) override {
        std::error_code error;
        fs::rename(parts.at(name), block(name), error);
        if (error) {
            throw std::runtime_error(block(name).u8string() + ": " + error.message());
        }
        note_own(parts.at(name), false);
        parts.erase(name);
    }

    void discard(const std::string & name) override {
        const auto part = parts.find(name);
        if (part != parts.end()) {
            std::error_code error;
            fs::remove(part->second, error);
            note_own(part->second, false);
            parts.erase(part);
        }
    }

    void touch(const std::string & name) override {
        std::error_code error;
        fs::last_write_time(block(name), fs::file_time_type::clock::now(), error);
    }

    bool remove(const std::string & name) override {
        std::error_code error;
        fs::remove(block(name), error);
        return !error;
    }

    std::vector<headkv_block_file> list() const override {
        std::vector<headkv_block_file> res;
        each(SUFFIX, [&](const fs::directory_entry & entry, const std::string & stem) {
            std::error_code error;
            const auto t = entry.last_write_time(error);
            const auto n_bytes = error ? 0 : entry.file_size(error);
            if (is_name(stem) && !error) { // else it has just been removed
                res.push_back({ stem, (int64_t) n_bytes, (int64_t) std::chrono::duration_cast<std::chrono::microseconds>(t - fs::file_time_type::clock::now()).count() + now_us() });
            }
        });
        return res;
    }

    std::vector<std::string> names(const std::string & beginning) const override {
        std::vector<std::string> res;
        each(SUFFIX, [&](const fs::directory_entry &, const std::string & stem) {
            if (is_name(stem) && stem.compare(0, beginning.size(), beginning) == 0) {
                res.push_back(stem);
            }
        });
        std::sort(res.begin(), res.end());
        return res;
    }

    int64_t bytes_begun() const override {
        int64_t res = 0;
        each(SUFFIX_PART, [&](const fs::directory_entry & entry, const std::string & stem) {
            std::error_code error;
            const auto n_bytes = process_of(stem) > 0 ? entry.file_size(error) : 0;
            res += error ? 0 : (int64_t) n_bytes;
        });
        return res;
    }

private:
    fs::path root;
    std::map<std::string, fs::path> parts; // in the making, by name

    fs::path block(const std::string & name) const { return root / (name + SUFFIX); }

    static file_ptr open(const fs::path & path, const char * mode) {
#if defined(_WIN32)
        return file_ptr(_wfopen(path.c_str(), std::wstring(mode, mode + std::strlen(mode)).c_str()), std::fclose);
#else
        return file_ptr(std::fopen(path.c_str(), mode), std::fclose);
#endif
    }

    static bool seek(FILE * file, int64_t offset) {
#if defined(_WIN32)
        return _fseeki64(file, offset, SEEK_SET) == 0;
#else
        return fseeko(file, (off_t) offset, SEEK_SET) == 0;
#endif
    }

    static void check(bool ok, const fs::path & path) {
        if (!ok) {
            throw std::runtime_error(path.u8string() + ": " + std::strerror(errno));
        }
    }

    void make() const {
        std::error_code error;
        if (fs::create_directories(root, error)) {
            fs::permissions(root, fs::perms::owner_all, error);
        }
        if (!fs::is_directory(root)) {
            throw std::runtime_error(root.u8string() + ": " + (error ? error.message() : "it is not a folder"));
        }
    }

    template <typename F>
    void each(const std::string & suffix, const F & f) const {
        std::error_code error;
        fs::directory_iterator it(root, error);
        for (; !error && it != fs::directory_iterator(); it.increment(error)) {
            const std::string name = it->path().filename().u8string();
            if (ends_with(name, suffix)) {
                f(*it, name.substr(0, name.size() - suffix.size()));
            }
        }
        if (error && error != std::errc::no_such_file_or_directory) {
            throw std::runtime_error(root.u8string() + ": " + error.message());
        }
    }

    // what a process left that was killed
    void remove_stale() const {
        const auto now = fs::file_time_type::clock::now();
        each(SUFFIX_PART, [&](const fs::directory_entry & entry, const std::string & stem) {
            std::error_code error;
            const auto age = now - entry.last_write_time(error);
            const int64_t pid = process_of(stem);
            if (pid == 0) {
                return;
            }
            const bool is_left = pid == process_id() ? !is_own(entry.path()) : !is_running(pid) || age > std::chrono::hours(24);
            if (!error && is_left) {
                fs::remove(entry.path(), error);
            }
        });
    }
};

//
// memory
//

class memory : public headkv_blocks {
public:
    int64_t size(const std::string & name) const override {
        const auto it = blocks.find(name);
        return it == blocks.end() ? -1 : (int64_t) it->second.data.size();
    }

    bool read(const std::string & name, int64_t offset, void * dst, size_t n) const override {
        const auto it = blocks.find(name);
        if (it == blocks.end() || offset < 0 || (uint64_t) offset + n > it->second.data.size()) {
            return false;
        }
        std::memcpy(dst, it->second.data.data() + offset, n);
        return true;
    }

    void will_read(const std::string &, int64_t, size_t) const override {}

    void begin(const std::string & name, int64_t n_bytes) override {
        try {
            parts[name].data.resize((size_t) n_bytes);
        } catch (const std::bad_alloc &) {
            throw std::runtime_error(format("not enough memory for %.1f MiB", n_bytes / 1024.0 / 1024.0));
        }
    }

    void write(const std::string & name, int64_t offset, const void * src, size_t n) override {
        std::memcpy(parts.at(name).data.data() + offset, src, n);
    }

    void commit(const std::string & name) override {
        auto part = parts.extract(name);
        part.mapped().t_used = ++n_used;
        blocks.erase(name);
        blocks.insert(std::move(part));
    }

    void discard(const std::string & name) override { parts.erase(name); }

    void touch(const std::string & name) override {
        const auto it = blocks.find(name);
        if (it != blocks.end()) {
            it->second.t_used = ++n_used;
        }
    }

    bool remove(const std::string & name) override {
        blocks.erase(name);
        return true;
    }

    std::vector<headkv_block_file> list() const override {
        std::vector<headkv_block_file> res;
        for (const auto & [name, block] : blocks) {
            res.push_back({ name, (int64_t) block.data.size(), block.t_used });
        }
        return res;
    }

    std::vector<std::string> names(const std::string & beginning) const override {
        std::vector<std::string> res;
        for (auto it = blocks.lower_bound(beginning); it != blocks.end() && it->first.compare(0, beginning.size(), beginning) == 0; ++it) {
            res.push_back(it->first);
        }
        return res;
    }

    int64_t bytes_begun() const override {
        int64_t res = 0;
        for (const auto & it : parts) {
            res += (int64_t) it.second.data.size();
        }
        return res;
    }

private:
    struct block_t {
        std::vector<uint8_t> data;
        int64_t t_used = 0;
    };
    std::map<std::string, block_t> blocks;
    std::map<std::string, block_t> parts;
    int64_t n_used = 0;
};

} // namespace

std::unique_ptr<headkv_blocks> headkv_blocks_in_folder(const std::string & path) {
    return std::make_unique<folder>(path);
}

std::unique_ptr<headkv_blocks> headkv_blocks_in_memory() {
    return std::make_unique<memory>();
}
