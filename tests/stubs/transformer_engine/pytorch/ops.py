import torch
from torch import nn


class FusibleOperation(nn.Module): ...


class Sequential(nn.Sequential): ...


class Fp8Padding(nn.Module):
    """Rows of zeros behind each expert's tokens, up to a multiple of 16."""

    def __init__(self, num_gemms):
        super().__init__()

    def forward(self, x, m_splits):
        counts = [-(-count // 16) * 16 for count in m_splits]
        parts = x.split(list(m_splits))
        padded = [nn.functional.pad(part, (0, 0, 0, count - len(part))) for part, count in zip(parts, counts)]  # noqa: B905
        return torch.cat(padded), counts


class Fp8Unpadding(nn.Module):
    """Takes them away."""

    def __init__(self, num_gemms):
        super().__init__()

    def forward(self, x, m_splits):
        counts = [-(-count // 16) * 16 for count in m_splits]
        return torch.cat([part[:count] for part, count in zip(x.split(counts), m_splits)])  # noqa: B905
