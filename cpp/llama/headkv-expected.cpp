#include "headkv-expected.h"

#include "headkv-rank.h"
#include "headkv-refs.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

static constexpr int64_t N_STEP = 8; // positions whose rotations are there at a time

headkv_rope headkv_rope_of(const ggml_tensor * q_cur) {
    headkv_rope res;
    const ggml_tensor * t = q_cur;
    while (t && t->op != GGML_OP_ROPE) {
        const bool turns_with_it = t->op == GGML_OP_RESHAPE || t->op == GGML_OP_CONT || t->op == GGML_OP_SCALE || (t->op == GGML_OP_VIEW && t->src[0] && ggml_nelements(t) == ggml_nelements(t->src[0])) || (t->op == GGML_OP_MUL && t->src[1]->ne[0] == 1); // a number for each token
        t = turns_with_it ? t->src[0] : nullptr;
    }
    if (!t || t->ne[0] != q_cur->ne[0] || (t->op_params[2] & GGML_ROPE_TYPE_MROPE)) {
        return res;
    }
    res.is_known = true;
    static_assert(sizeof(res.params) == GGML_MAX_OP_PARAMS);
    std::copy_n(t->op_params, res.params.size(), res.params.begin());
    res.factors = t->src[2];

    // lengths stay
    float ext_factor, freq_scale;
    memcpy(&freq_scale, &res.params[6], sizeof(float));
    memcpy(&ext_factor, &res.params[7], sizeof(float));
    const float attn_factor = ext_factor == 0.0f ? 1.0f : 1.0f / (1.0f + 0.1f * std::log(1.0f / freq_scale));
    memcpy(&res.params[8], &attn_factor, sizeof(float));
    return res;
}

