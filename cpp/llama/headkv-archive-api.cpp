// The archive as callers see it.

#include "headkv.h"

#include "headkv-api.h"
#include "headkv-archive.h"

#include "ggml-backend.h"

#include <algorithm>
#include <limits>

struct headkv_archive_params headkv_default_archive_params(void) {
    return { sizeof(struct headkv_archive_params), /*.folder =*/nullptr, /*.max_bytes =*/0, /*.type =*/-1 };
}

static int64_t default_bytes(bool in_memory) {
    size_t n_free = 0;
    size_t n_all = 0;
    if (in_memory) {
        ggml_backend_dev_memory(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), &n_free, &n_all);
    }
    return n_all > 0 ? (int64_t) n_all / 4 : (int64_t) 20 << 30;
}

int32_t headkv_set_archive(struct llama_context * ctx, const struct headkv_archive_params * params) {
    return guarded([&]() -> int32_t {
        llama_kv_cache_ragged & kv = cache_of(ctx, 0);
        if (!params) {
            kv.set_archive(nullptr, 0, GGML_TYPE_COUNT);
            return 0;
        }
        if (params->size != sizeof(struct headkv_archive_params)) {
            return fail("headkv_archive_params.size does not match this library");
        }
        if (params->max_bytes < 0) {
            return fail(format("an archive of %lld bytes: it must be 1 at least, or 0 for the default", (long long) params->max_bytes));
        }
        const auto * traits = params->type >= 0 && params->type < GGML_TYPE_COUNT ? ggml_get_type_traits((ggml_type) params->type) : nullptr;
        if (params->type != -1 && !(traits && traits->from_float_ref && traits->to_float && !ggml_quantize_requires_imatrix((ggml_type) params->type))) {
            return fail(format("archive type %d: it must be one that numbers can be rounded to, such as f16 or q8_0", params->type));
        }
        if (params->folder && !*params->folder) {
            return fail("the name of the folder is empty");
        }
        auto blocks = params->folder ? headkv_blocks_in_folder(params->folder) : headkv_blocks_in_memory();
        const int64_t max_bytes = params->max_bytes > 0 ? params->max_bytes : default_bytes(!params->folder);
        kv.set_archive(std::move(blocks), max_bytes, params->type < 0 ? GGML_TYPE_COUNT : (ggml_type) params->type);
        return 0;
    });
}

int32_t headkv_get_archive_stats(const struct llama_context * ctx, struct headkv_archive_stats * stats) {
    return guarded([&]() -> int32_t {
        const llama_kv_cache_ragged & kv = cache_of(ctx, 0);
        if (!stats || stats->size != sizeof(struct headkv_archive_stats)) {
            return fail("headkv_archive_stats.size does not match this library");
        }
        if (!kv.archive()) {
            return fail("the context has no archive");
        }
        *stats = kv.archive()->stats();
        return 0;
    });
}

int32_t headkv_archive_list(const char * folder, bool deep, headkv_archive_tell tell, void * user_data) {
    return guarded([&]() -> int32_t {
        const auto blocks = headkv_blocks_in_folder(folder);
        int32_t res = 0;
        headkv_list_blocks(*blocks, deep, [&](const headkv_archive_entry & entry) {
            const headkv_archive_block block = { entry.file.name.c_str(), entry.model.c_str(), entry.n_tokens, entry.file.n_bytes,
                entry.file.t_used_us, entry.damaged.c_str() };
            res++;
            return !tell || tell(&block, user_data);
        });
        return res;
    });
}

int32_t headkv_archive_prune(const char * folder, int64_t max_bytes) {
    return guarded([&]() -> int32_t {
        const auto blocks = headkv_blocks_in_folder(folder);
        return (int32_t) std::min<int64_t>(headkv_prune_blocks(*blocks, max_bytes), std::numeric_limits<int32_t>::max());
    });
}
