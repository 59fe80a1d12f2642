#define HEADKV_NO_SIMD
#include "headkv-fit-kernel.h"
#include "headkv-fit-ops.h"
#include "headkv-refs.h"

#include <algorithm>

const headkv_fit_kernel * headkv_fit_kernel_portable() {
    return &fit_kernel;
}

using namespace headkv_fitting;

headkv_values_fit::headkv_values_fit(std::vector<llama_pos> pos, std::vector<int32_t> slots, int n_threads) :
    pos(std::move(pos)), slots(std::move(slots)), n_threads(n_threads) {}

void headkv_values_fit::layer(headkv_runner & runner, const headkv_store_layer & layer, int32_t dst, ggml_tensor * refs,
        ggml_tensor * k_all, ggml_tensor * v_all, const std::vector<int32_t> & cells) {
    const int64_t t_start = ggml_time_us();
    const auto & ranges = layer.ranges[dst];
    if (std::all_of(ranges.begin(), ranges.end(), [&](const headkv_range & r) { return r.pos.size() == cells.size(); })) {
        return;
    }
    const headkv_fit_layer what = { pos, slots, cells, ranges, refs, k_all, v_all, layer.k, layer.v, layer.attend->scale, layer.attend->softcap,
        layer.sinks ? headkv_get_data<float>(layer.sinks, layer.n_head) : std::vector<float>() };
    job_t job(what, n_threads);

    runner.begin();
    ggml_context * ctx = runner.ctx.get();
    ggml_tensor * args[] = { refs, k_all, v_all };
    ggml_tensor * answers = ggml_custom_4d(ctx, GGML_TYPE_F32, job.sizes.n_value, job.sizes.n_refs, job.n_head_kv, 1, args, 3, answers_op, GGML_N_TASKS_MAX, &job);
    ggml_tensor * more[] = { answers, refs, layer.k, v_all };
    ggml_build_forward_expand(runner.gf, ggml_custom_inplace(ctx, layer.v, more, 4, values_op, GGML_N_TASKS_MAX, &job));
    runner.run();

    for (size_t ih = 0; ih < ranges.size(); ++ih) {
        if (ranges[ih].pos.size() < cells.size()) {
            outcomes.push_back(job.outcomes[ih]);
        }
    }
    n_bytes_ = std::max(n_bytes_, job.n_bytes());
    t_us += ggml_time_us() - t_start;
}

headkv_fit_stats headkv_values_fit::stats() const {
    headkv_fit_stats res;
    for (const auto & head : outcomes) {
        res.n_heads += head.is_fitted;
        res.before += head.before / outcomes.size();
        res.after += head.after / outcomes.size();
    }
    res.t_us = t_us;
    return res;
}

int64_t headkv_fit_bytes(const headkv_layer_shape & layer, int64_t n, int n_threads) {
    const sizes_t sizes(layer.n_embd_head_k, layer.n_embd_head_v, std::min<int64_t>(n, HEADKV_MAX_REFS), n);
    return std::min<int64_t>(n_threads, layer.n_head_kv) * (int64_t) workspace_t(sizes).n_bytes() + n_threads * (int64_t) answers_t(sizes).n_bytes() + layer.n_head_kv * sizes.n_refs * sizes.n_value * (int64_t) sizeof(float);
}

std::string headkv_why_no_fit(const std::vector<headkv_store_layer> & layers) {
    for (const auto & layer : layers) {
        if (!headkv_is_cpu(layer.buft)) {
            return format("fit 'values' runs on the CPU only, and the cells of layer %d are on %s: use fit 'none' or -ngl 0", layer.il, ggml_backend_buft_name(layer.buft));
        }
    }
    return "";
}
