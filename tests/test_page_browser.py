"""The page at /kv, and the chat where it is built, in headless Chromium: ``make test-page``."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

REASON = "no browser: make test-page installs one; what the page is told is tested in test_page.py"
playwright = pytest.importorskip("playwright.sync_api", reason=REASON)
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=REASON)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip(REASON, allow_module_level=True)
try:
    import pyheadkv  # noqa: F401
except ImportError as error:
    pytest.skip(f"the library is not built: {error}", allow_module_level=True)
from conftest import SHAPES, load, tokens  # noqa: E402
from page_server import HOSTILE, KV_SIZE, N_CTX, N_UBATCH, WINDOW, get, llama_server, positions, running  # noqa: E402

FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
SHAPE = SHAPES[1]
PROMPT = tokens(700, seed=3)
FIRST = '#text span:first-child[data-first="{}"]'
SHADES = (0.05, 0.2, 0.6)  # as in kv.js


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser") / "log"


@pytest.fixture(scope="module")
def server(make_model: Callable[..., Path], log: Path) -> Iterator[llama_server.Server]:
    """Two slots that go on with what they hold; the first one holds a prompt and an answer."""
    with running(log, make_model(SHAPE), "--kv-reuse", n_slots=2) as server:
        server.complete(PROMPT, 5, id_slot=0)
        yield server


@contextmanager
def opened(browser: Any, server: llama_server.Server, path: str = "/kv", *, quiet: bool = True, **options: Any) -> Iterator[Any]:
    """The page after its first look; it may complain of nothing and ask no other host."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append("dialog"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"http://127.0.0.1:{server.port}{path}")
    if path == "/kv" and quiet:
        page.wait_for_selector("body[data-looks]", state="attached")
    yield page
    context.close()
    assert not quiet or said == []
    assert asked and all(url.startswith(f"http://127.0.0.1:{server.port}/") for url in asked)


def look_again(page: Any) -> None:
    """Wait until the page has asked, and shown the answer, after now."""
    n = int(page.locator("body").get_attribute("data-looks"))
    page.wait_for_selector(f'body[data-looks="{n + 2}"]', state="attached")


def value(page: Any, name: str) -> float:
    return float(page.locator(f"#{name}").get_attribute("data-value"))


def shaded(page: Any) -> tuple[list[int], str]:
    """Shade of each token that the page shows, and their text."""
    spans = page.locator("#text span").evaluate_all("all => all.map(s => [+s.dataset.first, +s.dataset.n, s.className, s.textContent])")
    shades: list[int] = []
    for first, n, name, _ in spans:
        assert first == len(shades)
        shades += [int(name[1:])] * n
    return shades, "".join(text for *_, text in spans)


def shade(share: float) -> int:
    return 0 if share <= 0 else 1 + sum(share >= limit for limit in SHADES)


def test_the_numbers_are_those_of_the_slots(browser: Any, server: llama_server.Server) -> None:
    with opened(browser, server) as page:
        slot = server.request("/slots")[1][0]
        kv, turn, cells = slot["kv"], slot["kv_turns"][-1], slot["kv_heads"]
        kept = sum(map(sum, cells))
        assert (value(page, "bytes"), value(page, "bytes-full")) == (kv["bytes"], kv["bytes_full"])
        assert (value(page, "n-read"), value(page, "n-generated")) == (turn["n_read"], turn["n_generated"]) == (len(PROMPT), 5)
        assert (value(page, "n-archived"), value(page, "n-continued")) == (0, 0)
        assert (value(page, "n-kept"), value(page, "n-evicted")) == (kept, kv["n_tokens"] * 6 - kept)
        buttons = page.locator("#heads button")
        found = buttons.evaluate_all(
            "all => all.map(b => [+b.dataset.layer, +b.dataset.head, +b.dataset.value, b.className, b.textContent])"
        )
        assert found == [[il, ih, n, f"t{shade(n / kv['n_tokens'])}", str(n)] for il, row in enumerate(cells) for ih, n in enumerate(row)]
        rows = page.locator("#turns tbody tr")
        assert rows.count() == len(slot["kv_turns"])
        assert rows.first.locator("td").all_inner_texts()[1:3] == [str(len(PROMPT))] * 2
        assert page.locator("h1").inner_text() == f"The model still sees {positions(server)['n_seen']} of {kv['n_tokens']} tokens"
        assert "headkv" in page.locator("#model").inner_text()


