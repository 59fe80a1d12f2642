#!/usr/bin/env python3
"""Measure head importance with transformers, to check what pyheadkv score measures through llama.cpp.

    python scripts/score_hf.py CHECKPOINT -o hf.json --vocab MODEL.gguf --compare native.json
    python scripts/score_hf.py --from-gguf MODEL.gguf -o hf.json --compare native.json
    python scripts/score_hf.py --report OUT.md --pair hf.json native.json --pair ..

Examples, formulas and score file are those of pyheadkv score. The model is a Hugging Face checkpoint (a folder, or a
name on the hub), or a GGUF whose weights transformers dequantises. With the vocabulary of a GGUF (--vocab; implied by
--from-gguf) prompts are tokenised by llama.cpp and are those of pyheadkv score, else by the checkpoint's tokenizer.

Needs pip install '.[hf]'.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

try:
    import torch
    import transformers
except ImportError as error:
    raise SystemExit(f"error: {error}: install torch and transformers with pip install '.[hf]'") from None

from pyheadkv import Llama
from pyheadkv.atomic_write import replace_file
from pyheadkv.cli import score as score_command
from pyheadkv.eval import journal
from pyheadkv.eval.needle import speaks_needle_language
from pyheadkv.eval.report import table
from pyheadkv.gguf_header import read_header
from pyheadkv.options import check_int
from pyheadkv.score import measure as score
from pyheadkv.score.examples import METHODS, PROTOCOLS, Examples, make_examples

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
NATIVE_COMMAND = "pyheadkv score MODEL.gguf -o native.json --method M --threads 1"
HF_COMMAND = "python scripts/score_hf.py --from-gguf MODEL.gguf -o hf.json --method M --check-logits"
#: settings that two score files of a report share
SAME = ("method", "protocol", "answers", "n_examples", "max_tokens", "seed", "model_sha256")
COLUMNS = ("Pearson r", "top heads", "max difference", "same answers", "accepted native", "accepted HF", "logit NMSE")


class HFReader:
    """Reads examples with a causal language model of transformers.

    The prompt goes through ``sdpa`` in chunks into a cache, its last tokens and the generated ones through ``eager``: rows
    of attention are kept for ``score.MAX_ANSWER`` tokens.

    Parameters
    ----------
    n_chunk : tokens per step of a prompt

    Attributes
    ----------
    shape : (n_layer, n_head)
    heads : (query heads, KV heads) of each layer
    """

    def __init__(self, model: transformers.PreTrainedModel, *, n_chunk: int = 512) -> None:
        config = model.config.get_text_config(decoder=True)
        self.model, self.n_chunk = model, n_chunk
        self.shape = config.num_hidden_layers, config.num_attention_heads
        self.heads = [(self.shape[1], getattr(config, "num_key_value_heads", None) or self.shape[1])] * self.shape[0]

    def begin(self, tokens: Sequence[int]) -> None:
        # without a config every layer keeps all positions, those with a sliding window too
        self._cache = transformers.DynamicCache()
        self._rows: deque[torch.Tensor] = deque(maxlen=score.MAX_ANSWER)
        self.model.set_attn_implementation("sdpa")
        n = max(0, len(tokens) - score.MAX_ANSWER)
        for i in range(0, n, self.n_chunk):
            self._step(tokens[i : min(i + self.n_chunk, n)])
        self.model.set_attn_implementation("eager")
        self._look(tokens[n:])

    def append(self, token: int) -> None:
        self._look([token])

    def _look(self, tokens: Sequence[int]) -> None:
        """Read tokens and keep their rows of attention."""
        out = self._step(tokens, output_attentions=True)
        layers = [row for row in out.attentions or () if row is not None]
        if len(layers) != self.shape[0]:
            raise ValueError(
                f"{type(self.model).__name__} gives the attention of {len(layers)} of {self.shape[0]} layers: importance "
                "needs softmax attention in all of them, use another model"
            )
        rows = torch.stack([layer[0] for layer in layers]).float()  # (n_layer, n_head, n_tokens, n_kv)
        n_kv = rows.shape[-1]
        self._rows.extend(rows[:, :, i, : n_kv - len(tokens) + i + 1] for i in range(len(tokens)))
        self._logits = out.logits[0, -1].float()

    def attention(self, spans: Sequence[tuple[int, int]], n_top: int, n_queries: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        masses, tops = [], []
        for row in list(self._rows)[-n_queries:]:
            inside = torch.zeros(row.shape[-1], device=row.device)
            for start, end in spans:
                inside[start:end] = 1
            largest, order = row.sort(dim=-1, descending=True, stable=True)  # the first of equals wins
            masses.append((largest[..., :n_top] * inside[order[..., :n_top]]).sum(-1).cpu().numpy())
            tops.append(order[..., 0].to(torch.int32).cpu().numpy())
        return np.stack(masses), np.stack(tops)

    def greedy(self) -> int:
        return int(self._logits.argmax())

    @property
    def last_logits(self) -> NDArray[np.float32]:
        """Logits after the last token, (n_vocab,)."""
        logits: NDArray[np.float32] = self._logits.cpu().numpy()
        return logits

    @torch.inference_mode()
    def _step(self, tokens: Sequence[int], **options: Any) -> Any:
        ids = torch.tensor([list(tokens)], device=self.model.device)
        return self.model(ids, cache=self._cache, use_cache=True, logits_to_keep=1, **options)


class HFVocab:
    """Tokenizer of a checkpoint, with those functions of ``Llama`` that examples are made with."""

    def __init__(self, tokenizer: Any, *, n_vocab: int, ends: int | Sequence[int] | None = None) -> None:
        self._tokenizer, self._n_vocab = tokenizer, n_vocab
        self._model = self  # the text of a token is asked of it
        template = tokenizer.chat_template
        self.metadata = {"tokenizer.chat_template": template} if isinstance(template, str) else {}
        self._ends = {self.token_eos(), *([ends] if isinstance(ends, int) else ends or ())}
        self._adds_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        self._anchor = self.tokenize(b"x", add_bos=False)

    def n_vocab(self) -> int:
        return self._n_vocab

    def token_bos(self) -> int:
        return -1 if self._tokenizer.bos_token_id is None else int(self._tokenizer.bos_token_id)

    def token_eos(self) -> int:
        return -1 if self._tokenizer.eos_token_id is None else int(self._tokenizer.eos_token_id)

    def token_get_text(self, token: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(token) or ""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        ids = self._tokenizer.encode(text.decode(), add_special_tokens=False, split_special_tokens=not special)
        return [self.token_bos(), *ids] if add_bos and self._adds_bos else list(ids)

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> bytes:
        # decoded alone, some tokenizers drop the space of the first token
        before, text = (
            self._tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
            for ids in (self._anchor, [*self._anchor, *tokens])
        )
        return str(text[len(before) :]).encode()

    def is_end(self, token: int) -> bool:
        """Whether it ends a turn or a text."""
        return token in self._ends


class LlamaConfig(transformers.LlamaConfig):  # type: ignore[no-untyped-call]
    """Accepts a hidden_size that is no multiple of the heads: head_dim is given."""

    def validate_architecture(self) -> None:
        pass


def load_gguf(path: Path, *, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A GGUF as transformers reads it, dequantised."""
    header = read_header(path)
    scaling = [name for name in header.pairs if ".rope.scaling." in name]
    scaling += [tensor.name for tensor in header.tensors if tensor.name.startswith("rope_")]
    if scaling:
        raise ValueError(f"{path} has {scaling[0]}: transformers ignores how a GGUF scales its RoPE, give the checkpoint instead")
    is_llama = header.arch == "llama"
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    config = (LlamaConfig if is_llama else transformers.AutoConfig).from_pretrained(path.parent, **where)
    head_dim = header.value(f"{header.arch}.attention.key_length")
    if head_dim is not None:  # which transformers does not read for every architecture
        config.head_dim = int(head_dim)
    load = (transformers.LlamaForCausalLM if is_llama else transformers.AutoModelForCausalLM).from_pretrained
    return load(path.parent, config=config, dtype=dtype, **where)


