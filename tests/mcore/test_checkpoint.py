"""A checkpoint continues training exactly, is never half there, and is refused with one line when it is damaged."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.errors import CheckpointError, MissingPathError
from opd_megatron.mcore.checkpoint import (
    BestCheckpoint,
    CheckpointSaver,
    checkpoint_path,
    checkpoint_state,
    choose_checkpoint,
    list_checkpoints,
    load_checkpoint,
    named_checkpoint,
)
from opd_megatron.mcore.checkpoint.manifest import read_manifest
from opd_megatron.mcore.checkpoint.writer import ShardWriter
from opd_megatron.mcore.cpu.platform import init_distributed
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.student import Student
from opd_megatron.run.checks import check_run
from opd_megatron.run.identity import check_identity
from opd_megatron.teacher import ask_teachers, build_teachers
from opd_megatron.types import Batch, StepOutput
from opd_megatron.weight_sync.gathered import gather_student
from tests.mcore.test_student import _batches, _config
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return save_tiny(root / "student", seed=1, num_hidden_layers=2), save_tiny(root / "teacher", seed=2)


class _Run:
    """A student and its teacher, ready to take the step of a given batch."""

    def __init__(self, pair: tuple[Path, Path], layout: tuple[int, ...], dtype: str, **settings: Any) -> None:
        init_distributed()
        tensor, pipeline, data, expert = (*layout, 1)[:4]
        self.config = _config(pair, "unused", **{
            "parallel.tensor": tensor, "parallel.pipeline": pipeline, "parallel.data": data, "student.dtype": dtype,
            "parallel.expert": expert,
            "optimizer.decay": "cosine", "optimizer.warmup_steps": 1, **settings,
        })  # fmt: skip
        self.models = check_run(self.config)
        self.grid = ParallelGrid.build(tensor, pipeline, data, ep_size=expert)
        padded = self.models.padded_vocab(tensor)
        self.student = Student(self.config, self.models.student, self.models.student_config, self.grid, padded)
        (self.teacher,) = build_teachers(self.config, self.models, self.grid)

    def step(self, batch: Batch) -> StepOutput:
        rows = slice(self.grid.dp_rank, None, self.grid.dp_size)
        mine = Batch(batch.tokens[rows], batch.targets[rows], batch.weights[rows]).micro_batches(2)
        views = ask_teachers([self.teacher], mine)
        return self.student.update(mine, views, self.config.objective, self.models.vocab_size)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for bucket in gather_student(self.student) for name, tensor in bucket}


def _resumed_equals_uninterrupted(
    rank: int, world: int, pair: tuple[Path, Path], layout: tuple[int, ...], dtype: str, folder: Path,
    settings: dict[str, Any] | None = None,
) -> Any:  # fmt: skip
    first, second, third = _batches(3)
    run = _Run(pair, layout, dtype, **(settings or {}))
    run.step(first)
    run.step(second)
    torch.manual_seed(100 + rank)
    CheckpointSaver(folder, keep=2).save(2, run.student, {"step": 2, "note": "kept"})
    expected_random = torch.rand(3)
    lr = run.step(third).lr
    uninterrupted = run.weights()

    again = _Run(pair, layout, dtype, **(settings or {}))
    torch.manual_seed(0)
    assert checkpoint_state(checkpoint_path(folder, 2)) == {"step": 2, "note": "kept"}
    assert load_checkpoint(checkpoint_path(folder, 2), again.student), "the same layout"
    assert torch.equal(torch.rand(3), expected_random), "the random state of this rank is part of the checkpoint"
    assert again.step(third).lr == lr
    resumed = again.weights()
    return all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 1), (2, 1, 2)], ids=["one-rank", "tp2-pp2", "tp2-dp2"])
def test_resumed_training_is_bit_identical(
    pair: tuple[Path, Path], layout: tuple[int, int, int], dtype: str, tmp_path: Path
) -> None:
    world = layout[0] * layout[1] * layout[2]
    assert all(run_ranks(world, _resumed_equals_uninterrupted, pair, layout, dtype, tmp_path))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]


@pytest.mark.parametrize("layout", [(1, 1, 2, 2), (1, 2, 2, 2), (1, 1, 4, 2)], ids=["ep2", "pp2-ep2", "dp4-ep2"])
def test_resumed_training_of_experts_is_bit_identical(
    pair: tuple[Path, Path], layout: tuple[int, ...], tmp_path: Path
) -> None:
    student = save_tiny(tmp_path / "student", "qwen2_moe", num_hidden_layers=2)
    world = layout[0] * layout[1] * layout[2]
    assert all(
        run_ranks(world, _resumed_equals_uninterrupted, (student, pair[1]), layout, "bf16", tmp_path / "checkpoints")
    )


@pytest.mark.parametrize(
    ("saved", "resumed"), [((1, 1, 2, 2), (1, 1, 1)), ((1, 2, 1), (1, 1, 2, 2))], ids=["ep2 to one", "pp2 to ep2"]
)
def test_experts_are_resumed_in_another_layout(
    pair: tuple[Path, Path], saved: tuple[int, ...], resumed: tuple[int, ...], tmp_path: Path
) -> None:
    student = save_tiny(tmp_path / "student", "qwen2_moe", num_hidden_layers=2)
    _check_losses((student, pair[1]), saved, resumed, tmp_path / "fp32")


def _save_and_go_on(rank: int, world: int, pair: tuple[Path, Path], layout: tuple[int, ...], folder: Path) -> Any:
    batches = _batches(5)
    run = _Run(pair, layout, folder.name)
    for batch in batches[:2]:
        run.step(batch)
    CheckpointSaver(folder).save(2, run.student, {"step": 2})
    return [run.step(batch).metrics["loss"] for batch in batches[2:]]


def _resume(rank: int, world: int, pair: tuple[Path, Path], layout: tuple[int, ...], folder: Path) -> Any:
    run = _Run(pair, layout, folder.name)
    assert not load_checkpoint(checkpoint_path(folder, 2), run.student), "another layout"
    return [run.step(batch).metrics["loss"] for batch in _batches(5)[2:]]


def _check_losses(
    pair: tuple[Path, Path],
    saved: tuple[int, ...],
    resumed: tuple[int, ...],
    folder: Path,
    tolerances: tuple[float, float, float] = (1e-4, 1e-4, 1e-4),
) -> None:
    ranks = [layout[0] * layout[1] * layout[2] for layout in (saved, resumed)]
    expected = run_ranks(ranks[0], _save_and_go_on, pair, saved, folder)[0]
    losses = run_ranks(ranks[1], _resume, pair, resumed, folder)[0]
    for loss, wanted, tolerance in zip(losses, expected, tolerances, strict=True):
        assert loss == pytest.approx(wanted, abs=tolerance)
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [((2, 1, 1), (1, 2, 1)), ((1, 1, 2), (1, 1, 1)), ((1, 1, 1), (2, 1, 1)), ((1, 2, 1), (2, 1, 2))],
    ids=["tp2 to pp2", "dp2 to dp1", "one rank to tp2", "pp2 to tp2-dp2"],
)
def test_losses_go_on_as_before_on_another_layout(
    pair: tuple[Path, Path], saved: tuple[int, int, int], resumed: tuple[int, int, int], tmp_path: Path
) -> None:
    _check_losses(pair, saved, resumed, tmp_path / "fp32")


def test_losses_go_on_as_before_on_another_layout_in_bf16(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The first loss tells that the weights are the same; further ones feel gradients summed in another order, which
    bf16 weights round to another neighbour."""
    _check_losses(pair, (1, 1, 2), (1, 1, 1), tmp_path / "bf16", (1e-4, 1e-3, 1e-3))


