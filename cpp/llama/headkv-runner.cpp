#include "headkv-runner.h"

#include "headkv-op.h"

#include "llama-context.h"

#include <new>
#include <stdexcept>

bool headkv_is_cpu(ggml_backend_buffer_type_t buft) {
    const ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
    return ggml_backend_buft_is_host(buft) && (!dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU);
}

bool headkv_device_supports(ggml_backend_buffer_type_t buft, const ggml_tensor * op) {
    const ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
    if (!dev || !ggml_backend_dev_supports_op(dev, op)) {
        return false;
    }
    if (op->op != GGML_OP_CUSTOM) {
        return true;
    }
    // a device that says the same of a function that it cannot know says it of everything, as RPC does
    ggml_tensor unknown = *op;
    headkv_op of_nobody;
    of_nobody.tag = 0;
    headkv_op_set(&unknown, of_nobody);
    return !ggml_backend_dev_supports_op(dev, &unknown);
}

bool headkv_can_attend_fused(const headkv_store_layer & layer) {
    if (!layer.attend->kernel) {
        return false;
    }
    if (headkv_is_cpu(layer.buft)) {
        return true;
    }
    headkv_scratch scratch;
    ggml_tensor * q = scratch.new_tensor(GGML_TYPE_F32, layer.n_embd_head_k, layer.n_head);
    ggml_tensor * k = scratch.new_tensor(layer.type_k, layer.n_embd_head_k, 256);
    ggml_tensor * v = scratch.new_tensor(layer.type_v, layer.n_embd_head_v, 256);
    ggml_tensor * r = scratch.new_tensor(GGML_TYPE_I32, 2, layer.n_head_kv);
    return headkv_device_supports(layer.buft, headkv_build_attend_fused(scratch.ctx.get(), layer.attend.get(), q, k, v, r)->view_src);
}

headkv_scratch::headkv_scratch() {
    ggml_init_params params = { /*.mem_size =*/16 * ggml_tensor_overhead(), /*.mem_buffer =*/nullptr, /*.no_alloc =*/true };
    ctx.reset(ggml_init(params));
}

ggml_tensor * headkv_scratch::new_tensor(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2) {
    return ggml_new_tensor_3d(ctx.get(), type, ne0, ne1, ne2);
}

void headkv_scratch::alloc(ggml_backend_buffer_type_t buft) {
    buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
    if (!buf) {
        throw std::bad_alloc();
    }
}

headkv_runner::headkv_runner(llama_context * lctx) {
    std::vector<ggml_backend_t> backends;
    std::vector<ggml_backend_buffer_type_t> bufts;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(lctx->get_sched()); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(lctx->get_sched(), i);
        backends.push_back(backend);
        bufts.push_back(ggml_backend_sched_get_buffer_type(lctx->get_sched(), backend));

        ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
        auto * set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
        if (set_n_threads) {
            set_n_threads(backend, lctx->n_threads_batch());
        }
    }
    sched.reset(ggml_backend_sched_new(backends.data(), bufts.data(), (int) backends.size(), N_NODES, false, false));
    meta.resize(ggml_tensor_overhead() * N_NODES + ggml_graph_overhead_custom(N_NODES, false));
}

void headkv_runner::begin() {
    ggml_init_params params = { /*.mem_size =*/meta.size(), /*.mem_buffer =*/meta.data(), /*.no_alloc =*/true };
    ctx.reset(ggml_init(params));
    gf = ggml_new_graph_custom(ctx.get(), N_NODES, false);
}

void headkv_runner::run() {
    ggml_backend_sched_reset(sched.get());
    if (!ggml_backend_sched_alloc_graph(sched.get(), gf)) {
        throw std::bad_alloc();
    }
    const ggml_status status = ggml_backend_sched_graph_compute(sched.get(), gf);
    if (status != GGML_STATUS_SUCCESS) {
        throw std::runtime_error(status == GGML_STATUS_ABORTED ? "it was aborted" : "a graph could not be computed");
    }
}

size_t headkv_runner::n_bytes() const {
    size_t res = 0;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched.get()); ++i) {
        res += ggml_backend_sched_get_buffer_size(sched.get(), ggml_backend_sched_get_backend(sched.get(), i));
    }
    return res;
}
