"""Transformer Engine: whether its layers can be used here, what of it is switched on, and what FP8 asks of a machine.

FP8 has two stages. Products in FP8 of bf16 weights change nothing but the arithmetic of a layer: weights are loaded,
exported and saved as ever. With `precision.param` the weights themselves are FP8 tensors, which are filled and read
through `weights.quantized`; what they are made from are the optimizer's fp32 main weights.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from opd_megatron.config import PrecisionConfig, RunConfig
from opd_megatron.errors import ConfigError, one_line
from opd_megatron.mcore.cpu.platform import has_gpu
from opd_megatron.models.gpus import FP8_CAPABILITY

_REMEDY = "`make env EXTRAS=vllm,te,dev` installs it on a machine with CUDA"


@functools.cache
def why_missing() -> str | None:
    """Says why Transformer Engine cannot be used; None where it can. That it is installed is not enough: where it fails
    to import, Megatron-Core goes on with stand-ins that build nothing."""
    from megatron.core.extensions import transformer_engine as extension

    if extension.HAVE_TE:
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "transformer_engine":
            return "it is not installed"
        return f"it is installed, but fails to import ({one_line(error)})"
    except Exception as error:
        return f"it is installed, but fails to import ({one_line(error)})"
    return "this Megatron-Core cannot use the version that is installed"


def use_transformer_engine(choice: str) -> bool:
    """Decides whether `student.transformer_engine=choice` means Transformer Engine layers on this machine.

    Raises ConfigError where it is asked for and cannot be used.
    """
    if choice == "on" and (reason := why_missing()) is not None:
        raise ConfigError(
            f"student.transformer_engine=on needs Transformer Engine, and {reason}: {_REMEDY}, or set it to off"
        )
    return choice == "on" or (choice == "auto" and has_gpu() and why_missing() is None)


def notes(choice: str) -> list[str]:
    """What to tell of a Transformer Engine that `auto` passes over though it is installed."""
    reason = why_missing() if choice == "auto" and has_gpu() else None
    if reason is None or "not installed" in reason:
        return []
    return [f"warning: Transformer Engine is not used: {reason}; student.transformer_engine=off leaves it be"]


def capability() -> tuple[int, int] | None:
    """Compute capability of this rank's GPU; None without one."""
    return torch.cuda.get_device_capability() if has_gpu() else None


def check_machine(config: RunConfig) -> None:
    """Raises ConfigError unless this machine has what the configuration asks of it."""
    found = capability()
    for key, precision, _ in config.precisions():
        if precision.fp8 is None:
            continue
        asked = f"{key}precision.fp8={precision.fp8}"
        if found is None:
            raise ConfigError(f"{asked} needs a GPU, and torch sees none: leave {key}precision out")
        reason = why_missing()
        if reason is not None:
            raise ConfigError(f"{asked} needs Transformer Engine, and {reason}: {_REMEDY}")
        least = FP8_CAPABILITY[precision.recipe]
        if found < least:
            others = [name for name, need in FP8_CAPABILITY.items() if found >= need]
            raise ConfigError(
                f"{key}precision.recipe={precision.recipe} needs a GPU of compute capability {_dotted(least)}, this "
                f"one has {_dotted(found)}: " + (f"set it to {others[0]}" if others else f"leave {key}precision out")
            )
    if config.rollout.quantization is not None and found is None and config.uses_engine:
        raise ConfigError(
            f"rollout.quantization={config.rollout.quantization} needs a GPU, and torch sees none: leave it out"
        )
    use_transformer_engine(config.student.transformer_engine)
    if config.student.offload_activations and (found is None or why_missing() is not None):
        raise ConfigError(
            f"student.offload_activations={config.student.offload_activations} needs a GPU and layers of Transformer "
            "Engine: leave it out"
        )
    of_layers = sorted({"layernorm", "moe_act"} & {*config.student.recompute_modules})
    if of_layers and not use_transformer_engine(config.student.transformer_engine):
        raise ConfigError(
            f"student.recompute_modules with {of_layers[0]} needs layers of Transformer Engine: leave it out"
        )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def fused_arguments(*, experts: bool) -> dict[str, Any]:
    """Fields of the `TransformerConfig` of Transformer Engine layers: its kernels for what is between their products,
    as far as this build has them."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils

    rotary = (rope_utils.fused_apply_rotary_pos_emb, rope_utils.fused_apply_rotary_pos_emb_thd)
    permute = getattr(moe_utils, "fused_permute_with_probs", None)
    return {
        "apply_rope_fusion": all(kernel is not None for kernel in rotary),
        "bias_activation_fusion": True,  # SwiGLU in one kernel; there is no bias
        **({"moe_permute_fusion": permute is not None} if experts else {}),
    }


def fuse_weight_gradients(model: torch.nn.Module) -> None:
    """Has Transformer Engine's linear layers add weight gradients to the fp32 main gradients themselves, rather than
    round them to bf16 first. Megatron's switch for it would refuse the head without Apex, which is never called."""
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            setattr(module, "fuse_wgrad_accumulation", True)  # noqa: B010  to nn.Module it is no attribute


def fp8_arguments(precision: PrecisionConfig, *, experts: bool) -> dict[str, Any]:
    """Fields of the `TransformerConfig` of a model with that precision."""
    if precision.fp8 is None:
        return {}
    ends = precision.first_last_bf16
    return {
        "fp8": precision.fp8,
        "fp8_recipe": precision.recipe,
        "fp8_param": precision.param,
        "first_last_layers_bf16": ends > 0,
        "num_layers_at_start_in_bf16": ends,
        "num_layers_at_end_in_bf16": ends,
        # Numbers of tokens that experts get are as they fall: rows of zeros make them multiples.
        **({"moe_router_padding_for_quantization": True} if experts else {}),
    }
