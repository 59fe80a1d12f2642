// Layer-major prefill: the graph of a ubatch is cut at the outputs of its layers.
//
// Upstream builds the whole graph of the ubatch. Kept are the output of layer il, what the layer writes into its cells or
// states, and all that they are computed of, up to the output of layer il - 1; that one becomes a leaf over the hidden states
// of the prompt, and the output of layer il is copied there. No model file knows about it.

#include "headkv-graph.h"
#include "headkv-hooks.h"
#include "llama-kv-cache-ragged.h"

#include "llama-graph.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstring>
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

// what a node is computed of
template <typename F>
static void for_sources(const ggml_tensor * node, const F & f) {
    for (const ggml_tensor * src : node->src) {
        if (src) {
            f(src);
        }
    }
    if (node->view_src) {
        f(node->view_src);
    }
}

// whether a node writes into memory that outlives the graph: cells, states of recurrent layers, what is captured
static bool is_kept(const ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_NONE:
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return false;
        default:
            return node->view_src && node->view_src->buffer; // nothing else is allocated when a graph is complete
    }
}

// The nodes of a graph by layers.
class layers_of_graph {
public:
    layers_of_graph(std::vector<ggml_tensor *> all, const llama_kv_cache_ragged & kv) :
        nodes(std::move(all)), n_layer(kv.n_layer()) {
        for (size_t i = 0; i < nodes.size(); ++i) {
            index[nodes[i]] = (int) i;
        }
        find_outputs();
        of_node.assign(nodes.size(), 0);
        std::vector<int32_t> leads_to(nodes.size(), 0); // layer of what is computed of it
        for (size_t i = 0; i < nodes.size(); ++i) {
            for_sources(nodes[i], [&](const ggml_tensor * src) {
                const auto it = index.find(src);
                of_node[i] = it != index.end() ? std::max(of_node[i], leads_to[it->second]) : of_node[i];
            });
            const int32_t il = is_kept(nodes[i]) ? kv.layer_of(nodes[i]->view_src) : -1;
            of_node[i] = il >= 0 ? il : of_node[i]; // what is cleared or moved asks for nothing of its layer
            const auto out = std::find(outputs.begin() + std::min<size_t>(of_node[i], outputs.size()), outputs.end(), (int) i);
            leads_to[i] = out != outputs.end() ? (int32_t) (out - outputs.begin()) + 1 : of_node[i];
        }
    }

    // of all layers but the last
    ggml_tensor * output(int32_t il) const { return nodes.at(outputs.at(il)); }

    // What layer il computes, in order; only_kept: what it writes, and what that is computed of.
    std::vector<ggml_tensor *> of_layer(int32_t il, bool only_kept) const {
        std::vector<int> todo;
        for (size_t i = 0; i < nodes.size(); ++i) {
            const bool wanted = is_kept(nodes[i]) || (!only_kept && (il < n_layer - 1 ? (int) i == outputs[il] : true));
            if (of_node[i] == il && wanted && (nodes[i]->flags & GGML_TENSOR_FLAG_COMPUTE)) {
                todo.push_back((int) i);
            }
        }
        std::vector<bool> seen(nodes.size());
        while (!todo.empty()) {
            const int i = todo.back();
            todo.pop_back();
            if (seen[i] || (il > 0 && i == outputs[il - 1])) {
                continue;
            }
            seen[i] = true;
            for_sources(nodes[i], [&](const ggml_tensor * src) {
                const auto it = index.find(src);
                if (it != index.end()) {
                    todo.push_back(it->second);
                }
            });
        }
        std::vector<ggml_tensor *> res;
        for (size_t i = 0; i < nodes.size(); ++i) {
            if (seen[i]) {
                res.push_back(nodes[i]);
            }
        }
        return res;
    }

