// Where the blocks of an archive are kept: files of a folder that several processes may share, or host memory. It knows
// names, bytes and when a block was last used, and nothing of what is in them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct headkv_block_file {
    std::string name;
    int64_t n_bytes = 0;
    int64_t t_used_us = 0; // when it was last read or written, since 1970; only its order counts
};

class headkv_blocks {
public:
    virtual ~headkv_blocks() = default;

    // Bytes of a block; -1 = it is not there.
    virtual int64_t size(const std::string & name) const = 0;

    // Whether n bytes at an offset are there and were read. Throws std::runtime_error when nobody knows: it may not be opened, for one.
    virtual bool read(const std::string & name, int64_t offset, void * dst, size_t n) const = 0;

    virtual void will_read(const std::string & name, int64_t offset, size_t n) const = 0; // soon

    // A block in the making, that nobody else sees. The next three throw std::runtime_error with the reason, disk full for one.
    virtual void begin(const std::string & name, int64_t n_bytes) = 0;
    virtual void write(const std::string & name, int64_t offset, const void * src, size_t n) = 0;
    virtual void commit(const std::string & name) = 0; // it is there, whole, from now on

    virtual void discard(const std::string & name) = 0; // one in the making

    virtual void touch(const std::string & name) = 0; // it was used
    virtual bool remove(const std::string & name) = 0; // false: it is still there

    virtual std::vector<headkv_block_file> list() const = 0; // those that are there
    virtual std::vector<std::string> names(const std::string & beginning) const = 0; // of those whose name begins so

    virtual int64_t bytes_begun() const = 0; // of blocks in the making, of any process
};

// A folder, which is made if it is missing; only its owner can read the files. Throws std::runtime_error when that fails.
std::unique_ptr<headkv_blocks> headkv_blocks_in_folder(const std::string & path);

std::unique_ptr<headkv_blocks> headkv_blocks_in_memory();
