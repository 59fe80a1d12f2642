"""One prompt, read once with full attention, then compressed and continued under many settings at the same time.

The prompt stays uncompressed in the first sequence of a context. Every setting compresses it as a sequence of its own, a
``Copy``; copies are decoded in one batch, so that the weights are read once for all of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from .. import _lib
from ..importance import find_importance
from ..llama import n_common
from ..options import AUTO, FULL, NONE, PRESETS, load_importance, policy_traits, share_of_prompt
from ..replay import known_table

if TYPE_CHECKING:
    from ..importance_values import Importance
    from ..llama import Llama
    from ..replay_values import ReplayTable


@dataclass(frozen=True, order=True)
class Setting:
    """One way to compress.

    Attributes
    ----------
    policy : of ``pyheadkv.Llama``, "full", or "none" (the question without its context, see ``Trial.read_alone``)
    kv_size : mean cells per KV head, recent ones included; 0 for "full" and with ``kv_ratio``
    pool, beta : None = the default
    importance : path of a score file or GGUF, or a name given to ``Trial.use``; "" = the model's own
    replay : path of a replay table or GGUF; "" = the model's own
    kv_ratio : share of the prompt in place of ``kv_size``; 0 = none
    kv_bytes : how ``kv_size`` was given, if as bytes; "" = it was not
    preset : of window, recent, power and pooling; "" = the default
    window, recent, power, pool_kernel : None = that of the preset
    """

    policy: str = FULL
    kv_size: int = 0
    pool: str = ""
    beta: float = 0.0
    importance: str = ""
    replay: str = ""
    kv_ratio: float = 0.0
    kv_bytes: str = ""
    preset: str = ""
    window: int | None = None
    recent: int | None = None
    power: int | None = None
    pool_kernel: int | None = None

    @property
    def scoring(self) -> dict[str, Any]:
        """Options of ``pyheadkv.Llama`` that decide how a prompt is scored, those that differ from the preset."""
        given = {"window": self.window, "recent": self.recent, "power": self.power, "pool_kernel": self.pool_kernel}
        return {name: value for name, value in {**given, "pool": self.pool or None}.items() if value is not None}

    @property
    def method(self) -> str:
        """What is compared at equal budgets."""
        scoring = " ".join(str(v) if name == "pool" else f"{name.removeprefix('pool_')} {v}" for name, v in self.scoring.items())
        files = [PurePath(file).stem if file else "" for file in (self.importance, self.replay)]
        parts = [self.policy, *files, self.preset, scoring]
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
    beside : bytes of the layers that are not compressed
    """

    n_prompt: int
    per_head: float
    cells: int
    store: int
    beside: int = 0


@dataclass
class Copy:
    """A prompt that is compressed under a setting, and what was read after it.

    Attributes
    ----------
    seq_id : its sequence in the context
    policy : in use, never "auto"; "full" where all is kept to compare with
    n_tokens : that it has
    state : of the sequence when it was compressed, of models whose other layers may not go back to it
    """

    seq_id: int
    setting: Setting
    policy: str
    held: Held
    n_tokens: int
    state: bytes = b""


