// Which cells of a head are best: scores that do not come from the window's attention alone.
#pragma once

#include "headkv-policy.h"

// tokens that are attended to wherever they stand, and say nothing of the others
constexpr int64_t HEADKV_N_FIRST = 4;

// later cells score higher
std::vector<float> headkv_rank_recent(int64_t n_prefix);

// by what is known of the values
void headkv_rank_value(headkv_scored & layer);

// by attention times that
void headkv_rank_product(headkv_scored & layer);

// (expected attention + epsilon) times that: where nothing is expected of a cell, its value speaks
constexpr float HEADKV_EXPECTED_EPSILON = 0.02f;
void headkv_rank_expected(headkv_scored & layer);

// By how far the values of a token are from the mean of their head, in standard deviations, the sum over all heads of this layer and of those
// before: all heads of a layer have the same scores. Of whole spans: the mean over HEADKV_SPAN neighbours, then the largest of as many. The
// first HEADKV_N_FIRST tokens take no part.
constexpr int HEADKV_SPAN = 7;
void headkv_rank_outlying(headkv_scored & layer);

// The same for as many cells as a head has on average; what it keeps beyond that by how far its own values are from their mean.
void headkv_rank_outlying_first(headkv_scored & layer);

// Half of a head's cells by attention, all of them where a head has HEADKV_N_ATTENDED on average or less; the other half as "outlying" ranks
// them: for a question that is known and those that follow it.
constexpr int64_t HEADKV_N_ATTENDED = 120;
void headkv_rank_attention_first(headkv_scored & layer);

// CriticalKV: half of a head's cells by attention alone, the other half by attention times what the value moves the output
// of the layer.
void headkv_rank_critical(headkv_scored & layer);
