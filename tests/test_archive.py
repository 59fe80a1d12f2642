"""The archive: what is read from it gives what reading all of it gives, and what is damaged is read."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHAPES, Shape, load, nmse, read_prompt, tokens
from conftest import outcome as outcome_of

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
SHAPE = SHAPES[1]
BLOCK = 256  # tokens
ORDERS = pytest.mark.parametrize("prefill", ["layer", "token"])


def outcome(llm: Any, prompt: list[int], shape: Shape = SHAPE) -> tuple[list[bytes], list[list[int]]]:
    """Logits of the prompt's end and of three more tokens, and the kept positions of every head."""
    return outcome_of(llm, prompt, shape)


def n_archived(llm: Any) -> int:
    """Tokens of the last prompt that were not read."""
    return int(llm.kv_stats().n_archived)


def usable(n_there: int, n_prompt: int, prefill: str = "layer", n_batch: int = 512) -> int:
    """Tokens that need not be read of a prompt that begins with an archived one: 64 at a time, but for the last 64 or more of each batch."""
    ends = [n_prompt] if prefill == "layer" else [*range(n_batch, n_prompt, n_batch), n_prompt]
    n, start = 0, 0
    for end in ends:
        n += max(0, min(min(n_there, end) // 64 * 64, (end - 64) // 64 * 64) - start)
        start = end
    return n


def blocks(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


@pytest.fixture(scope="module")
def chat() -> list[list[int]]:
    """Prompts of the turns of a chat, each of which begins with the one before."""
    ends = (700, 790, 1100, 1101, 1700)
    return [tokens(1700, seed=3)[:n] for n in ends]


# ------------------------------------------------------------------ the same outcome


@ORDERS
@pytest.mark.parametrize("n_ubatch", [64, 256, 512])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_every_turn_of_a_chat_is_that_of_a_fresh_context(
    shape: Shape, n_ubatch: int, prefill: str, chat: list[list[int]], make_model: MakeModel, tmp_path: Path
) -> None:
    path, options = make_model(shape), dict(kv_size=48, prefill=prefill, n_ubatch=n_ubatch, n_batch=512)
    llm, fresh = load(path, kv_archive=tmp_path / "kv", **options), load(path, **options)
    for i, prompt in enumerate(chat):
        assert outcome(llm, prompt, shape) == outcome(fresh, prompt, shape)
        most = len(chat[i - 1]) if i else 0  # tokens of a block, and not those of the window
        assert n_archived(llm) == usable(most, len(prompt), prefill)
    stats = llm.kv_stats().archive
    assert stats.n_restored + stats.n_computed == sum(map(len, chat))
    assert stats.n_blocks == len(blocks(tmp_path / "kv")) == 1700 // BLOCK + 1  # the end
    assert stats.n_damaged == stats.n_failed == stats.n_evicted == 0


@ORDERS
@pytest.mark.parametrize(
    "policy", ["headkv", "snapkv", "streaming", "adakv", "criticalkv", "razor", "pyramidkv", "headkv+adakv", "lossless"]
)
def test_every_policy_is_that_of_a_fresh_context(
    policy: str, prefill: str, chat: list[list[int]], make_model: MakeModel, tmp_path: Path
) -> None:
    amount = {} if policy == "lossless" else {"kv_size": 48, "preset": "default"}
    path, options = make_model(SHAPE), dict(policy=policy, prefill=prefill, n_batch=512, **amount)
    llm, fresh = load(path, kv_archive=True, **options), load(path, **options)
    for prompt in chat[1:3]:
        assert outcome(llm, prompt) == outcome(fresh, prompt)
    assert n_archived(llm) == usable(790, 1100, prefill)


@ORDERS
def test_a_policy_that_looks_at_all_tokens_reads_them(prefill: str, chat: list[list[int]], make_model: MakeModel) -> None:
    path, options = make_model(SHAPE), dict(policy="h2o", kv_size=48, prefill=prefill)
    llm, fresh = load(path, kv_archive=True, **options), load(path, **options)
    for prompt in chat[1:3]:
        assert outcome(llm, prompt) == outcome(fresh, prompt)
    assert n_archived(llm) == 0 and llm.kv_stats().archive.n_blocks == 5


@ORDERS
@pytest.mark.parametrize("type_kv", [8, 2, 30, 0], ids=["q8_0", "q4_0", "bf16", "f32"])
def test_cells_of_every_type_are_restored_as_they_were(
    type_kv: int, prefill: str, chat: list[list[int]], make_model: MakeModel, tmp_path: Path
) -> None:
    shape = Shape("quant", "llama", 4, 2, head_dim=64)
    path, options = make_model(shape), dict(kv_size=48, prefill=prefill, type_k=type_kv, type_v=type_kv, n_batch=512)
    llm, fresh = load(path, kv_archive=tmp_path, **options), load(path, **options)
    for prompt in chat:
        assert outcome(llm, prompt, shape) == outcome(fresh, prompt, shape)
    assert n_archived(llm) == usable(1101, 1700, prefill)


def test_edits_other_beginnings_and_the_same_prompt_again(make_model: MakeModel, tmp_path: Path) -> None:
    path, options = make_model(SHAPE), dict(kv_size=48, n_ubatch=128)
    llm, fresh = load(path, kv_archive=tmp_path, **options), load(path, **options)
    base = tokens(1500, seed=5)
    edited = [*base[:1000], 17, *base[1001:]]
    shorter = base[:600]
    other = [1, 20, *base[2:]]
    joined = [*base[:512], *tokens(300, seed=6), *base[800:]]
    for prompt, n in [(base, 0), (edited, 960), (base, 1408), (shorter, 512), (other, 0), (other, 1408), (joined, 512), (edited, 1408)]:
        assert outcome(llm, prompt) == outcome(fresh, prompt)
        assert n_archived(llm) == n


def test_a_restart_reads_what_another_process_wrote(make_model: MakeModel, tmp_path: Path, chat: list[list[int]]) -> None:
    path = make_model(SHAPE)
    code = "import sys; from conftest import load, tokens; load(sys.argv[1], kv_size=48, kv_archive=sys.argv[2]).read_prompt(tokens(1700, seed=3)[:1100])"
    subprocess.run([sys.executable, "-c", code, path, tmp_path], check=True, cwd=Path(__file__).parent)
    llm = load(path, kv_size=32, kv_archive=tmp_path)  # the budget is that of the prompt
    assert outcome(llm, chat[4]) == outcome(load(path, kv_size=32), chat[4])
    assert n_archived(llm) == 1088


def test_adapters_share_nothing(make_model: MakeModel, tmp_path: Path, chat: list[list[int]]) -> None:
    from pyheadkv.testing import write_random_lora

    path = make_model(SHAPE)
    loras = [None, *(str(write_random_lora(tmp_path / f"{seed}.gguf", path, seed=seed)) for seed in (5, 6))]
    expected = [outcome(load(path, kv_size=48, lora_path=lora), chat[1]) for lora in loras]
    assert expected[0] != expected[1] != expected[2]
    for n in (0, usable(790, 790)):
        for lora, wanted in zip(loras, expected, strict=True):
            llm = load(path, kv_size=48, lora_path=lora, kv_archive=tmp_path / "kv")
            assert n_archived(llm) == 0 and outcome(llm, chat[1]) == wanted, (n, lora)
            assert n_archived(llm) == n


def test_a_model_with_other_weights_and_the_same_metadata_shares_nothing(make_model: MakeModel, tmp_path: Path) -> None:
    prompt = tokens(600)
    path = tmp_path / "changed.gguf"
    data = bytearray(make_model(SHAPE).read_bytes())
    data[-300:] = bytes(300)  # of the last tensor alone
    path.write_bytes(data)
    for model in (make_model(SHAPE), path):
        llm = load(model, kv_size=48, kv_archive=tmp_path / "kv")
        assert outcome(llm, prompt) == outcome(load(model, kv_size=48), prompt)
        assert n_archived(llm) == 0


@ORDERS
def test_a_rounded_archive_is_half_as_large_and_changes_little(prefill: str, make_model: MakeModel, tmp_path: Path) -> None:
    shape = Shape("round", "llama", 8, 4, head_dim=64)
    path, prompt, bytes_of, logits_of = make_model(shape), tokens(1500), {}, {}
    for kind in (None, "q8_0"):
        llm = load(path, kv_size=48, prefill=prefill, kv_archive=tmp_path / str(kind), kv_archive_type=kind)
        llm.read_prompt(prompt)
        logits_of[kind] = read_prompt(llm, [*prompt[:-1], 17])
        assert n_archived(llm) == usable(1499, 1500, prefill)
        bytes_of[kind] = sum(f.stat().st_size for f in blocks(tmp_path / str(kind)))
    assert 0.5 < bytes_of["q8_0"] / bytes_of[None] < 0.56
    assert 0 < nmse(logits_of["q8_0"], logits_of[None]) < 1e-3


def test_a_prompt_of_the_model_itself_is_a_chat(make_model: MakeModel, tmp_path: Path) -> None:
    """Generated tokens are read with the next turn, not taken from the compressed run."""
    path = make_model(SHAPE)
    llm, fresh = (load(path, kv_size=24, **options) for options in ({"kv_archive": tmp_path}, {}))
    prompts, answers = [tokens(900)], []
    for _ in range(4):
        turn = []
        for model in (llm, fresh):
            out: list[int] = []
            for token in model.generate(prompts[-1], temp=0.0):
                out.append(token)
                if len(out) == 60:
                    break
            turn.append(out)
        assert turn[0] == turn[1]
        answers.append(turn[0])
        prompts.append([*prompts[-1], *turn[0], *tokens(40, seed=len(answers))[1:]])
    assert n_archived(llm) == 1088


# ------------------------------------------------------------------ what users ask for


def test_wrong_options_are_errors(make_model: MakeModel, tmp_path: Path) -> None:
    path = make_model(SHAPE)
    (tmp_path / "file").write_text("")
    for options, message in [
        ({"kv_archive": 5}, "must be a folder, or True"),
        ({"kv_archive": ""}, "must be a folder, or True"),
        ({"kv_archive": tmp_path / "file"}, "it is not a folder|Not a directory|exists"),
        ({"kv_archive": tmp_path / "file" / "below"}, "Not a directory|not a folder"),
        ({"kv_archive": True, "kv_archive_size": "much"}, "positive size such as"),
        ({"kv_archive": True, "kv_archive_size": 0}, "positive size such as"),
        ({"kv_archive": True, "kv_archive_size": "9000000TiB"}, "must be in"),
        ({"kv_archive": True, "kv_archive_type": "q9"}, "must be one of 'f16', 'bf16', 'q8_0', 'q4_0'"),
        ({"kv_archive_size": "1GiB"}, "there is no archive"),
        ({"kv_archive_type": "q8_0"}, "there is no archive"),
        ({"kv_archive": True, "kv_reuse": True}, "leave one of them out"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(path, kv_size=48, **options)
    with pytest.raises(ValueError, match="nothing says how much is kept"):
        load(path, kv_archive=True)


def test_files_are_the_owners_alone(make_model: MakeModel, tmp_path: Path) -> None:
    llm = load(make_model(SHAPE), kv_size=48, kv_archive=tmp_path / "new" / "kv")
    llm.read_prompt(tokens(300))
    (file,) = blocks(tmp_path / "new" / "kv")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_copy_has_the_archive(make_model: MakeModel, tmp_path: Path) -> None:
    import pickle

    llm = load(make_model(SHAPE), kv_size=48, kv_archive=tmp_path)
    llm.read_prompt(tokens(600))
    copy = pickle.loads(pickle.dumps(llm))
    copy.read_prompt(tokens(600))
    assert n_archived(copy) == 512


def test_progress_begins_behind_what_is_archived(make_model: MakeModel, tmp_path: Path) -> None:
    llm = load(make_model(SHAPE), kv_size=48, kv_archive=tmp_path, n_ubatch=512)
    llm.read_prompt(tokens(1100))
    steps: list[tuple[int, int, int, int]] = []
    llm.set_progress(lambda *step: steps.append(step))
    llm.read_prompt([*tokens(1100)[:900], *tokens(300, seed=9)])
    assert steps[0] == (0, 3, 0, 1200)  # nobody has looked yet
    assert steps[1:] == [(0, 3, 1024, 1200), (1, 3, 896, 1200), (1, 3, 1024, 1200), (2, 3, 896, 1200), (2, 3, 1024, 1200)]


@ORDERS
def test_an_aborted_prompt_leaves_no_block_and_no_part(prefill: str, make_model: MakeModel, tmp_path: Path) -> None:
    llm = load(make_model(SHAPE), kv_size=48, prefill=prefill, kv_archive=tmp_path, n_ubatch=128)
    llm.read_prompt(tokens(600))
    longer, steps = [*tokens(600), *tokens(500, seed=4)], list[tuple[int, int, int, int]]()
    llm.set_progress(lambda *step: steps.append(step))
    llm.read_prompt([*tokens(600), *tokens(500, seed=5)])
    wanted = outcome(load(make_model(SHAPE), kv_size=48, n_ubatch=128, prefill=prefill), longer)
    for stop in steps[1:]:
        before = blocks(tmp_path)
        llm.set_progress(lambda *step, stop=stop: step != stop)
        with pytest.raises(RuntimeError, match="aborted"):
            llm.read_prompt(longer)
        assert (blocks(tmp_path), list(tmp_path.glob("*.part"))) == (before, [])
    llm.set_progress(None)
    assert outcome(llm, longer) == wanted
    assert n_archived(llm) == usable(600, 1100, prefill)


# ------------------------------------------------------------------ room


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_the_limit_holds_and_what_was_not_used_goes_first(where: str, make_model: MakeModel, tmp_path: Path) -> None:
    path, kv = make_model(SHAPE), tmp_path / "kv" if where == "folder" else True
    n_block = 3 * 2 * BLOCK * 2 * 32 * 2  # three layers of K and V, two heads of 32 halves
    limit = int(5.5 * n_block)
    llm = load(path, kv_size=48, kv_archive=kv, kv_archive_size=limit)
    a, b, c = (tokens(600, seed=seed) for seed in (11, 12, 13))
    for prompt in (a, b, a, c):  # two blocks each: c takes the place of b
        llm.read_prompt(prompt)
        assert llm.kv_stats().archive.bytes <= limit
    found = {}
    for name, prompt in {"a": a, "c": c, "b": b}.items():
        llm.read_prompt(prompt)
        found[name] = n_archived(llm)
    # of b the end went first, and its beginning with it where room for two blocks was needed
    assert found["a"] == 512 and found["c"] == 512 and found["b"] < 512
    longer = tokens(2000, seed=14)
    for _ in range(2):
        llm.read_prompt(longer)
        assert llm.kv_stats().archive.bytes <= limit
    assert n_archived(llm) == 5 * BLOCK  # the beginning, as much as there is room for
    if where == "folder":
        assert sum(f.stat().st_size for f in tmp_path.rglob("*.*")) <= limit
    assert llm.kv_stats().archive.n_evicted > 0


FULL_DISK = """
import resource, signal, sys
from conftest import load, read_prompt, tokens
path, folder = sys.argv[1:]
llm = load(path, kv_size=48, kv_archive=folder, verbose=True)
wanted = read_prompt(load(path, kv_size=48), tokens(600)).tobytes()
before = resource.getrlimit(resource.RLIMIT_FSIZE)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit, n_failed, n_blocks in [(1000, 1, 0), (1000, 2, 0), (150_000, 3, 0), (before[0], 3, 3)]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    assert read_prompt(llm, tokens(600)).tobytes() == wanted
    stats = llm.kv_stats().archive
    assert (stats.n_failed, stats.n_blocks) == (n_failed, n_blocks), stats
"""


def test_a_folder_that_cannot_be_written_is_said_and_done_without(make_model: MakeModel, tmp_path: Path) -> None:
    """No file may be longer than 1000 bytes, or than half a block: as on a full disk."""
    command = [sys.executable, "-c", FULL_DISK, make_model(SHAPE), tmp_path]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the archive is not written" in done.stderr and "File too large" in done.stderr
    assert len(blocks(tmp_path)) == len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_was_removed_is_made_again(make_model: MakeModel, tmp_path: Path) -> None:
    llm = load(make_model(SHAPE), kv_size=48, kv_archive=tmp_path / "kv")
    wanted = outcome(llm, tokens(600))
    shutil.rmtree(tmp_path / "kv")
    for n in (0, 512):
        assert outcome(llm, tokens(600)) == wanted
        assert n_archived(llm) == n


# ------------------------------------------------------------------ damage


def damage_of(size: int) -> list[tuple[str, Callable[[bytes], bytes]]]:
    """Cut at every 4 KiB, and single bits anywhere."""
    rng = np.random.default_rng(0)

    def flip(data: bytes, bit: int) -> bytes:
        out = bytearray(data)
        out[bit // 8] ^= 1 << bit % 8
        return bytes(out)

    cuts = [(f"cut at {n}", lambda data, n=n: data[:n]) for n in [*range(0, size, 4096), size - 1]]
    bits = [*range(0, 8 * 96, 61), *rng.integers(0, 8 * size, 30).tolist(), 8 * size - 1]
    flips = [(f"bit {bit}", lambda data, bit=bit: flip(data, bit)) for bit in bits]
    return [*cuts, *flips, ("longer", lambda data: data + b"x"), ("zeros", lambda data: bytes(len(data)))]


@ORDERS
def test_damaged_blocks_are_removed_and_read(prefill: str, make_model: MakeModel, tmp_path: Path) -> None:
    path, prompt = make_model(SHAPE), tokens(900)
    llm = load(path, kv_size=48, prefill=prefill, kv_archive=tmp_path, n_ubatch=128)
    wanted = outcome(llm, prompt)
    whole = {file: file.read_bytes() for file in blocks(tmp_path)}
    assert len(whole) == 4
    changes = damage_of(min(map(len, whole.values())))
    for i, (what, change) in enumerate(changes):
        file = list(whole)[i % 4]
        file.write_bytes(change(whole[file]))
        n_damaged = llm.kv_stats().archive.n_damaged
        assert outcome(llm, prompt) == wanted, what
        assert n_archived(llm) < usable(900, 900, prefill), what
        assert llm.kv_stats().archive.n_damaged == n_damaged + 1, what
        assert {file: file.read_bytes() for file in blocks(tmp_path)} == whole, what  # written again
        assert outcome(llm, prompt) == wanted and n_archived(llm) == usable(900, 900, prefill), what


def test_a_block_under_another_name_is_none(make_model: MakeModel, tmp_path: Path) -> None:
    path = make_model(SHAPE)
    llm = load(path, kv_size=48, kv_archive=tmp_path)
    llm.read_prompt(tokens(300, seed=1))
    (first,) = blocks(tmp_path)
    llm.read_prompt(tokens(300, seed=2))
    (second,) = set(blocks(tmp_path)) - {first}
    second.write_bytes(first.read_bytes())
    assert outcome(llm, tokens(300, seed=2)) == outcome(load(path, kv_size=48), tokens(300, seed=2))
    assert n_archived(llm) == 0


@pytest.mark.parametrize("what", ["remove", "damage"])
def test_a_block_that_goes_while_it_is_read_is_read(what: str, make_model: MakeModel, tmp_path: Path) -> None:
    """In any layer: the prompt is begun again."""
    path, prompt = make_model(SHAPE), [*tokens(700), *tokens(200, seed=8)]
    wanted = outcome(load(path, kv_size=48, n_ubatch=64), prompt)
    llm = load(path, kv_size=48, kv_archive=tmp_path, n_ubatch=64)
    llm.read_prompt(tokens(700))
    kept = {file: file.read_bytes() for file in blocks(tmp_path)}
    steps: list[tuple[int, int, int, int]] = []
    llm.set_progress(lambda *step: steps.append(step))
    llm.read_prompt(prompt)
    for at in range(1, len(steps)):
        for file in blocks(tmp_path):
            file.unlink()
        for file, data in kept.items():
            file.write_bytes(data)
        calls = [0]

        def progress(*step: int, at: int = at, calls: list[int] = calls) -> None:
            calls[0] += 1
            if calls[0] == at:
                for file in kept:
                    file.unlink() if what == "remove" else file.write_bytes(kept[file][:-20] + bytes(20))

        llm.set_progress(progress)
        assert outcome(llm, prompt) == wanted
        llm.set_progress(None)
        assert n_archived(llm) in (0, 256, 512, 640)
        for _ in kept:  # each of which writes what it finds gone
            assert outcome(llm, prompt) == wanted
        assert outcome(llm, prompt) == wanted and n_archived(llm) == usable(900, 900)


def test_nothing_but_blocks_is_touched(make_model: MakeModel, tmp_path: Path) -> None:
    names = ["notes.txt", "my.kv", "0123456789abcdefg.kv", "x.part", "0123.part", "abc.1x.part"]
    for name in names:
        (tmp_path / name).write_text(name)
    llm = load(make_model(SHAPE), kv_size=48, kv_archive=tmp_path, kv_archive_size=1 << 20)
    for seed in range(8):
        llm.read_prompt(tokens(600, seed=seed))
    assert all((tmp_path / name).read_text() == name for name in names)


# ------------------------------------------------------------------ processes

WRITER = """
import sys
from conftest import load, tokens
llm = load(sys.argv[1], kv_size=48, kv_archive=sys.argv[2], n_ubatch=64)
print("ready", flush=True)
for seed in range(int(sys.argv[3])):
    llm.read_prompt(tokens(1500, seed=seed))
print(llm.kv_stats().archive, flush=True)
"""


def start(path: Path, folder: Path, n: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, path, folder, str(n)], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    )


def test_a_process_that_is_killed_leaves_nothing_that_is_believed(make_model: MakeModel, tmp_path: Path) -> None:
    path = make_model(SHAPE)
    for i in range(6):
        with start(path, tmp_path, 1000) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(0.05 + 0.07 * i)
            process.kill()
    llm, fresh = load(path, kv_size=48, kv_archive=tmp_path, n_ubatch=64), load(path, kv_size=48, n_ubatch=64)
    assert not list(tmp_path.glob("*.part"))
    for seed in range(6):
        assert outcome(llm, tokens(1500, seed=seed)) == outcome(fresh, tokens(1500, seed=seed))
    assert llm.kv_stats().archive.n_damaged == 0


def test_processes_share_a_folder(make_model: MakeModel, tmp_path: Path) -> None:
    path = make_model(SHAPE)
    processes = [start(path, tmp_path, 12) for _ in range(3)]
    for process in processes:
        out, _ = process.communicate()
        assert process.returncode == 0 and "n_damaged=0, n_failed=0" in out
    assert len(blocks(tmp_path)) == 12 * 6 and not list(tmp_path.glob("*.part"))
    llm, fresh = load(path, kv_size=48, kv_archive=tmp_path), load(path, kv_size=48)
    for seed in (0, 11):
        assert outcome(llm, tokens(1500, seed=seed)) == outcome(fresh, tokens(1500, seed=seed))
        assert n_archived(llm) == 1408


def test_a_clock_that_jumps_changes_nothing_but_the_order(make_model: MakeModel, tmp_path: Path) -> None:
    llm = load(make_model(SHAPE), kv_size=48, kv_archive=tmp_path)
    wanted = outcome(llm, tokens(900))
    for t in (0, 4_000_000_000, 1):
        for file in blocks(tmp_path):
            os.utime(file, (t, t))
        assert outcome(llm, tokens(900)) == wanted and n_archived(llm) == 832


# ------------------------------------------------------------------ the command


def test_the_command_lists_verifies_and_prunes(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pyheadkv.cli import main

    llm = load(make_model(SHAPE), kv_size=48, kv_archive=tmp_path)
    llm.read_prompt(tokens(1100))
    assert main(["archive", str(tmp_path)]) == 0
    assert "5 blocks" in capsys.readouterr().out
    assert main(["archive", str(tmp_path), "--verify"]) == 0
    file = max(blocks(tmp_path), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    assert main(["archive", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["archive", str(tmp_path), "--verify"]) == 1
    out = capsys.readouterr().out
    assert file.stem in out and "layer 2 of 3 is damaged" in out
    assert main(["archive", str(tmp_path), "--verify", "--remove-damaged"]) == 0
    assert len(blocks(tmp_path)) == 4 and not file.exists()
    assert main(["archive", str(tmp_path), "--prune", str(2 * len(data))]) == 0
    assert len(blocks(tmp_path)) == 2
    assert main(["archive", str(tmp_path), "--prune", "0"]) == 0
    assert not blocks(tmp_path)
    assert main(["archive", str(tmp_path / "nope")]) == 1
