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

headkv_importance headkv_importance_from_gguf(const char * path) {
    gguf_init_params params = { /*.no_alloc =*/true, /*.ctx =*/nullptr };
    std::unique_ptr<gguf_context, void (*)(gguf_context *)> gguf(gguf_init_from_file(path, params), gguf_free);
    if (!gguf) {
        throw std::invalid_argument(format("%s is not a readable GGUF file", path));
    }

    headkv_importance res;

    const int64_t id_arch = gguf_find_key(gguf.get(), "general.architecture");
    if (id_arch < 0 || gguf_get_kv_type(gguf.get(), id_arch) != GGUF_TYPE_STRING) {
        return res;
    }
    const std::string key = std::string(gguf_get_val_str(gguf.get(), id_arch)) + ".attention.head_importance";

    const int64_t id = gguf_find_key(gguf.get(), key.c_str());
    if (id < 0) {
        return res;
    }
    const int64_t id_version = gguf_find_key(gguf.get(), (key + ".version").c_str());
    if (id_version < 0 || gguf_get_kv_type(gguf.get(), id_version) != GGUF_TYPE_UINT32 || gguf_get_val_u32(gguf.get(), id_version) != 1) {
        throw std::invalid_argument(key + ".version is not 1, the only one that is readable: update pyheadkv, or measure the importance again");
    }
    const int64_t id_shape = gguf_find_key(gguf.get(), (key + ".shape").c_str());
    if (id_shape < 0 || gguf_get_kv_type(gguf.get(), id_shape) != GGUF_TYPE_ARRAY ||
            gguf_get_arr_type(gguf.get(), id_shape) != GGUF_TYPE_UINT32 || gguf_get_arr_n(gguf.get(), id_shape) != 2) {
        throw std::invalid_argument(key + ".shape must be two uint32 values, [n_layer, n_head]");
    }
    const uint32_t * shape = (const uint32_t *) gguf_get_arr_data(gguf.get(), id_shape);

    const bool is_arr = gguf_get_kv_type(gguf.get(), id) == GGUF_TYPE_ARRAY;
    const gguf_type type = is_arr ? gguf_get_arr_type(gguf.get(), id) : gguf_get_kv_type(gguf.get(), id);
    if (!is_arr || (type != GGUF_TYPE_FLOAT32 && type != GGUF_TYPE_FLOAT64)) {
        throw std::invalid_argument(key + " must be an array of float32 or float64");
    }
    const size_t n = gguf_get_arr_n(gguf.get(), id);
    // both factors are bounded before they are multiplied
    if (shape[0] == 0 || shape[1] == 0 || shape[0] > 65536 || shape[1] > 65536 || n != (size_t) shape[0] * shape[1]) {
        throw std::invalid_argument(format("%s has %zu values, .shape says %u layers x %u heads", key.c_str(), n, shape[0], shape[1]));
    }

    res.n_layer = shape[0];
    res.n_head = shape[1];
    const void * data = gguf_get_arr_data(gguf.get(), id);
    for (size_t i = 0; i < n; ++i) {
        res.values.push_back(type == GGUF_TYPE_FLOAT32 ? ((const float *) data)[i] : ((const double *) data)[i]);
    }
    headkv_importance_check(res);

    const int64_t id_beta = gguf_find_key(gguf.get(), (key + ".beta").c_str());
    if (id_beta >= 0) {
        if (gguf_get_kv_type(gguf.get(), id_beta) != GGUF_TYPE_FLOAT64) {
            throw std::invalid_argument(key + ".beta must be a float64");
        }
        res.beta = gguf_get_val_f64(gguf.get(), id_beta);
        if (!std::isfinite(res.beta) || !(res.beta > 1.0)) {
            throw std::invalid_argument(format("%s.beta is %g: it must be a finite number > 1", key.c_str(), res.beta));
        }
    }

    return res;
}
