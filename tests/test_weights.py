"""Weights in the buffers that a CPU prefers (repacked, tiles of AMX) answer as in plain ones, with either cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HYBRID, SHAPES, load, logits, tokens

pytest.importorskip("pyheadkv", reason="pyheadkv is not installed")

N_TOKENS, N_DECODE = 80, 3


@pytest.mark.parametrize("kv_size", [None, 100])
@pytest.mark.parametrize("ftype", ["f16", "q8_0", "q4_0"])
def test_preferred_buffers_answer_as_plain_ones(
    make_model: Callable[..., Path], library: None, monkeypatch: pytest.MonkeyPatch, ftype: str, kv_size: int | None
) -> None:
    import llama_cpp

    path, default, found = make_model(SHAPES[1], ftype=ftype), llama_cpp.llama_model_default_params, []
    for use in (True, False):

        def params(use: bool = use) -> Any:
            values = default()
            values.use_extra_bufts = use
            return values

        monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", params)
        llm = load(path, kv_size=kv_size)
        assert llm.model_params.use_extra_bufts == use
        rows = []
        ids = tokens(N_TOKENS + N_DECODE)
        llm.read_prompt(ids[:N_TOKENS])
        for token in ids[N_TOKENS:]:
            rows.append(logits(llm))
            llm.eval([token])
        found.append(np.array(rows))
        llm.close()
    error = ((found[0] - found[1]) ** 2).sum() / (found[1] ** 2).sum()
    assert error < (1e-5 if ftype == "f16" else 1e-3)  # activations are rounded to 8 bits in either, in blocks of other sizes


@pytest.mark.parametrize("ftype", ["f16", "q8_0"])
def test_sequences_side_by_side_share_the_weights(make_model: Callable[..., Path], library: None, ftype: str) -> None:
    """A recurrent layer takes a batch of matrices, one for each sequence, with one matrix of weights."""
    from pyheadkv.eval.trial import FULL, Setting, Trial

    trial = Trial(load(make_model(HYBRID, ftype=ftype), kv_size=64, preset="default", policy="snapkv", prefill="token", n_seq_max=4))
    copies = [trial.compress(Setting(FULL), tokens(N_TOKENS)) for _ in range(3)]
    trial.go_on(copies, N_TOKENS, [9, 10, 11])
    said = trial.generate(copies, 11, 8)
    assert said[0] == said[1] == said[2] and len(set(said[0])) > 1
