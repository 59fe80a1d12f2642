#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// FNV-1a
struct headkv_checksum {
    uint64_t value = 0xcbf29ce484222325;

    void add(const void * data, size_t n_bytes) {
        for (size_t i = 0; i < n_bytes; ++i) {
            value = (value ^ ((const uint8_t *) data)[i]) * 0x100000001b3;
        }
    }
    template <typename T>
    void add(const T & x) {
        add(&x, sizeof(x));
    }
};

// A checksum of larger data, eight bytes at a time: each step is one to one, so no single change is missed.
inline uint64_t headkv_checksum_words(uint64_t seed, const void * data, size_t n_bytes) {
    const auto * bytes = (const uint8_t *) data;
    uint64_t res = seed ^ 0xcbf29ce484222325 ^ n_bytes;
    for (size_t i = 0; i < n_bytes; i += sizeof(uint64_t)) {
        uint64_t word = 0;
        std::memcpy(&word, bytes + i, i + sizeof(word) <= n_bytes ? sizeof(word) : n_bytes - i);
        res = ((res << 23 | res >> 41) ^ word) * 0x9e3779b97f4a7c15;
    }
    return res ^ res >> 32;
}
