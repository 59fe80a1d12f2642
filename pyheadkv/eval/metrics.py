"""How answers are graded: 0 to 1 for a response and one reference answer.

The metrics of LongBench (Bai et al. 2024, arXiv:2308.14508) for its datasets in English, of BABILong (Kuratov et al. 2024,
arXiv:2406.10149) and, but for small differences in what counts as a word, of InfiniteBench (Zhang et al. 2024,
arXiv:2402.13718). ROUGE-L is the F measure of the longest common subsequence of words over the whole text; the
similarity of code is that of ``difflib``.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence


def token_f1(response: str, answer: str) -> float:
    """F1 of the words that two texts share; case, punctuation and articles do not count (SQuAD)."""
    said, wanted = _plain_words(response), _plain_words(answer)
    n_common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * n_common / (len(said) + len(wanted)) if n_common else 0.0


def word_recall(response: str, answer: str) -> float:
    """Share of the words of the answer that the response has (ROUGE-1 recall, words not stemmed)."""
    said, wanted = (Counter(re.findall(r"[a-z0-9]+", text.lower())) for text in (response, answer))
    return sum((said & wanted).values()) / max(1, sum(wanted.values()))


def _plain_words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def rouge_l(response: str, answer: str) -> float:
    """F measure of the longest common subsequence of words."""
    said, wanted = response.split(), answer.split()
    row = [0] * (len(wanted) + 1)
    for word in said:
        diagonal = 0
        for j, other in enumerate(wanted):
            diagonal, row[j + 1] = row[j + 1], diagonal + 1 if word == other else max(row[j], row[j + 1])
    n = row[-1]
    return 2 * n / (len(said) + len(wanted)) if n else 0.0


def classification(response: str, answer: str, classes: Sequence[str]) -> float:
    """1 / the number of classes that the response names, if the answer is one of them; parts of the answer do not count."""
    named = [c for c in classes if c in response and (c == answer or c not in answer)]
    return 1 / len(named) if answer in named else 0.0


def number_share(response: str, answer: str) -> float:
    """Share of the numbers in the response that are the one in the answer."""
    found, wanted = re.findall(r"\d+", response), re.findall(r"\d+", answer)
    return found.count(wanted[-1]) / len(found) if found and wanted else 0.0


def code_similarity(response: str, answer: str) -> float:
    """Of the first line that is no comment and no fence."""
    line = next((line for line in response.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//"))), "")
    return difflib.SequenceMatcher(None, line, answer, autojunk=False).ratio()


def label(response: str, answer: str, labels: Sequence[str], question: str) -> float:
    """1 if the first sentence names the answer and no other label, those in the question aside (BABILong)."""
    said = response.lower().split(".")[0]
    others = {x.lower() for x in labels} - {answer.lower()} - {x.lower() for x in labels if x.lower() in question.lower()}
    return float(answer.lower() in said and not any(x in said for x in others))


def first_number(response: str, answer: str) -> float:
    """1 if the first number of the response is the answer (InfiniteBench)."""
    found = re.search(r"\d+(?:\.\d+)?", response)
    return float(found is not None and (found[0] == answer or ("." in found[0] + answer and float(found[0]) == float(answer))))


def last_number(response: str, answer: str) -> float:
    """1 if the last word of the response is the number (InfiniteBench)."""
    words = re.findall(r"[^\s.`'\":]+", response)
    return float(bool(words) and re.fullmatch(r"-?\d+", words[-1]) is not None and int(words[-1]) == int(answer))


def has_words(response: str, answer: str) -> float:
    """1 if the response has the words of the answer one after the other; case does not count (InfiniteBench)."""
    said, wanted = (re.findall(r"[^\s:\"'.,?!{}]+", text.upper()) for text in (response, answer))
    return float(any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1)))


def choice(response: str, answer: str, options: Sequence[str]) -> float:
    """1 if the response is the answer or its letter: at its beginning, after "answer is", else the first one (InfiniteBench)."""
    said = response.strip()
    if text := max((option for option in options if option and said.startswith(option)), key=len, default=""):
        return float(text == answer)
    letter = r"([A-D])(?![A-Za-z])"
    found = (
        re.match(letter, said) or re.search(rf"(?:answer|option)(?: is)?:?\s+{letter}", said) or re.search(rf"(?<![A-Za-z]){letter}", said)
    )
    return float(found is not None and found[1] == "ABCD"[options.index(answer)])
