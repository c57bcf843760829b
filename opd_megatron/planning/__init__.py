"""Estimates memory, traffic and time of a run from `config.json`, and proves that its shards cover every weight.

`report.make_plan` is the way in. Memory has one formula (`memory`), which `train --dry-run` and `plan` share and
benchmarks/memory_plan.py compares with the resident memory of real runs.
"""
