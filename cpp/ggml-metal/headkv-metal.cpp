// Uses the C interface of upstream's ggml-metal-device.h alone: there is no Objective-C here. The kernels are a library of their own for
// each head size and type, compiled by Metal when the device is first asked whether it runs such an op.
#include "headkv-metal.h"

#include "headkv-args.h"
#include "headkv-metal-source.h"
#include "headkv-op.h"

#include "ggml-metal-device.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <algorithm>
#include <initializer_list>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

static_assert((int) HEADKV_METAL_CHUNK == HEADKV_SCORE_CHUNK, "chunks of the kernel are those of the op");

namespace {

// what follows from the shapes alone
struct attend_grid {
    int n_query; // of a head
    int nq;      // of them in a threadgroup
    int n_tiles;
    int n_rows_chunk;
    int n_chunks_max;

    explicit attend_grid(const ggml_tensor * op) {
        const ggml_tensor * q = op->src[0];
        const int n_head_kv = (int) op->src[3]->ne[1];
        const int n_seqs = (int) op->src[3]->ne[2];
        const int n_ranges = n_head_kv * n_seqs;
        const int64_t n_rows = op->src[1]->ne[1];

        n_query = (int) (q->ne[1] / n_head_kv * (q->ne[2] / n_seqs));
        nq = n_query <= 4 ? 4 : 8;
        n_tiles = (n_query + nq - 1) / nq;

        // enough threadgroups for every device, but no more partial results than they are worth
        constexpr int N_GROUPS = 1024;
        const int64_t n = (n_rows * n_tiles / N_GROUPS + HEADKV_METAL_TILE - 1) / HEADKV_METAL_TILE * HEADKV_METAL_TILE;
        n_rows_chunk = (int) std::min<int64_t>(std::max<int64_t>(n, HEADKV_METAL_TILE), 8 * HEADKV_METAL_TILE);
        n_chunks_max = (int) (n_rows / n_rows_chunk) + n_ranges; // ranges do not overlap

        // Partial results take the room that the op has behind its result, for few tokens; many tokens keep a device busy without.
        const int64_t n_room = ggml_nelements(op) - ggml_nelements(q);
        if (n_ranges * n_tiles >= N_GROUPS || n_chunks_max * n_query * (q->ne[0] + 2) > n_room) {
            n_rows_chunk = HEADKV_METAL_WHOLE;
            n_chunks_max = n_ranges;
        }
    }

    bool is_cut() const { return n_rows_chunk < HEADKV_METAL_WHOLE; }
};

int type_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16: return HEADKV_F16;
        case GGML_TYPE_BF16: return HEADKV_BF16;
        case GGML_TYPE_Q8_0: return HEADKV_Q8_0;
        default: return 0;
    }
}

// one of the texts with its definitions
struct program {
    headkv_op_kind kind = HEADKV_OP_NONE;
    int type = 0;
    int d = 0;
    int nq = 0;

    // none if the op is not one of the kernels'
    explicit program(const ggml_tensor * op) {
        const headkv_op known = headkv_op_get(op);
        if (known.max_bias > 0.0f) {
            return; // ALiBi is the CPU's
        }
        const ggml_tensor * q = op->src[0];
        switch (known.kind) {
            case HEADKV_OP_ATTEND: {
                const ggml_tensor * k = op->src[1];
                const ggml_tensor * v = op->src[2];
                if (v->ne[0] == q->ne[0] && k->type == v->type && reads(q, k) && reads(q, v)) {
                    set(HEADKV_OP_ATTEND, k->type, q->ne[0], attend_grid(op).nq);
                }
            } break;
            case HEADKV_OP_STATS:
            case HEADKV_OP_SCORE: {
                if (reads(q, op->src[1])) {
                    set(HEADKV_OP_SCORE, op->src[1]->type, q->ne[0], 0);
                }
            } break;
            case HEADKV_OP_SELECT: {
                if (op->src[0]->nb[0] == sizeof(float) && op->src[0]->ne[0] < 1 << 30) {
                    kind = HEADKV_OP_SELECT;
                }
            } break;
            case HEADKV_OP_COMPACT: {
                if (headkv_compact_word(op) >= 2 && op->src[2]->ne[0] < 1 << 30) {
                    kind = HEADKV_OP_COMPACT;
                }
            } break;
            default: break;
        }
    }

