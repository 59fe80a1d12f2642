"""Add the measured importance of a model to the registry of the package.

pyheadkv score MODEL.gguf -o scores.json
python scripts/add_to_registry.py MODEL.gguf scores.json NAME "who made the model, its licence"
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from pyheadkv import importance
from pyheadkv.score.measure import write_json
from pyheadkv.score_files import load_scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("scores", type=Path, metavar="SCORES.json", help="of pyheadkv score")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("source", metavar="SOURCE", help="who made the model, and its licence")
    args = parser.parse_args()
    made = json.loads(args.scores.read_text(encoding="utf-8"))
    found = load_scores(args.scores)
    rounded = [[float(f"{x:.6g}") for x in row] for row in found.values]
    how = f"{made['accepted']} examples up to {made['max_tokens']} tokens, reliability {made['reliability']}"
    source = f"{args.source}; measured by pyheadkv score, {how}, on the file with sha256 {made['model_sha256']}"
    entry = importance.registry_entry(args.model, replace(found, values=np.array(rounded)), name=args.name, source=source)
    write_json(importance.REGISTRY / f"{args.name}.json", entry)


if __name__ == "__main__":
    main()
