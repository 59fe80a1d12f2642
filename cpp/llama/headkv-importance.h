// Stage 1, importance: what is known of the heads of a model, from the metadata of a GGUF file.
#pragma once

#include "headkv-config.h"

// importance: {arch}.attention.head_importance (F32 or F64, row-major) with .shape [n_layer, n_head].
// replay: {arch}.attention.head_replay (F32, row-major) with .shape [n_shares, n_layer, n_head_kv] and .shares.
// What is empty in the result is not in the file, or was not asked for. Throws std::invalid_argument when it is damaged.
headkv_known headkv_known_from_gguf(const char * path, bool importance, bool replay);

// throws std::invalid_argument unless shares ascend in (0, 1), all values are in [0, 1] and ascend with them, and no row is all zero
void headkv_replay_check(const headkv_replay & replay);

// throws std::invalid_argument unless all values are finite, >= 0 and not all zero
void headkv_importance_check(const headkv_importance & importance);
