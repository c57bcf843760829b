"""How many answers are right.

accuracy.py    answers held-out prompts with the rollout engine and has them judged
intervals.py   what follows from scores: accuracy, avg@k, pass@k, each with a 95% interval
result.py      an evaluation as a table, and as JSON
"""

from opd_megatron.evaluation.accuracy import AccuracyEvaluator
from opd_megatron.evaluation.result import Accuracy, comparison, from_json, to_json

__all__ = ["Accuracy", "AccuracyEvaluator", "comparison", "from_json", "to_json"]
