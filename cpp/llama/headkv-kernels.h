// The kernels of an instruction set: each headkv-kernels-*.cpp compiles the same loops with other flags.
#pragma once

#include "headkv-attend-prompt.h"
#include "headkv-attend.h"
#include "headkv-fit.h"
#include "headkv-score.h"

struct headkv_kernels {
    headkv_attend_kernel (*attend)(ggml_type type_k, ggml_type type_v, int n_embd_head_k, int n_embd_head_v); // null = not for these types and sizes
    const headkv_prompt_kernel * prompt;
    const headkv_score_kernel * score;
    const headkv_fit_kernel * fit;
};

// each returns null when the file was built without its instruction set or the machine lacks it
const headkv_kernels * headkv_kernels_avx512();
const headkv_kernels * headkv_kernels_avx2();
const headkv_kernels * headkv_kernels_neon();
const headkv_kernels * headkv_kernels_portable();
