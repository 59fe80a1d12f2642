// One of the sources that headkv-metal.cpp puts together, included once for each head size and type: HEADKV_TYPE, HEADKV_D and
// HEADKV_NQ, 0 for score. Adds its kernels to `all`.
#define HEADKV_PASTE_(a, b, c) shape_##a##_##b##_##c
#define HEADKV_PASTE(a, b, c) HEADKV_PASTE_(a, b, c)
#define HEADKV_SHAPE HEADKV_PASTE(HEADKV_TYPE, HEADKV_D, HEADKV_NQ)

namespace HEADKV_SHAPE {

#include "headkv-device.metal"
#if HEADKV_NQ > 0
#include "headkv-attend.metal"
[[maybe_unused]] static const bool added = add({
        metal_cpu::make_kernel("headkv_attend", HEADKV_TYPE, HEADKV_D, HEADKV_NQ, headkv_attend),
        metal_cpu::make_kernel("headkv_combine", HEADKV_TYPE, HEADKV_D, HEADKV_NQ, headkv_combine),
});
#else
#include "headkv-score.metal"
[[maybe_unused]] static const bool added = add({
        metal_cpu::make_kernel("headkv_stats", HEADKV_TYPE, HEADKV_D, HEADKV_NQ, headkv_stats),
        metal_cpu::make_kernel("headkv_pooled", HEADKV_TYPE, HEADKV_D, HEADKV_NQ, headkv_pooled),
});
#endif

} // namespace HEADKV_SHAPE

#undef HEADKV_NQ
