"""What tests and benchmarks need: random models and the NumPy definition of the engine (``pyheadkv.testing.reference``)."""

from .random_model import random_importance, write_random_lora, write_random_model

__all__ = ["random_importance", "write_random_lora", "write_random_model"]
