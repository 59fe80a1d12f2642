"""Benchmarks that ``pyheadkv eval`` reads from local JSON lines, with their prompts, lengths of answers and metrics.

A prompt that is too long for ``--tokens`` loses its middle, as in all of them. Prompts are in ``data/prompts.json``; a file
given with ``--prompts`` replaces it, ``{task: {kind: {"prompt", "max_tokens"}}}``.

longbench       rows ``{"dataset", "context", "input", "answers"}``. Prompts and lengths are those of the benchmark
                (``data/prompts.LICENSE``), the chat template goes around them where the benchmark has one
babilong        rows ``{"input", "question", "target"}`` in a file named after its task, qa1 to qa5. Prompts of the benchmark
loogle          questions of LooGLE (Li et al. 2023, arXiv:2311.04939). Rows of the data set, ``{"input", "qa_pairs"}``, one
                context and all its questions, or as HeadKV's evaluation has them, ``{"dataset", "context", "input",
                "answers"}``. Prompt, lengths by kind of question and metric (F1 of words) are those of the HeadKV paper, in a chat
                template; the benchmark generates 500 tokens with a repetition penalty and has ROUGE and BLEU besides
infinitebench   rows ``{"context", "input", "answer", "options"}`` of InfiniteBench (Zhang et al. 2024, arXiv:2402.13718) in
                a file named after its task, such as ``kv_retrieval.jsonl``. Lengths and metrics are those of the
                benchmark (``pyheadkv.eval.metrics``); the prompts have its form (an instruction, the context, the question, the beginning of the
                answer, no chat template), but the wording is ours: for numbers to be set beside published ones, give its
                own with ``--prompts``, ``{input}`` being the question and ``{A}`` to ``{D}`` the options. Left out are the task in
                Chinese and ``math_calc``, which generates 30000 tokens
"""

from __future__ import annotations

import ast
import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import metrics
from .prose import MARK, Prose
from .quiz import Ask, Grade, Task, TaskOptions

if TYPE_CHECKING:
    from ..llama import Llama

PROMPTS = Path(__file__).resolve().parents[1] / "data" / "prompts.json"


