"""Training checkpoints in Megatron's `torch_dist` format: written beside training, whole or not at all, on any layout.

folder.py            names, pruning, the files `latest` and `best`
manifest.py          a checksum of every file
state.py, rng.py     which rank writes which tensor and random state; reading them back on another layout
writer.py            planning by Megatron-Core, writing by a thread of ours
saver.py             CheckpointSaver: begin, go on training, publish
loader.py            the newest checkpoint that is whole, and filling the student from one
weights_only.py      a model's weights without a run, for conversions; streaming_reader.py reads them with little memory
"""

from opd_megatron.mcore.checkpoint.folder import BestCheckpoint, checkpoint_path, list_checkpoints
from opd_megatron.mcore.checkpoint.loader import (
    FoundCheckpoint,
    checkpoint_state,
    choose_checkpoint,
    load_checkpoint,
    named_checkpoint,
)
from opd_megatron.mcore.checkpoint.saver import CheckpointSaver

__all__ = [
    "BestCheckpoint",
    "CheckpointSaver",
    "FoundCheckpoint",
    "checkpoint_path",
    "checkpoint_state",
    "choose_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "named_checkpoint",
]
