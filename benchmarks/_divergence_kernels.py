"""Statistics, sums and gradient of logits that are there, against a copy of as many bytes on the same device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import _divergence_meters as meters
import torch
from _divergence_contestants import Case, Inputs, Loss, all_losses, relative_difference
from _divergence_table import Rival, Table

from opd_megatron.losses.kernels import choose_kernels, use_backend

COPY_LIMIT = 1 / 0.75  # three quarters of the copy's bandwidth


def kernel_pass(table: Table, case: Case, rounds: int, same: float) -> None:
    """Time of `Kernels.fused` over a case's logits for every divergence; `same`: how far backends may differ.

    It must read both matrices of logits and write one, three times a matrix's bytes; a copy of one moves two. The
    gradient goes to memory of its own, since logits that it has replaced would not be logits in the next round.
    """
    student, teacher = (logits.detach() for logits in Inputs.of(case).logits())
    out = torch.empty_like(student)
    mine = {loss.name: whole_pass("auto", loss, student, teacher, out) for loss in all_losses()}
    theirs = {loss.name: whole_pass("torch", loss, student, teacher, out) for loss in all_losses()}
    place = f"{case.logits_name} kernel"
    table.claim(
        f"{place}: gradients differ from those of torch operations", largest_difference(mine, theirs, out), same
    )
    everyone = {"copy": lambda: out.copy_(student), **mine, **{f"torch {name}": run for name, run in theirs.items()}}
    times = meters.race(everyone, rounds, case.device)
    milliseconds = times.milliseconds("copy")
    table.add(place, f"copy, {2 * student.nbytes / milliseconds / 1e6:,.0f} GB/s", {"ms": milliseconds})
    over_copy = {name: times.ratio(name, "copy") / 1.5 for name in mine}
    for name, ratio in over_copy.items():
        cells = {"ms": times.milliseconds(name), "/torch": times.ratio(name, f"torch {name}"), "/copy": ratio}
        table.add(place, name, cells)
    table.checks += Rival("/copy", ("copy",), COPY_LIMIT).check(place, over_copy)


def whole_pass(
    backend: str, loss: Loss, student: torch.Tensor, teacher: torch.Tensor, out: torch.Tensor
) -> Callable[[], None]:
    """`fused` on all rows, in blocks of the size that the backend asks for."""
    dtypes = [student.dtype, teacher.dtype]
    with use_backend(backend):
        kernels = choose_kernels(loss.divergence, 1.0, torch.float32, student.device, dtypes, student.numel())
    rows, columns = student.shape
    step = rows if kernels.block_elements is None else max(1, kernels.block_elements // columns)
    scale = torch.full((rows,), 1 / rows, device=student.device)

    def run() -> None:
        for block in (slice(start, start + step) for start in range(0, rows, step)):
            kernels.fused(student[block], teacher[block], scale[block], out[block])

    return run


def largest_difference(
    mine: Mapping[str, Callable[[], None]], theirs: Mapping[str, Callable[[], None]], out: torch.Tensor
) -> float:
    """Relative, over all divergences, of what both leave in `out`."""
    differences = []
    for name in mine:
        mine[name]()
        ours = out.clone()
        theirs[name]()
        differences.append(relative_difference(ours, out))
    return max(differences)
