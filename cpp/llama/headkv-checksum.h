#pragma once

#include <cstddef>
#include <cstdint>

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
