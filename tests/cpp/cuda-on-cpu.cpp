// The kernels of cpp/ggml-cuda, compiled for the CPU: what headkv-cuda.cu is on a device.
#include "cuda-on-cpu.h"

#include "headkv-attend.cuh"
#include "headkv-score.cuh"
#include "headkv-select.cuh"

bool cuda_on_cpu_supports(const ggml_tensor * op) {
    switch (headkv_op_get(op).kind) {
        case HEADKV_OP_ATTEND: return headkv::attend_supports(op);
        case HEADKV_OP_STATS:
        case HEADKV_OP_SCORE: return headkv::score_supports(op);
        case HEADKV_OP_SELECT: return headkv::select_supports(op);
        default: return false;
    }
}

void cuda_on_cpu_compute(ggml_tensor * op, bool descending) {
    gpu_cpu::descending = descending;
int cuda_on_cpu_n_barriers() { return (int) cuda_cpu::barriers.places.size(); }
const char * cuda_on_cpu_barrier(int i) { return cuda_cpu::barriers.places.at(i).c_str(); }
void cuda_on_cpu_leave_out(int i) { cuda_cpu::barriers.left_out = i; }


    // every tensor in memory of its own, for the address sanitizer
    ggml_tensor dst = *op;
    std::vector<ggml_tensor> srcs(GGML_MAX_SRC);
    std::vector<std::vector<char>> data;
    data.emplace_back((char *) op->data, (char *) op->data + ggml_nbytes(op));
    dst.data = data.back().data();
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        if (op->src[i]) {
            srcs[i] = *op->src[i];
            data.emplace_back((char *) srcs[i].data, (char *) srcs[i].data + ggml_nbytes(&srcs[i]));
            srcs[i].data = data.back().data();
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
        default: GGML_ABORT("not an op of ours");
    }
    memcpy(op->data, dst.data, data.front().size());
}
