"""What reading or writing a checkpoint can raise besides OPDErrors."""

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException as TorchCheckpointException

IO_ERRORS = (
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError,
    CheckpointingException,
    TorchCheckpointException,  # holds the failures of all ranks, and is not even an Exception
)  # fmt: skip
