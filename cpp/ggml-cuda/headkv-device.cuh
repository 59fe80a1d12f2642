// What the kernels share. They know nothing of ggml-cuda: tests/cpp/cuda-on-cpu.h compiles the same source for the CPU.
#pragma once

#ifndef HEADKV_CUDA_ON_CPU
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define HEADKV_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

#include "ggml.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace headkv {

constexpr unsigned ALL_LANES = 0xffffffffu;

constexpr int N_THREADS = 128; // of a block
constexpr int N_WARPS = N_THREADS / 32;
constexpr int N_TILE = 128; // rows that a block scores at a time

static __device__ __forceinline__ float warp_max(float x) {
    for (int o = 16; o > 0; o /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, o));
    }
    return x;
}

static __device__ __forceinline__ float warp_sum(float x) {
    for (int o = 16; o > 0; o /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, o);
    }
    return x;
}

// sum over the lanes up to this one
static __device__ __forceinline__ int warp_scan(int x) {
    for (int o = 1; o < 32; o *= 2) {
        const int y = __shfl_up_sync(ALL_LANES, x, o);
        x += (int) (threadIdx.x % 32) >= o ? y : 0;
    }
    return x;
}

//
// Rows of K and V. load() converts N elements from element i on, N and i multiples of 2 and i of N.
//

template <int N_BYTES> struct alignas(N_BYTES) words_t {
    uint32_t w[N_BYTES / 4];
};

struct row_f16 {
    template <int N> static __device__ __forceinline__ void load(const char * row, int i, float * x) {
        const words_t<2 * N> t = *(const words_t<2 * N> *) (row + 2 * i);
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            x[j] = __half2float(__ushort_as_half((unsigned short) (t.w[j / 2] & 0xffff)));
            x[j + 1] = __half2float(__ushort_as_half((unsigned short) (t.w[j / 2] >> 16)));
        }
    }
};

struct row_bf16 {
    template <int N> static __device__ __forceinline__ void load(const char * row, int i, float * x) {
        const words_t<2 * N> t = *(const words_t<2 * N> *) (row + 2 * i);
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            x[j] = __uint_as_float(t.w[j / 2] << 16);
            x[j + 1] = __uint_as_float(t.w[j / 2] & 0xffff0000u);
        }
    }
};

struct row_q8_0 { // blocks of 32: f16 scale, 32 x int8; nothing is aligned to more than 2 bytes
    template <int N> static __device__ __forceinline__ void load(const char * row, int i, float * x) {
        const uint16_t * block = (const uint16_t *) (row + (i / 32) * 34);
        const float scale = __half2float(__ushort_as_half(block[0]));
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            const uint16_t t = block[1 + (i % 32 + j) / 2];
            x[j] = scale * (float) (int8_t) (t & 0xff);
            x[j + 1] = scale * (float) (int8_t) (t >> 8);
        }
    }
};

// run(shape_t<D, Row>()) of the head size and the type that a tensor has
template <int D_, class Row_> struct shape_t {
    static constexpr int D = D_;
    typedef Row_ Row;
};

template <class Row, class F> void with_head_size(int D, const F & run) {
    switch (D) {
        case 64: return run(shape_t<64, Row>());
        case 80:
            if constexpr (!std::is_same_v<Row, row_q8_0>) { // rows of 80 are not whole blocks
                return run(shape_t<80, Row>());
            }
            break;
        case 96: return run(shape_t<96, Row>());
        case 128: return run(shape_t<128, Row>());
        case 256: return run(shape_t<256, Row>());
    }
    GGML_ABORT("head size %d", D);
}

template <class F> void with_shape(ggml_type type, int D, const F & run) {
    switch (type) {
        case GGML_TYPE_F16: return with_head_size<row_f16>(D, run);
        case GGML_TYPE_BF16: return with_head_size<row_bf16>(D, run);
        case GGML_TYPE_Q8_0: return with_head_size<row_q8_0>(D, run);
        default: GGML_ABORT("type %s", ggml_type_name(type));
    }
}

// p[r*NQ + j] = q[j] . row r for n <= N_TILE rows, by the whole block. Four lanes share a row, which they read 8 elements
// at a time, and each takes two rows at once. Rows lie rows[r]*nb bytes behind k, or r*nb without rows.
template <int D, int NQ, class Row>
static __device__ __forceinline__ void tile_dots(const float * q, const char * k, size_t nb, const int32_t * rows, int n, float * p) {
    constexpr int N_STEP = N_THREADS / 4;

    const int sub = threadIdx.x % 4;
    for (int r0 = 0; r0 < n; r0 += 2 * N_STEP) {
        const int r[2] = { r0 + (int) threadIdx.x / 4, r0 + (int) threadIdx.x / 4 + N_STEP };
        const char * row[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int ri = min(r[i], n - 1); // all lanes take part in the shuffles
            row[i] = k + (rows ? (size_t) rows[ri] : (size_t) ri) * nb;
        }
        float sum[2][NQ] = {};
#pragma unroll 4
        for (int c = 0; c < (D / 8 + 3) / 4; ++c) {
            const int d = 8 * (4 * c + sub);
            if (D % 32 == 0 || d < D) {
                float x[2][8];
                Row::template load<8>(row[0], d, x[0]);
                Row::template load<8>(row[1], d, x[1]);
#pragma unroll
                for (int j = 0; j < NQ; ++j) {
#pragma unroll
                    for (int e = 0; e < 8; ++e) {
                        const float qe = q[j * D + d + e];
                        sum[0][j] += x[0][e] * qe;
                        sum[1][j] += x[1][e] * qe;
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < NQ; ++j) {
                float s = sum[i][j];
                s += __shfl_xor_sync(ALL_LANES, s, 1);
                s += __shfl_xor_sync(ALL_LANES, s, 2);
                if (j % 4 == sub && r[i] < n) {
                    p[r[i] * NQ + j] = s;
                }
            }
        }
    }
}

// What the sum of exponentials of logits up to m becomes with a sink: infinite where the sink leaves nothing to the others, 0 without
// others.
static __device__ __forceinline__ float with_sink(float sum, float m, const float * sinks, int head) {
    return sinks && sum > 0.0f ? sum + expf(sinks[head] - m) : sum;
}

// tanh by way of exp: tanhf() is too coarse when upstream's fast math replaces it
static __device__ __forceinline__ float logit(float dot, float scale, float softcap) {
    return softcap > 0.0f ? softcap * (1.0f - 2.0f / (expf(2.0f * dot * scale / softcap) + 1.0f)) : dot * scale;
}

} // namespace headkv
