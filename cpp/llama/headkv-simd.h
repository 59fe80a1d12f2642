// A vector of floats of the instruction set that the including file is compiled for, and nothing more than the
// kernels need. W = number of lanes, N_REG = vector registers. Without an instruction set that is known here, or with
// HEADKV_NO_SIMD, a vector is one float.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(HEADKV_NO_SIMD)
#include <algorithm>
#include <cmath>
#elif defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#else
#define HEADKV_NO_SIMD
#include <algorithm>
#include <cmath>
#endif

namespace { // every file that includes this is compiled with other flags: nothing may be merged at link time

#if defined(HEADKV_NO_SIMD)

typedef float vf;
constexpr int W = 1;
constexpr int N_REG = 16;

inline vf vf_zero() { return 0.0f; }
inline vf vf_set(float x) { return x; }
inline vf vf_load(const float * p) { return *p; }
inline void vf_store(float * p, vf x) { *p = x; }
inline vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
inline vf vf_mul(vf a, vf b) { return a * b; }
inline vf vf_add(vf a, vf b) { return a + b; }
inline vf vf_sub(vf a, vf b) { return a - b; }
inline vf vf_max(vf a, vf b) { return a > b ? a : b; } // b if one is NaN, as x86 does
inline vf vf_round(vf a) { return std::nearbyint(a); }
inline vf vf_exp2i(vf n) { return n == n ? std::ldexp(1.0f, (int) n) : n; }
inline vf vf_if_less(vf a, vf b, vf x, vf y) { return a < b ? x : y; }
inline float vf_sum(vf a) { return a; }
inline float vf_hmax(vf a) { return a; }

#elif defined(__AVX512F__)

typedef __m512 vf;
constexpr int W = 16;
constexpr int N_REG = 32;

inline vf vf_zero() { return _mm512_setzero_ps(); }
inline vf vf_set(float x) { return _mm512_set1_ps(x); }
inline vf vf_load(const float * p) { return _mm512_loadu_ps(p); }
inline void vf_store(float * p, vf x) { _mm512_storeu_ps(p, x); }
inline vf vf_load_f16(const void * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
inline vf vf_load_bf16(const void * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}
inline vf vf_load_i8(const int8_t * p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p))); }
inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf vf_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf vf_exp2i(vf n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23)); }
inline vf vf_if_less(vf a, vf b, vf x, vf y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x); }
inline float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
inline float vf_hmax(vf a) { return _mm512_reduce_max_ps(a); }
inline float f16_to_f32(const void * p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}

// the sums of four vectors
inline void vf_sum4(vf a, vf b, vf c, vf d, float * dst) {
    auto half = [](vf x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1))); };
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
    _mm_storeu_ps(dst, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

#define HEADKV_SIMD 1

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

typedef __m256 vf;
constexpr int W = 8;
constexpr int N_REG = 16;

inline vf vf_zero() { return _mm256_setzero_ps(); }
inline vf vf_set(float x) { return _mm256_set1_ps(x); }
inline vf vf_load(const float * p) { return _mm256_loadu_ps(p); }
inline void vf_store(float * p, vf x) { _mm256_storeu_ps(p, x); }
inline vf vf_load_f16(const void * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
inline vf vf_load_bf16(const void * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
}
inline vf vf_load_i8(const int8_t * p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p))); }
inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf vf_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf vf_exp2i(vf n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)); }
inline vf vf_if_less(vf a, vf b, vf x, vf y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline float f16_to_f32(const void * p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}
inline void vf_sum4(vf a, vf b, vf c, vf d, float * dst) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(dst, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
inline float vf_sum(vf a) {
    float t[4];
    vf_sum4(a, a, a, a, t);
    return t[0];
}
inline float vf_hmax(vf a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}

#define HEADKV_SIMD 1

#elif defined(__ARM_NEON) && defined(__aarch64__)

typedef float32x4_t vf;
constexpr int W = 4;
constexpr int N_REG = 32;

inline vf vf_zero() { return vdupq_n_f32(0.0f); }
inline vf vf_set(float x) { return vdupq_n_f32(x); }
inline vf vf_load(const float * p) { return vld1q_f32(p); }
inline void vf_store(float * p, vf x) { vst1q_f32(p, x); }
inline vf vf_load_f16(const void * p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *) p))); }
inline vf vf_load_bf16(const void * p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *) p), 16)); }
inline vf vf_load_i8(const int8_t * p) {
    int32_t t;
    memcpy(&t, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(t))))));
}
inline vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
inline vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
inline vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
inline vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
inline vf vf_max(vf a, vf b) { return vmaxq_f32(a, b); }
inline vf vf_round(vf a) { return vrndnq_f32(a); }
inline vf vf_exp2i(vf n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23)); }
inline vf vf_if_less(vf a, vf b, vf x, vf y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
inline float vf_sum(vf a) { return vaddvq_f32(a); }
inline float vf_hmax(vf a) { return vmaxvq_f32(a); }
inline float f16_to_f32(const void * p) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_dup_u16((const uint16_t *) p))), 0); }
inline void vf_sum4(vf a, vf b, vf c, vf d, float * dst) { vst1q_f32(dst, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))); }

#define HEADKV_SIMD 1

#endif

// exp(x) for x <= 0, relative error ~2e-7; anything below -87 counts as -87.
// x = n ln 2 + r with |r| <= ln(2)/2, then the Taylor series of exp(r) to r^7.
inline vf vf_exp(vf x) {
    x = vf_max(vf_set(-87.0f), x); // in this order x86 gives NaN for NaN, as the other kernels do
    const vf n = vf_round(vf_mul(x, vf_set(1.44269504088896f)));
    // ln 2 in two parts, the first with few enough bits for n*part to be exact
    vf r = vf_fma(n, vf_set(-0.693145751953125f), x);
    r = vf_fma(n, vf_set(-1.42860682030941723e-6f), r);
    vf p = vf_set(1.0f / 5040);
    p = vf_fma(p, r, vf_set(1.0f / 720));
    p = vf_fma(p, r, vf_set(1.0f / 120));
    p = vf_fma(p, r, vf_set(1.0f / 24));
    p = vf_fma(p, r, vf_set(1.0f / 6));
    p = vf_fma(p, r, vf_set(0.5f));
    p = vf_fma(p, r, vf_set(1.0f));
    p = vf_fma(p, r, vf_set(1.0f));
    return vf_mul(p, vf_exp2i(n));
}

inline void vf_prefetch(const char * p, size_t n) {
#if defined(__GNUC__)
    for (size_t i = 0; i < n; i += 64) {
        __builtin_prefetch(p + i);
    }
#endif
}

#ifdef HEADKV_SIMD

// elements i to i + W - 1 of a row
struct row_f32 {
    static vf load(const char * row, int i) { return vf_load((const float *) row + i); }
};
struct row_f16 {
    static vf load(const char * row, int i) { return vf_load_f16(row + 2 * i); }
};
struct row_bf16 {
    static vf load(const char * row, int i) { return vf_load_bf16(row + 2 * i); }
};
struct row_q8_0 { // blocks of 32: f16 scale, 32 x int8
    static vf load(const char * row, int i) {
        const char * b = row + (i >> 5) * 34;
        return vf_mul(vf_set(f16_to_f32(b)), vf_load_i8((const int8_t *) b + 2 + (i & 31)));
    }
};

#endif

} // namespace
