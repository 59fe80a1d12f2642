// Runs CUDA kernels on the CPU, for tests: enough of the language for the sources in cpp/ggml-cuda and nothing more.
#pragma once

#define HEADKV_CUDA_ON_CPU

#include "gpu-on-cpu.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static // one block at a time
#define __launch_bounds__(n)


#define threadIdx gpu_cpu::thread_idx
#define blockIdx gpu_cpu::block_idx
#define blockDim gpu_cpu::block_dim
#define gridDim gpu_cpu::grid_dim

#define HEADKV_UNPAREN(...) __VA_ARGS__
#define HEADKV_LAUNCH(kernel, grid, block, stream, ...)                              \
    do {                                                                             \
        (void) stream;                                                               \
        gpu_cpu::launch(grid, block, [&]() { HEADKV_UNPAREN kernel(__VA_ARGS__); }); \
    } while (false)

namespace cuda_cpu {

inline gpu_cpu::barriers_t barriers;

} // namespace cuda_cpu

#define __syncthreads() GPU_ON_CPU_BARRIER(cuda_cpu::barriers)

template <class T> T __shfl_sync(unsigned, T x, int lane) { return gpu_cpu::exchange(x, lane); }
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) { return gpu_cpu::exchange(x, (gpu_cpu::current % 32) ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T x, int n) { return gpu_cpu::exchange(x, gpu_cpu::current % 32 - n); }

inline unsigned __ballot_sync(unsigned, int predicate) {
    unsigned res = 0;
    const uint32_t * shown = gpu_cpu::show((uint32_t) (predicate != 0));
    for (int i = 0; i < 32; ++i) {
        res |= shown[i] << i;
    }
    return res;
}

template <class T> T atomicAdd(T * p, T x) {
    const T res = *p;
    *p += x;
    return res;
}

using std::max;
using std::min;

inline int __ffs(unsigned x) { return __builtin_ffs((int) x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __uint_as_float(unsigned x) {
    float res;
    memcpy(&res, &x, sizeof(res));
    return res;
}
inline unsigned __float_as_uint(float x) {
    unsigned res;
    memcpy(&res, &x, sizeof(res));
    return res;
}

struct __half {
    uint16_t bits;
};
inline __half __ushort_as_half(unsigned short x) { return { x }; }
inline float __half2float(__half x) { return ggml_fp16_to_fp32(x.bits); }
