"""What follows from a model's config.json alone, before a process group or a weight exists.

rules.py    which layouts it can have; where the models of a run lie
sizes.py    parameters, layers and tokens that memory, traffic and time are worked out from
"""

from opd_megatron.models.rules import ResolvedModels, check_divisible, resolve_models

__all__ = ["ResolvedModels", "check_divisible", "resolve_models"]
