"""The slow and obvious definition of per-head KV compression, in NumPy, that every fast path is compared with.

One function per stage: importance -> budget -> window -> score -> select -> compact -> attend; then
:class:`ReferenceModel`, a whole forward pass. All arithmetic is float64. "HeadKV" below names the authors' code,
FYYFU/HeadKV at 0862a09, headkv/snapkv_utils.py.

Query head ``h`` reads KV head ``h // (n_head / n_head_kv)``. A cell is the K and V of one token in one KV head.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ..gguf_header import Header, read_header

Pool = Literal["max", "avg"]
POOLS: tuple[str, ...] = ("max", "avg")


# importance -> budget


def budget(importance: ArrayLike, *, kv_size: int, recent: int, beta: float) -> NDArray[np.int32]:
    """Prefix cells of each query head: the authors' formula bit for bit (HeadKV lines 347 and 381-389).

    The quirks are part of it: importance is normalised twice, the shared pool is a float floor division, rounding
    is half to even, and nobody repairs the sum.

    Parameters
    ----------
    importance : (n_layer, n_head), >= 0, any positive sum
    kv_size : cells per head on average, recent ones included
    recent : tokens at the end of the prompt that every head keeps
    beta : > 1; a share 1/beta of the cells is distributed by importance, the rest evenly

    Returns
    -------
    (n_layer, n_head) int32, cells, recent ones excluded
    """
    share = _check_importance(importance)
    _check_sizes(kv_size=kv_size, recent=recent)
    if not (math.isfinite(beta) and beta > 1):
        raise ValueError(f"beta = {beta} is not above 1: use a finite number such as 1.2 (larger is more even)")

    share = share / share.sum()
    share = share / share.sum()  # the authors' pow(temp) stands between the two; temp is always 1
    base = kv_size - recent
    n_shared = base // float(beta)  # float floor division: 11 // 1.1 is 9.0
    caps = np.rint(share * (n_shared * share.size) + (base - n_shared))
    if caps.max() > np.iinfo(np.int32).max:
        raise ValueError(f"kv_size = {kv_size} gives a head {caps.max():.0f} cells, beyond int32: lower it")
    rounded: NDArray[np.int32] = caps.astype(np.int32)
    return rounded


def budget_kv(caps: ArrayLike, *, n_head_kv: int, recent: int) -> NDArray[np.int32]:
    """Cells each KV head may keep: the mean over its query heads, rounded half to even, plus the recent ones.

    The mean (Zefan-Cai/KVCache-Factory c97f9d7) leaves the average at ``kv_size``; the maximum would not.

    Parameters
    ----------
    caps : (n_layer, n_head) cells, recent ones excluded, as :func:`budget` gives
    n_head_kv : KV heads per layer
    recent : tokens

    Returns
    -------
    (n_layer, n_head_kv) int32, cells, recent ones included
    """
    caps = np.asarray(caps)
    if caps.ndim != 2:
        raise ValueError(f"caps has {caps.ndim} dimensions, not 2: pass (n_layer, n_head)")
    n_layer, n_head = caps.shape
    if n_head_kv < 1 or n_head % n_head_kv:
        raise ValueError(f"n_head_kv = {n_head_kv} does not divide n_head = {n_head}: take it from the model")
    groups = caps.reshape(n_layer, n_head_kv, n_head // n_head_kv)
    cells: NDArray[np.int32] = (np.rint(groups.mean(axis=-1, dtype=np.float64)) + recent).astype(np.int32)
    return cells


def uniform_budget(*, n_layer: int, n_head: int, kv_size: int, recent: int) -> NDArray[np.int32]:
    """Prefix cells of each head under policy "snapkv": all the same.

    Returns
    -------
    (n_layer, n_head) int32, cells, recent ones excluded
    """
    _check_sizes(kv_size=kv_size, recent=recent)
    return np.full((n_layer, n_head), kv_size - recent, dtype=np.int32)


def spread(cells: ArrayLike, n: int, *, limit: int) -> tuple[NDArray[np.int64], int]:
    """Give n more cells, fewer if negative, to heads in order: evenly, the rest to the first ones, until all are full.

    Parameters
    ----------
    cells : any shape
    limit : cells of a full head; an empty one has 0

    Returns
    -------
    cells of the same shape, and what no head could take
    """
    res = np.array(cells, dtype=np.int64)
    heads, sign = res.reshape(-1), 1 if n > 0 else -1
    n = abs(n)
    while n > 0:
        room = np.maximum(0, limit - heads if sign > 0 else heads)
        n_open = int((room > 0).sum())
        if n_open == 0:
            break
        share = max(1, n // n_open)
        for i in np.flatnonzero(room):
            given = min(share, int(room[i]), n)
            heads[i] += sign * given
            n -= given
    return res, sign * n


def pyramid_budget(
    *, n_layer: int, n_head_kv: int, kv_size: int, recent: int, n_prefix: int | None = None, exact: bool = True
) -> NDArray[np.int64]:
    """Prefix cells of each KV head under policy "pyramidkv": they fall linearly from the first layer to the last.

    The last layer gets 1/20 of the mean, the first one what is missing then, but not more than the prompt has.

    Parameters
    ----------
    n_prefix : cells before the recent ones; None = a long prompt
    exact : True = what flooring loses goes to the first heads, one cell each; False = the authors' arithmetic, whose
        step is floored, so that the layers hold more than ``kv_size``

    Returns
    -------
    (n_layer, n_head_kv) int64, cells, recent ones excluded
    """
    _check_sizes(kv_size=kv_size, recent=recent)
    base = kv_size - recent
    last = base // 20
    first = 2 * base - last
    if n_prefix is not None and first > n_prefix:
        first = max(n_prefix, base)
        last = 2 * base - first
    steps, depth = max(1, n_layer - 1), np.arange(n_layer)
    if n_layer == 1:
        layers = np.array([base])
    elif exact:
        layers = last + (first - last) * (steps - depth) // steps
    else:
        layers = first - depth * ((first - last) // steps)
    cells = np.repeat(layers[:, None], n_head_kv, axis=1)
    if exact:
        rest = base * cells.size - int(cells.sum())
        cells, _ = spread(cells, rest, limit=2**62 if n_prefix is None else max(n_prefix, base))
    return cells.astype(np.int64)


def razor_budget(importance: ArrayLike, *, n_head_kv: int, kv_size: int, recent: int, n_prefix: int, n_protected: int) -> NDArray[np.int64]:
    """Prefix cells of each KV head under policy "razor": the most important ones keep all, the last of them a part, the
    others their protected cells and one for what they drop.

    Parameters
    ----------
    importance : (n_layer, n_head)
    n_prefix : cells before the recent ones
    n_protected : of them, of every head

    Returns
    -------
    (n_layer, n_head_kv) int64
    """
    _check_sizes(kv_size=kv_size, recent=recent)
    values = np.asarray(importance, dtype=np.float64)
    matters = values.reshape(len(values), n_head_kv, -1).mean(axis=-1).ravel()
    few = min(n_prefix, n_protected + 1)
    cells = np.full(matters.size, few, dtype=np.int64)
    rest = max(0, kv_size - recent - few) * matters.size
    for i in np.argsort(-matters, kind="stable"):
        more = min(rest, n_prefix - few)
        cells[i] += more
        rest -= more
    return cells.reshape(len(values), n_head_kv)


def replay_budget(
    shares: ArrayLike, values: ArrayLike, *, kv_size: int, recent: int, n_prefix: int, n_protected: int = 0
) -> NDArray[np.int64]:
    """Prefix cells of each KV head by a replay table: between its rows linearly, from nothing at 0 to everything at 1.

    What is protected comes first. Parts of cells are left out, and what is missing to ``kv_size`` per head goes evenly to the heads
    that have room.

    Parameters
    ----------
    shares : (n_share,) means over the heads, ascending
    values : (n_share, n_layer, n_head_kv) share of a text that a head needs then
    n_prefix : cells before the recent ones
    n_protected : of them, of every head

    Returns
    -------
    (n_layer, n_head_kv) int64
    """
    _check_sizes(kv_size=kv_size, recent=recent)
    table = np.asarray(values, dtype=np.float64)
    heads = table[0].shape
    mean, most = min(n_prefix, kv_size - recent) - n_protected, n_prefix - n_protected
    if mean <= 0:
        return np.full(heads, n_protected, dtype=np.int64)
    xs = np.concatenate([[0.0], np.asarray(shares, dtype=np.float64), [1.0]])
    rows = np.concatenate([np.zeros((1, *heads)), table, np.ones((1, *heads))])
    i = min(int(np.searchsorted(xs, mean / most)), len(xs) - 1)
    found = rows[i - 1] + (rows[i] - rows[i - 1]) * (mean / most - xs[i - 1]) / (xs[i] - xs[i - 1])
    total = mean * found.size
    cells = np.minimum(float(most), found / found.sum() * float(total)).astype(np.int64)
    spread_cells, _ = spread(cells + n_protected, total - int(cells.sum()), limit=n_prefix)
    return spread_cells


def mix_budget(by_importance: ArrayLike, by_replay: ArrayLike, *, n_prefix: int, n_protected: int = 0) -> NDArray[np.int64]:
    """Prefix cells of each KV head: the mean of two budgets, of which the first one is fitted to the prompt before.

    Parameters
    ----------
    by_importance, by_replay : (n_layer, n_head_kv) prefix cells

    Returns
    -------
    (n_layer, n_head_kv) int64
    """
    both = fit_budget(by_importance, n_prefix=n_prefix, n_protected=n_protected, redistribute=True) + np.asarray(by_replay, dtype=np.int64)
    cells, _ = spread(both // 2, int((both % 2).sum()) // 2, limit=n_prefix)
    return cells


def fit_budget(cells: ArrayLike, *, n_prefix: int, n_protected: int = 0, redistribute: bool = False) -> NDArray[np.int64]:
    """Prefix cells of each KV head for a prompt of ``n_prefix`` cells before the recent ones.

    What a head may keep beyond them is lost, or goes evenly to the other heads of its layer, and what these cannot take
    to the heads of all layers. Then a head gets at least its protected cells.

    Parameters
    ----------
    cells : (n_layer, n_head_kv) prefix cells of a long prompt

    Returns
    -------
    (n_layer, n_head_kv) int64
    """
    cells = np.asarray(cells, dtype=np.int64)
    fitted = np.minimum(cells, n_prefix)
    if redistribute:
        left = 0
        for il, surplus in enumerate((cells - fitted).sum(axis=1).tolist()):
            fitted[il], rest = spread(fitted[il], surplus, limit=n_prefix)
            left += rest
        fitted, _ = spread(fitted, left, limit=n_prefix)
    grown: NDArray[np.int64] = np.maximum(fitted, n_protected)
    return grown


def protected(spans: Sequence[tuple[int, int]], *, sinks: int, n_prefix: int) -> NDArray[np.bool_]:
    """Whether every head keeps a cell: it is one of the first ``sinks`` or in one of the spans [start, end).

    Returns
    -------
    (n_prefix,) bool
    """
    mask = np.zeros(n_prefix, dtype=np.bool_)
    for start, end in [(0, sinks), *spans]:
        mask[start:end] = True
    return mask


# window -> score


def window_queries(q: NDArray[np.floating], *, window: int) -> NDArray[np.floating]:
    """Queries of the last ``window`` tokens; all of them when the prompt is shorter.

    Parameters
    ----------
    q : (n_tokens, n_head, head_dim), after RoPE

    Returns
    -------
    (min(window, n_tokens), n_head, head_dim)
    """
    if window < 1:
        raise ValueError(f"window = {window} is below 1: give a positive number of tokens")
    return q[-window:]


def score(
    q_window: ArrayLike,
    k: ArrayLike,
    *,
    scale: float,
    n_prefix: int | None = None,
    power: int = 1,
    pool: Pool = "max",
    pool_kernel: int | NDArray[np.integer] = 7,
    softcap: float = 0.0,
    q_round: DTypeLike | None = None,
    sinks: ArrayLike | None = None,
    max_bias: float = 0.0,
) -> NDArray[np.float64]:
    """Attention that the window pays to each prefix cell (HeadKV lines 391-416), per KV head.

    Softmax runs over all columns and those behind the prefix are dropped afterwards, without renormalising. The power
    mean, mean(p ** power) ** (1 / power), is taken over the window and over the query heads of the group, before pooling;
    power 1 is the authors' mean.

    Parameters
    ----------
    q_window : (n_window, n_head, head_dim), after RoPE, the last tokens of the prompt
    k : (n_tokens, n_head_kv, head_dim), after RoPE
    scale : factor on q . k, usually head_dim ** -0.5
    n_prefix : leading cells that compete; None means all but the window
    power : exponent
    pool, pool_kernel : see :func:`pool_scores`; the kernel may be one for each KV head, see :func:`pool_kernels`
    softcap : logits become softcap * tanh(logits / softcap); 0 turns it off
    q_round : dtype the queries are stored in before use, e.g. np.float16; None leaves them alone
    sinks : (n_head,) a logit of each query head that belongs to no cell, see :func:`softmax`; None = none
    max_bias : of ALiBi, see :func:`alibi_slopes`; 0 turns it off

    Returns
    -------
    (n_head_kv, n_prefix) float64
    """
    q_window, k = _round(q_window, q_round), np.asarray(k, dtype=np.float64)
    _check_heads(q_window, k)
    n_window, n_tokens = len(q_window), len(k)
    if n_prefix is None:
        n_prefix = n_tokens - n_window
    if not 0 <= n_prefix <= n_tokens:
        raise ValueError(f"n_prefix = {n_prefix} is outside 0..{n_tokens}, the tokens of the prompt")

    n_head, n_head_kv = q_window.shape[1], k.shape[1]
    group = n_head // n_head_kv
    position = np.arange(n_tokens)
    distance = position[n_tokens - n_window :, None] - position
    slopes = alibi_slopes(n_head, max_bias)
    mean = np.zeros((n_head_kv, n_tokens))
    for h, sink in enumerate(_each_sink(sinks, n_head)):
        logits = _logits(q_window[:, h], k[:, h // group], scale=scale, softcap=softcap) - slopes[h] * distance
        logits = np.where(distance >= 0, logits, -np.inf)  # only the window is masked causally
        mean[h // group] += (softmax(logits, sink=sink) ** power).mean(axis=0) / group
    kernels = np.broadcast_to(pool_kernel, n_head_kv)
    rows = mean[:, :n_prefix] ** (1 / power)
    return np.stack([pool_scores(row, pool=pool, kernel=int(kernel)) for row, kernel in zip(rows, kernels, strict=True)])


def attention_sums(
    q: ArrayLike,
    k: ArrayLike,
    *,
    scale: float,
    q_round: DTypeLike | None = None,
    sinks: ArrayLike | None = None,
    max_bias: float = 0.0,
) -> NDArray[np.float64]:
    """Attention that all queries of a prompt pay to each cell (H2O in KVCache-Factory, pyramidkv_utils.py:797-890), per KV head.

    Parameters
    ----------
    q : (n_tokens, n_head, head_dim), after RoPE
    k : (n_tokens, n_head_kv, head_dim), after RoPE
    scale : factor on q . k, usually head_dim ** -0.5
    q_round : dtype the queries are rounded to before use; None leaves them alone
    sinks : (n_head,) a logit of each query head that belongs to no cell, see :func:`softmax`; None = none
    max_bias : of ALiBi, see :func:`alibi_slopes`; 0 turns it off

    Returns
    -------
    (n_head_kv, n_tokens) float64, mean over the query heads of the group
    """
    q, k = _round(q, q_round), np.asarray(k, dtype=np.float64)
    _check_heads(q, k)
    group = q.shape[1] // k.shape[1]
    sums = np.zeros((k.shape[1], len(k)))
    distance = np.arange(len(k))[:, None] - np.arange(len(k))
    slopes = alibi_slopes(q.shape[1], max_bias)
    for h, sink in enumerate(_each_sink(sinks, q.shape[1])):
        logits = _logits(q[:, h], k[:, h // group], scale=scale, softcap=0.0) - slopes[h] * distance
        sums[h // group] += softmax(np.where(distance >= 0, logits, -np.inf), sink=sink).sum(axis=0) / group
    return sums


def alibi_slopes(n_head: int, max_bias: float) -> NDArray[np.float64]:
    """What ALiBi takes off a logit per position that its cell lies before the query (Press et al. 2022), for each query head.

    A geometric sequence that ends with 2 ** -max_bias at the largest power of two of heads; those behind it take every other one of the
    sequence of twice as many.

    Returns
    -------
    (n_head,) float64, zeros if ``max_bias`` is 0
    """
    n = 2 ** int(math.log2(n_head))
    exponents = [*range(2, 2 * n + 1, 2), *range(1, 2 * (n_head - n), 2)]
    return np.exp2(-max_bias / 2 / n * np.array(exponents)) if max_bias else np.zeros(n_head)


def softmax(logits: ArrayLike, *, sink: ArrayLike | None = None) -> NDArray[np.float64]:
    """Softmax over the last axis; -inf is a masked column and a row masked in full gives 0.

    A sink is one column more, neither scaled nor capped, whose share is thrown away: a number, or one for each row.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if sink is not None:
        column = np.broadcast_to(np.asarray(sink, dtype=np.float64)[..., None], (*logits.shape[:-1], 1))
        return softmax(np.concatenate([logits, column], axis=-1))[..., :-1]
    if logits.shape[-1] == 0:
        return logits
    top = logits.max(axis=-1, keepdims=True)
    weights: NDArray[np.float64] = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1.0)


