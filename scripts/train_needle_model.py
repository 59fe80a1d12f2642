#!/usr/bin/env python3
"""Train the embedded needle model from nothing and write it as GGUF.

    pip install .[train]
    python scripts/train_needle_model.py --out build/needle --install

Generates the corpus (see pyheadkv/eval/needle.py), trains with a curriculum over lengths, evaluates, measures the
importance of every query head and writes needle-f16.gguf and needle-q8_0.gguf. ``--install`` copies the q8_0 file
to pyheadkv/data/needle.gguf. Stops and goes on: the last checkpoint in ``--out`` is taken up again with
``--resume``. Same seed, device and thread count give the same weights, unless ``--minutes`` lets the clock decide.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.nn.functional as F
from needle import REPOSITORY, language
from needle.corpus import ANSWER_CLASS, LANGUAGE, NO_LOSS, Corpus, Mix, skipped_positions
from needle.evaluate import accuracy_table
from needle.export import GGUF_TYPES, write_gguf
from needle.importance import measure_importance
from needle.model import InitOptions, ModelOptions, NeedleModel, freeze_local, initialise, level_embeddings
from needle.optimizer import OptimizerOptions, make_optimizers
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum."""

    name: str
    #: (n_batch, n_tokens) of the batches, taken in turn
    shapes: tuple[tuple[int, int], ...]
    mix: Mix
    n_steps: int
    #: positions reach up to here through random gaps; 0: no gaps
    max_position: int = 0
    #: learning rate at the start and at the end, relative
    lr: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class TrainOptions:
    out: Path
    seed: int = 1
    device: str = "cpu"
    n_threads: int = 2
    minutes: float | None = None
    resume: bool = False
    n_warmup: int = 30
    language_weight: float = 0.15
    #: steps between two lines of the log
    n_log: int = 20
    #: steps between two checkpoints
    n_save: int = 20
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    init: InitOptions = field(default_factory=InitOptions)


def curriculum() -> tuple[Stage, ...]:
    """The stages of the shipped model: two and a half hours on 2 CPU cores while others were busy."""
    only_direct = Mix(n_direct=(2, 3), n_value=(2, 3), people_share=0.7, question_share=0.5, mid_share=0.3)
    hops = Mix(n_direct=(2, 5), n_alias=(1, 4), n_aged=(2, 3), n_value=(2, 5), question_share=0.5)
    short = Mix(n_direct=(2, 6), n_alias=(1, 5), n_aged=(2, 4), n_listed=(1, 2), n_keys=(2, 4), question_share=0.5, chat_share=0.1)
    often = {"direct": 0.2, "two-hop": 0.5, "comparison": 3.0, "list": 0.2}
    ages = Mix(n_direct=(0, 1), n_alias=(0, 1), n_aged=(2, 4), n_value=(2, 4), question_share=0.65, weights=often)
    middle = Mix(n_direct=(4, 12), n_alias=(2, 6), n_aged=(2, 6), n_listed=(1, 3), question_share=0.45, chat_share=0.1)
    favoured: dict[language.Kind, float] = {"direct": 1.0, "two-hop": 2.0, "comparison": 1.0, "list": 0.5}
    long = replace(middle, n_direct=(4, 14), n_alias=(3, 9), question_share=0.4, weights=favoured)
    # the rest of a value is found by the name, not by how the value begins
    twins = replace(long, twin_share=0.4)
    # more people that stand for each other than any document of an evaluation holds
    chains = replace(twins, n_alias=(4, 12), weights={**favoured, "two-hop": 4.0})
    return (
        Stage("direct", ((48, 64),), only_direct, 160),
        Stage("hops", ((24, 192),), hops, 240),
        Stage("kinds", ((12, 384),), short, 280),
        Stage("ages", ((24, 160),), ages, 100),
        Stage("512-1024", ((8, 512), (4, 1024)), middle, 200, max_position=16384),
        Stage("anneal", ((4, 1024), (2, 2048), (4, 1024), (1, 4096)), long, 640, max_position=16384, lr=(0.8, 0.0)),
        Stage("twins", ((4, 1024), (2, 2048), (4, 1024), (1, 4096)), twins, 240, max_position=16384, lr=(0.4, 0.0)),
        Stage("chains", ((4, 1024), (2, 2048), (4, 1024), (1, 4096)), chains, 600, max_position=16384, lr=(0.6, 0.0)),
        Stage("again", ((4, 1024), (2, 2048), (4, 1024), (1, 4096)), chains, 500, max_position=16384, lr=(0.5, 0.0)),
    )