def test_losses_go_on_as_before_where_the_vocabulary_is_padded_otherwise(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """264 rows are a multiple of 8, but not of 2 x 8."""
    root = tmp_path_factory.mktemp("untied")
    pair = (
        save_tiny(root / "student", seed=1, num_hidden_layers=2, vocab_size=264, tie_word_embeddings=False),
        save_tiny(root / "teacher", seed=2, vocab_size=264),
    )
    _check_losses(pair, (1, 1, 1), (2, 1, 1), tmp_path / "wider" / "fp32")
    _check_losses(pair, (2, 1, 1), (1, 1, 1), tmp_path / "narrower" / "fp32")


class _HeldBack:
    """Holds the writers' threads at their first byte until the block has ended."""

    def __enter__(self) -> None:
        self.original, self.may_write = ShardWriter.write, threading.Event()

        def write(writer: ShardWriter) -> None:
            assert self.may_write.wait(60)
            self.original(writer)

        ShardWriter.write = write  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        ShardWriter.write = self.original  # type: ignore[method-assign]
        self.may_write.set()


def _background_equals_foreground(rank: int, world: int, pair: tuple[Path, Path], folder: Path) -> Any:
    first, second = _batches(2)
    run = _Run(pair, (2, 1, 2), "bf16")
    run.step(first)
    CheckpointSaver(folder / "sync").save(1, run.student, {"step": 1})
    background = CheckpointSaver(folder / "async", asynchronous=True)
    with _HeldBack():
        background.save(1, run.student, {"step": 1})
        while_writing = background.is_writing
        run.step(second)  # the files are written after the weights have changed
        listed = list_checkpoints(folder / "async")
    background.finish()
    sums = [read_manifest(checkpoint_path(folder / kind, 1)) for kind in ("sync", "async")]
    same_files = [sums[0][name] == sums[1][name] for name in sums[0] if name.endswith(".distcp")]
    background.save(2, run.student, {"step": 2})
    background.save(3, run.student, {"step": 3})  # finishes the one before
    one_before = [step for step, _ in list_checkpoints(folder / "async")]
    background.finish()
    return while_writing, listed, same_files, one_before, [step for step, _ in list_checkpoints(folder / "async")]


def test_a_background_save_holds_what_was_there_when_it_began(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for result in run_ranks(4, _background_equals_foreground, pair, tmp_path):
        while_writing, listed, same_files, one_before, after = result
        assert while_writing
        assert listed == []
        assert same_files == [True] * 4
        assert one_before == [2]
        assert after == [3]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "truncated shard": ("__1_0.distcp", _truncate),
    "flipped byte": ("__0_0.distcp", _flip),
    "flipped byte in the run's state": ("run.json", _flip),
    "missing shard": ("__1_0.distcp", Path.unlink),
    "missing metadata": (".metadata", Path.unlink),
    "missing manifest": ("sha256sums", Path.unlink),
    "flipped byte in the manifest": ("sha256sums", _flip),
}


def _skips_what_is_damaged(rank: int, world: int, pair: tuple[Path, Path], folder: Path) -> Any:
    run = _Run(pair, (1, 1, 2), "fp32")
    saver = CheckpointSaver(folder, keep=len(DAMAGE) + 1)
    for step, batch in enumerate(_batches(len(DAMAGE) + 1), start=1):
        run.step(batch)
        saver.save(step, run.student, {"step": step})
    undamaged = choose_checkpoint(folder)
    dist.barrier()
    if rank == 0:
        for step, (name, damage) in enumerate(DAMAGE.values(), start=2):
            damage(checkpoint_path(folder, step) / name)
    dist.barrier()
    found = choose_checkpoint(folder)
    assert undamaged is not None
    assert found is not None
    load_checkpoint(found.path, run.student)
    CheckpointSaver(folder, keep=3).save(2, run.student, {"step": 2})
    left = [step for step, _ in list_checkpoints(folder)]
    dist.barrier()
    if rank == 0:
        for step in left:
            _flip(checkpoint_path(folder, step) / "common.pt")
    dist.barrier()
    with pytest.raises(CheckpointError) as none_left:
        choose_checkpoint(folder)
    return undamaged, found, left, str(none_left.value)


def test_the_newest_whole_checkpoint_is_found_by_all_ranks_and_every_damaged_one_is_named(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    results = run_ranks(2, _skips_what_is_damaged, pair, tmp_path)
    assert results[0] == results[1]
    undamaged, found, left, none_left = results[0]
    assert (undamaged.step, undamaged.skipped) == (len(DAMAGE) + 1, ())
    assert found.step == 1
    for line, (step, (name, _)) in zip(reversed(found.skipped), enumerate(DAMAGE.values(), start=2), strict=True):
        assert f"step_{step:08d}" in line
        assert name in line
        assert "\n" not in line
    assert left == [1, 2], "later checkpoints of an abandoned line are gone"
    assert "common.pt" in none_left
    assert "no checkpoint" in none_left
    assert "\n" not in none_left


def _best_of(rank: int, world: int, pair: tuple[Path, Path], folder: Path) -> Any:
    run = _Run(pair, (1, 1, 1), "fp32")
    run.step(_batches(1)[0])
    values = {1: 3.0, 2: 1.0, 3: None, 4: float("nan"), 5: 1.0, 6: 2.0}
    kept = []
    for mode in ("min", "max"):
        for step, value in values.items():
            state = {"step": step, "metrics": {} if value is None else {"eval/nll": value}}
            # A saver of its own for each: what is best must be known to a run that was resumed.
            CheckpointSaver(folder / mode, keep=2, best=BestCheckpoint("eval/nll", mode)).save(step, run.student, state)
        kept.append([step for step, _ in list_checkpoints(folder / mode)])
    names = [(folder / mode / file).read_text() for mode in ("min", "max") for file in ("best", "latest")]
    best = named_checkpoint(folder / "min", "best")
    with pytest.raises(MissingPathError) as absent:
        named_checkpoint(folder / "min", "4")
    return kept, names, best.name, str(absent.value)


def test_the_best_checkpoint_is_never_pruned(pair: tuple[Path, Path], tmp_path: Path) -> None:
    ((kept, names, best, absent),) = run_ranks(1, _best_of, pair, tmp_path)
    assert kept == [[2, 5, 6], [1, 5, 6]]
    assert names == ["step_00000002\n", "step_00000006\n", "step_00000001\n", "step_00000006\n"]
    assert best == "step_00000002"
    assert "'4'" in absent
    assert "2, 5, 6" in absent


def _fails_with(limit: int | None, folder: Path, student: Student, asynchronous: bool) -> str:
    """The error of a save during which this rank's files cannot grow over `limit` bytes."""
    saver = CheckpointSaver(folder, keep=1, asynchronous=asynchronous)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if limit is None else limit, hard))
    try:
        saver.save(2, student, {"step": 2})
        saver.finish()
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "no error"