def test_the_shaded_text_is_what_the_heads_hold(browser: Any, server: llama_server.Server, make_model: Callable[..., Path]) -> None:
    llm = load(make_model(SHAPE), kv_size=KV_SIZE, window=WINDOW, preset="default", n_ctx=N_CTX, n_batch=N_UBATCH, n_ubatch=N_UBATCH)
    llm.read_prompt(PROMPT)
    n_tokens = len(PROMPT) + 4
    with opened(browser, server) as page:
        view = positions(server)
        shades, text = shaded(page)
        assert shades == [shade(n / view["n_heads"]) for n in view["held"]] and len(shades) == n_tokens
        assert text == "".join(view["text"]) and len(set(shades)) > 2
        assert page.locator("#text hr").count() == 1  # where the prompt ends
        for il, ih in ((0, 0), (SHAPE.n_layer - 1, SHAPE.n_head_kv - 1)):
            page.click(f'#heads button[data-layer="{il}"][data-head="{ih}"]')
            page.wait_for_selector(f"h1:has-text('Layer {il}, KV head {ih} still sees')")
            kept = {*llm.kv_positions(il, ih).tolist(), *range(len(PROMPT), n_tokens)}
            assert shaded(page) == ([4 * (pos in kept) for pos in range(n_tokens)], text)
        page.click("#all-heads")
        page.wait_for_selector("h1:has-text('The model')")
        assert shaded(page) == (shades, text)


def test_an_answer_is_followed_while_it_is_written(browser: Any, make_model: Callable[..., Path], log: Path) -> None:
    """And what it was stays when the cells are given back."""
    slow = make_model(SHAPE, n_ff=8192)  # some milliseconds for a token
    with running(log, slow, n_slots=2) as server, opened(browser, server) as page:
        assert page.locator("h1").inner_text() == "This slot is empty"
        stream = server.open(
            "/completion", {"prompt": PROMPT, "n_predict": 1200, "ignore_eos": True, "id_slot": 1, "stream": True}, stream=True
        )
        page.wait_for_selector("#state:has-text('answering')")
        assert page.locator("#slots [aria-pressed=true]").inner_text().startswith("Slot 1")
        n_before = len(shaded(page)[0])
        look_again(page)
        assert len(shaded(page)[0]) > n_before >= len(PROMPT)
        for _ in stream.iter_lines():
            pass
        page.wait_for_selector("h1:has-text('The model saw')")
        look_again(page)
        view = positions(server, "slot=1")
        assert view["is_past"] and shaded(page)[0] == [shade(n / view["n_heads"]) for n in view["held"]]
        assert value(page, "bytes") == server.request("/slots")[1][1]["kv_turns"][-1]["bytes"] > 0
        assert value(page, "n-kept") == sum(map(sum, view["cells"]))


