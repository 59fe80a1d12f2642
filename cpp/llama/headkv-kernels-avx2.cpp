#include "headkv-attend-kernel.h"
#include "headkv-attend-prompt-kernel.h"
#include "headkv-fit-kernel.h"
#include "headkv-kernels.h"
#include "headkv-score-kernel.h"

const headkv_kernels * headkv_kernels_avx2() {
#if defined(HEADKV_SIMD) && defined(__AVX2__) && !defined(__AVX512F__)
    static const headkv_kernels kernels = { find_kernel, &prompt_kernel, &score_kernel, &fit_kernel };
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernels : nullptr;
#else
    return nullptr;
#endif
}
