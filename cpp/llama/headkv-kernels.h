// Which version of a kernel runs: each is compiled once per instruction set (headkv-kernels-*.cpp).
#pragma once

#include <cstring>

// The first one of these that the machine has, of K const * (*)() each; name (may be null) asks for "avx512", "avx2", "neon" or "portable".
template <typename F>
auto headkv_find_kernel(const char * name, F avx512, F avx2, F neon, F portable) -> decltype(avx512()) {
    const struct {
        const char * name;
        F find;
    } kernels[] = { { "avx512", avx512 }, { "avx2", avx2 }, { "neon", neon }, { "portable", portable } };
    for (const auto & k : kernels) {
        if (const auto res = name && strcmp(name, k.name) != 0 ? nullptr : k.find()) {
            return res;
        }
    }
    return nullptr;
}