class FileTask(Task):
    """Contexts of a JSON lines file; lines one after the other that have the same context are questions about it."""

    def __init__(self, llm: Llama, options: TaskOptions) -> None:
        super().__init__(llm, options)
        self.file, self.prompts = check_files(options)
        self._contexts = read_contexts(self.file)
        self._prose = Prose(llm, raw=options.raw)

    def quiz(self, i: int) -> list[Ask]:
        asked: list[Ask] = []
        for number, row in self._contexts[i]:
            try:
                asked += self.read(row)
            except KeyError as error:
                raise ValueError(f"{self.file}: line {number} has no key {error}: is it a file of {self.options.name}?") from None
            except ValueError as error:
                raise ValueError(f"{self.file}: line {number}: {error}") from None
        n_of: Counter[str] = Counter()
        kept = []
        for ask in asked:
            n_of[ask.kind] += 1
            if n_of[ask.kind] <= self.options.n_each:
                kept.append(ask)
        return kept

    @abstractmethod
    def read(self, row: dict[str, Any]) -> list[Ask]:
        """Questions of one line; KeyError for what it does not have."""

    def kind_of(self, kind: str, what: str) -> str:
        """``kind``, if there is a prompt for it."""
        if kind not in self.prompts:
            raise ValueError(f"{what} {kind!r}: it must be one of {', '.join(self.prompts)}")
        return kind

    def kind_in_name(self) -> str:
        """Kind of question that the name of the file says."""
        known = "|".join(map(re.escape, sorted(self.prompts, key=len, reverse=True)))
        found = re.search(rf"(?<![a-z0-9])({known})(?![a-z0-9])", self.file.stem.lower())
        if found is None:
            raise ValueError(
                f"the name of a file of {self.options.name} says which task it is, one of {', '.join(self.prompts)}: rename it"
            )
        return found[1]

    def ask(self, kind: str, template: str, context: str, answer: str, grade: Grade, *, chat: bool = True) -> Ask:
        """A prompt with MARK in place of its context, cut in its middle when it is too long, and an answer that is right.

        Parameters
        ----------
        answer : as the model has to say it; empty where that is not known
        """
        prefix, suffix = self._prose.wrap(chat=chat)
        before, after = template.split(MARK)
        head, rest = (self.llm.tokenize(text.encode(), add_bos=False) for text in (before + context, after))
        n_room = self.options.n_tokens - len(prefix) - len(suffix)
        body = [*head, *rest]
        if len(body) > n_room:
            body = body[: n_room // 2] + body[len(body) - (n_room - n_room // 2) :]
        tokens = (*prefix, *body, *suffix)
        n_context = len(tokens) - len(suffix) - min(len(rest), n_room - 1)
        alone = (*prefix, *self.llm.tokenize((before + after).encode(), add_bos=False), *suffix)
        right = self._prose.behind(tokens, answer) if answer else ()
        return Ask(kind, tokens, n_context, alone, self.prompts[kind]["max_tokens"], grade, 0.5, right=right)


class LongBench(FileTask):
    """See the module."""

    NO_CHAT = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")  # the benchmark asks these without a chat template
    FIRST_LINE = ("trec", "triviaqa", "samsum")

    def read(self, row: dict[str, Any]) -> list[Ask]:
        name = self.kind_of(row["dataset"], "dataset")
        text = self.prompts[name]["prompt"].format(context=MARK, input=row["input"])
        answers, classes = _answers(row), row.get("all_classes") or []

        def grade(said: str) -> float:
            if name in self.FIRST_LINE:
                said = said.lstrip("\n").split("\n")[0]
            return max(_longbench_grade(name, said, answer, classes) for answer in answers)

        return [self.ask(name, text, row["context"], answers[0], grade, chat=name not in self.NO_CHAT)]


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


class BABILong(FileTask):
    """See the module."""

    def read(self, row: dict[str, Any]) -> list[Ask]:
        name = self.kind_in_name()
        prompt = self.prompts[name]
        text = prompt["prompt"].format(context=MARK, question=row["question"])
        answer, question = row["target"], row["question"]
        right = answer if "only one word" in prompt["prompt"] else ""  # the others want a sentence
        return [self.ask(name, text, row["input"], right, lambda said: metrics.label(said, answer, prompt["labels"], question))]


class LooGLE(FileTask):
    """See the module."""

    def read(self, row: dict[str, Any]) -> list[Ask]:
        if "qa_pairs" in row:
            said = [(pair["Q"], [str(pair["A"])], pair.get("type", "")) for pair in _pairs(row["qa_pairs"])]
            context = row["input"]
        else:
            said, context = [(row["input"], _answers(row), row["dataset"])], row["context"]
        return [self._question(context, *question) for question in said]

    def _question(self, context: str, question: str, answers: list[str], kind: str) -> Ask:
        kind = self.kind_of("_".join(re.findall("[a-z]+", kind.lower())) or "shortdep_qa", "kind of question")
        text = self.prompts[kind]["prompt"].format(context=MARK, input=question)
        return self.ask(kind, text, context, answers[0], lambda said: max(metrics.token_f1(said, answer) for answer in answers))


def _answers(row: dict[str, Any]) -> list[str]:
    """Those of a row, of which one is enough."""
    answers = row["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"answers = {str(answers)[:40]!r}: it must be a list of texts, one at least")
    return answers


def _pairs(value: Any) -> list[dict[str, Any]]:
    """Questions of a row, a list or the text of one; read as data, never run."""
    pairs = value
    if isinstance(value, str):
        try:
            pairs = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs = None
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise ValueError(f"qa_pairs = {str(value)[:40]!r}: it must be a list of questions, summaries and clozes cannot be asked")
    return pairs


class InfiniteBench(FileTask):
    """See the module."""

    CHOICES = ("code_debug", "longbook_choice_eng")
    GRADES: dict[str, Callable[[str, str], float]] = {
        "passkey": metrics.first_number,
        "number_string": metrics.first_number,
        "kv_retrieval": metrics.has_words,
        "longdialogue_qa_eng": metrics.has_words,
        "math_find": metrics.first_number,
        "code_run": metrics.last_number,
        "longbook_qa_eng": metrics.token_f1,
        "longbook_sum_eng": metrics.rouge_l,
    }

    def read(self, row: dict[str, Any]) -> list[Ask]:
        name = self.kind_in_name()
        answers = _answers({"answers": [str(a) for a in (row["answer"] if isinstance(row["answer"], list) else [row["answer"]])]})
        options = [str(option) for option in row.get("options") or []]
        if name in self.CHOICES and (len(options) != 4 or answers[0] not in options):
            raise ValueError(f"options = {options}: four are needed, the answer {answers[0]!r} among them")
        text = self.prompts[name]["prompt"].format(context=MARK, input=row["input"], **dict(zip("ABCD", options)))

        def grade(said: str) -> float:
            if name in self.CHOICES:
                return metrics.choice(said, answers[0], options)
            return max(self.GRADES[name](said, answer) for answer in answers)

        right = "ABCD"[options.index(answers[0])] if name in self.CHOICES else answers[0]
        return [self.ask(name, text, row["context"], right, grade, chat=False)]


CLASSES: dict[str, type[FileTask]] = {"longbench": LongBench, "babilong": BABILong, "loogle": LooGLE, "infinitebench": InfiniteBench}
FILES = tuple(CLASSES)


def read_contexts(path: Path) -> list[list[tuple[int, dict[str, Any]]]]:
    """Lines of a JSON lines file with their numbers, those that follow each other with the same context together."""
    with open(path, encoding="utf-8") as file:
        rows = [(number, json.loads(line)) for number, line in enumerate(file, 1) if line.strip()]
    return [list(same) for _, same in groupby(rows, key=lambda row: row[1].get("context", row[1].get("input")))]


def check_files(options: TaskOptions) -> tuple[Path, dict[str, Any]]:
    """The file of a task and its prompts.

    Raises
    ------
    ValueError : no file, or prompts that cannot be used
    """
    if options.file is None:
        raise ValueError(f"task {options.name} reads a file: name it with --file FILE.jsonl")
    source = options.prompts or PROMPTS
    try:
        prompts = json.loads(source.read_text(encoding="utf-8"))[options.name]
        for kind, prompt in prompts.items():
            if prompt["prompt"].count("{context}") != 1 or int(prompt["max_tokens"]) < 1:
                raise ValueError(f"{kind} needs one {{context}} and max_tokens above 0")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"prompts {source}: no prompts of {options.name} ({error})") from None
    return options.file, prompts


def n_answer(options: TaskOptions) -> int:
    """Tokens of the longest answer of a task that reads a file, 0 for another one."""
    return max(prompt["max_tokens"] for prompt in check_files(options)[1].values()) if options.name in FILES else 0
