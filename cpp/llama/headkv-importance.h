// Stage 1, importance: one number per query head, from the metadata of a GGUF file.
#pragma once

#include "headkv-config.h"

// {arch}.attention.head_importance (F32 or F64, row-major) with .shape [n_layer, n_head].
// An empty result = the file has none. Throws std::invalid_argument when it is damaged.
headkv_importance headkv_importance_from_gguf(const char * path);

// throws std::invalid_argument unless all values are finite, >= 0 and not all zero
void headkv_importance_check(const headkv_importance & importance);
