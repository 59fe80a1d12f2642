"""The archive where prompts are not read in one go: pieces, aborted batches, other sequences; and what else lies in its folder."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHAPES, Shape, load, logits, tokens
from test_archive import ORDERS, blocks, n_archived, outcome

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
SHAPE = SHAPES[1]
BLOCK_BYTES = 3 * 2 * 256 * 2 * 32 * 2  # three layers of K and V, two heads of 32 halves


def decode(llm: Any, prompt: list[int], pos: int, *, seq_id: int = 0, n_all: int | None = None, whole: bool = False) -> int:
    """What llama_decode() returns for tokens of a sequence that were announced as part of n_all."""
    import llama_cpp

    from pyheadkv import _lib

    if n_all is not None:
        _lib.check(_lib.lib.headkv_begin_prompt(llm.ctx, seq_id, n_all, whole, None))
    batch = llama_cpp.llama_batch_init(len(prompt), 0, 1)
    batch.n_tokens = len(prompt)
    for i, token in enumerate(prompt):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, pos + i, 1, seq_id
        batch.logits[i] = i == len(prompt) - 1
    code = int(llama_cpp.llama_decode(llm.ctx, batch))
    llama_cpp.llama_batch_free(batch)
    return code


def remove(llm: Any, seq_id: int, start: int = -1) -> bool:
    import llama_cpp

    return bool(llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), seq_id, start, -1))


def end(llm: Any) -> tuple[bytes, list[list[int]]]:
    """Logits of the last token, and the kept positions of every head after the compression."""
    from pyheadkv import _lib

    last = logits(llm).tobytes()
    _lib.check(_lib.lib.headkv_end_prompt(llm.ctx, 0))
    return last, [llm.kv_positions(il, ih).tolist() for il in range(SHAPE.n_layer) for ih in range(SHAPE.n_head_kv)]


def set_archive(llm: Any, folder: Path | None, type_kv: int = -1) -> None:
    from pyheadkv import _lib

    params = _lib.lib.headkv_default_archive_params()
    params.folder, params.type = None if folder is None else str(folder).encode(), type_kv
    _lib.check(_lib.lib.headkv_set_archive(llm.ctx, ctypes.byref(params)), ValueError)


# ------------------------------------------------------------------ the same outcome


@ORDERS
@pytest.mark.parametrize("n_ubatch", [96, 100, 200])
def test_ubatches_of_any_size_are_those_of_a_fresh_context(n_ubatch: int, prefill: str, make_model: MakeModel) -> None:
    """What is left of a ubatch is not computed in another way than the whole of it."""
    path, options = make_model(SHAPE), dict(kv_size=48, prefill=prefill, n_ubatch=n_ubatch, n_batch=2048)
    llm, fresh = load(path, kv_archive=True, **options), load(path, **options)
    for prompt in (tokens(1500), tokens(1500)[:1400], [*tokens(1500)[:900], *tokens(300, seed=1)]):
        assert outcome(llm, prompt) == outcome(fresh, prompt)
    assert n_archived(llm) > 700


def check_growing_text(
    path: Path, outcome: Callable[..., Any], rng: np.random.Generator, *, n_ubatch: int, seed: int, prefill: str
) -> None:
    """Prompts of a growing text with edits, against a context without an archive."""
    llm, fresh = (load(path, kv_size=48, prefill=prefill, n_ubatch=n_ubatch, n_batch=512, kv_archive=kv) for kv in (True, None))
    text = tokens(1500, seed=seed)
    n_restored = 0
    for _ in range(8):
        prompt = text[: int(rng.integers(64, 1500))]
        assert outcome(llm, prompt) == outcome(fresh, prompt), (n_ubatch, len(prompt))
        n_restored += n_archived(llm)
        text[int(rng.integers(1, 1500))] = 7
    assert n_restored > 0


@ORDERS
@pytest.mark.parametrize("seed", range(3))
def test_prompts_of_any_length_are_those_of_a_fresh_context(seed: int, prefill: str, make_model: MakeModel) -> None:
    rng, path = np.random.default_rng(seed), make_model(SHAPE)
    check_growing_text(path, outcome, rng, n_ubatch=int(rng.integers(64, 300)), seed=seed, prefill=prefill)


@pytest.mark.parametrize("n_piece", [1, 30, 200])
def test_pieces_are_archived_only_as_a_whole_prompt_would_be(n_piece: int, make_model: MakeModel, tmp_path: Path) -> None:
    path, prompt = make_model(SHAPE), tokens(600)
    writer = load(path, kv_size=48, prefill="token", kv_archive=tmp_path)
    for i in range(0, len(prompt), n_piece):
        writer.eval(prompt[i : i + n_piece])
    writer.end_prompt()
    llm = load(path, kv_size=48, kv_archive=tmp_path)
    assert outcome(llm, prompt) == outcome(load(path, kv_size=48), prompt)
    assert n_archived(llm) == (512 if n_piece == 200 else 0)


def test_ubatches_that_are_too_small_are_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="n_ubatch is 32: with an archive it must be at least 64"):
        load(make_model(SHAPE), kv_size=48, kv_archive=True, n_ubatch=32)


def test_contexts_that_rotate_by_other_factors_share_nothing(tmp_path: Path) -> None:
    """Long and short RoPE factors: the size of the context chooses."""
    import architectures
    import llama_cpp

    from pyheadkv import _lib
    from pyheadkv.options import Options

    _, keys = architectures.cases()["phi3 (long RoPE factors)"]
    model = architectures.make_model("phi3", {**keys, "rope.scaling.original_context_length": 512})
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    ids = np.random.default_rng(0).integers(0, n_vocab, 400).astype(np.int32)

    def read(n_ctx: int, folder: Path | None) -> tuple[bytes, int]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = n_ctx
        params.n_threads = params.n_threads_batch = params.flash_attn_type = 1
        with _lib.creating(Options(kv_size=64, policy="snapkv", window=8).to_params(None, None)):
            ctx = llama_cpp.llama_init_from_model(model, params)
        if folder is not None:
            archive = _lib.lib.headkv_default_archive_params()
            archive.folder = str(folder).encode()
            _lib.check(_lib.lib.headkv_set_archive(ctx, ctypes.byref(archive)))
        assert _lib.lib.headkv_read_prompt(ctx, 0, ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(ids)) == 0
        out = bytes(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, -1), shape=(n_vocab,)))
        _lib.check(_lib.lib.headkv_end_prompt(ctx, 0))
        stats = _lib.Stats(size=ctypes.sizeof(_lib.Stats))
        _lib.check(_lib.lib.headkv_get_stats(ctx, 0, ctypes.byref(stats)))
        llama_cpp.llama_free(ctx)
        return out, stats.n_archived

    short, long = read(512, None), read(1024, None)
    assert short[0] != long[0]
    assert [read(n_ctx, tmp_path) for n_ctx in (512, 1024, 512, 1024)] == [short, long, (short[0], 320), (long[0], 320)]


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.ffn_up.weight", "blk.0.attn_k.weight"])
def test_a_model_that_differs_in_one_row_shares_nothing(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    import gguf

    path, prompt = tmp_path / "changed.gguf", tokens(600)
    prompt[100:103] = [200] * 3
    path.write_bytes(make_model(SHAPE).read_bytes())
    reader = gguf.GGUFReader(path, "r+")
    (rows,) = (t.data for t in reader.tensors if t.name == name)
    i = 200 if name.startswith("token") else 37
    rows[i] = rows[i][::-1].copy()
    reader.data.flush()
    load(make_model(SHAPE), kv_size=48, kv_archive=tmp_path / "kv").read_prompt(prompt)
    llm = load(path, kv_size=48, kv_archive=tmp_path / "kv")
    assert outcome(llm, prompt) == outcome(load(path, kv_size=48), prompt)
    assert n_archived(llm) == 0


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("olmo", "attention.clamp_kqv", 0.05),
        ("mistral3 (attention temperature)", "attention.temperature_scale", 2.0),
        ("glm4moe", "expert_weights_scale", 3.0),
    ],
)
def test_a_model_with_other_metadata_beside_its_file_shares_nothing(case: str, key: str, value: float, tmp_path: Path) -> None:
    import architectures
    import llama_cpp

    from pyheadkv import _lib
    from pyheadkv.options import Options

    arch, keys = architectures.cases()[case]
    path = tmp_path / "model.gguf"
    save = architectures._function("llama_model_save_to_file", None, ctypes.c_void_p, ctypes.c_char_p)
    save(architectures.make_model(arch, keys), str(path).encode())

    def read(is_changed: bool) -> int:
        params = llama_cpp.llama_model_default_params()
        overrides = (llama_cpp.llama_model_kv_override * 2)()
        overrides[0].key, overrides[0].tag, overrides[0].value.val_f64 = f"{arch}.{key}".encode(), 1, value
        if is_changed:
            params.kv_overrides = overrides
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        of_ctx = llama_cpp.llama_context_default_params()
        of_ctx.n_ctx = of_ctx.n_batch = 512
        of_ctx.n_threads = of_ctx.n_threads_batch = of_ctx.flash_attn_type = 1
        with _lib.creating(Options(kv_size=64, policy="snapkv", window=8).to_params(None, None)):
            ctx = llama_cpp.llama_init_from_model(model, of_ctx)
        archive = _lib.lib.headkv_default_archive_params()
        archive.folder = str(tmp_path / "kv").encode()
        _lib.check(_lib.lib.headkv_set_archive(ctx, ctypes.byref(archive)))
        ids = (ctypes.c_int32 * 400)(*range(3, 103), *range(3, 103), *range(3, 103), *range(3, 103))
        assert _lib.lib.headkv_read_prompt(ctx, 0, ids, 400) == 0
        _lib.check(_lib.lib.headkv_end_prompt(ctx, 0))
        stats = _lib.Stats(size=ctypes.sizeof(_lib.Stats))
        _lib.check(_lib.lib.headkv_get_stats(ctx, 0, ctypes.byref(stats)))
        llama_cpp.llama_free(ctx)
        llama_cpp.llama_model_free(model)
        return int(stats.n_archived)

    assert [read(is_changed) for is_changed in (False, True, False, True)] == [0, 0, 320, 320]


def test_adapters_that_differ_far_behind_share_nothing(tmp_path: Path) -> None:
    """Behind the first 4096 bytes of their tensors; a saved sequence knows it too."""
    from gguf import GGUFReader

    from pyheadkv.testing import write_random_lora, write_random_model

    path, prompt, shape = tmp_path / "model.gguf", tokens(600), Shape("large", "llama", 8, 4, n_layer=2, head_dim=128)
    write_random_model(path, n_layer=2, n_embd=1024, n_head=8, n_head_kv=4, head_dim=128, n_ff=512, seed=3, importance="random")
    first, second = write_random_lora(tmp_path / "a.gguf", path, seed=5), tmp_path / "b.gguf"
    shutil.copy(first, second)
    reader = GGUFReader(second, "r+")
    for tensor in reader.tensors:
        values = tensor.data.reshape(-1)
        values[4096 // values.itemsize :] *= 3
    reader.data.flush()
    one, other = (load(path, kv_size=48, lora_path=str(lora), kv_archive=tmp_path / "kv") for lora in (first, second))
    one.read_prompt(prompt)
    state = one.save_state()
    assert outcome(other, prompt, shape) == outcome(load(path, kv_size=48, lora_path=str(second)), prompt, shape)
    assert n_archived(other) == 0
    with pytest.raises(ValueError, match="other adapters"):
        other.load_state(state)


def test_an_archive_that_holds_no_block_says_so(make_model: MakeModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    llm = load(make_model(SHAPE), kv_size=48, kv_archive=tmp_path, kv_archive_size=1000, verbose=True)
    llm.read_prompt(tokens(600))
    assert (llm.kv_stats().archive.n_failed, blocks(tmp_path)) == (1, [])
    assert "and all of it may take 1000" in capfd.readouterr().err


def test_attention_that_was_not_summed_is_not_believed(make_model: MakeModel) -> None:
    """A context of h2o that reads by another policy takes cells from the archive."""
    llm = load(make_model(SHAPE), kv_size=48, policy="h2o", prefill="token", kv_archive=True)
    llm.read_prompt(tokens(1000))
    llm.configure(policy="snapkv")
    llm.reset()
    llm.eval(tokens(1000))
    assert n_archived(llm) > 0
    llm.configure(policy="h2o")
    with pytest.raises(RuntimeError, match="or came from the archive, whose attention policy 'h2o' counts"):
        llm.end_prompt()


def test_a_batch_that_is_aborted_leaves_no_cells(make_model: MakeModel, tmp_path: Path) -> None:
    """Neither those that it took from the archive: the tokens that come instead do not attend to them."""
    from pyheadkv import _lib

    path, prompt = make_model(SHAPE), tokens(1000)
    other, found = [*prompt[:100], *tokens(400, seed=5)[1:]], []
    for kv_archive in (None, tmp_path):
        llm = load(path, kv_size=48, prefill="token", n_batch=2048, kv_archive=kv_archive)
        if kv_archive:
            llm.read_prompt(prompt)
            llm.reset()
        assert decode(llm, prompt[:100], 0, n_all=100) == 0
        abort = _lib.Progress(lambda *_: False)
        _lib.lib.headkv_set_progress(llm.ctx, abort, None)
        assert decode(llm, prompt[100:], 100, n_all=1000) < 0
        _lib.lib.headkv_set_progress(llm.ctx, _lib.Progress(), None)
        assert llm.kv_stats().n_past == 100
        assert decode(llm, other[100:], 100, n_all=len(other)) == 0
        found.append(end(llm))
    assert found[0] == found[1]


def test_a_prompt_goes_on_behind_the_cells_of_another_one(make_model: MakeModel, tmp_path: Path) -> None:
    path, prompt, found = make_model(SHAPE), tokens(1000), []
    for kv_archive in (None, tmp_path):
        llm = load(path, kv_size=48, prefill="token", n_batch=2048, n_seq_max=2, kv_archive=kv_archive)
        if kv_archive:
            llm.read_prompt(prompt)
            llm.reset()
        assert decode(llm, tokens(100, seed=7), 0, seq_id=1, n_all=100) == 0
        assert decode(llm, prompt[:64], 0, n_all=64) == 0
        assert remove(llm, 1)
        assert decode(llm, prompt[64:], 64, n_all=1000) == 0
        found.append(end(llm))
    assert found[0] == found[1]
    # it attended in the order of other cells, which is not archived
    set_archive(llm, tmp_path / "other")
    llm.reset()
    assert decode(llm, tokens(100, seed=7), 0, seq_id=1, n_all=100) == decode(llm, prompt, 0, n_all=1000) == 0
    end(llm)
    assert not blocks(tmp_path / "other")


def test_an_archive_is_not_set_under_a_prompt(make_model: MakeModel, tmp_path: Path) -> None:
    """Its cells may be rounded ones of another archive."""
    llm = load(make_model(SHAPE), kv_size=48, prefill="token")
    llm.eval(tokens(300))
    with pytest.raises(ValueError, match="a prompt is held that is not compressed"):
        set_archive(llm, tmp_path)
    llm.end_prompt()
    set_archive(llm, tmp_path)


def test_types_that_cannot_be_read_back_are_refused(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_size=48)
    for type_kv in (9, 15, 24, 999):  # q8_1, q8_K, i8
        with pytest.raises(ValueError, match=f"archive type {type_kv}: it must be one that numbers can be rounded to"):
            set_archive(llm, None, type_kv)


# ------------------------------------------------------------------ numbers and room


def test_numbers_are_those_of_what_is_left_of_a_prompt(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_size=48, prefill="token", kv_archive=True)
    llm.read_prompt(tokens(1000))
    llm.reset()
    llm.eval(tokens(1000))
    remove(llm, 0, 100)
    llm.n_tokens = 100
    llm.eval(tokens(200, seed=9)[1:])
    llm.end_prompt()
    stats = llm.kv_stats()
    assert (stats.n_prompt, stats.n_archived) == (299, 100)
    assert (stats.archive.n_restored, stats.archive.n_computed) == (100, 1000 + 199)


def test_copies_of_a_prompt_count_once(make_model: MakeModel) -> None:
    llm = load(make_model(SHAPE), kv_size=48, prefill="token", n_seq_max=3, kv_archive=True)
    llm.eval(tokens(600))
    llm.compress_as(1)
    llm.compress_as(2)
    assert llm.kv_stats().archive.n_computed == 0 and llm.kv_stats().archive.n_blocks == 3
    llm.end_prompt()
    assert llm.kv_stats().archive.n_computed == 600


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_prompt_does_not_drive_out_what_it_is_read_from(where: str, make_model: MakeModel, tmp_path: Path) -> None:
    path, first = make_model(SHAPE), tokens(256 + 192)
    second = [*first[:384], *tokens(600, seed=9)[1:]]
    for is_c_order in (False, True):
        kv_archive = tmp_path / str(is_c_order) if where == "folder" else True
        llm = load(path, kv_size=48, n_ubatch=128, n_batch=2048, kv_archive=kv_archive, kv_archive_size=int(2.2 * BLOCK_BYTES))
        llm.read_prompt(first)
        if is_c_order:
            llm.reset()
            assert decode(llm, second, 0, n_all=len(second), whole=True) == 0
        else:
            llm.read_prompt(second)
        assert n_archived(llm) == 384 and llm.kv_stats().archive.n_damaged == 0
        llm.reset()
        assert llm.kv_stats().archive.bytes <= int(2.2 * BLOCK_BYTES)


# ------------------------------------------------------------------ the folder


def test_files_of_others_stay_and_do_not_count(make_model: MakeModel, tmp_path: Path) -> None:
    from pyheadkv.archive import list_blocks, prune

    names = ["2024-11-29.kv", "cafe.kv", "0123456789ABCDEF-0123456789abcdef.kv", "abc.999999x.part", "2024.999999.part"]
    for name in names:
        (tmp_path / name).write_text(name)
    with (tmp_path / "film.part").open("wb") as f:
        f.truncate(50 << 30)
    assert list_blocks(tmp_path) == [] and prune(tmp_path, 0) == 0
    llm = load(make_model(SHAPE), kv_size=48, kv_archive=tmp_path, kv_archive_size=6 * BLOCK_BYTES)
    for seed in range(4):
        llm.read_prompt(tokens(600, seed=seed))
    assert all((tmp_path / name).read_text() == name for name in names)
    assert llm.kv_stats().archive.n_blocks >= 5


def test_looking_at_a_folder_leaves_what_is_being_written(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever name this process calls it."""
    from pyheadkv.archive import list_blocks

    folder = tmp_path / "kv"
    llm = load(make_model(SHAPE), kv_size=48, n_ubatch=128, kv_archive=folder)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)

    def progress(*_: int) -> None:
        for name in ("kv", "link", f"{folder}/"):
            assert list_blocks(name) == []

    llm.set_progress(progress)
    llm.read_prompt(tokens(600))
    assert llm.kv_stats().archive.n_blocks == 3


def test_a_block_that_cannot_be_opened_is_not_damaged(make_model: MakeModel, tmp_path: Path) -> None:
    """Without a free file descriptor nothing is read, written or removed."""
    llm = load(make_model(SHAPE), kv_size=48, kv_archive=tmp_path)
    wanted, before = outcome(llm, tokens(900)), blocks(tmp_path)
    resource = pytest.importorskip("resource", reason="limits of a process are those of Unix")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        found = outcome(llm, tokens(900))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == wanted and n_archived(llm) == 0
    assert blocks(tmp_path) == before and llm.kv_stats().archive.n_damaged == 0
    assert outcome(llm, tokens(900)) == wanted and n_archived(llm) == 832


def test_a_name_with_a_zero_byte_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zero byte"):
        load(make_model(SHAPE), kv_size=48, kv_archive=f"{tmp_path}\0more")
