"""Files of a checkpoint: planned by Megatron-Core, written by a thread of this process.

Upstream writes from forked processes. Those outlive a rank that is killed and would go on writing into the folder
that the resumed run writes too; they also bring a manager process that nobody ends. A thread dies with its rank,
and copying, hashing and writing all run without the interpreter lock.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from opd_megatron.mcore.checkpoint.io_errors import IO_ERRORS
from opd_megatron.mcore.cpu.platform import release_memory


class ShardWriter(FileSystemWriterAsync):
    """Writes this rank's shards into one file, whose checksum is taken on the way.

    With `snapshot`, tensors are copied to host memory while planning, so that training may change them at once;
    without it they are read as they are, one at a time.
    """

    def __init__(self, folder: Path, *, snapshot: bool) -> None:
        super().__init__(str(folder), thread_count=1)
        self.folder, self._snapshot = folder, snapshot
        self.results: list[WriteResult] = []
        self.digests: dict[str, str] = {}
        """File name -> SHA-256 of what was written."""
        self.error: BaseException | None = None
        self.metadata: Metadata | None = None
        """What holds which tensor: on rank 0."""
        self._items: list[tuple[WriteItem, Any]] = []
        self._file_name = ""
        self._thread: threading.Thread | None = None

    def prepare(self, state: ShardedStateDict) -> None:
        """Agrees with the other ranks on who writes what, and takes the snapshot. Collective."""
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(state, True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        (_, self.metadata, _), *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(named, False), self, None, 0, planner=planner
        )

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Collects what this rank will write, in order. Called by `prepare`."""
        self._file_name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        for item in plan.items:
            data = planner.resolve_data(item)
            if self._snapshot and isinstance(data, torch.Tensor):
                data = data.detach().to("cpu", copy=True)
            self._items.append((item, data))

    def write(self) -> None:
        """Writes everything and frees it; a failure is kept in `error`."""
        try:
            if self._items:
                self._write_file()
        except IO_ERRORS as problem:
            self.error = problem
        finally:
            self._items.clear()
            release_memory()

    def start(self) -> None:
        """Runs `write` in the background. The thread ends with the process: what is unfinished then was never
        published."""
        self._thread = threading.Thread(target=self.write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _write_file(self) -> None:
        with (self.folder / self._file_name).open("wb") as raw:
            stream = _HashedStream(raw)
            try:
                self._write_items(stream)
            except RuntimeError as problem:  # torch hides the disk error behind its own: raise the disk error
                raise stream.error or problem from None
            raw.flush()
            os.fsync(raw.fileno())
        self.digests[self._file_name] = stream.digest.hexdigest()

    def _write_items(self, stream: _HashedStream) -> None:
        self._items.reverse()
        while self._items:  # each tensor's copy is freed as soon as it is in the file
            item, data = self._items.pop()
            if item.type != WriteItemType.BYTE_IO:
                data = _on_its_own(data)
            self.results.append(
                _write_item(self.transforms, stream, data, item, self._file_name, SerializationFormat.TORCH_SAVE)
            )


class _HashedStream(io.IOBase):
    """An append-only file that knows its checksum, and what went wrong."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self._raw.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return int(written)

    def tell(self) -> int:
        return int(self._raw.tell())

    def flush(self) -> None:
        self._raw.flush()


def _on_its_own(data: torch.Tensor) -> torch.Tensor:
    """Copies to the CPU, without the rest of the buffer it may be a view of, which torch.save would write as well."""
    data = data.detach().cpu()
    return data if data.untyped_storage().nbytes() == data.nbytes else data.clone()
