// The kernels of cpp/ggml-metal, compiled for the CPU in every shape.
#include "metal-on-cpu.h"

#include "headkv-args.h"

static std::vector<metal_cpu::kernel_t> & all() {
    static std::vector<metal_cpu::kernel_t> res;
    return res;
}

static bool add(std::initializer_list<metal_cpu::kernel_t> kernels) {
    all().insert(all().end(), kernels);
    return true;
}

const std::vector<metal_cpu::kernel_t> & metal_cpu::kernels() { return all(); }

namespace shape_none {
#include "headkv-device.metal"
#include "headkv-select.metal"
#include "headkv-compact.metal"
[[maybe_unused]] static const bool added = add({
        metal_cpu::make_kernel("headkv_select", 0, 0, 0, headkv_select),
        metal_cpu::make_kernel("headkv_compact", 0, 0, 0, headkv_compact),
});
} // namespace shape_none


#define HEADKV_TYPE HEADKV_F16
#include "metal-on-cpu-sizes.h"
#undef HEADKV_TYPE

#define HEADKV_TYPE HEADKV_BF16
#include "metal-on-cpu-sizes.h"
#undef HEADKV_TYPE

#define HEADKV_TYPE HEADKV_Q8_0
#include "metal-on-cpu-sizes.h"
#undef HEADKV_TYPE
