#!/usr/bin/env python3
"""Layers split over two devices: the engine on two RPC servers against the engine on the CPU.

    make && .venv/bin/python scripts/check_layer_split.py

Needs no GPU: each server computes on the CPU, but its memory is not the host's, so all that a GPU build uses is used:
the composed path, staging, hidden states and store on two devices, copies between them. Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

import numpy as np
from rpc_worker import Worker

from pyheadkv import Llama
from pyheadkv.testing import write_random_model

N_LAYER, N_HEAD_KV, N_PROMPT = 6, 2, 700
MAX_NMSE = 1e-4


def run(path: str, **options: Any) -> tuple[np.ndarray, list[list[int]]]:
    """Logits of the prompt's end and of six more tokens; kept positions of every head."""
    llm = Llama(
        path, kv_size=48, policy="snapkv", n_ctx=2048, n_ubatch=128, n_batch=512, n_threads=1, n_threads_batch=1, verbose=False, **options
    )
    prompt = [1, *np.random.default_rng(3).integers(260, 380, size=N_PROMPT - 1).tolist()]
    llm.read_prompt(prompt)
    rows = []
    for token in (None, 9, 10, 11, 12, 13, 14):
        if token is not None:
            llm.eval([token])
        rows.append(llm.last_logits)
    kept = [llm.kv_positions(il, ih).tolist() for il in range(N_LAYER) for ih in range(N_HEAD_KV)]
    assert llm.kv_stats().bytes_staging == 0
    options["rpc_servers"] = len(options.get("rpc_servers", []))
    print(f"  {options}: {llm.prefill_mode}, {llm.kv_stats().bytes_store} bytes held")
    llm.close()
    return np.stack(rows), kept


def nmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - b) ** 2).mean() / (b**2).mean())


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    workers = [Worker() for _ in range(2)]
    failures = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model.gguf"
            write_random_model(
                path, arch="qwen3", n_layer=N_LAYER, n_embd=256, n_head=4, n_head_kv=N_HEAD_KV, head_dim=64, n_ff=512, seed=5
            )
            both = {"rpc_servers": [worker.endpoint for worker in workers]}
            split = {**both, "tensor_split": [0.5, 0.5]}
            cpu, cpu_kept = run(path, n_gpu_layers=0, prefill="token", attend="composed")
            token, token_kept = run(path, prefill="token", **split)
            layer, layer_kept = run(path, prefill="layer", **split)
            half, half_kept = run(path, prefill="layer", n_gpu_layers=N_LAYER // 2, **both)
    finally:
        for worker in workers:
            worker.kill()
    for name, (a, kept_a), (b, kept_b), exact in [
        ("two devices, layer against token", (layer, layer_kept), (token, token_kept), True),
        ("two devices against the CPU", (token, token_kept), (cpu, cpu_kept), False),
        ("one device and the CPU against the CPU", (half, half_kept), (cpu, cpu_kept), False),
    ]:
        swapped = sum(len(set(x) ^ set(y)) for x, y in zip(kept_a, kept_b, strict=True))
        good = np.array_equal(a, b) and not swapped if exact else nmse(a, b) < MAX_NMSE
        print(f"{name}: NMSE {nmse(a, b):.1e}, {swapped} kept cells differ: {'ok' if good else 'WRONG'}")
        failures += [] if good else [name]
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
