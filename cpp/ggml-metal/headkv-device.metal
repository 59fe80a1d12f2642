// What the kernels share. headkv-args.h and then this text stand before each kernel's own, in one source; HEADKV_D, HEADKV_TYPE and
// HEADKV_NQ are defined before them.
//
// Metal's compiler may assume that there are no infinities and no NaN: LOWEST stands for a logit of nothing, and no sum has a
// term that could become infinite.

#include <metal_stdlib>

using namespace metal;

#define LOWEST -3.0e38f

inline float logit(float dot, float scale, float softcap) {
    return softcap > 0.0f ? softcap * (1.0f - 2.0f / (precise::exp(min(2.0f * dot * scale / softcap, 80.0f)) + 1.0f)) : dot * scale;
}

// The sum of exponentials of logits up to m with a sink, m the new largest logit; factor: what the terms so far are multiplied with. A
// sink without other terms is none.
inline float with_sink(float sum, float sink, thread float & m, thread float & factor) {
    if (sum <= 0.0f) {
        factor = 1.0f;
        return sum;
    }
    const float larger = max(m, sink);
    factor = precise::exp(m - larger);
    m = larger;
    return sum * factor + precise::exp(sink - larger);
}

#ifdef HEADKV_TYPE

// n 32-bit words, 4, 2 or 1, from an address that is aligned to all of them
template <int n> inline void load_words(device const char * p, thread uint * w) {
    if (n == 4) {
        const uint4 t = *(device const uint4 *) p;
        w[0] = t.x;
        w[1] = t.y;
        w[2] = t.z;
        w[3] = t.w;
    } else if (n == 2) {
        const uint2 t = *(device const uint2 *) p;
        w[0] = t.x;
        w[1] = t.y;
    } else {
        w[0] = *(device const uint *) p;
    }
}

// Elements i to i + n - 1 of a row of K or V; n is 2, 4 or 8 and i a multiple of it.
template <int n> inline void load_row(device const char * row, int i, thread float * x) {
#if HEADKV_TYPE == HEADKV_Q8_0
    // blocks of 32: f16 scale, 32 x int8; nothing is aligned to more than 2 bytes
    device const ushort * block = (device const ushort *) (row + i / 32 * 34);
    const float scale = (float) as_type<half>(block[0]);
    for (int j = 0; j < n; j += 2) {
        const ushort t = block[1 + (i % 32 + j) / 2];
        x[j] = scale * (float) (int8_t) (t & 0xff);
        x[j + 1] = scale * (float) (int8_t) (t >> 8);
    }
#else
    uint w[4];
    load_words<n / 2>(row + 2 * i, w);
    for (int j = 0; j < n; j += 2) {
#if HEADKV_TYPE == HEADKV_F16
        x[j] = (float) as_type<half>((ushort) (w[j / 2] & 0xffff));
        x[j + 1] = (float) as_type<half>((ushort) (w[j / 2] >> 16));
#else
        x[j] = as_type<float>(w[j / 2] << 16);
        x[j + 1] = as_type<float>(w[j / 2] & 0xffff0000u);
#endif
    }
#endif
}

// Where row r lies: rows[r]*nb bytes behind k, or r*nb.
struct rows_listed {
    device const int32_t * rows;
    ulong at(int r) const { return (ulong) rows[r]; }
};
struct rows_in_order {
    ulong at(int r) const { return (ulong) r; }
};

// p[r*NQ + j] = q[j] . row r for n <= HEADKV_METAL_TILE rows, by the whole threadgroup. Four lanes share a row, which they read 8
// elements at a time, and each takes two rows at once.
template <int NQ, class Rows>
inline void tile_dots(threadgroup const float * q, device const char * k, ulong nb, Rows rows, int n, threadgroup float * p, int tid) {
    const int n_step = HEADKV_METAL_THREADS / 4;
    const int sub = tid % 4;

    for (int r0 = 0; r0 < n; r0 += 2 * n_step) {
        // all lanes take part in the shuffles
        const int ra = r0 + tid / 4;
        const int rb = ra + n_step;
        device const char * row_a = k + rows.at(min(ra, n - 1)) * nb;
        device const char * row_b = k + rows.at(min(rb, n - 1)) * nb;
        float sum_a[NQ];
        float sum_b[NQ];
        for (int j = 0; j < NQ; ++j) {
            sum_a[j] = 0.0f;
            sum_b[j] = 0.0f;
        }
        for (int d = 8 * sub; d < HEADKV_D; d += 32) {
            float a[8];
            float b[8];
            load_row<8>(row_a, d, a);
            load_row<8>(row_b, d, b);
            for (int j = 0; j < NQ; ++j) {
                for (int e = 0; e < 8; ++e) {
                    const float qe = q[j * HEADKV_D + d + e];
                    sum_a[j] += a[e] * qe;
                    sum_b[j] += b[e] * qe;
                }
            }
        }
        for (int j = 0; j < NQ; ++j) {
            float a = sum_a[j];
            float b = sum_b[j];
            a += simd_shuffle_xor(a, (ushort) 1);
            a += simd_shuffle_xor(a, (ushort) 2);
            b += simd_shuffle_xor(b, (ushort) 1);
            b += simd_shuffle_xor(b, (ushort) 2);
            if (j % 4 == sub && ra < n) {
                p[ra * NQ + j] = a;
            }
            if (j % 4 == sub && rb < n) {
                p[rb * NQ + j] = b;
            }
        }
    }
}

#endif
