"""The ops and the memory under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from conftest import run_sanitized, sanitizer_libs

# one of each kind of engine test; the names are checked to exist by pytest's exit code
SELECTION = (
    "after_compression_equals_the_oracle or tail or prefix or quantised or shifting or removed_window or context_full or c_api or corrupt "
    "or abort or again_and_again or streaming_keeps or come_and_go or others_decode_on or part_of_the_budget or "
    "edits_other or (goes_while and remove) or cannot_be_written or moves_to_another_one or ends_early or forged_file or something_else or that_lie or adapters_that_change or gives_its_memory or "
    "values_equal_the_oracle or heads_of_any_size or not_taken or side_by_side or one_thread or "
    "(keeps_what_the_oracle and gqa7 and 300-40) or (kept_positions_equal_the_oracle and gqa7) or (test_head_sizes and (oracle or state or archive)) or "
    "((evictions_keep or are_dropped) and llama-gqa4) or evict_each or saved_between or taken_back or are_not_compressed_go_on or drafts_that"
)


N_SHARES = 7  # neighbours, which cost alike, come into different ones


@pytest.mark.parametrize("share", range(N_SHARES))
def test_ops_are_clean(asan_dir: Path, share: int) -> None:
    """And run with every kernel that the machine has."""
    out = run_sanitized([str(asan_dir / "test-headkv-ops"), "-s", f"{share}/{N_SHARES}"])
    found = re.search(r"^0 of (\d+) cases failed$", out, re.M)
    assert found and int(found[1]) > 1000 / N_SHARES
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").is_file() else set()
    needs = {"avx2": {"avx2", "fma", "f16c"}, "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}, "neon": {"asimd"}}
    kernels = re.search(r"^kernels: (.*)$", out, re.M)
    assert kernels and set(kernels[1].split()) >= {"portable"} | {kernel for kernel, need in needs.items() if need <= flags}


def test_states_and_store_are_sound_and_clean(asan_dir: Path) -> None:
    found = re.search(r"^0 of (\d+) checks failed$", run_sanitized([str(asan_dir / "test-memory")]), re.M)
    assert found and int(found[1]) > 100_000


def test_engine_is_clean(asan_dir: Path) -> None:
    cmd = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        "test_c_api.py",
        "test_engine.py",
        "test_fit.py",
        "test_generated.py",
        "test_head_sizes.py",
        "test_prefill_layer.py",
        "test_policies.py",
        "test_policy_oracle.py",
        "test_sequences.py",
        "test_state.py",
        "-k",
        SELECTION,
    ]
    out = run_sanitized(cmd, LD_PRELOAD=sanitizer_libs(), PYHEADKV_LIB_PATH=str(asan_dir), PYHEADKV_STOCK_LIB="", PYTHONMALLOC="malloc")
    assert " passed" in out
