"""``Llama``: llama_cpp.Llama with a compressed KV cache."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any, Callable, Generator, Sequence

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama import LlamaState

from . import _lib
from .options import FULL, ImportanceLike, Options, check_share, load_importance, parse_bytes, row_bytes, share_of_prompt

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
    bytes_full : bytes that n_past cells of an uncompressed cache take
    compress_ms : duration of the last compression in ms
    """

    state: str
    n_prompt: int
    n_past: int
    n_cells: npt.NDArray[np.int32]
    bytes_store: int
    bytes_staging: int
    bytes_peak: int
    bytes_full: int
    compress_ms: float


class _WholePromptParams(llama_cpp.llama_context_params):
    """Context parameters whose n_batch takes a whole prompt.

    A prompt that is read layer by layer comes in one batch. Nothing in the library is
    sized by ``n_batch``, but ``llama_cpp.Llama`` sizes arrays by its own copy of it.
    """

    @property
    def n_batch(self) -> int:
        return llama_cpp.llama_context_params.n_batch.__get__(self)

    @n_batch.setter
    def n_batch(self, value: int) -> None:
        llama_cpp.llama_context_params.n_batch.__set__(self, max(value, self.n_ctx))
        self.n_outputs_max = value


class Llama(llama_cpp.Llama):
    """``llama_cpp.Llama`` whose KV heads keep only the cells that matter.

    A prompt is read with full attention; then each KV head keeps the cells that
    the last ``window`` queries look at, as many as its budget allows, and
    generation attends to those and to the generated tokens. Completion, chat,
    streaming and grammars work as in llama-cpp-python.

    Parameters
    ----------
    model_path : path of a GGUF file
    kv_size : mean cells per KV head after the prompt, window included;
        None = the stock cache, bit-identical to upstream
    kv_ratio : instead of ``kv_size``, its share of the length of each prompt, above 0 and at
        most 1
    kv_bytes : instead of ``kv_size``, bytes of K and V that the cells of all heads take
        after the prompt, a number or such as "64MiB"; generated tokens come on top
    policy : "headkv" (budgets by head importance), "snapkv" (uniform budgets), "streaming"
        (uniform budgets: the first cells and the last ones, whatever the queries look at),
        "pyramidkv" (budgets fall with the depth of the layer), "adakv" (within a layer, the
        prompt decides which heads get how many cells), "headkv+adakv" (a layer has the
        cells that "headkv" gives it; a head is sure of half of its own, and the prompt
        divides the rest within the layer), "criticalkv" (uniform budgets, half of the
        cells by attention times what their value does to the output of the layer), "h2o"
        (uniform budgets, by the attention of all tokens of the prompt; reading it takes
        n_ctx * n_ubatch * n_head * 4 bytes more) or "razor" (the most important heads keep
        all, as many as the budget has room for, the others 4 sinks, the window and one cell
        for what they drop); "full" is the stock cache, without ``kv_size``
    beta : > 1; a share 1/beta of the budget is given out by importance, the rest evenly;
        None = the one stored with the importance (``pyheadkv score --calibrate``), else 1.2
    window : number of last queries that score the prompt; these cells are always kept
    pool, pool_kernel : pooling of the scores along the prompt, "max" or "avg", odd size
    importance : None = from the model's metadata; or a path (score file, GGUF), or a
        (n_layer, n_head) array
    prefill : order in which prompts are read: "layer" (one layer's full cache is alive
        at a time), "token" (every layer's, as upstream) or "auto" (layer where it
        applies). The results are the same; ``prefill_mode`` says what was chosen
    prefill_hidden : type of the hidden states between layers, "f32" (exact) or "f16" (half
        the memory of what is left; logits of the random models of the tests change by a
        normalised error below 1e-5)
    kv_reuse : continue on the compressed past when a prompt starts with it. Off by
        default: such a prompt is read again, so that the answer is that of a fresh one
    keep_prompt : keep the full cache of the prompt beside the compressed one, so that
        ``restore_prompt`` can go back to it. For evaluations: it costs the memory that
        compression saves
    sinks : first cells of a prompt that every head keeps; None = 4 under "streaming", as far as
        ``kv_size`` reaches, else 0
    protect : (start, end) spans of prompt positions whose cells every head keeps; what lies
        behind the end of a prompt is no matter. Sinks and protected cells are part of a
        head's budget; a head whose budget they exceed grows, which ``kv_stats()`` tells
    surplus : what becomes of the cells that a head may keep beyond the length of the prompt:
        "lost", or "redistribute" (evenly to the other heads of its layer, then to those of
        the other layers)
    pyramid_exact : True = the budgets of "pyramidkv" add up to ``kv_size`` per head; False =
        those of its authors, whose rounding holds more (32 layers: 13 % at 64 cells, 5 % at 128)
    adakv_floor : share of its budget, 0 to 1, that the prompt cannot take from a head; None =
        0.2 under "adakv", 0.5 under "headkv+adakv"
    adakv_normalize : under both, weight the scores of a head by the share of its best cells
        in their sum, so that heads with concentrated attention get more
    n_tail, attend, n_buckets : see ``cpp/headkv.h``
    **kwargs : every argument of ``llama_cpp.Llama``; ``flash_attn`` is on when
        compression is

    Raises
    ------
    ValueError
        wrong option, no importance for a policy that needs it, or an architecture that
        cannot be compressed; the message names value, limit and remedy

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
        policy: str = "headkv",
        beta: float | None = None,
        window: int = 8,
        pool: str = "max",
        pool_kernel: int = 7,
        importance: ImportanceLike = None,
        prefill: str = "auto",
        prefill_hidden: str = "f32",
        kv_reuse: bool = False,
        keep_prompt: bool = False,
        sinks: int | None = None,
        protect: Sequence[tuple[int, int]] = (),
        surplus: str = "lost",
        pyramid_exact: bool = True,
        adakv_floor: float | None = None,
        adakv_normalize: bool = False,
        n_tail: int = 64,
        attend: str = "auto",
        n_buckets: int = 1,
        **kwargs: Any,
    ) -> None:
        options = dict(policy=policy, beta=beta, window=window, pool=pool, pool_kernel=pool_kernel, n_tail=n_tail, attend=attend,
                       n_buckets=n_buckets, prefill=prefill, prefill_hidden=prefill_hidden, keep_prompt=keep_prompt,
                       sinks=sinks, protect=protect, surplus=surplus, pyramid_exact=pyramid_exact, adakv_floor=adakv_floor,
                       adakv_normalize=adakv_normalize)
        self._kv_args = dict(options, kv_size=kv_size, kv_ratio=kv_ratio, kv_bytes=kv_bytes, importance=importance, kv_reuse=kv_reuse)
        self._kv_reuse = kv_reuse
        self._prompt_pending = False
        self._protect_head: list[int] = []  # the next prompt begins with these tokens, to be kept
        self._progress_error: BaseException | None = None
        model_path = fspath(model_path)
        given = [f"{name}={value!r}" for name, value in dict(kv_size=kv_size, kv_ratio=kv_ratio, kv_bytes=kv_bytes).items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{', '.join(given)}: give one of them, they are three ways to say how much is kept")
        if given and policy == FULL:
            raise ValueError(f"policy='full', {given[0]}: the full cache has no budget, leave it out or choose another policy")
        self._kv_ratio = kv_ratio
        if not given:
            self.kv_options: Options | None = None
            super().__init__(model_path, **kwargs)
            return

        n_ctx = kwargs.get("n_ctx", 512)  # 0 = that of the model, checked by the library
        if kv_ratio is not None:
            if check_share("kv_ratio", kv_ratio) == 0:
                raise ValueError(f"kv_ratio={kv_ratio!r}: nothing would be kept, use a share above 0")
            kv_size = window + 1  # until there is a prompt
        elif kv_bytes is not None:
            kv_size = cells_in(parse_bytes("kv_bytes", kv_bytes), model_path, window=window, n_ctx=n_ctx, **{
                name: kwargs.get(name) for name in ("type_k", "type_v")})
        self.kv_options = Options(kv_size=kv_size, **options)
        if n_ctx and kv_size > n_ctx:
            raise ValueError(f"kv_size={kv_size}: it must not be larger than n_ctx = {n_ctx}")
        self._importance = values = load_importance(importance, model_path)
        if kwargs.get("embedding"):
            raise ValueError("embedding=True: embeddings have no generation to speed up, use kv_size=None")
        if kwargs.get("flash_attn") is False:
            raise ValueError("flash_attn=False: compression needs flash attention")
        kwargs["flash_attn"] = True

        params = self.kv_options.to_params(values, model_path)
        try:
            with _lib.creating(params):
                super().__init__(model_path, **kwargs)
        except ValueError as e:
            self._close_partial()
            reason = _lib.last_error()
            raise ValueError(reason or str(e)) from None
        except BaseException:
            self._close_partial()
            raise
        if prefill == "layer" and self.prefill_mode != "layer":
            why = _lib.lib.headkv_why_token_prefill(self.ctx).decode()
            self.close()
            raise ValueError(f"prefill='layer' is not possible for this model: {why}; use prefill='auto'")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "context_params" and self.kv_options is not None and self.kv_options.prefill != "token":
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
        return {**super().__getstate__(), **self._kv_args}

    # ------------------------------------------------------------------ generation

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
            options = self._need_options()
            self.configure(kv_size=share_of_prompt(self._kv_ratio, n_tokens, window=options.window))

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens; the first evaluation of a ``generate`` call is the prompt."""
        if self.kv_options is None:
            super().eval(tokens)
            return
        n_ctx = len(self.input_ids)
        if self.n_tokens + len(tokens) > n_ctx:
            raise ValueError(f"{self.n_tokens} + {len(tokens)} tokens do not fit into n_ctx={n_ctx}: "
                             "use a larger n_ctx or a shorter prompt")
        self._progress_error = None
        whole = self._prompt_pending and self.n_tokens == 0 and self.prefill_mode == "layer" and not self._logits_all
        try:
            if whole and len(tokens) > 1:
                self._eval_whole(tokens)
            else:
                if tokens:
                    _lib.check(_lib.lib.headkv_begin_prompt(self.ctx, 0, self.n_tokens + len(tokens), False))
                super().eval(tokens)
        except RuntimeError as e:
            self._requires_eval = True  # the next prompt is read from its beginning, even if it is the same
            if self._prompt_pending and STATES[self._stats().state] == "staged":
                self.reset()  # what was read of it is of no use
            if self._progress_error is not None:
                raise self._progress_error from None
            raise RuntimeError(f"{e}: {_lib.last_error()}" if _lib.last_error() else str(e)) from None
        if self._prompt_pending and self.n_tokens > 0:
            self._prompt_pending = False
            self.end_prompt()

    def _eval_whole(self, tokens: Sequence[int]) -> None:
        n = len(tokens)
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        self._ctx.kv_cache_seq_rm(0, 0, -1)
        self._fit_ratio(n)
        code = _lib.lib.headkv_read_prompt(self.ctx, 0, ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), n)
        if code != 0:
            self.n_tokens = 0
            raise RuntimeError(f"llama_decode returned {code}")
        self.input_ids[:n] = ids
        self.n_tokens = n
        self._requires_eval = False

    def read_prompt(self, tokens: Sequence[int]) -> None:
        """Forget everything, evaluate a whole prompt and compress it; what ``generate`` begins with."""
        self.reset()
        self._prompt_pending = self.kv_options is not None
        try:
            self.eval(tokens)
        finally:
            self._prompt_pending = False

    def configure(self, *, importance: ImportanceLike = None, **options: Any) -> None:
        """Change how the prompts to come are compressed.

        Parameters
        ----------
        importance : as for the constructor; None = what was used until now
        **options : any of the constructor's but ``window, n_tail, attend, n_buckets, prefill,
            prefill_hidden, keep_prompt``; those that are not given stay

        Raises
        ------
        ValueError
            wrong value, or an option that sizes what the context owns; nothing has changed then
        """
        new = replace(self._need_options(), **options)
        values = self._importance if importance is None else load_importance(importance, self.model_path)
        params = new.to_params(values, self.model_path)
        _lib.check(_lib.lib.headkv_configure(self.ctx, ctypes.byref(params)), ValueError)
        self.kv_options, self._importance = new, values

    def restore_prompt(self, n_tokens: int) -> None:
        """Go back to the first ``n_tokens`` of the compressed prompt, uncompressed, without reading them again.

        As many tokens as were taken back, at most ``window``, must be evaluated before
        ``end_prompt``, which needs their queries.

        Raises
        ------
        RuntimeError
            the prompt was not kept (``keep_prompt``) or is shorter
        """
        self._need_options()
        _lib.check(_lib.lib.headkv_restore_prompt(self.ctx, 0, n_tokens))
        self.n_tokens = n_tokens

    def set_progress(self, progress: Callable[[int, int, int, int], bool | None] | None) -> None:
        """Call ``progress(il, n_layer, i_token, n_tokens)`` before each step of a prompt.

        ``n_layer`` is 1 when a step takes the tokens through all layers. Returning False
        aborts: the evaluation raises RuntimeError, and the prompt is to be read again.
        What ``progress`` raises is raised by the evaluation. None = no calls.
        """
        self._need_options()

        def call(il: int, n_layer: int, i_token: int, n_tokens: int, _: Any) -> bool:
            try:
                return progress(il, n_layer, i_token, n_tokens) is not False
            except BaseException as e:  # Ctrl-C too: nothing can be raised through the library
                self._progress_error = e
                return False

        self._progress = _lib.Progress() if progress is None else _lib.Progress(call)
        _lib.check(_lib.lib.headkv_set_progress(self.ctx, self._progress, None))

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As ``llama_cpp.Llama.generate``; the prompt is compressed after its evaluation."""
        head, self._protect_head = self._protect_head, []
        protect = self.kv_options.protect if self.kv_options is not None else ()
        if self.kv_options is not None:
            if head or not self._kv_reuse and not self._is_cached(tokens):
                self.reset()
            if head:
                if list(tokens[: len(head)]) != head:
                    raise ValueError("protect_system=True: the chat format in use does not put the system message where the model's "
                                     "template does, use protect=[(0, n)]")
                self.configure(protect=[*protect, (0, len(head))])
            self._prompt_pending = True
        try:
            return (yield from super().generate(tokens, *args, **kwargs))
        finally:
            self._prompt_pending = False
            if head:
                self.configure(protect=protect)

    def create_chat_completion(self, messages: list[Any], *args: Any, protect_system: bool = False, **kwargs: Any) -> Any:
        """As ``llama_cpp.Llama.create_chat_completion``.

        Parameters
        ----------
        protect_system : every head keeps the cells of the system message, which is the first one

        Raises
        ------
        ValueError
            ``protect_system`` without a system message, compression or a chat template in the model
        """
        if protect_system:
            self._protect_head = self._system_tokens(messages)
        return super().create_chat_completion(messages, *args, **kwargs)

    def _system_tokens(self, messages: list[Any]) -> list[int]:
        """Tokens that every chat which begins with this system message begins with, and some more."""
        from .score_examples import render_chat_messages

        self._need_options()
        template = self.metadata.get("tokenizer.chat_template")
        if not messages or messages[0]["role"] != "system":
            raise ValueError("protect_system=True: the first message is no system message")
        if template is None:
            raise ValueError("protect_system=True: the model has no chat template, use protect=[(0, n)]")
        # what two chats with other users have in common
        texts = [render_chat_messages(self, template, [messages[0], {"role": "user", "content": c}]) for c in "ab"]
        a, b = (self.tokenize(text.encode(), add_bos=False, special=True) for text in texts)
        head = a[: n_common(a, b)]
        bos = self.token_bos()
        return head if bos < 0 or head[:1] == [bos] else [bos, *head]

    def _is_cached(self, tokens: Sequence[int]) -> bool:
        # the very prompt that was compressed, without a token generated after it
        return (not self._requires_eval and self._stats().n_prompt == self.n_tokens == len(tokens)
                and list(self._input_ids) == list(tokens))

    def reset(self) -> None:
        """Forget all tokens; the cache is empty afterwards."""
        super().reset()
        if self.kv_options is not None:
            self._ctx.kv_cache_clear()

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
        return LlamaState(input_ids=self._input_ids.copy(), scores=np.empty((0, self.n_vocab()), dtype=np.single), n_tokens=self.n_tokens,
                          llama_state=bytes(data), llama_state_size=size, seed=self._seed)

    def load_state(self, state: LlamaState) -> None:
        """Go back to what ``save_state`` saw; ``generate`` continues on it with ``kv_reuse=True``.

        Raises
        ------
        ValueError
            a state of another model, of other types of K and V, of a larger ``kv_size`` or ``n_ctx``, or a damaged one; everything
            is forgotten then, as after ``reset``
        """
        if self.kv_options is None:
            super().load_state(state)
            return
        self.reset()
        size, n = len(state.llama_state), state.n_tokens
        data = (ctypes.c_uint8 * size).from_buffer_copy(state.llama_state)
        _lib.lib.headkv_clear_error()
        try:
            n_read = llama_cpp.llama_state_seq_set_data(self.ctx, data, size, 0)
            if n_read != size:
                what = f"it ends after {n_read} of {size} bytes" if n_read else "it is not one of a compressed cache"
                raise ValueError((not n_read and _lib.last_error()) or f"the state cannot be restored: {what}")
            stats = self._stats()
            if not len(state.input_ids) >= n == stats.n_past:
                raise ValueError(f"the state cannot be restored: its cache has {stats.n_past} tokens, {n} were said to be in it")
            if self._kv_ratio is None and stats.kv_size > self.kv_options.kv_size:
                raise ValueError(f"the state cannot be restored: it was compressed with kv_size={stats.kv_size}, which is more than "
                                 f"kv_size={self.kv_options.kv_size} of this one")
        except ValueError:
            self.reset()
            raise
        self.input_ids[:n] = state.input_ids[:n]
        self.n_tokens = n
        self._requires_eval = True  # logits are not part of it
        self._seed = state.seed

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

    def _stats(self) -> _lib.Stats:
        stats = _lib.Stats(size=ctypes.sizeof(_lib.Stats))
        _lib.check(_lib.lib.headkv_get_stats(self.ctx, 0, ctypes.byref(stats)))
        return stats

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
        """Cells that each head may keep of a long prompt, window included: int32 (n_layer, n_head_kv).

        Some policies move cells within a layer by what the prompt is; ``kv_stats().n_cells`` tells the outcome.
        """
        self._need_options()
        return self._int_table(_lib.lib.headkv_get_budget, self.ctx)

    def kv_positions(self, il: int, ih: int) -> npt.NDArray[np.int32]:
        """Prompt positions that KV head ``ih`` of layer ``il`` kept, ascending int32; a first -1 is a cell that stands for
        all that were dropped (policy "razor")."""
        self._need_options()
        n = _lib.check(_lib.lib.headkv_get_positions(self.ctx, 0, il, ih, None, 0), ValueError)
        positions = np.zeros(n, dtype=np.int32)
        _lib.check(_lib.lib.headkv_get_positions(self.ctx, 0, il, ih, positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), n))
        return positions

    def kv_stats(self) -> KVStats:
        """What the cache holds now, in cells and bytes."""
        self._need_options()
        s = self._stats()
        return KVStats(
            state=STATES[s.state],
            n_prompt=s.n_prompt,
            n_past=s.n_past,
            n_cells=self._int_table(_lib.lib.headkv_get_n_cells, self.ctx, 0),
            bytes_store=s.bytes_store,
            bytes_staging=s.bytes_staging,
            bytes_peak=s.bytes_peak,
            bytes_full=s.bytes_full,
            compress_ms=s.t_compress_us / 1000,
        )

    @property
    def last_logits(self) -> npt.NDArray[np.float32]:
        """Logits after the last evaluated token, float32 (n_vocab,)."""
        return np.array(np.ctypeslib.as_array(self._ctx.get_logits_ith(-1), shape=(self.n_vocab(),)))

    def read_attention(self, spans: Sequence[tuple[int, int]], n_top: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Attention of the last evaluated token over a prompt that is not compressed yet.

        Reduced where the cache is: rows of attention are never copied.

        Parameters
        ----------
        spans : (start, end) token positions, end excluded
        n_top : how many of the largest probabilities are looked at

        Returns
        -------
        mass : float32 (n_layer, n_head), the sum of those of the ``n_top`` largest
            probabilities whose positions lie in a span; 0 in layers without attention
        top : int32 (n_layer, n_head), position of the largest one; -1 there

        Raises
        ------
        ValueError
            the prompt is compressed or empty, a span leaves it, or ``n_top`` exceeds it
        """
        self._need_options()
        i32, f32 = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_float)
        bounds = np.ascontiguousarray(spans, dtype=np.int32).reshape(-1, 2)
        head = (self.ctx, 0, bounds.ctypes.data_as(i32), len(bounds), n_top)
        n = _lib.check(_lib.lib.headkv_read_attention(*head, None, None, 0), ValueError)
        n_layer = llama_cpp.llama_model_n_layer(self.model)
        mass = np.zeros((n_layer, n // n_layer), dtype=np.float32)
        top = np.zeros(mass.shape, dtype=np.int32)
        _lib.check(_lib.lib.headkv_read_attention(*head, mass.ctypes.data_as(f32), top.ctypes.data_as(i32), n), ValueError)
        return mass, top

    def _read_floats(self, func: Any, n_row: int, n_max: int, *args: Any) -> npt.NDArray[np.float32]:
        values = np.zeros((n_max, n_row), dtype=np.float32)
        n = _lib.check(func(self.ctx, 0, *args, values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size), ValueError)
        return values[:n]


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the beginning that two lists share."""
    n = min(len(a), len(b))
    same = np.asarray(a[:n]) == np.asarray(b[:n])
    return n if same.all() else int(same.argmin())


def cells_in(
    n_bytes: int, model_path: str | PathLike[str], *, window: int, n_ctx: int, type_k: int | None = None, type_v: int | None = None
) -> int:
    """Cells per KV head that take so many bytes together; no more than a prompt can have.

    Parameters
    ----------
    n_ctx : 0 = that of the model
    type_k, type_v : ggml types; None = f16

    Raises
    ------
    ValueError : the bytes do not hold the window
    """
    from .inspect import read_shape

    shape = read_shape(model_path)
    f16 = llama_cpp.GGML_TYPE_F16
    cell = row_bytes(f16 if type_k is None else type_k, shape.n_embd_head_k) + row_bytes(f16 if type_v is None else type_v, shape.n_embd_head_v)
    kv_size = n_bytes // (cell * shape.n_heads_kv)
    if kv_size <= window:
        least = (window + 1) * cell * shape.n_heads_kv
        raise ValueError(f"kv_bytes={n_bytes}: {kv_size} cells for each of {shape.n_heads_kv} KV heads, which must hold the window of {window} "
                         f"and one more: use at least {least} bytes")
    return min(kv_size, n_ctx or shape.n_ctx_train)
