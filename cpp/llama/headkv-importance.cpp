#include "headkv-importance.h"

#include "gguf.h"

#include "llama-impl.h"

#include <cmath>
#include <stdexcept>

void headkv_importance_check(const headkv_importance & importance) {
    double sum = 0.0;
    for (size_t i = 0; i < importance.values.size(); ++i) {
        const double v = importance.values[i];
        if (!std::isfinite(v) || v < 0.0) {
            throw std::invalid_argument(format("importance of layer %d, head %d is %g: it must be finite and >= 0",
                    (int) (i / importance.n_head), (int) (i % importance.n_head), v));
        }
        sum += v;
    }
    if (!(sum > 0.0) || !std::isfinite(sum)) {
        throw std::invalid_argument(format("importance sums to %g: at least one head must be > 0 and the sum finite", sum));
    }
}

void headkv_replay_check(const headkv_replay & replay) {
    double last = 0.0;
    for (double share : replay.shares) {
        if (!(share > last && share < 1.0)) {
            throw std::invalid_argument(format("the replay table has the share %g after %g: shares must ascend between 0 and 1", share, last));
        }
        last = share;
    }
    const size_t n_row = (size_t) replay.n_layer * replay.n_head_kv;
    for (size_t i = 0; i < replay.shares.size(); ++i) {
        double sum = 0.0;
        for (size_t j = 0; j < n_row; ++j) {
            const double v = replay.values[i * n_row + j];
            if (!(v >= 0.0 && v <= 1.0)) {
                throw std::invalid_argument(format("the replay table has %g for layer %d, KV head %d: it must be in [0, 1]",
                        v, (int) (j / replay.n_head_kv), (int) (j % replay.n_head_kv)));
            }
            sum += v;
        }
        if (sum == 0.0) {
            throw std::invalid_argument(format("the replay table is all zero at the share %g: measure it again", replay.shares[i]));
        }
        for (size_t j = 0; i > 0 && j < n_row; ++j) {
            if (replay.values[i * n_row + j] < replay.values[(i - 1) * n_row + j]) {
                throw std::invalid_argument(format("the replay table has %g for layer %d, KV head %d at the share %g: it must not be below that of a smaller one",
                        replay.values[i * n_row + j], (int) (j / replay.n_head_kv), (int) (j % replay.n_head_kv), replay.shares[i]));
            }
        }
    }
}

namespace {

// keys of one kind of table in a GGUF
struct table_keys {
    const gguf_context * gguf;
    std::string key; // empty = there is none

    table_keys(const gguf_context * gguf, const char * name) :
        gguf(gguf) {
        const int64_t id = gguf_find_key(gguf, "general.architecture");
        if (id >= 0 && gguf_get_kv_type(gguf, id) == GGUF_TYPE_STRING) {
            key = std::string(gguf_get_val_str(gguf, id)) + ".attention." + name;
        }
        if (gguf_find_key(gguf, key.c_str()) < 0) {
            for (const char * part : { ".shape", ".version", ".shares" }) {
                if (gguf_find_key(gguf, (key + part).c_str()) >= 0) {
                    throw std::invalid_argument(format("%s is missing beside %s: measure it again", key.c_str(), (key + part).c_str()));
                }
            }
            key = "";
            return;
        }
        const int64_t id_version = gguf_find_key(gguf, (key + ".version").c_str());
        if (id_version < 0 || gguf_get_kv_type(gguf, id_version) != GGUF_TYPE_UINT32 || gguf_get_val_u32(gguf, id_version) != 1) {
            throw std::invalid_argument(key + ".version is not 1, the only one that is readable: update pyheadkv, or measure it again");
        }
    }

    std::vector<uint32_t> shape(size_t n, const char * what) const {
        const int64_t id = gguf_find_key(gguf, (key + ".shape").c_str());
        if (id < 0 || gguf_get_kv_type(gguf, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf, id) != GGUF_TYPE_UINT32 ||
                gguf_get_arr_n(gguf, id) != n) {
            throw std::invalid_argument(format("%s.shape must be %zu uint32 values, %s", key.c_str(), n, what));
        }
        const uint32_t * data = (const uint32_t *) gguf_get_arr_data(gguf, id);
        return { data, data + n };
    }

