"""Options of the compression, checked before anything is loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _lib
from .gguf_keys import read_importance
from .importance_values import Importance, check_beta, check_importance, fit_heads
from .replay_values import ReplayTable
from .score_files import SCORE_SUFFIXES, load_scores

_TRAITS = _lib.policies()
POLICIES = tuple(_TRAITS)
AUTO = "auto"  # the best one for what is known of the model and the question
FULL = "full"  # not one of them: the stock cache
NONE = "none"  # nor this: the question without its context, for comparison
LOSSLESS = "lossless"  # needs no amount
BY_IMPORTANCE = tuple(name for name, policy in _TRAITS.items() if policy.by_importance)  # policies that need the importance of the heads
BY_BETA = tuple(name for name, policy in _TRAITS.items() if policy.by_beta)  # of them, those that give out a share of the budget by it
QUESTIONS = ("known", "both", "later")
POOLS = {"max": 0, "avg": 1}
ATTENDS = {"auto": 0, "fused": 1, "composed": 2}
SURPLUSES = {"lost": 0, "redistribute": 1}
PREFILLS = {"auto": 0, "token": 1, "layer": 2}
SCOPES = {"generated": 0, "all": 1}
GENERATED_RANKS = {"attention": 0, "recent": 1, "redundancy": 2}

_LIBRARY: _lib.Params = _lib.lib.headkv_default_params()  # where the numbers of defaults stand; tests/test_options.py compares the rest
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"pool": "max", **{name: getattr(_LIBRARY, name) for name in ("window", "recent", "power", "pool_kernel")}},
    "paper": {"window": 8, "recent": 8, "power": 1, "pool": "max", "pool_kernel": 7},  # HeadKV's, and SnapKV's but for the window
}
POWERS = (1, 2, 4, 8)

MAX_CELLS = 1 << 26  # of a head
DEFAULT_BETA = 1.2  # where none was chosen for the scores

ImportanceLike = str | PathLike[str] | npt.ArrayLike | Importance | None


class MissingFileError(FileNotFoundError, ValueError):
    """A file that was named does not exist; llama_cpp raises ValueError then."""


def check_text(name: str, value: Any) -> None:
    """Strings, at any depth of lists and dicts, that have an encoding in UTF-8.

    Raises
    ------
    ValueError
        names the character and the remedy
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}: character {error.start} is {value[error.start]!r}, a byte that was no UTF-8 or half of a character: "
                "read the text in the encoding that it has"
            ) from None
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            check_text(name, item)


def check_tokens(tokens: Sequence[int], *, n_vocab: int) -> None:
    """Token ids of the vocabulary; else ValueError."""
    ids = np.asarray(tokens)
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= n_vocab):
        for i, token in enumerate(tokens):
            check_int(f"tokens[{i}]", token, 0, n_vocab - 1, ", the vocabulary of the model")


def check_int(name: str, value: Any, lo: int, hi: int, remedy: str = "") -> int:
    """``value`` as int, if it is one in [lo, hi].

    Raises
    ------
    ValueError
        names the value, the limit and the remedy
    """
    if isinstance(value, (bool, str)) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}={value!r}: it must be an integer in [{lo}, {hi}]{remedy}")
    if not lo <= int(value) <= hi:
        raise ValueError(f"{name}={value}: it must be in [{lo}, {hi}]{remedy}")
    return int(value)


def nearest(name: Any, names: Iterable[str]) -> str:
    """``": did you mean .."`` with the most similar name; empty if none is similar."""
    found = get_close_matches(str(name), list(names), n=1)
    return f": did you mean {found[0]!r}?" if found else ""


def check_names(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Names of options that are known.

    Raises
    ------
    TypeError
        names the first one that is not, and the nearest one that is
    """
    for name in given:
        if name not in known:
            raise TypeError(f"{what} has no option {name!r}{nearest(name, known) or ': its options are ' + ', '.join(known)}")


def check_extra(what: str, *packages: str) -> None:
    """``what`` can be made with these packages of the extra ``eval``, which inference does without.

    Raises
    ------
    ValueError : one of them is missing
    """
    for name in packages:
        if find_spec(name) is None:
            raise ValueError(f'{what} is made with {name}, which is not installed: pip install "pyheadkv[eval]"')


def check_choice(name: str, value: Any, choices: Any) -> str:
    """``value``, if it is one of ``choices``; else ValueError."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r}: it must be one of {', '.join(map(repr, choices))}{nearest(value, choices)}")
    return value


def policy_traits(policy: str, budget: str | None = None, rank: str | None = None, fit: str | None = None) -> _lib.PolicyInfo:
    """What a policy looks at, by its name or as "budget/rank" or "budget/rank/fit", with choices that replace its own.

    "auto" without them looks at all that may be known.

    Raises
    ------
    ValueError : one of the names is unknown; those that are known are named
    """
    for name, value in dict(policy=policy, budget=budget, rank=rank, fit=fit).items():
        if value is not None and not (isinstance(value, str) and value.isascii() and value.isprintable() and value):
            raise ValueError(f"{name}={value!r}: it must be a name, or None")
    return _traits(policy, budget, rank, fit)


