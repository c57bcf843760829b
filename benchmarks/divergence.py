"""Speed and memory of the divergence engine against bare matrix products, dense autograd, Liger-Kernel and TRL.

A case TxHxV is `linear_divergence`, forward and backward, on random hidden states and heads whose logits have a
standard deviation of 3. Contestants run in turn, round after round; a ratio is the median over the rounds of the two
times within a round. The bare products are the four that no exact method can do without (both forwards, both
gradients), whole, into memory that is already there; they run before every run of ours that is compared with them.
Dense is autograd over products in the inputs' dtype and an fp32 softmax: every type of ours is compared with the
fastest of three. Liger is LigerFusedLinearJSDLoss with its own chunk size, compiled on a GPU only; every type is
compared with it, though it computes the Jensen-Shannon divergence alone. TRL is the chunked divergence of its
DistillationTrainer, for the three types that it has; the fastest of them counts. That contestants compute the same loss
and gradients is a check too.

Memory is what torch's allocator handed out above the inputs, in multiples of the fp32 student logits [T, V].
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import _divergence_meters as meters  # before torch: it keeps the profiler quiet
import torch
from _divergence_contestants import (
    DENSE,
    LIGER_LOSS,
    TRL_BETAS,
    Case,
    Contestant,
    Inputs,
    Loss,
    all_losses,
    bare_products,
    dense,
    dense_from_logits,
    difference,
    liger,
    ours,
    ours_from_logits,
    trl,
)
from _divergence_kernels import kernel_pass
from _divergence_table import Rival, Table
from harness import BenchmarkError, Report, main

BARE = "bare products"
PAIRS = 3
"""Pairs of a run of ours and one of the bare products in the time of a round; the peers take ten times as long."""
HELD_LIMIT, PEAK_LIMIT = 1.0, 2.0
# Beside [T, V] a few numbers for each token exist, such as its divergence: with them a peak of two is 2 + 1e-4.
NUMBERS_A_TOKEN = 16
# fp32 vectors [H] a token: d hidden as it is kept, as it is scaled, and rounded. A whole [T, V] would be V / H.
GROWTH_LIMIT = 2.5
# Largest relative difference of loss and gradients that rounding explains.
SAME = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
SAME_AS_LIGER = {torch.float32: 1e-4, torch.bfloat16: 1e-1}  # its softmax is in the inputs' dtype


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured on one device."""

    linear: tuple[Case, ...]
    """From hidden states and heads."""
    logits: tuple[Case, ...]
    """From logits."""
    kernels: tuple[Case, ...]
    """Of the GPU's kernels alone."""
    growth: Case
    """Of memory with T, from four chunks of tokens to sixteen."""
    rounds: int
    bare_limit: float | None
    """Of the ratio to the bare products; None where cases are too small for a claim."""


