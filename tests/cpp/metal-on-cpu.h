// Runs Metal kernels on the CPU, for tests: enough of the language for the sources in cpp/ggml-metal and nothing more.
//
// Whether address spaces are right is checked with Clang (tests/test_metal.py). A threadgroup's memory is NaN when it begins.
#pragma once

#include "gpu-on-cpu.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <utility>

namespace metal_cpu {

inline gpu_cpu::barriers_t barriers;

} // namespace metal_cpu

#define threadgroup_barrier(flags)                                                                                 \
    do {                                                                                                           \
        static_assert((flags) == mem_flags::mem_threadgroup, "what the kernels share lies in threadgroup memory"); \
        GPU_ON_CPU_BARRIER(metal_cpu::barriers);                                                                   \
    } while (false)

namespace metal {

typedef unsigned int uint;
typedef unsigned short ushort;
typedef uint64_t ulong;

struct alignas(8) uint2 {
    uint x, y;
};
struct alignas(16) uint3 {
    uint x, y, z;
};
struct alignas(16) uint4 {
    uint x, y, z, w;
};

struct half {
    uint16_t bits;
    explicit operator float() const { return ggml_fp16_to_fp32(bits); }
};

template <class To, class From> To as_type(From x) {
    static_assert(sizeof(To) == sizeof(From), "the same number of bits");
    To res;
    memcpy(&res, &x, sizeof(res));
    return res;
}

template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
inline float sqrt(float x) { return std::sqrt(x); }

namespace precise {
inline float exp(float x) { return std::exp(x); }
} // namespace precise

enum class mem_flags { mem_none,
    mem_device,
    mem_threadgroup };

enum memory_order { memory_order_relaxed };

struct atomic_int {
    int value;
};
inline void atomic_store_explicit(volatile atomic_int * p, int x, memory_order) { p->value = x; }
inline int atomic_load_explicit(const volatile atomic_int * p, memory_order) { return p->value; }
inline int atomic_fetch_add_explicit(volatile atomic_int * p, int x, memory_order) {
    const int res = p->value;
    p->value = res + x;
    return res;
}

// over the lanes 0 to n - 1, in order
template <class T, class F> T over_lanes(T x, int n, const F & f) {
    const uint32_t * shown = gpu_cpu::show(x);
    T res, y;
    memcpy(&res, shown, sizeof(res));
    for (int i = 1; i < n; ++i) {
        memcpy(&y, shown + i, sizeof(y));
        res = f(res, y);
    }
    return res;
}
template <class T> T simd_sum(T x) {
    return over_lanes(x, 32, [](T a, T b) { return a + b; });
}
template <class T> T simd_min(T x) { return over_lanes(x, 32, min<T>); }
template <class T> T simd_max(T x) { return over_lanes(x, 32, max<T>); }
template <class T> T simd_prefix_inclusive_sum(T x) {
    return over_lanes(x, gpu_cpu::current % 32 + 1, [](T a, T b) { return a + b; });
}
template <class T> T simd_shuffle(T x, ushort lane) { return gpu_cpu::exchange(x, lane); }
template <class T> T simd_shuffle_xor(T x, ushort mask) { return gpu_cpu::exchange(x, (gpu_cpu::current % 32) ^ mask); }

} // namespace metal

namespace metal_cpu {

// what an encoder has when a kernel is dispatched
struct bound {
    std::vector<char> args;
    std::vector<char *> buffers; // from index 1 on
    std::vector<size_t> shared;  // bytes
    dim3 grid, threads;
};

// threadgroup memory, each in a place of its own, for the address sanitizer
typedef std::vector<std::unique_ptr<char[]>> shared_memory;

// Parameter i of the n of a kernel: arguments, buffers, threadgroup memory, then where the thread is.
template <class P> struct parameter {
    static P get(const bound & b, const shared_memory & shared, size_t i, size_t n) {
        if constexpr (std::is_reference_v<P>) {
            if (i != 0 || sizeof(std::remove_reference_t<P>) != b.args.size()) {
                gpu_cpu::fail("a kernel has other arguments than the encoder gave");
            }
            return *(std::remove_reference_t<P> *) b.args.data();
        } else if constexpr (std::is_pointer_v<P>) {
            const bool is_shared = std::is_volatile_v<std::remove_pointer_t<P>>;
            if (i == 0 || i > n - 5 || is_shared != (i > b.buffers.size())) {
                gpu_cpu::fail("a kernel has a buffer in another place than the encoder");
            }
            return (P) (is_shared ? shared[i - 1 - b.buffers.size()].get() : b.buffers[i - 1]);
        } else if constexpr (std::is_same_v<P, metal::uint3>) {
            return { gpu_cpu::block_idx.x, gpu_cpu::block_idx.y, gpu_cpu::block_idx.z };
        } else {
            const P at = (P) gpu_cpu::current;
            return i == n - 3 ? at : i == n - 2 ? at / 32
                                                : at % 32;
        }
    }
};

template <class... P, size_t... I>
void run(void (*kernel)(P...), const bound & b, std::index_sequence<I...>) {
    constexpr size_t n = sizeof...(P);
    if (n != 1 + b.buffers.size() + b.shared.size() + 4) {
        gpu_cpu::fail("a kernel has other parameters than the encoder gave");
    }
    shared_memory shared;
    for (size_t size : b.shared) {
        shared.emplace_back(new char[size]);
    }
    const auto before_block = [&]() {
        for (size_t i = 0; i < shared.size(); ++i) {
            memset(shared[i].get(), 0xff, b.shared[i]);
        }
    };
    gpu_cpu::launch(b.grid, b.threads, [&]() { kernel(parameter<P>::get(b, shared, I, n)...); }, before_block);
}

struct kernel_t {
    std::string name;
    int type, d, nq; // definitions before the source; 0 = none
    std::function<void(const bound &)> run;
};

// metal-on-cpu-kernels.cpp
const std::vector<kernel_t> & kernels();

template <class... P> kernel_t make_kernel(const char * name, int type, int d, int nq, void (*kernel)(P...)) {
    return { name, type, d, nq, [kernel](const bound & b) { run(kernel, b, std::index_sequence_for<P...>()); } };
}

} // namespace metal_cpu
