// Tokens in the middle of a sequence that are taken out, such as what a model thought before it answered: their cells go, the
// positions of the others stay. They are decided by position alone; the rest is as an eviction.

#include "llama-kv-cache-ragged.h"

#include "headkv-error.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <stdexcept>

// why tokens [p0, p1) of a sequence cannot be dropped; empty = they can
std::string llama_kv_cache_ragged::why_not_dropped(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const headkv_seq & seq = seqs[seq_id];
    if (is_called_back) {
        return "the progress is being told";
    }
    if (seq.state != HEADKV_SEQ_COMPRESSED) {
        return "it is not compressed: call headkv_end_prompt() first";
    }
    if (p0 < 0 || p1 <= p0 || p1 >= seq.n_pos) {
        return format("it has tokens [0, %d): the range must not be empty, and end before the last one", seq.n_pos);
    }
    if (!the_queries) {
        return "the context was made without kv_generated, which tells the cells of generated tokens apart: create it with that";
    }
    if (the_beside) {
        return "layers with windows or recurrent states have seen them";
    }
    if (the_store.compensates()) {
        return "a cell of a prompt stands for several tokens (fit 'mean')";
    }
    return "";
}

void llama_kv_cache_ragged::drop(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (const std::string why_not = why_not_dropped(seq_id, p0, p1); !why_not.empty()) {
        throw std::invalid_argument(format("tokens [%d, %d) of sequence %d cannot be dropped: %s", p0, p1, seq_id, why_not.c_str()));
    }
    headkv_seq & seq = seqs[seq_id];
    const llama_pos begin = seq.tail_begin();
    const llama_pos n_folded = std::max(0, p1 - begin); // tokens of the tail that are none of it any more

    // what stays is noted before anything moves: [layer][head] rows, positions
    std::vector<std::vector<std::pair<std::vector<int32_t>, std::vector<int32_t>>>> stays;
    std::vector<uint8_t> raw;
    for (const auto & layer : the_store.layers) {
        auto & of_layer = stays.emplace_back();
        for (const auto & range : layer.ranges[seq_id]) {
            auto & [rows, pos] = of_layer.emplace_back();
            std::vector<int32_t> all(range.pos);
            all.resize(range.n_kept + n_folded);
            std::iota(all.begin() + range.n_kept, all.end(), begin);
            for (size_t i = 0; i < all.size(); ++i) {
                if (all[i] < p0 || all[i] >= p1) {
                    rows.push_back((int32_t) i);
                    pos.push_back(all[i]);
                }
            }
            for (uint32_t i = range.n_kept + n_folded; i < range.n_used(seq.n_in_tail()); ++i) {
                rows.push_back((int32_t) i);
            }
            raw.resize(std::max(raw.size(), range.n_used(seq.n_in_tail()) * std::max(layer.k->nb[1], layer.v->nb[1])));
        }
    }

    if (lctx) {
        lctx->synchronize();
    }
    for (size_t i = 0; i < stays.size(); ++i) {
        auto & layer = the_store.layers[i];
        for (size_t ih = 0; ih < stays[i].size(); ++ih) {
            auto & [rows, pos] = stays[i][ih];
            headkv_range & range = layer.ranges[seq_id][ih];
            headkv_gather_rows(layer.k, range.off, rows, raw);
            headkv_gather_rows(layer.v, range.off, rows, raw);
            range.n_kept = (uint32_t) pos.size();
            range.pos = std::move(pos);
        }
    }
    seq.n_settled += n_folded;
    seq.n_whole = std::max(0, std::min(seq.n_whole, seq.n_prompt - p1));
    seq.n_tail = the_store.n_tail(seq_id);
}
