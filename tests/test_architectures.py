"""Every architecture of llama.cpp: it passes, or the table in bench/results says why it is refused."""

from __future__ import annotations

import re

import pytest

import architectures
from architectures import Result

# measured are 1e-5, of which the stock cache's own sums in f16 are most, and 0
MAX_NMSE_FUSED = 1e-4
MAX_NMSE_COMPOSED = 1e-6
# measured are 2e-6 and at least 2e-2
MAX_NMSE_PATHS = 2e-5
MIN_NMSE_EVICTED = 1e-3


@pytest.fixture(scope="module")
def results() -> list[Result]:
    """Results of all cases."""
    return list(architectures.sweep())


@pytest.fixture(scope="module")
def ran(results: list[Result]) -> list[Result]:
    """Those with compression."""
    found = [r for r in results if r.kind in ("layer", "token")]
    assert len(found) >= 85
    return found


def test_outcomes_are_those_of_the_table(results: list[Result]) -> None:
    """After a change that is meant: python tests/architectures.py"""
    expected = architectures.read_table(architectures.TABLE.read_text())
    assert {r.name: r.outcome for r in results} == expected


def test_at_least_seventy_architectures_are_read_layer_by_layer(results: list[Result]) -> None:
    names = {r.name.split(" (")[0] for r in results}
    layered = {r.name.split(" (")[0] for r in results if r.kind == "layer"}
    assert len(names) >= 153
    assert len(layered) >= 70


def test_what_does_not_run_has_a_reason_and_no_abort(results: list[Result]) -> None:
    assert [r.name for r in results if r.kind != "layer" and not re.match(r"(token|refused|not run): \S", r.outcome)] == []


def test_layer_by_layer_gives_the_bits_and_the_kept_cells_of_token_order(results: list[Result]) -> None:
    assert [r.name for r in results if r.kind == "layer" and not r.same_order] == []


def test_prompt_logits_have_the_bits_of_the_stock_cache(ran: list[Result]) -> None:
    assert [r.name for r in ran if not (r.same_prompt and r.finite)] == []


def test_every_head_keeps_its_budget_or_the_whole_prompt(ran: list[Result]) -> None:
    assert {r.n_kept for r in ran} == {(architectures.KV_SIZE, architectures.N_PROMPT)}


def test_decoded_logits_are_those_of_the_stock_cache_when_nothing_is_evicted(ran: list[Result]) -> None:
    assert {r.name: r.nmse_fused for r in ran if not r.nmse_fused < MAX_NMSE_FUSED} == {}
    assert {r.name: r.nmse_composed for r in ran if not r.nmse_composed < MAX_NMSE_COMPOSED} == {}


def test_both_paths_of_attention_agree_when_cells_are_evicted(ran: list[Result]) -> None:
    assert {r.name: r.nmse_paths for r in ran if not r.nmse_paths < MAX_NMSE_PATHS} == {}


def test_decoded_logits_depend_on_the_evicted_cells(ran: list[Result]) -> None:
    assert {r.name: r.nmse_evicted for r in ran if not r.nmse_evicted > MIN_NMSE_EVICTED} == {}