def test_the_keyboard_does_all(browser: Any, server: llama_server.Server) -> None:
    with opened(browser, server) as page:
        page.keyboard.press("Tab")
        assert page.locator(":focus").inner_text() == "To the text"
        seen = []
        for _ in range(30):
            page.keyboard.press("Tab")
            name = page.evaluate("document.activeElement.closest('[id]')?.id ?? ''")
            seen.append(name)
            if name == "heads":
                break
        assert {"slots", "text", "heads"} <= set(seen)  # one stop for all heads
        for key, expected in (("ArrowDown", "1.0"), ("ArrowRight", "1.1"), ("ArrowDown", "2.1"), ("ArrowUp", "1.1"), ("ArrowLeft", "1.0")):
            page.keyboard.press(key)
            assert page.evaluate("document.activeElement.dataset.layer + '.' + document.activeElement.dataset.head") == expected
        page.keyboard.press("Enter")
        page.wait_for_selector("h1:has-text('Layer 1, KV head 0')")
        look_again(page)
        assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"  # the focus stays
        page.keyboard.press("Enter")
        page.wait_for_selector("h1:has-text('The model')")
        page.focus("#slots [data-slot='1']")
        page.keyboard.press("Enter")
        page.wait_for_selector("#slots [data-slot='1'][aria-pressed=true]")
        assert page.evaluate("document.activeElement.dataset.slot") == "1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_everybody_can_read_it(browser: Any, server: llama_server.Server, scheme: str, width: int) -> None:
    """No violation of the rules of axe-core; nothing is wider than a phone."""
    with opened(browser, server, color_scheme=scheme, viewport={"width": width, "height": 800}) as page:
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (
            sum(map(int, re.findall(r"\d+", background)[:3])) > 600
            if scheme == "light"
            else sum(map(int, re.findall(r"\d+", background)[:3])) < 120
        )
        for step in ("all", "head", "empty"):
            if step == "head":
                page.click('#heads button[data-layer="1"][data-head="1"]')
                page.wait_for_selector("h1:has-text('Layer 1, KV head 1')")
            if step == "empty":
                page.click("#slots [data-slot='1']")
                page.wait_for_selector("h1:has-text('This slot is empty')")
            found = axe.Axe().run(page).response["violations"]
            assert [(v["id"], [n["target"] for n in v["nodes"]][:3]) for v in found] == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_long_text_is_shown_in_pieces(browser: Any, make_model: Callable[..., Path], log: Path) -> None:
    """A megabyte that would take the page over if it were HTML; the later pieces by button, slider and map."""
    texts = [(f"[{i}]{HOSTILE}" * 10)[:1024] for i in range(8)]
    prompt = [1, *(504 + i % 8 for i in range(1023))]
    with running(log, make_model(SHAPE, n_vocab=512, texts=texts), "--kv-reuse") as server:
        server.complete(prompt, 1)
        with opened(browser, server) as page:
            shown = page.locator("#text").text_content()
            assert shown.startswith("<s>" + texts[0]) and HOSTILE in shown and len(shown) > 100_000
            whole, first = 0, 0
            while True:
                spans = page.locator("#text span").evaluate_all("all => all.map(s => [+s.dataset.first, +s.dataset.n, s.textContent])")
                assert spans[0][0] == first
                n = sum(n for _, n, _ in spans)
                assert "".join(text for *_, text in spans) == "".join(["<s>", *(texts[i % 8] for i in range(1023))][first : first + n])
                whole, first = whole + n, first + n
                if page.locator("#on").is_disabled():
                    break
                page.click("#on")
                page.wait_for_selector(FIRST.format(first))
            assert whole == len(prompt)
            page.locator("#place").focus()
            page.keyboard.press("Home")
            page.wait_for_selector(FIRST.format(0))
            page.locator("#map").click(position={"x": page.locator("#map").bounding_box()["width"] * 0.75, "y": 5})
            page.wait_for_selector(FIRST.format(512))
            assert page.title() == "What the model still sees"
            assert page.locator("#text").evaluate("t => t.querySelectorAll('script, img, div').length") == 0
            assert page.locator("script").count() == 1
            assert axe.Axe().run(page).violations_count == 0


def test_a_hostile_name_and_state_are_text(browser: Any, server: llama_server.Server) -> None:
    """Whatever the server answers."""
    with opened(browser, server, quiet=False, bypass_csp=True) as page:  # without what would stop it anyway
        name = f"x{HOSTILE}"
        page.route("**/props", lambda route: route.fulfill(json={"model_alias": name, "kv": {"policy": name}}))
        turn = {
            "id_task": name,
            "state": name,
            "n_prompt": 1,
            "n_archived": 0,
            "n_continued": 0,
            "n_read": 1,
            "read_ms": 1,
            "n_generated": 1,
        }
        turn |= {"generate_ms": 1, "per_second": 1, "bytes": 1, "bytes_full": 2}
        kv = {"state": name, "n_tokens": 1, "bytes": 1, "bytes_full": 2}
        slot = {"id": 0, "is_processing": True, "kv": kv, "kv_heads": [[1]], "kv_turns": [turn]}
        page.route("**/slots", lambda route: route.fulfill(json=[slot]))
        page.route("**/kv/positions*", lambda route: route.fulfill(status=403, json={"error": {"message": name}}))
        page.reload()
        page.wait_for_selector("body[data-looks]", state="attached")
        assert name.replace("\u2028", "\n") in page.locator("#lead").text_content().replace("\u2028", "\n")
        assert page.locator("#turns tbody td").last.text_content() == name
        page.wait_for_timeout(200)
        assert page.title() == "What the model still sees" and page.locator("img").count() == 0


