"""Will it fit, and what will it move? Answers by arithmetic on `config.json`, and by shards that hold no numbers.

`report.make_plan` is the way in. Memory has one formula (`memory`), which `train --dry-run` and `plan` share and
benchmarks/memory_plan.py compares with the resident memory of real runs.
"""
