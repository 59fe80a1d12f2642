// Runs CUDA kernels on the CPU, for tests: enough of the language for the sources in cpp/ggml-cuda and nothing more.
//
// Blocks run one after the other, the threads of a block as fibres that are switched at barriers and shuffles. What a
// device would leave undefined stops the program: a barrier or a shuffle that not all threads reach. A warp runs up to the
// next barrier before the others do, the first warp first or the last one (cuda_cpu::descending): a kernel that lacks a
// barrier gives two different results. Memory errors are left to the address sanitizer, which sees every buffer and every
// shared array.
#pragma once

#define HEADKV_CUDA_ON_CPU

#include "ggml.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static // one block at a time
#define __launch_bounds__(n)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) :
        x(x), y(y), z(z) {}
};

namespace cuda_cpu {

inline dim3 thread_idx, block_idx, block_dim, grid_dim;
inline bool descending = false;

struct fibre_t {
    ucontext_t ctx;
    std::unique_ptr<char[]> stack;
    bool done = true;
    void * fake = nullptr; // of the address sanitizer
    const void * bottom = nullptr;
    size_t size = 0;
};

// threads that wait for each other
struct group_t {
    int n = 0; // alive
    int n_arrived = 0;
    int phase = 0;
};

constexpr size_t N_STACK = 128 * 1024;

inline std::vector<fibre_t> fibres; // the last one is the caller
inline int n_threads = 0;
inline int current = 0;
inline int n_idle = 0; // switches since a thread went on
inline group_t block;
inline std::vector<group_t> warps;
inline uint32_t lanes[2][1024]; // what the threads of a warp show each other, by phase
inline std::function<void()> body;

[[noreturn]] inline void fail(const char * what) {
    fprintf(stderr, "cuda-on-cpu: %s, thread %u of block %u,%u\n", what, thread_idx.x, block_idx.x, block_idx.y);
    abort();
}

inline void switch_to(int next) {
    fibre_t & from = fibres[current];
    fibre_t & to = fibres[next];
    current = next;
    thread_idx.x = (unsigned) next;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(from.done ? nullptr : &from.fake, to.bottom, to.size);
#endif
    swapcontext(&from.ctx, &to.ctx);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

// to the next one of n threads that is not done, in the order of the run; false = there is no other one
inline bool yield(int first, int n) {
    for (int i = 1; i < n; ++i) {
        const int next = first + (current - first + (descending ? n - i : i)) % n;
        if (!fibres[next].done) {
            switch_to(next);
            return true;
        }
    }
    return false;
}

inline void wait(group_t & group) {
    const int phase = group.phase;
    if (++group.n_arrived == group.n) {
        group.n_arrived = 0;
        group.phase++;
        n_idle = 0;
        return;
    }
    while (group.phase == phase) {
        const bool in_warp = &group != &block;
        if (++n_idle > 4 * n_threads || !yield(in_warp ? current / 32 * 32 : 0, in_warp ? 32 : n_threads)) {
            fail("not all threads reach the barrier or the shuffle");
        }
    }
}

inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
    const void * bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!fibres[n_threads].bottom) { // the first one comes from the caller
        fibres[n_threads].bottom = bottom;
        fibres[n_threads].size = size;
    }
#endif
    body();
    fibres[current].done = true;
    n_idle = 0;
    group_t & warp = warps[current / 32];
    block.n--;
    warp.n--;
    for (group_t * group : { &block, &warp }) { // a thread that has left no longer holds up the others
        if (group->n > 0 && group->n_arrived == group->n) {
            group->n_arrived = 0;
            group->phase++;
        }
    }
    if (!yield(0, n_threads)) {
        switch_to(n_threads);
    }
    abort();
}

template <class F>
void launch(dim3 grid, dim3 threads, F && kernel) {
    n_threads = (int) threads.x;
    if (n_threads % 32 != 0 || threads.y * threads.z != 1 || n_threads > 1024) {
        fail("blocks are whole warps in one dimension");
    }
    grid_dim = grid;
    block_dim = threads;
    fibres.clear();
    fibres.resize(n_threads + 1);
    for (int i = 0; i < n_threads; ++i) {
        fibres[i].stack.reset(new char[N_STACK]);
        fibres[i].bottom = fibres[i].stack.get();
        fibres[i].size = N_STACK;
    }
    fibres[n_threads].done = false;
    body = kernel;
    for (unsigned b = 0; b < grid.x * grid.y * grid.z; ++b) {
        block_idx = { b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y };
        block = { n_threads, 0, 0 };
        warps.assign(n_threads / 32, { 32, 0, 0 });
        n_idle = 0;
        for (int i = 0; i < n_threads; ++i) {
            fibre_t & f = fibres[i];
            f.done = false;
            f.fake = nullptr;
            getcontext(&f.ctx);
            f.ctx.uc_stack.ss_sp = f.stack.get();
            f.ctx.uc_stack.ss_size = N_STACK;
            f.ctx.uc_link = nullptr;
            makecontext(&f.ctx, entry, 0);
        }
        current = n_threads;
        switch_to(descending ? n_threads - 1 : 0);
    }
}

// the value of another lane
template <class T>
T exchange(T x, int lane) {
    static_assert(sizeof(T) == sizeof(uint32_t), "32 bits");
    group_t & warp = warps[current / 32];
    if (warp.n != 32) {
        fail("lanes of the warp have left");
    }
    uint32_t * shown = lanes[warp.phase % 2] + current / 32 * 32;
    memcpy(shown + current % 32, &x, sizeof(x));
    wait(warp);
    if (lane >= 0 && lane < 32) {
        memcpy(&x, shown + lane, sizeof(x));
    }
    return x;
}

} // namespace cuda_cpu

#define threadIdx cuda_cpu::thread_idx
#define blockIdx cuda_cpu::block_idx
#define blockDim cuda_cpu::block_dim
#define gridDim cuda_cpu::grid_dim

#define HEADKV_UNPAREN(...) __VA_ARGS__
#define HEADKV_LAUNCH(kernel, grid, block, stream, ...)                               \
    do {                                                                              \
        (void) stream;                                                                \
        cuda_cpu::launch(grid, block, [&]() { HEADKV_UNPAREN kernel(__VA_ARGS__); }); \
    } while (false)

inline void __syncthreads() { cuda_cpu::wait(cuda_cpu::block); }

template <class T> T __shfl_sync(unsigned, T x, int lane) { return cuda_cpu::exchange(x, lane); }
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) { return cuda_cpu::exchange(x, (cuda_cpu::current % 32) ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T x, int n) { return cuda_cpu::exchange(x, cuda_cpu::current % 32 - n); }

inline unsigned __ballot_sync(unsigned, int predicate) {
    unsigned res = 0;
    const int base = cuda_cpu::current / 32 * 32;
    const uint32_t * shown = cuda_cpu::lanes[cuda_cpu::warps[base / 32].phase % 2] + base;
    cuda_cpu::exchange((uint32_t) (predicate != 0), -1);
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
