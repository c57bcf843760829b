"""Places: which ranks do what, and which of them start the rollout engines.

The world of one job is cut into contiguous ranges of ranks: the student's first, then one for each teacher with ranks
of its own, then the hosts of engines. A `Places`
is made from the configuration before any process group exists, printed by `--dry-run` and `plan`, and passed on; nobody
else computes with ranks.

    student  ranks 0-7    8 on node 0
    rollout  ranks 8-9    2 on node 1: engines 0, 1
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opd_megatron.config import OwnRanksTeacherConfig, RunConfig
from opd_megatron.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """A contiguous range of ranks that do the same."""

    name: str
    first: int
    size: int

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.size)


@dataclass(frozen=True, slots=True)
class EngineSeat:
    """Where one engine of the fleet runs."""

    index: int
    leader: int
    """The rank whose child it is."""
    node: int
    ranks: tuple[int, ...]
    """The ranks whose GPUs it has; on a CPU the leader alone."""
    neighbours: int
    """Engines on its node, itself included: they share cores and memory."""


@dataclass(frozen=True, slots=True)
class Places:
    """Who works where in one job."""

    student: Place
    rollout: Place
    """Where the engines are: the student's ranks, or ranks of their own."""
    nodes: tuple[int, ...]
    """The node of each rank."""
    engines: tuple[EngineSeat, ...]
    teachers: dict[int, Place] = field(default_factory=dict)
    """Of the teachers with ranks of their own, by their number."""

    @property
    def world_size(self) -> int:
        return len(self.nodes)

    @property
    def hosts_engines_apart(self) -> bool:
        """Whether the engines have ranks of their own."""
        return self.rollout != self.student

    @property
    def sampling(self) -> list[int]:
        """The ranks that sample together: the student's and those of engines alone."""
        return sorted({*self.student.ranks, *self.rollout.ranks})

    def teacher_of(self, rank: int) -> int | None:
        """The number of the teacher whose own rank it is."""
        return next((number for number, place in self.teachers.items() if rank in place.ranks), None)

    @property
    def leaders(self) -> list[int]:
        """The rank of each engine."""
        return [seat.leader for seat in self.engines]

    def led_by(self, rank: int) -> list[EngineSeat]:
        """The engines that are children of a rank."""
        return [seat for seat in self.engines if seat.leader == rank]

    def lines(self) -> list[str]:
        """What a user reads of it."""
        places = list(dict.fromkeys((self.student, *self.teachers.values(), self.rollout)))
        width = max(8, *(len(place.name) for place in places))
        return [self._line(place, width) for place in places]

    def _line(self, place: Place, width: int) -> str:
        text = f"{place.name:{width}} {_span(place.ranks)}"
        if self.nodes[-1]:
            text += f" on {_counted(len({self.nodes[rank] for rank in place.ranks}), 'node')}"
        if place == self.rollout:
            seats = [f"{seat.index} (rank {seat.leader})" for seat in self.engines]
            shown = seats if len(seats) <= 4 else [*seats[:2], "..", seats[-1]]
            text += f", {_counted(len(seats), 'engine')}: {', '.join(shown)}"
        return text


