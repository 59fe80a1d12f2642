#include "headkv-error.h"

#include "llama-impl.h"

#include <new>

static std::string & thread_error() {
    static thread_local std::string error;
    return error;
}

void headkv_set_error(const std::string & what) {
    thread_error() = what;
}

const std::string & headkv_get_error() {
    return thread_error();
}

bool headkv_fail(const std::string & what) {
    LLAMA_LOG_ERROR("headkv: %s\n", what.c_str());
    headkv_set_error(what);
    return false;
}

const char * headkv_reason(const std::exception & e) {
    return dynamic_cast<const std::bad_alloc *>(&e) ? HEADKV_NO_MEMORY : e.what();
}
