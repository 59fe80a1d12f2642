"""Every large allocation while a prompt is read, compressed and continued fails once: a clear error, and the next prompt works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import Shape

pytestmark = pytest.mark.usefixtures("library")
MakeModel = Callable[..., Path]
TESTS = Path(__file__).parent

SCRIPT = """
import ctypes, json, sys
from conftest import load, logits, tokens

hook = ctypes.CDLL(None)
hook.fail_alloc_arm.argtypes = [ctypes.c_long]
hook.fail_alloc_disarm.restype = ctypes.c_long
options = json.loads(sys.argv[2])
llm = load(sys.argv[1], kv_size=400, window=32, policy="snapkv", n_ctx=4096, n_tail=8, n_ubatch=512, **options)
prompt, answer = tokens(2000), list(range(20, 40))

def run():
    llm.read_prompt(prompt)
    for token in answer:  # the tails grow
        llm.eval([token])
    kept = [llm.kv_positions(il, ih).tolist() for il in range(3) for ih in range(2)]
    return logits(llm).tobytes(), kept

expected = run()
llm.reset()
hook.fail_alloc_arm(0)
assert run() == expected
n = hook.fail_alloc_disarm()
outcomes = []
for k in range(1, n + 1):
    llm.reset()
    hook.fail_alloc_arm(k)
    try:
        run()
        outcomes.append("")
    except (MemoryError, RuntimeError) as error:
        outcomes.append(f"{type(error).__name__}: {error}")
    hook.fail_alloc_disarm()
    stats = llm.kv_stats()
    llm.reset()
    assert run() == expected, (k, outcomes[-1])
    assert llm.kv_stats().bytes_staging == 0
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def fail_alloc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if sys.platform != "linux" or not compiler:
        pytest.skip("replacing malloc needs Linux and a C compiler")
    path = tmp_path_factory.mktemp("preload") / "fail-alloc.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(path), str(TESTS / "cpp" / "fail-alloc.c"), "-ldl"], check=True)
    return path


@pytest.mark.parametrize("options", [{"prefill": "token"}, {"prefill": "layer"}, {"prefill": "token", "attend": "composed"}],
                         ids=["token", "layer", "composed"])
def test_each_failed_allocation_is_an_error_and_the_next_prompt_works(options: dict[str, Any], fail_alloc: Path, make_model: MakeModel) -> None:
    path = make_model(Shape("memory", "llama", 4, 2, n_layer=3, head_dim=128, n_ff=128))
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([*sys.path, str(TESTS)]), LD_PRELOAD=str(fail_alloc), MALLOC_ARENA_MAX="1")
    res = subprocess.run([sys.executable, "-c", SCRIPT, str(path), json.dumps(options)], env=env, cwd=TESTS, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr[-3000:]
    outcomes = json.loads(res.stdout.splitlines()[-1])
    failed = [text for text in outcomes if text]
    assert len(failed) >= 10
    assert all("memory" in text.lower() for text in failed), failed
