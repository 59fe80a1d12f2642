// Stage 5, select, see headkv-stages.h: one block per head finds the lowest score to keep digit by digit, then writes the
// positions in order. Nothing depends on the order in which threads run.
#pragma once

#include "headkv-device.cuh"
#include "headkv-op.h"

namespace headkv {

constexpr int N_SELECT = 512; // threads

struct select_params {
    const float * scores;
    const int32_t * plan;   // [head][2]: first element of dst, cells to keep
    int32_t * dst;
    size_t n_scores;        // floats from head to head
    size_t n_plan;          // integers from head to head
    int n_prefix;
    int n_recent;
};

// an integer in the order of the scores; -0 and 0 are one score, NaN is the lowest
static __device__ __forceinline__ uint32_t score_key(float score) {
    const uint32_t bits = __float_as_uint(score);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return 0;
    }
    if ((bits & 0x7fffffffu) == 0) {
        return 0x80000000u;
    }
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// sum over the threads up to this one; total: over all
static __device__ __forceinline__ uint32_t block_scan(uint32_t x, uint32_t * sums, uint32_t & total) {
    const int warp = threadIdx.x / 32;
    x = (uint32_t) warp_scan((int) x);
    if (threadIdx.x % 32 == 31) {
        sums[warp] = x;
    }
    __syncthreads();
    total = 0;
    uint32_t before = 0;
    for (int w = 0; w < N_SELECT / 32; ++w) {
        before += w < warp ? sums[w] : 0;
        total += sums[w];
    }
    __syncthreads();
    return before + x;
}

static __global__ void __launch_bounds__(N_SELECT) select_best(const select_params a) {
    __shared__ int count[256]; // keys by digit
    __shared__ uint32_t sums[N_SELECT / 32];
    __shared__ uint32_t limit_s;    // the digits found so far
    __shared__ int n_left_s;   // keys to take out of those with these digits

    const float * scores = a.scores + blockIdx.x * a.n_scores;
    const int n_keep = min(a.plan[blockIdx.x * a.n_plan + 1], a.n_prefix);
    int32_t * out = a.dst + a.plan[blockIdx.x * a.n_plan];
    const int tid = threadIdx.x;

    for (int i = tid; i < a.n_recent; i += N_SELECT) {
        out[n_keep + i] = a.n_prefix + i;
    }
    if (n_keep == a.n_prefix) {
        for (int i = tid; i < n_keep; i += N_SELECT) {
            out[i] = i;
        }
        return;
    }
    if (n_keep == 0) {
        return;
    }

    uint32_t limit = 0; // after the loop the lowest key to keep
    int n_left = n_keep;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = tid; i < 256; i += N_SELECT) {
            count[i] = 0;
        }
        __syncthreads();
        for (int i = tid; i < a.n_prefix; i += N_SELECT) {
            const uint32_t key = score_key(scores[i]);
            if (shift == 24 || (key ^ limit) >> (shift + 8) == 0) {
                atomicAdd(&count[(key >> shift) & 255], 1);
            }
        }
        __syncthreads();
        if (tid == 0) {
            int digit = 255;
            while (count[digit] < n_left) {
                n_left -= count[digit--];
            }
            limit_s = limit | (uint32_t) digit << shift;
            n_left_s = n_left;
        }
        __syncthreads();
        limit = limit_s;
        n_left = n_left_s;
    }

    // above the limit all keys, at the limit the first n_left
    uint32_t n_above = 0;
    uint32_t n_equal = 0;
    for (int i0 = 0; i0 < a.n_prefix; i0 += N_SELECT) {
        const int i = i0 + tid;
        const uint32_t key = i < a.n_prefix ? score_key(scores[i]) : 0;
        const uint32_t above = i < a.n_prefix && key > limit;
        const uint32_t equal = i < a.n_prefix && key == limit;

        uint32_t total;
        const uint32_t sum = block_scan(above | equal << 16, sums, total);
        const uint32_t above_before = n_above + (sum & 0xffff) - above;
        const uint32_t equal_before = n_equal + (sum >> 16) - equal;
        if (above || (equal && equal_before < (uint32_t) n_left)) {
            out[above_before + min(equal_before, (uint32_t) n_left)] = i;
        }
        n_above += total & 0xffff;
        n_equal += total >> 16;
    }
}

//
// host; tensors of the op: scores, plan
//

inline bool select_supports(const ggml_tensor * op) {
    return op->src[0]->nb[0] == sizeof(float) && op->src[0]->ne[0] < 1 << 30;
}

template <class Stream>
void select_run(ggml_tensor * dst, Stream stream) {
    const ggml_tensor * scores = dst->src[0];
    const ggml_tensor * plan = dst->src[1];

    select_params a;
    a.scores = (const float *) scores->data;
    a.plan = (const int32_t *) plan->data;
    a.dst = (int32_t *) dst->data + 2 * ggml_nelements(scores); // the CPU's keys come before the result
    a.n_scores = scores->nb[1] / sizeof(float);
    a.n_plan = plan->nb[1] / sizeof(int32_t);
    a.n_prefix = (int) scores->ne[0];
    a.n_recent = headkv_op_get(dst).n_recent;
    HEADKV_LAUNCH((select_best), dim3((unsigned) scores->ne[1], 1, 1), dim3(N_SELECT, 1, 1), stream, a);
}

} // namespace headkv
