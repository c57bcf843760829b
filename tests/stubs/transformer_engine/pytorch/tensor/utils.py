"""What Megatron's buffers and optimizer ask of FP8 weights."""

import torch
import torch.distributed as dist

from transformer_engine.pytorch.tensor import E4M3_MAX


def replace_raw_data(tensor, new_raw_data):
    assert new_raw_data.dtype == torch.uint8
    new_raw_data.detach().copy_(tensor._data)
    tensor._data = new_raw_data


def cast_master_weights_to_fp8(model_weights, master_weights, start_offsets, group, **_):
    """Each rank quantizes its part of a weight; the scale is of the whole."""
    for model, master, start in zip(model_weights, master_weights, start_offsets, strict=True):
        largest = model._scale_inv.new_zeros(())
        if master is not None and master.numel():
            # As the real one: rounded to the weight's nominal dtype first, so that FP8 of it is what a product sees.
            master = master.to(model.dtype).float()
            largest = master.abs().max()
        if group is not None and group.size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        scale = (largest / E4M3_MAX).clamp(min=1e-12)
        model._scale_inv.copy_(scale)
        if master is not None and master.numel():
            numbers = (master / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
            model._data.view(-1)[start : start + master.numel()] = numbers.view(torch.uint8).view(-1)


def post_all_gather_processing(tensors): ...
