#include "headkv-attend.h"
#include "headkv-attend-prompt.h"
#include "headkv-op.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

//
// portable kernel: the conversions of ggml, for every type and machine
//

// eight sums, which a compiler may keep in a vector
static float dot(const float * a, const float * b, int n) {
    float sums[8] = {};
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int j = 0; j < 8; ++j) {
            sums[j] += a[i + j] * b[i + j];
        }
    }
    for (; i < n; ++i) {
        sums[i % 8] += a[i] * b[i];
    }
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

static void attend_portable(const headkv_attend_args & a, float * acc, float * m, float * s) {
    std::vector<float> kf(a.n_embd_head_k), vf(a.n_embd_head_v);
    std::fill_n(m, a.n_group, -INFINITY);
    std::fill_n(s, a.n_group, 0.0f);
    std::fill_n(acc, a.n_group * a.n_embd_head_v, 0.0f);

    for (int r = 0; r < a.n_rows; ++r) {
        headkv_to_floats(a.type_k, a.k + r * a.nb_k, kf.data(), a.n_embd_head_k);
        headkv_to_floats(a.type_v, a.v + r * a.nb_v, vf.data(), a.n_embd_head_v);
        for (int g = 0; g < a.n_group; ++g) {
            float x = dot(a.q + g * a.nq, kf.data(), a.n_embd_head_k);
            x = a.softcap > 0.0f ? a.softcap * std::tanh(x * a.scale / a.softcap) : x * a.scale;
            if (a.pos) {
                x += a.slopes[g] * a.pos[r];
            }

            float * ag = acc + g * a.n_embd_head_v;
            if (x > m[g]) {
                const float f = std::exp(m[g] - x);
                m[g] = x;
                s[g] *= f;
                for (int d = 0; d < a.n_embd_head_v; ++d) {
                    ag[d] *= f;
                }
            }
            const float p = std::exp(x - m[g]);
            s[g] += p;
            for (int d = 0; d < a.n_embd_head_v; ++d) {
                ag[d] += p * vf[d];
            }
        }
    }
}

headkv_attend_kernel headkv_attend_kernel_portable(ggml_type type_k, ggml_type type_v, int n_embd_head_k, int n_embd_head_v) {
    const auto takes = [](ggml_type type, int n) { return headkv_has_floats(type) && n % ggml_blck_size(type) == 0; };
    return takes(type_k, n_embd_head_k) && takes(type_v, n_embd_head_v) ? attend_portable : nullptr;
}

//
// the op
//

headkv_attend_state::headkv_attend_state(int n_embd_head_k, int n_embd_head_v, int n_head, int n_head_kv, int n_seq_max, ggml_type type_k, ggml_type type_v) :
    // env: HEADKV_KERNEL, for tests and measurements
    kernel(headkv_attend_kernel_find(type_k, type_v, n_embd_head_k, n_embd_head_v, getenv("HEADKV_KERNEL"))),
    prompt_kernel(headkv_prompt_kernel_find(getenv("HEADKV_KERNEL"))),
    n_embd_head_k(n_embd_head_k), n_embd_head_v(n_embd_head_v), n_head(n_head), n_head_kv(n_head_kv),
    n_done(new std::atomic<int>[(size_t) n_head_kv * n_seq_max * N_TOKENS_SPLIT]()) {
}

namespace {

// one unit of work: a chunk of the range of one head, for one token
struct attend_job {
    int seq, head, token; // token within the sequence
    int row, n_rows;      // within the range
    int chunk, n_chunk;
    int slot;             // partial result; valid if n_chunk > 1
};

// Enumerates the jobs in a fixed order. Partial results are numbered along.
struct attend_jobs {
    const int32_t * ranges;
    int n_head_kv, n_seqs, n_tps, n_rows_chunk;

    // state
    int seq = 0, head = 0, token = 0, slot = 0;
    int i = 0; // number of the first job of (seq, head, token)

