"""What a context keeps of its prompt, and the values that it fits, by the NumPy definition: out of the engine's own queries, keys and values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import _lib
from ..options import DEFAULT_BETA, policy_traits
from . import reference

SINKS = {"recent": 4, "value": 4, "attention*value": 4, "expected": 4, "outlying": 4, "outlying+value": 4, "output": 4}  # of the ranks
FLOORS = {"adaptive": 0.2, "importance+adaptive": 0.5}  # budgets by which the prompt moves cells within a layer
F16 = 1  # ggml type

Kept = list[list[NDArray[np.int32]]]
Rows = dict[tuple[int, int], NDArray[np.float32]]  # by layer and KV head
Rope = Callable[[NDArray[np.float64], NDArray[np.int64]], NDArray[np.float64]]
Fitted = dict[tuple[int, int], tuple[NDArray[np.float64], float, float]]


class Shape(Protocol):
    """Heads of a model whose compressed layers are alike.

    ``layers``, if it has one, says which these are, else it is all of them; ``head_dim_v`` is the size of V, else it is that of K.
    """

    @property
    def n_layer(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_head_kv(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


# what the engine holds


def layers_of(shape: Shape) -> list[int]:
    """Layers that are compressed."""
    return list(getattr(shape, "layers", None) or range(shape.n_layer))


def _dim(shape: Shape, v: bool) -> int:
    return int(getattr(shape, "head_dim_v", shape.head_dim)) if v else shape.head_dim


def heads(shape: Shape) -> list[tuple[int, int]]:
    """Layer and KV head of each."""
    return [(il, ih) for il in layers_of(shape) for ih in range(shape.n_head_kv)]


def softmax_of(llm: Any, il: int) -> dict[str, Any]:
    """How the attention of a layer is normalised: ``scale``, ``softcap``, ALiBi's ``max_bias`` and the ``sinks`` of its query heads, or None."""
    scale, softcap, max_bias, *sinks = llm._read_softmax(il).tolist()
    return {"scale": scale, "softcap": softcap, "max_bias": max_bias, "sinks": sinks or None}


def uncapped(llm: Any, il: int) -> dict[str, Any]:
    """The same for a definition that has no cap."""
    found = softmax_of(llm, il)
    if found.pop("softcap"):
        raise ValueError(f"layer {il} caps its logits, which this definition does not")
    return found


def head_rows(llm: Any, shape: Shape, il: int, *, v: bool) -> NDArray[np.float32]:
    """K or V of a staged prompt, (n_tokens, n_head_kv, head_dim)."""
    rows = [llm._read_floats(_lib.lib.headkv_read_cells, _dim(shape, v), llm.n_ctx(), il, ih, v) for ih in range(shape.n_head_kv)]
    return np.stack(rows, axis=1)


def rows(llm: Any, shape: Shape, *, v: bool) -> Rows:
    """K or V of every head, as the cache holds them."""
    return {head: llm._read_floats(_lib.lib.headkv_read_cells, _dim(shape, v), llm.n_ctx(), *head, v) for head in heads(shape)}


def kept_by(llm: Any, shape: Shape) -> Kept:
    """Positions that every head kept."""
    return [[llm.kv_positions(il, ih) for ih in range(shape.n_head_kv)] for il in layers_of(shape)]


def references(llm: Any, shape: Shape, il: int) -> NDArray[np.float32]:
    """Reference queries of a prompt that is not compressed yet, (n, n_head_kv, head_dim)."""
    n_row = shape.n_head_kv * shape.head_dim
    found: NDArray[np.float32] = llm._read_floats(_lib.lib.headkv_read_refs, n_row, reference.N_REFERENCES, il)
    return found.reshape(-1, shape.n_head_kv, shape.head_dim)


