"""Where the importance of a model's heads comes from when none is given.

In this order: the metadata of the model, a score file beside it (``MODEL.importance.json``), the user's cache (what
``pyheadkv score`` writes when the folder of the model cannot be written), and the registry of the package, which has the
importance of some known models.

A model is recognised by what survives its quantisation: the shape, the tokenizer, and the weights of its norms, which
stay F32 in every GGUF.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .atomic_write import replace_file
from .gguf_copy import Field, write_fields
from .gguf_header import STRING, once_per_file, read_header
from .gguf_keys import importance_fields, read_importance
from .importance_values import Importance, check_importance, fit_heads
from .replay_values import ReplayTable, replay_fields
from .score_files import load_scores

T = TypeVar("T")
SIDECAR = ".importance.json"
IN_METADATA = "metadata of the model"  # an origin
REGISTRY = Path(__file__).resolve().parent / "data" / "importance"
N_SKETCH = 4  # values of each norm
SAME, RELATIVE = 1e-6, 0.1  # largest relative distance of two sketches


@dataclass(frozen=True)
class Fingerprint:
    """What identifies the weights of a model in any quantisation.

    Attributes
    ----------
    arch : general.architecture
    heads : (query heads, KV heads) of each layer
    facts : other numbers of the metadata that tell models of one shape apart, and the size of the vocabulary
    tokens : sha256 of the tokens of the vocabulary, hexadecimal
    norms : sha256 of the weights of all norms, hexadecimal
    sketch : some values of each norm, in the order of their names, float32
    """

    arch: str
    heads: tuple[tuple[int, int], ...]
    facts: dict[str, float]
    tokens: str
    norms: str
    sketch: NDArray[np.float32]

    @property
    def key(self) -> str:
        """Name of the model in the user's cache: 16 hexadecimal digits."""
        return hashlib.sha256(f"{self.arch} {self.heads} {self.tokens} {self.norms}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Found:
    """Importance and where it is from.

    Attributes
    ----------
    importance : the values
    origin : for people, such as "registry: SmolLM2-135M-Instruct"
    relative : measured on another model of the same family, not on these weights
    """

    importance: Importance
    origin: str
    relative: bool = False


FACTS = ("context_length", "embedding_length", "feed_forward_length", "rope.freq_base")


@once_per_file
def fingerprint(path: Path) -> Fingerprint:
    """Fingerprint of a GGUF; reads its header and its norms.

    Raises
    ------
    ValueError : the file is damaged, or does not say how many heads it has
    """
    header = read_header(path)
    heads = header.heads_by_layer()
    if heads is None:
        raise ValueError(f"{path}: {header.arch}.block_count or attention.head_count is missing")
    facts = {}
    for name in FACTS:
        value = header.value(f"{header.arch}.{name}")
        if isinstance(value, (int, float)):
            facts[name] = float(value)
    n_tokens, tokens = header.raw_strings("tokenizer.ggml.tokens")
    facts["n_tokens"] = float(n_tokens)
    sha, sketch = hashlib.sha256(), []
    for name, values in sorted(header.f32_vectors(suffix="norm.weight")):
        sha.update(name.encode() + b"\0" + values.tobytes())
        sketch.append(values[:: max(1, len(values) // N_SKETCH)][:N_SKETCH])
    return Fingerprint(
        arch=header.arch,
        heads=tuple(heads),
        facts=facts,
        tokens=hashlib.sha256(tokens).hexdigest(),
        norms=sha.hexdigest(),
        sketch=np.concatenate(sketch) if sketch else np.zeros(0, dtype=np.float32),
    )


def find_importance(model: str | os.PathLike[str]) -> Found | None:
    """Importance of a model for which none was given; None = nothing is known of it.

    Raises
    ------
    ValueError : what is there is damaged or of another model
    """
    path = Path(model)
    known = search(path, read_importance, (sidecar_path, cache_path), load_for)
    return find_registered(path) if known is None else Found(*known)


def search(
    model: Path, read: Callable[[Path], T | None], places: tuple[Callable[[Path], Path], ...], load: Callable[[Path, Path], T]
) -> tuple[T, str] | None:
    """What is measured of the heads of a model, and where it is from, but for the registry; None = nothing.

    Parameters
    ----------
    read : what its metadata have, None for nothing
    places : of a score file beside the model, and in the user's cache
    load : a score file for a model
    """
    stored = read(model)
    if stored is not None:
        return stored, IN_METADATA
    for place, what in zip([place_of(model) for place_of in places], ("beside the model", "user cache"), strict=True):
        if place.is_file():
            return load(place, model), f"{what}: {place}"
    return None


def check_measured_on(scores: Path, measured_on: str, model: Path, remedy: str) -> None:
    """The fingerprint of a score file is that of the model, or none; else ValueError."""
    if measured_on and measured_on != fingerprint(model).key:
        raise ValueError(
            f"{scores} was measured on a model with the fingerprint {measured_on}, {model} has {fingerprint(model).key}: {remedy}"
        )


def sidecar_path(model: str | os.PathLike[str]) -> Path:
    """Where the score file of a model stands: ``MODEL.importance.json`` beside ``MODEL.gguf``."""
    path = Path(model)
    return path.with_name(path.name.removesuffix(".gguf") + SIDECAR)


def cache_path(model: str | os.PathLike[str]) -> Path:
    """Where it stands when the folder of the model cannot be written; ``PYHEADKV_CACHE`` names another folder."""
    return cache_folder() / "importance" / f"{fingerprint(model).key}.json"


def cache_folder() -> Path:
    """Folder of the user's cache."""
    given = os.environ.get("PYHEADKV_CACHE")
    if given:
        return Path(given)
    from platformdirs import user_cache_path

    return user_cache_path("pyheadkv", appauthor=False)


def load_for(scores: Path, model: Path) -> Importance:
    """A score file for a model.

    Raises
    ------
    ValueError : it is damaged, or was measured on another model
    """
    found = load_scores(scores)
    remedy = "remove the file, measure again with 'pyheadkv score --force', or name it with importance="
    check_measured_on(scores, found.fingerprint, model, remedy)
    return replace(found, values=fit_heads(found.values, model))


# registry


def registered() -> list[Path]:
    """Files of the registry, in order of their names."""
    return sorted(REGISTRY.glob("*.json"))


def find_registered(model: str | os.PathLike[str]) -> Found | None:
    """What the registry has for a model: that of the same weights, else the nearest one that is related to it."""
    nearest = find_entry(model, "importance")
    if nearest is None:
        return None
    entry, origin, relative = nearest
    values = check_importance(entry["importance"], name=f"registry: {entry['name']}")
    found = Importance(values, method=entry["method"], source=entry["source"], arch=entry["arch"], beta=entry.get("beta"))
    return Found(found, origin, relative)


def find_entry(model: str | os.PathLike[str], member: str) -> tuple[dict[str, Any], str, bool] | None:
    """Of the entries that have a member, that of the same weights, else the nearest one that is related to a model.

    Returns
    -------
    the entry; its origin, for people; whether it is of other weights
    """
    mine = fingerprint(model)
    best: tuple[float, dict[str, Any]] | None = None
    for file in registered():
        entry = json.loads(file.read_text(encoding="utf-8"))
        distance = _distance(mine, entry) if member in entry else None
        if distance is not None and (best is None or distance < best[0]):
            best = distance, entry
    if best is None:
        return None
    distance, entry = best
    relative = distance > SAME
    origin = f"registry: {entry['name']}"
    if relative:
        origin += " (a relative of this model: the weights differ)" if entry["sketch"] else " (by shape: the weights were not compared)"
    return entry, origin, relative


def _distance(mine: Fingerprint, entry: dict[str, Any]) -> float | None:
    """Of the norms, relative; None = no relation."""
    if mine.arch != entry["arch"] or [list(h) for h in mine.heads] != entry["heads"] or mine.facts != entry["facts"]:
        return None
    if entry["tokens"] and mine.tokens != entry["tokens"]:
        return None
    if not entry["sketch"]:
        return RELATIVE
    other = np.asarray(entry["sketch"], dtype=np.float32)
    if other.shape != mine.sketch.shape or np.ptp(other) == 0:  # norms that are all one tell nothing
        return None
    distance = float(np.linalg.norm(mine.sketch - other) / np.linalg.norm(other))
    return distance if distance <= RELATIVE else None


def write_gguf(model: str | os.PathLike[str], importance: Importance | None, replay: ReplayTable | None = None) -> Path:
    """A GGUF in the user's cache that holds nothing but this importance and this table: what llama-server reads.

    Its name tells its content, so that a server that reads it again later finds what it found at its start.

    Raises
    ------
    ValueError : the cache cannot be written
    """
    mine = fingerprint(model)
    fields: list[Field] = [("general.architecture", STRING, None, mine.arch)]
    if importance is not None:
        fields += importance_fields(
            importance.values, arch=mine.arch, method=importance.method, source=importance.source, beta=importance.beta
        )
    if replay is not None:
        fields += replay_fields(replay, arch=mine.arch)
    content = io.BytesIO()
    write_fields(content, fields)
    path = cache_folder() / "importance" / f"{mine.key}-{hashlib.sha256(content.getvalue()).hexdigest()[:16]}.gguf"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda out: out.write(content.getvalue()))
    except OSError as error:
        raise ValueError(
            f"{path.parent}: {error.strerror}, and llama-server reads from there what is known of the model: set PYHEADKV_CACHE to a folder "
            "that can be written, or name a file with --kv-importance"
        ) from error
    return path


def registry_entry(
    model: str | os.PathLike[str], importance: Importance, *, name: str, source: str, replay: ReplayTable | None = None
) -> dict[str, Any]:
    """An entry of the registry, a JSON file in ``REGISTRY``."""
    mine = fingerprint(model)
    entry = {
        "name": name,
        "source": source,
        "method": importance.method,
        "beta": importance.beta,
        "arch": mine.arch,
        "heads": [list(h) for h in mine.heads],
        "facts": mine.facts,
        "tokens": mine.tokens,
        "sketch": [float(f"{x:.9g}") for x in mine.sketch],
        "importance": importance.values.tolist(),
    }
    if replay is not None:
        entry["replay"] = {"shares": replay.shares.tolist(), "values": replay.values.tolist(), "source": replay.source}
    return entry
