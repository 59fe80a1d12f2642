// A Metal device on the CPU, for tests: what ggml-metal-device.m and ggml-metal-context.m are on a Mac. Upstream's C++ and ours are
// compiled as they are, so that our ops go the way that they go on a device: supports_op, sizes of buffers, encoding, dispatch. All other
// ops are computed by ggml's CPU backend in the same memory.
//
// Dispatches wait for the next barrier of the encoder, then run in their order or in the reverse one.
#include "metal-on-cpu.h"

#include "metal-on-cpu-door.h"

#include "ggml-metal-context.h"
#include "ggml-metal-device.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-ops.h"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <map>
#include <mutex>

// dispatches of each kernel, written to the file that METAL_ON_CPU_REPORT names when the process ends
static struct report {
    std::map<std::string, int> n;

    ~report() {
        const char * path = getenv("METAL_ON_CPU_REPORT");
        FILE * file = path ? fopen(path, "w") : nullptr;
        if (file) {
            for (const auto & [kernel, n_dispatches] : n) {
                fprintf(file, "%s %d\n", kernel.c_str(), n_dispatches);
            }
            fclose(file);
        }
    }
} dispatches;

static int n_graphs = 0;

int metal_on_cpu_n_graphs(void) { return n_graphs; }
void metal_on_cpu_order(bool descending) { gpu_cpu::descending = descending; }
int metal_on_cpu_n_barriers(void) { return (int) metal_cpu::barriers.places.size(); }
const char * metal_on_cpu_barrier(int i) { return metal_cpu::barriers.places.at(i).c_str(); }
void metal_on_cpu_leave_out(int i) { metal_cpu::barriers.left_out = i; }

//
// library
//

struct ggml_metal_pipeline {
    const metal_cpu::kernel_t * kernel;
};

// the kernels of a source, by the definitions that it begins with
struct ggml_metal_library {
    ggml_metal_device_t dev;
    int type = 0, d = 0, nq = 0;
    std::string source;
    ggml_metal_pipelines_t pipelines = ggml_metal_pipelines_init();
};

ggml_metal_library_t ggml_metal_library_init_from_source(ggml_metal_device_t dev, const char * source, bool verbose) {
    GGML_UNUSED(verbose);
    auto * lib = new ggml_metal_library;
    lib->dev = dev;
    lib->source = source;
    sscanf(source, "#define HEADKV_TYPE %d\n#define HEADKV_D %d\n#define HEADKV_NQ %d\n", &lib->type, &lib->d, &lib->nq);
    return lib;
}

void ggml_metal_library_free(ggml_metal_library_t lib) {
    ggml_metal_pipelines_free(lib->pipelines);
    delete lib;
}

ggml_metal_device_t ggml_metal_library_get_device(ggml_metal_library_t lib) { return lib->dev; }

void ggml_metal_pipeline_free(ggml_metal_pipeline_t pipeline) { delete pipeline; }

int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) { return 1024; }

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    ggml_metal_pipeline_with_params res = {};
    res.pipeline = ggml_metal_pipelines_get(lib->pipelines, name);
    return res;
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib, const char * base, const char * name, ggml_metal_cv_t cv) {
    GGML_ASSERT(!cv && "our kernels have no function constants");
    ggml_metal_pipeline_with_params res = ggml_metal_library_get_pipeline(lib, name);
    for (const metal_cpu::kernel_t & k : metal_cpu::kernels()) {
        const bool is_in_source = lib->source.find("void " + k.name + "(") != std::string::npos;
        if (!res.pipeline && is_in_source && k.name == base && k.type == lib->type && k.d == lib->d && k.nq == lib->nq) {
            res.pipeline = new ggml_metal_pipeline{ &k };
            ggml_metal_pipelines_add(lib->pipelines, name, res.pipeline);
        }
    }
    return res;
}

ggml_metal_cv_t ggml_metal_cv_init(void) { return nullptr; }
void ggml_metal_cv_free(ggml_metal_cv_t) {}
void ggml_metal_cv_set_bool(ggml_metal_cv_t, bool, int32_t) {}
void ggml_metal_cv_set_int16(ggml_metal_cv_t, int16_t, int32_t) {}
void ggml_metal_cv_set_int32(ggml_metal_cv_t, int32_t, int32_t) {}

//
// encoder
//

struct ggml_metal_encoder {
    const metal_cpu::kernel_t * kernel = nullptr;
    metal_cpu::bound bound;
    bool is_barrier = false;
    std::vector<std::function<void()>> waiting;

    void run() {
        if (gpu_cpu::descending) {
            std::reverse(waiting.begin(), waiting.end());
        }
        for (const auto & dispatch : waiting) {
            dispatch();
        }
        waiting.clear();
    }
};

ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t, bool) { return new ggml_metal_encoder; }