// x [n_embd_head_k, .., n], pos I32 [n]
static ggml_tensor * build_rope(ggml_context * ctx, ggml_tensor * x, ggml_tensor * pos, const headkv_rope & rope) {
    ggml_tensor * res = ggml_rope_ext(ctx, x, pos, rope.factors, rope.params[1], rope.params[2], rope.params[4], 1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    std::copy(rope.params.begin(), rope.params.end(), res->op_params);
    return res;
}

headkv_expected::headkv_expected(const std::vector<llama_pos> & pos_all, const std::vector<int32_t> & slots_all, int64_t n, const llama_kv_cache & cache) :
    n(n), cache(cache) {
    for (size_t i = 0; i < pos_all.size(); ++i) {
        if (pos_all[i] >= HEADKV_N_FIRST) {
            pos.push_back(pos_all[i]);
            slots.push_back(slots_all[i]);
        }
    }
}

// [to][from]: the mean of the rotations by 0 to HEADKV_EXPECTED_AHEAD - 1
const std::vector<float> & headkv_expected::mean_rotation(headkv_runner & runner, const headkv_rope & rope, int64_t D) {
    for (const auto & [of, matrix] : rotations) {
        if (of == rope && (int64_t) matrix.size() == D * D) {
            return matrix;
        }
    }
    static_assert(HEADKV_EXPECTED_AHEAD % N_STEP == 0);
    headkv_scratch scratch;
    ggml_tensor * t_units = scratch.new_tensor(GGML_TYPE_F32, D, D, N_STEP);
    ggml_tensor * t_pos = scratch.new_tensor(GGML_TYPE_I32, N_STEP);
    ggml_tensor * t_turned = scratch.new_tensor(GGML_TYPE_F32, D, D, N_STEP);
    scratch.alloc(ggml_backend_cpu_buffer_type());

    std::vector<float> units(D * D * N_STEP, 0.0f);
    for (int64_t i = 0; i < D * N_STEP; ++i) {
        units[i * D + i % D] = 1.0f;
    }
    headkv_set_data(t_units, units);

    std::vector<double> sum(D * D, 0.0);
    std::vector<int32_t> at(N_STEP);
    for (int64_t first = 0; first < HEADKV_EXPECTED_AHEAD; first += N_STEP) {
        std::iota(at.begin(), at.end(), (int32_t) first);
        headkv_set_data(t_pos, at);
        runner.begin();
        ggml_context * ctx = runner.ctx.get();
        ggml_build_forward_expand(runner.gf, ggml_cpy(ctx, build_rope(ctx, t_units, t_pos, rope), t_turned));
        runner.run();
        const auto turned = headkv_get_data<float>(t_turned, units.size());
        for (int64_t i = 0; i < N_STEP; ++i) {
            for (int64_t from = 0; from < D; ++from) {
                for (int64_t to = 0; to < D; ++to) {
                    sum[to * D + from] += turned[(i * D + from) * D + to];
                }
            }
        }
    }
    n_bytes_ = std::max(n_bytes_, scratch.n_bytes());
    std::vector<float> mean(D * D);
    std::transform(sum.begin(), sum.end(), mean.begin(), [](double x) { return (float) (x / HEADKV_EXPECTED_AHEAD); });
    return rotations.emplace_back(rope, std::move(mean)).second;
}

// the references, as they would stand behind the prompt, [n_refs][n_head_kv][n_embd_head_k]
std::vector<float> headkv_expected::turned(headkv_runner & runner, const headkv_store_layer & layer, ggml_tensor * refs) {
    const int64_t D = layer.n_embd_head_k;
    const int64_t H = layer.n_head_kv;
    const int64_t n_refs = (int64_t) pos.size();
    const std::vector<float> & rotation = mean_rotation(runner, layer.rope, D);

    headkv_scratch scratch;
    ggml_tensor * t_rows = scratch.new_tensor(GGML_TYPE_I32, n_refs * H);
    ggml_tensor * t_pos = scratch.new_tensor(GGML_TYPE_I32, n_refs);
    ggml_tensor * t_rotation = scratch.new_tensor(GGML_TYPE_F32, D, D);
    ggml_tensor * t_q = scratch.new_tensor(GGML_TYPE_F32, D, H, n_refs);
    ggml_tensor * t_rot = cache.build_input_k_rot(scratch.ctx.get()); // of quantised keys, and of their queries; it is its own inverse
    scratch.alloc(ggml_backend_cpu_buffer_type());

    std::vector<int32_t> rows, ahead;
    for (int64_t i = 0; i < n_refs; ++i) {
        ahead.push_back((int32_t) n - pos[i]);
        for (int64_t ih = 0; ih < H; ++ih) {
            rows.push_back((int32_t) (slots[i] * H + ih));
        }
    }
    headkv_set_data(t_rows, rows);
    headkv_set_data(t_pos, ahead);
    headkv_set_data(t_rotation, rotation);
    if (t_rot) {
        cache.set_input_k_rot(t_rot);
    }

    runner.begin();
    ggml_context * ctx = runner.ctx.get();
    ggml_tensor * q = ggml_reshape_3d(ctx, ggml_get_rows(ctx, refs, t_rows), D, H, n_refs);
    if (t_rot) {
        q = llama_mul_mat_hadamard(ctx, q, t_rot);
    }
    q = ggml_mul_mat(ctx, t_rotation, build_rope(ctx, q, t_pos, layer.rope));
    if (t_rot) {
        q = llama_mul_mat_hadamard(ctx, q, t_rot);
    }
    ggml_build_forward_expand(runner.gf, ggml_cpy(ctx, q, t_q));
    runner.run();
    n_bytes_ = std::max(n_bytes_, scratch.n_bytes());
    return headkv_get_data<float>(t_q, D * H * n_refs);
}

// of the queries of one head, times scale and scale^2/2; q: [D] each
static void add_moments(const std::vector<const float *> & q, int64_t D, float scale, float * mean, float * covariance) {
    std::vector<double> sum(D, 0.0);
    for (const float * x : q) {
        std::transform(sum.begin(), sum.end(), x, sum.begin(), std::plus<double>());
    }
    std::vector<double> products(D * D, 0.0);
    std::vector<double> rest(D);
    for (const float * x : q) {
        std::transform(sum.begin(), sum.end(), x, rest.begin(), [&](double s, float v) { return v - s / (double) q.size(); });
        for (int64_t i = 0; i < D; ++i) {
            const double f = rest[i];
            double * row = products.data() + i * D;
            for (int64_t j = 0; j <= i; ++j) {
                row[j] += f * rest[j];
            }
        }
    }
    for (int64_t i = 0; i < D; ++i) {
        mean[i] = (float) (scale * sum[i] / (double) q.size());
        for (int64_t j = 0; j <= i; ++j) {
            covariance[i * D + j] = covariance[j * D + i] = (float) (0.5 * scale * scale * products[i * D + j] / (double) q.size());
        }
    }
}

// logits [n][n_group] to a sum of n_group probabilities, but 0 for the first cells
static void add_probs(const std::vector<float> & logits, int64_t G, int64_t g, float softcap, float share, float * scores) {
    const int64_t n = (int64_t) logits.size() / G;
    const auto logit = [&](int64_t i) { return softcap > 0.0f ? softcap * std::tanh(logits[i * G + g] / softcap) : logits[i * G + g]; };
    float largest = -INFINITY;
    for (int64_t i = HEADKV_N_FIRST; i < n; ++i) {
        largest = std::max(largest, logit(i));
    }
    std::vector<double> p(n, 0.0);
    double sum = 0.0;
    for (int64_t i = HEADKV_N_FIRST; i < n; ++i) {
        sum += p[i] = std::exp((double) logit(i) - largest);
    }
    for (int64_t i = HEADKV_N_FIRST; i < n; ++i) {
        scores[i] += (float) (share * p[i] / sum);
    }
}

// cells whose logits are computed at a time: what is made of them takes 4 MiB
static int64_t n_cells_at_once(const headkv_layer_shape & layer) {
    return std::max<int64_t>(64, (1 << 20) / (layer.n_embd_head_k * layer.n_group()));
}

std::vector<float> headkv_expected::layer(headkv_runner & runner, const headkv_store_layer & layer, ggml_tensor * refs, ggml_tensor * k_all,
        ggml_tensor * cells, int64_t n_prefix) {
    const int64_t D = layer.n_embd_head_k;
    const int64_t H = layer.n_head_kv;
    const int64_t G = layer.n_group();
    std::vector<float> scores(n_prefix * H, 0.0f);
    for (int64_t ih = 0; ih < H; ++ih) {
        std::fill_n(scores.begin() + ih * n_prefix, std::min(n_prefix, HEADKV_N_FIRST), 1.0f);
    }
    if (pos.empty() || n_prefix <= HEADKV_N_FIRST) {
        return scores;
    }
    const std::vector<float> q = turned(runner, layer, refs);

    headkv_scratch scratch;
    ggml_tensor * t_mean = scratch.new_tensor(GGML_TYPE_F32, D, G);
    ggml_tensor * t_covariance = scratch.new_tensor(GGML_TYPE_F32, D, D * G);
    ggml_tensor * t_logits = scratch.new_tensor(GGML_TYPE_F32, G, n_prefix);
    scratch.alloc(layer.buft);
    n_bytes_ = std::max(n_bytes_, scratch.n_bytes() + (q.size() + scores.size()) * sizeof(float));

    const int64_t n_step = n_cells_at_once(layer);
    for (int64_t ih = 0; ih < H; ++ih) {
        std::vector<std::vector<const float *>> of_head(G);
        for (size_t i = 0; i < pos.size(); ++i) {
            of_head[headkv_ref_head(pos[i], (int32_t) ih, (int32_t) H, (int32_t) G)].push_back(q.data() + (i * H + ih) * D);
        }
        std::vector<float> mean(D * G, 0.0f), covariance(D * D * G, 0.0f);
        for (int64_t g = 0; g < G; ++g) {
            if (!of_head[g].empty()) {
                add_moments(of_head[g], D, layer.attend->scale, mean.data() + g * D, covariance.data() + g * D * D);
            }
        }
        headkv_set_data(t_mean, mean);
        headkv_set_data(t_covariance, covariance);

        for (int64_t i = 0; i < n_prefix; i += n_step) {
            const int64_t n_now = std::min(n_step, n_prefix - i);
            runner.begin();
            ggml_context * ctx = runner.ctx.get();
            ggml_tensor * k = ggml_view_2d(ctx, k_all, D, k_all->ne[1], k_all->nb[1], ih * ggml_row_size(k_all->type, D));
            k = ggml_get_rows(ctx, k, ggml_view_1d(ctx, cells, n_now, i * sizeof(int32_t))); // F32
            ggml_tensor * of_each = ggml_reshape_3d(ctx, ggml_mul_mat(ctx, t_covariance, k), D, G, n_now);
            ggml_tensor * spread = ggml_sum_rows(ctx, ggml_mul_inplace(ctx, of_each, ggml_reshape_3d(ctx, k, D, 1, n_now)));
            ggml_tensor * logits = ggml_add(ctx, ggml_mul_mat(ctx, t_mean, k), ggml_reshape_2d(ctx, spread, G, n_now));
            ggml_tensor * to = ggml_view_2d(ctx, t_logits, G, n_now, t_logits->nb[1], i * t_logits->nb[1]);
            ggml_build_forward_expand(runner.gf, ggml_cpy(ctx, logits, to));
            runner.run();
        }
        const auto logits = headkv_get_data<float>(t_logits, G * n_prefix);
        const int64_t n_heads = G - std::count_if(of_head.begin(), of_head.end(), [](const auto & some) { return some.empty(); });
        for (int64_t g = 0; g < G; ++g) {
            if (!of_head[g].empty()) {
                add_probs(logits, G, g, layer.attend->softcap, 1.0f / (float) n_heads, scores.data() + ih * n_prefix);
            }
        }
    }
    return scores;
}

int64_t headkv_expected_bytes(const headkv_layer_shape & layer, int64_t n) {
    const int64_t D = layer.n_embd_head_k;
    const int64_t G = layer.n_group();
    const int64_t H = layer.n_head_kv;
    const int64_t n_q = D * H * std::min<int64_t>(n, HEADKV_MAX_REFS);
    const int64_t n_turned = D * D * N_STEP;
    const int64_t tensors = std::max({ 2 * n_turned, n_q + D * D + 2 * n, D * G + D * D * G + G * n + n_q + n * H });
    const int64_t graph = std::max({ n_turned, 4 * n_q, (D * G + D + 4 * G) * std::min(n, n_cells_at_once(layer)) });
    return (tensors + graph) * (int64_t) sizeof(float);
}

std::string headkv_why_no_expected(const std::vector<headkv_store_layer> & layers) {
    for (const auto & layer : layers) {
        if (!headkv_is_cpu(layer.buft)) {
            return format("rank 'expected' runs on the CPU only, and the cells of layer %d are on %s: use another rank, or -ngl 0", layer.il, ggml_backend_buft_name(layer.buft));
        }
        if (!layer.rope.is_known) {
            return format("rank 'expected' turns queries to later positions, and those of layer %d are not rotated by one RoPE of their position: use another rank", layer.il);
        }
    }
    return "";
}
