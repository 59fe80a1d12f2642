"""Tell whether the patches still fit another llama.cpp tree, such as today's, and which of their places moved.

    python patches/canary.py path/to/llama.cpp

Nothing is changed. Every hunk is looked for by its lines of context:

fits    at the line that the patch names
moved   the same lines, elsewhere in the file
gone    nowhere; the nearest lines of the file are shown, which is where to look

Exits with 1 when a hunk is gone: then the patch has to be made anew against that tree.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from apply import series


@dataclass(frozen=True)
class Hunk:
    """A place that a patch changes.

    Attributes
    ----------
    file : of the tree
    line : first line of the context in the pinned tree, from 1
    before : lines of the context, and those that the patch removes
    """

    patch: str
    file: str
    line: int
    before: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """Where the context of a hunk is in another tree; ``lines`` are the nearest ones when it is gone."""

    hunk: Hunk
    state: str  # fits, moved, gone
    line: int = 0
    lines: tuple[str, ...] = ()

    def text(self) -> str:
        """For people."""
        where = f"{self.hunk.file}:{self.hunk.line}"
        if self.state == "moved":
            return f"moved  {where} -> line {self.line}  ({self.hunk.patch})"
        if self.state == "fits":
            return f"fits   {where}  ({self.hunk.patch})"
        near = "\n".join(f"         {line}" for line in self.lines) or "         (nothing like it)"
        return f"gone   {where}  ({self.hunk.patch}); nearest, at line {self.line}:\n{near}"


def hunks(patch: Path) -> Iterator[Hunk]:
    """The hunks of a patch, in order."""
    file, line, n_left, before = "", 0, 0, []  # type: ignore[var-annotated]
    for text in patch.read_text(encoding="utf-8").splitlines():
        if text.startswith("+++ b/"):
            file = text[6:]
        elif match := re.match(r"@@ -(\d+)(?:,(\d+))? \+", text):
            line, n_left, before = int(match[1]), int(match[2] or 1), []
        elif n_left and text[:1] in (" ", "-", ""):
            before.append(text[1:])
            n_left -= 1
            if n_left == 0:
                yield Hunk(patch.name, file, line, tuple(before))


def find(hunk: Hunk, lines: Sequence[str]) -> Finding:
    """The hunk in the lines of its file; of several places the one nearest to where it was."""
    n = len(hunk.before)
    places = [i + 1 for i in range(len(lines) - n + 1) if tuple(lines[i : i + n]) == hunk.before]
    if places:
        line = min(places, key=lambda place: abs(place - hunk.line))
        return Finding(hunk, "fits" if line == hunk.line else "moved", line)
    known = {line for line in hunk.before if len(line.strip()) > 3}
    best, best_line = 0.0, 0
    for i in sorted({j - k for j, line in enumerate(lines) if line in known for k in range(n) if 0 <= j - k <= len(lines) - n}):
        ratio = difflib.SequenceMatcher(None, lines[i : i + n], hunk.before, autojunk=False).ratio()
        if ratio > best:
            best, best_line = ratio, i + 1
    return Finding(hunk, "gone", best_line, tuple(lines[best_line - 1 : best_line - 1 + n]) if best_line else ())


def look(tree: Path) -> list[Finding]:
    """Findings for every hunk of the series.

    Raises
    ------
    SystemExit : the folder is no llama.cpp
    """
    if not (tree / "src" / "llama-model.cpp").is_file():
        raise SystemExit(f"{tree}: no llama.cpp is there (src/llama-model.cpp is missing): name the folder of a checkout")
    found = []
    for patch in series():
        for hunk in hunks(patch):
            path = tree / hunk.file
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
            found.append(find(hunk, lines))
    return found


def main() -> int:
    """Print a line for each hunk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, metavar="LLAMA.CPP", help="folder of the other tree")
    found = look(parser.parse_args().tree)
    for finding in found:
        print(finding.text())
    counts = {state: sum(f.state == state for f in found) for state in ("fits", "moved", "gone")}
    print(", ".join(f"{n} {state}" for state, n in counts.items()))
    return int(counts["gone"] > 0)


if __name__ == "__main__":
    sys.exit(main())