    int n_visible(int s, int h, int t) const { return std::max(0, ranges[2 * (s * n_head_kv + h) + 1] - (n_tps - 1 - t)); }

    // finds job number target >= i; false when there are no more jobs
    bool seek(int target, attend_job & job) {
        for (;;) {
            if (seq == n_seqs) {
                return false;
            }
            const int n = n_visible(seq, head, token);
            const int n_chunk = std::max(1, (n + n_rows_chunk - 1) / n_rows_chunk);
            if (i + n_chunk > target) {
                const int c = target - i;
                job = { seq, head, token, c * n_rows_chunk, std::min(n_rows_chunk, n - c * n_rows_chunk), c, n_chunk, slot };
                return true;
            }
            i += n_chunk;
            slot += n_chunk > 1 ? n_chunk : 0;
            if (++token == n_tps) {
                token = 0;
                ++head;
            }
            if (head == n_head_kv) {
                head = 0;
                ++seq;
            }
        }
    }
};

// The kernel on rows of which the first one has a bias: it is attended by itself and added to the others. buf takes
// another partial result.
void attend_biased(headkv_attend_kernel kernel, headkv_attend_args args, float bias, float * acc, float * m, float * s, float * buf) {
    const int D = args.n_embd_head_v;
    const int G = args.n_group;

    float * acc0 = buf;
    float * m0 = acc0 + G * D;
    float * s0 = m0 + G;

    const int n_rows = args.n_rows;
    args.n_rows = 1;
    kernel(args, acc0, m0, s0);
    args.n_rows = n_rows - 1;
    args.k += args.nb_k;
    args.v += args.nb_v;
    kernel(args, acc, m, s);

    for (int g = 0; g < G; ++g) {
        const float mg = std::max(m[g], m0[g] + bias);
        const float f = std::exp(m[g] - mg);
        const float f0 = std::exp(m0[g] + bias - mg);
        m[g] = mg;
        s[g] = f * s[g] + f0 * s0[g];
        for (int d = 0; d < D; ++d) {
            acc[g * D + d] = f * acc[g * D + d] + f0 * acc0[g * D + d];
        }
    }
}

// The output of a GQA group out of its chunks, in order: of each, n_group*n_embd_head_v weighted sums, then n_group largest
// logits, then n_group sums of exponentials. sinks: those of the group, or null.
void combine_chunks(float * out, const float * first, int n_chunk, size_t n_partial, int n_group, int n_embd_head_v, const float * sinks) {
    for (int g = 0; g < n_group; ++g) {
        const float * mg = first + n_group * n_embd_head_v + g;
        const float * sg = mg + n_group;

        float m = -INFINITY;
        for (int c = 0; c < n_chunk; ++c) {
            m = std::max(m, mg[c * n_partial]);
        }
        float s = 0.0f;
        float * og = out + g * n_embd_head_v;
        std::fill(og, og + n_embd_head_v, 0.0f);
        for (int c = 0; c < n_chunk; ++c) {
            if (sg[c * n_partial] == 0.0f) {
                continue; // no rows
            }
            const float f = std::exp(mg[c * n_partial] - m);
            const float * a = first + c * n_partial + g * n_embd_head_v;
            s += f * sg[c * n_partial];
            for (int d = 0; d < n_embd_head_v; ++d) {
                og[d] += f * a[d];
            }
        }
        if (sinks && s > 0.0f) {
            s += std::exp(sinks[g] - m); // infinite where it leaves nothing to the rows
        }
        const float f = s > 0.0f ? 1.0f / s : 0.0f;
        for (int d = 0; d < n_embd_head_v; ++d) {
            og[d] *= f;
        }
    }
}

void attend_op(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(ith);
    headkv_attend_state & state = *(headkv_attend_state *) userdata;
    const headkv_op op = headkv_op_get(dst);

    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * ranges = dst->src[3];
    const ggml_tensor * bias = dst->src[4];
    const ggml_tensor * sinks = dst->src[5];
    const ggml_tensor * pos = dst->src[6];

    const int n_embd_head_v = state.n_embd_head_v;
    const int n_group = state.n_head / state.n_head_kv;
    const int n_tokens = (int) q->ne[2];
    const int n_seqs = (int) ranges->ne[2];
    const int n_tps = n_tokens / n_seqs;

    const bool split = n_tps <= headkv_attend_state::N_TOKENS_SPLIT;

    attend_jobs jobs = { (const int32_t *) ranges->data, state.n_head_kv, n_seqs, n_tps,
        split ? headkv_attend_state::N_ROWS_CHUNK : 1 << 30 };

    float * out = (float *) dst->data;
    float * partials = out + (int64_t) n_embd_head_v * state.n_head * n_tokens;
    const size_t n_partial = (size_t) n_group * (n_embd_head_v + 2);

    std::vector<float> own, buf(n_partial);

    headkv_attend_args args;
    args.nq = q->nb[1] / sizeof(float);
    args.nb_k = k->nb[1];
    args.nb_v = v->nb[1];
    args.n_embd_head_k = state.n_embd_head_k;
    args.n_embd_head_v = n_embd_head_v;
    args.n_group = n_group;
    args.type_k = k->type;
    args.type_v = v->type;
    args.scale = op.scale;
    args.softcap = op.softcap;

    std::vector<float> slopes;
    for (int h = 0; pos && h < state.n_head; ++h) {
        slopes.push_back(headkv_alibi_slope(op.max_bias, state.n_head, h));
    }

    // rows [row, row + n_rows) of the range of a job to a partial result
    const auto attend_rows = [&](const attend_job & job, int row, int n_rows, float * p) {
        const int i_head = job.seq * state.n_head_kv + job.head;
        const int64_t first = (int64_t) jobs.ranges[2 * i_head] + row;
        args.q = (const float *) ((const char *) q->data + (job.seq * n_tps + job.token) * q->nb[2] + (size_t) job.head * n_group * q->nb[1]);
        args.k = (const char *) k->data + (size_t) first * k->nb[1];
        args.v = (const char *) v->data + (size_t) first * v->nb[1];
        args.n_rows = n_rows;
        args.pos = pos ? (const float *) pos->data + first : nullptr;
        args.slopes = slopes.data() + (pos ? job.head * n_group : 0);

        float * m = p + n_group * n_embd_head_v;
        const float b = bias && row == 0 ? ((const float *) bias->data)[i_head] : 0.0f;
        if (b != 0.0f && n_rows > 0) {
            attend_biased(state.kernel, args, b, p, m, m + n_group, buf.data());
        } else {
            state.kernel(args, p, m, m + n_group);
        }
    };

    attend_job job;
    while (jobs.seek(state.ticket.fetch_add(1, std::memory_order_relaxed), job)) {
        const int n_rows = std::max(0, job.n_rows);
        const float * first = partials + job.slot * n_partial;
        int n_chunk = job.n_chunk;
        if (n_chunk > 1) {
            attend_rows(job, job.row, n_rows, partials + (job.slot + job.chunk) * n_partial);
            // the last one to finish combines all chunks, in order
            std::atomic<int> & done = state.n_done[(job.seq * state.n_head_kv + job.head) * headkv_attend_state::N_TOKENS_SPLIT + job.token];
            if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < n_chunk) {
                continue;
            }
            done.store(0, std::memory_order_relaxed);
        } else {
            // a range that no other thread has a part of is cut alike: its sums are rounded as if it were
            n_chunk = std::max(1, (n_rows + headkv_attend_state::N_ROWS_CHUNK - 1) / headkv_attend_state::N_ROWS_CHUNK);
            own.resize(std::max(own.size(), n_chunk * n_partial));
            for (int c = 0; c < n_chunk; ++c) {
                const int row = c * headkv_attend_state::N_ROWS_CHUNK;
                attend_rows(job, row, std::min(headkv_attend_state::N_ROWS_CHUNK, n_rows - row), own.data() + c * n_partial);
            }
            first = own.data();
        }
        float * o = out + (int64_t) (job.seq * n_tps + job.token) * n_embd_head_v * state.n_head + (int64_t) job.head * n_group * n_embd_head_v;
        combine_chunks(o, first, n_chunk, n_partial, n_group, n_embd_head_v, sinks ? (const float *) sinks->data + job.head * n_group : nullptr);
    }

