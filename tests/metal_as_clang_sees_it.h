// What a kernel of cpp/ggml-metal may use of Metal's language, as declarations for Clang: address spaces are types of their own here, so
// that a pointer into one of them is no pointer into another. Read by tests/test_metal.py, runs nowhere; metal-on-cpu.h is what runs.
#pragma once

#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread

typedef int int32_t;
typedef signed char int8_t;
typedef unsigned long uint64_t;
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long ulong;

typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef uint uint4 __attribute__((ext_vector_type(4)));
struct half {
    ushort bits;
    explicit operator float() const;
};

namespace metal {

template <class To, class From> To as_type(From);
template <class T> T min(T, T);
template <class T> T max(T, T);
float sqrt(float);
namespace precise {
float exp(float);
}

enum class mem_flags { mem_none,
    mem_device,
    mem_threadgroup };
void threadgroup_barrier(mem_flags);

template <class T> T simd_sum(T);
template <class T> T simd_min(T);
template <class T> T simd_max(T);
template <class T> T simd_prefix_inclusive_sum(T);
template <class T> T simd_shuffle(T, ushort);
template <class T> T simd_shuffle_xor(T, ushort);

} // namespace metal

enum memory_order { memory_order_relaxed };
struct atomic_int {
    int value;
};
void atomic_store_explicit(threadgroup atomic_int *, int, memory_order);
int atomic_load_explicit(threadgroup const atomic_int *, memory_order);
int atomic_fetch_add_explicit(threadgroup atomic_int *, int, memory_order);
