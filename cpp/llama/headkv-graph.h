// What the two files of graph inputs share.
#pragma once

#include "llama-graph.h"

#include <memory>

// what the names of attention masks begin with
constexpr const char * HEADKV_MASK_NAME = "attn_inp_kq_mask";

// the input of the layers that are ours; null = the memory of the graph is not ours
std::unique_ptr<llm_graph_input_attn_kv> headkv_new_input(const llm_graph_context & gctx);