    // the last thread to leave prepares the next run
    if (state.n_left.fetch_add(1, std::memory_order_acq_rel) + 1 == nth) {
        state.ticket.store(0, std::memory_order_relaxed);
        state.n_left.store(0, std::memory_order_release);
    }
}

} // namespace

ggml_tensor * headkv_build_attend_fused(ggml_context * ctx, headkv_attend_state * state,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * ranges, ggml_tensor * bias, ggml_tensor * sinks, ggml_tensor * pos) {
    GGML_ASSERT(state->kernel && "no attend kernel for these types");
    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float));
    GGML_ASSERT(q->ne[0] == state->n_embd_head_k && k->ne[0] == state->n_embd_head_k && v->ne[0] == state->n_embd_head_v);
    GGML_ASSERT(q->ne[1] == state->n_head && q->ne[2] % ranges->ne[2] == 0);
    GGML_ASSERT(ranges->type == GGML_TYPE_I32 && ranges->ne[0] == 2 && ranges->ne[1] == state->n_head_kv && ggml_is_contiguous(ranges));
    GGML_ASSERT(!bias || (bias->type == GGML_TYPE_F32 && bias->ne[0] == ranges->ne[1] && bias->ne[1] == ranges->ne[2] && ggml_is_contiguous(bias)));
    GGML_ASSERT(!sinks || (sinks->type == GGML_TYPE_F32 && ggml_nelements(sinks) == state->n_head && ggml_is_contiguous(sinks)));
    GGML_ASSERT(!pos || (pos->type == GGML_TYPE_F32 && ggml_nelements(pos) == k->ne[1] && ggml_is_contiguous(pos) && !bias && !sinks));
    GGML_ASSERT((pos != nullptr) == (state->max_bias > 0.0f));

    const int64_t n_tokens = q->ne[2];
    const int64_t n_seqs = ranges->ne[2];
    const int64_t n_out = (int64_t) state->n_embd_head_v * state->n_head * n_tokens;

    // room for the partial results of ranges that are cut
    int64_t n_partial = 0;
    if (n_tokens / n_seqs <= headkv_attend_state::N_TOKENS_SPLIT) {
        const int64_t n_chunk = k->ne[1] / headkv_attend_state::N_ROWS_CHUNK + state->n_head_kv * n_seqs;
        n_partial = n_chunk * (n_tokens / n_seqs) * (state->n_head / state->n_head_kv) * (state->n_embd_head_v + 2);
    }

    // What may be missing has a place of its own. A view of the sinks, because an op is run where its weights are.
    ggml_tensor * args[] = { q, k, v, ranges, bias, sinks ? ggml_view_1d(ctx, sinks, state->n_head, 0) : nullptr, pos };
    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, n_out + n_partial, 1, 1, 1, args, 7, attend_op, GGML_N_TASKS_MAX, state);

    headkv_op op;
    op.kind = HEADKV_OP_ATTEND;
    op.scale = state->scale;
    op.softcap = state->softcap;
    op.max_bias = state->max_bias;
    headkv_op_set(res, op);

    return ggml_view_2d(ctx, res, state->n_embd_head_v * state->n_head, n_tokens, state->n_embd_head_v * state->n_head * sizeof(float), 0);
}
