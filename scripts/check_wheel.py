"""What ``make wheel`` made runs on other machines: installed into a bare venv of each Python, with the CPU at hand and with emulated ones.

Each answers a prompt of the embedded model with the stock cache and a compressed one, through the library and through llama-server; the
CPU backend that was loaded, and whether answers and kept cells are those of the first row, stand in the table. The linear layers of
another backend round otherwise, and so queries and keys do: cells whose scores are close may differ. With the CPU at hand all layers are also
computed by a worker (RPC), which must give the tokens of this process.

    make wheel
    python scripts/check_wheel.py --python python3.10,python3.13 --cpu Nehalem,Haswell --out bench/results/wheel.md

Emulated CPUs need qemu-x86_64 (Debian: qemu-user).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROBE = """
import json, re, sys, time
import numpy as np
import pyheadkv
begin = time.perf_counter()
rng = np.random.default_rng(0)
prompt = [1, *rng.integers(20, 200, 400).tolist()]
found = {}
for name, options in (("stock", {}), ("kv_size=48", {"kv_size": 48})):
    llm = pyheadkv.Llama(str(pyheadkv.embedded_model()), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, **options)
    llm.read_prompt(prompt)
    tokens = []
    for _ in range(8):
        tokens.append(int(np.argmax(llm.last_logits)))
        llm.eval(tokens[-1:])
    found[name] = tokens
    if options:
        kept = [llm.kv_positions(il, ih).tolist() for il, ih in np.argwhere(llm.kv_budget > 0)]
        found["kept"] = kept
