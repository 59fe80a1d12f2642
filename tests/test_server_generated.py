"""llama-server with --kv-generated: answers of the library, long ones, requests of their own, slots, reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPES, greedy, load, tokens

pytest.importorskip("test_server", reason="the server is not built")
from test_server import Server, refusal, running

MakeModel = Callable[..., Path]
N_CTX_TRAIN = 1600
BOUND = {"kv_size": 40, "kv_generated": 48, "kv_generated_slack": 16, "window": 16, "policy": "snapkv"}
FLAGS = ("--kv-size", 40, "--kv-generated", 48, "--kv-generated-slack", 16, "--kv-window", 16, "--kv-policy", "snapkv")
ON_AND_ON = {"logit_bias": [[2, False]]}  # without an end


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    return make_model(SHAPES[1], n_ctx_train=N_CTX_TRAIN)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server") / "log", "-c", 1024, *FLAGS, model=model, n_slots=2) as found:
        yield found


def wanted(model: Path, prompt: list[int], n: int, **options: Any) -> list[int]:
    with closing(load(model, **{"preset": "default", **BOUND, **options})) as llm:
        return greedy(llm, prompt, n)


def test_an_answer_is_that_of_the_library(server: Server, model: Path) -> None:
    prompt = tokens(200)
    assert server.complete(prompt, 200)["tokens"] == wanted(model, prompt, 200)


def test_requests_choose_their_own(server: Server, model: Path) -> None:
    """Each slot by its own clock: at once as one after the other."""
    prompts = [tokens(100 + 40 * i, seed=i) for i in range(4)]
    more = [{}, {"kv_generated": 24}, {"kv_generated": 0}, {"kv_generated": None}]
    answers = [server.complete(prompt, 150, **chosen)["tokens"] for prompt, chosen in zip(prompts, more, strict=True)]
    assert answers[1] == wanted(model, prompts[1], 150, kv_generated=24)
    assert answers[2] == wanted(model, prompts[2], 150, kv_generated=None, kv_generated_slack=None)
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda i: server.complete(prompts[i], 150, **more[i], **ON_AND_ON), range(4)))
    assert [len(answer["tokens"]) for answer in again] == [150] * 4
    assert [answer["tokens"][:64] for answer in again] == [answer[:64] for answer in answers]  # then near ties, computed two at a time
    assert [answer["timings"]["kv"].get("generated", {}).get("evictions") for answer in again] == [6, 7, None, 6]
    for wrong in (16, -1, 24.5, "48", True, 496, 10**6, 10**12):
        status, answer = server.request("/completion", {"prompt": prompts[0], "n_predict": 1, "kv_generated": wrong})
        assert status == 400 and answer["error"]["message"].startswith(
            f"kv_generated is {json.dumps(wrong)}: it must be an integer in [17, 495]"
        )
    assert server.complete(prompts[0], 1, kv_generated=495)["tokens"] == answers[0][:1]


def test_an_answer_ends_with_the_trained_length(server: Server) -> None:
    """Not with the context of a slot, 512 tokens, which bounds prompts, and answers that are not bounded."""
    prompt = tokens(200)
    long = server.complete(prompt, -1, **ON_AND_ON)
    assert long["stop_type"] == "limit" and long["truncated"] and len(long["tokens"]) == N_CTX_TRAIN - len(prompt)
    kv = long["timings"]["kv"]
    assert kv["generated"]["size"] == 48 and kv["generated"]["evictions"] > 80 and kv["generated"]["cells_evicted"] > 0
    assert [slot["n_ctx"] for slot in server.get("/slots")] == [512, 512]  # that of the next prompt
    short = server.complete(prompt, -1, kv_generated=0, **ON_AND_ON)
    assert short["truncated"] and len(short["tokens"]) == 512 - len(prompt)
    status, answer = server.request("/completion", {"prompt": tokens(600), "n_predict": 1})
    assert status == 400 and answer["error"]["type"] == "exceed_context_size_error"


def test_slots_props_and_metrics_tell_of_it(server: Server) -> None:
    before = server.metric("kv_generated_evictions_total")
    server.complete(tokens(150), 48 + 16 + 20, id_slot=0, **ON_AND_ON)
    assert server.metric("kv_generated_evictions_total") == before + 2
    assert server.metric("kv_generated_cells_evicted_total") > 0
    assert server.get("/props")["kv"]["generated"] == 48


def test_an_answer_goes_on_as_far_as_it_is_told(model: Path, tmp_path: Path) -> None:
    prompt = tokens(200)
    with running(tmp_path / "log", "-c", 512, *FLAGS, "--kv-limit", 2000, "--kv-reuse", model=model) as found:
        answer = found.complete(prompt, 1000, **ON_AND_ON)["tokens"]
        chat = [*prompt, *answer, *tokens(20, seed=4)[1:]]
        assert len(chat) > 1024
        more = found.complete(chat, 20)
        assert more["timings"]["kv"]["n_prompt"] == len(prompt)
        assert more["timings"]["kv"]["generated"]["evictions"] >= 60
        slot = found.get("/slots")[0]["kv"]
        assert slot["cells"]["max"] <= 40 + 48 + 16 + 20
        assert slot["generated"]["evictions"] >= 60 and slot["n_tokens"] >= len(chat)
        status, failed = found.request("/completion", {"prompt": chat, "n_predict": 1, "kv_generated": 24})  # it would be read again
        assert status == 400 and failed["error"]["type"] == "exceed_context_size_error"
        longer = [*chat, *more["tokens"], 5]
        assert found.complete(longer, 1)["timings"]["cache_n"] >= len(chat)  # and the chat goes on
        status, failed = found.request("/completion", {"prompt": tokens(2000), "n_predict": 1})
        assert status == 400 and failed["error"]["message"].startswith("2000 tokens of a prompt: answers end at --kv-limit 2000")


def test_what_was_thought_leaves_the_store(model: Path, tmp_path: Path) -> None:
    """kv_drop: behind the past that is continued on, and of a prompt that is read from its beginning."""
    prompt = tokens(200)
    with running(tmp_path / "log", "-c", 1024, *FLAGS, "--kv-reuse", model=model) as found:
        thought = found.complete(prompt, 40, **ON_AND_ON)["tokens"]
        chat = [*prompt, *thought, *tokens(10, seed=4)[1:]]
        kept = found.complete(chat, 1)["timings"]["kv"]["cells"]
        for again in (False, True):
            found.complete(prompt, 40, cache_prompt=False, **ON_AND_ON)
            answer = found.complete(chat, 1, kv_drop=[[200, 245]], cache_prompt=not again)
            cells = found.get("/slots")[0]["kv"]["cells"]
            assert answer["timings"]["kv"]["cells"] == cells
            assert ("n_prompt", len(chat) if again else 200) in answer["timings"]["kv"].items()
            assert cells["max"] == kept["max"] - 45 == 44 if not again else cells["max"] < 40
        for wrong in ([[200, 500]], [[5, 5]], [[-1, 3]], 7, [[1]]):
            status, failed = found.request("/completion", {"prompt": chat, "n_predict": 1, "kv_drop": wrong})
            assert status == 400 and failed["error"]["message"].startswith("kv_drop is ")
    with running(tmp_path / "log", "--kv-size", 40, model=model) as found:
        status, failed = found.request("/completion", {"prompt": prompt, "n_predict": 1, "kv_drop": [[1, 3]]})
        assert status == 400 and "--kv-generated" in failed["error"]["message"]


def test_an_archived_prompt_is_answered_with_the_same_evictions(model: Path, tmp_path: Path) -> None:
    prompt = tokens(400)
    with running(tmp_path / "log", "-c", 1024, *FLAGS, "--kv-archive", tmp_path / "kv", model=model) as found:
        first, again = (found.complete(prompt, 200, **ON_AND_ON) for _ in range(2))
    assert first["tokens"] == again["tokens"] == wanted(model, prompt, 200)
    assert (first["timings"]["kv"]["n_archived"], again["timings"]["kv"]["n_archived"]) == (
        0,
        320,
    )  # whole steps of 64 tokens, but for the window
    assert (
        first["timings"]["kv"]["generated"] == again["timings"]["kv"]["generated"] and first["timings"]["kv"]["generated"]["evictions"] == 9
    )


def test_a_slot_beyond_the_context_is_restored_after_a_restart(model: Path, tmp_path: Path) -> None:
    """By a slot that is empty, and holds a shorter context than the answer is long; an unbounded one of as many tokens is refused."""
    prompt, flags = tokens(200), (*FLAGS, "--kv-reuse", "--slot-save-path", tmp_path)
    with running(tmp_path / "log", "-c", 512, *flags, model=model) as found:
        chat = [*prompt, *found.complete(prompt, 700, **ON_AND_ON)["tokens"], *tokens(20, seed=4)[1:]]
        assert found.request("/slots/0?action=save", {"filename": "long"})[0] == 200
        answer = found.complete(chat, 100, **ON_AND_ON)
    with running(tmp_path / "log", "-c", 1024, *flags, model=model) as found:
        found.complete(prompt, 600, kv_generated=0, **ON_AND_ON)
        assert found.request("/slots/0?action=save", {"filename": "unbounded"})[0] == 200
    with running(tmp_path / "log", "-c", 512, *flags, model=model) as found:
        status, failed = found.request("/slots/0?action=restore", {"filename": "unbounded"})
        assert status == 400 and "it holds 799 tokens, the limit is 512" in failed["error"]["message"]
        assert found.get("/slots")[0]["n_ctx"] == 512
        status, restored = found.request("/slots/0?action=restore", {"filename": "long"})
        assert status == 200 and restored["n_restored"] == len(prompt) + 699
        again = found.complete(chat, 100, **ON_AND_ON)
        assert again["tokens"] == answer["tokens"] and again["timings"]["kv"]["generated"] == answer["timings"]["kv"]["generated"]
        assert again["timings"]["kv"]["n_prompt"] == len(prompt)


def test_flags_that_do_not_fit_are_refused(model: Path) -> None:
    for flags, why in [
        (("--kv-size", 40, "--kv-generated", 64), "--kv-generated is 64: it counts the last 64 tokens (window)"),
        (
            ("--kv-size", 40, "--kv-generated", 400),
            "kv_generated is 400, 528 with kv_generated_slack: it must be less than n_ctx = 512, use a smaller one or leave it out",
        ),
        (("--kv-size", 40, "--kv-generated", 100, "--kv-generated-scope", "none"), "'none': it must be one of generated, all"),
        (("--kv-size", 40, "--kv-limit", 1000), "--kv-limit: answers end with the context, use --kv-generated"),
        (("--kv-generated", 100), "--kv-generated has no effect without --kv-size"),
        (("--kv-size", 40, "--kv-generated-slack", 0, "--kv-generated", 100), "--kv-generated-slack is 0: it must be in [1, "),
        (
            ("--kv-policy", "lossless", "--kv-generated-scope", "all", "--kv-generated", 100),
            "--kv-generated-scope is 'all': policy 'lossless'",
        ),
        *(
            (("--kv-size", 40, flag, value), f"{flag}: nothing that is generated is evicted, use --kv-generated, or leave it out")
            for flag, value in [("--kv-generated-slack", 16), ("--kv-generated-rank", "recent"), ("--kv-generated-scope", "all")]
        ),
    ]:
        assert why in refusal(*flags, model=model)
