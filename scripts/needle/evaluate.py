"""Exact-match accuracy in PyTorch, teacher-forced: an answer is right when every one of its tokens is the arg max."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from . import language
from .model import NeedleModel


@torch.no_grad()
def is_exact(model: NeedleModel, document: language.Document) -> bool:
    """Whether the full cache answers the last question of a document, word for word."""
    prompt = [language.BOS, *language.encode(document.prompt())]
    answer = language.encode(document.answer)
    device = next(model.parameters()).device
    tokens = torch.tensor([prompt + answer[:-1]], device=device)
    positions = torch.arange(tokens.shape[1], device=device)[None]
    hidden = model.hidden(tokens, positions)[0, len(prompt) - 1 :]
    return model.head(hidden).argmax(-1).tolist() == answer


def accuracy_table(model: NeedleModel, *, seed: int, lengths: Sequence[int] = (1024, 4096), n_each: int = 10) -> Iterator[str]:
    """Lines "length: kind right/asked ..", random depths."""
    for n_tokens in lengths:
        cells = []
        for kind in language.KINDS:
            rng = random.Random(f"{seed} {n_tokens} {kind}")
            n_right = sum(is_exact(model, language.make_document(rng, n_tokens=n_tokens, kinds=[kind])) for _ in range(n_each))
            cells.append(f"{kind} {n_right}/{n_each}")
        yield f"exact answers at {n_tokens} tokens: " + ", ".join(cells)
