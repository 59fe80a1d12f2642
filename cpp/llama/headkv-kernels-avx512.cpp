#include "headkv-attend-kernel.h"
#include "headkv-attend-prompt-kernel.h"
#include "headkv-fit-kernel.h"
#include "headkv-kernels.h"
#include "headkv-score-kernel.h"

const headkv_kernels * headkv_kernels_avx512() {
#if defined(HEADKV_SIMD) && defined(__AVX512F__)
    const bool is_available = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    static const headkv_kernels kernels = { find_kernel, &prompt_kernel, &score_kernel, &fit_kernel };
    return is_available ? &kernels : nullptr;
#else
    return nullptr;
#endif
}
