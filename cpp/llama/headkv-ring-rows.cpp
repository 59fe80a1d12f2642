#include "headkv-ring-rows.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

void headkv_ring_rows::begin(llama_seq_id s, llama_pos first, llama_pos end, const std::vector<int32_t> & ils) {
    seq_id = s;
    n_first = first;
    n_taken = n_pos = end;
    of_layer.clear();
    for (int32_t il : ils) {
        of_layer[il];
    }
}

void headkv_ring_rows::forget() {
    begin(-1, 0, 0, {});
}

void headkv_ring_rows::expect(llama_seq_id s, llama_pos begin, llama_pos end) {
    if (is_of(s) && begin == n_pos) {
        n_pos = end;
    } else if (is_of(s)) {
        forget();
    }
}

void headkv_ring_rows::take(headkv_beside & beside) {
    for (auto & [il, rows] : of_layer) {
        for (bool v : { false, true }) {
            const size_t nb = beside.n_bytes_row(il, v);
            rows[v].resize(nb * (n_pos - n_first));
            if (!beside.read_rows(il, v, seq_id, n_taken, n_pos, rows[v].data() + nb * (n_taken - n_first))) {
                forget(); // they are elsewhere, where sums are made in another order
                return;
            }
        }
    }
    n_taken = n_pos;
}

void headkv_ring_rows::put(int32_t il, bool v, std::vector<uint8_t> rows) {
    of_layer.at(il)[v] = std::move(rows);
}

void headkv_ring_rows::cut(llama_seq_id s, llama_pos p0) {
    if (!is_of(s) || p0 >= n_pos) {
        return;
    }
    if (p0 <= n_first) {
        forget();
        return;
    }
    n_pos = p0;
    n_taken = std::min(n_taken, p0);
}

void headkv_ring_rows::read(int32_t il, bool v, llama_pos first, uint32_t n_rows, uint8_t * dst, size_t n_bytes) const {
    const auto it = of_layer.find(il);
    const size_t nb = n_rows > 0 ? n_bytes / n_rows : 0;
    if (it == of_layer.end() || first < n_first || first + (llama_pos) n_rows > n_taken || (first - n_first) * nb + n_bytes > it->second[v].size()) {
        throw std::runtime_error(format("rows of positions %d to %d of layer %d, which has a window, are gone", first, first + (int) n_rows - 1, il));
    }
    memcpy(dst, it->second[v].data() + (first - n_first) * nb, n_bytes);
}

size_t headkv_ring_rows::n_bytes() const {
    size_t res = 0;
    for (const auto & [il, rows] : of_layer) {
        res += rows[0].size() + rows[1].size();
    }
    return res;
}
