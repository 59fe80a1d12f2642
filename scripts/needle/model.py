"""A small Llama in plain PyTorch, and the initialisation that lets it learn retrieval within minutes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelOptions:
    """Shape of the model; the same names as in Llama configurations."""

    n_vocab: int
    n_layer: int = 5
    n_head: int = 8
    n_head_kv: int = 4
    n_embd: int = 256
    n_embd_head: int = 64
    n_ff: int = 384
    rope_freq_base: float = 1e7
    rms_eps: float = 1e-5
    n_ctx: int = 16384

    def __post_init__(self) -> None:
        if self.n_head % self.n_head_kv:
            raise ValueError(f"n_head is {self.n_head}: make it a multiple of n_head_kv, {self.n_head_kv}")
        if any(size % 32 for size in (self.n_embd, self.n_ff, self.n_head * self.n_embd_head)):
            raise ValueError("n_embd, n_ff and n_head * n_embd_head must be multiples of 32, the block of q8_0")

    @property
    def n_group(self) -> int:
        """Query heads per KV head."""
        return self.n_head // self.n_head_kv


class RMSNorm(nn.Module):
    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rope_tables(positions: Tensor, options: ModelOptions, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (n_batch, 1, n_tokens, n_embd_head), for positions (n_batch, n_tokens)."""
    pairs = torch.arange(0, options.n_embd_head, 2, dtype=torch.float32, device=positions.device)
    inverse = options.rope_freq_base ** (-pairs / options.n_embd_head)
    angles = positions.float()[:, None, :, None] * inverse
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on halves (pair i is channels i and i + n/2); export permutes the rows for llama.cpp."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Attention(nn.Module):
    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = o = options
        self.q = nn.Linear(o.n_embd, o.n_head * o.n_embd_head, bias=False)
        self.k = nn.Linear(o.n_embd, o.n_head_kv * o.n_embd_head, bias=False)
        self.v = nn.Linear(o.n_embd, o.n_head_kv * o.n_embd_head, bias=False)
        self.out = nn.Linear(o.n_head * o.n_embd_head, o.n_embd, bias=False)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (n_batch, n_head, n_tokens, n_embd_head), keys and values (n_batch, n_head_kv, ..)."""
        n_batch, n_tokens, _ = x.shape
        q, k, v = (linear(x).view(n_batch, n_tokens, -1, self.options.n_embd_head).transpose(1, 2) for linear in (self.q, self.k, self.v))
        return rotate(q, *rope), rotate(k, *rope), v

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        n_batch, n_tokens, _ = x.shape
        q, k, v = self.project(x, rope)
        k, v = (t.repeat_interleave(self.options.n_group, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(n_batch, n_tokens, -1))


class FeedForward(nn.Module):
    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.gate = nn.Linear(options.n_embd, options.n_ff, bias=False)
        self.up = nn.Linear(options.n_embd, options.n_ff, bias=False)
        self.down = nn.Linear(options.n_ff, options.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(options.n_embd, options.rms_eps)
        self.attn = Attention(options)
        self.ffn_norm = RMSNorm(options.n_embd, options.rms_eps)
        self.ffn = FeedForward(options)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rope)
        return x + self.ffn(self.ffn_norm(x))


class NeedleModel(nn.Module):
    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        self.embedding = nn.Embedding(options.n_vocab, options.n_embd)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.n_layer))
        self.norm = RMSNorm(options.n_embd, options.rms_eps)
        self.head = nn.Linear(options.n_embd, options.n_vocab, bias=False)

    def hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(n_batch, n_tokens) twice -> (n_batch, n_tokens, n_embd), normed, ready for `head`."""
        x = self.embedding(tokens)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        rope = rope_tables(positions, self.options, dtype)
        for block in self.blocks:
            x = block(x, rope)
        return self.norm(x)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.head(self.hidden(tokens, positions))


@dataclass(frozen=True)
class InitOptions:
    """How strongly the start is biased. Plain initialisation stays at "copy some value" for far too long."""

    #: attention of a local head in layer 0: how much higher its offset scores than the others
    local_sharpness: float = 10.0
    #: RoPE pairs, fastest first, that the local heads use
    n_local_pairs: int = 8
    local_copy: float = 0.5
    #: KV heads per later layer that start as "attend to what looks like me, copy it"
    n_matching: int = 1
    matching_copy: float = 0.3
    #: noise between W_q and W_k of a matching head
    matching_noise: float = 0.3
    #: RoPE pairs slower than this share turn so little that a match holds at any distance
    slow_pairs: float = 0.55


_CONSTANT_CHANNEL, _NUMBER_CHANNEL = 0, 1
_CONSTANT = 4.0


