// Which cells of a head are best: scores that do not come from the window's attention alone.
#pragma once

#include "headkv-policy.h"

// later cells score higher
std::vector<float> headkv_rank_recent(int64_t n_prefix);

// by what is known of the values
void headkv_rank_value(headkv_scored & layer);

// by attention times that
void headkv_rank_product(headkv_scored & layer);

// (expected attention + epsilon) times that: where nothing is expected of a cell, its value speaks
constexpr float HEADKV_EXPECTED_EPSILON = 0.02f;
void headkv_rank_expected(headkv_scored & layer);

// CriticalKV: half of a head's cells by attention alone, the other half by attention times what the value moves the output
// of the layer.
void headkv_rank_critical(headkv_scored & layer);
