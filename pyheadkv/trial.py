"""One prompt, read once with full attention, then compressed and continued under many settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from .importance import find_importance
from .llama import n_common
from .options import AUTO, BY_ALL_TOKENS, BY_IMPORTANCE, FULL, load_importance, share_of_prompt

if TYPE_CHECKING:
    from .gguf_keys import Importance
    from .llama import Llama


@dataclass(frozen=True, order=True)
class Setting:
    """One way to compress.

    Attributes
    ----------
    policy : of ``pyheadkv.Llama``, or "full"
    kv_size : mean cells per KV head, recent ones included; 0 for "full" and with ``kv_ratio``
    pool, beta : None = the default
    importance : path of a score file or GGUF, or a name given to ``Trial.use``; "" = the model's own
    kv_ratio : share of the prompt in place of ``kv_size``; 0 = none
    kv_bytes : how ``kv_size`` was given, if as bytes; "" = it was not
    preset : of window, recent, power and pooling; "" = the default
    """

    policy: str = FULL
    kv_size: int = 0
    pool: str = ""
    beta: float = 0.0
    importance: str = ""
    kv_ratio: float = 0.0
    kv_bytes: str = ""
    preset: str = ""

    @property
    def method(self) -> str:
        """What is compared at equal budgets."""
        parts = [self.policy, PurePath(self.importance).stem if self.importance else "", self.preset, self.pool]
        return " ".join(filter(None, [*parts, f"beta {self.beta:g}" if self.beta else ""]))

    @property
    def budget(self) -> str:
        """As it was given: cells, a share or bytes."""
        return f"{100 * self.kv_ratio:g}%" if self.kv_ratio else self.kv_bytes or str(self.kv_size or "")

    @property
    def name(self) -> str:
        """Short and unique among the settings of one run."""
        return f"{self.method} {self.budget}".strip()


@dataclass(frozen=True)
class Held:
    """What a compressed prompt takes.

    Attributes
    ----------
    n_prompt : tokens of it
    per_head : cells that are kept, mean of the KV heads
    cells : bytes of K and V in the cells that are kept, all heads
    store : bytes allocated for them, with the rows that wait for generated tokens
    """

    n_prompt: int
    per_head: float
    cells: int
    store: int


class Trial:
    """A prompt that can be compressed again and again without reading it again.

    Parameters
    ----------
    llm : made with ``keep_prompt=True``, and with the policy of the settings if it is one of ``BY_ALL_TOKENS``
    """

    def __init__(self, llm: Llama) -> None:
        if llm.kv_options is None or not llm.kv_options.keep_prompt:
            raise ValueError("keep_prompt=False: a trial needs Llama(..., kv_size=N, keep_prompt=True)")
        self.llm = llm
        self.window: int = llm.kv_options.window
        self._by_all_tokens = llm.kv_options.policy in BY_ALL_TOKENS
        self._tokens: list[int] = []  # what is there uncompressed
        self._unread: list[int] = []  # last token of an answer that was not stopped
        self._loaded: dict[str, Importance | None] = {}
        llm.reset()

    def read(self, tokens: Sequence[int]) -> None:
        """Have these tokens in the cache, uncompressed; a beginning that is there already is not read again."""
        self.restore()
        n = n_common(self._tokens, tokens)
        if n < len(self._tokens):
            # a compression needs the queries of the last tokens, or of all, which are those that were read last
            n = 0 if self._by_all_tokens else min(n, max(0, len(tokens) - self.window))
            self._truncate(n)
        if n < len(tokens):
            self.llm.eval(list(tokens[n:]))
        self._tokens = list(tokens)

    def compress(self, setting: Setting, prompt: Sequence[int]) -> Held:
        """Read the rest of a prompt, uncompressed, and compress it."""
        self.read(prompt)
        llm = self.llm
        if setting.policy == FULL:
            llm.configure(policy="snapkv", kv_size=llm.n_ctx())
        else:
            kv_size = share_of_prompt(setting.kv_ratio, len(prompt), recent=llm.kv_options.recent) if setting.kv_ratio else setting.kv_size
            options: dict[str, Any] = {"policy": setting.policy, "kv_size": kv_size, "beta": setting.beta or None}
            preset = {"preset": setting.preset or "default"} | ({"pool": setting.pool} if setting.pool else {})
            llm.configure(importance=self._importance(setting), **preset, **options)
        llm.end_prompt()
        stats = llm.kv_stats()
        per_head = float(stats.n_cells[stats.n_cells > 0].mean())
        return Held(stats.n_past, per_head, round(stats.bytes_full * per_head / stats.n_past), stats.bytes_store)

    def go_on(self, n: int, tokens: Sequence[int]) -> None:
        """Take the compressed cache back to its first ``n`` tokens and read ``tokens`` into it, but for the last one.

        The last one is the first argument of ``generate`` or ``surprise``.
        """
        self._truncate(n)
        if len(tokens) > 1:
            self.llm.eval(list(tokens[:-1]))

    def generate(self, token: int, n: int, *, stop: frozenset[int] = frozenset()) -> list[int]:
        """Greedy tokens after ``token``, which is read first; at most n, without the one that stops."""
        out: list[int] = []
        self._unread = []
        while len(out) < n:
            self.llm.eval([token])
            token = int(self.llm.last_logits.argmax())
            if token in stop:
                return out
            out.append(token)
        self._unread = out[-1:]
        return out

    def say(self, tokens: Sequence[int]) -> None:
        """After an answer, read all of it and then ``tokens``, but for the last one, which ``generate`` takes."""
        self.llm.eval([*self._unread, *tokens[:-1]])

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
        if setting.policy not in (AUTO, *BY_IMPORTANCE):
            return None
        if source not in self._loaded and setting.importance:
            self._loaded[source] = load_importance(source, self.llm.model_path)
        elif source not in self._loaded:
            found = find_importance(source)
            self._loaded[source] = found and found.importance
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
