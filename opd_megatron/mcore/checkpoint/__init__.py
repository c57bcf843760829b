"""Training checkpoints in Megatron's `torch_dist` format: written beside training, whole or not at all, on any layout.

folder.py      names, the order in which a checkpoint becomes visible, pruning, the files `latest` and `best`
manifest.py    a checksum of every file
state.py       which rank writes which tensor; reading them back on another layout
writer.py      planning by Megatron-Core, writing by a thread of ours
save.py        CheckpointSaver: begin, go on training, publish
load.py        the newest checkpoint that is whole, and what it must agree with
"""

from opd_megatron.mcore.checkpoint.agreement import all_ranks_max, raise_together
from opd_megatron.mcore.checkpoint.folder import BestCheckpoint, checkpoint_path, list_checkpoints
from opd_megatron.mcore.checkpoint.loader import FoundCheckpoint, choose_checkpoint, load_checkpoint, named_checkpoint
from opd_megatron.mcore.checkpoint.saver import CheckpointSaver

__all__ = [
    "BestCheckpoint",
    "CheckpointSaver",
    "FoundCheckpoint",
    "all_ranks_max",
    "checkpoint_path",
    "choose_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "named_checkpoint",
    "raise_together",
]
