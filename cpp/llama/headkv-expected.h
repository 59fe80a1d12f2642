// Expected Attention: what tokens to come would attend to, if their queries were distributed as those of the prompt are.
//
// The references (headkv-refs.h) of a query head, but for those of the first HEADKV_N_FIRST tokens, whose cells have the score 1, are turned to
// the positions behind the prompt, on average over the next HEADKV_EXPECTED_AHEAD ones: the mean of their rotations is a matrix. mu and S are
// the mean and the covariance of what it makes of them. The logit of key k is log E exp(x) of a normal x = scale*q k, scale*mu k +
// scale^2/2 k S k, capped where the layer caps its logits; a softmax over the cells behind the first ones, and the mean over the query heads
// of a group. Sinks of a layer take no part.
#pragma once

#include "headkv-runner.h"
#include "headkv-store.h"

#include "llama.h"

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

class llama_kv_cache;

constexpr int64_t HEADKV_EXPECTED_AHEAD = 512; // positions behind the prompt

// The scores of one compression, layer by layer.
class headkv_expected {
public:
    // pos and slots: of the references of a prompt of n tokens, in position order; cache: one whose keys are rotated as the staged ones are
    headkv_expected(const std::vector<llama_pos> & pos, const std::vector<int32_t> & slots, int64_t n, const llama_kv_cache & cache);

    // Scores [n_head_kv][n_prefix]. refs: F16 [n_embd_head_k, n_head_kv*n_slots]; k_all: staged, [n_embd_head_k*n_head_kv, n_cells];
    // cells: I32, of the positions. Throws when memory is short.
    std::vector<float> layer(headkv_runner & runner, const headkv_store_layer & layer, ggml_tensor * refs, ggml_tensor * k_all,
            ggml_tensor * cells, int64_t n_prefix);

    size_t n_bytes() const { return n_bytes_; } // beside the graph, at most

private:
    const std::vector<float> & mean_rotation(headkv_runner & runner, const headkv_rope & rope, int64_t D);
    std::vector<float> turned(headkv_runner & runner, const headkv_store_layer & layer, ggml_tensor * refs);

    std::vector<llama_pos> pos; // of the references that count
    std::vector<int32_t> slots;
    const int64_t n;
    const llama_kv_cache & cache;

    std::vector<std::pair<headkv_rope, std::vector<float>>> rotations; // [n_embd_head_k][n_embd_head_k], of those that layers have
    size_t n_bytes_ = 0;
};

// bytes of it for a layer
int64_t headkv_expected_bytes(const headkv_layer_shape & layer, int64_t n);

// How a graph rotates the queries that it attends with; is_known is false if that is not one rotation by the position of the token alone.
headkv_rope headkv_rope_of(const ggml_tensor * q_cur);

// why cells cannot be scored so in these layers; empty = they can
std::string headkv_why_no_expected(const std::vector<headkv_store_layer> & layers);
