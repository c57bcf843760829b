"""The Triton backend without a GPU: its numbers under Triton's interpreter, its code compiled for an H100.

Triton decides when it is imported whether it interprets, so the numbers are tested in a pytest of their own, one for
all of them. By hand: TRITON_INTERPRET=1 python -m pytest tests/losses/test_triton_kernels.py
On a GPU `tests/gpu/test_triton_gpu.py` runs them without the interpreter.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.losses.divergences import DIVERGENCES, Divergence
from opd_megatron.losses.kernels.base import SUMS, Normalisers, Statistics
from opd_megatron.losses.kernels.torch.ops import TorchKernels
from tests.losses.reference import relative_error

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

PARAMETERS = (0.1, 0.5, 0.9)
FEW_PARAMETERS = {"forward_weight": (0.3,), "entry_clip": (0.05,)}
"""Where the formula is a sum, or cut, of those of others."""
KINDS = {
    name if family.argument is None else f"{name}-{parameter}": family.make(parameter)
    for name, family in DIVERGENCES.items()
    for parameter in (FEW_PARAMETERS.get(family.argument, PARAMETERS) if family.argument else (0.0,))
}
every_divergence = pytest.mark.parametrize("divergence", KINDS.values(), ids=KINDS)
one_of_each = pytest.mark.parametrize(
    "divergence",
    [next(kind for known, kind in KINDS.items() if known.partition("-")[0] == name) for name in DIVERGENCES],
    ids=DIVERGENCES,
)
every_temperature = pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])


def _normalisers(x: Statistics) -> Normalisers:
    return Normalisers(x.student_max, x.student_sum.log(), x.teacher_max, x.teacher_sum.log())


def _triton(divergence: Divergence, temperature: float = 1.0):
    from opd_megatron.losses.kernels.triton.ops import TritonKernels

    return TritonKernels(divergence, temperature)


def _exact(divergence: Divergence, temperature: float = 1.0) -> TorchKernels:
    return TorchKernels(divergence, temperature, torch.float64, DEVICE)


def logits(rows: int, columns: int, *dtypes: torch.dtype) -> list[torch.Tensor]:
    """Student and teacher whose rows lie further apart than they are long, with garbage in between."""
    torch.manual_seed(columns)
    pair = [1.5 * torch.randn(rows, columns + q_minus_p) for q_minus_p in (16, 5)]
    for x in pair:
        x[:, columns:] = math.nan
    return [x.to(dtype)[:, :columns] for x, dtype in zip(pair, dtypes, strict=True)]


def check_against_float64(
    divergence: Divergence, temperature: float, student: torch.Tensor, teacher: torch.Tensor
) -> None:
    """`fused` and the three stages, these in place, against float64."""
    scale, gradient = torch.linspace(0.5, -2, len(student)), torch.empty(student.shape, dtype=torch.float64)
    statistics, sums = _exact(divergence, temperature).fused(student, teacher, scale.double(), gradient)
    kernels, out, staged_out = _triton(divergence, temperature), torch.full_like(student, math.nan), student.clone()
    own_statistics, own_sums = kernels.fused(student, teacher, scale, out)
    staged = kernels.statistics(student, teacher)
    staged_sums = kernels.sums(student, teacher, _normalisers(staged))
    kernels.gradient(staged_out, teacher, _normalisers(staged), scale, scale * staged_sums[-1], staged_out)

    limit = 1e-5 if student.dtype == torch.float32 else 2e-2
    for own in (own_statistics, staged):
        for name, value in own._asdict().items():
            assert relative_error(value, getattr(statistics, name)) <= 1e-5, name
    for own in (own_sums, staged_sums):
        assert own.dtype == torch.float32
        for name, value, expected in zip(SUMS, own, sums, strict=True):
            # The pull of forward KL sums to 0, so that sum's error is measured against the 1 that p sums to.
            error = (value - expected).abs().max() if name == "weighted_grad" else relative_error(value, expected)
            assert error <= 1e-5, name
    for own in (out, staged_out):
        assert own.dtype == student.dtype
        assert relative_error(own, gradient) <= limit


class Numbers:
    @pytest.fixture(autouse=True)
    def _on_the_device(self) -> Iterator[None]:
        with DEVICE:
            yield

    @every_divergence
    @every_temperature
    def test_every_stage_equals_float64(self, divergence: Divergence, temperature: float) -> None:
        check_against_float64(divergence, temperature, *logits(1, 1300, torch.float32, torch.float32))

    @one_of_each
    def test_bf16_student_and_an_fp32_mixture_of_teachers(self, divergence: Divergence) -> None:
        check_against_float64(divergence, 2.0, *logits(2, 1300, torch.bfloat16, torch.float32))

    @pytest.mark.parametrize("columns", [2, 7, 8, 1023, 1024, 1025, 3333])
    def test_any_number_of_columns(self, columns: int) -> None:
        dtype = [torch.float32, torch.bfloat16, torch.float16][columns % 3]
        check_against_float64(KINDS["gkd-0.5"], 1.0, *logits(1 + columns % 2, columns, dtype, dtype))

    def test_one_column_holds_all_probability(self) -> None:
        student, teacher = logits(3, 1, torch.float32, torch.float32)
        _, sums = _triton(KINDS["gkd-0.5"]).fused(student, teacher, torch.ones(3), student)
        assert (sums[:-1] == 0).all()
        assert (student == 0).all()

    def test_in_place_or_without_a_gradient_the_numbers_are_the_same(self) -> None:
        student, teacher = logits(2, 2500, torch.bfloat16, torch.bfloat16)
        before, kernels, scale = student.clone(), _triton(KINDS["lambda_jsd-0.1"]), torch.tensor([1.0, -3.0])
        out = torch.empty_like(before)
        results = [kernels.fused(student, teacher, scale, target) for target in (out, None)]
        assert torch.equal(student, before)
        results.append(kernels.fused(student, teacher, scale, student))
        assert torch.equal(student, out)
        for statistics, sums in results[1:]:
            assert torch.equal(torch.stack(statistics), torch.stack(results[0][0]))
            assert torch.equal(sums, results[0][1])

    @one_of_each
    def test_masked_rows_are_exactly_zero_whatever_they_hold(self, divergence: Divergence) -> None:
        student, teacher = logits(4, 1100, torch.float32, torch.float32)
        student[0], student[1, 3], teacher[2, 1050] = math.nan, math.inf, math.nan
        scale = torch.tensor([0.0, 0.0, 0.0, 1.0])
        kernels, out, expected = _triton(divergence), torch.full_like(student, math.nan), torch.empty(4, 1100)
        kernels.fused(student, teacher, scale, out)
        _exact(divergence).fused(student[3:], teacher[3:], scale[3:].double(), expected[3:])
        staged, norm = torch.full_like(student, math.nan), _normalisers(kernels.statistics(student, teacher))
        shared = torch.where(scale == 0, 0, scale * kernels.sums(student, teacher, norm)[-1])
        kernels.gradient(student, teacher, norm, scale, shared, staged)
        for own in (out, staged):
            assert (own[:3] == 0).all()
            assert relative_error(own[3], expected[3]) <= 1e-5

    @one_of_each
    def test_a_nan_logit_is_not_hidden(self, divergence: Divergence) -> None:
        student, teacher = logits(3, 1100, torch.float32, torch.float32)
        student[0], teacher[1, 1050], student[2, 7] = math.nan, math.nan, math.nan
        _, sums = _triton(divergence).fused(student, teacher, torch.ones(3), student)
        assert sums[SUMS.index("value")].isnan().all()
        assert student.isnan().any(dim=1).all()

    @one_of_each
    def test_impossible_columns_and_huge_logits(self, divergence: Divergence) -> None:
        student, teacher = logits(6, 1100, torch.float32, torch.float32)
        for x in (student, teacher):
            x[:, [5, 700, 1099]] = -math.inf  # impossible under both models
        student[0, :4], teacher[0, :4] = torch.tensor([1e4, -1e4, 1e4, 5]), torch.tensor([1e4, 1e4, 9.99e3, 0])
        student[1], teacher[1] = 7.0, 7.0
        teacher[2], teacher[2, 1050] = -1e4, 1e4
        student[3], student[3, 1], teacher[3] = -1e4, 1e4, student[3]
        teacher[4] = student[4] = -math.inf
        scale, gradient, out = torch.ones(6), torch.empty(6, 1100).double(), torch.empty(6, 1100)
        statistics, sums = _exact(divergence, 0.5).fused(student, teacher, scale, gradient)
        own_statistics, own = _triton(divergence, 0.5).fused(student, teacher, scale, out)
        torch.testing.assert_close(torch.stack(own_statistics).double(), torch.stack(statistics), rtol=1e-5, atol=0)
        torch.testing.assert_close(own.double(), sums, rtol=1e-5, atol=2e-6)
        # p (r - KL): of a KL of 2e4 nats, fp32 knows no more than this.
        assert ((out - gradient).abs() <= 1e-4 * gradient.abs() + 5e-7 * (2 + sums.abs().amax(0)[:, None])).all()

    @every_divergence
    def test_a_tiny_divergence_keeps_its_digits(self, divergence: Divergence) -> None:
        student, noise = logits(2, 2500, torch.float32, torch.float32)
        exact, gradient, scale, size = _exact(divergence), torch.empty(2, 2500).double(), torch.ones(2), 0.01
        for _ in range(2):  # the noise that makes a divergence of 1e-4
            teacher = student + size * noise
            expected = exact.fused(student, teacher, scale.double(), gradient)[1][SUMS.index("value")]
            size *= (1e-4 / expected.mean().item()) ** 0.5
        value = _triton(divergence).fused(student, teacher, scale, student)[1][SUMS.index("value")]
        assert 5e-5 < expected.min() < expected.max() < 2e-4
        assert ((value - expected).abs() / expected).max() <= 1e-3
        assert relative_error(student, gradient) <= 1e-3

    def test_the_first_of_equal_largest_logits_counts(self) -> None:
        student, teacher = torch.zeros(4, 3000), torch.randn(4, 3000)
        places = [(0,), (17, 16, 2999), (2050, 1030), (2999,)]
        for row, columns in enumerate(places):
            student[row, list(columns)] = 1.0
        result = _triton(KINDS["reverse_kl"]).statistics(student, teacher)
        first = torch.tensor([min(columns) for columns in places])
        assert torch.equal(result.teacher_at_student_max, teacher[torch.arange(4), first])

    @one_of_each
    def test_sums_of_column_shards_add_up(self, divergence: Divergence) -> None:
        student, teacher = logits(2, 2100, torch.float32, torch.float32)
        kernels = _triton(divergence)
        norm = _normalisers(kernels.statistics(student, teacher))
        parts = [kernels.sums(student[:, c], teacher[:, c], norm) for c in (slice(1050), slice(1050, None))]
        whole = kernels.sums(student, teacher, norm)
        torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("name", "low"), [("expm1", -80.0), ("log1p", -0.5)])
    def test_small_arguments_keep_their_digits(self, name: str, low: float) -> None:
        import triton
        import triton.language as tl

        from opd_megatron.losses.kernels.triton import math as triton_math

        function = getattr(triton_math, name)

        @triton.jit
        def apply(x, y, function: tl.constexpr):
            columns = tl.program_id(0) * 1024 + tl.arange(0, 1024)
            tl.store(y + columns, function(tl.load(x + columns)))

        magnitudes = 10.0 ** torch.linspace(-7, math.log10(80), 2**13, dtype=torch.float64)
        x = torch.cat([magnitudes, -magnitudes]).clamp(min=low).float()
        y = torch.empty_like(x)
        apply[(len(x) // 1024,)](x, y, function)
        expected = getattr(torch, name)(x.double())
        # exp's argument in fp32 is worth |x| * 6e-8.
        assert ((y - expected).abs() / expected.abs() <= 1e-6 + 1e-7 * x.abs()).all()


class TestNumbersUnderTheInterpreter(Numbers):
    __test__ = INTERPRETED


def _compile(kernel, constants: dict[str, Any], warps: int, student: str, teacher: str, odd: tuple[str, ...] = ()):
    """What an H100 would run, of arguments divisible by 16 except the `odd` ones."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"student": f"*{student}", "teacher": f"*{teacher}", "out": f"*{student}", "inverse": "fp32"}
    types |= dict.fromkeys(("norms", "coefs", "scales", "result"), "*fp32")
    constants = {**constants, "lanes": 32 * warps}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if name not in ("rows", "inverse", *constants, *odd)]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


