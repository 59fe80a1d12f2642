#include "headkv-attend-prompt.h"
#include "headkv-kernels.h"
#include "headkv-op.h"

#define HEADKV_NO_SIMD // the portable kernel
#include "headkv-attend-prompt-kernel.h"

#include <algorithm>
#include <vector>

const headkv_prompt_kernel * headkv_prompt_kernel_portable() {
    return &prompt_kernel;
}

const headkv_prompt_kernel * headkv_prompt_kernel_find(const char * name) {
    return headkv_find_kernel(name, headkv_prompt_kernel_avx512, headkv_prompt_kernel_avx2, headkv_prompt_kernel_neon, headkv_prompt_kernel_portable);
}

bool headkv_prompt_takes(ggml_type type_k, ggml_type type_v) {
    const auto takes = [](ggml_type type) { return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float; };
    return takes(type_k) && takes(type_v);
}

// Tokens of a job: queries and answers of its GQA group stay in the cache beside a block of cells, and there are jobs for all threads.
static int n_tokens_of_job(int n_tokens, int n_group, int n_embd_head, int n_head_kv, int nth) {
    const int n_rows = std::max(64, 128 * 512 / n_embd_head);
    const int n_share = (n_tokens * n_head_kv + 4 * nth - 1) / (4 * nth);
    return std::clamp(std::min(n_rows / n_group, n_share), 1, n_tokens);
}

static void attend_prompt_op(ggml_tensor * dst, int ith, int nth, void * userdata) {
    auto & state = *(headkv_attend_state *) userdata;
    const headkv_op op = headkv_op_get(dst);
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const auto * cells = (const int32_t *) dst->src[3]->data;
    const auto * seen = (const int32_t *) dst->src[4]->data;
    const auto * sinks = dst->src[5] ? (const float *) dst->src[5]->data : nullptr;
    GGML_UNUSED(ith);

    const int n_tokens = (int) q->ne[2];
    const int n_job = n_tokens_of_job(n_tokens, state.n_head / state.n_head_kv, std::max(state.n_embd_head_k, state.n_embd_head_v), state.n_head_kv, nth);
    const int n_blocks = (n_tokens + n_job - 1) / n_job;

    headkv_prompt_args args;
    args.nq_token = (int64_t) (q->nb[2] / sizeof(float));
    args.nq_head = (int64_t) (q->nb[1] / sizeof(float));
    args.nb_k = k->nb[2];
    args.nb_v = v->nb[2];
    args.cells = cells;
    args.n_group = state.n_head / state.n_head_kv;
    args.n_embd_head_k = state.n_embd_head_k;
    args.n_embd_head_v = state.n_embd_head_v;
    args.nd_token = (int64_t) state.n_embd_head_v * state.n_head;
    args.type_k = k->type;
    args.type_v = v->type;
    args.scale = op.scale;
    args.softcap = op.softcap;
    args.n_tokens = n_job;
    const size_t n_line = 64 / sizeof(float); // vectors do not cross cache lines
    std::vector<float> memory(state.prompt_kernel->n_work(args) + n_line);
    float * work = memory.data() + (n_line - (uintptr_t) memory.data() / sizeof(float) % n_line) % n_line;

    int job;
    while ((job = state.ticket.fetch_add(1, std::memory_order_relaxed)) < n_blocks * state.n_head_kv) {
        const int h = job % state.n_head_kv;
        const int t = (n_blocks - 1 - job / state.n_head_kv) * n_job; // those that see most come first
        args.n_tokens = std::min(n_job, n_tokens - t);
        args.q = (const float *) q->data + t * args.nq_token + (int64_t) h * args.n_group * args.nq_head;
        args.k = (const char *) k->data + h * k->nb[1];
        args.v = (const char *) v->data + h * v->nb[1];
        args.seen = seen + 2 * t;
        args.sinks = sinks ? sinks + h * args.n_group : nullptr;
        args.dst = (float *) dst->data + t * args.nd_token + (int64_t) h * args.n_group * args.n_embd_head_v;
        state.prompt_kernel->run(args, work);
    }

    // the last thread to leave prepares the next run
    if (state.n_left.fetch_add(1, std::memory_order_acq_rel) + 1 == nth) {
        state.ticket.store(0, std::memory_order_relaxed);
        state.n_left.store(0, std::memory_order_release);
    }
}

ggml_tensor * headkv_build_attend_prompt(ggml_context * ctx, headkv_attend_state * state,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * cells, ggml_tensor * seen, ggml_tensor * sinks) {
    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[3] == 1);
    GGML_ASSERT(q->ne[0] == state->n_embd_head_k && k->ne[0] == state->n_embd_head_k && v->ne[0] == state->n_embd_head_v);
    GGML_ASSERT(q->ne[1] == state->n_head && k->ne[1] == state->n_head_kv && v->ne[1] == state->n_head_kv && k->ne[3] == 1 && v->ne[3] == 1);
    GGML_ASSERT(cells->type == GGML_TYPE_I32 && ggml_is_contiguous(cells) && seen->type == GGML_TYPE_I32 && ggml_is_contiguous(seen));
    GGML_ASSERT(seen->ne[0] == 2 && seen->ne[1] == q->ne[2]);
    GGML_ASSERT(!sinks || (sinks->type == GGML_TYPE_F32 && ggml_nelements(sinks) == state->n_head && ggml_is_contiguous(sinks)));

    ggml_tensor * args[] = { q, k, v, cells, seen, sinks ? ggml_view_1d(ctx, sinks, state->n_head, 0) : nullptr };
    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, (int64_t) state->n_embd_head_v * state->n_head, q->ne[2], 1, 1, args, 6, attend_prompt_op, GGML_N_TASKS_MAX, state);

    headkv_op op;
    op.kind = HEADKV_OP_ATTEND_PROMPT;
    op.scale = state->scale;
    op.softcap = state->softcap;
    headkv_op_set(res, op);
    return res;
}
