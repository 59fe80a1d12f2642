"""Importance of the heads: examples, the formulas that attention is scored by, and the choice of beta (``pyheadkv score``)."""
