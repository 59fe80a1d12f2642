"""Pictures of the chat of llama.cpp and of the page at /kv, from a server that answers two questions in the chat.

A document and a question are typed into the chat, then a second question; /kv is looked at beside it, in light, in dark and as wide as a
phone. Needs ``make ui``, and what ``make test-page`` installs.

    python scripts/screenshots.py smollm2.gguf -o build/screenshots
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from llama_server import Server, running

from pyheadkv.cli import serve

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
HAYSTACK = ROOT / "pyheadkv" / "data" / "haystack.txt"
FACT = "The key of the red cupboard has the number 48213."
QUESTIONS = ("Which number has the key of the red cupboard?", "And who were buried together?")
LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1200, "height": 940}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1200, "height": 940}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}, "device_scale_factor": 2},
}


def make_document(n_chars: int) -> str:
    """The beginning of a novel, in the middle of which stands what is asked for."""
    text = HAYSTACK.read_text(encoding="utf-8")[:n_chars]
    middle = text.index("\n", len(text) // 2)
    return f"{text[:middle]}\n{FACT}{text[middle:].rsplit('.', 1)[0]}."


def turns(server: Server) -> list[dict[str, Any]]:
    return list(server.request("/slots")[1][0]["kv_turns"])


def ask(page: Any, server: Server, text: str, *, seconds: float) -> dict[str, Any]:
    """Type it into the chat and wait until it is answered."""
    n = len(turns(server))
    page.locator("textarea").first.fill(text)
    page.keyboard.press("Enter")
    deadline = time.monotonic() + seconds
    while len(turns(server)) <= n or turns(server)[-1]["state"] != "done":
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer within {seconds:.0f} s: {turns(server)}")
        page.wait_for_timeout(300)
    page.wait_for_timeout(700)  # the chat writes it
    return turns(server)[-1]


def look(browser: Any, base: str, folder: Path) -> None:
    """Pictures of /kv, and of one head in the dark."""
    for name, options in LOOKS.items():
        context = browser.new_context(**options)
        page = context.new_page()
        page.goto(f"{base}/kv")
        page.wait_for_selector("#text span")
        if name == "dark":
            cells = page.locator("#heads button").evaluate_all("all => all.map(b => +b.dataset.value)")
            page.locator("#heads button").nth(cells.index(max(cells))).click()
            page.wait_for_selector("h1:has-text('KV head')")
        page.wait_for_timeout(400)
        page.screenshot(path=folder / f"kv-{name}.png", full_page=name == "phone")
        context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder")
    parser.add_argument("--kv-size", type=int, default=128)
    parser.add_argument("--chars", type=int, default=6000, help="of the document (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240, help="an answer may take (default: %(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    command = serve.command_line([str(args.model), "--kv-size", str(args.kv_size), "-c", "4096", "-np", "1", "-n", "80", "--temp", "0"])
    flags = [*command[1:], "-t", args.threads, "-tb", args.threads]
    with running(*flags, log=args.out / "server.log") as server, sync_playwright() as p:
        base = f"http://127.0.0.1:{server.port}"
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS.split())
        watch = browser.new_page()
        watch.goto(f"{base}/kv")  # somebody looks, so that what an answer held is noted
        chat = browser.new_page(viewport={"width": 1200, "height": 900})
        chat.goto(f"{base}/")
        first = ask(chat, server, f"{make_document(args.chars)}\n\n{QUESTIONS[0]}", seconds=args.seconds)
        look(browser, base, args.out)
        second = ask(chat, server, QUESTIONS[1], seconds=args.seconds)
        chat.screenshot(path=args.out / "chat.png")
        browser.close()
    for turn in (first, second):
        print({name: turn[name] for name in ("n_prompt", "n_read", "n_generated", "bytes", "bytes_full")})
    print(*sorted(path.name for path in args.out.glob("*.png")))


if __name__ == "__main__":
    main()