def _no_room(rank: int, world: int, pair: tuple[Path, Path], folder: Path) -> Any:
    run = _Run(pair, (1, 1, 2), "fp32")
    run.step(_batches(1)[0])
    CheckpointSaver(folder, keep=1).save(1, run.student, {"step": 1})
    messages = [
        _fails_with(limit if rank in ranks else None, folder, run.student, asynchronous)
        for limit, ranks in ((100_000, (0, 1)), (100_000, (1,)), (3_000, (0,)))
        for asynchronous in (False, True)
    ]
    found = choose_checkpoint(folder)
    assert found is not None
    CheckpointSaver(folder, keep=1).save(3, run.student, {"step": 3})
    return found.step, messages, [step for step, _ in list_checkpoints(folder)]


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for found, messages, after in run_ranks(2, _no_room, pair, tmp_path):
        assert found == 1
        assert len(messages) == 6
        for message in messages:
            assert "File too large" in message
            assert "free disk space" in message
            assert "step_00000002" in message
            assert "\n" not in message
        assert after == [3], "the next save works again"


def _another_model(rank: int, world: int, pair: tuple[Path, Path], folder: Path) -> Any:
    identity = {"objective.type": "reverse_kl", "model.hidden_size": 64}
    run = _Run(pair, (1, 1, 1), "fp32")
    run.step(_batches(1)[0])
    CheckpointSaver(folder).save(1, run.student, {"step": 1, "identity": identity})
    path = checkpoint_path(folder, 1)
    with pytest.raises(CheckpointError) as other_run:
        check_identity(checkpoint_state(path)["identity"], identity | {"model.hidden_size": 128}, path)
    wider = save_tiny(folder / "wider", seed=1, num_hidden_layers=2, intermediate_size=64)
    with pytest.raises(CheckpointError) as other_model:
        load_checkpoint(path, _Run((wider, pair[1]), (1, 1, 1), "fp32").student)
    return str(other_run.value), str(other_model.value)


