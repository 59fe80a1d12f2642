"""Saved and restored caches: the same answers, and a clean error for whatever is not a state."""

from __future__ import annotations

import copy
import ctypes
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPES, Shape, greedy, load, nmse, tokens
from test_sequences import sequences

from pyheadkv import _lib
from pyheadkv.testing import write_random_lora, write_random_model

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
GQA4 = SHAPES[1]
KV_SIZE = 40
ASK_SCRIPT = """
import pickle, sys
from conftest import greedy, load
state, options, prompt, n = pickle.load(open(sys.argv[1], "rb"))
llm = load(sys.argv[2], kv_reuse=True, **options)
llm.load_state(state)
print(greedy(llm, prompt, n))
print(llm.kv_stats().n_prompt)
"""


def ask(llm: Any, question: list[int], n: int) -> list[int]:
    """n greedy tokens after a question that follows what the cache holds."""
    llm.eval(question)
    out: list[int] = []
    while len(out) < n:
        out.append(int(llm.last_logits.argmax()))
        llm.eval(out[-1:])
    return out


@pytest.mark.parametrize(
    "options",
    [{}, {"attend": "composed", "n_buckets": 2}, {"type_k": 8, "type_v": 8}, {"kv_size": 400}, {"prefill": "token"}],
    ids=lambda o: " ".join(map(str, o)) or "default",
)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]], ids=lambda s: s.name)
def test_a_restored_cache_answers_as_the_saved_one(shape: Shape, options: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    """Live, in another context, and in another process; saved after the prompt, and after tokens were generated."""
    path, prompt, question = make_model(shape), tokens(300), tokens(9, seed=5)[1:]
    options = {"kv_size": KV_SIZE, "importance": None, **options}
    with closing(load(path, kv_reuse=True, **options)) as llm, closing(load(path, **options)) as other:
        llm.read_prompt(prompt)
        for before in ([], question * 11):
            llm.eval(before)
            state = llm.save_state()
            n_past, cells = llm.n_tokens, llm.kv_stats().n_cells
            answer = ask(llm, question, 20)
            for to in (llm, other):
                to.load_state(state)
                stats = to.kv_stats()
                assert to.n_tokens == n_past and stats.state == "compressed" and stats.n_prompt == len(prompt)
                assert (stats.n_cells == cells).all() and stats.bytes_staging == 0
                assert ask(to, question, 20) == answer
            assert to.kv_positions(0, 0).tolist() == llm.kv_positions(0, 0).tolist()
            llm.load_state(state)
        whole = [*prompt, *question * 12]
        with (tmp_path / "state").open("wb") as f:
            pickle.dump((state, options, whole, 20), f)
    done = subprocess.run(
        [sys.executable, "-c", ASK_SCRIPT, tmp_path / "state", path], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.stdout == f"{answer}\n{len(prompt)}\n", done.stderr


def test_a_restored_prompt_can_be_truncated_and_read_again(make_model: MakeModel) -> None:
    path, prompt = make_model(GQA4), tokens(200)
    with closing(load(path, kv_size=KV_SIZE)) as llm:
        answer = greedy(llm, prompt, 8)
        llm.read_prompt(prompt)
        state = llm.save_state()
        llm.load_state(state)
        assert llm._ctx.kv_cache_seq_rm(0, 195, -1) and not llm._ctx.kv_cache_seq_rm(0, 100, -1)
        llm.load_state(state)
        assert greedy(llm, prompt, 8) == answer  # without kv_reuse it is read again


def test_the_caches_of_llama_cpp_python_hold_compressed_states(make_model: MakeModel) -> None:
    from llama_cpp.llama_cache import LlamaRAMCache

    path, first, second, more = make_model(GQA4), tokens(200), tokens(180, seed=3), tokens(5, seed=4)[1:]
    with closing(load(path, kv_size=KV_SIZE)) as llm, pytest.raises(ValueError, match="kv_reuse=True"):
        llm.set_cache(LlamaRAMCache())
    with closing(load(path, kv_size=KV_SIZE, kv_reuse=True)) as llm:
        complete = dict(max_tokens=4, temperature=0.0, seed=1)
        texts = []
        for cache in (None, LlamaRAMCache()):
            llm.reset()
            llm.set_cache(cache)
            out = llm.create_completion(first, **complete)["choices"][0]["text"]
            longer = [*llm._input_ids.tolist(), *more]
            if cache is not None:
                llm.create_completion(second, **complete)  # `first` leaves the context
                llm.create_completion(longer, **complete)
                assert llm.kv_stats().n_prompt == len(first)
                llm.load_state(cache[longer])
            texts.append((out, llm.create_completion(longer, **complete)["choices"][0]["text"]))
        assert texts[0] == texts[1]


def get_seq(c: Any, ctx: Any, s: int, flags: int = 0) -> bytes:
    size = c.llama_state_seq_get_size_ext(ctx, s, flags)
    data = (ctypes.c_uint8 * size)()
    assert c.llama_state_seq_get_data_ext(ctx, data, size, s, flags) == size
    return bytes(data)


def set_seq(c: Any, ctx: Any, s: int, state: bytes, flags: int = 0) -> bool:
    data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    return bool(state) and int(c.llama_state_seq_set_data_ext(ctx, data, len(state), s, flags)) == len(state)


@pytest.mark.parametrize("flags", [0, 1, 2], ids=["host", "partial", "device"])
def test_a_sequence_moves_to_another_one_beside_others(flags: int, make_model: MakeModel, tmp_path: Path) -> None:
    """Memory, device and files; what the other sequences hold is not touched."""
    prompts = [tokens(150 + 40 * s, seed=s) for s in range(3)]
    with sequences(make_model(GQA4), n_seq_max=4) as many:
        for s, prompt in enumerate(prompts):
            many.read(s, prompt)
        c, ctx = many.c, many.ctx
        state = get_seq(c, ctx, 1, flags)
        want = many.decode({s: [7, 8, 9] for s in range(3)})
        if flags == 2:  # rows stay with the sequence that they were saved from
            assert set_seq(c, ctx, 1, state, flags)
            many.n_past[1] = len(prompts[1])
            assert nmse(many.decode({1: [7, 8, 9]})[1], want[1]) < 1e-6
            return
        assert set_seq(c, ctx, 3, state, flags)
        many.n_past[3] = len(prompts[1])
        assert many.positions(3, 1, 1) == many.positions(1, 1, 1)
        assert nmse(many.decode({3: [7, 8, 9]})[3], want[1]) < 1e-6

        file = str(tmp_path / "seq").encode()
        ids = (ctypes.c_int32 * 3)(4, 5, 6)
        many.decode({s: [11] for s in (0, 1, 2)})
        assert c.llama_state_seq_save_file(ctx, file, 1, ids, 3) > 0
        want = many.decode({s: [12, 13] for s in range(3)})
        n, out = ctypes.c_size_t(), (ctypes.c_int32 * 3)()
        assert c.llama_state_seq_load_file(ctx, file, 0, out, 3, ctypes.byref(n)) > 0
        assert list(out) == [4, 5, 6]
        many.n_past[0] = len(prompts[1]) + 4
        assert nmse(many.decode({0: [12, 13]})[0], want[1]) < 1e-6

        whole = (ctypes.c_uint8 * c.llama_state_get_size(ctx))()
        assert c.llama_state_get_data(ctx, whole, len(whole)) == len(whole)
        past, want = list(many.n_past), many.decode({s: [3] for s in range(4)})
        assert c.llama_state_set_data(ctx, whole, len(whole)) == len(whole)
        many.n_past = past
        got = many.decode({s: [3] for s in range(4)})
        assert all(nmse(got[s], want[s]) < 1e-6 for s in range(4))
        assert not set_seq(c, ctx, 0, bytes(whole)) and set_seq(c, ctx, 2, state)


def test_what_is_being_read_cannot_be_saved(make_model: MakeModel) -> None:
    with closing(load(make_model(GQA4), kv_size=KV_SIZE)) as llm:
        llm.eval(tokens(50))
        with pytest.raises(RuntimeError, match="prompt of sequence 0 is not compressed"):
            llm.save_state()
        llm.end_prompt()
        llm.load_state(llm.save_state())
        llm.reset()
        empty = llm.save_state()
        llm.read_prompt(tokens(50))
        llm.load_state(empty)
        assert llm.n_tokens == 0 and llm.kv_stats().state == "empty"


def test_a_state_of_something_else_is_refused(make_model: MakeModel) -> None:
    path, prompt = make_model(GQA4), tokens(300)
    with closing(load(path, kv_size=64)) as llm:
        llm.read_prompt(prompt)
        state = llm.save_state()
    other = replace(GQA4, name="other")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (make_model(other, seed=8), {}, "another model"),
        (make_model(GQA4, n_layer=2), {}, "number of layers is 3, that of this context is 2"),
        (make_model(SHAPES[0]), {}, "number of heads is 8, that of this context is 4"),
        (make_model(SHAPES[3]), {}, "size of a head is 32, that of this context is 64"),
        (path, {"rope_freq_base": 5000.0}, "another rotary embedding"),
        (path, {"type_k": 8}, "type of K is 1, that of this context is 8"),
        (path, {"type_v": 8}, "type of V is 1, that of this context is 8"),
        (path, {"n_ctx": 256}, "it holds 300 tokens: use a context of at least as many, n_ctx is 256"),
        (path, {"kv_size": 32}, "kv_size=64, which is more than kv_size=32"),
    ]
    for model, options, message in cases:
        with closing(load(model, **{"kv_size": 64, **options})) as llm:
            llm.read_prompt(prompt[:200])
            with pytest.raises(ValueError, match=message):
                llm.load_state(state)
            assert llm.n_tokens == 0 and llm.kv_stats().state == "empty"
            llm.read_prompt(prompt[:200])
    with closing(load(path)) as stock:
        stock.eval(prompt)
        of_stock = stock.save_state()
        with pytest.raises((ValueError, RuntimeError)):
            stock.load_state(state)
    with closing(load(path, kv_size=64)) as llm:
        with pytest.raises(ValueError, match="not one of a compressed cache"):
            llm.load_state(of_stock)
        more = copy.copy(state)
        more.llama_state += b"1"
        with pytest.raises(ValueError, match=f"it ends after {len(state.llama_state)} of {len(more.llama_state)} bytes"):
            llm.load_state(more)
        state.n_tokens = 299
        with pytest.raises(ValueError, match="its cache has 300 tokens, 299 were said to be in it"):
            llm.load_state(state)


def load_lora(model: Any, file: Path) -> Any:
    import llama_cpp

    return llama_cpp.llama_adapter_lora_init(model, str(file).encode())


def set_loras(ctx: Any, *loras: tuple[Any, float]) -> None:
    import llama_cpp

    n = len(loras)
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * n)(*(lora for lora, _ in loras))
    assert llama_cpp.llama_set_adapters_lora(ctx, adapters, n, (ctypes.c_float * n)(*(scale for _, scale in loras))) == 0


