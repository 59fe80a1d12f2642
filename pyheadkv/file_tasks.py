"""Benchmarks that ``pyheadkv eval`` reads from local JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import metrics
from .quiz import Ask, Grade, Task, TaskOptions
from .score_examples import MARK, Prose

if TYPE_CHECKING:
    from .llama import Llama

FILES = ("longbench", "babilong")
PROMPTS = Path(__file__).resolve().parent / "data" / "prompts.json"


class FileTask(Task):
    """One context and question per line of a JSON lines file, with the prompts and metrics of its benchmark."""

    NO_CHAT = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")  # LongBench asks these without a chat template
    FIRST_LINE = ("trec", "triviaqa", "samsum")

    def __init__(self, llm: Llama, options: TaskOptions) -> None:
        super().__init__(llm, options)
        if options.file is None:
            raise ValueError(f"task {options.name} reads a file: name it with --file FILE.jsonl")
        with open(options.file, encoding="utf-8") as file:
            self._rows = [json.loads(line) for line in file if line.strip()]
        self._prompts = json.loads(PROMPTS.read_text(encoding="utf-8"))[options.name]
        self._prose = Prose(llm)

    def quiz(self, i: int) -> list[Ask]:
        read = self._babilong if self.options.name == "babilong" else self._longbench
        try:
            return [read(self._rows[i])]
        except KeyError as error:
            raise ValueError(f"{self.options.file}: line {i + 1} has no key {error}: is it a file of {self.options.name}?") from None

    def _babilong(self, row: dict[str, Any]) -> Ask:
        found = re.search(r"qa[1-5](?!\d)", str(self.options.file and self.options.file.name))
        if found is None:
            raise ValueError(f"{self.options.file}: the name of a BABILong file says which task it is, qa1 to qa5: rename it")
        name, labels = found[0], self._prompts["labels"][found[0]]
        text = self._prompts["template"].format(context=MARK, question=row["question"], **self._prompts[name])
        answer, question = row["target"], row["question"]
        return self._ask(name, text, row["input"], 20, lambda said: metrics.label(said, answer, labels, question))

    def _longbench(self, row: dict[str, Any]) -> Ask:
        name = row["dataset"]
        if name not in self._prompts:
            raise ValueError(f"dataset {name!r}: it must be one of {', '.join(self._prompts)}")
        text = self._prompts[name]["prompt"].format(context=MARK, input=row["input"])
        answers, classes = row["answers"], row.get("all_classes") or []

        def grade(said: str) -> float:
            if name in self.FIRST_LINE:
                said = said.lstrip("\n").split("\n")[0]
            return max(_longbench_grade(name, said, answer, classes) for answer in answers)

        return self._ask(name, text, row["context"], self._prompts[name]["max_tokens"], grade, chat=name not in self.NO_CHAT)

    def _ask(self, kind: str, template: str, context: str, n_steps: int, grade: Grade, *, chat: bool = True) -> Ask:
        """A prompt with MARK in place of its context, cut in its middle when it is too long, as LongBench does."""
        prefix, suffix = self._prose.wrap(chat=chat)
        before, after = template.split(MARK)
        head, rest = (self.llm.tokenize(text.encode(), add_bos=False) for text in (before + context, after))
        n_room = self.options.n_tokens - len(prefix) - len(suffix)
        body = [*head, *rest]
        if len(body) > n_room:
            body = body[: n_room // 2] + body[len(body) - (n_room - n_room // 2) :]
        tokens = (*prefix, *body, *suffix)
        return Ask(kind, tokens, len(tokens) - len(suffix) - min(len(rest), n_room - 1), n_steps, grade, 0.5)


def _longbench_grade(name: str, said: str, answer: str, classes: Sequence[str]) -> float:
    if name == "trec":
        return metrics.classification(said, answer, classes)
    if name in ("passage_count", "passage_retrieval_en"):
        return metrics.number_share(said, answer)
    if name in ("lcc", "repobench-p"):
        return metrics.code_similarity(said, answer)
    if name in ("gov_report", "qmsum", "multi_news", "samsum"):
        return metrics.rouge_l(said, answer)
    return metrics.token_f1(said, answer)