@lru_cache(maxsize=256)
def _traits(policy: str, budget: str | None, rank: str | None, fit: str | None) -> _lib.PolicyInfo:
    if policy != AUTO:
        return _lib.find_policy(policy, budget, rank, fit)
    traits = _lib.find_policy(BY_IMPORTANCE[0], budget, rank, fit)
    if budget is None:
        traits.by_importance = traits.by_beta = traits.by_replay = True
    return traits


def check_policy(name: str, value: Any, more: Sequence[str] = (AUTO,)) -> str:
    """``value``, if it is the name of a policy, one of ``more``, or "budget/rank" or "budget/rank/fit"; else ValueError."""
    if isinstance(value, str) and "/" in value:
        try:
            policy_traits(value)
        except ValueError as e:
            raise ValueError(f"{name}={value!r}: {e}") from None
        return value
    return check_choice(name, value, (*more, *POLICIES))


def check_bool(name: str, value: Any) -> bool:
    """``value``, if it is True or False; else ValueError."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={value!r}: it must be True or False")
    return bool(value)


def check_share(name: str, value: Any) -> float:
    """``value`` as float, if it is a number in [0, 1]; else ValueError."""
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.integer, np.floating)) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}: it must be a number in [0, 1]")
    return float(value)


def share_of_prompt(share: float, n_tokens: int, *, recent: int) -> int:
    """Cells per KV head that are a share of a prompt, at least one more than the recent ones; with all of it, every head keeps all."""
    return max(recent + 1, n_tokens + 1 if share == 1 else round(share * n_tokens))


def check_spans(name: str, value: Any) -> tuple[tuple[int, int], ...]:
    """``value`` as (start, end) pairs of positions, if it is a list of such with 0 <= start < end; else ValueError."""
    remedy = "give (start, end) positions with 0 <= start < end"
    try:
        spans = tuple((start, end) for start, end in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r}: {remedy}") from None
    for start, end in spans:
        check_int(f"{name} start", start, 0, MAX_CELLS - 1, f": {remedy}")
        check_int(f"{name} end", end, start + 1, MAX_CELLS, f": {remedy}")
    return tuple((int(start), int(end)) for start, end in spans)


def preset_changes(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` for ``replace``: with another preset, what the old one filled in is forgotten."""
    return {**dict.fromkeys(PRESETS["default"]), **options} if "preset" in options else options


def load_importance(source: ImportanceLike, model: str | PathLike[str]) -> Importance | None:
    """Importance for a model, from an array, a score file (see ``score_files``) or a GGUF file; None = the model's own."""
    if source is None or isinstance(source, Importance):
        return source
    if not isinstance(source, (str, PathLike)):
        return Importance(check_importance(source, name="importance"))
    path = Path(source)
    if not path.is_file():
        raise MissingFileError(f"importance={str(source)!r}: no such file")
    if path.suffix.lower() in SCORE_SUFFIXES:
        scores = load_scores(path)
        return replace(scores, values=fit_heads(scores.values, model))
    found = read_importance(path)
    if found is None:
        raise ValueError(f"importance={str(source)!r}: the file has no head importance")
    return found