@contextmanager
def with_adapters(path: Path, *loras: tuple[Path, float], vector: float = 0.0, first: int = 1, **options: Any) -> Iterator[Any]:
    """A context with LoRA adapters and, if it is not 0, a control vector from layer `first` on."""
    from llama_cpp import llama_cpp

    with closing(load(path, kv_size=64, **options)) as llm:
        set_loras(llm.ctx, *((load_lora(llm.model, file), scale) for file, scale in loras))
        n_embd, n_layer = llm.n_embd(), llama_cpp.llama_model_n_layer(llm.model)
        data = (ctypes.c_float * (n_embd * n_layer))(*[vector] * (n_embd * n_layer))
        if vector:
            assert (
                llama_cpp._lib.llama_set_adapter_cvec(ctypes.c_void_p(llm.ctx), data, ctypes.c_size_t(len(data)), n_embd, first, n_layer)
                == 0
            )
        yield llm


def test_a_state_belongs_to_the_adapters_that_it_was_computed_with(make_model: MakeModel, tmp_path: Path) -> None:
    """LoRA with its scale, several of them in any order, control vectors; with each of them layers are read as by upstream's order."""
    path, prompt, question = make_model(GQA4), tokens(300), tokens(9, seed=5)[1:]
    a, b = (write_random_lora(tmp_path / f"{seed}.gguf", path, seed=seed) for seed in (1, 2))
    kinds: list[dict[str, Any]] = [
        dict(),
        dict(loras=[(a, 1.0)]),
        dict(loras=[(a, 0.5)]),
        dict(loras=[(b, 1.0)]),
        dict(loras=[(a, 1.0), (b, 1.0)]),
        dict(vector=0.3),
        dict(vector=0.2),
        dict(vector=0.3, first=2),
        dict(loras=[(a, 1.0)], vector=0.3),
    ]
    states, answers = [], []
    for kind in kinds:
        more = dict(kind)
        loras = more.pop("loras", [])
        with with_adapters(path, *loras, prefill="token", **more) as llm:
            llm.read_prompt(prompt)
            expected = llm.last_logits
        with with_adapters(path, *loras, prefill="layer", **more) as llm:
            llm.read_prompt(prompt)
            assert (llm.last_logits == expected).all()
            states.append(llm.save_state())
            answers.append(ask(llm, question, 8))
    assert len({str(answer) for answer in answers}) > len(kinds) // 2
    for i, kind in enumerate(kinds):
        more = dict(kind)
        loras = more.pop("loras", [])[::-1]
        with with_adapters(path, *loras, **more) as llm:
            for j, state in enumerate(states):
                if i == j:
                    llm.load_state(state)
                    assert ask(llm, question, 8) == answers[i]
                else:
                    with pytest.raises(ValueError, match="other adapters"):
                        llm.load_state(state)