    bool operator<(const program & other) const {
        return std::tie(kind, type, d, nq) < std::tie(other.kind, other.type, other.d, other.nq);
    }

    std::string source() const {
        std::string res;
        if (type) {
            res = "#define HEADKV_TYPE " + std::to_string(type) + "\n#define HEADKV_D " + std::to_string(d) + "\n#define HEADKV_NQ " + std::to_string(nq) + "\n";
        }
        res += HEADKV_METAL_COMMON;
        switch (kind) {
            case HEADKV_OP_ATTEND: return res + HEADKV_METAL_ATTEND;
            case HEADKV_OP_SCORE: return res + HEADKV_METAL_SCORE;
            case HEADKV_OP_SELECT: return res + HEADKV_METAL_SELECT_BEST;
            default: return res + HEADKV_METAL_COMPACT_ROWS;
        }
    }

    std::vector<const char *> kernels() const {
        switch (kind) {
            case HEADKV_OP_ATTEND: return { "headkv_attend", "headkv_combine" };
            case HEADKV_OP_SCORE: return { "headkv_stats", "headkv_pooled" };
            case HEADKV_OP_SELECT: return { "headkv_select" };
            default: return { "headkv_compact" };
        }
    }

private:
    void set(headkv_op_kind kind, ggml_type type, int64_t d, int nq) {
        this->kind = kind;
        this->type = type_of(type);
        this->d = (int) d;
        this->nq = nq;
    }

    static bool reads(const ggml_tensor * q, const ggml_tensor * rows) {
        const int64_t d = q->ne[0];
        if (q->nb[0] != sizeof(float) || q->nb[1] % sizeof(float) != 0 || q->nb[2] % sizeof(float) != 0) {
            return false;
        }
        if ((d != 64 && d != 80 && d != 96 && d != 128 && d != 256) || !type_of(rows->type) || d % ggml_blck_size(rows->type) != 0) {
            return false;
        }
        // rows of 16-bit elements are read 16 bytes at a time
        return rows->type == GGML_TYPE_Q8_0 || (rows->nb[1] % 16 == 0 && rows->view_offs % 16 == 0);
    }
};

typedef std::map<std::string, ggml_metal_pipeline_with_params> pipelines;

// the kernels of a program by name, compiled once for each device; empty = Metal did not compile them
const pipelines & pipelines_of(ggml_metal_device_t dev, const program & p) {
    // as long as the process: devices are
    static std::mutex & mutex = *new std::mutex;
    static auto & all = *new std::map<std::pair<ggml_metal_device_t, program>, pipelines>;

    std::lock_guard<std::mutex> lock(mutex);
    const auto [it, is_new] = all.insert({ { dev, p }, {} });
    if (is_new) {
        ggml_metal_library_t lib = ggml_metal_library_init_from_source(dev, p.source().c_str(), true);
        for (const char * name : p.kernels()) {
            const auto pipeline = lib ? ggml_metal_library_compile_pipeline(lib, name, name, nullptr) : ggml_metal_pipeline_with_params{};
            if (!pipeline.pipeline) {
                GGML_LOG_ERROR("%s: Metal does not compile %s (type %d, head size %d): such layers take ggml's own ops\n",
                        __func__, name, p.type, p.d);
                it->second.clear();
                break;
            }
            it->second[name] = pipeline;
        }
    }
    return it->second;
}

ggml_metal_buffer_id buffer_of(const ggml_tensor * t, size_t offs = 0) {
    const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    ggml_metal_buffer_id res = ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);
    res.offs += offs;
    return res;
}

// one run of a kernel
struct dispatch {
    ggml_metal_encoder_t enc;

    dispatch(ggml_metal_encoder_t enc, const pipelines & all, const char * name) :
        enc(enc) {
        ggml_metal_encoder_set_pipeline(enc, all.at(name));
    }

    template <class Args> void run(Args & args, std::initializer_list<ggml_metal_buffer_id> buffers, std::initializer_list<size_t> shared,
            int n0, int n1, int n_threads) {
        int i = 0;
        ggml_metal_encoder_set_bytes(enc, &args, sizeof(args), i++);
        for (const ggml_metal_buffer_id & buffer : buffers) {
            ggml_metal_encoder_set_buffer(enc, buffer, i++);
        }
        i = 0;
        for (size_t n_elements : shared) {
            ggml_metal_encoder_set_threadgroup_memory_size(enc, GGML_PAD(n_elements * sizeof(float), 16), i++);
        }
        ggml_metal_encoder_dispatch_threadgroups(enc, n0, n1, 1, n_threads, 1, 1);
    }
};