def ranks_per_node(world_size: int) -> int:
    """How many ranks torchrun started on this node; all of them where it says nothing."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(int(text), world_size) if text.isdecimal() and int(text) > 0 else world_size


def cut_places(config: RunConfig, world_size: int, per_node: int, *, on_gpu: bool) -> Places:
    """Lays the places of a run over `world_size` ranks, `per_node` of which share a node.

    Raises:
        ConfigError: there are not that many ranks, or not that many GPUs for the engines.
    """
    nodes = tuple(rank // per_node for rank in range(world_size))
    hosts = config.rollout.hosts or 0
    student = Place("student", 0, world_size - config.teacher_ranks - hosts)
    teachers, first = {}, student.size
    for number, teacher in enumerate(config.teachers):
        if isinstance(teacher, OwnRanksTeacherConfig):
            teachers[number] = Place(f"teacher {number}", first, teacher.ranks)
            first += teacher.ranks
    rollout = Place("rollout", first, hosts) if hosts else student
    seats = _gpu_seats(config, rollout, nodes) if on_gpu else _cpu_seats(config, rollout, nodes)
    return Places(student, rollout, nodes, seats, teachers)


def _gpu_seats(config: RunConfig, place: Place, nodes: Sequence[int]) -> tuple[EngineSeat, ...]:
    """One engine for every `rollout.tensor` neighbouring ranks of a node, each of which owns one GPU."""
    tensor = config.rollout.tensor
    blocks: list[tuple[int, ...]] = []
    for ranks in _by_node(place, nodes).values():
        if len(ranks) < tensor and place.size == len(ranks) and place.name == "student":
            blocks.append(tuple(ranks))  # a run of few ranks whose engine has more GPUs: its neighbours' are free
        blocks += [tuple(ranks[i : i + tensor]) for i in range(0, len(ranks) - tensor + 1, tensor)]
    wanted = len(blocks) if config.rollout.engines is None else config.rollout.engines
    if wanted > len(blocks) or not blocks:
        sizes = [len(ranks) for ranks in _by_node(place, nodes).values()]
        raise ConfigError(
            f"rollout.engines={wanted or 1} of rollout.tensor={tensor} GPUs each do not fit the {place.size} GPUs of "
            f"the {place.name}'s ranks ({_counted(len(sizes), 'node')} of {max(sizes)}, an engine stays on one): "
            f"{f'at most {len(blocks)} do' if blocks else 'lower rollout.tensor'}"
        )
    chosen = [blocks[i * len(blocks) // wanted] for i in range(wanted)]
    return _numbered([(block[0], block) for block in chosen], nodes)


def _cpu_seats(config: RunConfig, place: Place, nodes: Sequence[int]) -> tuple[EngineSeat, ...]:
    """As many as asked for, dealt evenly to the ranks."""
    count = config.rollout.engines or config.rollout.hosts or 1
    ranks = place.ranks
    leaders = sorted(ranks[i * len(ranks) // count] if count <= len(ranks) else ranks[i % len(ranks)]
                     for i in range(count))  # fmt: skip
    return _numbered([(leader, (leader,)) for leader in leaders], nodes)


def _numbered(seats: Sequence[tuple[int, tuple[int, ...]]], nodes: Sequence[int]) -> tuple[EngineSeat, ...]:
    found = [nodes[leader] for leader, _ in seats]
    return tuple(
        EngineSeat(index, leader, node, ranks, found.count(node))
        for index, ((leader, ranks), node) in enumerate(zip(seats, found, strict=True))
    )


def visible_devices(seat: EngineSeat, tensor: int, owned: Mapping[int, str]) -> str | None:
    """CUDA_VISIBLE_DEVICES of an engine; None where it has GPUs that no rank owns and takes the first it sees.

    Args:
        tensor: GPUs of the engine.
        owned: the name of each rank's GPU (`owned_device`).

    Raises:
        ConfigError: ranks of one engine name the same GPU, so that its others cannot be named.
    """
    if len(seat.ranks) < tensor:
        return None
    names = [owned[rank] for rank in seat.ranks]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"rollout.tensor={len(names)}: ranks {_span(seat.ranks)} all see their GPU as {names[0]!r}, so that one "
            "engine cannot be given all of them: start the ranks with every GPU of the node visible "
            "(srun --gpu-bind=none), or set rollout.tensor=1"
        )
    return ",".join(names)


def owned_device(local_rank: int) -> str:
    """What this rank's GPU is called in CUDA_VISIBLE_DEVICES: its entry of a list that a scheduler has set (numbers,
    UUIDs, or one entry where each rank was given its own), else its number."""
    entries = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    if not entries:
        return str(local_rank)
    return entries[local_rank] if local_rank < len(entries) else entries[0]


def _by_node(place: Place, nodes: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for rank in place.ranks:
        found.setdefault(nodes[rank], []).append(rank)
    return found


def _span(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