def all_queries(llm: Any, shape: Shape) -> dict[int, NDArray[np.float32]]:
    """Queries of a staged prompt by layer, (n_tokens, n_head, head_dim), seen through a window that moves with the ubatches."""
    from ..llama import Llama

    params, device = llm.context_params, llm.model_params
    n_ubatch = params.n_ubatch
    seen = Llama(
        llm.model_path,
        kv_size=n_ubatch + 1,
        preset="paper",
        window=n_ubatch,
        policy="snapkv",
        prefill="token",
        attend=llm.kv_options.attend,
        n_ctx=llm.n_ctx(),
        n_ubatch=n_ubatch,
        n_threads=llm.n_threads,
        n_threads_batch=llm.n_threads_batch,
        type_k=params.type_k,
        type_v=params.type_v,
        n_gpu_layers=device.n_gpu_layers,
        split_mode=device.split_mode,
        main_gpu=device.main_gpu,
        verbose=False,
    )
    parts: dict[int, list[NDArray[np.float32]]] = {il: [] for il in layers_of(shape)}
    prompt = llm.input_ids[: llm.n_tokens].tolist()
    for i in range(0, len(prompt), n_ubatch):
        seen.eval(prompt[i : i + n_ubatch])
        n = min(n_ubatch, len(prompt) - i)
        for il, found in parts.items():
            found.append(seen._read_floats(_lib.lib.headkv_read_window, shape.n_head * shape.head_dim, n_ubatch, il)[-n:])
    return {il: np.concatenate(found).reshape(-1, shape.n_head, shape.head_dim) for il, found in parts.items()}


# what the definition makes of it


def choices(llm: Any) -> tuple[str, str, str]:
    """Budget, rank and fit in use."""
    traits = policy_traits(llm.policy)
    return traits.budget.decode(), traits.rank.decode(), traits.fit.decode()


def scores_of(llm: Any, shape: Shape, il: int, cells: NDArray[np.int64]) -> NDArray[np.float64]:
    """Scores of a layer, (n_head_kv, n_prefix); cells: prefix cells of its heads."""
    options, rank = llm.kv_options, choices(llm)[1]
    n_prefix = llm.n_tokens - options.recent
    if rank == "recent":
        return np.tile(np.arange(n_prefix, dtype=np.float64), (shape.n_head_kv, 1))
    if rank == "value":
        return lengths_of(llm, shape, il, n_prefix)
    if rank == "output":
        return norms_of(llm, shape, il, n_prefix)
    if rank == "expected":
        return (expected_of(llm, shape, il, n_prefix) + reference.EXPECTED_EPSILON) * lengths_of(llm, shape, il, n_prefix)
    if rank in ("outlying", "outlying+value"):
        before = values_up_to(llm, shape, il)
        spans = np.tile(reference.outlying_scores(before, n_prefix=n_prefix), (shape.n_head_kv, 1))
        if rank == "outlying":
            return spans
        n_first, sure = np.minimum(cells, options.kv_size - options.recent), protected_by(llm, n_prefix)
        return reference.certain_first(spans, reference.distances(before[-1][:n_prefix]), n_first, protected=sure)
    if rank == "sums":
        q = all_queries(llm, shape)[il]
        sums = reference.attention_sums(q, head_rows(llm, shape, il, v=False), q_round=np.float16, **uncapped(llm, il))
        return sums[:, :n_prefix]
    q = llm._read_floats(_lib.lib.headkv_read_window, shape.n_head * shape.head_dim, options.window, il)
    attention = reference.score(
        q.reshape(-1, shape.n_head, shape.head_dim),
        head_rows(llm, shape, il, v=False),
        n_prefix=n_prefix,
        power=options.power,
        pool=options.pool,
        pool_kernel=options.pool_kernel or reference.pool_kernels(cells),
        **softmax_of(llm, il),
    )
    if rank == "attention+outlying":
        spans = np.tile(reference.outlying_scores(values_up_to(llm, shape, il), n_prefix=n_prefix), (shape.n_head_kv, 1))
        n_first = reference.attended_first(cells, n_mean=options.kv_size - options.recent)
        return reference.certain_first(attention, spans, n_first, protected=protected_by(llm, n_prefix))
    return attention * lengths_of(llm, shape, il, n_prefix) if rank == "attention*value" else attention


