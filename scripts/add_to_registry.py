"""Add the measured importance of a model to the registry of the package, or its replay table to the importance that is there.

pyheadkv score MODEL.gguf -o scores.json
python scripts/add_to_registry.py MODEL.gguf scores.json NAME "who made the model, its licence"
pyheadkv score MODEL.gguf --method replay -o replay.json
python scripts/add_to_registry.py MODEL.gguf replay.json NAME
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyheadkv import importance
from pyheadkv.gguf_header import read_header
from pyheadkv.replay_values import check_model_replay, check_replay, load_replay
from pyheadkv.score.measure import write_json
from pyheadkv.score_files import load_scores


def with_replay(args: argparse.Namespace, file: Path, made: dict[str, Any]) -> dict[str, Any]:
    """The entry of these weights, with the table."""
    entry: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    found = importance.find_registered(args.model)
    if found is None or found.relative or found.origin != f"registry: {args.name}":
        raise SystemExit(f"{file} is not the importance of {args.model}: add that first")
    table = load_replay(args.scores)
    shares, values = check_replay(table.shares, np.round(table.values, 5), name=str(args.scores))
    check_model_replay(read_header(args.model), replace(table, shares=shares, values=values))
    entry["replay"] = {
        "shares": shares.tolist(),
        "values": values.tolist(),
        "source": f"{table.source}, reliability {min(made['reliability'])} to {max(made['reliability'])}",
    }
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("scores", type=Path, metavar="SCORES.json", help="of pyheadkv score")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="who made the model, and its licence; not for a replay table")
    args = parser.parse_args()
    made = json.loads(args.scores.read_text(encoding="utf-8"))
    file = importance.REGISTRY / f"{args.name}.json"
    if (args.source is None) != ("importance" not in made):
        parser.error("SOURCE belongs to an importance, a replay table has its own")
    if "importance" not in made:
        write_json(file, with_replay(args, file, made))
        return
    found = load_scores(args.scores)
    rounded = [[float(f"{x:.6g}") for x in row] for row in found.values]
    how = f"{made['accepted']} examples up to {made['max_tokens']} tokens, reliability {made['reliability']}"
    source = f"{args.source}; measured by pyheadkv score, {how}, on the file with sha256 {made['model_sha256']}"
    entry = importance.registry_entry(args.model, replace(found, values=np.array(rounded)), name=args.name, source=source)
    write_json(file, entry)


if __name__ == "__main__":
    main()