@dataclass
class Averages:
    """Moving averages per kind of answer: cross entropy per token, share of exact answers."""

    loss: dict[str, float] = field(default_factory=dict)
    exact: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, *, loss: float, exact: float, keep: float = 0.9) -> None:
        self.loss[kind] = keep * self.loss.get(kind, loss) + (1 - keep) * loss
        self.exact[kind] = keep * self.exact.get(kind, exact) + (1 - keep) * exact

    def __str__(self) -> str:
        return " ".join(f"{kind} {100 * self.exact[kind]:.0f}% ({self.loss[kind]:.3f})" for kind in self.exact)


class Trainer:
    def __init__(self, options: TrainOptions, stages: tuple[Stage, ...], model_options: ModelOptions) -> None:
        self.options, self.stages = options, stages
        self.model = NeedleModel(model_options)
        numbers = [language.WORD_ID[word] for word in language.NUMBERS]
        generator = torch.Generator().manual_seed(options.seed)
        initialise(self.model, options.init, numbers=numbers, generator=generator)
        freeze_local(self.model)
        self.model.to(options.device)
        self.optimizers = make_optimizers(self.model, options.optimizer)
        self.corpus = Corpus(seed=options.seed)
        self.i_stage = self.i_step = self.n_steps_total = self.n_tokens = 0
        self.seconds = 0.0

    @property
    def checkpoint_path(self) -> Path:
        return self.options.out / "checkpoint.pt"

    def save(self) -> None:
        state = {name: getattr(self, name) for name in ("i_stage", "i_step", "n_steps_total", "n_tokens", "seconds")}
        state["model"] = self.model.state_dict()
        state["model_options"] = asdict(self.model.options)
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        partial = self.checkpoint_path.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.checkpoint_path)

    def load(self) -> None:
        state = torch.load(self.checkpoint_path, map_location=self.options.device, weights_only=True)
        self.model.load_state_dict(state.pop("model"))
        for optimizer, saved in zip(self.optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        state.pop("model_options")
        for name, value in state.items():
            setattr(self, name, value)

    def batch(self, stage: Stage) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, classes, answer numbers (n_batch, n_tokens + 1) and positions (n_batch, n_tokens).

        Depends on the seed and the number of the step alone, so that a resumed run sees what it would have seen.
        """
        n_batch, n_tokens = stage.shapes[self.i_step % len(stage.shapes)]
        rows, positions = [], []
        for i in range(n_batch):
            rng = random.Random(f"{self.options.seed} {stage.name} {self.i_step} {i}")
            row = self.corpus.sequence(rng, n_tokens=n_tokens, mix=stage.mix)
            rows.append(row)
            limit = max(stage.max_position, n_tokens)
            positions.append(skipped_positions(rng, row.tokens[:-1], max_position=limit))
        columns = [np.stack([getattr(row, name) for row in rows]) for name in ("tokens", "classes", "answers")]
        device = self.options.device
        tokens, classes, answers, places = (torch.from_numpy(c).to(device) for c in (*columns, np.stack(positions)))
        return tokens, classes, answers, places

    def step(self, stage: Stage, averages: Averages) -> None:
        tokens, classes, answers, positions = self.batch(stage)
        chosen = classes[:, 1:] != NO_LOSS
        bf16 = self.options.device != "cpu"
        with torch.autocast(self.options.device.split(":")[0], torch.bfloat16, enabled=bf16):
            logits = self.model.head(self.model.hidden(tokens[:, :-1], positions)[chosen])
        target, kind = tokens[:, 1:][chosen], classes[:, 1:][chosen]
        losses = F.cross_entropy(logits.float(), target, reduction="none")
        is_answer = kind > LANGUAGE
        loss = losses[is_answer].mean() + self.options.language_weight * losses[~is_answer].mean()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.optimizer.max_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        level_embeddings(self.model)
        self.n_tokens += tokens.numel()
        row = torch.arange(len(tokens), device=tokens.device)[:, None] * 1000 + answers[:, 1:]
        _average(averages, logits.detach().argmax(-1) == target, losses.detach(), kind, row[chosen])

    def set_lr(self, stage: Stage, progress: float) -> None:
        warm = min(1.0, (self.n_steps_total + 1) / self.options.n_warmup)
        first, last = stage.lr
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * warm * (first + (last - first) * progress)

    def run(self, log: TextIO) -> None:
        total = sum(stage.n_steps for stage in self.stages)
        minutes = self.options.minutes
        while self.i_stage < len(self.stages):
            stage = self.stages[self.i_stage]
            share = stage.n_steps / total
            self._run_stage(stage, log, None if minutes is None else 60 * minutes * share)
            self.i_stage, self.i_step = self.i_stage + 1, 0
            self.save()

    def _run_stage(self, stage: Stage, log: TextIO, seconds: float | None) -> None:
        averages = Averages()
        bar = tqdm(total=stage.n_steps, initial=self.i_step, desc=stage.name, mininterval=5)
        started = logged = time.monotonic()
        tokens_logged = self.n_tokens
        while True:
            spent = time.monotonic() - started
            progress = self.i_step / stage.n_steps if seconds is None else spent / seconds
            if progress >= 1:
                break
            self.set_lr(stage, progress)
            self.step(stage, averages)
            self.i_step += 1
            self.n_steps_total += 1
            bar.update()
            if self.i_step % self.options.n_log == 0:
                now = time.monotonic()
                self.seconds += now - logged
                rate = (self.n_tokens - tokens_logged) / (now - logged)
                logged, tokens_logged = now, self.n_tokens
                _say(
                    log,
                    f"{stage.name:9} step {self.i_step:4} tokens {self.n_tokens / 1e6:6.2f}M "
                    f"time {self.seconds:5.0f}s {rate:5.0f} tokens/s | {averages}",
                )
            if self.i_step % self.options.n_save == 0:
                self.save()
        bar.close()
        _say(log, f"end of stage {stage.name} after {self.i_step} steps: {averages}")


def _average(averages: Averages, hits: Tensor, losses: Tensor, kinds: Tensor, answers: Tensor) -> None:
    for kind, number in ANSWER_CLASS.items():
        mine = kinds == number
        if not mine.any():
            continue
        _, index = answers[mine].unique(return_inverse=True)
        exact = torch.ones(int(index.max()) + 1, device=hits.device)
        exact.scatter_reduce_(0, index, hits[mine].float(), "amin")
        averages.add(kind, loss=losses[mine].mean().item(), exact=exact.mean().item())


def _say(log: TextIO, line: str) -> None:
    tqdm.write(line)
    print(line, file=log, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/needle"), help="folder for checkpoints, log and GGUF files")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="divide this time among the stages instead of counting steps")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--install", action="store_true", help="copy the q8_0 file to pyheadkv/data/needle.gguf")
    names = [stage.name for stage in curriculum()]
    parser.add_argument("--until", choices=names, default=names[-1], help="last stage (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    return parser.parse_args()


def _finish(trainer: Trainer, log: TextIO, *, install: bool) -> None:
    """Measure importance, write both GGUF files, evaluate."""
    model, seed = trainer.model.eval(), trainer.options.seed
    importance = measure_importance(model, seed=20_000 + seed)
    table = np.array2string(100 * importance, precision=2, suppress_small=True, max_line_width=120)
    _say(log, f"importance in % of all (layer x query head):\n{table}")
    for name, kind in GGUF_TYPES.items():
        path = trainer.options.out / f"needle-{name}.gguf"
        write_gguf(model, path, kind=kind, importance=importance, source=f"scripts/train_needle_model.py --seed {seed}")
        _say(log, f"{path.name}: {path.stat().st_size} bytes")
    if install:
        shutil.copyfile(trainer.options.out / "needle-q8_0.gguf", REPOSITORY / "pyheadkv" / "data" / "needle.gguf")
    for line in accuracy_table(model, seed=10_000 + seed):
        _say(log, line)


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    options = TrainOptions(
        out=arguments.out,
        seed=arguments.seed,
        device=arguments.device,
        n_threads=arguments.threads,
        minutes=arguments.minutes,
        resume=arguments.resume,
    )
    shape = ModelOptions(n_vocab=language.N_TRAINED_TOKENS, n_layer=arguments.layers, n_head=arguments.heads, n_head_kv=arguments.kv_heads)
    stages = curriculum()
    n_stages = 1 + [stage.name for stage in stages].index(arguments.until)
    trainer = Trainer(options, stages[:n_stages], shape)
    if options.resume and trainer.checkpoint_path.exists():
        trainer.load()
    with (arguments.out / "train.log").open("a", encoding="utf-8") as log:
        n = sum(p.numel() for p in trainer.model.parameters())
        _say(log, f"seed {options.seed}, {options.device}, {options.n_threads} threads, torch {torch.__version__}, {n} parameters, {shape}")
        trainer.run(log)
        _finish(trainer, log, install=arguments.install)


if __name__ == "__main__":
    sys.exit(main())