@torch.no_grad()
def initialise(model: NeedleModel, init: InitOptions, *, numbers: list[int], generator: torch.Generator) -> None:
    """Structured start: layer 0 looks a fixed few tokens back, later layers match content.

    Parameters
    ----------
    numbers : token ids of 00, 01, .., in order; one channel of their embedding starts as their size, so that
        comparisons begin as a linear read-out
    generator : CPU generator, the only source of randomness
    """
    o = model.options

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            shrink = 0.5 / math.sqrt(o.n_layer) if name.endswith(("out.weight", "down.weight")) else 1.0
            weight.copy_(normal(*weight.shape, std=shrink * weight.shape[1] ** -0.5))
    table = normal(o.n_vocab, o.n_embd, std=1.0)
    table[:, _CONSTANT_CHANNEL] = _CONSTANT
    table[:, _NUMBER_CHANNEL] = 0.0
    table[numbers, _NUMBER_CHANNEL] = torch.linspace(-2.0, 2.0, len(numbers))
    model.embedding.weight.copy_(table)
    level_embeddings(model)
    model.head.weight.copy_(table / math.sqrt(o.n_embd))
    model.head.weight[:, _CONSTANT_CHANNEL] = 0.0
    _initialise_local(model.blocks[0].attn, init, normal)
    for block in list(model.blocks)[1:]:
        _initialise_matching(block.attn, init, normal)


def freeze_local(model: NeedleModel) -> None:
    """Keep the look-back of layer 0 as it started: left free, heads drift to other offsets within a hundred steps,
    none may be left at the attribute of a question, and the loss stays where names alone can bring it."""
    first = model.blocks[0]
    first.attn.q.weight.requires_grad_(False)
    first.attn.k.weight.requires_grad_(False)

    def keep_constant(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[..., _CONSTANT_CHANNEL] = 0.0
        return gradient

    model.embedding.weight.register_hook(keep_constant)
    first.attn_norm.weight.register_hook(keep_constant)


@torch.no_grad()
def level_embeddings(model: NeedleModel) -> None:
    """Bring all token embeddings to one length, the constant channel apart: then RMSNorm leaves that channel the
    same for every token, and the look-back of layer 0, which reads nothing else, is exact."""
    content = model.embedding.weight[:, _CONSTANT_CHANNEL + 1 :]
    content.mul_(math.sqrt(model.options.n_embd) / content.norm(dim=1, keepdim=True))


def _orthonormal(normal, n_rows: int, n_columns: int) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.linalg.qr(normal(n_columns, max(n_rows, 1), std=1.0))[0].T[:n_rows]


def _initialise_local(attn: Attention, init: InitOptions, normal) -> None:  # type: ignore[no-untyped-def]
    """Query head i attends to the token 1, 2, .. places back; two heads of a group share a copied subspace, so
    that "one back" of a question can match "two back" of a needle."""
    o, n = attn.options, attn.options.n_embd_head
    inverse = o.rope_freq_base ** (-torch.arange(init.n_local_pairs) * 2.0 / n)
    constant = _CONSTANT / math.sqrt(1.0 + _CONSTANT**2 / o.n_embd)  # after RMSNorm
    gain = math.sqrt(init.local_sharpness * math.sqrt(n) / float((1 - inverse.cos()).sum())) / constant
    wq, wk = torch.zeros(o.n_head * n, o.n_embd), torch.zeros(o.n_head_kv * n, o.n_embd)
    copied = _orthonormal(normal, min(o.n_head_kv * n, o.n_embd), o.n_embd).repeat(-(-o.n_head_kv * n // o.n_embd), 1)
    for h in range(o.n_head):
        kv = h // o.n_group
        offset = float((kv % 3) * o.n_group + h % o.n_group + 1)
        rows = slice(h * n, h * n + n)
        rows_kv = slice(kv * n, kv * n + n)
        wq[h * n : h * n + init.n_local_pairs, _CONSTANT_CHANNEL] = gain * torch.cos(inverse * offset)
        half = h * n + n // 2
        wq[half : half + init.n_local_pairs, _CONSTANT_CHANNEL] = -gain * torch.sin(inverse * offset)
        wk[kv * n : kv * n + init.n_local_pairs, _CONSTANT_CHANNEL] = gain
        attn.out.weight[:, rows] = init.local_copy * copied[rows_kv].T
    attn.q.weight.copy_(wq)
    attn.k.weight.copy_(wk)
    attn.v.weight.copy_(copied[: o.n_head_kv * n])


def _initialise_matching(attn: Attention, init: InitOptions, normal) -> None:  # type: ignore[no-untyped-def]
    """The first KV heads get W_q close to W_k on slow RoPE pairs and copy what they see; the others keep the plain
    start, so that heads of one layer grow different."""
    o, n = attn.options, attn.options.n_embd_head
    slow = torch.where(torch.arange(n // 2) >= int(init.slow_pairs * n / 2), 1.0, 0.2).repeat(2)[:, None]
    std = o.n_embd**-0.5
    for kv in range(init.n_matching):
        rows_kv = slice(kv * n, kv * n + n)
        key = normal(n, o.n_embd, std=std) * slow
        key[:, _CONSTANT_CHANNEL] = 0.0
        copied = _orthonormal(normal, n, o.n_embd)
        attn.k.weight[rows_kv] = key
        attn.v.weight[rows_kv] = copied
        for h in range(kv * o.n_group, (kv + 1) * o.n_group):
            rows = slice(h * n, h * n + n)
            attn.q.weight[rows] = key + normal(n, o.n_embd, std=init.matching_noise * std) * slow
            attn.out.weight[:, rows] = init.matching_copy / math.sqrt(o.n_group) * copied.T
