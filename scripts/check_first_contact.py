"""What a person with a downloaded file does first, on real models: every command of the README with nothing but a path.

    python scripts/check_first_contact.py smollm2-135m.gguf qwen25-coder-0.5b.gguf -o first_contact.md

Each model lies alone in a folder as ``model.gguf`` and the user's cache is empty, so that what is found about it is in the package. The
snippet is run as the README has it. ``score`` is run twice and writes the same bytes, or the check fails, as it does when a command ends with
an error or nothing is answered; after it the file beside the model is what is found. The pass key in 1000 words of a book is asked for by
``generate --chat`` and by an openai client of ``serve``; whether it is right stands in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llama_server import running
from openai import OpenAI

from pyheadkv.eval.journal import commit, machine
from pyheadkv.eval.report import table

ROOT = Path(__file__).resolve().parent.parent
PYHEADKV = Path(sys.executable).with_name("pyheadkv")
KEY = "71432"
KV_SIZE = "128"


def readme_snippet() -> str:
    """The first Python block of the README."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    if found is None:
        raise SystemExit("error: README.md has no Python snippet")
    return found[1]


def make_prompt() -> str:
    """A pass key between the words of a book, and a question."""
    words = (ROOT / "pyheadkv/data/haystack.txt").read_text(encoding="utf-8").split()[:1000]
    key = f"The pass key is {KEY}. Remember it: {KEY} is the pass key."
    return f"{' '.join(words[:600])} {key} {' '.join(words[600:])}\n\nWhat is the pass key? Answer with the number and nothing else."


class FirstContact:
    """One model in a folder of its own.

    Parameters
    ----------
    threads : of every command that computes; the snippet has the default
    """

    def __init__(self, model: Path, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads
        (folder / "model.gguf").symlink_to(model.resolve())
        (folder / "prompt.txt").write_text(make_prompt(), encoding="utf-8")
        self.env = {**os.environ, "PYHEADKV_CACHE": str(folder / "cache"), "XDG_CACHE_HOME": str(folder / "cache")}

    def run(self, *command: str | Path) -> str:
        """What a command prints; it must succeed."""
        done = subprocess.run(list(map(str, command)), cwd=self.folder, env=self.env, capture_output=True, text=True)
        if done.returncode != 0 or not done.stdout.strip():
            raise SystemExit(f"error: {' '.join(map(str, command))[:200]}: ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def command(self, name: str, *flags: str) -> str:
        """A command of pyheadkv for the model."""
        return self.run(PYHEADKV, name, "model.gguf", *flags)

    def snippet(self) -> str:
        """What the README's snippet answers, and the policy it names."""
        said, policy = self.run(sys.executable, "-c", readme_snippet()).split(" KVStats(")[0].rsplit("\n", 1)
        if not said.strip():
            raise SystemExit("error: the snippet answered nothing")
        return f"{policy}: {' '.join(said.split()[:6])} .."

    def score(self) -> str:
        """Seconds of the first run, and its bytes if the second writes the same."""
        written, begin, seconds = [], time.perf_counter(), 0.0
        for _ in range(2):
            self.command("score", "--threads", str(self.threads))
            seconds = seconds or time.perf_counter() - begin
            (path,) = self.folder.glob("*importance.json")
            written.append(path.read_bytes())
            path.unlink()
        if written[0] != written[1]:
            raise SystemExit(f"error: score wrote two different files: {[len(w) for w in written]} bytes")
        path.write_bytes(written[0])
        return f"{seconds:.0f} s, {len(written[0])} bytes"

    def inspect(self) -> str:
        """What the budgets are from."""
        lines = self.command("inspect", "--kv-size", KV_SIZE).splitlines()
        line = next(line for line in lines if line.startswith("importance"))
        return line.removeprefix("importance").split(";")[0].strip().replace(f"{self.folder}/", "")

    def plan(self) -> str:
        """The longest prompts for 2 GiB, layer by layer and of the stock cache."""
        planned = json.loads(self.command("plan", "--memory", "2GiB", "--kv-size", KV_SIZE, "--json"))
        longest = {entry["prefill"]: entry["n_prompt"] for entry in planned["entries"]}
        return f"{longest['layer']} tokens, stock {longest['stock']}"

    def generate(self) -> str:
        """The answer of the command line."""
        said = self.command("generate", "--chat", "-f", "prompt.txt", "--kv-size", KV_SIZE, "-n", "16", "--threads", str(self.threads))
        return " ".join(said.split())

    def serve(self) -> str:
        """The answer of the server, in pieces, and the policy of /props."""
        flags = ["--kv-size", KV_SIZE, "-c", "4096", "-np", "1", "-t", str(self.threads)]
        with running(*flags, log=self.folder / "server.log", by=[PYHEADKV, "serve", self.folder / "model.gguf"]) as server:
            client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
            stream = client.chat.completions.create(
                model="any",
                messages=[{"role": "user", "content": make_prompt()}],
                max_tokens=16,
                temperature=0,
                stream=True,
            )
            said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
            policy = server.request("/props")[1]["kv"]["policy"]
        if not said.strip():
            raise SystemExit("error: the server answered nothing")
        return f"{policy}: {' '.join(said.split())}"


def main() -> None:
    """A row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            first = FirstContact(model, Path(folder), args.threads)
            steps = (first.snippet, first.inspect, first.plan, first.generate, first.serve, first.score, first.inspect)
            cells = []
            for step in steps:
                cells.append(step())
                print(f"{model.name} {step.__name__}: {cells[-1]}", flush=True)
            rows.append([model.name, *cells])
    names = ["model", "snippet", "inspect", "plan, 2 GiB", "generate --chat", "openai client of serve", "score, twice", "inspect then"]
    lines = [
        "# First contact",
        "",
        f"`python scripts/check_first_contact.py {' '.join(m.name for m in args.models)} --threads {args.threads}`, {machine()}, commit {commit()}:",
        f"with nothing but a path, `kv_size={KV_SIZE}` where a size is asked for; the pass key is {KEY}, in 1000 words.",
        "",
        *table(names, rows),
    ]
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