def make_plan(device: str, *, quick: bool, rounds: int) -> Plan:
    single = torch.float32
    if device == "cuda":
        shard = Case(8192, 4096, 152064 // 8, device=device)
        cases: tuple[Case, ...] = (shard,) if quick else (shard, replace(shard, columns=152064))
        return Plan(cases, (), cases, shard, rounds, bare_limit=1.15)
    if quick:
        # Large enough for what is allocated at a time to come fresh from the system, as in real sizes.
        small = Case(256, 576, 32768)
        few, many = replace(small, tokens=64, dtype=single), replace(small, tokens=1024)
        return Plan((small,), (few,), (), many, rounds=3, bare_limit=None)
    first, second = Case(1024, 576, 49152), Case(512, 1024, 151936)
    linear, logits = (first, second, replace(first, dtype=single)), (replace(first, dtype=single), first)
    return Plan(linear, logits, (), first, rounds, bare_limit=1.25)


@dataclass(frozen=True, slots=True)
class Peer:
    """Somebody else's way to one of our divergences."""

    contestant: Contestant
    loss: Loss
    column: str
    """Of the ratio to it; where several share one, the fastest of them counts."""
    same: float
    """Relative difference of loss and gradients from ours that rounding explains."""


def contest(
    table: Table,
    name: str,
    case: Case,
    plan: Plan,
    mine: Mapping[str, Contestant],
    peers: Mapping[str, Peer],
    bare: Callable[[], None] | None = None,
) -> dict[str, meters.Memory]:
    """A row for each contestant, and the claims that ours compute the same as the peers and in less time."""
    agree(table, name, mine, peers)
    theirs = {peer_name: peer.contestant for peer_name, peer in peers.items()}
    rivals = rivals_of(peers, None if bare is None else 1.0)  # from logits: shown, not claimed
    over_bare: Mapping[str, float] = {}
    if bare is not None:
        ratios = meters.beside(bare, mine, PAIRS * plan.rounds, case.device)
        table.add(name, BARE, {"ms": ratios.milliseconds})
        over_bare = ratios.of
        table.checks += Rival("/bare", (), plan.bare_limit).check(name, over_bare)
    times = meters.race({**mine, **theirs}, plan.rounds, case.device)
    memory = {contestant: meters.memory(way) for contestant, way in {**mine, **theirs}.items()}
    for contestant, used in memory.items():
        cells = {"ms": times.milliseconds(contestant)}
        cells |= {"held": used.held / case.logits_bytes, "peak": used.peak / case.logits_bytes}
        if contestant in mine:
            cells |= {"/bare": over_bare[contestant]} if over_bare else {}
            cells |= {rival.column: times.ratio(contestant, *rival.names) for rival in rivals}
        table.add(name, contestant, cells)
    for rival in rivals:
        table.checks += rival.check(name, {x: times.ratio(x, *rival.names) for x in mine})
    return memory


def rivals_of(peers: Mapping[str, Peer], limit: float | None) -> list[Rival]:
    columns = dict.fromkeys(peer.column for peer in peers.values())
    return [Rival(column, tuple(x for x, peer in peers.items() if peer.column == column), limit) for column in columns]


def agree(table: Table, name: str, mine: Mapping[str, Contestant], peers: Mapping[str, Peer]) -> None:
    """Claims that the peers compute the same as ours: a comparison with something else would be worth nothing."""
    for peer_name, peer in peers.items():
        off = difference(mine[peer.loss.name], peer.contestant)
        table.claim(f"{name}: loss and gradients differ from {peer_name}", off, peer.same)


def linear_contestants(case: Case) -> tuple[Inputs, dict[str, Contestant], dict[str, Peer]]:
    """Ours, and on a GPU, whose memory dense logits would fill, our own torch operations in the place of dense ones."""
    inputs = Inputs.of(case)
    mine = {loss.name: ours(inputs, loss) for loss in all_losses()}
    same, peers = SAME[case.dtype], {}
    for loss in DENSE:
        if case.device == "cuda":
            peers[f"torch {loss.name}"] = Peer(ours(inputs, loss, backend="torch"), loss, "/torch", same)
        else:
            peers[f"dense {loss.name}"] = Peer(dense(inputs, loss), loss, "/dense", same)
    for loss in TRL_BETAS:
        peers[f"TRL {loss.name}"] = Peer(trl(inputs, loss), loss, "/TRL", same)
    peers[f"Liger {LIGER_LOSS.name}"] = Peer(liger(inputs), LIGER_LOSS, "/Liger", SAME_AS_LIGER[case.dtype])
    return inputs, mine, peers


def same_numbers(table: Table, device: str) -> None:
    """That all compute the same function shows in fp32, where little is rounded."""
    case = Case(64, 256, 32768, torch.float32, device)
    _, mine, peers = linear_contestants(case)
    agree(table, case.name, mine, peers)


def linear_form(table: Table, case: Case, plan: Plan) -> None:
    """Time and memory of every divergence from hidden states and heads."""
    inputs, mine, peers = linear_contestants(case)
    contest(table, case.name, case, plan, mine, peers, bare_products(inputs))


def logits_form(table: Table, case: Case, plan: Plan) -> None:
    """Time and memory of every divergence from logits that are there."""
    logits = Inputs.of(case).logits()
    mine = {loss.name: ours_from_logits(*logits, loss) for loss in all_losses()}
    peers = {
        f"dense {loss.name}": Peer(dense_from_logits(*logits, loss), loss, "/dense", SAME[case.dtype]) for loss in DENSE
    }
    name = f"{case.logits_name} logits"
    memory = contest(table, name, case, plan, mine, peers)
    held, peak = (max(getattr(memory[x], what) for x in mine) / case.logits_bytes for what in ("held", "peak"))
    table.claim(f"{name}: held between forward and backward, in fp32 logits", held, HELD_LIMIT)
    table.claim(f"{name}: peak, in fp32 logits", peak, PEAK_LIMIT + NUMBERS_A_TOKEN / case.columns)


def growth(table: Table, case: Case) -> None:
    """Peak of the linear form on four and on sixteen chunks of one size: they differ by what a token needs."""
    chunk = case.tokens // 16
    peaks = []
    for chunks in (4, 16):
        size = replace(case, tokens=chunks * chunk)
        contestant = ours(Inputs.of(size), LIGER_LOSS, chunk_tokens=chunk)
        contestant()
        memory = meters.memory(contestant)
        cells = {"held": memory.held / size.logits_bytes, "peak": memory.peak / size.logits_bytes}
        table.add(size.name, f"{LIGER_LOSS.name}, chunk {chunk}", cells)
        peaks.append(memory.peak)
    vectors = (peaks[1] - peaks[0]) / (12 * chunk) / (4 * case.hidden)
    name = f"{case.name}, chunks of {chunk}: growth of the peak a token, in fp32 vectors [{case.hidden}]"
    table.claim(name, vectors, GROWTH_LIMIT)


def measure(arguments: argparse.Namespace) -> Report:
    table = Table()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if arguments.device not in (None, *devices):
        raise BenchmarkError(f"--device {arguments.device}: torch sees no such device here, leave the option out")
    for device in [arguments.device] if arguments.device else devices:
        plan = make_plan(device, quick=arguments.quick, rounds=arguments.rounds)
        same_numbers(table, device)
        for case in plan.linear:
            linear_form(table, case, plan)
        for case in plan.logits:
            logits_form(table, case, plan)
        for case in plan.kernels:
            kernel_pass(table, case, plan.rounds, SAME[case.dtype])
        growth(table, plan.growth)
    return table.report(
        f"Milliseconds are medians of {plan.rounds} rounds ({torch.get_num_threads()} threads), ratios medians of the "
        "rounds' ratios, to the fastest of the dense losses. Memory is above the inputs, in fp32 student logits; held "
        "is between forward and backward, with buffers that are kept for the next call."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="measure one of them; by default all there are")
    parser.add_argument("--rounds", type=int, default=3, help="times that every contestant runs, 3 with --quick")


if __name__ == "__main__":
    main("divergence", __doc__, measure, add_arguments)
