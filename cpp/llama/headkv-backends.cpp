// A library whose CPU backend is a file of its own (GGML_BACKEND_DL) loads the best one for this processor from the folder it lies in
// itself. Upstream looks beside the program, which for Python is another folder, and in the current one, which is anybody's.
#ifdef GGML_BACKEND_DL

#include "ggml-backend.h"

#include <dlfcn.h>

#include <string>

namespace {

struct load_backends {
    load_backends() {
        Dl_info info;
        if (ggml_backend_reg_count() > 0 || !dladdr((void *) &ggml_log_quiet, &info) || !info.dli_fname) {
            return;
        }
        const std::string path = info.dli_fname;
        const size_t end = path.rfind('/');
        ggml_log_callback callback;
        void * data;
        ggml_log_get(&callback, &data);
        ggml_log_set(ggml_log_quiet, nullptr); // nobody could say yet that it wants no log
        ggml_backend_load_all_from_path(end == std::string::npos ? "." : path.substr(0, end).c_str());
        ggml_log_set(callback, data);
    }

    static void ggml_log_quiet(ggml_log_level, const char *, void *) {}
} at_start;

} // namespace

#endif