def test_a_checkpoint_of_another_run_or_model_is_an_error_that_names_the_difference(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    ((other_run, other_model),) = run_ranks(1, _another_model, pair, tmp_path)
    assert "model.hidden_size=64, this one has 128" in other_run
    assert "linear_fc1.weight" in other_model
    for message in (other_run, other_model):
        assert "\n" not in message


def _damage(rank: int, world: int, pair: tuple[Path, Path], folder: Path) -> Any:
    run = _Run(pair, (1, 1, 1), "fp32")
    run.step(_batches(1)[0])
    for step in (1, 2, 3):
        CheckpointSaver(folder, keep=2).save(step, run.student, {"step": step})
    kept = [step for step, _ in list_checkpoints(folder)]

    (folder / ".step_00000004.partial").mkdir()  # what a killed save leaves behind
    (folder / ".step_00000004.partial" / "metadata.json").write_text("{}")
    after_kill = [step for step, _ in list_checkpoints(folder)]
    CheckpointSaver(folder, keep=2).save(4, run.student, {"step": 4})
    after_retry = [step for step, _ in list_checkpoints(folder)]

    shard = next(checkpoint_path(folder, 4).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError) as damaged:
        load_checkpoint(checkpoint_path(folder, 4), run.student)

    (folder / ".step_00000005.partial").write_text("a file where the folder must go")
    blocked = folder / "blocked"
    blocked.write_text("not a folder")
    with pytest.raises(CheckpointError) as unwritable:
        CheckpointSaver(blocked, keep=2).save(5, run.student, {"step": 5})
    return kept, after_kill, after_retry, str(damaged.value), str(unwritable.value)


def test_old_ones_are_pruned_half_written_ones_ignored_and_damaged_ones_refused(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    ((kept, after_kill, after_retry, damaged, unwritable),) = run_ranks(1, _damage, pair, tmp_path)
    assert kept == [2, 3]
    assert after_kill == [2, 3]
    assert after_retry == [3, 4]
    for message in (damaged, unwritable):
        assert "\n" not in message
    assert "step_00000004" in damaged
    assert "earlier ones are intact" in unwritable
