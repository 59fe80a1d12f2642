"""The page at /kv and the endpoint behind it: what it tells is what the heads hold, and whom it tells."""

from __future__ import annotations

import codecs
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

try:
    import pyheadkv  # noqa: F401
except ImportError as error:
    pytest.skip(f"the library is not built: {error}", allow_module_level=True)

from conftest import SHAPES, WINDOWED, load, tokens
from page_server import HOSTILE, KV_SIZE, N_CTX, N_UBATCH, PAGE, WINDOW, get, llama_server, positions, running

from pyheadkv.cli import serve

try:
    SERVER = serve.server_path()
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)

SHAPE = SHAPES[1]
PROMPT = tokens(700, seed=3)
FILES = ["/kv", "/kv/kv.css", "/kv/kv.js", "/kv/kv.svg"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page") / "log"


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model(SHAPE)


@pytest.fixture(scope="module")
def server(model: Path, log: Path) -> Iterator[llama_server.Server]:
    """Two slots that go on with what they hold."""
    with running(log, model, "--kv-reuse", n_slots=2) as server:
        yield server


def all_held(server: llama_server.Server, query: str) -> tuple[list[int], str]:
    """How many heads hold each token, and the text of all, read in pieces."""
    held: list[int] = []
    text = ""
    while True:
        view = positions(server, f"{query}&first={len(held)}&n=300")
        assert view["first"] == len(held) and len(view["held"]) == len(view["text"])
        held += view["held"]
        text += "".join(view["text"])
        if len(held) == view["n_tokens"] or not view["held"]:
            return held, text


def test_positions_are_those_that_the_heads_hold(server: llama_server.Server, model: Path) -> None:
    answer = server.complete(PROMPT, 5, id_slot=0)
    llm = load(model, kv_size=KV_SIZE, window=WINDOW, preset="default", n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH)
    llm.read_prompt(PROMPT)
    n_tokens = len(PROMPT) + 4  # the last token was sampled, and is not held yet
    total = [0] * n_tokens
    cells = []
    for il in range(SHAPE.n_layer):
        cells.append([])
        for ih in range(SHAPE.n_head_kv):
            kept = {*llm.kv_positions(il, ih).tolist(), *range(len(PROMPT), n_tokens)}
            held, _ = all_held(server, f"slot=0&layer={il}&head={ih}")
            assert held == [int(pos in kept) for pos in range(n_tokens)], (il, ih)
            total = [a + b for a, b in zip(total, held)]
            cells[-1].append(len(kept))
    view = positions(server)
    assert (view["state"], view["is_past"], view["n_tokens"], view["n_prompt"]) == ("compressed", False, n_tokens, len(PROMPT))
    assert view["n_heads"] == SHAPE.n_layer * SHAPE.n_head_kv and view["n_seen"] == sum(n > 0 for n in total) < n_tokens
    held, text = all_held(server, "slot=0")
    assert held == total and view["cells"] == cells
    whole = codecs.getincrementaldecoder("utf-8")("replace")  # without the beginning of a character at the end
    assert text == whole.decode(llm.detokenize([*PROMPT, *answer["tokens"][:4]], special=True))
    parts = len(view["overview"])
    assert parts == 256
    for i, share in enumerate(view["overview"]):
        part = total[i * n_tokens // parts : (i + 1) * n_tokens // parts]
        assert share == pytest.approx(sum(part) / len(part) / view["n_heads"], abs=1e-6)

    slot = server.request("/slots")[1][0]
    assert slot["kv_heads"] == cells
    assert slot["kv"]["n_tokens"] == n_tokens and slot["kv"]["cells"]["max"] == max(map(max, cells))
    assert slot["kv"]["bytes"] * n_tokens * view["n_heads"] == pytest.approx(slot["kv"]["bytes_full"] * sum(map(sum, cells)), rel=1e-6)


def test_turns_are_those_of_the_timings(server: llama_server.Server) -> None:
    first = server.complete(PROMPT[:400], 6, id_slot=1)
    second = server.complete([*PROMPT[:400], *first["tokens"][:5], 9, 10, 11], 4, id_slot=1)
    turns = server.request("/slots")[1][1]["kv_turns"][-2:]
    for turn, answer in zip(turns, (first, second)):
        timings = answer["timings"]
        assert turn["state"] == "done" and turn["n_archived"] == 0
        assert (turn["n_read"], turn["n_continued"], turn["n_generated"]) == (
            timings["prompt_n"],
            timings["cache_n"],
            timings["predicted_n"],
        )
        assert turn["read_ms"] == pytest.approx(timings["prompt_ms"]) and turn["per_second"] == pytest.approx(
            timings["predicted_per_second"]
        )
        assert turn["n_prompt"] == turn["n_read"] + turn["n_archived"] + turn["n_continued"]
        assert 0 < turn["bytes"] < turn["bytes_full"]
    assert [turn["n_continued"] for turn in turns] == [0, 405]
    for seed in range(40):  # the last ones are kept
        server.complete(tokens(20, seed=seed), 1, id_slot=1)
    assert len(server.request("/slots")[1][1]["kv_turns"]) == 32


@pytest.mark.parametrize(
    "flags", [["--kv-generated", 64, "--kv-generated-slack", 16], ["--kv-policy", "razor"], ["--kv-policy", "adakv"]], ids=str
)
def test_heads_hold_as_many_positions_as_cells(flags: list[Any], model: Path, log: Path) -> None:
    """After evictions too, and where one cell stands for all that were dropped, which is no position."""
    with running(log, model, "--kv-reuse", *flags) as server:
        server.complete(PROMPT, 200, ignore_eos=True)
        view = positions(server)
        is_mean = "razor" in flags
        for il, row in enumerate(server.request("/slots")[1][0]["kv_heads"]):
            assert view["cells"][il] == row
            for ih, n in enumerate(row):
                held, _ = all_held(server, f"slot=0&layer={il}&head={ih}")
                assert sum(held) in ({n, n - 1} if is_mean else {n})
                assert all(held[-WINDOW:])
        assert len(held) == len(PROMPT) + 199


def test_layers_that_are_not_compressed_have_no_heads(make_model: Callable[..., Path], log: Path) -> None:
    with running(log, make_model(WINDOWED), "--kv-reuse") as server:
        server.complete(PROMPT, 2)
        view = positions(server)
        assert [len(row) for row in view["cells"]] == [0, 2, 0, 2] and view["n_heads"] == 4
        answer = get(server, "/kv/positions?slot=0&layer=0&head=0")
        assert answer.status_code == 400 and "layer 0, head 0: no such KV head" in answer.text


def test_a_character_of_several_tokens_stands_at_the_last_one(server: llama_server.Server) -> None:
    text = "<b>naïve 日本語 🙂 \udcff end".encode("utf-8", "surrogateescape")
    ids = [1, *(3 + byte for byte in text)]  # tokens that are bytes
    server.complete(ids, 1, id_slot=0)
    view = positions(server)
    assert "".join(view["text"]) == "<s>" + text.decode("utf-8", "replace")
    for i, char in ((text.index("日".encode()), "日"), (text.index("🙂".encode()), "🙂")):
        n = len(char.encode())
        assert view["text"][1 + i : 1 + i + n] == [""] * (n - 1) + [char]
        for first in range(i, i + n):  # also where a character is cut
            assert positions(server, f"slot=0&first={1 + first}")["text"][0] == (char if first == i + n - 1 else "")


def test_what_an_answer_held_is_told_to_who_looks(model: Path, log: Path) -> None:
    """Without --kv-reuse the cells are given back with the answer; what they were is noted while somebody looks."""
    with running(log, model) as server:
        server.complete(PROMPT, 3)
        server.request("/slots")  # its turn comes when the answer, which is sent before, has ended
        assert positions(server)["state"] == "empty"  # nobody has looked before
        server.complete(PROMPT, 3)
        server.request("/slots")
        view = positions(server)
        assert (view["state"], view["is_past"], view["n_tokens"]) == ("compressed", True, len(PROMPT) + 2)
        assert sum(view["held"]) == sum(map(sum, view["cells"])) > 0
        slot = server.request("/slots")[1][0]
        assert slot["kv"]["state"] == "empty" and sum(map(sum, slot["kv_heads"])) == 0 and slot["kv_turns"][-1]["bytes"] > 0


def test_it_can_be_watched_while_an_answer_is_written(server: llama_server.Server) -> None:
    """The answer is the same, and every look is of one moment."""
    n, options = 1300, {"ignore_eos": True, "id_slot": 0, "cache_prompt": False}
    plain = server.complete(PROMPT, n, **options)["tokens"]
    looks: list[Any] = []
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.complete, PROMPT, n, **options)
        while not answer.done():
            looks.append(positions(server, f"slot=0&first={len(PROMPT)}"))
        assert answer.result()["tokens"] == plain
    during = [view for view in looks if view["state"] == "compressed" and len(PROMPT) < view["n_tokens"] < len(PROMPT) + n - 1]
    assert during
    for view in during:
        assert view["held"] == [view["n_heads"]] * (view["n_tokens"] - len(PROMPT))  # generated tokens all stay


# who is told what


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("slot=2", "slot is 2: it must be in [0, 2)"),
        ("slot=-1", "slot is -1: it must be an integer in [0, 65536]"),
        ("slot=x", "slot is x: it must be an integer"),
        ("slot=0&layer=1", "layer and head go together"),
        ("slot=0&layer=9&head=0", "layer 9, head 0: no such KV head"),
        ("slot=0&n=2049", "n is 2049: it must be an integer in [1, 2048]"),
        ("slot=0&n=0", "n is 0: it must be an integer in [1, 2048]"),
        ("slot=0&first=99999999999", "first is 99999999999: it must be an integer in [0, 1073741824]"),
        ("slot=0&where=1", "where: no such field, it takes slot, layer, head, first and n"),
    ],
)
def test_a_query_that_is_wrong_is_refused(server: llama_server.Server, query: str, why: str) -> None:
    server.complete(PROMPT, 1, id_slot=0)
    for _ in range(100):
        answer = get(server, f"/kv/positions?{query}")
        if answer.status_code != 429:
            break
        time.sleep(0.1)
    assert answer.status_code == 400 and why in answer.json()["error"]["message"]


