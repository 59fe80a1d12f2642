"""pyheadkv: long prompts on small machines.

A patched llama.cpp in which every (layer, KV head) owns its own range of the KV
cache and its own budget (HeadKV-R2, ICLR 2025), behind the ``Llama`` class of
llama-cpp-python::

    from pyheadkv import Llama
    llm = Llama("model.gguf", kv_size=128, n_ctx=32768)
    print(llm("a long prompt ...", max_tokens=64)["choices"][0]["text"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._lib import embedded_model, use_bundled_library

if TYPE_CHECKING:
    from .llama import KVStats, Llama
    from .picture import KVText

__version__ = "0.1.0"
__all__ = ["KVStats", "KVText", "Llama", "__version__", "embedded_model"]

use_bundled_library()


def __getattr__(name: str) -> Any:
    # llama_cpp is imported on first use, so that scripts about score files start fast
    if name in ("Llama", "KVStats"):
        from . import llama

        return getattr(llama, name)
    if name == "KVText":
        from .picture import KVText

        return KVText
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
