#include "headkv-attend-prompt.h"
#include "headkv-op.h"

#define HEADKV_NO_SIMD // the portable kernel
#include "headkv-attend-prompt-kernel.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

const headkv_prompt_kernel * headkv_prompt_kernel_portable() {
    return &prompt_kernel;
}

bool headkv_prompt_takes(ggml_type type_k, ggml_type type_v) {
    return headkv_has_floats(type_k) && headkv_has_floats(type_v);
}

// What threads need lies behind the result: of each, the work space of the kernel, then what it adds to the sums, [n_cells + 1] of each KV head.
struct prompt_spaces {
    static constexpr size_t N_LINE = 64 / sizeof(float);

    size_t n_result, n_kernel, n_sums; // floats

    prompt_spaces(const headkv_attend_state & state, int64_t n_tokens, int n_job, int64_t n_cells, bool with_sums) {
        headkv_prompt_args args = {};
        args.n_tokens = n_job;
        args.n_group = state.n_head / state.n_head_kv;
        args.n_embd_head_k = state.n_embd_head_k;
        args.n_embd_head_v = state.n_embd_head_v;
        n_result = (size_t) state.n_embd_head_v * state.n_head * n_tokens;
        n_kernel = lines(state.prompt_kernel->n_work(args));
        n_sums = with_sums ? lines((n_cells + 1) * state.n_head_kv * sizeof(int64_t) / sizeof(float)) : 0;
    }

    size_t n(int n_threads) const {
        return n_result + N_LINE + n_threads * (n_kernel + n_sums);
    }

    float * kernel(const ggml_tensor * dst, int ith) const {
        const auto begin = ((uintptr_t) dst->data + n_result * sizeof(float) + 63) / 64 * 64;
        return (float *) begin + ith * (n_kernel + n_sums);
    }

    int64_t * sums(const ggml_tensor * dst, int ith) const {
        return n_sums > 0 ? (int64_t *) (kernel(dst, ith) + n_kernel) : nullptr;
    }

    static size_t lines(size_t n) {
        return (n + N_LINE - 1) / N_LINE * N_LINE;
    }
};

// what all threads have to add, to where it is kept
static void add_sums(const ggml_tensor * dst, const headkv_attend_state & state, const prompt_spaces & spaces, int nth) {
    const auto * cells = (const int32_t *) dst->src[3]->data;
    const auto * seen = (const int32_t *) dst->src[4]->data;
    const int64_t n_cells = dst->src[3]->ne[0];
    int32_t n_seen = 0; // what stands behind them in the list is not of this sequence
    for (int64_t t = 0; t < dst->src[4]->ne[1]; ++t) {
        n_seen = std::max(n_seen, seen[2 * t + 1]);
    }
    const ggml_tensor * sums = dst->src[6];
    const ggml_tensor * fresh = dst->src[7];
    for (int h = 0; h < state.n_head_kv; ++h) {
        auto * to = (float *) ((char *) sums->data + h * sums->nb[2]);
        for (int64_t i = 0; i < fresh->ne[0]; ++i) {
            to[((const int64_t *) fresh->data)[i]] = 0.0f;
        }
        const auto total = [&](int64_t i) {
            int64_t res = 0;
            for (int ith = 0; ith < nth; ++ith) {
                res += spaces.sums(dst, ith)[h * (n_cells + 1) + i];
            }
            return res;
        };
        const bool has_nan = total(n_cells) > 0;
        for (int32_t i = 0; i < n_seen; ++i) {
            to[cells[i]] += has_nan ? NAN : (float) ((double) total(i) / HEADKV_PROMPT_ONE);
        }
    }
}

