// The door for ggml-metal: every symbol that a patch mentions, nothing else. Upstream's Objective-C includes it, too.
#pragma once

#include <stdbool.h>

struct ggml_tensor;
struct ggml_metal_device;
struct ggml_metal_encoder;

#ifdef __cplusplus
extern "C" {
#endif

// called by supports_op; false = not ours, or one of ours that only the CPU has
bool headkv_metal_supports(struct ggml_metal_device * dev, const struct ggml_tensor * op);

// called before other ops are encoded; false = not ours. Waits for what was encoded before; the caller waits for it in turn
bool headkv_metal_encode(struct ggml_metal_device * dev, struct ggml_metal_encoder * enc, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
