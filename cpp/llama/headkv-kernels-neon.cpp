#include "headkv-attend-kernel.h"
#include "headkv-attend-prompt-kernel.h"
#include "headkv-fit-kernel.h"
#include "headkv-kernels.h"
#include "headkv-score-kernel.h"

const headkv_kernels * headkv_kernels_neon() {
#if defined(HEADKV_SIMD) && defined(__ARM_NEON)
    static const headkv_kernels kernels = { find_kernel, &prompt_kernel, &score_kernel, &fit_kernel };
    return &kernels;
#else
    return nullptr;
#endif
}
