// The kernels of cpp/ggml-cuda, compiled for the CPU: what headkv-cuda.cu is on a device.
#include "cuda-on-cpu.h"

#include "headkv-attend.cuh"
#include "headkv-compact.cuh"
#include "headkv-score.cuh"
#include "headkv-select.cuh"

bool cuda_on_cpu_supports(const ggml_tensor * op) {
    switch (headkv_op_get(op).kind) {
        case HEADKV_OP_ATTEND: return headkv::attend_supports(op);
        case HEADKV_OP_STATS:
        case HEADKV_OP_SCORE: return headkv::score_supports(op);
        case HEADKV_OP_SELECT: return headkv::select_supports(op);
        case HEADKV_OP_COMPACT: return headkv::compact_supports(op);
        default: return false;
    }
}

int cuda_on_cpu_n_barriers() { return (int) cuda_cpu::barriers.places.size(); }
const char * cuda_on_cpu_barrier(int i) { return cuda_cpu::barriers.places.at(i).c_str(); }
void cuda_on_cpu_leave_out(int i) { cuda_cpu::barriers.left_out = i; }

void cuda_on_cpu_compute(ggml_tensor * op, bool descending) {
    gpu_cpu::descending = descending;

    // every tensor in memory of its own, for the address sanitizer, and aligned as it is; those that are too large stay where they are
    ggml_tensor dst = *op;
    std::vector<ggml_tensor> srcs(GGML_MAX_SRC);
    std::vector<std::vector<char>> data;
    const auto copy = [&](ggml_tensor & t) {
        const size_t n_bytes = ggml_nbytes(&t), n_before = (uintptr_t) t.data % 16;
        if (n_bytes < (size_t) 1 << 30) {
            data.emplace_back(n_before + n_bytes);
            memcpy(data.back().data() + n_before, t.data, n_bytes);
            t.data = data.back().data() + n_before;
        }
    };
    copy(dst);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        if (op->src[i]) {
            srcs[i] = *op->src[i];
            copy(srcs[i]);
            dst.src[i] = &srcs[i];
        }
    }
    const void * stream = nullptr;
    const auto scratch = [](size_t n_bytes) { return std::vector<float>(n_bytes / sizeof(float), NAN); };
    switch (headkv_op_get(op).kind) {
        case HEADKV_OP_ATTEND: headkv::attend_run(&dst, scratch(headkv::attend_scratch(&dst)).data(), stream); break;
        case HEADKV_OP_STATS:
        case HEADKV_OP_SCORE: headkv::score_run(&dst, scratch(headkv::score_scratch(&dst)).data(), stream); break;
        case HEADKV_OP_SELECT: headkv::select_run(&dst, stream); break;
        case HEADKV_OP_COMPACT: headkv::compact_run(&dst, stream); break;
        default: GGML_ABORT("not an op of ours");
    }
    if (dst.data != op->data) {
        memcpy(op->data, dst.data, ggml_nbytes(op));
    }
}
