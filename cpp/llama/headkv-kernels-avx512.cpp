#include "headkv-attend-kernel.h"
#include "headkv-attend-prompt-kernel.h"
#include "headkv-fit-kernel.h"
#include "headkv-score-kernel.h"

#if defined(HEADKV_SIMD) && defined(__AVX512F__)
static bool is_available() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

headkv_attend_kernel headkv_attend_kernel_avx512(ggml_type type_k, ggml_type type_v, int n_embd_head_k, int n_embd_head_v) {
#if defined(HEADKV_SIMD) && defined(__AVX512F__)
    if (is_available()) {
        return find_kernel(type_k, type_v, n_embd_head_k, n_embd_head_v);
    }
#endif
    GGML_UNUSED(type_k);
    GGML_UNUSED(type_v);
    GGML_UNUSED(n_embd_head_k);
    GGML_UNUSED(n_embd_head_v);
    return nullptr;
}

const headkv_score_kernel * headkv_score_kernel_avx512() {
#if defined(HEADKV_SIMD) && defined(__AVX512F__)
    if (is_available()) {
        return &score_kernel;
    }
#endif
    return nullptr;
}

const headkv_fit_kernel * headkv_fit_kernel_avx512() {
#if defined(HEADKV_SIMD) && defined(__AVX512F__)
    if (is_available()) {
        return &fit_kernel;
    }
#endif
    return nullptr;
}

const headkv_prompt_kernel * headkv_prompt_kernel_avx512() {
#if defined(HEADKV_SIMD) && defined(__AVX512F__)
    if (is_available()) {
        return &prompt_kernel;
    }
#endif
    return nullptr;
}
