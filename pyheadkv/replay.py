"""Where the replay table of a model comes from: the same places as its importance (``pyheadkv.importance``).

In this order: the metadata of the model, ``MODEL.replay.json`` beside it, the user's cache, and the registry of the package.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short_repr

from .gguf_header import read_header
from .importance import cache_folder, check_measured_on, find_entry, fingerprint, search
from .replay_values import ReplayTable, check_model_replay, check_replay, load_replay, read_replay, replay_of

SIDECAR = ".replay.json"


@dataclass(frozen=True)
class FoundReplay:
    """A table and where it is from.

    Attributes
    ----------
    table : the values
    origin : for people, such as "registry: SmolLM2-135M-Instruct"
    relative : measured on another model of the same family, not on these weights
    """

    table: ReplayTable
    origin: str
    relative: bool = False


def find_replay(model: str | os.PathLike[str]) -> FoundReplay | None:
    """Table of a model for which none was given; None = nothing is known of it.

    Raises
    ------
    ValueError : what is there is damaged or of another model
    """
    path = Path(model)
    known = search(path, read_replay, (sidecar_path, cache_path), load_for)
    if known is not None:
        return FoundReplay(*known)
    found = find_entry(path, "replay")
    if found is None:
        return None
    entry, origin, relative = found
    table = replay_of(entry["replay"], name=f"registry: {entry['name']}")
    check_model_replay(read_header(path), table)
    return FoundReplay(table, origin, relative)


def sidecar_path(model: str | os.PathLike[str]) -> Path:
    """Where the table of a model stands: ``MODEL.replay.json`` beside ``MODEL.gguf``."""
    path = Path(model)
    return path.with_name(path.name.removesuffix(".gguf") + SIDECAR)


def cache_path(model: str | os.PathLike[str]) -> Path:
    """Where it stands when the folder of the model cannot be written; ``PYHEADKV_CACHE`` names another folder."""
    return cache_folder() / "replay" / f"{fingerprint(Path(model)).key}.json"


def load_for(scores: Path, model: Path) -> ReplayTable:
    """A file with a table, for a model.

    Raises
    ------
    ValueError : it is damaged, or was measured on another model
    """
    table = load_replay(scores)
    check_measured_on(scores, table.fingerprint, model, "remove the file, or measure again with 'pyheadkv score --method replay --force'")
    check_model_replay(read_header(model), table)
    return replace(table, source=table.source or str(scores.name))


ReplayLike = str | os.PathLike[str] | ReplayTable | None


def replay_for(source: str | os.PathLike[str] | ReplayTable, model: str | os.PathLike[str]) -> ReplayTable:
    """A table that was named for a model: itself, or a path of a score file or a GGUF that has one.

    Raises
    ------
    ValueError : there is no such file or no table in it, it is none, or it does not fit the model
    """
    if isinstance(source, ReplayTable):
        shares, values = check_replay(source.shares, source.values, name="replay")
        table = replace(source, shares=shares, values=values)
    elif not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"replay={short_repr(source)}: it must be a path or a ReplayTable")
    else:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"replay={str(source)!r}: no such file")
        found = load_replay(path) if path.suffix.lower() == ".json" else read_replay(path)
        if found is None:
            raise ValueError(f"replay={str(source)!r}: the file has no replay table")
        table = found
    check_model_replay(read_header(model), table)
    return table


def known_table(model: str | os.PathLike[str], source: str | os.PathLike[str] | None = None) -> ReplayTable | None:
    """The table that was named for a model, or else what is found for it; None = nothing is known of it.

    Raises
    ------
    ValueError : as ``replay_for`` and ``find_replay``
    """
    if source is not None:
        return replay_for(source, model)
    found = find_replay(model)
    return None if found is None else found.table