def test_a_first_token_behind_the_end_is_none(server: llama_server.Server) -> None:
    server.complete(PROMPT, 1, id_slot=0)
    view = positions(server, "slot=0&first=100000")
    assert view["text"] == [] and view["first"] == view["n_tokens"] == len(PROMPT)


def test_only_pages_of_the_server_are_told(server: llama_server.Server) -> None:
    """The stock server lets pages of any origin read its answers; this one has the text of prompts."""
    own, path = f"127.0.0.1:{server.port}", "/kv/positions?slot=0"
    for headers in (
        {"Origin": f"http://{own}"},
        {"Sec_Fetch_Site": "same-origin"},
        {"Host": f"localhost:{server.port}"},
        {"Host": "[::1]"},
    ):
        time.sleep(0.1)
        assert get(server, path, **headers).status_code == 200, headers
    for headers in (
        {"Origin": "https://example.org"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{server.port + 1}"},
        {"Origin": f"http://{own}.example.org"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Host": f"example.org:{server.port}"},  # a name that was made to point here
        {"Host": f"127.0.0.1.example.org:{server.port}"},
    ):
        answer = get(server, path, **headers)
        assert answer.status_code == 403 and "text" not in answer.json(), headers


def test_text_stays_on_this_machine_unless_it_is_asked_for(model: Path, log: Path) -> None:
    with running(log, model, "--host", "0.0.0.0") as server:
        answer = get(server, "/kv/positions?slot=0")
        assert answer.status_code == 403 and "start it with --kv-positions on" in answer.json()["error"]["message"]
        assert get(server, "/kv").status_code == 200
        assert "without text: --kv-positions" in log.read_text()
    with running(log, model, "--host", "0.0.0.0", "--kv-positions", "on") as server:
        assert positions(server)["state"] == "empty"
        assert get(server, "/kv/positions?slot=0", Host="example.org").status_code == 200  # a name in somebody's network
        assert get(server, "/kv/positions?slot=0", Origin="https://example.com").status_code == 403
    with running(log, model, "--kv-positions", "off") as server:
        assert get(server, "/kv/positions?slot=0").status_code == 403


def test_a_key_is_asked_for_what_is_held_and_not_for_the_page(model: Path, log: Path) -> None:
    with running(log, model, "--api-key", "secret") as server:
        assert [get(server, path).status_code for path in FILES] == [200] * len(FILES)
        for path in ("/kv/positions?slot=0", "/slots", "/kv/other"):
            assert get(server, path).status_code == 401
            assert get(server, path, Authorization="Bearer wrong").status_code == 401
        assert get(server, "/kv/positions?slot=0", Authorization="Bearer secret").status_code == 200


def test_without_compression_the_page_says_how_to_get_it(model: Path, log: Path) -> None:
    with running(log, model, kv_size=None) as server:
        assert get(server, "/kv").status_code == 200
        answer = get(server, "/kv/positions?slot=0")
        assert answer.status_code == 501 and "--kv-size" in answer.json()["error"]["message"]
        assert "kv_heads" not in server.request("/slots")[1][0]
        assert "pyheadkv: the cache is not compressed: add --kv-size N" in log.read_text()


def test_without_a_page_nothing_is_there(model: Path, log: Path) -> None:
    with running(log, model, "--kv-page", "off") as server:
        assert [get(server, path).status_code for path in (*FILES, "/kv/positions?slot=0")] == [404] * 5
        server.complete(PROMPT, 1)
        assert not {"kv_heads", "kv_turns"} & set(server.request("/slots")[1][0])


def test_a_folder_that_is_no_page_ends_the_server(model: Path, tmp_path: Path) -> None:
    (tmp_path / "kv.html").write_text("<p>", encoding="utf-8")
    done = subprocess.run([SERVER, "-m", model, "--kv-size", "96", "--kv-page", tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "it has no file kv.css, it must be the folder of a page, or off" in done.stdout + done.stderr


# what a browser is given


def test_the_page_runs_its_own_files_alone(server: llama_server.Server) -> None:
    types = {"/kv": "text/html", "/kv/kv.css": "text/css", "/kv/kv.js": "text/javascript", "/kv/kv.svg": "image/svg+xml"}
    for path, name in zip(FILES, ("kv.html", "kv.css", "kv.js", "kv.svg")):
        answer = get(server, path)
        assert answer.content == (PAGE / name).read_bytes() and answer.headers["Content-Type"].startswith(types[path])
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
        assert set(policy.values()) == {"'none'", "'self'"} and policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    script, page = (PAGE / "kv.js").read_text(encoding="utf-8"), (PAGE / "kv.html").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc", script)
    assert not re.search(r"https?://", page + script)
    assert not re.search(r"\son\w+=|<style|\sstyle=|javascript:", page) and len(re.findall(r"<script", page)) == 1


def test_the_root_is_the_chat_or_says_how_to_get_it(server: llama_server.Server) -> None:
    answer = get(server, "/", Accept_Encoding="gzip")
    if answer.status_code == 200:
        assert "text/html" in answer.headers["Content-Type"] and "<script" in answer.text
    else:
        assert answer.status_code == 501 and answer.text.count("\n") == 1 and "make ui" in answer.text and "/kv" in answer.text


def test_the_start_says_what_was_decided(model: Path, log: Path) -> None:
    with running(log, model, n_slots=2) as server:
        lines = [line.split("pyheadkv: ")[1] for line in log.read_text().splitlines() if "pyheadkv: " in line]
        server.complete(PROMPT, 1)
    assert lines[0] == f"random-llama, 2 slots of {N_CTX} tokens"
    assert lines[1] == "policy headkv, since the importance of its heads is known and questions end the prompt"
    kept = re.fullmatch(
        r"a full slot keeps ([\d.]+) MiB, ([\d.]+) % of the ([\d.]+) MiB of a full cache; 6 KV heads, 96 cells each on average", lines[2]
    )
    assert kept
    full = 2 * N_CTX * SHAPE.n_layer * SHAPE.n_head_kv * SHAPE.head_dim * 2 / 2**20  # K and V in f16
    assert float(kept[3]) == pytest.approx(full, abs=0.01)
    assert float(kept[2]) == pytest.approx(100 * float(kept[1]) / float(kept[3]), abs=0.3) and 4 < float(kept[2]) < 30
    assert lines[3].endswith(f"what the cache holds http://127.0.0.1:{server.port}/kv") and lines[3].startswith("chat ")
    with running(log, model, "--kv-policy", "snapkv"):
        assert "pyheadkv: policy snapkv, as the flags say" in log.read_text()


# what is hostile


def test_a_megabyte_of_hostile_text_is_told_in_pieces(make_model: Callable[..., Path], log: Path) -> None:
    texts = [(f"[{i}]{HOSTILE}" * 10)[:1024] for i in range(8)]
    path = make_model(SHAPE, n_vocab=512, texts=texts)
    prompt = [1, *(504 + i % 8 for i in range(1023))]
    with running(log, path, "--kv-reuse") as server:
        server.complete(prompt, 1)
        held: list[str] = []
        while len(held) < len(prompt):
            answer = get(server, f"/kv/positions?slot=0&first={len(held)}")
            if answer.status_code == 429:
                time.sleep(0.1)
                continue
            assert len(answer.content) < 1 << 20
            held += answer.json()["text"]
        assert held == ["<s>", *(texts[i % 8] for i in range(1023))]
        status, answer = server.request("/completion", {"prompt": HOSTILE * 8000, "n_predict": 1})  # a megabyte of bytes
        assert status == 400 and "exceeds" in str(answer)
        assert positions(server)["state"] == "compressed"  # what the slot had before
        turns = server.request("/slots")[1][0]["kv_turns"]
        assert [turn["state"] for turn in turns] == ["done", "given up"]
        assert turns[1]["n_read"] == 0 and turns[1]["bytes"] == turns[0]["bytes"]
        assert server.complete(prompt, 2)["tokens_predicted"] == 2


def test_hundreds_of_questions_block_nothing(server: llama_server.Server) -> None:
    """Those beyond the limit are refused at once; the answer is what it is without them."""
    options = {"ignore_eos": True, "id_slot": 0, "cache_prompt": False}
    plain = server.complete(PROMPT, 300, **options)
    codes: list[int] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            codes.append(get(server, "/kv/positions?slot=0").status_code)

    with ThreadPoolExecutor(9) as pool:
        clients = [pool.submit(client) for _ in range(8)]
        try:
            t_start = time.monotonic()
            beside = pool.submit(server.complete, PROMPT, 300, **options).result(timeout=60)
            while len(codes) < 500:
                time.sleep(0.05)
            seconds = time.monotonic() - t_start
        finally:
            stop.set()
        for done in clients:
            done.result()
    assert beside["tokens"] == plain["tokens"]
    assert set(codes) == {200, 429} and codes.count(200) <= 20 * (seconds + 2) + 8
    assert server.request("/health")[0] == 200
