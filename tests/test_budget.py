"""Budgets: the authors' formula bit for bit, on their two HeadKV-R2 score files."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyheadkv.score_files import load_scores
from pyheadkv.testing.reference import budget, budget_kv, uniform_budget

GOLDEN = Path(__file__).parent / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "head_capacity_r2.json").read_text())["cases"]
SCORE_SETS = ("llama3_8b_r2", "mistral_7b_r2")
WINDOW = 8


def case_name(case: dict[str, Any]) -> str:
    return f"{case['scores']}-{case['kv_size']}-{case['beta']}"


def means(name: str) -> NDArray[np.float64]:
    return np.array(json.loads((GOLDEN / f"head_mean_{name}.json").read_text())["mean_score"])


IMPORTANCE = {name: means(name) for name in SCORE_SETS}


def sha256(caps: NDArray[np.int32]) -> str:
    return hashlib.sha256(",".join(map(str, caps.ravel().tolist())).encode()).hexdigest()


def test_golden_file_covers_both_score_sets_five_sizes_and_eight_betas() -> None:
    assert len(CASES) == len({case_name(case) for case in CASES}) == 2 * 5 * 8
    assert sum("capacities" in case for case in CASES) == 2 * 3


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_budget_equals_golden(case: dict[str, Any]) -> None:
    caps = budget(IMPORTANCE[case["scores"]], kv_size=case["kv_size"], recent=case["window"], beta=case["beta"])
    assert caps.dtype == np.int32 and caps.shape == (32, 32)
    assert caps.sum() == case["total_without_window"]
    assert caps.sum() + caps.size * case["window"] == case["total_with_window"]
    assert (caps.min(), np.median(caps), caps.max()) == (case["min"], case["median"], case["max"])
    if "capacities" in case:
        np.testing.assert_array_equal(caps, case["capacities"])
    assert sha256(caps) == case["sha256"]


@pytest.mark.parametrize("name", SCORE_SETS)
def test_authors_score_file_gives_the_golden_means(name: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_bytes(gzip.decompress((GOLDEN / f"head_score_{name}.json.gz").read_bytes()))
    np.testing.assert_array_equal(load_scores(path).values, IMPORTANCE[name])


@pytest.mark.parametrize(
    ("name", "kv_size", "beta", "expected"),
    [
        ("llama3_8b_r2", 128, 1.01, (2, 30, 728)),
        ("llama3_8b_r2", 128, 1.2, (20, 43.5, 635)),
        ("llama3_8b_r2", 512, 1.1, (46, 154.5, 2864)),
        ("llama3_8b_r2", 1024, 1.2, (171, 371, 5374)),
        ("mistral_7b_r2", 128, 1.01, (2, 33.5, 1463)),
        ("mistral_7b_r2", 512, 1.1, (47, 168.5, 5718)),
        ("mistral_7b_r2", 1024, 1.2, (172, 396.5, 10647)),
    ],
)
def test_kv_budget_is_the_group_mean(name: str, kv_size: int, beta: float, expected: tuple[float, float, float]) -> None:
    caps = budget(IMPORTANCE[name], kv_size=kv_size, recent=WINDOW, beta=beta)
    cells = budget_kv(caps, n_head_kv=8, recent=WINDOW)
    assert cells.dtype == np.int32 and cells.shape == (32, 8)
    prefix = cells - WINDOW
    assert (prefix.min(), np.median(prefix), prefix.max()) == expected
    assert abs(cells.mean() / kv_size - 1) < 0.002


def test_rounding_importance_to_float32_changes_a_golden_budget() -> None:
    """Why gguf_keys stores importance as F64 when F32 is not exact."""
    importance = IMPORTANCE["mistral_7b_r2"]
    exact, rounded = (
        budget(values, kv_size=512, recent=WINDOW, beta=2.0) for values in (importance, importance.astype(np.float32).astype(np.float64))
    )
    assert np.abs(exact - rounded).sum() == 1


@pytest.mark.parametrize(("base", "beta", "n_shared"), [(11, 1.1, 9), (101, 1.01, 99)])
def test_shared_pool_is_a_python_float_floor_division(base: int, beta: float, n_shared: int) -> None:
    assert base // beta == n_shared != int(base / beta)
    caps = budget([[1.0, 0.0]], kv_size=base + WINDOW, recent=WINDOW, beta=beta)
    assert caps.tolist() == [[base + n_shared, base - n_shared]]


def test_budget_rounds_half_to_even() -> None:
    # shares 1/4 and 3/4 of a pool of 2: caps 0.5 and 1.5 above base - 1
    assert budget([[1.0, 3.0]], kv_size=2 + WINDOW, recent=WINDOW, beta=2.0).tolist() == [[2, 2]]
    assert budget([[1.0, 3.0]], kv_size=3 + WINDOW, recent=WINDOW, beta=3.0).tolist() == [[2, 4]]


def test_kv_budget_rounds_half_to_even_and_adds_the_window() -> None:
    assert budget_kv([[2, 3, 3, 4]], n_head_kv=2, recent=5).tolist() == [[2 + 5, 4 + 5]]


def test_scale_of_importance_does_not_matter() -> None:
    importance = IMPORTANCE["llama3_8b_r2"]
    one = budget(importance, kv_size=128, recent=WINDOW, beta=1.2)
    np.testing.assert_array_equal(budget(importance * 1e6, kv_size=128, recent=WINDOW, beta=1.2), one)


@pytest.mark.parametrize("beta", [1.0000001, 1.005, 2.0, 1e9])
@pytest.mark.parametrize("kv_size", [9, 10, 31, 33])
def test_no_head_is_ever_empty(kv_size: int, beta: float) -> None:
    assert budget([[5.0, 0.0, 0.0]], kv_size=kv_size, recent=WINDOW, beta=beta).min() >= 1


def test_uniform_budget_is_kv_size_without_the_window() -> None:
    caps = uniform_budget(n_layer=2, n_head=6, kv_size=20, recent=WINDOW)
    assert caps.dtype == np.int32 and caps.tolist() == [[12] * 6] * 2
    assert (budget_kv(caps, n_head_kv=2, recent=WINDOW) == 20).all()


def test_huge_beta_gives_uniform_budgets() -> None:
    caps = budget(IMPORTANCE["llama3_8b_r2"], kv_size=128, recent=WINDOW, beta=1e6)
    np.testing.assert_array_equal(caps, uniform_budget(n_layer=32, n_head=32, kv_size=128, recent=WINDOW))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_size": 8}, "kv_size = 8.*at least 9"),
        ({"kv_size": 0}, "kv_size = 0"),
        ({"kv_size": -1}, "kv_size = -1"),
        ({"recent": 0}, "recent = 0"),
        ({"beta": 1.0}, "beta = 1.0"),
        ({"beta": 0.5}, "beta = 0.5"),
        ({"beta": float("nan")}, "beta = nan"),
        ({"beta": float("inf")}, "beta = inf"),
        ({"importance": [1.0, 2.0]}, r"shape \(2,\)"),
        ({"importance": [[]]}, "shape"),
        ({"importance": [[0.0, 0.0]]}, "sum 0.0"),
        ({"importance": [[1.0, -1.0]]}, "-1.0"),
        ({"importance": [[1.0, float("nan")]]}, "nan"),
        ({"importance": [[1.0, float("inf")]]}, "inf"),
        ({"importance": [[1e308, 1e308]]}, "finite"),
        ({"kv_size": 2**32}, "int32"),
    ],
)
def test_wrong_budget_input_is_a_value_error_that_names_it(change: dict[str, Any], message: str) -> None:
    args: dict[str, Any] = {"importance": [[1.0, 2.0]], "kv_size": 64, "recent": WINDOW, "beta": 1.2} | change
    with pytest.raises(ValueError, match=message):
        budget(args.pop("importance"), **args)


@pytest.mark.parametrize("n_head_kv", [0, -1, 3])
def test_kv_heads_that_do_not_divide_the_heads_are_refused(n_head_kv: int) -> None:
    with pytest.raises(ValueError, match=f"n_head_kv = {n_head_kv}"):
        budget_kv(np.ones((2, 4)), n_head_kv=n_head_kv, recent=WINDOW)
