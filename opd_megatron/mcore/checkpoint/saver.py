"""Saving while training goes on: snapshot at once, files in the background, visible when all ranks have finished."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.api import CheckpointException as TorchCheckpointException

from opd_megatron.errors import CheckpointError, is_out_of_memory
from opd_megatron.mcore.checkpoint import folder as files
from opd_megatron.mcore.checkpoint.io_errors import IO_ERRORS
from opd_megatron.mcore.checkpoint.manifest import MANIFEST, write_manifest
from opd_megatron.mcore.checkpoint.state import state_to_save
from opd_megatron.mcore.checkpoint.writer import ShardWriter
from opd_megatron.mcore.student import Student
from opd_megatron.system import atomic
from opd_megatron.system.collectives import raise_on_all_ranks


@dataclass(frozen=True, slots=True)
class _InFlight:
    step: int
    final: Path
    partial: Path
    writer: ShardWriter
    common: dict[str, Any]
    state: dict[str, Any]


class CheckpointSaver:
    """Checkpoints of one run. Every method is a collective over all ranks, in the same order on each.

        saver.save(step, student, state)    snapshot; the files are written while training goes on
        if not any rank is `is_writing`: saver.finish()

    At most one is on its way: `save` first finishes the one before.
    """

    def __init__(
        self, folder: Path, *, keep: int = 1, best: files.BestCheckpoint | None = None, asynchronous: bool = False
    ) -> None:
        self.folder, self._keep, self._best, self._asynchronous = folder, keep, best, asynchronous
        self._in_flight: _InFlight | None = None
        self._validated = False

    @property
    def pending(self) -> bool:
        """Whether a checkpoint waits to be finished; the same on every rank."""
        return self._in_flight is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files are still being written. Not a collective."""
        return self._in_flight is not None and self._in_flight.writer.is_writing

    def save(self, step: int, student: Student, state: dict[str, Any]) -> None:
        """Takes weights, optimizer, RNG and `state` (JSON: data cursor, policy version, ...) as they are now.

        Raises:
            CheckpointError: a rank could not write this one, or the one before; those that were there are intact.
        """
        self.finish()
        final = files.checkpoint_path(self.folder, step)
        partial = self._make_partial(final)
        writer = ShardWriter(partial, snapshot=self._asynchronous)
        common, error = {}, None
        try:
            # The layout never changes in a run, so it is validated once that every shard has exactly one writer.
            sharded, common = save_preprocess(state_to_save(student), validate_access_integrity=not self._validated)
            writer.prepare(sharded)
            del sharded
        except (OSError, MemoryError, RuntimeError, TorchCheckpointException) as problem:
            error = problem
        _raise_unwritten(error, final)
        self._validated = True
        self._in_flight = _InFlight(step, final, partial, writer, common, state)
        if self._asynchronous:
            writer.start()
        else:
            writer.write()
            self.finish()

    def finish(self) -> None:
        """Waits for the files of all ranks and publishes them as a checkpoint. Does nothing when none is on its way.

        Raises:
            CheckpointError: a rank could not write; checkpoints that were there before are untouched.
        """
        if self._in_flight is None:
            return
        current, self._in_flight = self._in_flight, None
        current.writer.wait()
        _raise_unwritten(current.writer.error, current.final)
        written: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(written, (current.writer.results, current.writer.digests))
        error: BaseException | None = None
        if dist.get_rank() == 0:
            try:
                self._publish(current, written)
            except IO_ERRORS as problem:
                error = problem
        _raise_unwritten(error, current.final)

    def _make_partial(self, final: Path) -> Path:
        error: BaseException | None = None
        if dist.get_rank() == 0:
            try:
                files.make_partial(final)
            except OSError as problem:
                error = problem
        _raise_unwritten(error, final)
        return atomic.partial_path(final)

    def _publish(self, current: _InFlight, written: list[Any]) -> None:
        partial = current.partial
        assert current.writer.metadata is not None
        current.writer.finish(current.writer.metadata, [results for results, _ in written])
        torch.save(current.common, partial / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist", 1), str(partial))
        (partial / files.STATE_FILE).write_text(json.dumps(current.state, indent=1), encoding="utf-8")
        shards = {name: digest for _, digests in written for name, digest in digests.items()}
        write_manifest(partial, shards)
        for path in partial.iterdir():
            if path.name not in shards:  # those are on disk already
                atomic.flush(path)
        assert (partial / MANIFEST).exists()
        atomic.publish(partial, current.final)
        files.prune(self.folder, current.step, self._keep, self._best)


def _raise_unwritten(error: BaseException | None, final: Path) -> None:
    what = f"checkpoint {str(final)!r} was not written, earlier ones are intact"
    remedy = "choose another output_dir"
    if error is not None and is_out_of_memory(error):
        remedy = "memory ran out: checkpoint.async_save=false needs no copy in the host's memory"
    raise_on_all_ranks(error, what, CheckpointError, remedy=remedy)
