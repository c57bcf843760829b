"""`opd-megatron doctor --world`, under torchrun or srun: are the machines of a run alike, and do their ranks reach each
other?"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import torch.distributed as dist

from opd_megatron.config import RunConfig
from opd_megatron.doctor import Finding
from opd_megatron.errors import ConfigError
from opd_megatron.mcore.cpu.platform import has_gpu, init_distributed
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.group_speed import GroupSpeed, measure_groups
from opd_megatron.places import ranks_per_node
from opd_megatron.system.network import is_loopback, meeting_address
from opd_megatron.system.world import CLOCK_SECONDS, clock_spread, compare, versions

_GPU_MEGABYTES, _CPU_MEGABYTES = 256, 8


def run_world_check(config: RunConfig | None) -> int:
    """Compares the nodes, and measures every kind of group that a configuration makes (all data-parallel without one).

    Returns 1 when a run is impossible. Rank 0 prints.

    Raises:
        ConfigError: the ranks are not a multiple of those that hold one student.
    """
    init_distributed()
    try:
        grid = _grid(config)
        findings = [*_nodes(), *_clocks()]
        speeds = measure_groups(grid, megabytes=_GPU_MEGABYTES if has_gpu() else _CPU_MEGABYTES)
        if dist.get_rank() == 0:
            for finding in findings:
                print(finding)
            print(*_table(speeds), sep="\n")
        return int(any(finding.state == "missing" for finding in findings))
    finally:
        dist.destroy_process_group()


def _grid(config: RunConfig | None) -> ParallelGrid:
    world = dist.get_world_size()
    if config is None:
        return ParallelGrid.build(1, 1, world)
    parallel = config.parallel
    least = parallel.model * parallel.least_data
    if world % least:
        raise ConfigError(
            f"{world} ranks must be a multiple of parallel.tensor * parallel.context * parallel.pipeline and of what "
            f"parallel.expert needs, {least}: start another number"
        )
    data = world // parallel.model
    return ParallelGrid.build(
        parallel.tensor, parallel.pipeline, data, ep_size=parallel.expert, cp_size=parallel.context,
        whole_experts=parallel.whole_experts,
    )  # fmt: skip


def _nodes() -> Iterator[Finding]:
    """What the ranks run, and at which address each node is met."""
    world = dist.get_world_size()
    found: list[tuple[str, dict[str, str], tuple[str, str, str]]] = [("", {}, ("", "", ""))] * world
    dist.all_gather_object(found, (socket.gethostname(), versions(), meeting_address()))
    nodes = -(-world // ranks_per_node(world))
    yield Finding("world", "ok", f"{world} ranks on {nodes} {'node' if nodes == 1 else 'nodes'}")
    differences = compare([(host, known) for host, known, _ in found])
    for difference in differences:
        yield Finding("versions", "missing", difference, "install the same checkout and environment on all nodes")
    if not differences:
        yield Finding("versions", "ok", "the same code and packages everywhere")
    seen = {host: address for host, _, address in found}
    for host, (interface, address, why) in seen.items():
        lonely = nodes > 1 and is_loopback(address)
        yield Finding(
            f"{host}", "missing" if lonely else "ok", f"met at {address} ({interface}): {why}",
            "no other node reaches that: set INTERFACE (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
        )  # fmt: skip


def _clocks() -> Iterator[Finding]:
    spread, apart = clock_spread()
    told = ", ".join(f"{host} {seconds:+.2f} s" for host, seconds in apart.items())
    detail = f"at most {spread:.2f} s apart" + (f" ({told})" if spread > CLOCK_SECONDS else "")
    yield Finding("clocks", "note" if spread > CLOCK_SECONDS else "ok", detail, "set them by NTP")


def _table(speeds: list[GroupSpeed]) -> Iterator[str]:
    yield f"{'group':<22} {'ranks':>5} {'backend':<8} {'all-reduce':>11} {'all-to-all':>11} {'broadcast':>11}  GB/s"
    for each in speeds:
        yield (
            f"{each.name:<22} {each.ranks:>5} {each.backend:<8} {each.all_reduce:>11.2f} {each.all_to_all:>11.2f} "
            f"{each.broadcast:>11.2f}"
        )
