"""One prompt, read once with full attention, then compressed and continued under many settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .options import BY_IMPORTANCE, FULL, load_importance

if TYPE_CHECKING:
    from .gguf_keys import Importance
    from .llama import Llama

@dataclass(frozen=True, order=True)
class Setting:
    """One way to compress.

    Attributes
    ----------
    policy : of ``pyheadkv.Llama``, or "full"
    kv_size : cells per KV head, window included; 0 for "full"
    pool, beta : None = the default
    importance : path of a score file or GGUF, or a name given to ``Trial.use``; "" = the model's own
    """

    policy: str = FULL
    kv_size: int = 0
    pool: str = ""
    beta: float = 0.0
    importance: str = ""

    @property
    def name(self) -> str:
        """Short and unique among the settings of one run."""
        from pathlib import PurePath

        parts = [self.policy, PurePath(self.importance).stem if self.importance else "", self.pool]
        parts += [f"beta {self.beta:g}" if self.beta else "", str(self.kv_size or "")]
        return " ".join(filter(None, parts))


@dataclass(frozen=True)
class Held:
    """What a compressed prompt takes.

    Attributes
    ----------
    cells : bytes of K and V in the cells that are kept, all heads
    store : bytes allocated for them, with the rows that wait for generated tokens
    """

    cells: int
    store: int


class Trial:
    """A prompt that can be compressed again and again without reading it again.

    Parameters
    ----------
    llm : made with ``keep_prompt=True``
    """

    def __init__(self, llm: Llama) -> None:
        if llm.kv_options is None or not llm.kv_options.keep_prompt:
            raise ValueError("keep_prompt=False: a trial needs Llama(..., kv_size=N, keep_prompt=True)")
        self.llm = llm
        self.window: int = llm.kv_options.window
        self._tokens: list[int] = []  # what is there uncompressed
        self._loaded: dict[str, Importance | None] = {}
        llm.reset()

    def read(self, tokens: Sequence[int]) -> None:
        """Have these tokens in the cache, uncompressed; a beginning that is there already is not read again."""
        self.restore()
        n = _n_common(self._tokens, tokens)
        if n < len(self._tokens):
            # a compression needs the queries of the last tokens, which are those that were read last
            n = min(n, max(0, len(tokens) - self.window))
            self._truncate(n)
        self.llm.eval(list(tokens[n:]))
        self._tokens = list(tokens)

    def compress(self, setting: Setting, prompt: Sequence[int]) -> Held:
        """Read the rest of a prompt, uncompressed, and compress it."""
        self.read(prompt)
        llm = self.llm
        if setting.policy == FULL:
            llm.configure(policy="snapkv", kv_size=llm.n_ctx())
        else:
            options: dict[str, Any] = {"policy": setting.policy, "kv_size": setting.kv_size, "beta": setting.beta or None}
            llm.configure(importance=self._importance(setting), pool=setting.pool or "max", **options)
        llm.end_prompt()
        stats = llm.kv_stats()
        n_heads = np.count_nonzero(stats.n_cells)
        return Held(round(stats.bytes_full * int(stats.n_cells.sum()) / (n_heads * stats.n_past)), stats.bytes_store)

    def go_on(self, n: int, tokens: Sequence[int]) -> None:
        """Take the compressed cache back to its first ``n`` tokens and read ``tokens`` into it, but for the last one.

        The last one is the first argument of ``generate`` or ``surprise``.
        """
        self._truncate(n)
        del self._tokens[n:]  # their queries are gone
        if len(tokens) > 1:
            self.llm.eval(list(tokens[:-1]))

    def generate(self, token: int, n: int, *, stop: frozenset[int] = frozenset()) -> list[int]:
        """Greedy tokens after ``token``, which is read first; at most n, without the one that stops."""
        out: list[int] = []
        while len(out) < n:
            self.llm.eval([token])
            token = int(self.llm.last_logits.argmax())
            if token in stop:
                break
            out.append(token)
        return out

    def surprise(self, token: int, answer: Sequence[int]) -> float:
        """Mean negative log likelihood (nats per token) of ``answer`` after ``token``, which is read first."""
        total = 0.0
        for wanted in answer:
            self.llm.eval([token])
            logits = self.llm.last_logits.astype(np.float64)
            top = logits.max()
            total += top + math.log(np.exp(logits - top).sum()) - logits[wanted]
            token = wanted
        return total / len(answer)

    def use(self, name: str, importance: Importance) -> None:
        """What settings mean by ``importance=name``."""
        self._loaded[name] = importance

    def _importance(self, setting: Setting) -> Importance | None:
        source = setting.importance or self.llm.model_path
        if setting.policy not in BY_IMPORTANCE:
            return None
        if source not in self._loaded:
            self._loaded[source] = load_importance(source, self.llm.model_path)
        return self._loaded[source]

    def restore(self) -> None:
        """Back to the prompt as it was before its compression."""
        if self.llm.kv_stats().state == "compressed":
            self.llm.restore_prompt(len(self._tokens))

    def _truncate(self, n: int) -> None:
        if n == 0:
            self.llm.reset()
        elif not self.llm._ctx.kv_cache_seq_rm(0, n, -1):
            raise RuntimeError(f"the cache cannot be truncated to {n} of {self.llm.n_tokens} tokens")
        self.llm.n_tokens = n


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    same = np.asarray(a[:n]) == np.asarray(b[:n])
    return n if same.all() else int(same.argmin())
