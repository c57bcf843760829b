"""Exact full-vocabulary divergences under tensor parallelism: pure torch and an explicit process group.

objectives        what `objective.type` can be: the terms of the loss, their keys and metrics; needs no torch
divergences       value and gradient of each divergence, one vocabulary entry at a time
linear            the divergence from hidden states and LM heads, chunk by chunk, with every metric of a step
vocab_parallel    the same from logits that are already there
policy            policy-gradient terms on the sampled tokens
topk              teachers that give only their k best log-probabilities
shared            teachers of another vocabulary
verl_style        the same under verl's names: `compute_on_policy_distillation_loss`
reduction         from per-token terms to a step's means over all ranks
reference         all of it written densely from the formulae: read this first

core/ is behind `linear` and `vocab_parallel`; kernels/ are its passes over the vocabulary, one folder a backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd_megatron.losses.linear import DivergenceTerms, linear_divergence, linear_divergence_terms
    from opd_megatron.losses.policy import PolicyTerm
    from opd_megatron.losses.shared import SharedTeacher
    from opd_megatron.losses.topk import TopKTeacher
    from opd_megatron.losses.verl_style import (
        compute_forward_kl_loss,
        compute_generalized_jsd_loss,
        compute_hybrid_rl_distillation_loss,
        compute_on_policy_distillation_loss,
        compute_reverse_kl_loss,
    )
    from opd_megatron.losses.vocab_parallel import vocab_parallel_divergence

__all__ = [
    "DivergenceTerms",
    "PolicyTerm",
    "SharedTeacher",
    "TopKTeacher",
    "compute_forward_kl_loss",
    "compute_generalized_jsd_loss",
    "compute_hybrid_rl_distillation_loss",
    "compute_on_policy_distillation_loss",
    "compute_reverse_kl_loss",
    "linear_divergence",
    "linear_divergence_terms",
    "vocab_parallel_divergence",
]

_MODULES = {
    "DivergenceTerms": "linear",
    "PolicyTerm": "policy",
    "SharedTeacher": "shared",
    "TopKTeacher": "topk",
    **dict.fromkeys(
        (
            "compute_forward_kl_loss",
            "compute_generalized_jsd_loss",
            "compute_hybrid_rl_distillation_loss",
            "compute_on_policy_distillation_loss",
            "compute_reverse_kl_loss",
        ),
        "verl_style",
    ),
    "linear_divergence": "linear",
    "linear_divergence_terms": "linear",
    "vocab_parallel_divergence": "vocab_parallel",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562): the command line reads `objectives` without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