void ggml_metal_encoder_free(ggml_metal_encoder_t enc) {
    GGML_ASSERT(enc->waiting.empty());
    delete enc;
}

void ggml_metal_encoder_debug_group_push(ggml_metal_encoder_t, const char *) {}
void ggml_metal_encoder_debug_group_pop(ggml_metal_encoder_t) {}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t enc, ggml_metal_pipeline_with_params pipeline) {
    GGML_ASSERT(pipeline.pipeline);
    enc->kernel = pipeline.pipeline->kernel;
    enc->bound = {};
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t enc, void * data, size_t size, int idx) {
    GGML_ASSERT(idx == 0 && size <= 4096);
    enc->bound.args.assign((char *) data, (char *) data + size);
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t enc, ggml_metal_buffer_id buffer, int idx) {
    GGML_ASSERT(buffer.metal && idx == (int) enc->bound.buffers.size() + 1);
    enc->bound.buffers.push_back((char *) buffer.metal + buffer.offs);
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t enc, size_t size, int idx) {
    GGML_ASSERT(size % 16 == 0 && idx == (int) enc->bound.shared.size());
    enc->bound.shared.push_back(size);
}

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t enc, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    size_t n_shared = 0;
    for (size_t size : enc->bound.shared) {
        n_shared += size;
    }
    GGML_ASSERT(n_shared <= 32768 && tg0 > 0 && tg1 > 0 && tg2 > 0);
    enc->bound.grid = dim3(tg0, tg1, tg2);
    enc->bound.threads = dim3(tptg0, tptg1, tptg2);
    if (enc->is_barrier && metal_cpu::barriers.at("before " + enc->kernel->name) != metal_cpu::barriers.left_out) {
        enc->run();
    }
    enc->is_barrier = false;
    enc->waiting.push_back([kernel = enc->kernel, bound = enc->bound]() { kernel->run(bound); });
    dispatches.n[enc->kernel->name]++;
}

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t enc) { enc->is_barrier = true; }

void ggml_metal_encoder_end_encoding(ggml_metal_encoder_t enc) { enc->run(); }

//
// device
//

struct ggml_metal_device {
    ggml_metal_device_props props = {};
    ggml_metal_library library;
    ggml_metal_fusion_info * finfo = ggml_metal_fusion_info_init(false, 0);
};

ggml_metal_device_t ggml_metal_device_init(int device, int n_devices) {
    GGML_UNUSED(n_devices);
    auto * dev = new ggml_metal_device;
    dev->library.dev = dev;
    dev->props.device = device;
    snprintf(dev->props.name, sizeof(dev->props.name), "MTL%d", device);
    snprintf(dev->props.desc, sizeof(dev->props.desc), "Metal on the CPU");
    dev->props.max_buffer_size = dev->props.max_working_set_size = (size_t) 64 << 30;
    dev->props.max_theadgroup_memory_size = 32768;
    dev->props.has_simdgroup_reduction = dev->props.has_simdgroup_mm = dev->props.supports_gpu_family_apple7 = true;
    dev->props.has_unified_memory = dev->props.use_shared_buffers = true;
    dev->props.has_bfloat = true;
    dev->props.op_offload_min_batch_size = 1 << 30;
    return dev;
}

void ggml_metal_device_free(ggml_metal_device_t dev) {
    ggml_metal_fusion_info_free(dev->finfo);
    ggml_metal_pipelines_free(dev->library.pipelines);
    delete dev;
}

ggml_metal_library_t ggml_metal_device_get_library(ggml_metal_device_t dev) { return &dev->library; }
const ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t dev) { return &dev->props; }
ggml_metal_fusion_info * ggml_metal_device_get_fusion_info(ggml_metal_device_t dev) { return dev->finfo; }
const char * ggml_metal_device_id_token(ggml_metal_device_id) { return "GGML_METAL_DEVICE_GENERIC"; }

void ggml_metal_device_get_memory(ggml_metal_device_t dev, size_t * free, size_t * total) { *free = *total = dev->props.max_working_set_size; }

bool ggml_metal_device_supports_op(ggml_metal_device_t, const ggml_tensor * op) {
    return op->op != GGML_OP_CUSTOM && ggml_backend_dev_supports_op(ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0), op);
}

ggml_metal_event_t ggml_metal_device_event_init(ggml_metal_device_t) { return (ggml_metal_event_t) new char; }
void ggml_metal_device_event_free(ggml_metal_device_t, ggml_metal_event_t ev) { delete (char *) ev; }
void ggml_metal_device_event_synchronize(ggml_metal_device_t, ggml_metal_event_t) {}

//
// buffers: of exactly the size that was asked for, for the address sanitizer, and with garbage in them
//

struct ggml_metal_buffer {
    char * data;
    size_t size;
    bool owned;
};

