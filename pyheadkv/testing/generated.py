"""What an eviction of generated tokens keeps, by the NumPy definition: out of what the engine holds just before it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _lib
from . import reference
from .oracle import FLOORS, Kept, Shape, budget_of, choices, layers_of, softmax_of

SHARE = 0.07  # of attention in the rank "redundancy"
NEAR = 0.5  # cosine of keys of which the last one does not count


def is_due(n_past: int, *, n_prompt: int, n_settled: int, kv_generated: int, slack: int, window: int) -> bool:
    """Whether an eviction comes before the next batch; ``n_settled``: generated tokens at the last one but for its window, 0 = none."""
    return n_past - n_prompt - n_settled >= (window if n_settled else kv_generated) + slack


def redundancy_scores(scores: ArrayLike, k: ArrayLike) -> NDArray[np.float64]:
    """Attention less redundancy of one head (R-KV, ``r1_kv.py``): of keys that are near to each other the last one counts as new.

    Parameters
    ----------
    scores : (n,) attention, pooled
    k : (n, head_dim)

    Returns
    -------
    (n,) float64
    """
    attention, keys = np.asarray(scores, dtype=np.float64), np.asarray(k, dtype=np.float64)
    keys = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-12)
    cosine = keys @ keys.T
    np.fill_diagonal(cosine, 0.0)
    for row in cosine:
        near = np.flatnonzero(row > NEAR)
        if len(near):
            row[near[-1]] = 0.0
    total = attention.sum()
    return SHARE * attention / (total if total > 0 else 1) - (1 - SHARE) * reference.softmax(cosine.mean(axis=0))


def budget(llm: Any, shape: Shape, n_generated: int) -> NDArray[np.int64]:
    """Cells of each head before the last ``window`` tokens."""
    options, stats = llm.kv_options, llm.kv_stats()
    is_all = options.kv_generated_scope == "all"
    n_more = min(options.kv_size, stats.n_prompt) if is_all else 0
    n_candidates = n_generated - options.window + (stats.n_prompt if is_all else 0)
    changed = replace(options, kv_size=options.kv_generated + n_more, recent=options.window, protect=options.protect if is_all else ())
    seen = SimpleNamespace(kv_options=changed, policy=llm.policy, _importance=llm._importance, _replay=llm._replay)
    if choices(llm)[0] == "all":
        return np.full((shape.n_layer, shape.n_head_kv), options.kv_generated - options.window, dtype=np.int64)
    return budget_of(seen, shape, n_candidates)


def protected(llm: Any, positions: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether cells of the prompt are sinks or in a protected span."""
    options, n_prompt = llm.kv_options, llm.kv_stats().n_prompt
    mask = reference.protected(options.protect, sinks=options.sinks or 0, n_prefix=n_prompt)
    inside = positions < n_prompt
    found: NDArray[np.bool_] = inside & mask[np.where(inside, positions, 0)]
    return found


def positions_of(llm: Any, il: int, ih: int) -> NDArray[np.int32]:
    """Positions of all cells that a head holds, those of the tail too."""
    n_cells = int(llm.kv_stats().n_cells[il, ih])
    listed = llm.kv_positions(il, ih)
    tail = np.arange(llm.n_tokens - (n_cells - len(listed)), llm.n_tokens, dtype=np.int32)
    return np.concatenate([listed, tail])


def kept_of(llm: Any, shape: Shape, n_new: int = 1) -> Kept:
    """Cells that an eviction before ``n_new`` tokens would leave to every head of sequence 0, the last tokens included."""
    options, n_prompt = llm.kv_options, llm.kv_stats().n_prompt
    window, is_all = options.window, options.kv_generated_scope == "all"
    cells, group = budget(llm, shape, llm.n_tokens - n_prompt), shape.n_head // shape.n_head_kv
    kept = []
    for il in layers_of(shape):
        how = softmax_of(llm, il)
        q = llm._read_floats(_lib.lib.headkv_read_window, shape.n_head * shape.head_dim, window, il).reshape(window, shape.n_head, -1)
        of_heads: list[tuple[NDArray[np.int32], NDArray[np.float64]]] = []
        held = [positions_of(llm, il, ih) for ih in range(shape.n_head_kv)]
        for ih, positions in enumerate(held):
            n_prefix = len(positions) - window
            first = 0 if is_all else int(np.searchsorted(positions, n_prompt))
            candidates = positions[first:n_prefix]
            if options.kv_generated_rank == "recent":
                scores = np.arange(len(candidates), dtype=np.float64)
            else:
                k = llm._read_floats(_lib.lib.headkv_read_cells, shape.head_dim, len(positions), il, ih, False)
                sinks = how["sinks"] and how["sinks"][ih * group : (ih + 1) * group]
                scores = reference.score(
                    q[:, ih * group : (ih + 1) * group],
                    k[:, None],
                    n_prefix=n_prefix,
                    power=options.power,
                    pool=options.pool,
                    pool_kernel=1,
                    scale=how["scale"],
                    softcap=how["softcap"],
                    sinks=sinks,
                )[0, first:]
                kernel = options.pool_kernel or int(reference.pool_kernels(cells[il])[ih])
                scores = reference.pool_scores(scores, pool=options.pool, kernel=kernel)
                if options.kv_generated_rank == "redundancy":
                    scores = redundancy_scores(scores, k[first:n_prefix])
            of_heads.append((candidates, np.where(protected(llm, candidates), np.inf, scores)))
        sure = [int(np.isinf(scores).sum()) for _, scores in of_heads]
        n_keep = np.maximum(np.minimum(cells[il], [len(found) for found, _ in of_heads]), sure)
        if choices(llm)[0] in FLOORS:
            n_most = max(len(found) for found, _ in of_heads)
            padded = np.stack([np.pad(scores, (0, n_most - len(scores)), constant_values=-np.inf) for _, scores in of_heads])
            floor = FLOORS[choices(llm)[0]] if options.adakv_floor is None else options.adakv_floor
            n_keep = reference.adapt_budget(padded, n_keep, floor=floor, normalize=options.adakv_normalize)
        rows = []
        for positions, (candidates, scores), n in zip(held, of_heads, n_keep.tolist(), strict=True):
            before = positions[: len(positions) - window - len(candidates)]
            room = llm.n_ctx() - (options.kv_generated_slack + n_new - 1) - len(before) - window  # n_ctx bounds what a head holds
            best = np.sort(np.argsort(-scores, kind="stable")[: min(n, max(0, room))])
            rows.append(np.concatenate([before, candidates[best], positions[len(positions) - window :]]).astype(np.int32))
        kept.append(rows)
    return kept
