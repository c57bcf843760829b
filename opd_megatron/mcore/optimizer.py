"""Megatron's distributed optimizer and learning-rate schedule, set up from the run configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from opd_megatron.config import OptimizerConfig, PrecisionConfig
from opd_megatron.mcore.cpu.platform import has_gpu
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import HiddenStatesModel

MOMENTS = ("exp_avg", "exp_avg_sq")


def wrap_ddp(
    model: HiddenStatesModel, grid: ParallelGrid, *, overlap: bool | None = None, bucket_size: int | None = None,
    first: bool = True, precision: PrecisionConfig | None = None,
) -> DistributedDataParallel:  # fmt: skip
    """Wraps a chunk of the model so that gradients are summed in fp32 buffers, which the distributed optimizer shards.

    Args:
        overlap: sum them while the backward pass goes on; by default where there is a GPU to do both.
        bucket_size: parameters that are summed at once then.
        first: whether it is the first chunk of its stage. Its gradients are the last to come; those of the others are
            summed behind later backward passes, whole.
    """
    ddp = DistributedDataParallel(
        config=get_model_config(model),
        ddp_config=DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=has_gpu() if overlap is None else overlap,
            bucket_size=bucket_size,
            fp8_param_gather=precision is not None and precision.param,
            # MXFP8 tensors have two layouts, of which only one is gathered.
            reuse_grad_buf_for_mxfp8_param_ag=precision is not None and precision.param and precision.recipe == "mxfp8",
        ),
        module=model,
        disable_bucketing=not first,
        pg_collection=grid.groups,
    )
    _count_padding(ddp)
    return ddp


def _count_padding(ddp: DistributedDataParallel) -> None:
    """Lets checkpoints of the optimizer find every parameter's state where it lies in its buffer.

    Megatron saves buckets without the padding at their ends but indexes with it, so parameters behind a padded bucket
    (a tied embedding has one of its own under pipeline parallelism) come back shifted. We count padding as content,
    which makes the positions agree; it is not saved.
    """
    for buffer in ddp.buffers + ddp.expert_parallel_buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def build_optimizer(
    config: OptimizerConfig, chunks: list[DistributedDataParallel], grid: ParallelGrid,
    precision: PrecisionConfig | None = None,
) -> ChainedOptimizer:  # fmt: skip
    """Builds AdamW over fp32 main weights, with its state sharded over data-parallel ranks."""
    model_config = get_model_config(chunks[0])
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=model_config.bf16,
            params_dtype=model_config.params_dtype,
            use_distributed_optimizer=True,
            **_fp8(precision or PrecisionConfig()),
        ),
        chunks,
        use_gloo_process_groups=False,
        pg_collection=grid.groups,
    )
    _use_fused_kernel(optimizer)
    return optimizer


def _fp8(precision: PrecisionConfig) -> dict[str, Any]:
    if precision.fp8 is None:
        return {}
    reuse = precision.param and precision.recipe == "mxfp8"
    return {"fp8_recipe": precision.recipe, "reuse_grad_buf_for_mxfp8_param_ag": reuse}


def build_scheduler(config: OptimizerConfig, optimizer: ChainedOptimizer, steps: int) -> OptimizerParamScheduler:
    """Builds the schedule: linear warm-up, then decay to `min_lr` just after the last step.

    Call `step(1)` before each optimizer step, so that the first update already has a learning rate above 0.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=steps + 1,
        lr_decay_style=config.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,  # the step count alone places a resumed run on its schedule
    )


def clip_and_step(optimizer: ChainedOptimizer, grad_norm: float) -> None:
    """Scales prepared gradients to `clip_grad` if their norm is above it, and updates the weights.

    The second half of upstream's `step`, which would compute the norm that the caller has checked once more.
    """
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if part.config.clip_grad > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()


def make_optimizer_state(optimizer: ChainedOptimizer) -> None:
    """Creates every parameter's moments, which are 0, and counts of updates: one update at learning rate 0."""
    for part in optimizer.chained_optimizers:
        groups = part.optimizer.param_groups
        kept = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            group["lr"], group["weight_decay"] = 0.0, 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        part.optimizer.step()
        part.optimizer.zero_grad(set_to_none=True)
        for group, (lr, weight_decay) in zip(groups, kept, strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay
        for state in part.optimizer.state.values():
            for name in MOMENTS:
                state[name].zero_()
    set_update_count(optimizer, 0)


def set_update_count(optimizer: ChainedOptimizer, updates: int) -> None:
    """Sets Adam's count of updates, which torch keeps for each parameter and Transformer Engine for each group."""
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = torch.full_like(state["step"], updates)
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = updates


def optimizer_tensors(optimizer: ChainedOptimizer, model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The main weights and moments of this rank, without what the model's own weights lie in."""
    of_model = {parameter.untyped_storage() for parameter in model.parameters()}
    for part in optimizer.chained_optimizers:
        mains = (main for group in part.optimizer.param_groups for main in group["params"])
        yield from (main for main in mains if main.untyped_storage() not in of_model)
        for state in part.optimizer.state.values():
            yield from (state[name] for name in MOMENTS if name in state)


def _use_fused_kernel(optimizer: ChainedOptimizer) -> None:
    """Lets torch's AdamW, where it is torch's, run its fused kernel; Megatron has no option for it."""
    for part in optimizer.chained_optimizers:
        if not isinstance(part.optimizer, torch.optim.AdamW):  # Transformer Engine's or Apex's is fused as it is
            continue
        for group in part.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
