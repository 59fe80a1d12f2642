"""``Llama``: llama_cpp.Llama with a compressed KV cache."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import wraps
from inspect import signature
from os import PathLike, fspath
from reprlib import repr as short_repr
from typing import Any, Concatenate, ParamSpec, TypeVar

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama import LlamaState
from llama_cpp.llama_tokenizer import LlamaTokenizer

from . import _lib
from .archive import ArchiveLike, ArchiveStats, archive_stats, check_archive
from .grammar import GrammarSampler, check_grammar
from .importance import Found, find_importance
from .importance_values import Importance
from .layers import bytes_beside
from .model import read_shape
from .options import (
    AUTO,
    BY_BETA,
    FULL,
    MAX_CELLS,
    ImportanceLike,
    MissingFileError,
    Options,
    check_bool,
    check_int,
    check_names,
    check_policy,
    check_share,
    check_text,
    check_tokens,
    load_importance,
    policy_traits,
    preset_changes,
    share_of_prompt,
)
from .picture import KVText, make_plot, make_text
from .replay import FoundReplay, ReplayLike, find_replay, replay_for
from .replay_values import ReplayTable
from .rpc import Traffic, Workers
from .units import check_cell_type, parse_bytes, round_n_ctx, row_bytes

N_PIECE = 32  # bytes of a token that llama_cpp.Llama.detokenize has room for
PIECE_MS = 250  # of reading a prompt layer by layer, before Python has its turn

STATES = ("empty", "staged", "compressed", "layered")


@dataclass(frozen=True)
class KVStats:
    """What the KV cache holds now.

    Attributes
    ----------
    state : "empty", "staged" (the prompt is being read), "compressed", or "layered" (read
        layer by layer, the end of the prompt is pending)
    n_prompt : prompt tokens at compression, 0 before
    n_past : logical tokens, prompt and generated
    n_cells : (n_layer, n_head_kv) int32, cells that each head holds
    bytes_store : bytes of K and V allocated for compressed cells, all layers
    bytes_staging : bytes allocated for reading a prompt, 0 after compression
    bytes_peak : largest sum of staging, scratch and store during the last prompt
    bytes_full : bytes that n_past cells of an uncompressed cache take, in the layers that are compressed
    bytes_beside : bytes of the layers that are not, windows and recurrent states, of all sequences; they do not grow
    compress_ms : duration of the last compression in ms
    n_archived : first tokens of the prompt whose K and V came from the archive
    n_heads_fitted : KV heads whose values were fitted, of those that dropped cells
    fit_before, fit_after : what the kept cells miss of the answers of all cells to queries of the prompt that the fit does not
        know: mean squares, relative to these answers, mean over the heads that dropped cells; 0 without a fit
    fit_ms : of ``compress_ms``, the fit
    archive : what the archive did since it was opened; None without one
    n_evictions : how often generated tokens were evicted since the compression, see ``kv_generated``
    n_evicted : cells of all heads that were dropped with that
    evict_ms : how long it took
    bytes_queries : bytes allocated for the queries of the last generated tokens, of all sequences; 0 without ``kv_generated``
    """

    state: str
    n_prompt: int
    n_past: int
    n_cells: npt.NDArray[np.int32]
    bytes_store: int
    bytes_staging: int
    bytes_peak: int
    bytes_full: int
    bytes_beside: int
    compress_ms: float
    n_archived: int
    n_heads_fitted: int
    fit_before: float
    fit_after: float
    fit_ms: float
    archive: ArchiveStats | None
    n_evictions: int
    n_evicted: int
    evict_ms: float
    bytes_queries: int


N_BATCH: Any = llama_cpp.llama_context_params.n_batch  # the field of the structure


class _WholePromptParams(llama_cpp.llama_context_params):
    """Context parameters whose n_batch takes a whole prompt.

    A prompt that is read layer by layer comes in one batch. Nothing in the library is
    sized by ``n_batch``, but ``llama_cpp.Llama`` sizes arrays by its own copy of it.
    """

    @property
    def n_batch(self) -> int:
        n: int = N_BATCH.__get__(self)
        return n

    @n_batch.setter
    def n_batch(self, value: int) -> None:
        N_BATCH.__set__(self, max(value, self.n_ctx))
        self.n_outputs_max = value


Params = ParamSpec("Params")
Result = TypeVar("Result")


def _on_workers(method: Callable[Concatenate[Llama, Params], Result]) -> Callable[Concatenate[Llama, Params], Result]:
    """A method whose result may come from workers: it has none when one of them is lost."""

    @wraps(method)
    def checked(self: Llama, /, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        with self._asking_workers():
            return method(self, *args, **kwargs)

    return checked


class StateError(ValueError, KeyError):
    """A state that cannot be restored; to a completion that finds it in its ``LlamaCache``, one that is not there."""

    __str__ = Exception.__str__


class Llama(llama_cpp.Llama):
    """``llama_cpp.Llama`` whose KV heads keep only the cells that matter.

    A prompt is read with full attention; then each KV head keeps the cells that
    the last ``window`` queries look at, as many as its budget allows, and
    generation attends to those and to the generated tokens. Completion, chat,
    streaming and grammars work as in llama-cpp-python.

    Options that are None have the default of ``pyheadkv.options.Options``, which is named in
    parentheses. All but the amounts need one of these: without ``kv_size``, ``kv_ratio`` or
    ``kv_bytes`` they are an error.

    Parameters
    ----------
    model_path : path of a GGUF file
    kv_size : mean cells per KV head after the prompt, recent ones included;
        None = the stock cache, bit-identical to upstream
    kv_ratio : instead of ``kv_size``, its share of the length of each prompt, above 0 and at
        most 1
    kv_bytes : instead of ``kv_size``, bytes of K and V that the cells of all heads take
        after the prompt, a number or such as "64MiB"; generated tokens come on top. Of models with windowed attention or
        recurrent layers it counts what these take for a sequence too, and the other layers share what is left
    policy : which cells each head keeps: three choices, budget, rank and fit, by one name. "auto" (the default; the attribute
        ``policy`` says what it chose): with ``question="known"`` "headkv" when the importance of the heads is known, else "adakv";
        with "both" "mix/attention+outlying" when importance and replay table are known, "importance/attention+outlying" when importance
        is, else "uniform/attention+outlying"; with "later" "mix/outlying+value" when importance
        and replay table are known, "replay/outlying+value" or "importance/outlying" when one of them is, else "uniform/outlying".
        "headkv" (importance/attention), "snapkv" (uniform/attention), "streaming" (uniform/recent), "pyramidkv"
        (pyramid/attention), "adakv" (adaptive/attention), "headkv+adakv" (importance+adaptive/attention), "criticalkv"
        (uniform/critical), "h2o" (uniform/sums; where a GPU or attend="composed" reads, a prompt takes n_ctx * n_ubatch * n_head * 4 bytes more), "razor"
        (whole/recent/mean), or any "budget/rank" or "budget/rank/fit"; without an amount "full", the stock cache, and "lossless":
        every head keeps all, in the store that decoding reads faster than the stock cache
    budget : how many cells a head keeps, in place of the policy's own: "uniform", "importance" (of the query heads), "replay" (by a
        table of shares, see ``replay``), "mix" (the mean of these two), "adaptive" (uniform, but within a layer the prompt decides),
        "importance+adaptive" (a head is sure of half of its own, and the prompt divides the rest within the layer), "pyramid" (fewer
        in deeper layers), "whole" (the most important heads keep all, as many as there is room for, the others what is protected,
        and one)
    rank : which cells, in place of the policy's own: "attention" (of the last queries), "value" (L2 norm of the value, the first 4
        cells are kept), "attention*value", "expected" (the attention that queries like those of the prompt are expected to pay, and the
        value; on the CPU), "outlying" (tokens whose values, in all layers up to this one, are far from the mean of their head, with their
        neighbours), "outlying+value" (these, and in heads that keep more than the mean their own farthest), "attention+outlying"
        (half by attention, above 128 cells, the other half these), "output" (L1 norm of what the value adds to the output of the layer), "critical" (half by attention, half by attention times output), "sums" (attention of all
        tokens), "recent" (the last ones)
    fit : what becomes of their values, in place of the policy's own: "none", "mean" (one cell stands for those that are dropped)
        or "values" (fitted, so that the prompt's own queries get the answers of the full cache)
    question : for "auto": "known" (prompts end with it), "both" (with the first of several about what was kept, such as a chat that goes
        on with it) or "later" (a document for questions to come); None = later with ``kv_reuse`` where the replay table is known, else known
    beta : > 1; a share 1/beta of the budget is given out by importance, the rest evenly;
        None = the one stored with the importance (``pyheadkv score --calibrate``), else 1.2
    preset : what the five options below are when they are not given: "default", or "paper"
        (those of HeadKV: 8, 8, 1, "max", 7)
    window : number of last queries that score the prompt (64)
    recent : last cells of the prompt that every head keeps (8)
    power : 1, 2, 4 or 8: the score of a cell is the power mean of the attention that the queries
        pay to it; 1 = their mean, more = rather the largest (4)
    pool, pool_kernel : pooling of the scores along the prompt, "max" or "avg", over an odd number of
        neighbours, 1 = none, 0 = a quarter of the cells of each head, 3 to 31 ("max", 0)
    importance : a path (score file, GGUF), or a (n_layer, n_head) array; None = the model's
        metadata, ``MODEL.importance.json`` beside it, the user's cache, or the registry of known
        models, in this order
    replay : a path (score file of ``pyheadkv score --method replay``), or a ``ReplayTable``; None = the model's metadata,
        ``MODEL.replay.json`` beside it, the user's cache, or the registry, in this order
    prefill : order in which prompts are read: "layer" (one layer's full cache is alive
        at a time), "token" (every layer's, as upstream) or "auto" (layer where it
        applies; the default). The results are the same; ``prefill_mode`` says what was chosen
    prefill_hidden : type of the hidden states between layers, "f32" (exact, the default) or "f16" (half
        the memory of what is left; logits of the random models of the tests change by a
        normalised error below 1e-5)
    kv_reuse : continue on the compressed past when a prompt starts with it, and what is new is
        not longer than it or than ``kv_size``, since every head keeps what is new. Off by
        default: such a prompt is read again, so that the answer is that of a fresh one
    kv_archive : a folder, or True = memory, where K and V of all tokens of a prompt are kept: a later prompt that begins
        like one there, such as the next turn of a chat or another question about a document, is read from where it differs, with the
        outcome of reading all of it. A folder may be shared by processes and models; it has the prompts in it, readable by
        its owner alone. None = no archive (the default)
    kv_archive_size : bytes that it may take, a number or such as "20GiB" (the default; of memory a quarter of all); what was not used for the
        longest time goes first
    kv_archive_type : "f16", "bf16", "q8_0" or "q4_0": what K and V are rounded to in it, smaller and no longer exact; None =
        as the cache has them
    n_seq_max : sequences of the context; this object reads and generates in the first one, the others take copies of its
        prompt, see ``compress_as`` (1)
    sinks : first cells of a prompt that every head keeps; None = 4 with ranks "recent", "value", "output", "expected", "outlying",
        "outlying+value", "attention*value", as far as ``kv_size`` reaches, else 0
    protect : (start, end) spans of prompt positions whose cells every head keeps; what lies
        behind the end of a prompt is no matter. Sinks and protected cells are part of a
        head's budget; a head whose budget they exceed grows, which ``kv_stats()`` tells
    surplus : what becomes of the cells that a head may keep beyond the length of the prompt:
        "lost" (the default), or "redistribute" (evenly to the other heads of its layer, then to those of
        the other layers)
    pyramid_exact : True (the default) = the budgets of "pyramidkv" add up to ``kv_size`` per head; False =
        those of its authors, whose rounding holds more (32 layers: 13 % at 64 cells, 5 % at 128)
    adakv_floor : share of its budget, 0 to 1, that the prompt cannot take from a head; None =
        0.2 under "adakv", 0.5 under "headkv+adakv"
    adakv_normalize : under both, weight the scores of a head by the share of its best cells
        in their sum, so that heads with concentrated attention get more (False)
    kv_generated : mean cells per KV head that generated tokens may hold, more than ``window``; None (the default) = all of them stay.
        When there are ``kv_generated_slack`` more, each head keeps those that the last ``window`` tokens look at, as many as the
        policy's budget gives it, and these last ones. Positions go on: ``n_ctx`` bounds the prompt and what a head holds, and no longer
        what is said. ``configure`` can change it, but not to an amount where the context was created without one
    kv_generated_scope : which cells compete then: "generated" (the default; those of the prompt stay), or "all" but sinks and protected
        ones, of which a head keeps ``kv_size + kv_generated`` on average
    kv_generated_rank : which ones stay: "attention" (the default), "recent" (the last ones; with sinks and the scope "all" StreamingLLM),
        or "redundancy" (attention, less for keys that others are near to, as in R-KV)
    kv_generated_slack : tokens from one eviction to the next (128)
    kv_limit : tokens, prompt and answer, at which a completion ends with the reason "length" where ``kv_generated`` lets it go on
        beyond ``n_ctx``; None = the length that the model was trained with, or ``n_ctx`` if that is more. With ``logits_all`` or a
        ``draft_model`` it ends with ``n_ctx``
    attend : "auto", "fused" or "composed": attention by ops of this package where they are (prompts: on the CPU), or by those of ggml
        everywhere, which reads a prompt with the bits of the stock cache
    n_tail, n_buckets : see ``cpp/headkv.h``
    rpc_servers : ``host:port`` of workers (``pyheadkv rpc-worker``) that take layers, the last ``n_gpu_layers`` of the model (all), several
        with commas between them, ``tensor_split`` says in which shares; each holds K and V of its layers. None = this machine alone
    **kwargs : every argument of ``llama_cpp.Llama``; ``flash_attn`` is on when
        compression is, also where False is passed: that is upstream's default, which
        wrappers pass on, and there is no compression without it. ``swa_full`` is off then: layers with
        windowed attention hold their window, the others are compressed

    Raises
    ------
    TypeError
        an option that neither class has; the message names the nearest one
    MissingFileError
        there is no such model, a FileNotFoundError and a ValueError
    ValueError
        wrong option, an option of the compression without an amount, no importance for a policy that needs it, or an architecture that
        cannot be compressed; the message names value, limit and remedy
    ConnectionError
        a worker of ``rpc_servers`` does not answer; ``pyheadkv.rpc.WorkerLostError``, one of these, where it went away later: whatever was asked
        for ends with it, and the model has to be loaded again

    References
    ----------
    HeadKV: Not All Heads Matter, ICLR 2025, sections 3.2 and 3.3.
    """

    def __init__(
        self,
        model_path: str | PathLike[str],
        *,
        kv_size: int | None = None,
        kv_ratio: float | None = None,
        kv_bytes: int | str | None = None,
        policy: str | None = None,
        budget: str | None = None,
        rank: str | None = None,
        fit: str | None = None,
        question: str | None = None,
        beta: float | None = None,
        preset: str | None = None,
        window: int | None = None,
        recent: int | None = None,
        power: int | None = None,
        pool: str | None = None,
        pool_kernel: int | None = None,
        importance: ImportanceLike = None,
        replay: ReplayLike = None,
        prefill: str | None = None,
        prefill_hidden: str | None = None,
        kv_reuse: bool | None = None,
        kv_archive: ArchiveLike = None,
        kv_archive_size: int | str | None = None,
        kv_archive_type: str | None = None,
        n_seq_max: int | None = None,
        sinks: int | None = None,
        protect: Sequence[tuple[int, int]] | None = None,
        surplus: str | None = None,
        pyramid_exact: bool | None = None,
        adakv_floor: float | None = None,
        adakv_normalize: bool | None = None,
        kv_generated: int | None = None,
        kv_generated_scope: str | None = None,
        kv_generated_rank: str | None = None,
        kv_generated_slack: int | None = None,
        kv_limit: int | None = None,
        n_tail: int | None = None,
        attend: str | None = None,
        n_buckets: int | None = None,
        rpc_servers: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        given: dict[str, Any] = {name: value for name, value in dict(
            policy=policy, budget=budget, rank=rank, fit=fit, question=question, beta=beta, preset=preset, window=window, recent=recent, power=power, pool=pool, pool_kernel=pool_kernel, n_tail=n_tail, attend=attend, n_buckets=n_buckets,
            prefill=prefill, prefill_hidden=prefill_hidden, sinks=sinks, protect=protect, surplus=surplus,
            pyramid_exact=pyramid_exact, adakv_floor=adakv_floor, adakv_normalize=adakv_normalize,
            kv_generated=kv_generated, kv_generated_scope=kv_generated_scope, kv_generated_rank=kv_generated_rank,
            kv_generated_slack=kv_generated_slack).items() if value is not None}  # fmt: skip
        amount = {name: value for name, value in dict(kv_size=kv_size, kv_ratio=kv_ratio, kv_bytes=kv_bytes).items() if value is not None}
        more = {name: value for name, value in dict(
            importance=importance, replay=replay, kv_reuse=kv_reuse, n_seq_max=n_seq_max, kv_limit=kv_limit,
            kv_archive=kv_archive, kv_archive_size=kv_archive_size, kv_archive_type=kv_archive_type).items() if value is not None}  # fmt: skip
        _check_generated(given, kv_generated)
        lora_path = kwargs.pop("lora_path", None)
        if lora_path is not None:
            kwargs["use_mmap"] = False  # as upstream loads a model for an adapter
        self._workers: Workers | None = None
        self._kv_args: dict[str, Any] = {**given, **amount, **more}
        self._configured: dict[str, Any] = {}  # what configure() was given since
        if rpc_servers is not None:
            self._kv_args["rpc_servers"] = rpc_servers
        self._kv_reuse = kv_reuse is not None and check_bool("kv_reuse", kv_reuse)
        self._pieces: dict[tuple[int, bool], bytes] = {}  # see _long_piece()
        if kv_limit is not None:
            check_int("kv_limit", kv_limit, 1, MAX_CELLS)
            if kv_generated is None:
                raise ValueError(f"kv_limit={kv_limit}: completions end with n_ctx, give kv_generated or leave it out")
            if kwargs.get("logits_all") or kwargs.get("draft_model") is not None:
                raise ValueError(f"kv_limit={kv_limit}: with logits_all or a draft_model completions end with n_ctx, leave it out")
        archive = check_archive(kv_archive, kv_archive_size, kv_archive_type)
        if archive is not None and kv_reuse:
            raise ValueError(
                "kv_archive and kv_reuse=True: with kv_reuse prompts continue on the compressed past and are not read again, "
                "leave one of them out"
            )
        self._n_seq_max = 1 if n_seq_max is None else check_int("n_seq_max", n_seq_max, 1, 256)
        self._prompt_pending = False
        self._protect_head: list[int] = []  # the next prompt begins with these tokens, to be kept
        self._n_protect = 0  # first tokens of the pending prompt that every head keeps
        self._is_rendering = False
        self._progress: Callable[[int, int, int, int], bool | None] | None = None
        self._kv_path = model_path = fspath(model_path)
        if not os.path.exists(model_path):
            raise MissingFileError(f"Model path does not exist: {model_path}")
        check_names("Llama()", kwargs, PARAMETERS)
        for name in ("type_k", "type_v"):
            check_cell_type(name, kwargs.get(name))
        check_policy("policy", given.get("policy", FULL), (AUTO, FULL))
        if len(amount) > 1:
            raise ValueError(f"{_assigned(amount)}: give one of them, they are three ways to say how much is kept")
        keeps_all = policy != FULL and policy_traits(policy or AUTO, budget, rank, fit).keeps_all
        if amount and (policy == FULL or keeps_all):
            which = _assigned({name: given[name] for name in ("policy", "budget") if name in given} | amount)
            raise ValueError(f"{which}: it keeps all cells, leave the amount out or choose another policy")
        if beta is not None and policy != FULL:
            _check_beta_is_used(policy, beta, policy_traits(policy or AUTO, budget, rank, fit))
        self._kv_ratio = kv_ratio
        self._found: Found | None = None  # the importance that is known
        self._found_replay: FoundReplay | None = None  # the replay table that is known
        self._unknown: set[str] = set()  # what was looked for in vain, which takes long
        if not amount and not keeps_all:
            idle = {name: value for name, value in {**given, **more}.items() if (name, value) != ("policy", FULL)}
            if idle:
                raise ValueError(
                    f"{_assigned(idle)}: nothing says how much is kept, give kv_size, kv_ratio or kv_bytes; the stock cache "
                    "has no such options"
                )
            self.kv_options: Options | None = None
            with self._using_workers(rpc_servers, kwargs):
                super().__init__(model_path, **kwargs)
            self._set_adapter(lora_path)
            return

        n_ctx = kwargs.get("n_ctx", 512)  # 0 = that of the model, checked by the library
        options = Options(kv_size=MAX_CELLS if kv_size is None else kv_size, **given)
        if kv_ratio is not None:
            if check_share("kv_ratio", kv_ratio) == 0:
                raise ValueError(f"kv_ratio={kv_ratio!r}: nothing would be kept, use a share above 0")
            options = replace(options, kv_size=options.recent + 1)  # until there is a prompt
        elif kv_bytes is not None:
            options = replace(
                options,
                kv_size=cells_in(
                    parse_bytes("kv_bytes", kv_bytes),
                    model_path,
                    recent=options.recent,
                    n_ctx=n_ctx,
                    **{name: kwargs[name] for name in ("type_k", "type_v", "n_batch", "n_ubatch") if kwargs.get(name) is not None},
                ),
            )
        self.kv_options = options
        if n_ctx and options.kv_size > n_ctx and not keeps_all:
            raise ValueError(f"kv_size={options.kv_size}: it must not be larger than n_ctx = {n_ctx}")
        self._find_known(importance, replay)
        options = self.kv_options
        if kwargs.get("embedding"):
            raise ValueError("embedding=True: embeddings have no generation to speed up, use kv_size=None")
        kwargs["flash_attn"], kwargs["swa_full"] = True, False
        if isinstance(n_ctx, int) and n_ctx > 0:
            kwargs["n_ctx"] = round_n_ctx(n_ctx)  # as the library does, after it has limited a batch to less

        params = options.to_params(self._importance, None, self._replay)
        try:
            with self._using_workers(rpc_servers, kwargs), _lib.creating(params):
                super().__init__(model_path, **kwargs)
        except ValueError as e:
            self._close_partial()
            reason = _lib.last_error() or _why_no_cells(model_path, kwargs)
            raise ValueError(reason or str(e)) from None
        except BaseException:
            self._close_partial()
            raise
        self._set_adapter(lora_path)
        # the library rounds n_ctx up, and completions go on to what it made of it
        self.input_ids = np.zeros(self.n_ctx(), dtype=np.intc)
        if options.kv_generated is not None and not self._logits_all:  # their logits are kept, n_ctx of them
            self._n_ctx = kv_limit or max(self.n_ctx(), self._model.n_ctx_train())  # where upstream's completions end
        if options.prefill == "layer" and self.prefill_mode != "layer":
            why = _lib.lib.headkv_why_token_prefill(self.ctx).decode()
            self.close()
            raise ValueError(f"prefill='layer' is not possible for this model: {why}; use prefill='auto'")
        try:
            if archive is not None:
                _lib.check(_lib.lib.headkv_set_archive(self.ctx, ctypes.byref(archive)), ValueError)
        except ValueError as e:
            self.close()
            raise ValueError(f"kv_archive={kv_archive!r}: {e}") from None
        self._has_archive = archive is not None
        if self.verbose:
            print(f"pyheadkv: policy {self.policy}{self._origins()}", file=sys.stderr)

    @contextmanager
    def _using_workers(self, rpc_servers: str | Sequence[str] | None, kwargs: dict[str, Any]) -> Iterator[None]:
        """The model that is loaded meanwhile has layers on them, and no result of its context is used that came from none."""
        if rpc_servers is None:
            yield
            return
        if kwargs.setdefault("n_gpu_layers", -1) == 0:
            raise ValueError(f"rpc_servers={rpc_servers!r}, n_gpu_layers=0: no layer would be on a worker, leave one of them out")
        self._workers = workers = Workers(rpc_servers)
        try:
            yield
        except BaseException:
            try:
                workers.check()  # is the reason, if it fails
            finally:
                workers.close()
            raise
        workers.guard(self._ctx)
        workers.check()

    @contextmanager
    def _asking_workers(self) -> Iterator[None]:
        """What is computed meanwhile comes from workers that are there, or ``WorkerLostError`` names the one that is not."""
        if self._workers is None:
            yield
            return
        try:
            yield
        except Exception:
            self._workers.check()  # is the reason, if it fails
            raise
        llama_cpp.llama_synchronize(self.ctx)
        self._workers.check()

    @property
    def rpc_traffic(self) -> dict[str, Traffic]:
        """Bytes and messages to and from each of ``rpc_servers`` since the model was loaded, loading included."""
        return {} if self._workers is None else self._workers.traffic

    def close(self) -> None:
        """Free the model from memory, also that of workers. What is asked of it then is a ValueError."""
        super().close()
        if hasattr(self, "tokenizer_"):  # it was made to its end
            gone: Any = _Closed()  # in place of null pointers, with which the library ends the process
            self._model = self._ctx = self._batch = gone
            if isinstance(self.tokenizer_, LlamaTokenizer):
                self.tokenizer_ = LlamaTokenizer(self)
        if self._workers is not None:
            self._workers.close()

    @_on_workers
    def _set_adapter(self, lora_path: str | None) -> None:
        """What the constructor does with it, but that nothing refers to this object afterwards: so it goes when nobody has it any more."""
        if not lora_path:
            return
        adapter = llama_cpp.llama_adapter_lora_init(self._model.model, os.fsencode(lora_path))
        adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(self.lora_scale)
        if adapter:
            self._stack.callback(llama_cpp.llama_adapter_lora_free, adapter)
        if not adapter or llama_cpp.llama_set_adapters_lora(self.ctx, adapters, 1, scales):
            self.close()
            raise ValueError(f"lora_path={lora_path!r}: it is not an adapter of this model that llama.cpp can load")
        self.lora_path = lora_path

    def _find_known(self, importance: ImportanceLike, replay: ReplayLike) -> None:
        """What is known of the heads, as far as the choices look at it."""
        traits = self._need_options().traits
        if importance is not None:
            given = load_importance(importance, self._kv_path)
            self._found = None if given is None else Found(given, "the argument importance=")
        elif self._found is None and traits.by_importance and "importance" not in self._unknown:
            self._found = find_importance(self._kv_path)
            if self._found is None:
                self._unknown.add("importance")
        if replay is not None:
            self._found_replay = FoundReplay(replay_for(replay, self._kv_path), "the argument replay=")
        elif self._found_replay is None and traits.by_replay and "replay" not in self._unknown:
            self._found_replay = find_replay(self._kv_path)
            if self._found_replay is None:
                self._unknown.add("replay")
        options = self._need_options()
        if self._kv_reuse and options.policy == AUTO and options.question is None and traits.by_replay and self._found_replay is not None:
            self.kv_options = replace(options, question="later")

    @property
    def _importance(self) -> Importance | None:
        return None if self._found is None else self._found.importance

    @property
    def _replay(self) -> ReplayTable | None:
        return None if self._found_replay is None else self._found_replay.table

    def _origins(self) -> str:
        parts = [("importance", self.importance_origin), ("replay table", self.replay_origin)]
        return "".join(f", {name} from {origin}" for name, origin in parts if origin)

    @property
    def policy(self) -> str:
        """The policy in use, never "auto"; "full" for the stock cache; "budget/rank" or "budget/rank/fit" if it has no name."""
        return str(_lib.lib.headkv_get_policy(self.ctx).decode())

    @property
    def importance_origin(self) -> str:
        """Where the importance that the policy uses is from; empty when it uses none."""
        return self._found.origin if self._found is not None and self._traits.by_importance else ""

    @property
    def replay_origin(self) -> str:
        """Where the replay table that the policy uses is from; empty when it uses none."""
        return self._found_replay.origin if self._found_replay is not None and self._traits.by_replay else ""

    @property
    def _traits(self) -> _lib.PolicyInfo:
        return policy_traits(self.policy)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model_params" and self._workers is not None:
            value.devices = self._workers.devices
        if name == "context_params" and self.kv_options is not None:
            value.n_seq_max, value.kv_unified = self._n_seq_max, True
            if self.kv_options.prefill != "token":
                value = _WholePromptParams.from_buffer_copy(value)
        super().__setattr__(name, value)

    @property
    def prefill_mode(self) -> str:
        """Order in which whole prompts are read: "layer" or "token"."""
        self._need_options()
        return "token" if _lib.lib.headkv_why_token_prefill(self.ctx) else "layer"

    def _close_partial(self) -> None:
        stack = getattr(self, "_stack", None)
        if stack is not None:
            stack.close()

    def __del__(self) -> None:
        if hasattr(self, "_stack"):
            super().__del__()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **self._kv_args, "configured": self._configured}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        configured = state.pop("configured", {})
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if configured:
            self.configure(**configured)

    # ------------------------------------------------------------------ generation

    @_on_workers
    def end_prompt(self) -> None:
        """Compress what has been evaluated so far; ``generate`` does it after the prompt.

        A no-op without ``kv_size`` and when the prompt is compressed already.

        Raises
        ------
        RuntimeError
            not enough memory, aborted, or nothing evaluated; the cache is unchanged then
        """
        if self.kv_options is not None:
            self._fit_ratio(self.n_tokens)
            _lib.check(_lib.lib.headkv_end_prompt(self.ctx, 0))

    def _fit_ratio(self, n_tokens: int) -> None:
        """Cells for a prompt of so many tokens, if its compression has not begun."""
        if self._kv_ratio is not None and STATES[self._stats().state] in ("empty", "staged"):
            self._configure(kv_size=self._cells_of_share(self._kv_ratio, n_tokens))

    def _cells_of_share(self, share: float, n_tokens: int) -> int:
        return min(share_of_prompt(share, n_tokens, recent=self._need_options().recent), self.n_ctx())

    @_on_workers
    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens; the first evaluation of a ``generate`` call is the prompt."""
        check_tokens(tokens, n_vocab=self._n_vocab)
        if self.kv_options is None:
            super().eval(tokens)
            return
        n_ctx, n_all = self.n_ctx(), self.n_tokens + len(tokens)
        is_bounded = self.n_tokens > 0 and self._stats().kv_generated > 0 and not self._logits_all  # the library checks what it holds
        if n_all > n_ctx and not is_bounded:
            raise ValueError(_too_long(self.n_tokens, len(tokens), n_ctx))
        if n_all > len(self.input_ids):
            self.input_ids = np.concatenate([self.input_ids, np.zeros(max(n_ctx, n_all - len(self.input_ids)), dtype=np.intc)])
        is_prompt, self._prompt_pending = self._prompt_pending, False
        n_protect, self._n_protect = self._n_protect, 0
        whole = is_prompt and self.n_tokens == 0 and self.prefill_mode == "layer" and not self._logits_all
        try:
            with self._protecting(n_protect):
                if whole and len(tokens) > 1:
                    self._eval_whole(tokens)
                else:
                    self._eval_batches(tokens)
                if is_prompt and self.n_tokens > 0:
                    self.end_prompt()
        except BaseException:
            self._requires_eval = True  # the next prompt is read from its beginning, even if it is the same
            if is_prompt and STATES[self._stats().state] == "staged":
                self.reset()  # what was read of it is of no use
            raise

    @contextmanager
    def _protecting(self, n_tokens: int) -> Iterator[None]:
        """Every head keeps the first tokens of what is compressed meanwhile, beside what it is told to keep anyway."""
        protect = self._need_options().protect
        if n_tokens:
            self._configure(protect=self._with_head(n_tokens))
        try:
            yield
        finally:
            if n_tokens:
                self._configure(protect=protect)

    def _with_head(self, n_tokens: int) -> list[tuple[int, int]]:
        """What every head keeps when it keeps the first tokens too."""
        return [*self._need_options().protect, (0, n_tokens)]

    def _eval_batches(self, tokens: Sequence[int]) -> None:
        """In upstream's order; each ubatch is a step of its own if somebody looks on."""
        n, n_end = len(tokens), self.n_tokens + len(tokens)
        if n > 0:
            _lib.check(_lib.lib.headkv_begin_prompt(self.ctx, 0, n_end, False, None))
        is_shown = n > 0 and self._progress is not None and STATES[self._stats().state] in ("empty", "staged")
        n_step = llama_cpp.llama_n_ubatch(self.ctx) if is_shown else max(1, n)
        for i in range(0, max(1, n), n_step):
            if is_shown:
                self._show_step(0, 1, self.n_tokens, n_end)
            try:
                super().eval(tokens[i : i + n_step])
            except RuntimeError as e:
                raise RuntimeError(f"{e}: {_lib.last_error()}" if _lib.last_error() else str(e)) from None

    def _eval_whole(self, tokens: Sequence[int]) -> None:
        """Layer by layer, in pieces: Python handles signals in between."""
        n = len(tokens)
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        prompt = (self.ctx, 0, ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), n)
        n_ubatch, n_layer = llama_cpp.llama_n_ubatch(self.ctx), llama_cpp.llama_model_n_layer(self.model)
        n_all = -(-n // n_ubatch)
        n_ubatches, n_archived = n_all, 0
        n_left = n_layer * n_ubatches
        max_ms = PIECE_MS if self._progress is None else 0  # 0 = one step
        self._ctx.kv_cache_seq_rm(0, -1, -1)
        try:
            self._fit_ratio(n)
            while n_left > 0:
                il, i_ubatch = divmod(n_layer * n_ubatches - n_left, n_ubatches)
                self._show_step(il, n_layer, max(n_archived, (n_all - n_ubatches + i_ubatch) * n_ubatch), n)
                if n_left > 1:
                    n_left = _lib.check(_lib.lib.headkv_read_ahead(*prompt, max_ms))
                    n_archived = self._stats().n_archived  # no step but the partial one of their last ubatch is theirs
                    n_ubatches = n_all - n_archived // n_ubatch
                else:
                    code = _lib.lib.headkv_read_prompt(*prompt)
                    if code != 0:
                        raise RuntimeError(f"llama_decode returned {code}: {_lib.last_error()}")
                    n_left = 0
            self.input_ids[:n] = ids
            self.n_tokens = n
        except BaseException:
            self._ctx.kv_cache_seq_rm(0, -1, -1)
            self.n_tokens = 0
            raise
        self._requires_eval = False

    def _show_step(self, *step: int) -> None:
        if self._progress is not None and self._progress(*step) is False:
            raise RuntimeError("the prompt is not read to its end: aborted by the function that set_progress() was given")

    def read_prompt(self, tokens: Sequence[int]) -> None:
        """Forget everything, evaluate a whole prompt and compress it; what ``generate`` begins with."""
        self.reset()
        self._prompt_pending = self.kv_options is not None
        try:
            self.eval(tokens)
        finally:
            self._prompt_pending = False

    def configure(self, *, importance: ImportanceLike = None, replay: ReplayLike = None, **options: Any) -> None:
        """Change how the prompts to come are compressed; a copy (``pickle``, ``deepcopy``) has the change too.

        ``kv_size`` takes the place of ``kv_ratio`` and ``kv_bytes``.

        Parameters
        ----------
        importance, replay : as for the constructor; None = what was used until now
        **options : ``kv_size`` and those of the constructor that say how prompts are compressed, the fields of ``pyheadkv.options.Options``; a
            ``window`` up to the constructor's, and not ``n_tail, attend, n_buckets, prefill, prefill_hidden``; those that are not given stay

        Raises
        ------
        ValueError
            wrong value, or an option that sizes what the context owns; nothing has changed then
        """
        check_names("configure()", options, [field.name for field in fields(Options)])
        _check_generated(options, options.get("kv_generated", self._need_options().kv_generated))
        if options.get("policy", AUTO) != AUTO:
            options.setdefault("question", None)  # which is for "auto"
        after = replace(self._need_options(), **{**preset_changes(options), "kv_size": MAX_CELLS})
        if "kv_size" in options and after.traits.keeps_all:
            raise ValueError(f"policy={after.policy!r}, kv_size={options['kv_size']!r}: it keeps all cells, leave kv_size out")
        if options.get("beta") is not None:
            _check_beta_is_used(after.policy, options["beta"], after.traits)
        self._configure(importance, replay, **options)
        self._configured |= preset_changes(options)
        self._configured |= {name: value for name, value in dict(importance=importance, replay=replay).items() if value is not None}
        if "kv_size" in options:  # in place of what said how much is kept
            self._kv_ratio = None

    def _configure(self, importance: ImportanceLike = None, replay: ReplayLike = None, **options: Any) -> None:
        before = self._need_options(), self._found, self._found_replay
        changes = preset_changes(options)
        if self._kv_ratio is not None and "kv_size" not in options:  # it follows from the next prompt
            recent = replace(before[0], **{**changes, "kv_size": MAX_CELLS}).recent
            changes = {**changes, "kv_size": max(before[0].kv_size, recent + 1)}
        self.kv_options = replace(before[0], **changes)
        try:
            self._find_known(importance, replay)
            params = self.kv_options.to_params(self._importance, None, self._replay)
            _lib.check(_lib.lib.headkv_configure(self.ctx, ctypes.byref(params)), ValueError)
        except BaseException:
            self.kv_options, self._found, self._found_replay = before
            raise
        if STATES[self._stats().state] == "compressed":
            self._requires_eval = True  # the same prompt would be compressed in another way now

    @_on_workers
    def compress_as(self, seq_id: int) -> None:
        """Compress what has been evaluated so far as another sequence; here it stays uncompressed.

        So the same prompt can be compressed in several ways (``configure``), or read on. The copy is decoded with
        ``llama_cpp.llama_decode`` and removed with ``llama_cpp.llama_memory_seq_rm``; ``kv_stats(seq_id)`` tells what it holds. ``reset()``,
        with which another prompt begins, removes copies too.

        Parameters
        ----------
        seq_id : an empty sequence, 1 or more and below ``n_seq_max``

        Raises
        ------
        RuntimeError
            the prompt is compressed already, or was read layer by layer (use ``prefill="token"``), the sequence is not
            empty, or there is not enough memory; nothing has changed then
        """
        if self._n_seq_max < 2:
            raise ValueError(f"seq_id={seq_id!r}: the context has one sequence, give Llama(..., n_seq_max=2) or more")
        self._fit_ratio(self.n_tokens)
        _lib.check(_lib.lib.headkv_compress_as(self.ctx, 0, check_int("seq_id", seq_id, 1, self._n_seq_max - 1)))
        self._requires_eval = True  # what is decoded of the copy takes the place of the logits

    @_on_workers
    def drop(self, start: int, end: int) -> None:
        """Take tokens [start, end) out of what was compressed and generated, such as what a model thought before its answer.

        Every head lets go of their cells; positions and ``n_tokens`` stay what they are. With ``kv_reuse`` a prompt that begins with all of
        these tokens goes on behind what is left.

        Parameters
        ----------
        start, end : positions, ``end`` at most that of the last token

        Raises
        ------
        ValueError
            nothing is compressed, the context was made without ``kv_generated``, the range is empty or reaches to the last token, or
            the model has layers with windows or recurrent states; nothing has changed then
        """
        self._need_options()
        for name, value in (("start", start), ("end", end)):
            check_int(name, value, 0, max(0, self.n_tokens - 1), ", the tokens that were evaluated but the last")
        _lib.check(_lib.lib.headkv_drop(self.ctx, 0, int(start), int(end)), ValueError)
        self._requires_eval = True  # the same prompt without kv_reuse is read again

    def set_progress(self, progress: Callable[[int, int, int, int], bool | None] | None) -> None:
        """Call ``progress(il, n_layer, i_token, n_tokens)`` before each step of a prompt.

        ``n_layer`` is 1 when a step takes the tokens through all layers. Returning False
        aborts: the evaluation raises RuntimeError, and the prompt is to be read again.
        What ``progress`` raises is raised by the evaluation. None = no calls.
        """
        self._need_options()
        self._progress = progress

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As ``llama_cpp.Llama.generate``; the prompt is compressed after its evaluation.

        ``reset=False`` continues on what was evaluated: what is not compressed yet is part of
        the prompt, and a compressed past stays as it is.
        """
        head, self._protect_head = self._protect_head, []
        tokens = list(tokens)
        check_tokens(tokens, n_vocab=self._n_vocab)
        if self.kv_options is not None:
            is_new = signature(llama_cpp.Llama.generate).bind(self, tokens, *args, **kwargs).arguments.get("reset", True)
            if (head or is_new) and not self._goes_on(tokens, len(head)):
                if len(tokens) > self.n_ctx():  # before what is there is forgotten
                    raise ValueError(_too_long(0, len(tokens), self.n_ctx()))
                self.reset()
            if list(tokens[: len(head)]) != head:
                raise ValueError("protect_system=True: the chat format in use asks more than once, use protect=[(0, n)]")
            self._prompt_pending = True
            self._n_protect = len(head)
        try:
            return (yield from super().generate(tokens, *args, **kwargs))
        finally:
            self._prompt_pending = False
            self._n_protect = 0

    def _goes_on(self, tokens: Sequence[int], n_protect: int) -> bool:
        """Whether the prompt, of which ``n_protect`` tokens are to be kept, is not read from its beginning."""
        if not n_protect and self._is_cached(tokens):
            return True
        return self._kv_reuse and self._can_reuse(tokens, n_protect)

    def _can_reuse(self, tokens: Sequence[int], n_protect: int) -> bool:
        """Whether the compressed past is what would be kept of it now, and what comes behind it is short: every head keeps all of that."""
        stats, n_past = self._stats(), n_common(self._input_ids, tokens)
        if STATES[stats.state] != "compressed":
            return True
        options = self._need_options()
        if n_protect:
            options = replace(options, protect=self._with_head(n_protect))
        if self._kv_ratio is not None:  # of that prompt, which may be one of a state that was loaded
            options = replace(options, kv_size=self._cells_of_share(self._kv_ratio, stats.n_prompt))
        params = options.to_params(self._importance, None, self._replay)
        can = _lib.lib.headkv_can_continue(self.ctx, 0, ctypes.byref(params)) == 0
        return bool(can and len(tokens) - n_past <= max(n_past, stats.kv_size))

    def _init_sampler(self, *args: Any, grammar: Any = None, **kwargs: Any) -> Any:
        if grammar is None:
            return super()._init_sampler(*args, **kwargs)
        check_grammar(grammar, self._model)
        kwargs["grammar"] = grammar
        return GrammarSampler(super()._init_sampler(*args, **kwargs), n_vocab=self.n_vocab())

    def create_completion(self, prompt: str | list[int], *args: Any, **kwargs: Any) -> Any:
        """As ``llama_cpp.Llama.create_completion``."""
        if isinstance(prompt, str):
            check_text("prompt", prompt)
        if self._is_rendering:
            raise _Rendered(prompt)
        return super().create_completion(prompt, *args, **kwargs)

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from super()._create_completion(*args, **kwargs)
        except ValueError as e:
            found = re.match(r"Requested tokens \((\d+)\) exceed", str(e))
            if found is None or self._n_ctx == self.n_ctx():  # what it says is right
                raise
            raise ValueError(
                f"{found[1]} tokens of a prompt: completions end at {self._n_ctx} (kv_limit, or the length that the model was trained with): "
                "use a larger kv_limit or a shorter prompt"
            ) from None

    def create_chat_completion(self, messages: list[Any], *args: Any, protect_system: bool = False, **kwargs: Any) -> Any:
        """As ``llama_cpp.Llama.create_chat_completion``.

        Parameters
        ----------
        protect_system : every head keeps the cells of the system message, which is the first one

        Raises
        ------
        ValueError
            ``protect_system`` without a system message or compression, or with a chat format that leaves it out
        """
        check_text("messages", messages)
        if not protect_system:
            return super().create_chat_completion(messages, *args, **kwargs)
        head = self._system_tokens(messages, *args, **kwargs)
        self._protect_head = head
        try:
            answer = super().create_chat_completion(messages, *args, **kwargs)
        finally:
            self._protect_head = []
        return self._protect_stream(head, answer) if isinstance(answer, Iterator) else answer

    def _protect_stream(self, head: list[int], chunks: Iterator[Any]) -> Iterator[Any]:
        """A prompt is read with the first chunk, if somebody asks for it."""
        self._protect_head = head
        try:
            yield from chunks
        finally:
            self._protect_head = []

    def _system_tokens(self, messages: list[Any], *args: Any, **kwargs: Any) -> list[int]:
        """Tokens that every chat which begins with this system message begins with, and some more."""
        self._need_options()
        if not messages or messages[0]["role"] != "system":
            raise ValueError("protect_system=True: the first message is no system message")
        system, other = messages[0], {"role": "system", "content": "x" if messages[0]["content"] != "x" else "y"}
        # what two chats with other users have in common, and one with another system message has not
        a, b, c = (self._chat_tokens([first, {"role": "user", "content": user}], *args, **kwargs)
                   for first, user in ((system, "a"), (system, "b"), (other, "a")))  # fmt: skip
        head = a[: n_common(a, b)]
        if n_common(head, c) == len(head):
            raise ValueError(
                "protect_system=True: the chat format in use leaves the system message out, or puts it behind the first "
                "question, use protect=[(start, end)]"
            )
        return head

    def _chat_tokens(self, messages: list[Any], *args: Any, **kwargs: Any) -> list[int]:
        """The prompt that the chat format in use makes of a chat."""
        self._is_rendering = True
        try:
            super().create_chat_completion(messages, *args, **kwargs)
        except _Rendered as rendered:
            if isinstance(rendered.prompt, str):
                raise ValueError("protect_system=True: the chat format in use makes text, not tokens, use protect=[(0, n)]") from None
            return rendered.prompt
        finally:
            self._is_rendering = False
        raise ValueError("protect_system=True: the chat format in use asks nothing, use protect=[(0, n)]")

    def _is_cached(self, tokens: Sequence[int]) -> bool:
        # the very prompt that was compressed, without a token generated after it
        if self._requires_eval or not self._stats().n_prompt == self.n_tokens == len(tokens) or list(self._input_ids) != list(tokens):
            return False
        return self._can_reuse(tokens, 0)  # by the adapters that are set now

    def reset(self) -> None:
        """Forget all tokens; the cache is empty afterwards."""
        super().reset()  # type: ignore[no-untyped-call]
        if self.kv_options is not None:
            self._ctx.kv_cache_clear()

    @_on_workers
    def save_state(self) -> LlamaState:
        """The compressed cache and its tokens, to go on from later, in another process too (``pickle``).

        Raises
        ------
        RuntimeError
            the prompt is not compressed yet
        """
        if self.kv_options is None:
            return super().save_state()
        size = llama_cpp.llama_state_seq_get_size(self.ctx, 0)
        data = (ctypes.c_uint8 * size)()
        if size == 0 or llama_cpp.llama_state_seq_get_data(self.ctx, data, size, 0) != size:
            raise RuntimeError(_lib.last_error())
        return LlamaState(
            input_ids=self._input_ids.copy(),
            scores=self.scores[: self.n_tokens if self._logits_all else 0].copy(),
            n_tokens=self.n_tokens,
            llama_state=bytes(data),
            llama_state_size=size,
            seed=self._seed,
        )

    @_on_workers
    def load_state(self, state: LlamaState) -> None:
        """Go back to what ``save_state`` saw; ``generate`` continues on it with ``kv_reuse=True``. Copies (``compress_as``) stay.

        Raises
        ------
        ValueError
            a state of another model, of other types of K and V, of a larger ``kv_size`` or ``n_ctx``, one without the logits that
            ``logits_all`` wants, or a damaged one; everything is forgotten then, as after ``reset``. Where a completion finds it in its
            cache (``set_cache``), the prompt is read instead
        """
        if self.kv_options is None:
            super().load_state(state)
            return
        super().reset()  # type: ignore[no-untyped-call]
        self._ctx.kv_cache_seq_rm(0, -1, -1)
        size, n = len(state.llama_state), state.n_tokens
        data = (ctypes.c_uint8 * size).from_buffer_copy(state.llama_state)
        _lib.lib.headkv_clear_error()
        try:
            n_read = llama_cpp.llama_state_seq_set_data(self.ctx, data, size, 0)
            if n_read != size:
                what = f"it ends after {n_read} of {size} bytes" if n_read else "it is not one of a compressed cache"
                raise StateError((not n_read and _lib.last_error()) or f"the state cannot be restored: {what}")
            stats = self._stats()
            if not len(state.input_ids) >= n == stats.n_past:
                raise StateError(f"the state cannot be restored: its cache has {stats.n_past} tokens, {n} were said to be in it")
            if self._logits_all and len(state.scores) < n:
                raise StateError("the state cannot be restored: it has no logits of its tokens, save it with logits_all=True")
            if self._kv_ratio is None and stats.kv_size > self.kv_options.kv_size:
                raise StateError(
                    f"the state cannot be restored: it was compressed with kv_size={stats.kv_size}, which is more than "
                    f"kv_size={self.kv_options.kv_size} of this one"
                )
        except ValueError:
            self.reset()
            raise
        if n > len(self.input_ids):  # an answer that went on beyond n_ctx
            self.input_ids = np.zeros(n + self.n_ctx(), dtype=np.intc)
        self.input_ids[:n] = state.input_ids[:n]
        if self._logits_all:
            self.scores[:n] = state.scores[:n]
        self.n_tokens = n
        self._requires_eval = True  # logits are not part of it
        self._seed = state.seed

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """As ``llama_cpp.Llama.detokenize``, which loses tokens of more than 32 bytes, such as deep indentation and rulers."""
        check_tokens(tokens, n_vocab=self.n_vocab())
        if not isinstance(self.tokenizer_, LlamaTokenizer):
            return super().detokenize(tokens, prev_tokens, special)
        text, begin = b"", 0
        for i, token in enumerate(tokens):
            if long := self._long_piece(token, special):
                text += super().detokenize(tokens[begin:i], prev_tokens, special) + long
                begin = i + 1
        return text + super().detokenize(tokens[begin:], prev_tokens, special)

    def _long_piece(self, token: int, special: bool) -> bytes:
        """Text of a token that is longer than upstream's buffer, else empty."""
        key = (token, special)
        if key not in self._pieces:
            piece = _lib.piece(self._model.vocab, token, special)
            self._pieces[key] = piece if len(piece) > N_PIECE else b""
        return self._pieces[key]

    def set_cache(self, cache: Any) -> None:
        """As ``llama_cpp.Llama.set_cache``; with compression it needs ``kv_reuse=True``.

        Raises
        ------
        ValueError
            without ``kv_reuse``: no prompt would continue on a state of the cache
        """
        if self.kv_options is not None and cache is not None and not self._kv_reuse:
            raise ValueError("set_cache() continues on compressed states: use kv_reuse=True, or kv_size=None")
        super().set_cache(cache)

    # ------------------------------------------------------------------ introspection

    def _stats(self, seq_id: int = 0) -> _lib.Stats:
        stats = _lib.Stats(size=ctypes.sizeof(_lib.Stats))
        _lib.check(_lib.lib.headkv_get_stats(self.ctx, seq_id, ctypes.byref(stats)))
        return stats

    def _check_seq(self, seq_id: int) -> None:
        check_int("seq_id", seq_id, 0, self._n_seq_max - 1, ", the sequences of the context: create Llama with a larger n_seq_max")

    def _need_options(self) -> Options:
        if self.kv_options is None:
            raise ValueError("the cache is the stock one (kv_size=None): create Llama with kv_size=...")
        return self.kv_options

    def _int_table(self, func: Any, *args: Any) -> npt.NDArray[np.int32]:
        n = _lib.check(func(*args, None, 0))
        table = np.zeros(n, dtype=np.int32)
        _lib.check(func(*args, table.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), n))
        n_layer = llama_cpp.llama_model_n_layer(self.model)
        return table.reshape(n_layer, n // n_layer)

    @property
    def kv_budget(self) -> npt.NDArray[np.int32]:
        """Cells that each head may keep of a long prompt, recent ones included: int32 (n_layer, n_head_kv).

        Some policies move cells within a layer by what the prompt is; ``kv_stats().n_cells`` tells the outcome.
        """
        self._need_options()
        return self._int_table(_lib.lib.headkv_get_budget, self.ctx)

    def kv_positions(self, il: int, ih: int, seq_id: int = 0) -> npt.NDArray[np.int32]:
        """Prompt positions that KV head ``ih`` of layer ``il`` kept, ascending int32; a first -1 is a cell that stands for
        all that were dropped (policy "razor")."""
        self._need_options()
        self._check_seq(seq_id)
        n = _lib.check(_lib.lib.headkv_get_positions(self.ctx, seq_id, il, ih, None, 0), ValueError)
        positions = np.zeros(n, dtype=np.int32)
        _lib.check(_lib.lib.headkv_get_positions(self.ctx, seq_id, il, ih, positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), n))
        return positions

    def kv_stats(self, seq_id: int = 0) -> KVStats:
        """What the cache holds now of a sequence, in cells and bytes; ``bytes_store`` are those of all sequences."""
        self._need_options()
        self._check_seq(seq_id)
        s = self._stats(seq_id)
        return KVStats(
            state=STATES[s.state],
            n_prompt=s.n_prompt,
            n_past=s.n_past,
            n_cells=self._int_table(_lib.lib.headkv_get_n_cells, self.ctx, seq_id),
            bytes_store=s.bytes_store,
            bytes_staging=s.bytes_staging,
            bytes_peak=s.bytes_peak,
            bytes_full=s.bytes_full,
            bytes_beside=s.bytes_beside,
            compress_ms=s.t_compress_us / 1000,
            n_archived=s.n_archived,
            n_heads_fitted=s.n_heads_fitted,
            fit_before=s.fit_before,
            fit_after=s.fit_after,
            fit_ms=s.t_fit_us / 1000,
            archive=archive_stats(self.ctx) if self._has_archive else None,
            n_evictions=s.n_evictions,
            n_evicted=s.n_evicted,
            evict_ms=s.t_evict_us / 1000,
            bytes_queries=s.bytes_queries,
        )

    def kv_plot(self, *, seq_id: int = 0) -> Any:
        """A picture of what the cache holds of a sequence: cells of each head, and where in the text they are.

        Returns
        -------
        matplotlib.figure.Figure, which a notebook shows and ``savefig()`` writes

        Raises
        ------
        ValueError : the sequence is not compressed, or matplotlib is not installed
        """
        return make_plot(self, seq_id=seq_id)

    def kv_text(self, layer: int | None = None, head: int | None = None, *, seq_id: int = 0, tokens: Sequence[int] | None = None) -> KVText:
        """The text of a sequence and how many KV heads hold each token of it: what the model still sees.

        Parameters
        ----------
        layer, head : of these KV heads only; None = of all
        tokens : those of the sequence; needed where ``seq_id`` is not 0

        Returns
        -------
        KVText, shaded in a notebook; ``str()`` is what any of the heads holds, ``save()`` writes a page of HTML

        Raises
        ------
        ValueError : the sequence is not compressed, there is no such head, or ``tokens`` are too few
        """
        return make_text(self, layer=layer, head=head, seq_id=seq_id, tokens=tokens)

    @property
    def last_logits(self) -> npt.NDArray[np.float32]:
        """Logits after the last evaluated token, float32 (n_vocab,)."""
        return np.array(np.ctypeslib.as_array(self._ctx.get_logits_ith(-1), shape=(self.n_vocab(),)))

    @_on_workers
    def read_attention(
        self, spans: Sequence[tuple[int, int]], n_top: int, *, n_queries: int = 1
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Attention of the last evaluated tokens over a prompt that is not compressed yet.

        Reduced in the library: rows of attention are not returned.

        Parameters
        ----------
        spans : (start, end) token positions, end excluded
        n_top : how many of the largest probabilities are looked at
        n_queries : of the last so many tokens, at most ``window``

        Returns
        -------
        mass : float32 (n_queries, n_layer, n_head), the sum of those of the ``n_top`` largest
            probabilities whose positions lie in a span; 0 in layers without attention
        top : int32 (n_queries, n_layer, n_head), position of the largest one; -1 there

        Raises
        ------
        ValueError
            the prompt is compressed or empty, a span leaves it, or ``n_top`` or ``n_queries`` exceeds it
        """
        self._need_options()
        i32, f32 = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_float)
        bounds = np.ascontiguousarray(spans, dtype=np.int32).reshape(-1, 2)
        head = (self.ctx, 0, n_queries, bounds.ctypes.data_as(i32), len(bounds), n_top)
        n = _lib.check(_lib.lib.headkv_read_attention(*head, None, None, 0), ValueError)
        n_layer = llama_cpp.llama_model_n_layer(self.model)
        mass = np.zeros((n_queries, n_layer, n // n_layer // n_queries), dtype=np.float32)
        top = np.zeros(mass.shape, dtype=np.int32)
        _lib.check(_lib.lib.headkv_read_attention(*head, mass.ctypes.data_as(f32), top.ctypes.data_as(i32), n), ValueError)
        return mass, top

    @_on_workers
    def read_attention_max(self, n_positions: int, *, n_queries: int = 1) -> npt.NDArray[np.float32]:
        """The most that the last evaluated tokens attend to each of the first positions of a prompt that is not compressed yet.

        Parameters
        ----------
        n_positions : how many
        n_queries : of the last so many tokens, at most ``window``

        Returns
        -------
        float32 (n_layer, n_head_kv, n_positions), the largest probability over the tokens and the query heads of each KV head; 0
            where a layer has no such head

        Raises
        ------
        ValueError
            the prompt is compressed or empty, or ``n_positions`` or ``n_queries`` exceeds it
        """
        self._need_options()
        head = (self.ctx, 0, n_queries, n_positions)
        n = _lib.check(_lib.lib.headkv_read_attention_max(*head, None, 0), ValueError)
        n_layer = llama_cpp.llama_model_n_layer(self.model)
        best = np.zeros((n_layer, n // n_layer // n_positions, n_positions), dtype=np.float32)
        data = best.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        _lib.check(_lib.lib.headkv_read_attention_max(*head, data, n), ValueError)
        return best

    def _read_softmax(self, il: int) -> npt.NDArray[np.float32]:
        values = np.zeros(2 + 65536, dtype=np.float32)
        n = _lib.check(
            _lib.lib.headkv_read_softmax(self.ctx, il, values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size), ValueError
        )
        return values[:n]

    def _read_floats(self, func: Any, n_row: int, n_max: int, *args: Any) -> npt.NDArray[np.float32]:
        values = np.zeros((n_max, n_row), dtype=np.float32)
        n = _lib.check(func(self.ctx, 0, *args, values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size), ValueError)
        return values[:n]


class _Closed:
    """What a model that was closed has in place of its objects."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError("the model was closed: load it again, as another Llama")


class _Rendered(BaseException):
    """The prompt of a chat whose completion was not wanted."""

    def __init__(self, prompt: str | list[int]) -> None:
        self.prompt = prompt


PARAMETERS = tuple(name for cls in (Llama, llama_cpp.Llama) for name in signature(cls).parameters if name != "kwargs")


def _check_generated(options: dict[str, Any], kv_generated: int | None) -> None:
    idle = {name: value for name, value in options.items() if name.startswith("kv_generated_") and kv_generated is None}
    if idle:
        raise ValueError(f"{_assigned(idle)}: nothing that is generated is evicted, give kv_generated or leave it out")


def _why_no_cells(model_path: str, kwargs: dict[str, Any]) -> str:
    """Why there is no context with these types of K and V, which llama.cpp says in its log alone; empty where it is something else."""
    shape = read_shape(model_path)
    for name, n_values in (("type_k", shape.n_embd_head_k), ("type_v", shape.n_embd_head_v)):
        if kwargs.get(name) is not None:
            try:
                row_bytes(kwargs[name], n_values)
            except ValueError as e:
                return f"{name}={kwargs[name]!r}: {e}"
    return ""


def _too_long(n_past: int, n_tokens: int, n_ctx: int) -> str:
    return f"{n_past} + {n_tokens} tokens do not fit into n_ctx={n_ctx}: use a larger n_ctx or a shorter prompt"


def _check_beta_is_used(policy: str | None, beta: float, traits: _lib.PolicyInfo) -> None:
    if not traits.by_beta:
        raise ValueError(
            f"policy={policy!r}, beta={beta!r}: it does not look at beta, which {', '.join(BY_BETA)} do: leave one of them out"
        )


def _assigned(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={short_repr(value)}" for name, value in values.items())


def n_common(a: Sequence[int] | npt.NDArray[np.int32], b: Sequence[int]) -> int:
    """Length of the beginning that two lists share."""
    n = min(len(a), len(b))
    same = np.asarray(a[:n]) == np.asarray(b[:n])
    return n if same.all() else int(same.argmin())


def cells_in(
    n_bytes: int,
    model_path: str | PathLike[str],
    *,
    recent: int,
    n_ctx: int,
    type_k: int = llama_cpp.GGML_TYPE_F16,
    type_v: int = llama_cpp.GGML_TYPE_F16,
    n_batch: int = 512,
    n_ubatch: int = 512,
) -> int:
    """Cells per KV head that take so many bytes together, with what the layers take that are not compressed; no more than a prompt
    can have.

    Parameters
    ----------
    n_ctx : 0 = that of the model
    type_k, type_v : ggml types
    n_batch, n_ubatch : tokens, of which windows have room for one ubatch

    Raises
    ------
    ValueError : the bytes do not hold the recent cells, or the model cannot be compressed
    """
    shape = read_shape(model_path)
    if shape.why_not:
        raise ValueError(f"kv_bytes={n_bytes}: {shape.why_not}")
    cell = row_bytes(type_k, shape.n_embd_head_k) + row_bytes(type_v, shape.n_embd_head_v)
    n_ctx = n_ctx or shape.n_ctx_train
    n_beside = 0
    if shape.n_windowed or shape.n_recurrent:
        n_beside = bytes_beside(model_path, n_ctx=n_ctx, n_ubatch=min(n_ctx, n_batch, n_ubatch), type_k=type_k, type_v=type_v)
    kv_size = (n_bytes - n_beside) // (cell * shape.n_heads_kv)
    if kv_size <= recent:
        least = n_beside + (recent + 1) * cell * shape.n_heads_kv
        others = f"{n_beside} bytes are those of the layers that are not compressed, which leaves " if n_beside else ""
        raise ValueError(
            f"kv_bytes={n_bytes}: {others}{max(0, kv_size)} cells for each of {shape.n_heads_kv} KV heads, which must hold the {recent} "
            f"recent ones and one more: use at least {least} bytes"
        )
    return min(kv_size, n_ctx)
