"""The engines of a run: made on their ranks, given their share of the machine, joined to a fleet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

from opd_megatron.config import RunConfig
from opd_megatron.errors import ConfigError
from opd_megatron.mcore.cpu.platform import device, free_caches, has_gpu, start_store
from opd_megatron.models import ResolvedModels
from opd_megatron.places import EngineSeat, Places, owned_device, visible_devices
from opd_megatron.rollout import MachineShare, RolloutClient, RolloutEngine, build_engine, weight_format
from opd_megatron.rollout.turns import sleeps
from opd_megatron.run.run_dir import RunDir
from opd_megatron.system.collectives import on_all_ranks
from opd_megatron.system.commands import Commands
from opd_megatron.system.groups import cpu_group
from opd_megatron.weight_sync.bucket_store import bucket_store
from opd_megatron.weight_sync.fan_out import FanOut
from opd_megatron.weight_sync.format import WeightPayload
from opd_megatron.weights.hf_reader import config_overrides


@dataclass(kw_only=True)
class Fleet:
    """This rank's end of the fleet: its engines, and the groups that reach the others'."""

    places: Places
    group: dist.ProcessGroup | None
    """The student's ranks and those of engines alone; None for one."""
    fan_out: FanOut | None
    """None where the only engine is on rank 0, where weights come out."""
    commands: Commands | None
    engines: dict[int, RolloutEngine] = field(default_factory=dict)
    """By their number in the fleet."""

    @classmethod
    def join(cls, config: RunConfig, models: ResolvedModels, places: Places) -> Fleet:
        """Makes the groups of the fleet. Collective over all ranks of the job."""
        takes = weight_format(config, models.student_config)
        fan_out = None
        if places.leaders != [0]:
            fan_out = FanOut(places.leaders, places.nodes, bucket_store(takes, device()), device())
        group = cpu_group(places.sampling) if places.world_size > 1 else None
        commands = Commands(start_store(), "rollout") if places.hosts_engines_apart else None
        return cls(places=places, group=group, fan_out=fan_out, commands=commands)

    def build(
        self, config: RunConfig, models: ResolvedModels, run_dir: RunDir, banned: tuple[int, ...], *, launch: bool
    ) -> None:
        """Makes the engines of this rank and launches them. Collective over all ranks."""
        longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
        overrides = config_overrides(models.student, models.student_config)
        owned = _owned_devices(self.group, self.places.sampling)
        with on_all_ranks("the rollout engines cannot be made", ConfigError, group=self.group):
            for seat in self.places.led_by(dist.get_rank()):
                log, share = run_dir.rollout_log(seat.index), _share(seat, config.rollout.tensor, owned)
                engine = build_engine(config, models.student, longest, log, banned, overrides, share)
                self.engines[seat.index] = engine
                if launch:
                    engine.spawn()

    def client(
        self,
        config: RunConfig,
        weights: Callable[[], Iterator[WeightPayload]],
        on_event: Callable[[str], None],
        *,
        make_room: Callable[[], None] = free_caches,
        take_back: Callable[[], None] = lambda: None,
        on_progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> RolloutClient:
        """Makes the fleet look like one engine. Arguments: see `RolloutClient`."""
        return RolloutClient(
            self.engines,
            len(self.places.engines),
            weights,
            self.group,
            max_restarts=config.rollout.max_restarts,
            on_event=on_event,
            commands=self.commands,
            sleeps=sleeps(config, on_gpu=has_gpu()),
            make_room=make_room,
            take_back=take_back,
            on_progress=on_progress,
        )

    def serve(self, config: RunConfig) -> None:
        """Does what the trainer's ranks ask of this rank's engines until they close the fleet."""
        fan_out = self.fan_out
        assert fan_out is not None
        client = self.client(config, lambda: fan_out.stream(iter(())), lambda line: None)
        try:
            client.serve()
        finally:
            client.close()

    def close(self) -> None:
        """Ends this rank's engines, where there is no client to do it. Safe to call twice."""
        if self.commands is not None and dist.is_initialized() and dist.get_rank() == 0:
            self.commands.close()
        for engine in self.engines.values():
            engine.close()


def _share(seat: EngineSeat, tensor: int, owned: dict[int, str] | None) -> MachineShare:
    devices = None if owned is None else visible_devices(seat, tensor, owned)
    return MachineShare(devices, seat.neighbours)


def _owned_devices(group: dist.ProcessGroup | None, ranks: Sequence[int]) -> dict[int, str] | None:
    """What the GPU of each of the group's ranks is called; None on machines without. Collective."""
    if not has_gpu():
        return None
    mine = owned_device(int(os.environ.get("LOCAL_RANK", "0")))
    found = [mine] * len(ranks)
    if group is not None:
        dist.all_gather_object(found, mine, group=group)
    return dict(zip(ranks, found, strict=True))