class Trial:
    """A prompt that can be compressed again and again without reading it again.

    Parameters
    ----------
    llm : made with ``prefill="token"`` and ``n_seq_max`` above 1, which is how many copies there can be at a time, and with
        the policy of the settings if it looks at all tokens
    """

    N_LOGITS = 1 << 23  # that ``follow`` asks for at a time

    def __init__(self, llm: Llama) -> None:
        self.n_copies = llama_cpp.llama_n_seq_max(llm.ctx) - 1
        if llm.kv_options is None or llm.prefill_mode != "token" or self.n_copies < 1:
            raise ValueError("a trial compresses copies of a prompt: it needs Llama(..., kv_size=N, prefill='token', n_seq_max=2 or more)")
        self.llm = llm
        self.window: int = llm.kv_options.window
        self._by_all_tokens = llm.kv_options.traits.by_all_tokens
        self._tokens: list[int] = []  # what is there uncompressed
        self._loaded: dict[str, Importance | None] = {}
        self._tables: dict[str, ReplayTable | None] = {}
        self._used: set[int] = set()  # sequences of copies
        llm.reset()

    def read(self, tokens: Sequence[int]) -> None:
        """Have these tokens in the cache, uncompressed; a beginning that is there already is not read again."""
        n = n_common(self._tokens, tokens)
        if n < len(self._tokens):
            # a compression needs the queries of the last tokens, or of all, which are those that were read last
            n = 0 if self._by_all_tokens else min(n, max(0, len(tokens) - self.window))
            if not self._cut(0, n):  # windowed or recurrent layers have lost what is before
                n = 0
                self._remove(0, -1)
            self.llm.n_tokens = n
        if n < len(tokens):
            self.llm.eval(list(tokens[n:]))
        self._tokens = list(tokens)

    def compress(self, setting: Setting, prompt: Sequence[int], *, question: str = "known") -> Copy:
        """Read the rest of a prompt, uncompressed, and compress a copy of it.

        Raises
        ------
        RuntimeError : there are as many copies as the context has sequences
        """
        self.read(prompt)
        seq_id = self._free()
        self._configure(setting, prompt, question)
        before = self.llm.kv_stats().bytes_store
        self.llm.compress_as(seq_id)
        self._used.add(seq_id)
        return self._copy(seq_id, setting, before)

    def _configure(self, setting: Setting, prompt: Sequence[int], question: str) -> None:
        if setting.policy == FULL:
            self.llm.configure(policy="snapkv", kv_size=self.llm.n_ctx())
            return
        preset = {"preset": setting.preset or "default", **setting.scoring}
        recent = setting.recent or PRESETS[preset["preset"]]["recent"]
        kv_size = share_of_prompt(setting.kv_ratio, len(prompt), recent=recent) if setting.kv_ratio else setting.kv_size
        options: dict[str, Any] = {"policy": setting.policy, "kv_size": kv_size, "beta": setting.beta or None}
        options["question"] = question if setting.policy == AUTO else None
        self.llm.configure(importance=self._importance(setting), replay=self._replay(setting), **preset, **options)

    def _copy(self, seq_id: int, setting: Setting, before: int) -> Copy:
        """What is held of a prompt that has just been compressed; ``before``: bytes that the store had."""
        stats = self.llm.kv_stats(seq_id)
        per_head = float(stats.n_cells[stats.n_cells > 0].mean())
        beside = stats.bytes_beside // llama_cpp.llama_n_seq_max(self.llm.ctx)
        held = Held(stats.n_past, per_head, round(stats.bytes_full * per_head / stats.n_past), stats.bytes_store - before, beside)
        state = self._save(seq_id) if beside else b""
        return Copy(seq_id, setting, FULL if setting.policy == FULL else self.llm.policy, held, stats.n_past, state)

    def _save(self, seq_id: int) -> bytes:
        size = llama_cpp.llama_state_seq_get_size(self.llm.ctx, seq_id)
        data = (ctypes.c_uint8 * size)()
        if size == 0 or llama_cpp.llama_state_seq_get_data(self.llm.ctx, data, size, seq_id) != size:
            raise RuntimeError(_lib.last_error())
        return bytes(data)

    def _restore(self, copy: Copy) -> None:
        size = len(copy.state)
        data = (ctypes.c_uint8 * size).from_buffer_copy(copy.state)
        n_ctx = self.llm.n_ctx()
        _lib.check(_lib.lib.headkv_limit_restore(self.llm.ctx, n_ctx, n_ctx, n_ctx))
        if llama_cpp.llama_state_seq_set_data(self.llm.ctx, data, size, copy.seq_id) != size:
            raise RuntimeError(_lib.last_error())

    def read_alone(self, tokens: Sequence[int]) -> Copy:
        """Read other tokens beside the prompt, all but the last one, and keep them all: a question without its context."""
        copy = Copy(self._free(), Setting(NONE), NONE, Held(len(tokens) - 1, 0.0, 0, 0), 0)
        self.llm.configure(policy="snapkv", kv_size=self.llm.n_ctx())
        self._used.add(copy.seq_id)
        self.say([copy], [tokens[:-1]])
        _lib.check(_lib.lib.headkv_end_prompt(self.llm.ctx, copy.seq_id))
        copy.state = b"" if self.is_whole else self._save(copy.seq_id)
        return copy

    def _free(self) -> int:
        seq_id = next((i for i in range(1, 1 + self.n_copies) if i not in self._used), None)
        if seq_id is None:
            raise RuntimeError(f"{self.n_copies} copies are held: drop some, or use a larger n_seq_max")
        return seq_id

    def go_on(self, copies: Sequence[Copy], n: int, tokens: Sequence[int]) -> None:
        """Take copies back to their first ``n`` tokens and read ``tokens``, but for the last one.

        The last one is the first argument of ``generate`` or ``follow``.
        """
        for copy in copies:
            if n == copy.held.n_prompt < copy.n_tokens and copy.state and not self._cut(copy.seq_id, n):
                self._restore(copy)
            elif n < copy.n_tokens:
                self._remove(copy.seq_id, n)
            copy.n_tokens = n
        self.say(copies, [tokens[:-1]] * len(copies))

    @property
    def is_whole(self) -> bool:
        """Whether copies can always be cut: no layer has a window or a recurrent state."""
        return self.llm.kv_stats().bytes_beside == 0

    def go_back(self, copies: Sequence[Copy], n: int) -> bool:
        """Have copies as they were with ``n`` tokens; False where a window or a recurrent state has gone too far, then ``go_on``."""
        if not all([self._cut(copy.seq_id, n) for copy in copies]):
            return False
        for copy in copies:
            copy.n_tokens = n
        return True

    def go_again(self, copies: Sequence[Copy], n: int, tokens: Sequence[int]) -> None:
        """Have copies as ``go_on`` left them, which reads what cannot be gone back to."""
        if not self.go_back(copies, n + len(tokens) - 1):
            self.go_on(copies, n, tokens)

    def say(self, copies: Sequence[Copy], rows: Sequence[Sequence[int]]) -> None:
        """Read tokens, a row for each copy."""
        n_each = max(1, llama_cpp.llama_n_batch(self.llm.ctx) // max(1, len(copies)))
        for i in range(0, max(map(len, rows), default=0), n_each):
            self._decode(copies, [row[i : i + n_each] for row in rows], logits=False)

    def generate(self, copies: Sequence[Copy], token: int, n: int, *, stop: frozenset[int] = frozenset()) -> list[list[int]]:
        """Greedy tokens of each copy after ``token``, which is read first; at most n, without the one that stops.

        The last of n tokens is not read, nor is the one that stops.
        """
        out: list[list[int]] = [[] for _ in copies]
        going = [(copy, said, token) for copy, said in zip(copies, out, strict=True) if n > 0]
        while going:
            logits = self._decode([copy for copy, _, _ in going], [[last] for _, _, last in going])
            after = []
            for (copy, said, _), best in zip(going, logits.argmax(axis=1).tolist(), strict=True):
                if best in stop:
                    continue
                said.append(best)
                if len(said) < n:
                    after.append((copy, said, best))
            going = after
        return out

    def follow(self, copies: Sequence[Copy], tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Logits (n_copies, n, n_vocab) after each of ``tokens``, which all copies read; some tokens at a time."""
        n_vocab = self.llm.n_vocab()
        n_each = max(1, min(self.N_LOGITS // n_vocab, llama_cpp.llama_n_batch(self.llm.ctx)) // len(copies))
        for i in range(0, len(tokens), n_each):
            some = list(tokens[i : i + n_each])
            yield self._decode(copies, [some] * len(copies), logits="all").reshape(len(copies), len(some), n_vocab)

    def surprise(self, copies: Sequence[Copy], token: int, answer: Sequence[int]) -> list[float]:
        """Mean negative log likelihood (nats per token) of ``answer`` after ``token``, which is read first; of each copy.

        Copies have read all of it but its last token then.
        """
        total, n = np.zeros(len(copies)), 0
        for logits in self.follow(copies, [token, *answer[:-1]]):
            wanted = list(answer[n : n + logits.shape[1]])
            total -= log_softmax(logits)[:, range(len(wanted)), wanted].sum(axis=1)
            n += len(wanted)
        return [float(x) / n for x in total]

    def drop(self, copies: Sequence[Copy]) -> None:
        """Free what copies hold."""
        for copy in copies:
            self._remove(copy.seq_id, -1)
            self._used.discard(copy.seq_id)

    def use(self, name: str, importance: Importance) -> None:
        """What settings mean by ``importance=name``."""
        self._loaded[name] = importance

    def _importance(self, setting: Setting) -> Importance | None:
        source = setting.importance or self.llm.model_path
        if not policy_traits(setting.policy).by_importance:
            return None
        if source not in self._loaded and setting.importance:
            self._loaded[source] = load_importance(source, self.llm.model_path)
        elif source not in self._loaded:
            found = find_importance(source)
            self._loaded[source] = None if found is None else found.importance
        return self._loaded[source]

    def _replay(self, setting: Setting) -> ReplayTable | None:
        if not policy_traits(setting.policy).by_replay:
            return None
        if setting.replay not in self._tables:
            self._tables[setting.replay] = known_table(self.llm.model_path, setting.replay or None)
        return self._tables[setting.replay]

    def _remove(self, seq_id: int, n: int) -> None:
        """All of a sequence but its first n tokens; -1 = all."""
        if not self._cut(seq_id, n):
            raise RuntimeError(
                f"sequence {seq_id} cannot be truncated to {n} tokens: a recurrent state does not go back, and a window no further than "
                "its ring reaches; only what comes behind a compressed prompt can be asked (eval: --protocol query-agnostic)"
            )

    def _cut(self, seq_id: int, n: int) -> bool:
        return bool(self.llm._ctx.kv_cache_seq_rm(seq_id, n, -1))

    def _decode(self, copies: Sequence[Copy], rows: Sequence[Sequence[int]], *, logits: bool | str = True) -> NDArray[np.float32]:
        """One batch: a row of tokens for each copy. Logits (n, n_vocab) of the last token of each row, or of all tokens."""
        n = sum(map(len, rows))
        out: list[int] = []
        batch = llama_cpp.llama_batch_init(max(1, n), 0, 1)
        try:
            for copy, row in zip(copies, rows, strict=True):
                for k, token in enumerate(row):
                    i = batch.n_tokens
                    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, copy.n_tokens + k, 1, copy.seq_id
                    batch.logits[i] = logits == "all" or (logits and k == len(row) - 1)
                    out += [i] if batch.logits[i] else []
                    batch.n_tokens += 1
            _lib.lib.headkv_clear_error()
            code = llama_cpp.llama_decode(self.llm.ctx, batch) if n else 0
            if code != 0:
                raise RuntimeError(f"llama_decode returned {code}: {_lib.last_error()}")
        finally:
            llama_cpp.llama_batch_free(batch)
        for copy, row in zip(copies, rows, strict=True):
            copy.n_tokens += len(row)
        n_vocab = self.llm.n_vocab()
        found = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.llm.ctx, i), shape=(n_vocab,)) for i in out]
        return np.stack(found) if found else np.zeros((0, n_vocab), np.float32)


class ArchivedTrial(Trial):
    """The same for one setting at a time: every prompt is read anew, from where it differs from those in the archive of ``llm``."""

    def __init__(self, llm: Llama) -> None:
        self.n_copies, self.llm = 1, llm
        self._loaded, self._tables = {}, {}

    def compress(self, setting: Setting, prompt: Sequence[int], *, question: str = "known") -> Copy:
        """Read a prompt and compress it; it takes the place of the one before."""
        self._configure(setting, prompt, question)
        self.llm.read_prompt(prompt)
        return self._copy(0, setting, 0)

    def drop(self, copies: Sequence[Copy]) -> None:
        """Free what the prompt holds."""
        self.llm.reset()


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithm of the probabilities, over the last axis."""
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