// tensors of the op: q, k, v, ranges, bias, sinks
void encode_attend(ggml_metal_encoder_t enc, const pipelines & all, ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * ranges = dst->src[3];
    const ggml_tensor * bias = dst->src[4];
    const ggml_tensor * sinks = dst->src[5];

    const headkv_op op = headkv_op_get(dst);
    const attend_grid g(dst);

    headkv_metal_attend a = {};
    a.nq1 = q->nb[1] / sizeof(float);
    a.nq2 = q->nb[2] / sizeof(float);
    a.nb_k = k->nb[1];
    a.nb_v = v->nb[1];
    a.n_head_kv = (int) ranges->ne[1];
    a.n_ranges = (int) (ranges->ne[1] * ranges->ne[2]);
    a.n_tps = (int) (q->ne[2] / ranges->ne[2]);
    a.n_group = (int) (q->ne[1] / ranges->ne[1]);
    a.n_rows_chunk = g.n_rows_chunk;
    a.has_bias = bias != nullptr;
    a.has_sinks = sinks != nullptr;
    a.scale = op.scale;
    a.softcap = op.softcap;

    // what is missing is not read
    const ggml_metal_buffer_id out = buffer_of(dst);
    const ggml_metal_buffer_id partials = buffer_of(dst, g.is_cut() ? ggml_nelements(q) * sizeof(float) : 0);
    const ggml_metal_buffer_id of_bias = buffer_of(bias ? bias : ranges);
    const ggml_metal_buffer_id of_sinks = buffer_of(sinks ? sinks : ranges);
    const size_t nq = g.nq;

    dispatch(enc, all, "headkv_attend")
            .run(a, { buffer_of(q), buffer_of(k), buffer_of(v), buffer_of(ranges), of_bias, of_sinks, out, partials },
                    { nq * q->ne[0], nq * HEADKV_METAL_TILE, nq, nq, nq }, g.n_chunks_max, g.n_tiles, HEADKV_METAL_THREADS);
    if (g.is_cut()) {
        ggml_metal_encoder_memory_barrier(enc);
        dispatch(enc, all, "headkv_combine").run(a, { buffer_of(ranges), of_sinks, partials, out }, {}, a.n_ranges, g.n_query, HEADKV_METAL_THREADS);
    }
}

// tensors of the ops: q, k, cells, and for the second one stats and sinks
void encode_score(ggml_metal_encoder_t enc, const pipelines & all, ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * cells = dst->src[2];
    const ggml_tensor * stats = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];

    const headkv_op op = headkv_op_get(dst);
    const bool is_pooled = op.kind == HEADKV_OP_SCORE;
    const int64_t d = q->ne[0];

    headkv_metal_score a = {};
    a.nq1 = q->nb[1] / sizeof(float);
    a.nq2 = q->nb[2] / sizeof(float);
    a.nb_k = k->nb[1];
    a.nb_head = ggml_row_size(k->type, d);
    a.n_head_kv = (int) (k->ne[0] / d);
    a.n_group = (int) q->ne[1] / a.n_head_kv;
    a.n_window = (int) q->ne[2];
    a.n_kv = (int) cells->ne[0];
    a.n_prefix = is_pooled ? (int) dst->ne[0] : 0;
    a.n_square = op.n_square;
    a.n_chunk = (a.n_kv + HEADKV_METAL_CHUNK - 1) / HEADKV_METAL_CHUNK;
    a.pool_max = op.pool_max;
    a.pool_kernel = op.pool_kernel;
    a.has_sinks = sinks != nullptr;
    a.scale = op.scale;
    a.softcap = op.softcap;

    const size_t n_queries = HEADKV_METAL_QUERIES * d;
    const size_t n_products = HEADKV_METAL_TILE * HEADKV_METAL_QUERIES;
    if (!is_pooled) {
        dispatch(enc, all, "headkv_stats")
                .run(a, { buffer_of(q), buffer_of(k), buffer_of(cells), buffer_of(dst) }, { n_queries, n_products }, a.n_chunk, a.n_head_kv, HEADKV_METAL_THREADS);
        return;
    }
    const int n_step = HEADKV_METAL_TILE - 2 * (a.pool_kernel / 2);
    dispatch(enc, all, "headkv_pooled")
            .run(a, { buffer_of(q), buffer_of(k), buffer_of(cells), buffer_of(stats), buffer_of(sinks ? sinks : stats), buffer_of(dst) },
                    { n_queries, n_products, HEADKV_METAL_TILE, 2 * HEADKV_METAL_QUERIES }, (a.n_prefix + n_step - 1) / n_step, a.n_head_kv, HEADKV_METAL_THREADS);
}