ggml_metal_buffer_t ggml_metal_buffer_init(ggml_metal_device_t, size_t size, bool shared) {
    GGML_UNUSED(shared);
    void * data = nullptr;
    if (posix_memalign(&data, 64, size) != 0) {
        return nullptr;
    }
    memset(data, 0xff, size);
    return new ggml_metal_buffer{ (char *) data, size, true };
}

ggml_metal_buffer_t ggml_metal_buffer_map(ggml_metal_device_t, void * ptr, size_t size, size_t) { return new ggml_metal_buffer{ (char *) ptr, size, false }; }

void ggml_metal_buffer_free(ggml_metal_buffer_t buf) {
    if (buf->owned) {
        free(buf->data);
    }
    delete buf;
}

void * ggml_metal_buffer_get_base(ggml_metal_buffer_t buf) { return buf->data; }
bool ggml_metal_buffer_is_shared(ggml_metal_buffer_t) { return true; }

void ggml_metal_buffer_memset_tensor(ggml_metal_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    memset((char *) tensor->data + offset, value, size);
}

void ggml_metal_buffer_set_tensor(ggml_metal_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    memcpy((char *) tensor->data + offset, data, size);
}

void ggml_metal_buffer_get_tensor(ggml_metal_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) tensor->data + offset, size);
}

bool ggml_metal_buffer_cpy_tensor(ggml_metal_buffer_t, const ggml_tensor * src, ggml_tensor * dst) {
    memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}

void ggml_metal_buffer_clear(ggml_metal_buffer_t buf, uint8_t value) { memset(buf->data, value, buf->size); }

ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t buf, const ggml_tensor * t) {
    const size_t offs = (char *) t->data - buf->data;
    GGML_ASSERT((char *) t->data >= buf->data && offs + ggml_nbytes(t) <= buf->size);
    return { buf->data, offs };
}

//
// context
//

struct ggml_metal {
    ggml_metal_device_t dev;
    ggml_backend_ptr cpu{ ggml_backend_cpu_init() };
};

ggml_metal_t ggml_metal_init(ggml_metal_device_t dev) {
    auto * ctx = new ggml_metal;
    ctx->dev = dev;
    ggml_backend_cpu_set_n_threads(ctx->cpu.get(), 1);
    return ctx;
}

void ggml_metal_free(ggml_metal_t ctx) { delete ctx; }
const char * ggml_metal_get_name(ggml_metal_t ctx) { return ctx->dev->props.name; }
void ggml_metal_synchronize(ggml_metal_t) {}

void ggml_metal_set_tensor_async(ggml_metal_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    memcpy((char *) tensor->data + offset, data, size);
}

void ggml_metal_get_tensor_async(ggml_metal_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) tensor->data + offset, size);
}

bool ggml_metal_cpy_tensor_async(ggml_metal_t, ggml_metal_t, const ggml_tensor * src, ggml_tensor * dst) {
    memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}

ggml_status ggml_metal_graph_compute(ggml_metal_t ctx, ggml_cgraph * gf) {
    static std::mutex mutex; // the threads of a device are those of the process
    std::lock_guard<std::mutex> lock(mutex);
    n_graphs++;

    const auto is_ours = [&](int i) { return gf->nodes[i]->op == GGML_OP_CUSTOM; };
    const auto is_view = [&](int i) { return ggml_op_is_empty(gf->nodes[i]->op); };
    for (int first = 0, last = 0; first < gf->n_nodes; first = last) {
        while (first < gf->n_nodes - 1 && is_view(first)) {
            first++;
        }
        for (last = first; last < gf->n_nodes && (is_view(last) || is_ours(last) == is_ours(first)); ++last) {
        }
        if (!is_ours(first)) {
            ggml_cgraph part = ggml_graph_view(gf, first, last);
            const ggml_status status = ggml_backend_graph_compute(ctx->cpu.get(), &part);
            if (status != GGML_STATUS_SUCCESS) {
                return status;
            }
            continue;
        }
        ggml_metal_op_t op = ggml_metal_op_init(ctx->dev, nullptr, gf, ctx->dev->finfo, first, last, true, false, 0);
        for (int i = 0; i < ggml_metal_op_n_nodes(op);) {
            i += ggml_metal_op_encode(op, i);
        }
        ggml_metal_op_free(op);
    }
    return GGML_STATUS_SUCCESS;
}

void ggml_metal_graph_optimize(ggml_metal_t, ggml_cgraph *) {}
void ggml_metal_event_record(ggml_metal_t, ggml_metal_event_t) {}
void ggml_metal_event_wait(ggml_metal_t, ggml_metal_event_t) {}
void ggml_metal_set_n_cb(ggml_metal_t, int) {}
void ggml_metal_set_abort_callback(ggml_metal_t, ggml_abort_callback, void *) {}
bool ggml_metal_supports_family(ggml_metal_t, int) { return true; }
void ggml_metal_capture_next_compute(ggml_metal_t) {}
