"""An exponential moving average of the student's weights: a model of its own that follows."""

from __future__ import annotations

import torch

from opd_megatron.mcore.model import Model


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, after every optimizer step; in fp32 whatever the model's
    dtype, in which a thousandth of a weight would be lost."""

    def __init__(self, model: Model, followed: Model, decay: float) -> None:
        """`model` holds the average, and is built like `followed` on the same ranks. Both begin with equal weights."""
        self.model, self._decay = model, decay
        theirs = dict(followed.named_parameters())
        self._followed = {name: theirs[name] for name, _ in model.named_parameters()}
        self.values: dict[str, torch.Tensor] = {
            name: parameter.data if parameter.dtype == torch.float32 else parameter.data.float()
            for name, parameter in model.named_parameters()
        }
        """Name of a parameter -> its average, fp32."""

    @torch.no_grad()
    def follow(self) -> None:
        """Takes the student's weights into the average."""
        for name, followed in self._followed.items():
            self.values[name].lerp_(followed.detach().float(), 1 - self._decay)
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Gives the model what `values` hold."""
        for name, parameter in self.model.named_parameters():
            if parameter.data_ptr() != self.values[name].data_ptr():
                parameter.copy_(self.values[name])