def pool_scores(scores: ArrayLike, *, pool: Pool, kernel: int) -> NDArray[np.float64]:
    """1-D pooling with stride 1 over the last axis, as torch does it with padding kernel // 2.

    "max" ignores the padding; "avg" counts it as zeros and always divides by the full kernel.

    Parameters
    ----------
    scores : (..., n)
    kernel : odd, cells

    Returns
    -------
    (..., n) float64
    """
    scores = np.asarray(scores, dtype=np.float64)
    if pool not in POOLS:
        raise ValueError(f"pool = {pool!r} is unknown: use one of {', '.join(POOLS)}")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"pool_kernel = {kernel} is not odd and positive: use 1 (no pooling), 3, 5, 7, ..")
    if scores.shape[-1] == 0:
        return scores.copy()
    half = kernel // 2
    padding = [(0, 0)] * (scores.ndim - 1) + [(half, half)]
    padded = np.pad(scores, padding, constant_values=-np.inf if pool == "max" else 0.0)
    neighbours = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=-1)
    pooled: NDArray[np.float64] = neighbours.max(axis=-1) if pool == "max" else neighbours.sum(axis=-1) / kernel
    return pooled


def pool_kernels(cells: ArrayLike) -> NDArray[np.int64]:
    """Kernels of heads that keep so many cells before the recent ones: a quarter of them, odd, 3 to 31."""
    kernels: NDArray[np.int64] = np.clip(np.asarray(cells, dtype=np.int64) // 4 // 2 * 2 + 1, 3, 31)
    return kernels


def adapt_budget(
    scores: ArrayLike, cells: ArrayLike, *, floor: float, normalize: bool = False, protected: ArrayLike | None = None
) -> NDArray[np.int64]:
    """Prefix cells of the heads of a layer when the prompt moves them to where the scores are high (Ada-KV).

    Each head is guaranteed the share ``floor`` of its cells, rounded down, and the protected ones. The others are divided in proportion to how
    many of the layer's best cells are the head's, with the largest remainders rounded up. The authors round each head
    by itself, so that their sum drifts. Ties go to the lower head, then to the lower position.

    Parameters
    ----------
    scores : (n_head_kv, n_prefix)
    cells : (n_head_kv,) prefix cells, at most n_prefix each
    normalize : weight the scores of a head by the share that its best cells, as many as the mean budget, have in
        their sum, protected ones left out
    protected : (n_prefix,) bool, the cells that every head keeps: the best of all

    Returns
    -------
    (n_head_kv,) int64, cells with the same sum
    """
    scores, cells = np.asarray(scores, dtype=np.float64), np.asarray(cells, dtype=np.int64)
    n_head_kv, n_prefix = scores.shape
    total = int(cells.sum())
    if total in (0, scores.size):
        return cells
    mask = np.zeros(n_prefix, dtype=np.bool_) if protected is None else np.asarray(protected)
    scores = np.where(mask, 0, scores)
    if normalize:
        best = np.sort(scores, axis=1)[:, n_prefix - total // n_head_kv :].sum(axis=1)
        whole = scores.sum(axis=1)
        scores = scores * np.where(whole > 0, best / np.where(whole > 0, whole, 1), 1)[:, None]
    order = np.argsort(-np.where(mask, np.inf, scores), axis=None, kind="stable")[:total]
    counts = np.bincount(order // n_prefix, minlength=n_head_kv)
    sure = np.maximum((floor * cells).astype(np.int64), mask.sum())
    shared = counts * (total - int(sure.sum()))
    res = np.minimum(n_prefix, sure + shared // total)
    by_remainder = np.argsort(-(shared % total), kind="stable").tolist()
    while res.sum() < total:
        for ih in by_remainder:
            if res[ih] < n_prefix and res.sum() < total:
                res[ih] += 1
    adapted: NDArray[np.int64] = res
    return adapted


def value_norms(v: ArrayLike, wo: ArrayLike, *, n_head: int) -> NDArray[np.float64]:
    """L1 norm of what a value adds to the output of its layer per unit of attention, mean over the query heads.

    Parameters
    ----------
    v : (n_tokens, n_head_kv, head_dim)
    wo : (n_embd, n_head * head_dim) output matrix

    Returns
    -------
    (n_head_kv, n_tokens) float64
    """
    v, wo = np.asarray(v, dtype=np.float64), np.asarray(wo, dtype=np.float64)
    n_head_kv, head_dim = v.shape[1:]
    heads = wo.reshape(len(wo), n_head, head_dim)
    group = n_head // n_head_kv
    norms = [np.abs(v[:, h // group] @ heads[:, h].T).sum(axis=1) for h in range(n_head)]
    mean: NDArray[np.float64] = np.stack(norms).reshape(n_head_kv, group, -1).mean(axis=1)
    return mean


N_FIRST = 4  # tokens whose queries and cells take no part
N_AHEAD = 512  # positions behind a prompt
EXPECTED_EPSILON = 0.02


def mean_rotation(
    rope: Callable[[NDArray[np.float64], NDArray[np.int64]], NDArray[np.float64]], first: int, *, head_dim: int, n: int = N_AHEAD
) -> NDArray[np.float64]:
    """What positions first to first + n - 1 make of a query that is not rotated yet, on average: (head_dim, head_dim), x @ it.

    Parameters
    ----------
    rope : of x (n, n_heads, head_dim) and positions (n,)
    """
    turned = rope(np.tile(np.eye(head_dim), (n, 1, 1)), np.arange(first, first + n))
    mean: NDArray[np.float64] = turned.mean(axis=0)
    return mean


def expected_attention(
    q: ArrayLike, heads: ArrayLike, k: ArrayLike, *, rotation: ArrayLike, scale: float, softcap: float = 0.0
) -> NDArray[np.float64]:
    """Attention that queries are expected to pay if they are normally distributed, with the mean and covariance of those of the prompt.

    After Expected Attention (arXiv 2510.00636). The first cells have the score 1 and take no part.

    Parameters
    ----------
    q : (n, head_dim) queries of the group of one KV head, before RoPE
    heads : (n,) which query head each one is of; heads of which there is none do not count
    k : (n_prefix, head_dim) keys, after RoPE
    rotation : see :func:`mean_rotation`

    Returns
    -------
    (n_prefix,) float64, mean over the query heads
    """
    queries, keys = np.asarray(q, dtype=np.float64) @ np.asarray(rotation), np.asarray(k, dtype=np.float64)
    which, rest = np.asarray(heads), keys[N_FIRST:]
    scores = np.ones(len(keys))
    rows = []
    for head in np.unique(which):
        some = queries[which == head]
        mean, covariance = some.mean(axis=0), np.cov(some.T, bias=True)
        logits = scale * rest @ mean + scale**2 / 2 * np.einsum("nd,de,ne->n", rest, covariance, rest)
        rows.append(softmax(softcap * np.tanh(logits / softcap) if softcap else logits))
    scores[N_FIRST:] = np.mean(rows, axis=0)
    return scores


SPAN = 7  # tokens
N_ATTENDED = 120  # cells of a head on average that are all chosen by attention


def distances(v: ArrayLike) -> NDArray[np.float64]:
    """How far each value is from the mean of its head, the first tokens left out: (n_head_kv, n_tokens) of v (n_tokens, n_head_kv, head_dim)."""
    values = np.asarray(v, dtype=np.float64)
    mean = values[N_FIRST:].mean(axis=0) if len(values) > N_FIRST else 0.0
    far: NDArray[np.float64] = np.linalg.norm(values - mean, axis=-1).T
    return far


def outlying_scores(v: Sequence[ArrayLike], *, n_prefix: int) -> NDArray[np.float64]:
    """How far the values of each token are from those of the others, the same for all heads of a layer.

    Parameters
    ----------
    v : of this layer and of those before, each (n_tokens, n_head_kv, head_dim)

    Returns
    -------
    (n_prefix,) float64, pooled; the first tokens take no part
    """
    tokens = np.zeros(n_prefix)
    for layer in v:
        far = distances(np.asarray(layer)[:n_prefix])[:, N_FIRST:]
        if far.size:
            spread = far.std(axis=1, keepdims=True)
            tokens[N_FIRST:] += ((far - far.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)).sum(axis=0)
    return pool_scores(pool_scores(tokens, pool="avg", kernel=SPAN), pool="max", kernel=SPAN)


def certain_first(scores: ArrayLike, rest: ArrayLike, n_first: ArrayLike, *, protected: ArrayLike) -> NDArray[np.float64]:
    """The best cells of each head, as many as n_first and protected ones among them, are certain; the others have the score ``rest``."""
    mask = np.asarray(protected)
    first = select(np.where(mask, np.inf, np.asarray(scores, dtype=np.float64)), np.maximum(n_first, mask.sum()))
    res = np.array(rest, dtype=np.float64)
    for row, certain in zip(res, first):
        row[certain] = np.finfo(np.float64).max
    return res


def attended_first(cells: ArrayLike, *, n_mean: int) -> NDArray[np.int64]:
    """Cells of each head that rank "attention+outlying" chooses by attention: half of them, the odd one included, or as many as a mean of
    N_ATTENDED gives it, all where that is not less than the budget.

    Parameters
    ----------
    cells : (n_head_kv,) prefix cells that each head keeps
    n_mean : prefix cells of a head on average

    Returns
    -------
    (n_head_kv,) int64
    """
    n = np.asarray(cells, dtype=np.int64)
    first: NDArray[np.int64] = np.maximum(n - n // 2, n * N_ATTENDED // max(n_mean, N_ATTENDED))
    return first


def critical_scores(scores: ArrayLike, norms: ArrayLike, cells: ArrayLike, *, protected: ArrayLike | None = None) -> NDArray[np.float64]:
    """Scores of policy "criticalkv": the first half of a head's cells by score are certain, the odd one included; the
    other cells score what they did times the norm of their value.

    Parameters
    ----------
    scores, norms : (n_head_kv, n_prefix)
    cells : (n_head_kv,) prefix cells that each head keeps
    protected : (n_prefix,) bool, cells that are certain too and part of the first half

    Returns
    -------
    (n_head_kv, n_prefix) float64, the largest number where a cell is certain: protected ones, inf, stay where there is no room for both
    """
    scores, cells = np.asarray(scores, dtype=np.float64), np.asarray(cells)
    mask = np.zeros(scores.shape[1], dtype=np.bool_) if protected is None else protected
    return certain_first(scores, scores * np.asarray(norms, dtype=np.float64), cells - cells // 2, protected=mask)


# select -> compact


def select(scores: ArrayLike, k: ArrayLike) -> list[NDArray[np.int32]]:
    """Positions of the k largest scores of each head; ties go to the lower position.

    The authors leave ties to an unstable sort; max pooling makes them the normal case, so they are fixed here.

    Parameters
    ----------
    scores : (n_head_kv, n_prefix)
    k : cells, one number or one per KV head; more than n_prefix means all

    Returns
    -------
    n_head_kv ascending int32 arrays
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2:
        raise ValueError(f"scores has {scores.ndim} dimensions, not 2: pass (n_head_kv, n_prefix)")
    if np.isnan(scores).any():
        raise ValueError(f"scores holds {int(np.isnan(scores).sum())} NaN: they cannot be ordered, check q and k")
    counts = np.broadcast_to(np.asarray(k), scores.shape[:1])
    if (counts < 0).any():
        raise ValueError(f"k = {counts.min()} is negative: give the number of cells to keep, 0 or more")
    order = np.argsort(-scores, axis=-1, kind="stable")
    return [np.sort(row[:n]).astype(np.int32) for row, n in zip(order, counts.tolist())]


def keep(scores: ArrayLike, cells: ArrayLike, *, kv_size: int, recent: int, n_tokens: int) -> list[NDArray[np.int32]]:
    """Positions each KV head keeps of a prompt: its best prefix cells and the recent ones.

    A prompt whose prefix is shorter than the average budget ``kv_size - recent`` is not compressed at all, whatever
    the budget of a single head (HeadKV line 444). Otherwise a head with more cells than prefix keeps the prefix and
    the surplus is lost.

    Parameters
    ----------
    scores : (n_head_kv, n_prefix), n_prefix = max(0, n_tokens - recent)
    cells : (n_head_kv,) cells the head may keep, recent ones included
    n_tokens : length of the prompt

    Returns
    -------
    n_head_kv ascending int32 arrays
    """
    scores, cells = np.asarray(scores, dtype=np.float64), np.asarray(cells)
    n_prefix = max(0, n_tokens - recent)
    if scores.ndim != 2 or cells.shape != scores.shape[:1] or scores.shape[1] != n_prefix:
        raise ValueError(f"scores {scores.shape} and cells {cells.shape} do not fit: pass (n_head_kv, {n_prefix}) and (n_head_kv,)")
    if kv_size - recent > n_prefix:
        return [np.arange(n_tokens, dtype=np.int32) for _ in cells]
    tail = np.arange(n_prefix, n_tokens, dtype=np.int32)
    return [np.concatenate([kept, tail]) for kept in select(scores, cells - recent)]


def compact(x: NDArray[Any], positions: Sequence[NDArray[np.integer]]) -> list[NDArray[Any]]:
    """Rows of K or V that each head keeps.

    Parameters
    ----------
    x : (n_tokens, n_head_kv, head_dim)
    positions : one index array per KV head

    Returns
    -------
    n_head_kv arrays (n_cells, head_dim)
    """
    if len(positions) != x.shape[1]:
        raise ValueError(f"positions has {len(positions)} lists for {x.shape[1]} KV heads: pass one per head")
    return [x[rows, ih] for ih, rows in enumerate(positions)]


# fit

N_REFERENCES = 512  # of a prompt at most
N_REFERENCES_HELD = 1024  # the engine has room for
HELD_OUT = 4  # every so many references one is not fitted


def reference_positions(n_tokens: int) -> NDArray[np.int32]:
    """Positions of the queries by which values are fitted: spread evenly over a prompt, ascending.

    The engine does not know how long a prompt will be. It holds the queries of every token at first, of every second one when
    these have become too many, and so on, and looks at 512 of those that it holds at the end.
    """
    step = 1
    while n_tokens > N_REFERENCES_HELD * step:
        step *= 2
    held = n_tokens // step
    n = min(held, N_REFERENCES)
    return ((np.arange(1, n + 1) * held // max(n, 1)) * step - 1).astype(np.int32)


def reference_heads(positions: ArrayLike, *, n_head: int, n_head_kv: int) -> NDArray[np.int64]:
    """Query head of each group whose query is taken at each position: multiples of the golden ratio spread over the group.

    Returns
    -------
    (n_positions, n_head_kv) int64
    """
    group = n_head // n_head_kv
    i = np.asarray(positions, dtype=np.uint64)[:, None] * np.uint64(n_head_kv) + np.arange(1, n_head_kv + 1, dtype=np.uint64)
    mixed = np.right_shift(np.multiply(i, np.uint64(0x9E3779B97F4A7C15)), np.uint64(40))
    of_group = np.remainder(mixed, np.uint64(group)).astype(np.int64)
    heads: NDArray[np.int64] = np.arange(n_head_kv, dtype=np.int64) * group + of_group
    return heads


def fit_values(
    q: ArrayLike,
    positions: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    kept: ArrayLike,
    *,
    scale: float,
    softcap: float = 0.0,
    ridge: float = 0.1,
    sinks: ArrayLike | None = None,
) -> tuple[NDArray[np.float64], float, float]:
    """New values for the kept cells of one KV head, by which they answer the prompt's own queries as all cells do.

    Ridge regression that is pulled to the old values. Every fourth query is held out and decides whether the fit is taken.

    Parameters
    ----------
    q : (n, head_dim) reference queries, after RoPE
    positions : (n,) theirs, ascending; a query sees the cells up to its own
    k, v : (n_tokens, head_dim) of the head
    kept : ascending positions of its cells
    sinks : (n,) that of the query head of each reference, see :func:`softmax`; None = none

    Returns
    -------
    (n_kept, head_dim) float64 values, and the mean squared residual of the queries that are held out, relative to their answers, before
    and after; as before, and the old values, where the fit makes it no smaller
    """
    queries, keys, values = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    at, cells = np.asarray(positions), np.asarray(kept)
    is_held = np.arange(len(queries)) % HELD_OUT == HELD_OUT - 1
    sees = at >= cells[0]  # what sees no kept cell has nothing to say
    queries, at, is_held = queries[sees], at[sees], is_held[sees]
    sink = None if sinks is None else np.asarray(sinks)[sees]

    def probs(rows: NDArray[Any]) -> NDArray[np.float64]:
        return softmax(np.where(rows <= at[:, None], _logits(queries, keys[rows], scale=scale, softcap=softcap), -np.inf), sink=sink)

    y, x = probs(np.arange(len(keys))) @ values, probs(cells)
    residual = y - x @ values[cells]
    own, rest = x[~is_held], residual[~is_held]
    gram = own.T @ own
    change = np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), own.T @ rest)
    whole = (y[is_held] ** 2).sum()
    before = (residual[is_held] ** 2).sum()
    after = ((residual - x @ change)[is_held] ** 2).sum()
    if not after < before:
        return values[cells], before / whole if whole else 0.0, before / whole if whole else 0.0
    return values[cells] + change, before / whole, after / whole


# attend


def attend(
    q: ArrayLike,
    k_list: Sequence[ArrayLike],
    v_list: Sequence[ArrayLike],
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Attention of one token when every KV head has its own number of cells; order of cells is irrelevant.

    Parameters
    ----------
    q : (n_head, head_dim), after RoPE
    k_list, v_list : n_head_kv arrays (n_cells, head_dim); an empty head gives 0
    sinks : (n_head,) a logit of each query head that belongs to no cell, see :func:`softmax`; None = none

    Returns
    -------
    (n_head, head_dim of V) float64
    """
    q = np.asarray(q, dtype=np.float64)
    if not k_list or len(k_list) != len(v_list) or len(q) % len(k_list):
        raise ValueError(f"{len(q)} queries, {len(k_list)} K and {len(v_list)} V do not fit: pass one K and V per KV head")
    group = len(q) // len(k_list)
    out = []
    for h, (row, sink) in enumerate(zip(q, _each_sink(sinks, len(q)), strict=True)):
        k = np.asarray(k_list[h // group], dtype=np.float64)
        v = np.asarray(v_list[h // group], dtype=np.float64)
        out.append(softmax(_logits(row, k, scale=scale, softcap=softcap), sink=sink) @ v)
    return np.stack(out)


# forward pass


class ReferenceModel:
    """Forward pass of a small dense llama, qwen2 or qwen3 GGUF in float64, with per-head compression.

    K and V of every token stay in memory; compression only changes which of them a head attends to. The positions
    are the true ones throughout.

    Parameters
    ----------
    path : GGUF file; any type that gguf-py can dequantise
    kv_round : dtype K and V are rounded to, as a cache stores them, e.g. np.float16; None keeps float64

    Attributes
    ----------
    q : n_layer arrays (n_past, n_head, head_dim) float64, after RoPE
    k, v : n_layer arrays (n_past, n_head_kv, head_dim) float64, K after RoPE, rounded to ``kv_round``
    positions : [n_layer][n_head_kv] ascending int32 arrays, the cells that decoding attends to
    n_past : tokens seen since the last prefill
    """

    def __init__(self, path: str | os.PathLike[str], *, kv_round: DTypeLike | None = None) -> None:
        header = read_header(path)
        self.kv_round = kv_round
        self.arch = header.arch
        if self.arch not in ("llama", "qwen2", "qwen3"):
            raise ValueError(f"general.architecture = {self.arch!r}: the oracle knows llama, qwen2 and qwen3")
        self._read_hparams(header)
        self.weights = {name: values.astype(np.float64) for name, values in header.weights()}
        self.n_vocab = len(self._weight("token_embd.weight"))
        self._reset()

    def _read_hparams(self, header: Header) -> None:
        def get(key: str, default: Any = None) -> Any:
            value = header.value(f"{self.arch}.{key}", default)
            if value is None:
                raise ValueError(f"key '{self.arch}.{key}' is missing in the GGUF: the oracle needs it, write the model again with it")
            return value

        if get("rope.scaling.type", "none") != "none":
            raise ValueError(f"rope.scaling.type = {get('rope.scaling.type')!r}: the oracle has no RoPE scaling")
        self.n_layer = int(get("block_count"))
        self.n_embd = int(get("embedding_length"))
        self.n_head = _one_value(get("attention.head_count"), "attention.head_count")
        self.n_head_kv = _one_value(get("attention.head_count_kv", self.n_head), "attention.head_count_kv")
        self.head_dim = int(get("attention.key_length", self.n_embd // self.n_head))
        self.n_rot = int(get("rope.dimension_count", self.head_dim))
        self.rope_theta = float(get("rope.freq_base", 10000.0))
        self.rms_eps = float(get("attention.layer_norm_rms_epsilon"))
        self.scale = self.head_dim**-0.5

    def _reset(self) -> None:
        self.n_past = 0
        self.q = [np.zeros((0, self.n_head, self.head_dim)) for _ in range(self.n_layer)]
        self.k = [np.zeros((0, self.n_head_kv, self.head_dim)) for _ in range(self.n_layer)]
        self.v = [np.zeros((0, self.n_head_kv, self.head_dim)) for _ in range(self.n_layer)]
        self.positions = [[np.zeros(0, np.int32) for _ in range(self.n_head_kv)] for _ in range(self.n_layer)]

    def prefill(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """Forget everything and run a prompt with full causal attention.

        Parameters
        ----------
        tokens : (n_tokens,) token ids, BOS included if the model wants one

        Returns
        -------
        (n_tokens, n_vocab) float64, logits
        """
        self._reset()
        return self._forward(self._check_tokens(tokens), self._attend_prompt)

    def decode(self, token: int) -> NDArray[np.float64]:
        """Append one token to every head and attend to the kept cells and all appended ones.

        Returns
        -------
        (n_vocab,) float64, logits
        """
        logits: NDArray[np.float64] = self._forward(self._check_tokens([token]), self._attend_kept)[0]
        return logits

    def scores(
        self,
        il: int,
        *,
        window: int,
        recent: int | None = None,
        power: int = 1,
        pool: Pool = "max",
        pool_kernel: int = 7,
        q_round: DTypeLike | None = None,
    ) -> NDArray[np.float64]:
        """Scores of layer ``il`` for all cells before the recent ones (None = the window), see :func:`score`.

        Returns
        -------
        (n_head_kv, n_prefix) float64
        """
        q, k = window_queries(self.q[il], window=window), self.k[il]
        n_prefix = max(0, len(k) - (window if recent is None else recent))
        return score(q, k, scale=self.scale, n_prefix=n_prefix, power=power, pool=pool, pool_kernel=pool_kernel, q_round=q_round)

    def compress(
        self,
        cells: ArrayLike,
        *,
        kv_size: int,
        window: int,
        recent: int | None = None,
        power: int = 1,
        pool: Pool = "max",
        pool_kernel: int = 7,
        q_round: DTypeLike | None = None,
    ) -> list[list[NDArray[np.int32]]]:
        """Choose the cells that decoding attends to; call it once, after :meth:`prefill`.

        Parameters
        ----------
        cells : (n_layer, n_head_kv) cells each head may keep, recent ones included, as :func:`budget_kv` gives
        kv_size : cells per head on average, recent ones included; decides whether the prompt is compressed at all

        Returns
        -------
        [n_layer][n_head_kv] ascending int32 arrays of positions
        """
        cells = np.asarray(cells)
        if cells.shape != (self.n_layer, self.n_head_kv):
            raise ValueError(f"cells has shape {cells.shape}, the model {(self.n_layer, self.n_head_kv)}: use budget_kv")
        recent = window if recent is None else recent
        _check_sizes(kv_size=kv_size, recent=recent)
        how: dict[str, Any] = {"power": power, "pool": pool, "pool_kernel": pool_kernel, "q_round": q_round}
        kept = []
        for il in range(self.n_layer):
            scores = self.scores(il, window=window, recent=recent, **how)
            kept.append(keep(scores, cells[il], kv_size=kv_size, recent=recent, n_tokens=self.n_past))
        self.retain(kept)
        return kept

    def retain(self, positions: Sequence[Sequence[ArrayLike]]) -> None:
        """Attend to exactly these cells from now on, [n_layer][n_head_kv] positions below ``n_past``."""
        if len(positions) != self.n_layer or any(len(heads) != self.n_head_kv for heads in positions):
            raise ValueError(f"positions is not [{self.n_layer}][{self.n_head_kv}] lists: pass one per layer and KV head")
        kept = [[np.unique(np.asarray(rows, dtype=np.int32)) for rows in heads] for heads in positions]
        for rows in (rows for heads in kept for rows in heads if len(rows)):
            if rows[0] < 0 or rows[-1] >= self.n_past:
                raise ValueError(f"positions {rows[0]}..{rows[-1]} leave 0..{self.n_past - 1}: only seen tokens can be kept")
        self.positions = kept

    def _check_tokens(self, tokens: ArrayLike) -> NDArray[np.int64]:
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or len(ids) == 0:
            raise ValueError(f"tokens has shape {ids.shape}: pass a list of at least one token id")
        if ids.min() < 0 or ids.max() >= self.n_vocab:
            raise ValueError(f"token ids {ids.min()}..{ids.max()} leave 0..{self.n_vocab - 1}: use the model's tokenizer")
        return ids

    def _forward(self, tokens: NDArray[np.int64], attention: Any) -> NDArray[np.float64]:
        x = self._weight("token_embd.weight")[tokens]
        position = np.arange(self.n_past, self.n_past + len(tokens))
        for il in range(self.n_layer):
            self._append_qkv(il, self._rms_norm(x, f"blk.{il}.attn_norm.weight"), position)
            out = attention(il).reshape(len(tokens), -1)
            x = x + self._linear(out, f"blk.{il}.attn_output")
            x = x + self._ffn(il, self._rms_norm(x, f"blk.{il}.ffn_norm.weight"))
        self.n_past += len(tokens)
        output = self.weights.get("output.weight")
        if output is None:
            output = self._weight("token_embd.weight")
        return self._rms_norm(x, "output_norm.weight") @ output.T

    def _append_qkv(self, il: int, x: NDArray[np.float64], position: NDArray[np.int64]) -> None:
        q = self._linear(x, f"blk.{il}.attn_q").reshape(len(x), self.n_head, self.head_dim)
        k = self._linear(x, f"blk.{il}.attn_k").reshape(len(x), self.n_head_kv, self.head_dim)
        v = self._linear(x, f"blk.{il}.attn_v").reshape(len(x), self.n_head_kv, self.head_dim)
        if self.arch == "qwen3":
            q = self._rms_norm(q, f"blk.{il}.attn_q_norm.weight")
            k = self._rms_norm(k, f"blk.{il}.attn_k_norm.weight")
        self.q[il] = np.concatenate([self.q[il], self.rope(q, position)])
        self.k[il] = np.concatenate([self.k[il], _round(self.rope(k, position), self.kv_round)])
        self.v[il] = np.concatenate([self.v[il], _round(v, self.kv_round)])
        rows = position.astype(np.int32)
        self.positions[il] = [np.concatenate([kept, rows]) for kept in self.positions[il]]

    def _attend_prompt(self, il: int) -> NDArray[np.float64]:
        """Full causal attention of a prompt that starts at position 0, (n_tokens, n_head, head_dim)."""
        q, k, v = self.q[il], self.k[il], self.v[il]
        visible = np.tri(len(q), dtype=bool)
        out = np.empty_like(q)
        for h in range(self.n_head):
            ih = h * self.n_head_kv // self.n_head
            logits = _logits(q[:, h], k[:, ih], scale=self.scale, softcap=0.0)
            out[:, h] = softmax(np.where(visible, logits, -np.inf)) @ v[:, ih]
        return out

    def _attend_kept(self, il: int) -> NDArray[np.float64]:
        """Attention of the last token to the kept cells, (1, n_head, head_dim)."""
        k, v = (compact(x, self.positions[il]) for x in (self.k[il], self.v[il]))
        return attend(self.q[il][-1], k, v, scale=self.scale)[None]

    def _ffn(self, il: int, x: NDArray[np.float64]) -> NDArray[np.float64]:
        gate = self._linear(x, f"blk.{il}.ffn_gate")
        return self._linear(gate / (1 + np.exp(-gate)) * self._linear(x, f"blk.{il}.ffn_up"), f"blk.{il}.ffn_down")

    def rope(self, x: NDArray[np.float64], position: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rotate (n_tokens, n_heads, head_dim): pairs (2i, 2i+1) in llama, (i, i + n_rot/2) in qwen2 and qwen3."""
        half = self.n_rot // 2
        freq = self.rope_theta ** (-np.arange(half) / half)
        factors = self.weights.get("rope_freqs.weight")
        if factors is not None:
            freq = freq / factors
        angle = position[:, None, None] * freq
        cos, sin = np.cos(angle), np.sin(angle)
        if self.arch == "llama":
            first, second = slice(0, self.n_rot, 2), slice(1, self.n_rot, 2)
        else:
            first, second = slice(0, half), slice(half, self.n_rot)
        out = x.copy()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out

    def _rms_norm(self, x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        rms: NDArray[np.float64] = np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.rms_eps)
        return x / rms * self._weight(name)

    def _linear(self, x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        out = x @ self._weight(f"{name}.weight").T
        bias = self.weights.get(f"{name}.bias")
        return out if bias is None else out + bias

    def _weight(self, name: str) -> NDArray[np.float64]:
        if name not in self.weights:
            raise ValueError(f"tensor {name!r} is missing: the oracle reads dense llama, qwen2 and qwen3 models")
        return self.weights[name]


# shared by the stages


def _logits(q: NDArray[np.float64], k: NDArray[np.float64], *, scale: float, softcap: float) -> NDArray[np.float64]:
    logits: NDArray[np.float64] = scale * (q @ k.T)
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    return logits


def _each_sink(sinks: ArrayLike | None, n_head: int) -> list[float] | list[None]:
    if sinks is None:
        return [None] * n_head
    found = np.asarray(sinks, dtype=np.float64)
    if found.shape != (n_head,):
        raise ValueError(f"sinks have shape {found.shape}: pass one of each of the {n_head} query heads")
    res: list[float] = found.tolist()
    return res


def _round(x: ArrayLike, dtype: DTypeLike | None) -> NDArray[np.float64]:
    x = np.asarray(x)
    rounded: NDArray[np.float64] = (x if dtype is None else x.astype(dtype)).astype(np.float64)
    return rounded


def _check_importance(importance: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(importance, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"importance has shape {values.shape}: pass (n_layer, n_head)")
    with np.errstate(over="ignore", invalid="ignore"):
        low, high, total = values.min(), values.max(), values.sum()
    if not (0 <= low <= high < np.inf and 0 < total < np.inf):  # NaN fails every comparison
        raise ValueError(f"importance from {low} to {high}, sum {total}: every value must be finite and >= 0, and one above 0")
    return values


def _check_sizes(*, kv_size: int, recent: int) -> None:
    if recent < 1:
        raise ValueError(f"recent = {recent} is below 1: give a positive number of tokens")
    if kv_size <= recent:
        raise ValueError(f"kv_size = {kv_size} is not above recent = {recent}: it includes the recent cells, use at least {recent + 1}")


def _check_heads(q: NDArray[np.float64], k: NDArray[np.float64]) -> None:
    if q.ndim != 3 or k.ndim != 3 or not 1 <= len(q) <= len(k) or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q_window {q.shape} and k {k.shape} do not fit: pass (n_window, n_head, head_dim) and "
            "(n_tokens, n_head_kv, head_dim) with 1 <= n_window <= n_tokens and n_head a multiple of n_head_kv"
        )


def _one_value(value: Any, name: str) -> int:
    values = set(np.atleast_1d(value).tolist())
    if len(values) != 1:
        raise ValueError(f"{name} = {sorted(values)} differs between layers: the oracle wants one number")
    return int(values.pop())
