#include "headkv-cuda.h"

#include "headkv-attend.cuh"
#include "headkv-compact.cuh"
#include "headkv-score.cuh"
#include "headkv-select.cuh"

#include "ggml-cuda/common.cuh" // as upstream's ggml-cuda.cu, whose include directories these sources are compiled with

bool headkv_cuda_supports(const ggml_tensor * op) {
    const headkv_op known = headkv_op_get(op);
    if (known.max_bias > 0.0f) {
        return false; // ALiBi is the CPU's
    }
    switch (known.kind) {
        case HEADKV_OP_ATTEND: return headkv::attend_supports(op);
        case HEADKV_OP_STATS:
        case HEADKV_OP_SCORE: return headkv::score_supports(op);
        case HEADKV_OP_SELECT: return headkv::select_supports(op);
        case HEADKV_OP_COMPACT: return headkv::compact_supports(op);
        default: return false;
    }
}

bool headkv_cuda_compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!headkv_cuda_supports(dst)) {
        return false;
    }
    switch (headkv_op_get(dst).kind) {
        case HEADKV_OP_ATTEND: {
            ggml_cuda_pool_alloc<char> scratch(ctx.pool(), headkv::attend_scratch(dst));
            headkv::attend_run(dst, (float *) scratch.get(), ctx.stream());
        } break;
        case HEADKV_OP_STATS:
        case HEADKV_OP_SCORE: {
            ggml_cuda_pool_alloc<char> scratch(ctx.pool(), headkv::score_scratch(dst));
            headkv::score_run(dst, (float *) scratch.get(), ctx.stream());
        } break;
        case HEADKV_OP_SELECT: {
            headkv::select_run(dst, ctx.stream());
        } break;
        case HEADKV_OP_COMPACT: {
            headkv::compact_run(dst, ctx.stream());
        } break;
        default:
            return false;
    }
    CUDA_CHECK(cudaGetLastError());
    return true;
}
