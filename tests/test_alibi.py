"""ALiBi: scores depend on how far a cell lies from the query, which no eviction changes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import architectures
import numpy as np
import numpy.typing as npt
import pytest
from architectures import KV_SIZE, N_PROMPT, NEXT, Context, Refused
from conftest import nmse
from llama_cpp import llama_cpp

from pyheadkv import _lib
from pyheadkv.options import Options
from pyheadkv.testing import reference

pytestmark = pytest.mark.usefixtures("library")

N_SINKS = 4  # of policy "streaming"
PROMPT = np.random.default_rng(0).integers(0, architectures.N_VOCAB, N_PROMPT).tolist()
F32 = ctypes.POINTER(ctypes.c_float)


@pytest.fixture(scope="module", params=["bloom", "mpt", "refact", "jais", "bloom of 6 heads"])
def model(request: pytest.FixtureRequest, library: Any) -> Iterator[Any]:
    """Heads: a power of two and not; of one query each, and of two."""
    arch, *more = request.param.split(" of ")
    keys = architectures.cases()[arch][1]
    if more:
        keys = keys | {"embedding_length": 192, "attention.head_count": 6, "attention.head_count_kv": 6}
    made = architectures.make_model(arch, keys)
    yield made
    llama_cpp.llama_model_free(made)


def read_prompt(context: Context, *, layer: bool = True) -> npt.NDArray[np.float32]:
    """Logits of its last token, after which the prompt is compressed."""
    if context.kv_size is None:
        return context.decode(PROMPT, 0)
    _lib.check(_lib.lib.headkv_begin_prompt(context.ctx, 0, N_PROMPT, layer, None))
    logits = context.decode(PROMPT, 0)
    _lib.check(_lib.lib.headkv_end_prompt(context.ctx, 0))
    return logits


def decode_each(context: Context) -> npt.NDArray[np.float32]:
    return np.array([context.decode([token], N_PROMPT + i) for i, token in enumerate(NEXT)])


def without_the_middle(context: Context) -> None:
    """The stock cache loses what policy "streaming" evicts: its cells keep their positions."""
    memory = llama_cpp.llama_get_memory(context.ctx)
    assert llama_cpp.llama_memory_seq_rm(memory, 0, N_SINKS, N_PROMPT - (KV_SIZE - N_SINKS))


@pytest.mark.parametrize("layer", [True, False])
def test_evicted_cells_leave_the_distances_of_the_others(layer: bool, model: Any) -> None:
    with Context(model) as stock, Context(model, KV_SIZE, policy="streaming") as ours:
        assert read_prompt(ours, layer=layer).tobytes() == read_prompt(stock).tobytes()
        assert set(map(tuple, ours.positions().values())) == {(*range(N_SINKS), *range(N_PROMPT - KV_SIZE + N_SINKS, N_PROMPT))}
        without_the_middle(stock)
        assert nmse(decode_each(ours), decode_each(stock)) < 1e-5  # measured are up to 3e-6


def test_tokens_at_once_see_what_they_see_one_by_one(model: Any) -> None:
    with Context(model, KV_SIZE, policy="streaming") as each, Context(model, KV_SIZE, policy="streaming") as at_once:
        for context in (each, at_once):
            read_prompt(context)
        wanted = decode_each(each)[-1]
        # linear layers of several tokens round otherwise, and K and V are rounded to f16: measured are up to 3e-9
        assert nmse(at_once.decode(list(NEXT), N_PROMPT), wanted) < 1e-7
        again = at_once.decode([5], N_PROMPT + len(NEXT))
        assert nmse(again, each.decode([5], N_PROMPT + len(NEXT))) < 1e-7


def test_a_restored_sequence_beside_another_one(model: Any) -> None:
    with Context(model, KV_SIZE) as whole, Context(model, KV_SIZE, n_seq_max=2) as two:
        for context in (whole, two):
            read_prompt(context)
        wanted = decode_each(whole)
        n = llama_cpp.llama_state_seq_get_size(whole.ctx, 0)
        state = (ctypes.c_uint8 * n)()
        assert llama_cpp.llama_state_seq_get_data(two.ctx, state, n, 0) > 0
        assert llama_cpp.llama_state_seq_set_data(two.ctx, state, n, 1) > 0
        # of the two, one is a token ahead of the other
        first = two.decode([NEXT[0]], N_PROMPT)
        assert first.tobytes() == wanted[0].tobytes()
        batch = llama_cpp.llama_batch_init(2, 0, 1)
        batch.n_tokens = 2
        for i in range(2):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = NEXT[1 - i], N_PROMPT + 1 - i, 1, i
            batch.logits[i] = True
        assert llama_cpp.llama_decode(two.ctx, batch) == 0
        llama_cpp.llama_batch_free(batch)
        for i in range(2):
            found = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(two.ctx, i), shape=(two.n_vocab,))
            assert nmse(found, wanted[1 - i]) < 1e-7  # measured are up to 2e-9


def read(context: Context, func: Any, shape: tuple[int, ...], *args: Any) -> npt.NDArray[np.float32]:
    values = np.zeros(shape, dtype=np.float32)
    _lib.check(func(context.ctx, *args, values.ctypes.data_as(F32), values.size))
    return values


def staged(context: Context, il: int, n: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Queries of the last n tokens and keys of all, of a prompt that is not compressed."""
    n_head, n_head_kv, dim, _ = (int(x[il]) for x in context.heads)
    q = read(context, _lib.lib.headkv_read_window, (n, n_head, dim), 0, il)
    k = [read(context, _lib.lib.headkv_read_cells, (N_PROMPT, dim), 0, il, ih, False) for ih in range(n_head_kv)]
    return q, np.stack(k, axis=1)