maps = open("/proc/self/maps").read()
found["backend"] = sorted(set(re.findall(r"libggml-cpu[\\w.-]*?(?=[.-][0-9a-f]*\\.?so)", maps)))
found["seconds"] = round(time.perf_counter() - begin, 1)
print("FOUND" + json.dumps(found))
"""

SERVE = """
import json, socket, subprocess, sys, time, urllib.request
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
command = [sys.executable, "-m", "pyheadkv.cli", "serve", "--kv-size", "64", "-c", "512", "-t", "1", "--port", str(port)]
server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    for _ in range(600):
        assert server.poll() is None, f"the server ended: {server.returncode}"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            break
        except OSError:
            time.sleep(0.1)
    body = json.dumps({"prompt": "a b c", "n_predict": 4}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/completion", body, {"Content-Type": "application/json"})
    print("FOUND" + json.dumps({"tokens": json.load(urllib.request.urlopen(request, timeout=60))["tokens_predicted"]}))
finally:
    server.terminate()
    server.wait()
"""

RPC = """
import json, socket, subprocess, sys, time
import numpy as np
import pyheadkv
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
command = [sys.executable, "-m", "pyheadkv.cli", "rpc-worker", "--threads", "1", "--port", str(port)]
worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    prompt = [1, *np.random.default_rng(0).integers(20, 200, 400).tolist()]
    answers = []
    for options in ({}, {"rpc_servers": f"127.0.0.1:{port}"}):
        for _ in range(100):
            try:
                llm = pyheadkv.Llama(str(pyheadkv.embedded_model()), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False,
                    kv_size=48, attend="composed", **options)
                break
            except ConnectionError as e:
                assert worker.poll() is None, f"the worker ended: {worker.returncode}"
                why = e
                time.sleep(0.1)
        else:
            raise why
        llm.read_prompt(prompt)
        answers.append([])
        for _ in range(8):
            answers[-1].append(int(np.argmax(llm.last_logits)))
            llm.eval(answers[-1][-1:])
        sent = sum(t.bytes_sent for t in llm.rpc_traffic.values()) if options else 0
        llm.close()
    print("FOUND" + json.dumps({"same": answers[0] == answers[1], "sent": sent}))
finally:
    worker.terminate()
    worker.wait()
"""


# Python, CPU, and what was found: by the library, the server, and a worker of RPC
Row = tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]


def found(command: list[str], source: str, *, cwd: Path) -> dict[str, Any]:
    """What a probe prints, or why it printed nothing."""
    done = subprocess.run([*command, "-c", source], cwd=cwd, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    if done.returncode or not lines:
        return {"failed": f"exit status {done.returncode}: " + " ".join(done.stderr.strip().splitlines()[-1:])}
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("FOUND"))
    return result


def install(python: str, dist: Path, folder: Path) -> Path:
    """A venv with the wheel; its Python."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    inside = folder / "bin" / "python"
    pip = [str(inside), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--prefer-binary"]
    (wheel,) = dist.glob("pyheadkv-*.whl")
    subprocess.run([*pip, "--find-links", str(dist), str(wheel)], check=True)
    return inside


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=Path("dist"), help="folder of make wheel (default: %(default)s)")
    parser.add_argument("--python", default=sys.executable, help="Pythons, comma-separated (default: this one)")
    parser.add_argument("--cpu", default="", help="CPUs for qemu-x86_64, comma-separated; under the first Python (default: none)")
    parser.add_argument("--out", type=Path, help="file for the table (default: print it)")
    args = parser.parse_args()
    cpus = [cpu for cpu in args.cpu.split(",") if cpu]
    if cpus and not shutil.which("qemu-x86_64"):
        raise SystemExit("no qemu-x86_64: install qemu-user, or leave --cpu out")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, python in enumerate(args.python.split(",")):
            inside = install(python, args.dist.resolve(), Path(folder) / str(i))
            version = subprocess.run([inside, "-c", "import platform; print(platform.python_version())"], capture_output=True, text=True)
            rows.append(
                (
                    version.stdout.strip(),
                    "this one",
                    found([str(inside)], PROBE, cwd=Path(folder)),
                    found([str(inside)], SERVE, cwd=Path(folder)),
                    found([str(inside)], RPC, cwd=Path(folder)),
                )
            )
            if i == 0:
                real = str(inside)
                for cpu in cpus:
                    emulated = ["qemu-x86_64", "-cpu", cpu, real]
                    rows.append((version.stdout.strip(), cpu, found(emulated, PROBE, cwd=Path(folder)), {}, {}))
    lines = table(rows)
    files = [
        f"- {path.name}: {path.stat().st_size / 1e6:.1f} MB, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.."
        for path in sorted(args.dist.iterdir())
        if path.suffix in (".whl", ".gz")
    ]
    text = "\n".join(
        [
            f"`python scripts/check_wheel.py {' '.join(shown(sys.argv[1:]))}`, {time.strftime('%Y-%m-%d')}, {platform.machine()}",
            "",
            *lines,
            "",
            *files,
            "",
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    if any("failed" in outcome for *_, probe, served, shared in rows for outcome in (probe, served, shared)):
        raise SystemExit("some failed")


def shown(arguments: list[str]) -> list[str]:
    """Arguments without the folders that Pythons lie in."""
    return [",".join(Path(part).name if "/" in part and "python" in part else part for part in arg.split(",")) for arg in arguments]


def table(rows: list[Row]) -> list[str]:
    """Rows of markdown."""
    first = rows[0][2]
    lines = [
        "| Python | CPU | backend | tokens, stock | tokens, compressed | kept cells | seconds | llama-server | with a worker |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for version, cpu, probe, served, shared in rows:
        if "failed" in probe:
            lines.append(f"| {version} | {cpu} | {probe['failed']} | | | | | | |")
            continue
        same = ["the same" if probe[key] == first.get(key) else "others" for key in ("stock", "kv_size=48")]
        heads = list(zip(probe["kept"], first["kept"], strict=True))
        same.append(f"{sum(len(set(a) - set(b)) for a, b in heads)} of {sum(len(b) for _, b in heads)} differ")
        server = served.get("failed") or (f"{served['tokens']} tokens" if served else "not asked")
        tokens = "the same tokens" if shared.get("same") else "other tokens"
        worker = shared.get("failed") or (f"{tokens}, {shared['sent'] / 1e6:.1f} MB sent" if shared else "not asked")
        lines.append(
            f"| {version} | {cpu} | {', '.join(probe['backend'])} | {' | '.join(same)} | {probe['seconds']} | {server} | {worker} |"
        )
    return lines


if __name__ == "__main__":
    main()
