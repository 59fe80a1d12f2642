// The inputs of graphs in which some layers are not ours: upstream's types, each part with the context of its own memory.
// Upstream's attention takes the windowed layers as those of a plain cache, and its recurrent layers do not see a difference.

#include "headkv-graph.h"
#include "headkv-hooks.h"
#include "llama-kv-cache-ragged.h"

namespace {

const llama_kv_cache_ragged_context * ragged(const llama_memory_context_i * mctx) {
    return dynamic_cast<const llama_kv_cache_ragged_context *>(mctx);
}

// windowed layers: attention to a ring, each sequence to its own
class windowed_input : public llm_graph_input_attn_kv {
public:
    windowed_input(const llm_graph_context & gctx, const llama_kv_cache_context * ring) :
        llm_graph_input_attn_kv(gctx.hparams, gctx.cparams, ring) {
        ggml_context * ctx = gctx.ctx0;
        const auto & ubatch = gctx.ubatch;
        self_k_idxs = ring->build_input_k_idxs(ctx, ubatch);
        self_v_idxs = ring->build_input_v_idxs(ctx, ubatch);
        self_kq_mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, ring->get_n_kv(), ubatch.n_tokens / ubatch.n_seqs_unq, 1, ubatch.n_seqs_unq);
        ggml_set_input(self_kq_mask);
        ggml_format_name(self_kq_mask, "%s_swa", HEADKV_MASK_NAME);
        self_kq_mask_cnv = self_kq_mask;
        self_k_rot = ring->build_input_k_rot(ctx);
        self_v_rot = ring->build_input_v_rot(ctx);
    }

    bool can_reuse(const llm_graph_params & params) override {
        mctx = ragged(params.mctx)->get_beside().windowed.get();
        const auto & ubatch = params.ubatch;
        return self_k_idxs->ne[0] == ubatch.n_tokens && self_kq_mask->ne[0] == mctx->get_n_kv() && self_kq_mask->ne[3] == ubatch.n_seqs_unq;
    }
};

// recurrent layers: which states go on
class recurrent_input : public llm_graph_input_rs {
public:
    recurrent_input(const llm_graph_context & gctx, const llama_memory_recurrent_context * states) :
        llm_graph_input_rs(states) {
        ggml_context * ctx = gctx.ctx0;
        const int64_t n_rs = states->get_n_rs();
        const int64_t n_seqs = gctx.ubatch.n_seqs;
        s_copy = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_rs);
        ggml_set_input(s_copy);
        ggml_set_name(s_copy, "rs_s_copy");
        s_copy_main = ggml_view_1d(ctx, s_copy, n_seqs, 0);
        s_copy_extra = ggml_view_1d(ctx, s_copy, n_rs - n_seqs, n_seqs * s_copy->nb[0]);
        head = states->get_head();
        rs_z = states->get_rs_z();
    }

    bool can_reuse(const llm_graph_params & params) override {
        mctx = ragged(params.mctx)->get_beside().recurrent.get();
        return s_copy->ne[0] == mctx->get_n_rs() && s_copy_main->ne[0] == params.ubatch.n_seqs && head == mctx->get_head() && rs_z == mctx->get_rs_z();
    }
};

// the two kinds of attention of a model with windows
class iswa_input : public llm_graph_input_attn_kv_iswa {
public:
    iswa_input(const llm_graph_context & gctx, std::unique_ptr<llm_graph_input_attn_kv> ours) :
        llm_graph_input_attn_kv_iswa(gctx.hparams, gctx.cparams, nullptr), ours(std::move(ours)),
        windowed(std::make_unique<windowed_input>(gctx, ragged(gctx.mctx)->get_beside().windowed.get())) {}

    void set_input(const llama_ubatch * ubatch) override {
        ours->set_input(ubatch);
        windowed->set_input(ubatch);
    }

    bool can_reuse(const llm_graph_params & params) override { return ours->can_reuse(params) && windowed->can_reuse(params); }

    const std::unique_ptr<llm_graph_input_attn_kv> ours;
    const std::unique_ptr<windowed_input> windowed;
};

// attention, ours or of both kinds, and recurrent layers
template <typename HYBRID>
class hybrid_input : public HYBRID {
public:
    template <typename ATTN>
    hybrid_input(const llm_graph_context & gctx, std::unique_ptr<ATTN> attn) :
        HYBRID(gctx.cparams, std::move(attn), std::make_unique<recurrent_input>(gctx, ragged(gctx.mctx)->get_beside().recurrent.get()), nullptr) {}

    void set_input(const llama_ubatch * ubatch) override {
        this->inp_attn->set_input(ubatch);
        this->inp_rs->set_input(ubatch);
    }

    bool can_reuse(const llm_graph_params & params) override { return this->inp_attn->can_reuse(params) && this->inp_rs->can_reuse(params); }
};

} // namespace

llm_graph_input_attn_kv_iswa * headkv_build_inp_iswa(const llm_graph_context & gctx) {
    auto ours = headkv_new_input(gctx);
    return ours ? (llm_graph_input_attn_kv_iswa *) gctx.res->add_input(std::make_unique<iswa_input>(gctx, std::move(ours))) : nullptr;
}

llm_graph_input_mem_hybrid * headkv_build_inp_hybrid(const llm_graph_context & gctx) {
    auto ours = headkv_new_input(gctx);
    using input = hybrid_input<llm_graph_input_mem_hybrid>;
    return ours ? (llm_graph_input_mem_hybrid *) gctx.res->add_input(std::make_unique<input>(gctx, std::move(ours))) : nullptr;
}

llm_graph_input_mem_hybrid_iswa * headkv_build_inp_hybrid_iswa(const llm_graph_context & gctx) {
    auto ours = headkv_new_input(gctx);
    using input = hybrid_input<llm_graph_input_mem_hybrid_iswa>;
    return ours ? (llm_graph_input_mem_hybrid_iswa *) gctx.res->add_input(std::make_unique<input>(gctx, std::make_unique<iswa_input>(gctx, std::move(ours)))) : nullptr;
}

llm_graph_input_attn_kv * headkv_inp_of_layer(llm_graph_input_attn_kv_iswa * inp, int il) {
    auto * both = dynamic_cast<iswa_input *>(inp);
    return !both ? nullptr : both->hparams.is_swa(il) ? both->windowed.get()
                                                      : both->ours.get();
}
