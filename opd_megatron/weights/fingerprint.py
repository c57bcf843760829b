"""What tells one model's weights from another's, wherever the folder lies and however its files are cut."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import torch

from opd_megatron.weights.hf_reader import SafetensorsSource

_SAMPLED = 16
_ROWS = 2


def fingerprint(folder: Path) -> str:
    """Hashes name, type and shape of every tensor, and the first rows of some spread over the model: a few reads,
    however large it is.

    Raises:
        WeightsError: the folder holds no safetensors, or a file is damaged.
    """
    digest = sha256()
    with SafetensorsSource(folder) as source:
        names = sorted(source.names)
        for name in names:
            digest.update(f"{name} {source.dtype(name)} {source.shape(name)}\n".encode())
        for name in names[:: max(1, len(names) // _SAMPLED)]:
            rows = source.get_slice(name, (slice(0, _ROWS),)) if source.shape(name) else source.get_slice(name)
            digest.update(rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