def values_up_to(llm: Any, shape: Shape, il: int) -> list[NDArray[np.float32]]:
    """Values of a layer and of those before that are compressed too, each (n_tokens, n_head_kv, head_dim)."""
    return [head_rows(llm, shape, i, v=True) for i in layers_of(shape) if i <= il]


def lengths_of(llm: Any, shape: Shape, il: int, n_prefix: int) -> NDArray[np.float64]:
    """L2 norms of the values of a layer, (n_head_kv, n_prefix)."""
    norms: NDArray[np.float64] = np.linalg.norm(head_rows(llm, shape, il, v=True)[:n_prefix].astype(np.float64), axis=-1)
    return norms.T


def expected_of(llm: Any, shape: Shape, il: int, n_prefix: int) -> NDArray[np.float64]:
    """Expected attention to the cells of a layer, (n_head_kv, n_prefix): of the engine's references, of which its keys are not rotated."""
    q, rope, how = references(llm, shape, il).astype(np.float64), rope_of(llm.model_path), uncapped(llm, il)
    at = reference.reference_positions(llm.n_tokens)
    of_heads = reference.reference_heads(at, n_head=shape.n_head, n_head_kv=shape.n_head_kv)
    counts = at >= reference.N_FIRST
    q, of_heads = rope(q, -at.astype(np.int64))[counts], of_heads[counts]
    k = head_rows(llm, shape, il, v=False)[:n_prefix]
    rotation = reference.mean_rotation(rope, llm.n_tokens, head_dim=shape.head_dim)
    return np.stack([
        reference.expected_attention(q[:, ih], of_heads[:, ih], k[:, ih], rotation=rotation, scale=how["scale"])
        for ih in range(shape.n_head_kv)
    ])  # fmt: skip


@functools.lru_cache(maxsize=4)
def _model_of(path: str) -> reference.ReferenceModel:
    return reference.ReferenceModel(path)


def rope_of(path: str) -> Rope:
    """The rotation of queries (n, n_heads, head_dim) at positions (n,)."""
    return _model_of(path).rope


def norms_of(llm: Any, shape: Shape, il: int, n_prefix: int) -> NDArray[np.float64]:
    """Norms of the projected values of a layer."""
    v: NDArray[np.float64] = head_rows(llm, shape, il, v=True)[:n_prefix].astype(np.float64)
    if llm.context_params.type_v != F16:  # quantised values are rotated, 64 at a time
        rotation: NDArray[np.float64] = np.ones((1, 1))
        while len(rotation) < 64:
            rotation = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), rotation) / 2**0.5
        v = (v.reshape(*v.shape[:2], -1, 64) @ rotation).reshape(v.shape)
    return reference.value_norms(v, _model_of(llm.model_path).weights[f"blk.{il}.attn_output.weight"], n_head=shape.n_head)


def budget_of(llm: Any, shape: Shape, n_prefix: int) -> NDArray[np.int64]:
    """Prefix cells of each head under the policy, before the prompt limits them; 0 in layers that are not compressed."""
    cells = np.zeros((shape.n_layer, shape.n_head_kv), dtype=np.int64)
    cells[layers_of(shape)] = _budget_of_layers(llm, shape, n_prefix)
    return cells


def _budget_of_layers(llm: Any, shape: Shape, n_prefix: int) -> NDArray[np.int64]:
    options, budget, layers = llm.kv_options, choices(llm)[0], layers_of(shape)
    sizes = {"kv_size": options.kv_size, "recent": options.recent}
    n_protected = int(protected_by(llm, n_prefix).sum())
    if budget == "pyramid":
        return reference.pyramid_budget(
            n_layer=len(layers), n_head_kv=shape.n_head_kv, n_prefix=n_prefix, exact=options.pyramid_exact, **sizes
        )
    if budget == "whole":
        values = llm._importance.values[layers]
        return reference.razor_budget(values, n_head_kv=shape.n_head_kv, n_prefix=n_prefix, n_protected=n_protected, **sizes)
    if budget in ("importance", "importance+adaptive", "mix"):
        importance = llm._importance
        caps = reference.budget(importance.values[layers], beta=options.beta or importance.beta or DEFAULT_BETA, **sizes)
        by_importance = reference.budget_kv(caps, n_head_kv=shape.n_head_kv, recent=0).astype(np.int64)
    if budget in ("replay", "mix"):
        table = llm._replay
        by_replay = reference.replay_budget(table.shares, table.values[:, layers], n_prefix=n_prefix, n_protected=n_protected, **sizes)
        if budget == "replay":
            return by_replay
        return reference.mix_budget(by_importance, by_replay, n_prefix=n_prefix, n_protected=n_protected)
    if budget in ("importance", "importance+adaptive"):
        return by_importance
    return np.full((len(layers), shape.n_head_kv), options.kv_size - options.recent, dtype=np.int64)


