// How saved sequences are written and read: numbers as they are in memory, a checksum of all of it, and arrays in steps, so that a
// length that lies allocates no more than the file has.
#pragma once

#include "headkv-checksum.h"
#include "headkv-config.h"
#include "headkv-generated.h"
#include "headkv-seq.h"
#include "headkv-store.h"

#include "llama-impl.h"
#include "llama-io.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

struct headkv_writer {
    llama_io_write_i & io;
    headkv_checksum sum;
    std::vector<uint8_t> raw;

    void bytes(const void * data, size_t n_bytes) {
        if (n_bytes > 0) { // of an empty vector data is null
            sum.add(data, n_bytes);
            io.write(data, n_bytes);
        }
    }
    template <typename T>
    void number(const T & x) {
        bytes(&x, sizeof(x));
    }
    void rows(const ggml_tensor * t, uint32_t off, uint32_t n_rows) {
        raw.resize(n_rows * t->nb[1]);
        if (n_rows > 0) {
            ggml_backend_tensor_get(t, raw.data(), off * t->nb[1], raw.size());
        }
        bytes(raw.data(), raw.size());
    }
};

struct headkv_reader {
    llama_io_read_i & io;
    headkv_checksum sum;

    void bytes(void * data, size_t n_bytes) {
        if (n_bytes > 0) {
            io.read(data, n_bytes);
            sum.add(data, n_bytes);
        }
    }
    template <typename T>
    T number() {
        T x;
        bytes(&x, sizeof(x));
        return x;
    }
    template <typename T>
    std::vector<T> array(size_t n) {
        const size_t n_step = (64 << 10) / sizeof(T);
        std::vector<T> res;
        while (res.size() < n) {
            const size_t n_have = res.size();
            res.resize(n_have + std::min(n_step, n - n_have));
            bytes(res.data() + n_have, (res.size() - n_have) * sizeof(T));
        }
        return res;
    }
    template <typename T>
    void expect(T value, const char * what) {
        const T x = number<T>();
        if (x != value) {
            throw std::runtime_error(format("%s is %lld, that of this context is %lld", what, (long long) x, (long long) value));
        }
    }
};

// Queries of the last generated tokens, [i_layer] n rows of a ring.
struct headkv_saved_queries {
    uint32_t n = 0;
    std::vector<std::vector<uint8_t>> of_layer;
};

// What bounds the generated tokens of a sequence, and what the next eviction looks at; headkv-generated-state.cpp
void headkv_write_generated(headkv_writer & to, const headkv_seq & seq, llama_seq_id seq_id, const headkv_queries & queries, const headkv_store & store);

// seq: its numbers of tokens are read; what bounds it is set. Throws when it is damaged, or not what the configuration goes on with.
headkv_saved_queries headkv_read_generated(headkv_reader & from, headkv_seq & seq, const headkv_queries & queries, const headkv_store & store, const headkv_config_ptr & cfg);

void headkv_put_queries(const headkv_saved_queries & saved, llama_seq_id seq_id, headkv_seq & seq, const headkv_queries & queries);