@dataclass(frozen=True)
class Options:
    """What the compression does; see ``pyheadkv.Llama`` for the meaning.

    Raises
    ------
    ValueError
        names value, limit and remedy
    """

    kv_size: int
    policy: str = AUTO
    budget: str | None = None  # this and the next two: None = that of the policy
    rank: str | None = None
    fit: str | None = None
    question: str | None = None  # for "auto"; None = known
    beta: float | None = None
    preset: str = "default"
    window: int = None  # type: ignore[assignment]  # from here to pool_kernel None = that of the preset, which replaces it
    recent: int = None  # type: ignore[assignment]
    power: int = None  # type: ignore[assignment]
    pool: str = None  # type: ignore[assignment]
    pool_kernel: int = None  # type: ignore[assignment]
    n_tail: int = _LIBRARY.n_tail
    attend: str = "auto"
    n_buckets: int = _LIBRARY.n_buckets
    prefill: str = "auto"
    prefill_hidden: str = "f32"
    sinks: int | None = None
    protect: Sequence[tuple[int, int]] = ()
    surplus: str = "lost"
    pyramid_exact: bool = True
    adakv_floor: float | None = None
    adakv_normalize: bool = False
    kv_generated: int | None = None
    kv_generated_slack: int = _LIBRARY.generated_slack
    kv_generated_scope: str = "generated"
    kv_generated_rank: str = "attention"

    def __post_init__(self) -> None:
        check_policy("policy", self.policy)
        policy_traits(self.policy, self.budget, self.rank, self.fit)
        if self.question is not None:
            check_choice("question", self.question, QUESTIONS)
            if self.policy != AUTO:
                raise ValueError(
                    f"policy={self.policy!r}, question={self.question!r}: a policy that is named does not look at it, leave one of them out"
                )
            if self.budget is not None and self.rank is not None or self.traits.keeps_all:
                named = ", ".join(f"{name}={getattr(self, name)!r}" for name in ("budget", "rank", "question") if getattr(self, name))
                raise ValueError(f"{named}: nothing is left for the question to decide, leave it out")
        check_choice("preset", self.preset, tuple(PRESETS))
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_choice("pool", self.pool, tuple(POOLS))
        check_choice("attend", self.attend, tuple(ATTENDS))
        check_choice("prefill", self.prefill, tuple(PREFILLS))
        check_choice("prefill_hidden", self.prefill_hidden, ("f32", "f16"))
        check_int("window", self.window, 1, 256)
        recent = check_int("recent", self.recent, 1, 1 << 20)
        check_int("power", self.power, 1, 8)
        if self.power not in POWERS:
            raise ValueError(f"power={self.power}: it must be one of {', '.join(map(str, POWERS))}")
        check_int("kv_size", self.kv_size, recent + 1, MAX_CELLS, f" (it counts the {recent} recent cells that every head keeps)")
        check_int("pool_kernel", self.pool_kernel, 0, 31)
        if self.pool_kernel and self.pool_kernel % 2 == 0:
            raise ValueError(f"pool_kernel={self.pool_kernel}: it must be odd, so that the pooling is centred")
        if self.beta is not None:
            check_beta(self.beta, name="beta")
        check_int("n_tail", self.n_tail, 1, 1 << 20)
        check_int("n_buckets", self.n_buckets, 1, 8)
        if self.sinks is not None:
            check_int("sinks", self.sinks, 0, MAX_CELLS)
        object.__setattr__(self, "protect", check_spans("protect", self.protect))
        check_choice("surplus", self.surplus, tuple(SURPLUSES))
        check_bool("pyramid_exact", self.pyramid_exact)
        check_bool("adakv_normalize", self.adakv_normalize)
        if self.adakv_floor is not None:
            check_share("adakv_floor", self.adakv_floor)
        if self.kv_generated is not None:
            check_int(
                "kv_generated", self.kv_generated, self.window + 1, MAX_CELLS, f" (it counts the last {self.window} tokens, the window)"
            )
        check_int("kv_generated_slack", self.kv_generated_slack, 1, 1 << 20)
        check_choice("kv_generated_scope", self.kv_generated_scope, tuple(SCOPES))
        check_choice("kv_generated_rank", self.kv_generated_rank, tuple(GENERATED_RANKS))

    @property
    def traits(self) -> _lib.PolicyInfo:
        """What the choices look at."""
        return policy_traits(self.policy, self.budget, self.rank, self.fit)

    def to_params(self, importance: Importance | None, model_path: str | None, replay: ReplayTable | None = None) -> _lib.Params:
        """The C struct. It refers to the values of ``importance`` and ``replay``, which must outlive it."""
        params: _lib.Params = _lib.lib.headkv_default_params()
        params.policy = self.policy.encode()
        for name in ("budget", "rank", "fit", "question"):
            if getattr(self, name) is not None:
                setattr(params, name, getattr(self, name).encode())
        params.kv_size = self.kv_size
        params.window = self.window
        params.recent = self.recent
        params.power = self.power
        params.pool = POOLS[self.pool]
        params.pool_kernel = self.pool_kernel
        params.beta = float(self.beta or (importance and importance.beta) or 0)  # 0 = the library looks it up
        params.n_tail = self.n_tail
        params.attend = ATTENDS[self.attend]
        params.n_buckets = self.n_buckets
        params.prefill = PREFILLS[self.prefill]
        params.hidden_f16 = self.prefill_hidden == "f16"
        params.sinks = -1 if self.sinks is None else self.sinks
        bounds = [position for span in self.protect for position in span]
        params.protect = (ctypes.c_int32 * len(bounds))(*bounds)  # kept alive by params
        params.n_protect = len(self.protect)
        params.surplus = SURPLUSES[self.surplus]
        params.pyramid_exact = self.pyramid_exact
        params.adakv_floor = -1.0 if self.adakv_floor is None else self.adakv_floor
        params.adakv_normalize = self.adakv_normalize
        params.kv_generated = self.kv_generated or 0
        params.generated_slack = self.kv_generated_slack
        params.generated_scope = SCOPES[self.kv_generated_scope]
        params.generated_rank = GENERATED_RANKS[self.kv_generated_rank]
        if importance is not None and replay is not None and len(importance.values) != replay.values.shape[1]:
            raise ValueError(
                f"the importance is for {len(importance.values)} layers, the replay table for {replay.values.shape[1]}: measure both on this model"
            )
        if importance is not None:
            params.importance = importance.values.ctypes.data_as(ctypes.POINTER(ctypes.c_double))
            params.n_layer, params.n_head = importance.values.shape
        if replay is not None:
            params.replay = replay.values.ctypes.data_as(ctypes.POINTER(ctypes.c_double))
            params.shares = replay.shares.ctypes.data_as(ctypes.POINTER(ctypes.c_double))
            params.n_shares, params.n_layer, params.n_head_kv = replay.values.shape
        params.importance_gguf = model_path.encode() if model_path else None
        return params
