# Upstream builds libllama as a unity build; our files stay outside of it so that
# two files' statics cannot collide.
file(GLOB HEADKV_LLAMA_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/llama/*.cpp)
target_sources(llama PRIVATE ${HEADKV_LLAMA_SOURCES})
target_include_directories(llama PRIVATE ${CMAKE_CURRENT_LIST_DIR} ${CMAKE_CURRENT_LIST_DIR}/llama)
set_source_files_properties(${HEADKV_LLAMA_SOURCES} TARGET_DIRECTORY llama PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)

# The kernels of attend and score, compiled once for each instruction set and chosen at run time.
function(headkv_isa file)
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/llama/${file} TARGET_DIRECTORY llama
        PROPERTIES COMPILE_OPTIONS "${ARGN}")
endfunction()
if (CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND NOT MSVC)
    # products and sums are fused where the source says so, and alike in all instances of a loop
    headkv_isa(headkv-kernels-avx2.cpp   -O3 -ffp-contract=off -mavx2 -mfma -mf16c)
    headkv_isa(headkv-kernels-avx512.cpp -O3 -ffp-contract=off -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512
        $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized;-Wno-uninitialized>) # false alarms of its own intrinsics header
elseif (CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
    headkv_isa(headkv-kernels-neon.cpp   -O3 -ffp-contract=off)
endif()
if (NOT MSVC)
    headkv_isa(headkv-attend-prompt.cpp  -O3 -ffp-contract=off)
endif()

# The ops that run on CUDA. HIP and MUSA compile upstream's sources too and take the header alone.
foreach(target ggml-cuda ggml-hip ggml-musa)
    if (TARGET ${target})
        target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_LIST_DIR}/ggml-cuda ${CMAKE_CURRENT_LIST_DIR}/llama)
    endif()
endforeach()
if (TARGET ggml-cuda)
    file(GLOB HEADKV_CUDA_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/ggml-cuda/*.cu)
    target_sources(ggml-cuda PRIVATE ${HEADKV_CUDA_SOURCES})
endif()

# The ops that run on Metal: C++ that upstream's C interface is enough for, and the text of the kernels, which Metal compiles.
function(headkv_metal target)
    set(dir ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/ggml-metal)
    file(READ ${dir}/headkv-args.h text)
    string(REPLACE "#pragma once\n" "" HEADKV_ARGS "${text}")
    foreach(part DEVICE ATTEND SCORE SELECT COMPACT)
        string(TOLOWER ${part} name)
        file(READ ${dir}/headkv-${name}.metal HEADKV_${part})
        set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${dir}/headkv-${name}.metal)
    endforeach()
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${dir}/headkv-args.h)
    configure_file(${dir}/headkv-metal-source.cpp.in ${CMAKE_BINARY_DIR}/headkv-metal-source.cpp @ONLY)
    target_sources(${target} PRIVATE ${dir}/headkv-metal.cpp ${CMAKE_BINARY_DIR}/headkv-metal-source.cpp)
    target_include_directories(${target} PRIVATE ${dir} ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/llama)
endfunction()
if (TARGET ggml-metal)
    headkv_metal(ggml-metal)
endif()

# Flags, and what llama-server does with them.
if (TARGET llama-common)
    file(GLOB HEADKV_COMMON_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/common/*.cpp)
    target_sources(llama-common PRIVATE ${HEADKV_COMMON_SOURCES})
    target_include_directories(llama-common PRIVATE ${CMAKE_CURRENT_LIST_DIR} ${CMAKE_CURRENT_LIST_DIR}/common)
endif()
if (TARGET server-context)
    file(GLOB HEADKV_SERVER_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/server/*.cpp)
    set(HEADKV_PAGE_SOURCES ${CMAKE_CURRENT_LIST_DIR}/server/headkv-page.cpp) # needs HTTP and what is packed of the chat
    list(REMOVE_ITEM HEADKV_SERVER_SOURCES ${HEADKV_PAGE_SOURCES})
    target_sources(llama-server-impl PRIVATE ${HEADKV_PAGE_SOURCES})
    target_include_directories(llama-server-impl PRIVATE ${CMAKE_CURRENT_LIST_DIR} ${CMAKE_CURRENT_LIST_DIR}/common)
    target_sources(server-context PRIVATE ${HEADKV_SERVER_SOURCES})
    target_include_directories(server-context PRIVATE ${CMAKE_CURRENT_LIST_DIR} ${CMAKE_CURRENT_LIST_DIR}/common)
    target_include_directories(server-context PUBLIC  ${CMAKE_CURRENT_LIST_DIR}/server) # its headers include ours
endif()

# Counters of lines and branches, in our files alone; server-context.cpp is upstream's and includes headkv-slots.h.
function(headkv_coverage target)
    if (NOT PYHEADKV_COVERAGE OR NOT TARGET ${target})
        return()
    endif()
    set_property(SOURCE ${ARGN} TARGET_DIRECTORY ${target} APPEND PROPERTY
        COMPILE_OPTIONS --coverage -O1 -fprofile-update=prefer-atomic)
    target_link_options(${target} PUBLIC --coverage)
endfunction()
headkv_coverage(llama          ${HEADKV_LLAMA_SOURCES})
headkv_coverage(llama-common   ${HEADKV_COMMON_SOURCES})
headkv_coverage(llama-server-impl ${HEADKV_PAGE_SOURCES})
headkv_coverage(server-context ${HEADKV_SERVER_SOURCES} ${LLAMA_CPP_DIR}/tools/server/server-context.cpp)
