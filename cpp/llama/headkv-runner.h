// Small graphs beside those of upstream: on the backends of a context, with memory of their own that is gone afterwards.
#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include "headkv-store.h"

#include <cstdint>
#include <vector>

struct llama_context;

bool headkv_is_cpu(ggml_backend_buffer_type_t buft);

// whether the device runs an op; of ours, whether it knows it
bool headkv_device_supports(ggml_backend_buffer_type_t buft, const ggml_tensor * op);

// whether the device of a layer runs the fused attention: a CPU calls its function, any other has to know the op
bool headkv_can_attend_fused(const headkv_store_layer & layer);

// tensors in a buffer of their own
struct headkv_scratch {
    ggml_context_ptr ctx;
    ggml_backend_buffer_ptr buf;

    headkv_scratch();

    ggml_tensor * new_tensor(ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1);

    void alloc(ggml_backend_buffer_type_t buft); // throws std::bad_alloc

    size_t n_bytes() const { return buf ? ggml_backend_buffer_get_size(buf.get()) : 0; }
};

class headkv_runner {
public:
    ggml_context_ptr ctx;          // of the graph
    ggml_cgraph * gf = nullptr;

    explicit headkv_runner(llama_context * lctx);

    void begin(); // a new graph

    void run(); // throws std::bad_alloc, or std::runtime_error when it was aborted or cannot be computed

    size_t n_bytes() const; // of its memory

private:
    static constexpr int N_NODES = 1024;

    ggml_backend_sched_ptr sched;
    std::vector<uint8_t> meta;
};

template <typename T>
void headkv_set_data(ggml_tensor * t, const std::vector<T> & data) {
    if (!data.empty()) {
        ggml_backend_tensor_set(t, data.data(), 0, data.size() * sizeof(T));
    }
}

template <typename T>
std::vector<T> headkv_get_data(const ggml_tensor * t, size_t n) {
    std::vector<T> res(n);
    if (n > 0) {
        ggml_backend_tensor_get(t, res.data(), 0, n * sizeof(T));
    }
    return res;
}