def test_the_key_is_asked_for_and_used(browser: Any, make_model: Callable[..., Path], log: Path) -> None:
    with running(log, make_model(SHAPE), "--kv-reuse", "--api-key", "secret") as server:
        url = f"http://127.0.0.1:{server.port}/completion"
        done = llama_server.HTTP.post(url, json={"prompt": PROMPT, "n_predict": 2}, headers={"Authorization": "Bearer secret"}, timeout=60)
        assert done.status_code == 200
        with opened(browser, server, quiet=False) as page:
            page.wait_for_selector("#key-form:not([hidden])")
            assert axe.Axe().run(page).violations_count == 0
            page.fill("#key", "secret")
            page.keyboard.press("Enter")
            page.wait_for_selector("body[data-looks]", state="attached")
            page.wait_for_selector("#key-form", state="hidden")
            assert value(page, "n-read") == len(PROMPT)
            assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_a_server_without_compression_or_text_says_so(browser: Any, make_model: Callable[..., Path], log: Path) -> None:
    with running(log, make_model(SHAPE), kv_size=None) as server, opened(browser, server) as page:
        assert page.locator("h1").inner_text() == "The model sees everything" and "--kv-size" in page.locator("#lead").inner_text()
    with running(log, make_model(SHAPE), "--kv-reuse", "--kv-positions", "off") as server:
        server.complete(PROMPT, 2)
        with opened(browser, server, quiet=False) as page:
            page.wait_for_selector("body[data-looks]", state="attached")
            slot = server.request("/slots")[1][0]
            assert "--kv-positions off" in page.locator("#lead").inner_text() and page.locator("#text span").count() == 0
            assert value(page, "bytes") == slot["kv"]["bytes"] and value(page, "n-kept") == sum(map(sum, slot["kv_heads"]))


def test_a_server_that_goes_away_is_waited_for(browser: Any, make_model: Callable[..., Path], log: Path) -> None:
    with running(log, make_model(SHAPE), "--kv-reuse") as server:
        server.complete(PROMPT, 2)
        with opened(browser, server, quiet=False) as page:
            page.wait_for_selector("h1:has-text('The model')")
            page.route("**/slots", lambda route: route.abort())
            page.wait_for_selector("#notice:has-text('Asking again')")
            assert page.locator("h1").inner_text().startswith("The model")  # what was known stays
            page.unroute("**/slots")
            page.wait_for_selector("#notice:empty", state="attached")


# the chat of llama.cpp


def test_the_chat_answers_twice_and_leaves_the_page_alone(browser: Any, make_model: Callable[..., Path], log: Path) -> None:
    with running(log, make_model(SHAPE), "-n", "12", n_slots=1) as server:
        if get(server, "/", Accept_Encoding="gzip").status_code == 501:
            pytest.skip("this build has no chat: make ui")
        with opened(browser, server, "/", quiet=False) as page:
            for turn, question in enumerate(("the code of the and", "is it in the code")):
                page.locator("textarea").first.fill(question)
                page.keyboard.press("Enter")
                deadline = time.monotonic() + 30
                while [t["state"] for t in server.request("/slots")[1][0]["kv_turns"]].count(
                    "done"
                ) <= turn and time.monotonic() < deadline:
                    page.wait_for_timeout(200)
                page.get_by_text(question, exact=False).first.wait_for()
            turns = server.request("/slots")[1][0]["kv_turns"]
            assert turns[1]["n_prompt"] > turns[0]["n_prompt"] > 0 and all(turn["n_generated"] > 0 for turn in turns[:2])
            page.goto(f"http://127.0.0.1:{server.port}/kv")  # under the service worker of the chat
            page.wait_for_selector("body[data-looks]", state="attached")
            assert page.title() == "What the model still sees"
            page.wait_for_selector("#turns tbody tr:nth-child(2)")