// tensors of the op: scores, plan
void encode_select(ggml_metal_encoder_t enc, const pipelines & all, ggml_tensor * dst) {
    const ggml_tensor * scores = dst->src[0];
    const ggml_tensor * plan = dst->src[1];

    headkv_metal_select a = {};
    a.n_scores = scores->nb[1] / sizeof(float);
    a.n_plan = plan->nb[1] / sizeof(int32_t);
    a.n_prefix = (int) scores->ne[0];
    a.n_recent = headkv_op_get(dst).n_recent;

    // the CPU's keys come before the result
    const ggml_metal_buffer_id kept = buffer_of(dst, 2 * ggml_nelements(scores) * sizeof(int32_t));
    dispatch(enc, all, "headkv_select")
            .run(a, { buffer_of(scores), buffer_of(plan), kept }, { 256, HEADKV_METAL_SELECT / HEADKV_METAL_SIMD, 2 }, (int) scores->ne[1], 1, HEADKV_METAL_SELECT);
}

// tensors of the op: pool, cells, kept, cell, plan
void encode_compact(ggml_metal_encoder_t enc, const pipelines & all, ggml_tensor * dst) {
    const ggml_tensor * cells = dst->src[1];
    const ggml_tensor * kept = dst->src[2];
    const ggml_tensor * cell = dst->src[3];
    const ggml_tensor * plan = dst->src[4];
    const int n_head = (int) plan->ne[1];

    headkv_metal_compact a = {};
    a.nb_pool = dst->nb[1];
    a.nb_cells = cells->nb[1];
    a.nb_head = ggml_row_size(dst->type, dst->ne[0]);
    a.n_plan = plan->nb[1] / sizeof(int32_t);
    a.n_word = (int) headkv_compact_word(dst);

    // as if one head had all rows, but no more threadgroups than every device has work for
    constexpr int N_GROUPS = 1024;
    const int n_rows = HEADKV_METAL_COMPACT / std::min<int>((int) a.nb_head / a.n_word, HEADKV_METAL_COMPACT);
    a.n_groups = (int) std::min<int64_t>((kept->ne[0] + n_rows - 1) / n_rows, (N_GROUPS + n_head - 1) / n_head);
    if (a.n_groups > 0) {
        dispatch(enc, all, "headkv_compact")
                .run(a, { buffer_of(cells), buffer_of(kept), buffer_of(cell), buffer_of(plan), buffer_of(dst) }, {}, a.n_groups, n_head, HEADKV_METAL_COMPACT);
    }
}

} // namespace

bool headkv_metal_supports(ggml_metal_device * dev, const ggml_tensor * op) {
    const program p(op);
    // SIMD groups of 32 threads and their reductions
    return p.kind != HEADKV_OP_NONE && ggml_metal_device_get_props(dev)->supports_gpu_family_apple7 && !pipelines_of(dev, p).empty();
}

bool headkv_metal_encode(ggml_metal_device * dev, ggml_metal_encoder * enc, ggml_tensor * dst) {
    if (!headkv_metal_supports(dev, dst)) {
        return false;
    }
    if ((dst->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
        return true;
    }
    const program p(dst);
    const pipelines & all = pipelines_of(dev, p);
    ggml_metal_encoder_memory_barrier(enc);
    switch (p.kind) {
        case HEADKV_OP_ATTEND: encode_attend(enc, all, dst); break;
        case HEADKV_OP_SCORE: encode_score(enc, all, dst); break;
        case HEADKV_OP_SELECT: encode_select(enc, all, dst); break;
        default: encode_compact(enc, all, dst); break;
    }
    return true;
}
