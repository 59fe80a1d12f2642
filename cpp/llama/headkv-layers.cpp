// Layer-major prefill: the graph of a ubatch is cut at the outputs of its layers.
//
// Upstream builds the whole graph of the ubatch. The nodes between l_out-<il - 1> and l_out-<il> are kept; the former
// becomes a leaf over the hidden states of the prompt, the latter is copied there. No model file knows about it.

#include "headkv-hooks.h"

#include "llama-kv-cache-ragged.h"

#include "llama-graph.h"
#include "llama-impl.h"

#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

static std::vector<ggml_tensor *> graph_nodes(ggml_cgraph * gf) {
    std::vector<ggml_tensor *> res;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        res.push_back(ggml_graph_node(gf, i));
    }
    return res;
}

// index of the output of layer il, -1 = none
static int find_l_out(const std::vector<ggml_tensor *> & nodes, int32_t il) {
    const std::string name = "l_out-" + std::to_string(il);
    for (size_t i = 0; i < nodes.size(); ++i) {
        if (name == nodes[i]->name) {
            return (int) i;
        }
    }
    return -1;
}

// why the layers of a graph cannot be computed one by one; empty = they can
static std::string why_not_separable(const std::vector<ggml_tensor *> & nodes, int32_t n_layer, int64_t n_embd, int64_t n_tokens) {
    std::unordered_map<const ggml_tensor *, int> index;
    int i_first_write = (int) nodes.size(); // into the cache
    for (size_t i = 0; i < nodes.size(); ++i) {
        index[nodes[i]] = (int) i;
        if (nodes[i]->op == GGML_OP_SET_ROWS && i_first_write == (int) nodes.size()) {
            i_first_write = (int) i;
        }
    }
    int prev = -1;
    for (int32_t il = 0; il < n_layer - 1; ++il) {
        const int cur = find_l_out(nodes, il);
        if (cur < 0) {
            return format("the graph has no node 'l_out' for layer %d", il);
        }
        const ggml_tensor * t = nodes[cur];
        if (t->type != GGML_TYPE_F32 || t->view_src || !ggml_is_contiguous(t) || t->ne[0] != n_embd || t->ne[1] != n_tokens || ggml_nrows(t) != n_tokens) {
            return format("the output of layer %d is not one F32 row of %lld elements per token", il, (long long) n_embd);
        }
        if (cur <= prev) {
            return format("layer %d is computed before layer %d", il, il - 1);
        }
        prev = cur;
    }
    // a layer may use the residual stream and what is computed from the inputs alone, before anything was cached
    int begin = find_l_out(nodes, 0);
    for (int32_t il = 1; il < n_layer; ++il) {
        const int end = il < n_layer - 1 ? find_l_out(nodes, il) : (int) nodes.size() - 1;
        for (int i = begin + 1; i <= end; ++i) {
            std::vector<const ggml_tensor *> used(nodes[i]->src, nodes[i]->src + GGML_MAX_SRC);
            used.push_back(nodes[i]->view_src);
            for (const ggml_tensor * src : used) {
                const auto it = src ? index.find(src) : index.end();
                if (it != index.end() && it->second < begin && it->second >= i_first_write) {
                    return format("layer %d uses '%s' of an earlier layer", il, src->name);
                }
            }
        }
        begin = end;
    }
    return "";
}

// inputs of all nodes; those of layers that are cut away stay, because all of them are set
static std::vector<ggml_tensor *> graph_inputs(const std::vector<ggml_tensor *> & nodes) {
    std::vector<ggml_tensor *> res;
    std::unordered_set<ggml_tensor *> seen;
    for (ggml_tensor * node : nodes) {
        for (ggml_tensor * src : node->src) {
            if (src && src->op == GGML_OP_NONE && (src->flags & GGML_TENSOR_FLAG_INPUT) && seen.insert(src).second) {
                res.push_back(src);
            }
        }
    }
    return res;
}

// The output of a layer becomes a leaf over the hidden states, or a copy of them where these are of another type.
static void make_leaf(ggml_tensor * x, ggml_tensor * hidden, ggml_tensor * slice, size_t offset) {
    x->op = GGML_OP_NONE;
    x->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
    for (auto & src : x->src) {
        src = nullptr;
    }
    if (hidden->type == x->type) {
        ggml_backend_tensor_alloc(hidden->buffer, x, (char *) hidden->data + offset);
    } else {
        // what ggml_cast() would make
        x->op = GGML_OP_CPY;
        x->src[0] = slice;
        x->src[1] = x;
    }
}

void headkv_cut_graph(const llm_graph_params & params, llm_graph_result & res) {
    const auto * mctx = dynamic_cast<const llama_kv_cache_ragged_context *>(params.mctx);
    if (!mctx || (!mctx->is_full() && !mctx->is_layered())) {
        return; // decode builds graphs too
    }
    auto * kv = mctx->get_kv();
    ggml_cgraph * gf = res.get_gf();
    const std::vector<ggml_tensor *> nodes = graph_nodes(gf);
    const int64_t n_tokens = params.ubatch.n_tokens;

    if (mctx->is_full()) {
        if (!kv->is_graph_complete()) {
            kv->refuse("it does not pass every layer's attention through the cache exactly once");
        }
        if (params.ubatch.n_tokens > params.ubatch.n_seqs) {
            kv->note_layers(why_not_separable(nodes, kv->n_layer(), params.hparams.n_embd, n_tokens));
        }
        return;
    }

    const int32_t il = mctx->layer_step();
    const bool last = il == kv->n_layer() - 1;

    ggml_tensor * hidden = kv->staging().hidden();
    const size_t offset = mctx->hidden_step() * hidden->nb[1];

    const int begin = il == 0 ? -1 : find_l_out(nodes, il - 1);
    const int end = last ? (int) nodes.size() - 1 : find_l_out(nodes, il);
    GGML_ASSERT((il == 0 || begin >= 0) && end > begin && "the graph differs from the one that was examined");

    const std::vector<ggml_tensor *> inputs = graph_inputs(nodes);

    ggml_context * ctx = res.get_ctx();
    ggml_tensor * slice = ggml_view_2d(ctx, hidden, hidden->ne[0], n_tokens, hidden->nb[1], offset);

    ggml_tensor * x = begin >= 0 ? nodes[begin] : nullptr;
    if (x) {
        make_leaf(x, hidden, slice, offset);
    }

    ggml_graph_clear(gf);
    for (ggml_tensor * t : inputs) {
        ggml_build_forward_expand(gf, t);
    }
    if (x && x->op != GGML_OP_NONE) {
        ggml_build_forward_expand(gf, x);
    }
    // of the last layer, tokens without output leave nothing but their cells, and the attention they paid if it is counted
    const bool only_cells = last && params.n_outputs == 0 && !mctx->get_sums(il);
    for (int i = begin + 1; i <= end; ++i) {
        if (only_cells && nodes[i]->op != GGML_OP_SET_ROWS) {
            continue;
        }
        // upstream keeps branches in the graph that it does not compute
        if (nodes[i]->flags & GGML_TENSOR_FLAG_COMPUTE) {
            ggml_build_forward_expand(gf, nodes[i]);
        } else {
            ggml_build_forward_order(gf, nodes[i]);
        }
    }
    if (!last) {
        ggml_build_forward_expand(gf, ggml_cpy(ctx, nodes[end], slice));
    }
}
