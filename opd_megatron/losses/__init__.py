"""Exact full-vocabulary divergences under tensor parallelism. Pure torch and an explicit process group."""

from opd_megatron.losses.linear import DivergenceTerms, linear_divergence, linear_divergence_terms
from opd_megatron.losses.policy import PolicyTerm
from opd_megatron.losses.topk import TopKTeacher
from opd_megatron.losses.vocab_parallel import vocab_parallel_divergence

__all__ = [
    "DivergenceTerms",
    "PolicyTerm",
    "TopKTeacher",
    "linear_divergence",
    "linear_divergence_terms",
    "vocab_parallel_divergence",
]
