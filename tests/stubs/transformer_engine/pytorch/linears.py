import torch
import torch.nn.functional as F
from torch import nn

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
from transformer_engine.pytorch.norms import _Extra, rms_norm
from transformer_engine.pytorch.tensor import QuantizedTensor, quantize


def _marked(parameter, dim):
    """As `set_tensor_model_parallel_attributes` of Transformer Engine does: weights always, whatever the mode."""
    parameter.tensor_model_parallel = True
    parameter.partition_dim = dim
    parameter.partition_stride = 1


def _weight(rows, columns, init_method, params_dtype, device):
    values = torch.empty(rows, columns, dtype=params_dtype, device=device)
    if FP8GlobalStateManager.weights:
        return nn.Parameter(QuantizedTensor.of(values.zero_()))
    parameter = nn.Parameter(values)
    init_method(parameter)
    return parameter


def _rounded(values, kind, largest):
    data, scale = quantize(values, kind, largest)
    return (data.float() * scale).to(values.dtype)


class _Product(torch.autograd.Function):
    """x w' with the steps of Transformer Engine: inputs and gradients in FP8 where that is on, weight gradients added
    to the main gradient where that is asked for."""

    @staticmethod
    def forward(ctx, x, weight, fuse):
        dense = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        ctx.fp8 = FP8GlobalStateManager.recipe if FP8GlobalStateManager.enabled else None
        if ctx.fp8 is not None:
            rows = x.numel() // x.shape[-1]
            multiple = ctx.fp8.multiple
            assert not any(size % multiple for size in (rows, *dense.shape)), (
                f"FP8 product of {rows} x {tuple(dense.shape)}: not multiples of {multiple}"
            )
            x = _rounded(x, torch.float8_e4m3fn, 448.0)
            if not isinstance(weight, QuantizedTensor):
                dense = _rounded(dense, torch.float8_e4m3fn, 448.0)
        ctx.save_for_backward(x, dense)
        ctx.weight, ctx.fuse = weight, fuse and hasattr(weight, "main_grad")
        return F.linear(x, dense)

    @staticmethod
    def backward(ctx, grad):
        x, dense = ctx.saved_tensors
        if ctx.fp8 is not None:
            hybrid = ctx.fp8.settings.get("fp8_format") == "hybrid"
            kind, largest = (torch.float8_e5m2, 57344.0) if hybrid else (torch.float8_e4m3fn, 448.0)
            grad = _rounded(grad, kind, largest)
        d_x = grad @ dense
        if not ctx.weight.requires_grad:
            return d_x, None, None
        g, flat = grad.flatten(0, -2), x.flatten(0, -2)
        if ctx.fuse:
            ctx.weight.main_grad.add_(g.t().float() @ flat.float())
            ctx.weight.grad_added_to_main_grad = True
            return d_x, torch.empty_like(dense), None
        return d_x, g.t() @ flat, None


class Linear(_Extra):
    def __init__(
        self, in_features, out_features, *, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
        tp_size=1, get_rng_state_tracker=None, init_method=None, bias=True, return_bias=False, parallel_mode=None,
        params_dtype=None, device=None, **_,
    ):  # fmt: skip
        super().__init__()
        assert parallel_mode in (None, "column", "row")
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.return_bias, self.apply_bias = return_bias, bias and not return_bias
        self.fp8 = self.fp8_calibration = self.save_original_input = False
        self.fp8_meta = {"fp8_checkpoint": False}
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.weight = _weight(out_features, in_features, init_method, params_dtype, device)
        _marked(self.weight, 1 if parallel_mode == "row" else 0)
        self.bias = torch.Tensor()
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=params_dtype, device=device))
            if parallel_mode == "row":
                self.bias.sequence_parallel = sequence_parallel
            elif parallel_mode == "column":
                _marked(self.bias, 0)

    def forward(self, x, is_first_microbatch=None):
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode == "column" and self.tp_size > 1:
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        out = _Product.apply(x, self.weight, self.fuse_wgrad_accumulation)
        if self.apply_bias:
            out = out + self.bias
        if self.parallel_mode == "row" and self.tp_size > 1:
            if self.sequence_parallel:
                out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
            else:
                out = mappings.reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(Linear):
    def __init__(
        self, in_features, out_features, *, eps=1e-5, normalization="LayerNorm", zero_centered_gamma=False,
        return_layernorm_output=False, params_dtype=None, device=None, sequence_parallel=False, **settings,
    ):  # fmt: skip
        super().__init__(
            in_features, out_features, params_dtype=params_dtype, device=device, sequence_parallel=sequence_parallel,
            **settings,
        )  # fmt: skip
        assert normalization == "RMSNorm"
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=params_dtype, device=device))
        self.layer_norm_weight.sequence_parallel = sequence_parallel

    def forward(self, x, is_first_microbatch=None):
        return super().forward(rms_norm(x, self.layer_norm_weight, self.eps, self.zero_centered_gamma))


class GroupedLinear(_Extra):
    def __init__(
        self, num_gemms, in_features, out_features, *, init_method=None, bias=True, return_bias=False,
        parallel_mode=None, tp_size=1, params_dtype=None, device=None, fuse_wgrad_accumulation=False, **_,
    ):  # fmt: skip
        super().__init__()
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        assert not bias
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.num_gemms, self.use_bias, self.tp_size = num_gemms, bias, tp_size
        self.fp8 = self.fp8_calibration = self.save_original_input = False
        self.fp8_meta = {"fp8_checkpoint": False}
        for index in range(num_gemms):
            weight = _weight(out_features, in_features, init_method, params_dtype, device)
            _marked(weight, 1 if parallel_mode == "row" else 0)
            self.register_parameter(f"weight{index}", weight)

    def init_fp8_metadata(self, num_gemms=1): ...

    def forward(self, x, m_splits, is_first_microbatch=None):
        parts = x.split(list(m_splits))
        fuse = self.fuse_wgrad_accumulation
        return torch.cat([_Product.apply(part, getattr(self, f"weight{i}"), fuse) for i, part in enumerate(parts)])