// Tokens of a job: queries and answers of its GQA group stay in the cache beside a block of cells, and there are jobs for all threads.
static int n_tokens_of_job(const headkv_attend_state & state, int n_tokens, int n_threads) {
    const int n_rows = std::max(64, 128 * 512 / std::max(state.n_embd_head_k, state.n_embd_head_v));
    const int n_share = (n_tokens * state.n_head_kv + 4 * n_threads - 1) / (4 * n_threads);
    return std::clamp(std::min(n_rows * state.n_head_kv / state.n_head, n_share), 1, n_tokens);
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

    const int n_tokens = (int) q->ne[2];
    const int n_blocks = (n_tokens + op.n_job - 1) / op.n_job;
    const int64_t n_cells = dst->src[3]->ne[0];
    const prompt_spaces spaces(state, n_tokens, op.n_job, n_cells, dst->src[6]);
    int n_workers = 0; // others look on
    while (n_workers < nth && (int64_t) spaces.n(n_workers + 1) <= ggml_nelements(dst)) {
        ++n_workers;
    }
    float * work = spaces.kernel(dst, ith);
    int64_t * sums = spaces.sums(dst, ith);
    if (sums && ith < n_workers) {
        std::fill(sums, sums + (n_cells + 1) * state.n_head_kv, 0);
    }

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
    args.n_cells = n_cells;

    int job;
    while (ith < n_workers && (job = state.ticket.fetch_add(1, std::memory_order_relaxed)) < n_blocks * state.n_head_kv) {
        const int h = job % state.n_head_kv;
        const int t = (n_blocks - 1 - job / state.n_head_kv) * op.n_job; // those that see most come first
        args.n_tokens = std::min(op.n_job, n_tokens - t);
        args.q = (const float *) q->data + t * args.nq_token + (int64_t) h * args.n_group * args.nq_head;
        args.k = (const char *) k->data + h * k->nb[1];
        args.v = (const char *) v->data + h * v->nb[1];
        args.seen = seen + 2 * t;
        args.sinks = sinks ? sinks + h * args.n_group : nullptr;
        args.sums = sums ? sums + h * (n_cells + 1) : nullptr;
        args.dst = (float *) dst->data + t * args.nd_token + (int64_t) h * args.n_group * args.n_embd_head_v;
        state.prompt_kernel->run(args, work);
    }

    // the last thread to leave adds up, and prepares the next run
    if (state.n_left.fetch_add(1, std::memory_order_acq_rel) + 1 == nth) {
        if (sums) {
            add_sums(dst, state, spaces, n_workers);
        }
        state.ticket.store(0, std::memory_order_relaxed);
        state.n_left.store(0, std::memory_order_release);
    }
}

ggml_tensor * headkv_build_attend_prompt(ggml_context * ctx, headkv_attend_state * state, int n_threads,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * cells, ggml_tensor * seen, ggml_tensor * sinks,
        ggml_tensor * sums, ggml_tensor * fresh) {
    GGML_ASSERT(state->prompt_kernel && "HEADKV_KERNEL names no kernel of this build and machine");
    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[3] == 1);
    GGML_ASSERT(q->ne[0] == state->n_embd_head_k && k->ne[0] == state->n_embd_head_k && v->ne[0] == state->n_embd_head_v);
    GGML_ASSERT(q->ne[1] == state->n_head && k->ne[1] == state->n_head_kv && v->ne[1] == state->n_head_kv && k->ne[3] == 1 && v->ne[3] == 1);
    GGML_ASSERT(cells->type == GGML_TYPE_I32 && ggml_is_contiguous(cells) && seen->type == GGML_TYPE_I32 && ggml_is_contiguous(seen));
    GGML_ASSERT(seen->ne[0] == 2 && seen->ne[1] == q->ne[2]);
    GGML_ASSERT(!sinks || (sinks->type == GGML_TYPE_F32 && ggml_nelements(sinks) == state->n_head && ggml_is_contiguous(sinks)));
    GGML_ASSERT(!sums == !fresh);
    GGML_ASSERT(!sums || (sums->type == GGML_TYPE_F32 && sums->ne[0] == 1 && sums->ne[2] == state->n_head_kv && sums->nb[1] == sizeof(float)));
    GGML_ASSERT(!fresh || (fresh->type == GGML_TYPE_I64 && ggml_is_contiguous(fresh)));

    headkv_op op;
    op.kind = HEADKV_OP_ATTEND_PROMPT;
    op.scale = state->scale;
    op.softcap = state->softcap;
    op.n_job = n_tokens_of_job(*state, (int) q->ne[2], n_threads);

    const int64_t n_row = (int64_t) state->n_embd_head_v * state->n_head;
    const auto n_all = (int64_t) prompt_spaces(*state, q->ne[2], op.n_job, cells->ne[0], sums).n(n_threads);
    ggml_tensor * args[] = { q, k, v, cells, seen, sinks ? ggml_view_1d(ctx, sinks, state->n_head, 0) : nullptr, sums, fresh };
    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, n_all, 1, 1, 1, args, 8, attend_prompt_op, GGML_N_TASKS_MAX, state);
    headkv_op_set(res, op);
    return ggml_view_2d(ctx, res, n_row, q->ne[2], n_row * sizeof(float), 0);
}
