"""FP8 tensors of a stand-in: e4m3 numbers and one scale, which stand for a tensor of another dtype."""

import torch

E4M3_MAX = 448.0


def quantize(values, kind=torch.float8_e4m3fn, largest=E4M3_MAX):
    """Numbers in FP8 and their scale, by the tensor's maximum."""
    top = values.abs().max().float() if values.numel() else values.new_zeros((), dtype=torch.float32)
    scale = (top / largest).clamp(min=1e-12)
    return (values.float() / scale).clamp(-largest, largest).to(kind), scale


class QuantizedTensor(torch.Tensor):
    """As Transformer Engine's: a tensor whose numbers are not what it stores. Views of it are copies."""

    @staticmethod
    def __new__(cls, data, scale, dtype, requires_grad=False):
        made = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, dtype=dtype, device=data.device, requires_grad=requires_grad
        )
        made._data, made._scale_inv = data, scale
        return made

    def __init__(self, data, scale, dtype, requires_grad=False): ...

    @classmethod
    def of(cls, values):
        data, scale = quantize(values)
        return cls(data.view(torch.uint8), scale, values.dtype)

    def dequantize(self, *, dtype=None):
        return (self._data.view(torch.float8_e4m3fn).float() * self._scale_inv).to(dtype or self.dtype)

    def quantize_(self, values):
        data, scale = quantize(values.detach())
        self._data.copy_(data.view(torch.uint8))
        self._scale_inv.copy_(scale)
        return self

    def __repr__(self, *, tensor_contents=None):
        return f"QuantizedTensor({tuple(self.shape)})"

    def __deepcopy__(self, memo):
        return QuantizedTensor(self._data.clone(), self._scale_inv.clone(), self.dtype, self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if function is aten.detach.default:
            return cls(args[0]._data, args[0]._scale_inv, args[0].dtype)
        if function is aten.copy_.default and isinstance(args[0], cls):
            source = args[1].dequantize() if isinstance(args[1], cls) else args[1]
            return args[0].quantize_(source)
        plain = torch.utils._pytree.tree_map(lambda each: each.dequantize() if isinstance(each, cls) else each, args)
        options = torch.utils._pytree.tree_map(
            lambda each: each.dequantize() if isinstance(each, cls) else each, kwargs or {}
        )
        return function(*plain, **options)
