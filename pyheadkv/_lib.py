"""The C library: where it is, and the functions of ``cpp/headkv.h``."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent


def library_path() -> Path:
    """Folder of the bundled libraries; ``PYHEADKV_LIB_PATH`` names another build."""
    return Path(os.environ.get("PYHEADKV_LIB_PATH") or _HERE / "lib")


def embedded_model() -> Path:
    """Path of the small retrieval model that ships with the package (GGUF)."""
    return _HERE / "data" / "needle.gguf"


def _how_to_get_it() -> str:
    try:
        installed = Path(str(metadata.distribution("pyheadkv").locate_file("pyheadkv")))
    except metadata.PackageNotFoundError:
        installed = _HERE
    if installed.is_dir() and installed.resolve() != _HERE:
        return f"{_HERE} is the source tree and hides the package installed in {installed}: start Python in another folder"
    return "install pyheadkv with 'make' or 'pip install .', which builds it"


def use_bundled_library() -> None:
    """Point llama_cpp at the bundled library, unless it was imported before and holds it already.

    Raises
    ------
    ImportError
        llama_cpp was imported first and holds another library, or the bundled
        library is missing.
    """
    path = library_path()
    if not any(path.glob("*llama.*")):
        raise ImportError(f"no libllama in {path}: {_how_to_get_it()}")
    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is None:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(path)
        return
    held = Path(loaded._lib._name).parent
    if held.resolve() != path.resolve():
        raise ImportError(
            f"llama_cpp was imported before pyheadkv and loaded the library in {held}, not the one in {path}, which compresses: "
            f"import pyheadkv first, or set LLAMA_CPP_LIB_PATH={path} before Python starts"
        )


# struct headkv_params, cpp/headkv.h
class Params(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("policy", ctypes.c_char_p),
        ("budget", ctypes.c_char_p),
        ("rank", ctypes.c_char_p),
        ("fit", ctypes.c_char_p),
        ("question", ctypes.c_char_p),
        ("kv_size", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("recent", ctypes.c_int32),
        ("power", ctypes.c_int32),
        ("pool", ctypes.c_int32),
        ("pool_kernel", ctypes.c_int32),
        ("beta", ctypes.c_double),
        ("n_tail", ctypes.c_int32),
        ("attend", ctypes.c_int32),
        ("n_buckets", ctypes.c_int32),
        ("prefill", ctypes.c_int32),
        ("hidden_f16", ctypes.c_int32),
        ("sinks", ctypes.c_int32),
        ("protect", ctypes.POINTER(ctypes.c_int32)),
        ("n_protect", ctypes.c_int32),
        ("surplus", ctypes.c_int32),
        ("pyramid_exact", ctypes.c_int32),
        ("adakv_floor", ctypes.c_double),
        ("adakv_normalize", ctypes.c_int32),
        ("importance", ctypes.POINTER(ctypes.c_double)),
        ("n_layer", ctypes.c_int32),
        ("n_head", ctypes.c_int32),
        ("importance_gguf", ctypes.c_char_p),
        ("model_gguf", ctypes.c_char_p),
        ("replay", ctypes.POINTER(ctypes.c_double)),
        ("shares", ctypes.POINTER(ctypes.c_double)),
        ("n_shares", ctypes.c_int32),
        ("n_head_kv", ctypes.c_int32),
        ("kv_generated", ctypes.c_int32),
        ("generated_slack", ctypes.c_int32),
        ("generated_scope", ctypes.c_int32),
        ("generated_rank", ctypes.c_int32),
    ]


# struct headkv_policy_info, cpp/headkv.h
class PolicyInfo(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("budget", ctypes.c_char_p),
        ("rank", ctypes.c_char_p),
        ("fit", ctypes.c_char_p),
        ("by_importance", ctypes.c_bool),
        ("by_beta", ctypes.c_bool),
        ("by_replay", ctypes.c_bool),
        ("by_window", ctypes.c_bool),
        ("by_all_tokens", ctypes.c_bool),
        ("keeps_all", ctypes.c_bool),
    ]


# struct headkv_footprint, cpp/headkv.h
class Footprint(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("compute", ctypes.c_int64),
        ("staging", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("ring", ctypes.c_int64),
        ("scratch", ctypes.c_int64),
        ("store", ctypes.c_int64),
        ("beside", ctypes.c_int64),
    ]


# struct headkv_stats, cpp/headkv.h
class Stats(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("state", ctypes.c_int32),
        ("n_prompt", ctypes.c_int32),
        ("n_past", ctypes.c_int32),
        ("bytes_store", ctypes.c_int64),
        ("bytes_staging", ctypes.c_int64),
        ("bytes_peak", ctypes.c_int64),
        ("bytes_full", ctypes.c_int64),
        ("t_compress_us", ctypes.c_int64),
        ("n_compress", ctypes.c_int64),
        ("kv_size", ctypes.c_int32),
        ("n_archived", ctypes.c_int32),
        ("n_heads_fitted", ctypes.c_int32),
        ("fit_before", ctypes.c_double),
        ("fit_after", ctypes.c_double),
        ("t_fit_us", ctypes.c_int64),
        ("bytes_beside", ctypes.c_int64),
        ("kv_generated", ctypes.c_int32),
        ("n_evictions", ctypes.c_int32),
        ("n_evicted", ctypes.c_int64),
        ("t_evict_us", ctypes.c_int64),
        ("bytes_queries", ctypes.c_int64),
    ]


# struct headkv_archive_params, cpp/headkv.h
class ArchiveParams(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("folder", ctypes.c_char_p),
        ("max_bytes", ctypes.c_int64),
        ("type", ctypes.c_int32),
    ]


# struct headkv_archive_stats, cpp/headkv.h
class ArchiveStats(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("max_bytes", ctypes.c_int64),
        ("n_blocks", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("n_restored", ctypes.c_int64),
        ("n_computed", ctypes.c_int64),
        ("bytes_read", ctypes.c_int64),
        ("bytes_written", ctypes.c_int64),
        ("t_read_us", ctypes.c_int64),
        ("t_write_us", ctypes.c_int64),
        ("n_evicted", ctypes.c_int64),
        ("n_damaged", ctypes.c_int64),
        ("n_failed", ctypes.c_int64),
    ]


# struct headkv_archive_block, cpp/headkv.h
class ArchiveBlock(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("model", ctypes.c_char_p),
        ("n_tokens", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("t_used_us", ctypes.c_int64),
        ("damaged", ctypes.c_char_p),
    ]


# bool (*headkv_archive_tell)(const struct headkv_archive_block * block, void * user_data)
ArchiveTell = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(ArchiveBlock), ctypes.c_void_p)

# bool (*headkv_progress)(int32_t il, int32_t n_layer, int32_t i_token, int32_t n_tokens, void * user_data)
Progress = ctypes.CFUNCTYPE(ctypes.c_bool, *[ctypes.c_int32] * 4, ctypes.c_void_p)

_I32 = ctypes.POINTER(ctypes.c_int32)
_F32 = ctypes.POINTER(ctypes.c_float)
_CTX = ctypes.c_void_p

_PROTOTYPES: dict[str, tuple[list[Any], Any]] = {
    # struct headkv_params headkv_default_params(void);
    "headkv_default_params": ([], Params),
    # int32_t headkv_set_params(const struct headkv_params * params);
    "headkv_set_params": ([ctypes.POINTER(Params)], ctypes.c_int32),
    # int32_t headkv_read_attention(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_queries, const int32_t * spans,
    #                               int32_t n_spans, int32_t n_top, float * mass, int32_t * top, int32_t n);
    "headkv_read_attention": (
        [_CTX, ctypes.c_int32, ctypes.c_int32, _I32, ctypes.c_int32, ctypes.c_int32, _F32, _I32, ctypes.c_int32],
        ctypes.c_int32,
    ),
    # int32_t headkv_read_attention_max(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_queries, int32_t n_positions,
    #                                   float * dst, int32_t n);
    "headkv_read_attention_max": ([_CTX] + [ctypes.c_int32] * 3 + [_F32, ctypes.c_int32], ctypes.c_int32),
    # int32_t headkv_read_prompt(struct llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens);
    "headkv_read_prompt": ([_CTX, ctypes.c_int32, _I32, ctypes.c_int32], ctypes.c_int32),
    # int32_t headkv_read_ahead(struct llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens, int32_t max_ms);
    "headkv_read_ahead": ([_CTX, ctypes.c_int32, _I32, ctypes.c_int32, ctypes.c_int32], ctypes.c_int32),
    # int32_t headkv_configure(struct llama_context * ctx, const struct headkv_params * params);
    "headkv_configure": ([_CTX, ctypes.POINTER(Params)], ctypes.c_int32),
    # const char * headkv_last_error(void);
    "headkv_last_error": ([], ctypes.c_char_p),
    # void headkv_clear_error(void);
    "headkv_clear_error": ([], None),
    # bool headkv_enabled(const struct llama_context * ctx);
    "headkv_enabled": ([_CTX], ctypes.c_bool),
    # int32_t headkv_begin_prompt(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens, bool whole,
    #         const struct headkv_params * params);
    "headkv_begin_prompt": ([_CTX, ctypes.c_int32, ctypes.c_int32, ctypes.c_bool, ctypes.POINTER(Params)], ctypes.c_int32),
    # const char * headkv_why_token_prefill(const struct llama_context * ctx);
    "headkv_why_token_prefill": ([_CTX], ctypes.c_char_p),
    # int32_t headkv_set_progress(struct llama_context * ctx, headkv_progress progress, void * user_data);
    "headkv_set_progress": ([_CTX, Progress, ctypes.c_void_p], ctypes.c_int32),
    # int32_t headkv_end_prompt(struct llama_context * ctx, llama_seq_id seq_id);
    "headkv_end_prompt": ([_CTX, ctypes.c_int32], ctypes.c_int32),
    # int32_t headkv_compress_as(struct llama_context * ctx, llama_seq_id seq_id, llama_seq_id seq_id_dst);
    "headkv_compress_as": ([_CTX, ctypes.c_int32, ctypes.c_int32], ctypes.c_int32),
    # int32_t headkv_can_continue(const struct llama_context * ctx, llama_seq_id seq_id, const struct headkv_params * params);
    "headkv_can_continue": ([_CTX, ctypes.c_int32, ctypes.POINTER(Params)], ctypes.c_int32),
    # int32_t headkv_limit_restore(struct llama_context * ctx, int32_t kv_size, int32_t n_protected, int32_t n_tokens);
    "headkv_limit_restore": ([_CTX] + [ctypes.c_int32] * 3, ctypes.c_int32),
    # int32_t headkv_drop(struct llama_context * ctx, llama_seq_id seq_id, int32_t p0, int32_t p1);
    "headkv_drop": ([_CTX] + [ctypes.c_int32] * 3, ctypes.c_int32),
    # int32_t headkv_get_stats(const struct llama_context * ctx, llama_seq_id seq_id, struct headkv_stats * stats);
    "headkv_get_stats": ([_CTX, ctypes.c_int32, ctypes.POINTER(Stats)], ctypes.c_int32),
    # const char * headkv_get_policy(const struct llama_context * ctx);
    "headkv_get_policy": ([_CTX], ctypes.c_char_p),
    # int32_t headkv_get_heads(const struct llama_model * model, int32_t * n_head, int32_t * n_head_kv, int32_t * n_embd_head_k,
    #         int32_t * n_embd_head_v, int32_t * beside, int32_t n);
    "headkv_get_heads": ([ctypes.c_void_p] + [_I32] * 5 + [ctypes.c_int32], ctypes.c_int32),
    # int32_t headkv_get_budget(const struct llama_context * ctx, int32_t * dst, int32_t n);
    "headkv_get_budget": ([_CTX, _I32, ctypes.c_int32], ctypes.c_int32),
    # int32_t headkv_get_n_cells(const struct llama_context * ctx, llama_seq_id seq_id, int32_t * dst, int32_t n);
    "headkv_get_n_cells": ([_CTX, ctypes.c_int32, _I32, ctypes.c_int32], ctypes.c_int32),
    # int32_t headkv_get_positions(const struct llama_context * ctx, llama_seq_id seq_id,
    #                              int32_t il, int32_t ih, int32_t * dst, int32_t n);
    "headkv_get_positions": ([_CTX] + [ctypes.c_int32] * 3 + [_I32, ctypes.c_int32], ctypes.c_int32),
    # int32_t headkv_plan(const struct headkv_params * params, int32_t n_layer, const int32_t * n_head, const int32_t * n_head_kv,
    #         int32_t n_tokens, int32_t * dst);
    "headkv_plan": ([ctypes.POINTER(Params), ctypes.c_int32, _I32, _I32, ctypes.c_int32, _I32], ctypes.c_int32),
    # int32_t headkv_find_policy(const char * policy, const char * budget, const char * rank, const char * fit, struct headkv_policy_info * dst);
    "headkv_find_policy": ([ctypes.c_char_p] * 4 + [ctypes.POINTER(PolicyInfo)], ctypes.c_int32),
    # int32_t headkv_policies(struct headkv_policy_info * dst, int32_t n);
    "headkv_policies": ([ctypes.POINTER(PolicyInfo), ctypes.c_int32], ctypes.c_int32),
    # int32_t headkv_get_footprint(const struct llama_context * ctx, const struct headkv_params * params, int32_t n_prompt,
    #         int32_t n_predict, int32_t n_ubatch, bool layered, struct headkv_footprint * dst);
    "headkv_get_footprint": (
        [_CTX, ctypes.POINTER(Params)] + [ctypes.c_int32] * 3 + [ctypes.c_bool, ctypes.POINTER(Footprint)],
        ctypes.c_int32,
    ),
    # struct headkv_archive_params headkv_default_archive_params(void);
    "headkv_default_archive_params": ([], ArchiveParams),
    # int32_t headkv_set_archive(struct llama_context * ctx, const struct headkv_archive_params * params);
    "headkv_set_archive": ([_CTX, ctypes.POINTER(ArchiveParams)], ctypes.c_int32),
    # int32_t headkv_get_archive_stats(const struct llama_context * ctx, struct headkv_archive_stats * stats);
    "headkv_get_archive_stats": ([_CTX, ctypes.POINTER(ArchiveStats)], ctypes.c_int32),
    # int32_t headkv_archive_list(const char * folder, bool deep, headkv_archive_tell tell, void * user_data);
    "headkv_archive_list": ([ctypes.c_char_p, ctypes.c_bool, ArchiveTell, ctypes.c_void_p], ctypes.c_int32),
    # int32_t headkv_archive_prune(const char * folder, int64_t max_bytes);
    "headkv_archive_prune": ([ctypes.c_char_p, ctypes.c_int64], ctypes.c_int32),
    # cpp/headkv-testing.h
    # int32_t headkv_fill_prompt(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens, uint32_t seed);
    "headkv_fill_prompt": ([_CTX, ctypes.c_int32, ctypes.c_int32, ctypes.c_uint32], ctypes.c_int32),
    # int32_t headkv_read_window(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, float * dst, int64_t n);
    "headkv_read_window": ([_CTX, ctypes.c_int32, ctypes.c_int32, _F32, ctypes.c_int64], ctypes.c_int32),
    # int32_t headkv_read_softmax(const struct llama_context * ctx, int32_t il, float * dst, int64_t n);
    "headkv_read_softmax": ([_CTX, ctypes.c_int32, _F32, ctypes.c_int64], ctypes.c_int32),
    # int32_t headkv_read_refs(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, float * dst, int64_t n);
    "headkv_read_refs": ([_CTX, ctypes.c_int32, ctypes.c_int32, _F32, ctypes.c_int64], ctypes.c_int32),
    # int32_t headkv_read_cells(const struct llama_context * ctx, llama_seq_id seq_id,
    #                           int32_t il, int32_t ih, bool v, float * dst, int64_t n);
    "headkv_read_cells": ([_CTX] + [ctypes.c_int32] * 3 + [ctypes.c_bool, _F32, ctypes.c_int64], ctypes.c_int32),
}


class _Functions:
    """The functions of ``cpp/headkv.h`` with their prototypes, bound on first use."""

    def __getattr__(self, name: str) -> Any:
        from llama_cpp import llama_cpp

        argtypes, restype = _PROTOTYPES[name]
        func = getattr(llama_cpp._lib, name)
        func.argtypes, func.restype = argtypes, restype
        setattr(self, name, func)
        return func


lib = _Functions()


def piece(vocab: Any, token: int, special: bool) -> bytes:
    """Text of a token, empty if it is a special one and these are not wanted."""
    from llama_cpp import llama_cpp

    size = 32
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, special)
        if n >= 0:
            return buffer.raw[:n]
        size = -n


def last_error() -> str:
    """Reason of the last failure of a C function on this thread."""
    return str(lib.headkv_last_error().decode("utf-8", "replace"))


def check(result: int, error: type[Exception] = RuntimeError) -> int:
    """``result``, unless it is negative: then the reason is raised as ``error``."""
    if result < 0:
        raise error(last_error())
    return result


def policies() -> dict[str, PolicyInfo]:
    """What each policy of the library looks at, in the order in which they are listed to users."""
    found = (PolicyInfo * check(lib.headkv_policies(None, 0)))()
    check(lib.headkv_policies(found, len(found)))
    return {info.name.decode(): info for info in found}


def find_policy(policy: str, budget: str | None = None, rank: str | None = None, fit: str | None = None) -> PolicyInfo:
    """What a policy looks at, with choices that replace its own; ValueError names what is known."""
    found = PolicyInfo()
    names = [None if name is None else name.encode() for name in (policy, budget, rank, fit)]
    check(lib.headkv_find_policy(*names, ctypes.byref(found)), ValueError)
    return found


def gpus() -> list[int]:
    """ggml_backend_dev_t of each GPU of this machine."""
    from llama_cpp import llama_cpp

    ggml = llama_cpp._lib  # its dependencies are searched too
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.argtypes, ggml.ggml_backend_dev_get.restype = [ctypes.c_size_t], ctypes.c_void_p
    ggml.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    devices = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
    return [d for d in devices if ggml.ggml_backend_dev_type(d) in (1, 2)]  # GPU, integrated GPU


def gpu_names() -> list[str]:
    """Names of the GPUs that the library can use, such as ``CUDA0``, in the order that ``main_gpu`` counts."""
    from llama_cpp import llama_cpp

    ggml = llama_cpp._lib
    ggml.ggml_backend_dev_name.argtypes, ggml.ggml_backend_dev_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    return [ggml.ggml_backend_dev_name(d).decode() for d in gpus()]


def gpu_description(i_gpu: int) -> str:
    """What the driver calls a GPU, such as ``NVIDIA H100``; ``i_gpu`` counts as in ``gpu_names``."""
    from llama_cpp import llama_cpp

    ggml = llama_cpp._lib
    ggml.ggml_backend_dev_description.argtypes, ggml.ggml_backend_dev_description.restype = [ctypes.c_void_p], ctypes.c_char_p
    return str(ggml.ggml_backend_dev_description(gpus()[i_gpu]).decode())


def gpu_bytes_used(i_gpu: int) -> int:
    """Bytes in use on a GPU, by everything; ``i_gpu`` counts as in ``gpu_names``."""
    from llama_cpp import llama_cpp

    ggml = llama_cpp._lib
    device = gpus()[i_gpu]
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ggml.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)]
    ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    return total.value - free.value


@contextmanager
def creating(params: Params) -> Iterator[None]:
    """The contexts that this thread creates inside of the ``with`` statement compress as ``params`` say.

    Raises
    ------
    ValueError
        the parameters are refused
    """
    check(lib.headkv_set_params(ctypes.byref(params)), ValueError)
    try:
        yield
    finally:
        lib.headkv_set_params(None)
