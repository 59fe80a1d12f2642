// Threads of a GPU as fibres of the CPU, for tests of kernels: what cuda-on-cpu.h and metal-on-cpu.h share.
//
// Blocks run one after the other, the threads of a block are switched at barriers and shuffles. What a device would leave
// undefined stops the program: a barrier or a shuffle that not all threads reach. A warp (of Metal: a SIMD group) runs up to the
// next barrier before the others do, the first warp and block first or the last ones (gpu_cpu::descending): a kernel that lacks a
// barrier gives two different results. Memory errors are left to the address sanitizer, which sees every buffer and every
// shared array.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) :
        x(x), y(y), z(z) {}
};

namespace gpu_cpu {

inline dim3 thread_idx, block_idx, block_dim, grid_dim;
inline bool descending = false;

struct fibre_t {
    ucontext_t ctx; // where it begins
    void * place[5]; // where it goes on
    bool is_begun = false;
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

inline std::vector<fibre_t> fibres; // threads, and behind the last one of the launch its caller
inline int n_threads = 0;
inline int current = 0;
inline int n_idle = 0; // switches since a thread went on
inline group_t block;
inline std::vector<group_t> warps;
inline uint32_t lanes[2][1024]; // what the threads of a warp show each other, by phase
inline std::function<void()> body;

[[noreturn]] inline void fail(const char * what) {
    fprintf(stderr, "gpu-on-cpu: %s, thread %u of block %u,%u\n", what, thread_idx.x, block_idx.x, block_idx.y);
    abort();
}

// what swapcontext() does without asking the system for the mask of signals, which took most of the time of the tests
#define GPU_ON_CPU_JUMPS __attribute__((noinline, no_sanitize("address")))

[[noreturn]] GPU_ON_CPU_JUMPS inline void go_to(fibre_t & to) {
    if (to.is_begun) {
        __builtin_longjmp(to.place, 1);
    }
    to.is_begun = true;
    setcontext(&to.ctx);
    abort();
}

GPU_ON_CPU_JUMPS inline void swap(fibre_t & from, fibre_t & to) {
    if (__builtin_setjmp(from.place) == 0) {
        go_to(to);
    }
}

inline void switch_to(int next) {
    fibre_t & from = fibres[current];
    fibre_t & to = fibres[next];
    current = next;
    thread_idx.x = (unsigned) next;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(from.done ? nullptr : &from.fake, to.bottom, to.size);
#endif
    swap(from, to);
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

// before_block: what happens before each block, such as the loss of its shared memory
template <class F>
void launch(dim3 grid, dim3 threads, F && kernel, const std::function<void()> & before_block = {}) {
    n_threads = (int) threads.x;
    if (n_threads % 32 != 0 || threads.y * threads.z != 1 || n_threads > 1024) {
        fail("blocks are whole warps in one dimension");
    }
    grid_dim = grid;
    block_dim = threads;
    if ((int) fibres.size() <= n_threads) {
        fibres.resize(n_threads + 1);
    }
    for (int i = 0; i < n_threads; ++i) {
        if (!fibres[i].stack) {
            fibres[i].stack.reset(new char[N_STACK]);
        }
        fibres[i].bottom = fibres[i].stack.get();
        fibres[i].size = N_STACK;
    }
    fibre_t & caller = fibres[n_threads];
    caller.done = false;
    caller.is_begun = true;
    caller.fake = nullptr;
    caller.bottom = nullptr;
    body = kernel;
    const unsigned n_blocks = grid.x * grid.y * grid.z;
    for (unsigned i_block = 0; i_block < n_blocks; ++i_block) {
        const unsigned b = descending ? n_blocks - 1 - i_block : i_block;
        if (before_block) {
            before_block();
        }
        block_idx = { b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y };
        block = { n_threads, 0, 0 };
        warps.assign(n_threads / 32, { 32, 0, 0 });
        n_idle = 0;
        for (int i = 0; i < n_threads; ++i) {
            fibre_t & f = fibres[i];
            f.done = f.is_begun = false;
            f.fake = nullptr;
            getcontext(&f.ctx);
            f.ctx.uc_stack.ss_sp = f.stack.get();
            f.ctx.uc_stack.ss_size = N_STACK;
            f.ctx.uc_link = nullptr;
            makecontext(&f.ctx, entry, 0);
#if defined(__SANITIZE_ADDRESS__)
            // or every switch forgets what it knows of the whole stack, which takes most of the time
            __asan_unpoison_memory_region(f.stack.get(), N_STACK);
            f.ctx.uc_stack = {};
#endif
        }
        current = n_threads;
        switch_to(descending ? n_threads - 1 : 0);
    }
}

// Places of barriers, "file:line" or another name, in the order in which they are first reached. One can be left out by number, to see that
// it is needed.
struct barriers_t {
    std::vector<std::string> places;
    int left_out = -1;

    int at(const std::string & place) {
        for (size_t i = 0; i < places.size(); ++i) {
            if (places[i] == place) {
                return (int) i;
            }
        }
        places.push_back(place);
        return (int) places.size() - 1;
    }
};

// of all threads of a block; one number for each place, found once
#define GPU_ON_CPU_BARRIER(barriers)                                                                                                              \
    do {                                                                                                                                          \
        static const int at = (barriers).at(std::string(__FILE__).substr(std::string(__FILE__).rfind('/') + 1) + ":" + std::to_string(__LINE__)); \
        if ((barriers).left_out != at) {                                                                                                          \
            gpu_cpu::wait(gpu_cpu::block);                                                                                                        \
        }                                                                                                                                         \
    } while (false)

// the values of the 32 lanes, until the next call of this kind
template <class T>
const uint32_t * show(T x) {
    static_assert(sizeof(T) == sizeof(uint32_t), "32 bits");
    group_t & warp = warps[current / 32];
    if (warp.n != 32) {
        fail("lanes of the warp have left");
    }
    uint32_t * shown = lanes[warp.phase % 2] + current / 32 * 32;
    memcpy(shown + current % 32, &x, sizeof(x));
    wait(warp);
    return shown;
}

// the value of another lane, or the own one where there is none
template <class T>
T exchange(T x, int lane) {
    const uint32_t * shown = show(x);
    if (lane >= 0 && lane < 32) {
        memcpy(&x, shown + lane, sizeof(x));
    }
    return x;
}

} // namespace gpu_cpu