class TestWithoutTheInterpreter:
    __test__ = not INTERPRETED

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    def test_numbers_under_the_interpreter(self) -> None:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr

    def test_losses_are_imported_without_triton(self) -> None:
        code = "import opd_megatron.losses.kernels.triton.ops, sys; print('triton' in sys.modules)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "False"

    @pytest.fixture(autouse=True)
    def _compiles_afresh(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")

    @one_of_each
    def test_everything_compiles_for_hopper_and_stays_in_registers(
        self, divergence: Divergence, capfd: pytest.CaptureFixture[str]
    ) -> None:
        from opd_megatron.losses.kernels.triton.ops import _code

        kernel, constants = _code(divergence).fused
        ptx = _compile(kernel, constants, 16, "bf16", "bf16").asm["ptx"]
        spilled = re.findall(r"(\d+) bytes spill stores", capfd.readouterr().out)
        assert spilled
        assert max(map(int, spilled)) <= 32
        assert ".f64" not in ptx  # a literal must not promote a tile
        loads = re.findall(r"ld\.global(\.v4)?\.b(?:16|32) ", ptx)
        assert loads.count(".v4") == 12  # whole and masked tiles of two models in three passes

    def test_every_stage_compiles_for_hopper(self) -> None:
        from opd_megatron.losses.kernels.triton.ops import _code

        code = _code(KINDS["gkd-0.1"])
        for dtypes in (("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")):
            for kernel, constants in (code.statistics, code.sums, code.gradient, code.values):
                assert _compile(kernel, constants, 4, *dtypes).asm["cubin"]

    def test_an_odd_vocabulary_does_not_split_the_loads_of_whole_tiles(self) -> None:
        from opd_megatron.losses.kernels.triton.ops import _code

        kernel, constants = _code(KINDS["reverse_kl"]).gradient
        ptx = _compile(kernel, constants, 4, "bf16", "bf16", odd=("n",)).asm["ptx"]
        assert ptx.count("ld.global.v4.b32") == 2
        assert ptx.count("st.global.v4.b32") >= 1