def test_adapters_that_change_are_noticed(make_model: MakeModel, tmp_path: Path) -> None:
    """A prompt that is paused between its layers is refused; a sequence of several adapters is that of none of them."""
    path, prompt = make_model(GQA4), tokens(200)
    lora = write_random_lora(tmp_path / "lora.gguf", path, seed=1)
    with sequences(path, n_seq_max=2, n_ctx=512) as many:
        c, ctx, adapter = many.c, many.ctx, load_lora(many.model, lora)
        set_loras(ctx, (adapter, 1.0))
        many.read(0, prompt)
        state = get_seq(c, ctx, 0)
        assert many.headkv.lib.headkv_can_continue(ctx, 0, None) == 0
        assert many.read_ahead(1, prompt) > 1
        set_loras(ctx, (adapter, 0.0))
        with pytest.raises(RuntimeError, match="sequence 1 is being read layer by layer and other adapters were set"):
            many.read_ahead(1, prompt)
        assert many.state(1) == 0 and many.stats(1).bytes_staging == 0
        assert many.headkv.lib.headkv_can_continue(ctx, 0, None) < 0 and "other adapters" in many.headkv.last_error()
        assert not set_seq(c, ctx, 1, state)
        set_loras(ctx, (adapter, 1.0))
        assert set_seq(c, ctx, 1, state)
        set_loras(ctx, (adapter, 0.5))
        many.decode({0: [5]})
        for x in (1.0, 0.5, 0.0):
            set_loras(ctx, (adapter, x))
            assert many.headkv.lib.headkv_can_continue(ctx, 0, None) < 0
            assert not set_seq(c, ctx, 1, get_seq(c, ctx, 0))