def checkpoint_folder(name: str) -> Path:
    """Folder of a checkpoint, which is fetched if ``name`` is none."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(CHECKPOINT_FILES)))


def checksums(model: Path) -> dict[str, str]:
    """SHA-256 of the weights: of a GGUF, or of the files of a checkpoint."""
    files = [model] if model.is_file() else sorted([*model.glob("*.safetensors"), *model.glob("*.bin")])
    return {file.name: journal.sha256(file) for file in files}


def logits_error(reader: HFReader, path: Path, tokens: Sequence[int]) -> float:
    """Mean squared error of the logits after a prompt, relative to those of llama.cpp."""
    llm = Llama(path, n_ctx=len(tokens) + 8, n_batch=512, verbose=False)
    llm.eval(tokens)
    expected = llm.last_logits.astype(np.float64)
    llm.close()
    reader.begin(tokens)
    return float(np.mean((reader.last_logits - expected) ** 2) / np.mean(expected**2))


# comparison


def compare(found: dict[str, Any], native: dict[str, Any]) -> dict[str, str]:
    """How the contents of two score files agree: one text for each name in COLUMNS."""
    a, b = (np.asarray(content["importance"], dtype=np.float64) for content in (found, native))
    if a.shape != b.shape:
        raise ValueError(f"importance has shape {a.shape} and {b.shape}: compare files of one model")
    n_top = min(score_command.N_TOP_HEADS, int((a > 0).sum()), int((b > 0).sum()))
    best = [set(np.argsort(-values, axis=None, kind="stable")[:n_top].tolist()) for values in (a, b)]
    said = [{o["name"]: o["response"] for o in content["examples"]} for content in (found, native)]
    n_same = sum(said[1].get(name) == text for name, text in said[0].items())
    cells = (
        f"{np.corrcoef(a.ravel(), b.ravel())[0, 1]:.5f}",
        f"{len(best[0] & best[1])} of {n_top}",
        f"{np.abs(a - b).max():.2g}",
        f"{n_same} of {len(said[0])}",
        *(f"{content['accepted']} of {content['n_examples']}" for content in (native, found)),
        f"{found['logits_nmse']:.1e}" if "logits_nmse" in found else "",
    )
    return dict(zip(COLUMNS, cells, strict=True))


def differing(found: dict[str, Any], native: dict[str, Any]) -> str:
    """Names of the settings in SAME that two score files do not share."""
    return ", ".join(name for name in SAME if found[name] != native[name])


def read_scores(path: Path) -> dict[str, Any]:
    """Content of a score file of ``pyheadkv score`` or of this script."""
    content = json.loads(path.read_bytes())
    missing = {"importance", "examples", "accepted", *SAME} - set(content)
    if missing:
        raise ValueError(f"{path} has no {min(missing)}: give a file that pyheadkv score wrote")
    return dict(content)


def write_report(path: Path, pairs: Sequence[tuple[Path, Path]], *, note: str) -> None:
    """Table of pairs (HF, native) as Markdown, a note below it; each pair of the same weights and settings."""
    header, rows, versions = ["weights", "dtype", "protocol", "method", *COLUMNS], [], {}
    for paths in pairs:
        found, native = map(read_scores, paths)
        if differ := differing(found, native):
            raise ValueError(f"{paths[0]} and {paths[1]} differ in {differ}: a report compares like with like")
        about = Path(found["model"]).stem, found["engine"]["dtype"], found["protocol"], found["method"]
        rows.append([*about, *compare(found, native).values()])
        versions = found["versions"]
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = (
        "# Head importance through llama.cpp and with transformers",
        "",
        f"Native: `{NATIVE_COMMAND}`. HF: `{HF_COMMAND}`, the same weights dequantised. {made}.",
        "",
        "Pearson r and the largest difference are over all heads. Top heads: of the 10 best of each (of fewer if fewer",
        "score), those in both. Same answers: word for word. Logit NMSE: after the first prompt.",
        "",
        *table(header, rows),
        *(("", note) if note else ()),
        "",
    )
    replace_file(path, lambda file: file.write("\n".join(lines).encode()))


# a run


def make_vocab(args: argparse.Namespace, source: Path, model: transformers.PreTrainedModel) -> Any:
    """What prompts are tokenised with: llama.cpp, or the tokenizer of the checkpoint."""
    if path := args.vocab or args.from_gguf:
        return Llama(path, vocab_only=True, verbose=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    n_vocab = model.config.get_text_config(decoder=True).vocab_size
    return HFVocab(tokenizer, n_vocab=n_vocab, ends=model.generation_config.eos_token_id)


def measure(reader: HFReader, examples: Examples, *, method: str, answers: str) -> list[score.Outcome]:
    """Score all examples, with a progress bar."""
    outcomes: list[score.Outcome] = []
    with tqdm(examples.slots, desc="scoring", unit=" examples", leave=False, disable=None) as bar:
        for slot in bar:
            outcomes.append(score.measure_one(reader, examples, slot, method=method, answers=answers))
            bar.set_postfix_str(f"{sum(o.accepted for o in outcomes)} of {len(outcomes)} count", refresh=False)
    return outcomes


def run(args: argparse.Namespace) -> None:
    """Measure, write the score file, report and compare."""
    if args.output.exists() and not args.force:
        raise ValueError(f"output {args.output} exists: pass --force to replace it, or choose another name")
    if not args.output.parent.is_dir():
        raise ValueError(f"output {args.output} is in a folder that does not exist: choose an existing one")
    natives = [(path, read_scores(path)) for path in args.compare]
    source = args.from_gguf or checkpoint_folder(args.model)
    dtype, n_chunk = DTYPES[args.dtype], check_int("--n-chunk", args.n_chunk, 1, 1 << 20)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load_gguf(source, dtype=dtype) if args.from_gguf else load(source, dtype=dtype, local_files_only=True)
    reader = HFReader(model.to(args.device), n_chunk=n_chunk)
    vocab = make_vocab(args, source, model)
    n_ctx_train = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 0)
    answers = score_command.choose_answers(args)
    max_tokens = score_command.choose_max_tokens(args, n_ctx_train=n_ctx_train)
    if args.max_tokens is None and speaks_needle_language(vocab):
        max_tokens = score_command.CORPUS_MAX_TOKENS
    if args.examples is not None:
        check_int("--examples", args.examples, 1, 1 << 20)
    options = {"method": args.method, "protocol": args.protocol, "max_tokens": max_tokens, "seed": args.seed}
    examples = make_examples(vocab, n_examples=args.examples, **options)
    if isinstance(vocab, HFVocab):
        examples.is_end = vocab.is_end  # type: ignore[method-assign]
    sums = checksums(source)
    sha256 = sums[source.name] if args.from_gguf else hashlib.sha256("".join(sums.values()).encode()).hexdigest()
    engine = {"n_threads": torch.get_num_threads(), "n_chunk": n_chunk, "dtype": args.dtype, "device": args.device}
    settings = score.Settings(
        answers=answers,
        n_examples=len(examples.slots),
        until=0.0,
        model_sha256=sha256,
        fingerprint="",
        engine=engine,
        versions={**score.versions(), "torch": torch.__version__, "transformers": transformers.__version__},
        **options,
    )
    begin = time.perf_counter()
    outcomes = measure(reader, examples, method=args.method, answers=answers)
    seconds = time.perf_counter() - begin
    content = score.result(settings, outcomes, score.check_reliable(outcomes, reader.heads))
    content |= {"model": Path(args.model or source).name, "model_files": sums}
    if args.check_logits:
        content["logits_nmse"] = logits_error(reader, source, examples.make(examples.slots[0]).tokens)
    score.write_json(args.output, content)
    print(score_command.report(content, reader.heads, n_read=sum(o.n_tokens for o in outcomes), seconds=seconds))
    for path, native in natives:
        agreement = ", ".join(f"{name} {cell}" for name, cell in compare(content, native).items() if cell)
        print(f"{path.name}: {agreement}; settings that differ: {differing(content, native) or 'none'}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="CHECKPOINT", help="folder of a checkpoint, or its name on the hub")
    parser.add_argument("--from-gguf", type=Path, metavar="MODEL.gguf", help="a GGUF instead, dequantised")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="score file to write")
    parser.add_argument("--vocab", type=Path, metavar="MODEL.gguf", help="tokenise with its vocabulary")
    parser.add_argument("--method", choices=METHODS, default="r2", help="(default: %(default)s)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="clean", help="(default: %(default)s)")
    parser.add_argument("--answers", choices=score.ANSWERS, help="(default: as pyheadkv score)")
    parser.add_argument("--examples", type=int, metavar="N", help="of protocol clean (default: 60)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest prompt (default: as pyheadkv score)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the haystacks (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of torch: cpu, cuda, mps (default: %(default)s)")
    parser.add_argument("--n-chunk", type=int, default=512, metavar="N", help="tokens per step (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument("--check-logits", action="store_true", help="also compare logits with llama.cpp")
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="NATIVE", help="files of pyheadkv score")
    parser.add_argument("--report", type=Path, metavar="OUT.md", help="only write a table of pairs")
    parser.add_argument("--pair", type=Path, nargs=2, action="append", metavar=("HF", "NATIVE"), help="row of it")
    parser.add_argument("--note", default="", metavar="TEXT", help="what stands below it")
    args = parser.parse_args(argv)
    if args.report is not None:
        if not args.pair:
            parser.error("--report needs at least one --pair")
    elif (args.model is None) == (args.from_gguf is None) or args.output is None:
        parser.error("give -o and either CHECKPOINT or --from-gguf")
    if args.check_logits and args.from_gguf is None:
        parser.error("--check-logits needs --from-gguf, which llama.cpp reads too")
    return args


def exit_code(command: Callable[[], None]) -> int:
    """0 done, 1 refused with one line on stderr, 130 interrupted."""
    try:
        command()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    """As ``exit_code`` says."""
    args = parse_args(argv)
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return exit_code(lambda: run(args) if args.report is None else write_report(args.report, args.pair, note=args.note))


if __name__ == "__main__":
    sys.exit(main())