def protected_by(llm: Any, n_prefix: int) -> NDArray[np.bool_]:
    """Prefix cells that every head keeps."""
    options = llm.kv_options
    sinks = options.sinks
    if sinks is None:
        _, rank, fit = choices(llm)
        sinks = min(SINKS.get(rank, 0), options.kv_size - options.recent - (fit == "mean"))
    return reference.protected(options.protect, sinks=sinks, n_prefix=n_prefix)


def kept_of(llm: Any, shape: Shape) -> Kept:
    """Cells that the policy of a staged context keeps; -1 = one that stands for those that are dropped."""
    options, n_tokens = llm.kv_options, llm.n_tokens
    n_prefix = max(0, n_tokens - options.recent)
    if options.kv_size - options.recent > n_prefix:
        return [[np.arange(n_tokens, dtype=np.int32)] * shape.n_head_kv] * len(layers_of(shape))
    sure, (budget, rank, fit) = protected_by(llm, n_prefix), choices(llm)
    cells = reference.fit_budget(
        budget_of(llm, shape, n_prefix), n_prefix=n_prefix, n_protected=int(sure.sum()), redistribute=options.surplus == "redistribute"
    )
    kept = []
    for il in layers_of(shape):
        scores = scores_of(llm, shape, il, cells[il])
        if rank == "critical":
            scores = reference.critical_scores(scores, norms_of(llm, shape, il, n_prefix), cells[il], protected=sure)
        if budget in FLOORS:
            floor = FLOORS[budget] if options.adakv_floor is None else options.adakv_floor
            cells[il] = reference.adapt_budget(scores, cells[il], floor=floor, normalize=options.adakv_normalize, protected=sure)
        scores = np.where(sure, np.inf, scores)
        stands = (fit == "mean") & (sure.sum() < cells[il]) & (cells[il] < n_prefix)
        n_kept = cells[il] - stands + options.recent
        found = reference.keep(scores, n_kept, kv_size=options.kv_size, recent=options.recent, n_tokens=n_tokens)
        kept.append([np.append(np.full(n, -1, dtype=np.int32), row) for n, row in zip(stands.astype(int), found, strict=True)])
    return kept


def fit_of(llm: Any, shape: Shape, prompt: Sequence[int]) -> tuple[Fitted, Rows]:
    """What :func:`reference.fit_values` makes of a prompt that is read and then compressed, and the values that it began with."""
    llm.eval(prompt)
    at = reference.reference_positions(len(prompt))
    k, v = rows(llm, shape, v=False), rows(llm, shape, v=True)
    q = {il: references(llm, shape, il) for il in layers_of(shape)}
    how = {il: uncapped(llm, il) for il in q}
    sees = reference.reference_heads(at, n_head=shape.n_head, n_head_kv=shape.n_head_kv)
    for of_layer in how.values():
        if of_layer["sinks"] is not None:
            of_layer["sinks"] = np.asarray(of_layer["sinks"])[sees]
    llm.end_prompt()
    kept = {head: llm.kv_positions(*head) for head in heads(shape)}
    fitted = {
        (il, ih): reference.fit_values(
            q[il][:, ih],
            at,
            k[il, ih],
            v[il, ih],
            kept[il, ih],
            scale=how[il]["scale"],
            sinks=None if how[il]["sinks"] is None else how[il]["sinks"][:, ih],
        )
        for il, ih in heads(shape)
    }
    return fitted, {head: v[head][kept[head]] for head in heads(shape)}