def scale_of(context: Context, il: int) -> float:
    scale, softcap, max_bias, *sinks = read(context, _lib.lib.headkv_read_softmax, (3,), il)
    assert (softcap, max_bias, sinks) == (0.0, 8.0, [])
    return float(scale)


def test_summed_attention_is_that_of_the_definition(model: Any) -> None:
    """The window takes the queries of all tokens, so that the definition knows them."""
    with (
        Context(model, N_PROMPT + 1, policy="h2o", window=N_PROMPT, prefill="token") as seen,
        Context(model, KV_SIZE, policy="h2o") as ours,
    ):
        seen.decode(PROMPT, 0)
        read_prompt(ours, layer=False)
        n_other = 0
        for (il, ih), kept in ours.positions().items():
            q, k = staged(seen, il, N_PROMPT)
            sums = reference.attention_sums(q, k, scale=scale_of(seen, il), q_round=np.float16, max_bias=8.0)
            recent = ours.options.recent
            n_kept = np.full(len(sums), KV_SIZE)
            wanted = reference.keep(sums[:, : N_PROMPT - recent], n_kept, kv_size=KV_SIZE, recent=recent, n_tokens=N_PROMPT)[ih]
            n_other += len(set(kept) - set(wanted.tolist()))
        assert n_other == 0


def test_attention_that_is_read_is_that_of_the_definition(model: Any) -> None:
    """What ``pyheadkv score`` and tables of replay are made of."""
    with Context(model, KV_SIZE, window=70) as context:
        context.decode(PROMPT, 0)
        n_queries, n_head_kv = 70, int(max(context.heads[1]))  # more than are computed at once
        best = read(context, _lib.lib.headkv_read_attention_max, (context.n_layer, n_head_kv, N_PROMPT), 0, n_queries, N_PROMPT)
        for il in range(context.n_layer):
            q, k = staged(context, il, n_queries)
            distance = np.arange(N_PROMPT - n_queries, N_PROMPT)[:, None] - np.arange(N_PROMPT)
            slopes = reference.alibi_slopes(q.shape[1], 8.0)
            wanted = np.zeros_like(best[il])
            for h, slope in enumerate(slopes):
                group = h * n_head_kv // len(slopes)
                logits = q[:, h] @ k[:, group].T * scale_of(context, il) - slope * distance
                p = reference.softmax(np.where(distance >= 0, logits, -np.inf))
                wanted[group] = np.maximum(wanted[group], p.max(axis=0))
            np.testing.assert_allclose(best[il], wanted, rtol=1e-2, atol=1e-5)


def test_slopes_are_those_of_the_paper() -> None:
    assert reference.alibi_slopes(8, 8.0).tolist() == [2.0**-i for i in range(1, 9)]
    np.testing.assert_allclose(reference.alibi_slopes(6, 8.0), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    assert reference.alibi_slopes(3, 0.0).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attend": "composed"}, "^ALiBi needs attend 'fused' on the CPU: use attend 'auto'"),
        (
            {"policy": "uniform/recent/mean"},
            "^policy 'uniform/recent/mean' changes the values of cells, which is not built for ALiBi: use policy",
        ),
        ({"policy": "uniform/attention/values"}, "^policy 'uniform/attention/values' changes the values of cells"),
        ({"kv_generated": 70, "kv_generated_slack": 20}, "kv_generated is not built for ALiBi"),
    ],
    ids=str,
)
def test_what_has_no_definition_is_refused(options: dict[str, Any], reason: str, model: Any) -> None:
    with pytest.raises(Refused, match=reason):
        Context(model, KV_SIZE, **options)


def test_a_prompt_cannot_ask_for_it_later(model: Any) -> None:
    params = Options(kv_size=KV_SIZE, policy="uniform/recent/mean").to_params(None, None)
    with Context(model, KV_SIZE) as context:
        assert _lib.lib.headkv_begin_prompt(context.ctx, 0, N_PROMPT, True, ctypes.byref(params)) < 0
        assert "not built for ALiBi" in _lib.last_error()
        read_prompt(context)
