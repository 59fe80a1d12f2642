// The door for llama.cpp: every symbol that a patch mentions, nothing else.
#pragma once

#include "llama-adapter.h"

struct ggml_tensor;

struct llama_model;
struct llama_cparams;
struct llama_memory_i;
struct llama_memory_params;
struct llm_graph_context;
struct llm_graph_params;
class llm_graph_input_attn_kv;
class llm_graph_input_attn_kv_iswa;
class llm_graph_input_mem_hybrid;
class llm_graph_input_mem_hybrid_iswa;
class llm_graph_result;

// called first by llama_model::create_memory(); null = not ours. Throws when compression was asked for and the
// model or the context cannot have it.
llama_memory_i * headkv_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

// called by llama_context::set_adapters_lora() and set_adapter_cvec() when the adapters have changed
void headkv_note_adapters(llama_memory_i * memory, const llama_adapter_loras & loras, const llama_adapter_cvec & cvec);

// called first by llm_graph_context::build_attn_inp_kv(); null = not ours
llm_graph_input_attn_kv * headkv_build_inp(const llm_graph_context & gctx);

// the same by build_attn_inp_kv_iswa(), build_inp_mem_hybrid() and build_inp_mem_hybrid_iswa(), for models in which some layers are not ours
llm_graph_input_attn_kv_iswa * headkv_build_inp_iswa(const llm_graph_context & gctx);
llm_graph_input_mem_hybrid * headkv_build_inp_hybrid(const llm_graph_context & gctx);
llm_graph_input_mem_hybrid_iswa * headkv_build_inp_hybrid_iswa(const llm_graph_context & gctx);

// called first by build_attn(llm_graph_input_attn_kv_iswa *, ..): the input of the layer alone, to build its attention with; null = not ours
llm_graph_input_attn_kv * headkv_inp_of_layer(llm_graph_input_attn_kv_iswa * inp, int il);

// called first by llm_graph_context::build_attn(llm_graph_input_attn_kv *, ..); null = upstream builds the attention,
// which it also does while a prompt is read (the queries have been captured then)
ggml_tensor * headkv_build_attn(const llm_graph_context & gctx, llm_graph_input_attn_kv * inp,
        ggml_tensor * wo, ggml_tensor * wo_b, ggml_tensor * wo_s,
        ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur,
        ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il);

// called first by llm_graph_result::set_outputs(), when the graph of a ubatch is complete: keeps one layer of it while
// a prompt is read layer by layer
void headkv_cut_graph(const llm_graph_params & params, llm_graph_result & res);
