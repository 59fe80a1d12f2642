"""Evaluation: tasks, settings of the cache, answers, their grades and the report of a run (``pyheadkv eval``)."""