def test_a_restored_sequence_knows_what_it_was_compressed_by(make_model: MakeModel) -> None:
    """Requests for one server can ask for different policies, so that a file can be of another one than that of now."""
    llm = load(make_model(GQA4), kv_size=40, policy="snapkv", kv_reuse=True)
    can_continue, prompt = _lib.lib.headkv_can_continue, tokens(200)
    llm.read_prompt(prompt)
    state = llm.save_state()
    llm.load_state(state)
    assert can_continue(llm.ctx, 0, None) == 0
    llm.configure(policy="adaptive/attention")
    llm.load_state(state)
    assert can_continue(llm.ctx, 0, None) < 0 and "another policy" in _lib.last_error()
    next(llm.generate([*prompt, 5, 6], temp=0.0))
    assert llm.kv_stats().n_prompt == 202


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "small.gguf"
    write_random_model(path, n_layer=2, n_embd=64, n_head=2, n_head_kv=2, head_dim=32, n_ff=96, seed=3, importance="random")
    return path


def test_a_file_that_ends_early_or_has_a_wrong_byte_is_a_clean_error(small: Path) -> None:
    """Cut at every byte, and 1500 files with one to four random bytes changed; the context stays usable."""
    with sequences(small, n_seq_max=2, n_ctx=256) as many:
        c, ctx, prompt = many.c, many.ctx, tokens(24)
        for s in range(2):
            many.read(s, prompt)
        state = get_seq(c, ctx, 0)
        want = many.decode({1: [5]})[1]
        for n in range(len(state)):
            assert not set_seq(c, ctx, 0, state[:n]), n
        assert many.state(0) == 2 and get_seq(c, ctx, 0) == state  # nothing has changed
        rng = random.Random(1)
        for _ in range(1500):
            damaged = bytearray(state)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(8, len(state))] ^= 1 << rng.randrange(8)  # the first 8 are upstream's
            assert not set_seq(c, ctx, 0, bytes(damaged)) or damaged == state
        for size in (1 << 16, 1 << 31, (1 << 32) - 1):  # lengths that lie, at every place where one could be
            for at in range(8, 200, 4):
                set_seq(c, ctx, 0, state[:at] + size.to_bytes(4, "little") + state[at + 4 :])
        assert set_seq(c, ctx, 0, state)
        many.n_past[0] = len(prompt)
        assert nmse(many.decode({0: [5]})[0], want) < 1e-6