    std::vector<double> numbers(const std::string & name) const {
        const int64_t id = gguf_find_key(gguf, name.c_str());
        const gguf_type type = id >= 0 && gguf_get_kv_type(gguf, id) == GGUF_TYPE_ARRAY ? gguf_get_arr_type(gguf, id) : GGUF_TYPE_STRING;
        if (type != GGUF_TYPE_FLOAT32 && type != GGUF_TYPE_FLOAT64) {
            throw std::invalid_argument(name + " must be an array of float32 or float64");
        }
        const void * data = gguf_get_arr_data(gguf, id);
        std::vector<double> res;
        for (size_t i = 0; i < gguf_get_arr_n(gguf, id); ++i) {
            res.push_back(type == GGUF_TYPE_FLOAT32 ? ((const float *) data)[i] : ((const double *) data)[i]);
        }
        return res;
    }
};

headkv_importance importance_of(const gguf_context * gguf) {
    const table_keys keys(gguf, "head_importance");
    headkv_importance res;
    if (keys.key.empty()) {
        return res;
    }
    const auto shape = keys.shape(2, "[n_layer, n_head]");
    res.values = keys.numbers(keys.key);
    // both factors are bounded before they are multiplied
    if (shape[0] == 0 || shape[1] == 0 || shape[0] > 65536 || shape[1] > 65536 || res.values.size() != (size_t) shape[0] * shape[1]) {
        throw std::invalid_argument(format("%s has %zu values, .shape says %u layers x %u heads", keys.key.c_str(), res.values.size(), shape[0], shape[1]));
    }
    res.n_layer = shape[0];
    res.n_head = shape[1];
    headkv_importance_check(res);

    const int64_t id_beta = gguf_find_key(keys.gguf, (keys.key + ".beta").c_str());
    if (id_beta >= 0) {
        if (gguf_get_kv_type(keys.gguf, id_beta) != GGUF_TYPE_FLOAT64) {
            throw std::invalid_argument(keys.key + ".beta must be a float64");
        }
        res.beta = gguf_get_val_f64(keys.gguf, id_beta);
        if (!std::isfinite(res.beta) || !(res.beta > 1.0)) {
            throw std::invalid_argument(format("%s.beta is %g: it must be a finite number > 1", keys.key.c_str(), res.beta));
        }
    }
    return res;
}

headkv_replay replay_of(const gguf_context * gguf) {
    const table_keys keys(gguf, "head_replay");
    headkv_replay res;
    if (keys.key.empty()) {
        return res;
    }
    const auto shape = keys.shape(3, "[n_shares, n_layer, n_head_kv]");
    res.shares = keys.numbers(keys.key + ".shares");
    res.values = keys.numbers(keys.key);
    if (shape[0] == 0 || shape[0] > 1024 || shape[1] == 0 || shape[2] == 0 || shape[1] > 65536 || shape[2] > 65536 ||
            res.shares.size() != shape[0] || res.values.size() != (size_t) shape[0] * shape[1] * shape[2]) {
        throw std::invalid_argument(format("%s has %zu values and %zu shares, .shape says %u shares x %u layers x %u KV heads",
                keys.key.c_str(), res.values.size(), res.shares.size(), shape[0], shape[1], shape[2]));
    }
    res.n_layer = shape[1];
    res.n_head_kv = shape[2];
    headkv_replay_check(res);
    return res;
}

} // namespace

headkv_known headkv_known_from_gguf(const char * path, bool importance, bool replay) {
    const std::unique_ptr<gguf_context, void (*)(gguf_context *)> gguf(gguf_init_from_file(path, { /*.no_alloc =*/true, /*.ctx =*/nullptr }), gguf_free);
    if (!gguf) {
        throw std::invalid_argument(format("%s is not a readable GGUF file", path));
    }
    headkv_known res;
    if (importance) {
        res.importance = importance_of(gguf.get());
    }
    if (replay) {
        res.replay = replay_of(gguf.get());
    }
    return res;
}