    // why the layers cannot be computed one by one; empty = they can
    std::string why_not_separable(int64_t n_embd, int64_t n_tokens) const {
        for (int32_t il = 0; il < n_layer - 1; ++il) {
            if (outputs[il] < 0) {
                return format("the graph has no node 'l_out' for layer %d", il);
            }
            const ggml_tensor * t = output(il);
            if (t->type != GGML_TYPE_F32 || t->view_src || !ggml_is_contiguous(t) || t->ne[0] != n_embd || t->ne[1] != n_tokens || ggml_nrows(t) != n_tokens) {
                return format("the output of layer %d is not one F32 row of %lld elements per token", il, (long long) n_embd);
            }
            if (of_node[outputs[il]] != il) {
                return format("the output of layer %d is not computed of that of the one before", il);
            }
        }
        // what a layer uses of earlier ones beside their output, it computes again: that must not touch what they write
        std::unordered_map<const ggml_tensor *, int32_t> writer;
        for (size_t i = 0; i < nodes.size(); ++i) {
            if (is_kept(nodes[i])) {
                writer[nodes[i]->view_src] = of_node[i];
            }
        }
        std::string res;
        for (int32_t il = 0; il < n_layer && res.empty(); ++il) {
            for (const ggml_tensor * node : of_layer(il, false)) {
                for_sources(node, [&](const ggml_tensor * src) {
                    const auto it = writer.find(src->view_src ? src->view_src : src);
                    if (it != writer.end() && it->second != il && res.empty()) {
                        res = format("layer %d uses '%s' of layer %d", il, node->name, it->second);
                    }
                });
            }
        }
        return res;
    }

private:
    const std::vector<ggml_tensor *> nodes;
    const int32_t n_layer;

    std::unordered_map<const ggml_tensor *, int> index;
    std::vector<int> outputs; // [n_layer - 1] index, -1 = none
    std::vector<int32_t> of_node; // the first layer whose input it does not need

    void find_outputs() {
        // what model files call the output of layer il; the last name is that of the input of the next one
        std::unordered_map<std::string, int> by_name;
        for (size_t i = 0; i < nodes.size(); ++i) {
            by_name.insert({ nodes[i]->name, (int) i });
        }
        for (const auto & [name, shift] : { std::make_pair("l_out", 0), std::make_pair("nemotron_h_block_out", 0), std::make_pair("attn_norm_in", 1) }) {
            std::vector<int> found;
            for (int32_t il = 0; il < n_layer - 1; ++il) {
                const auto it = by_name.find(format("%s-%d", name, il + shift));
                found.push_back(it != by_name.end() ? it->second : -1);
            }
            const bool complete = std::find(found.begin(), found.end(), -1) == found.end();
            if (complete || outputs.empty()) {
                outputs = found;
            }
            if (complete) {
                return;
            }
        }
    }
};

// Inputs of all nodes: those of layers that are cut away stay, because all of them are set. Masks of attention do not: they
// grow from step to step while the nodes of the layer keep their sizes, which is all that the allocator looks at, and one
// without memory is not set.
static std::vector<ggml_tensor *> graph_inputs(const std::vector<ggml_tensor *> & nodes) {
    std::vector<ggml_tensor *> res;
    std::unordered_set<ggml_tensor *> seen;
    for (ggml_tensor * node : nodes) {
        for (ggml_tensor * src : node->src) {
            const bool is_input = src && src->op == GGML_OP_NONE && (src->flags & GGML_TENSOR_FLAG_INPUT);
            if (is_input && strncmp(src->name, HEADKV_MASK_NAME, strlen(HEADKV_MASK_NAME)) != 0 && seen.insert(src).second) {
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

    if (mctx->is_full() && !kv->is_graph_complete()) {
        kv->refuse("it does not pass every layer's attention through the cache exactly once");
    }
    if (mctx->is_full() && params.ubatch.n_tokens == params.ubatch.n_seqs) {
        return; // the graph of decode
    }
    const layers_of_graph layers(nodes, *kv);
    if (mctx->is_full()) {
        kv->note_layers(layers.why_not_separable(params.hparams.n_embd, n_tokens));
        return;
    }

    const int32_t il = mctx->layer_step();
    const bool last = il == kv->n_layer() - 1;

    ggml_tensor * hidden = kv->staging().hidden();
    const size_t offset = mctx->hidden_step() * hidden->nb[1];

    // of the last layer, tokens without output leave nothing but their cells or state, and the attention they paid if it is counted
    const std::vector<ggml_tensor *> kept = layers.of_layer(il, last && params.n_outputs == 0 && !mctx->get_sums(il));
    const std::vector<ggml_tensor *> inputs = graph_inputs(nodes);

    ggml_context * ctx = res.get_ctx();
    ggml_tensor * slice = ggml_view_2d(ctx, hidden, hidden->ne[0], n_tokens, hidden->nb[1], offset);

    ggml_tensor * x = il > 0 ? layers.output(il - 1) : nullptr;
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
    for (ggml_tensor * node : kept) {
        ggml_build_forward_expand(gf, node);
    }
    if (!last) {
        ggml_build_forward_expand(gf, ggml_cpy(ctx, layers.output(il), slice));
    }
}
