"""llama.cpp's own tests of its server on our builds: unpatched, patched without compression, patched with it.

    python scripts/run_upstream_server_tests.py --tree build/llama/llama.cpp --stock STOCK/bin/llama-server \\
        --patched BUILD/bin/llama-server -o bench/results/upstream_server_tests.md

The tests are run from the source tree of the build. Where they would download a small language model they get the embedded one,
in all runs, and their patterns for the text of that other model match everything; those that need another download are skipped.
What else depends on the model fails in all runs alike: what counts is whether a test ends as it does on the unpatched build.
Needs requests, filelock, numpy and openai.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

REPLACED = ("ggml-org/test-model-stories260K", "ggml-org/test-model-stories260K-infill", "ggml-org/stories15M_MOE")
SECONDS = 30  # for one request of a test
RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "unpatched": ("stock", {}),
    "off": ("patched", {}),
    "on": ("patched", {"LLAMA_ARG_KV_SIZE": "64"}),
    "on, reuse": ("patched", {"LLAMA_ARG_KV_SIZE": "64", "LLAMA_ARG_KV_REUSE": "1"}),
}


# as a plugin of pytest, inside of upstream's tests


def pytest_configure(config: pytest.Config) -> None:
    if "HEADKV_TEST_MODEL" not in os.environ:
        return
    import utils  # upstream's

    start = utils.ServerProcess.start
    make_request = utils.ServerProcess.make_request

    def start_with_our_model(self: Any, timeout_seconds: int = 30) -> None:
        if self.model_draft or self.mmproj_url or self.model_url or (self.model_hf_repo and self.model_hf_repo not in REPLACED):
            pytest.skip("needs a download")
        if self.model_hf_repo:
            self.model_hf_repo, self.model_file, self.offline = None, os.environ["HEADKV_TEST_MODEL"], False
        self.n_threads = self.n_threads or 1
        start(self, min(timeout_seconds, 30))

    def make_short_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        return make_request(self, *args, **{"timeout": SECONDS, **kwargs})

    utils.ServerProcess.start = start_with_our_model
    utils.ServerProcess.make_request = make_short_request
    utils.ServerPreset.load_all = staticmethod(lambda: None)
    utils.match_regex = lambda regex, text: True


# as a program


def make_root(tree: Path, root: Path) -> Path:
    """A copy of the tests beside links to what they read, so that the source tree stays as it is."""
    import shutil

    for path in tree.iterdir():
        if path.name != "tools":
            (root / path.name).symlink_to(path)
    (root / "tools").mkdir()
    for path in (tree / "tools").iterdir():
        if path.name != "server":
            (root / "tools" / path.name).symlink_to(path)
    tests = root / "tools/server/tests"
    shutil.copytree(tree / "tools/server/tests", tests)
    (tests / "tmp").mkdir(exist_ok=True)
    (tests / "wget.py").write_text("import pytest\n\n\ndef download(url, out):\n    pytest.skip('needs a download')\n")
    return tests


def run(name: str, args: argparse.Namespace, port: int) -> dict[str, tuple[str, str]]:
    """Outcome and reason of each test."""
    build, environ = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        tests = make_root(args.tree.resolve(), Path(folder))
        env = {
            **os.environ,
            **environ,
            "LLAMA_SERVER_BIN_PATH": str(getattr(args, build).resolve()),
            "HEADKV_TEST_MODEL": str(args.model.resolve()),
            "PYTHONPATH": f"{Path(__file__).resolve().parent}:{tests}",
            "PORT": str(port),
            "LLAMA_CACHE": folder,
            "NO_PROXY": "*",
            "OMP_WAIT_POLICY": "passive",
            "GOMP_SPINCOUNT": "0",
        }
        res = {}
        for path in sorted(tests.glob("unit/test_*.py")):
            report = Path(folder) / f"{path.stem}.xml"
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "run_upstream_server_tests",
                "-p",
                "no:cacheprovider",
                f"--junitxml={report}",
                *(["-k", args.k] if args.k else []),
                f"unit/{path.name}",
            ]
            start = time.monotonic()
            try:
                subprocess.run(command, cwd=tests, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=args.timeout)
            except subprocess.TimeoutExpired:
                res[path.stem] = "not run", f"more than {args.timeout:.0f} s"
                continue
            print(f"{name}: {path.stem}, {time.monotonic() - start:.0f} s", flush=True)
            for case in ElementTree.parse(report).getroot().iter("testcase"):
                outcome, why = "passed", ""
                for child in case:
                    if child.tag in ("failure", "error", "skipped"):
                        outcome, why = child.tag.replace("failure", "failed").replace("error", "failed"), child.get("message", "")
                res[f"{path.stem}::{case.get('name')}"] = outcome, why
        return res


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, required=True, help="patched source tree of llama.cpp")
    parser.add_argument("--stock", type=Path, required=True, help="llama-server of the unpatched build")
    parser.add_argument("--patched", type=Path, required=True, help="llama-server of ours")
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "pyheadkv/data/needle.gguf")
    parser.add_argument("--runs", default=",".join(name.replace(", ", "+") for name in RUNS), help="which of them, by comma")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a file of tests")
    parser.add_argument("-k", default="", help="tests, as for pytest")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()

    names = [name.replace("+", ", ") for name in args.runs.split(",")]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(names, pool.map(lambda i: run(names[i], args, 8200 + 200 * i), range(len(names)))))
    args.out.write_text(table(results))
    print(args.out.read_text())


def table(results: dict[str, dict[str, tuple[str, str]]]) -> str:
    tests = sorted(set().union(*results.values()))
    lines = ["| run | passed | failed | skipped |", "|---|---|---|---|"]
    for name, outcomes in results.items():
        counts = [sum(outcome == wanted for outcome, _ in outcomes.values()) for wanted in ("passed", "failed", "skipped")]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    base = next(iter(results))
    missing = ("not run", "")

    def cell(text: str) -> str:
        return " ".join(text.split())[:140].replace("|", "\\|")

    for name in list(results)[1:]:
        pairs = {test: (results[base].get(test, missing), results[name].get(test, missing)) for test in tests}
        differ = [test for test, (a, b) in pairs.items() if a[0] != b[0]]
        lines += ["", f"## {name} against {base}: {len(differ)} of {len(tests)} tests end otherwise", ""]
        if differ:
            lines += [f"| test | {base} | {name} | reason |", "|---|---|---|---|"]
            lines += [f"| {cell(test)} | {pairs[test][0][0]} | {pairs[test][1][0]} | {cell(pairs[test][1][1])} |" for test in differ]
        other = [test for test, (a, b) in pairs.items() if a[0] == b[0] == "failed" and a[1].split("\n")[0] != b[1].split("\n")[0]]
        if other:
            lines += ["", f"Fail in both, for another reason: {', '.join(other)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
