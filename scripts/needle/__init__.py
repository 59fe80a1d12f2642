"""Parts of ``scripts/train_needle_model.py``: corpus, model, optimizer, importance, GGUF export.

`language` is ``pyheadkv/eval/needle.py``, loaded from its file: training needs neither llama.cpp nor an installed
package.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).resolve().parents[2]

if TYPE_CHECKING:
    from pyheadkv.eval import needle as language
else:
    _spec = importlib.util.spec_from_file_location("pyheadkv_needle_language", REPOSITORY / "pyheadkv" / "eval" / "needle.py")
    language = importlib.util.module_from_spec(_spec)
    sys.modules[_spec.name] = language  # dataclasses look their module up by name
    _spec.loader.exec_module(language)

__all__ = ["REPOSITORY", "language"]
