#include "headkv-attend-kernel.h"
#include "headkv-attend-prompt-kernel.h"
#include "headkv-fit-kernel.h"
#include "headkv-score-kernel.h"

headkv_attend_kernel headkv_attend_kernel_neon(ggml_type type_k, ggml_type type_v, int n_embd_head_k, int n_embd_head_v) {
#if defined(HEADKV_SIMD) && defined(__ARM_NEON)
    return find_kernel(type_k, type_v, n_embd_head_k, n_embd_head_v);
#else
    GGML_UNUSED(type_k);
    GGML_UNUSED(type_v);
    GGML_UNUSED(n_embd_head_k);
    GGML_UNUSED(n_embd_head_v);
    return nullptr;
#endif
}

const headkv_score_kernel * headkv_score_kernel_neon() {
#if defined(HEADKV_SIMD) && defined(__ARM_NEON)
    return &score_kernel;
#else
    return nullptr;
#endif
}

const headkv_fit_kernel * headkv_fit_kernel_neon() {
#if defined(HEADKV_SIMD) && defined(__ARM_NEON)
    return &fit_kernel;
#else
    return nullptr;
#endif
}

const headkv_prompt_kernel * headkv_prompt_kernel_neon() {
#if defined(HEADKV_SIMD) && defined(__ARM_NEON)
    return &prompt_kernel;
#else
    return nullptr;
#endif
}
