"""Importance of every query head: how much of its attention lands on the needle while the answer is generated.

The idea of HeadKV-R2: over questions that the full cache answers correctly, at each generated token, take the N
most attended positions of a head, N the length of the needles; sum the attention mass of those that belong to the
needles; average, then divide by the sum over all heads.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import language
from .evaluate import is_exact
from .model import NeedleModel, rope_tables


@torch.no_grad()
def answer_attention(model: NeedleModel, document: language.Document) -> Tensor:
    """Attention of the tokens that predict the answer.

    Returns
    -------
    (n_layer, n_head, n_answer_tokens, n_tokens) float32
    """
    o = model.options
    prompt = [language.BOS, *language.encode(document.prompt())]
    answer = language.encode(document.answer)
    tokens = torch.tensor([prompt + answer[:-1]], device=next(model.parameters()).device)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    rope = rope_tables(positions, o, torch.float32)
    first = len(prompt) - 1
    hidden = positions > positions[0, first:, None]  # (n_answer, n_tokens): the future
    x = model.embedding(tokens)
    layers = []
    for block in model.blocks:
        q, k, _ = block.attn.project(block.attn_norm(x), rope)
        k = k.repeat_interleave(o.n_group, 1)
        scores = q[0, :, first:] @ k[0].mT * o.n_embd_head**-0.5
        layers.append(scores.masked_fill(hidden, float("-inf")).softmax(-1))
        x = block(x, rope)
    return torch.stack(layers)


def needle_mass(attention: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Mass on the needles among the top-N positions, mean over the answer's tokens.

    Parameters
    ----------
    attention : (n_layer, n_head, n_answer_tokens, n_tokens)
    spans : (start, end) of each needle, in tokens

    Returns
    -------
    (n_layer, n_head) float32
    """
    on_needle = torch.zeros(attention.shape[-1], dtype=torch.bool, device=attention.device)
    for start, end in spans:
        on_needle[start:end] = True
    top, index = attention.topk(int(on_needle.sum()), dim=-1)
    return (top * on_needle[index]).sum(-1).mean(-1)


def measure_importance(
    model: NeedleModel,
    *,
    seed: int,
    kinds: Sequence[language.Kind] = language.KINDS,
    lengths: Sequence[int] = (512, 1024, 2048),
    n_each: int = 5,
) -> NDArray[np.float32]:
    """Importance of each query head over kinds and lengths, each weighing the same.

    Returns
    -------
    (n_layer, n_head) float32, sums to 1
    """
    o = model.options
    total = torch.zeros(o.n_layer, o.n_head)
    for n_tokens in lengths:
        for kind in kinds:
            rng = random.Random(f"{seed} {n_tokens} {kind}")
            documents = [language.make_document(rng, n_tokens=n_tokens, kinds=[kind]) for _ in range(n_each)]
            right = [document for document in documents if is_exact(model, document)]
            masses = [needle_mass(answer_attention(model, d), d.turns[-1].spans).cpu() for d in right]
            total += sum(masses, torch.zeros_like(total)) / max(1, len(masses))
    if not total.any():
        raise ValueError("the model answered no question correctly: train it longer before measuring importance")
    return (total / total.sum()).numpy()
