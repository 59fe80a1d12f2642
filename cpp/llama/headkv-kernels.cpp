#include "headkv-kernels.h"

#include <cstring>

const headkv_kernels * headkv_kernels_portable() {
    static const headkv_kernels kernels = { headkv_attend_kernel_portable, headkv_prompt_kernel_portable(), headkv_score_kernel_portable(), headkv_fit_kernel_portable() };
    return &kernels;
}

// What get() finds in the fastest instruction set of the machine that has it; name (may be null) asks for one of them.
template <typename F>
static auto find(const char * name, const F & get) -> decltype(get(headkv_kernels())) {
    static const struct {
        const char * name;
        const headkv_kernels * (*of_machine)();
    } sets[] = {
        { "avx512", headkv_kernels_avx512 },
        { "avx2", headkv_kernels_avx2 },
        { "neon", headkv_kernels_neon },
        { "portable", headkv_kernels_portable },
    };
    for (const auto & set : sets) {
        const headkv_kernels * kernels = name && strcmp(name, set.name) != 0 ? nullptr : set.of_machine();
        if (const auto res = kernels ? get(*kernels) : nullptr) {
            return res;
        }
    }
    return nullptr;
}

headkv_attend_kernel headkv_attend_kernel_find(ggml_type type_k, ggml_type type_v, int n_embd_head_k, int n_embd_head_v, const char * name) {
    return find(name, [&](const headkv_kernels & k) { return k.attend(type_k, type_v, n_embd_head_k, n_embd_head_v); });
}

const headkv_prompt_kernel * headkv_prompt_kernel_find(const char * name) {
    return find(name, [](const headkv_kernels & k) { return k.prompt; });
}

const headkv_score_kernel * headkv_score_kernel_find(const char * name) {
    return find(name, [](const headkv_kernels & k) { return k.score; });
}

const headkv_fit_kernel * headkv_fit_kernel_find(const char * name) {
    return find(name, [](const headkv_kernels & k) { return k.fit; });
}
