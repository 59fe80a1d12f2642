// The door for ggml-cuda: every symbol that a patch mentions, nothing else.
#pragma once

struct ggml_tensor;
struct ggml_backend_cuda_context;

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

// share ggml-cuda.cu, take the composed path
inline bool headkv_cuda_supports(const ggml_tensor *) { return false; }
inline bool headkv_cuda_compute(ggml_backend_cuda_context &, ggml_tensor *) { return false; }

#else

// called by supports_op; false = not ours, or one of ours that only the CPU has
bool headkv_cuda_supports(const ggml_tensor * op);

// called first by ggml_cuda_compute_forward(); false = not ours
bool headkv_cuda_compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

#endif