def checksum(data: bytes | bytearray) -> bytes:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return value.to_bytes(8, "little")


def test_a_forged_file_with_the_right_checksum_does_no_harm(small: Path) -> None:
    """What the checksum would catch, caught by the checks behind it; cells may hold any finite numbers."""
    with sequences(small, n_seq_max=2, n_ctx=256) as many:
        c, ctx, prompt = many.c, many.ctx, tokens(60)
        many.read(0, prompt)
        state = get_seq(c, ctx, 0)
        assert state[-8:] == checksum(state[8:-8])
        rng = random.Random(2)
        n_loaded = 0
        for i in range(600):
            forged = bytearray(state[8:-8])
            at = rng.randrange(64, 400) if i % 2 else rng.randrange(len(forged))
            forged[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
            if set_seq(c, ctx, 1, state[:8] + bytes(forged) + checksum(forged)):
                n_loaded += 1
                many.n_past[1] = int(c.llama_memory_seq_pos_max(c.llama_get_memory(ctx), 1)) + 1
                if many.n_past[1] < 250:
                    many.decode({1: [5, 6], 0: [5]}) if many.n_past[0] < 250 else many.decode({1: [5, 6]})
        assert n_loaded > 100


def test_numbers_that_lie_are_refused(small: Path) -> None:
    """kv_size, protected cells and the cells of the heads, with the right checksum."""
    n_layer, n_prompt, kv_size = 2, 100, 40
    with sequences(small, n_seq_max=1, n_ctx=256, protect=[(2, 5), (8, 20)]) as many:
        c, ctx, lib = many.c, many.ctx, many.headkv.lib
        many.read(0, tokens(n_prompt))
        state = get_seq(c, ctx, 0)
        head = 8 + 3 * 4 + 8 + 3 * 4 + n_layer * 16 + 4 + 4  # of the file, up to n_pos
        numbers = dict(n_pos=0, n_prompt=4, n_whole=8, kv_size=12, n_spans=32, first=36, last=48)

        def forged(**changes: int) -> bytes:
            data = bytearray(state[:-8])
            for name, value in changes.items():
                at = head + numbers[name]
                data[at : at + 4] = (value % (1 << 32)).to_bytes(4, "little")
            return bytes(data) + checksum(data[8:])

        def why(data: bytes) -> str:
            assert not set_seq(c, ctx, 0, data) and get_seq(c, ctx, 0) == state
            return str(many.headkv.last_error())

        assert forged(n_prompt=n_prompt, kv_size=kv_size, n_spans=2, first=2, last=20) == state
        for size in (0, 1, -1, -40, 1 << 31):
            assert "it is damaged (kv_size)" in why(forged(kv_size=size))
        assert "it is damaged (cells)" in why(forged(kv_size=9))
        for changes in (dict(first=-1), dict(first=5), dict(last=n_prompt - 7), dict(last=8), dict(first=1 << 30)):
            assert "it is damaged (protected cells)" in why(forged(**changes))
        assert not set_seq(c, ctx, 0, forged(n_spans=1 << 31))
        for limits, said in (
            ((kv_size - 1, 0, 0), "kv_size 40, the limit is 39"),
            ((0, 14, 0), "every head keeps 15 protected cells, the limit is 14"),
            ((0, 0, n_prompt - 1), "it holds 100 tokens, the limit is 99"),
        ):
            assert lib.headkv_limit_restore(ctx, *limits) == 0
            assert said in why(state)
        assert lib.headkv_limit_restore(ctx, 0, -1, 0) < 0
        assert lib.headkv_limit_restore(ctx, kv_size, 15, n_prompt) == 0
        assert set_seq(c, ctx, 0, state)


def test_a_state_is_as_small_as_the_cache() -> None:
    """4096 tokens of the embedded model."""
    from pyheadkv import embedded_model
    from pyheadkv.eval import needle

    text = needle.make_document(random.Random(0), n_tokens=4000, kinds=["direct"]).prompt()
    sizes = {}
    for kv_size in (None, 128):
        with closing(load(embedded_model(), kv_size=kv_size, n_ctx=4608)) as llm:
            prompt = llm.tokenize(text.encode())
            if kv_size is None:
                llm.eval(prompt)
                sizes["full"] = len(llm.save_state().llama_state)
            else:
                llm.read_prompt(prompt)
                sizes["compressed"] = len(llm.save_state().llama_state)
                stats = llm.kv_stats()
                assert sizes["compressed"] < 1.1 * stats.bytes_full / len(prompt) * stats.n_cells.mean()
    print(f"{len(prompt)} tokens: {sizes['full'] / 2**20:.2f} MiB, compressed {sizes['compressed'] / 2**20:.2f} MiB")
    assert sizes["compressed"] * 20 < sizes["full"]


def test_a_long_prompt_is_not_kept_whole_behind_a_short_past(make_model: MakeModel) -> None:
    path, short = make_model(SHAPES[1]), [1, 7, 8]
    long = [1, *tokens(600, seed=4)[1:]]
    llm = load(path, kv_size=48, kv_reuse=True)
    next(llm.generate(short, temp=0.0))
    next(llm.generate(long, temp=0.0))
    assert llm.kv_stats().n_prompt == len(long) and llm.kv_stats().n_cells.mean() < 60
    more = [*long, *tokens(30, seed=5)]
    next(llm.generate(more, temp=0.0))
    assert llm.kv_stats().n_prompt == len(long)  # continued


@pytest.mark.parametrize("changes", [{"kv_size": 24}, {"protect": [(40, 90)]}], ids=str)
def test_a_past_that_was_kept_otherwise_is_read_again(changes: dict[str, Any], make_model: MakeModel) -> None:
    path, prompt = make_model(SHAPES[1]), tokens(200)
    more = [*prompt, *tokens(30, seed=5)]
    llm, fresh = load(path, kv_size=48, kv_reuse=True), load(path, **{"kv_size": 48, **changes})
    next(llm.generate(prompt, temp=0.0))
    llm.configure(**changes)
    assert greedy(llm, more, 8) == greedy(fresh, more, 8)
    assert llm.kv_stats().n_prompt == len(more)
    llm.configure(kv_size=48, protect=[])
    next(llm.generate(prompt, temp=0.0))
    next(llm.generate(more, temp=0.0))
    assert llm.kv_stats().n_prompt == len(prompt)  # the same again: continued
