"""On an NVIDIA GPU: the Triton kernels at the widths of real vocabularies, and the forms of the loss that use them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from opd_megatron.losses import linear_divergence, vocab_parallel_divergence
from opd_megatron.losses.divergences import DIVERGENCES
from opd_megatron.losses.kernels import choose_kernels
from opd_megatron.losses.kernels.triton.ops import TritonKernels
from tests.losses.reference import dense_divergence, relative_error
from tests.losses.test_triton_kernels import KINDS, Numbers, check_against_float64, logits, one_of_each

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


class TestNumbers(Numbers):
    """What the interpreter is asked elsewhere."""


def test_a_gpu_gets_this_backend() -> None:
    logits = (torch.bfloat16, torch.float32)
    kernels = choose_kernels(KINDS["reverse_kl"], 1.0, torch.float32, torch.device("cuda"), logits, 1)
    assert isinstance(kernels, TritonKernels)


@one_of_each
@pytest.mark.parametrize("columns", [19008, 152064])
def test_bf16_logits_of_a_whole_vocabulary(divergence, columns: int) -> None:
    with torch.device("cuda"):
        check_against_float64(divergence, 0.7, *logits(33, columns, torch.bfloat16, torch.bfloat16))


def test_a_vocabulary_that_no_vector_load_fits() -> None:
    with torch.device("cuda"):
        student, teacher = (x.contiguous() for x in logits(33, 50257, torch.bfloat16, torch.float32))
        check_against_float64(KINDS["gkd-0.5"], 1.0, student, teacher)


def test_rows_beyond_two_to_the_31_elements() -> None:
    columns, stride = 4096, 2**31
    far = torch.empty(stride + columns, dtype=torch.bfloat16, device="cuda").as_strided((2, columns), (stride, 1))
    far.copy_(torch.randn(2, columns, device="cuda"))
    teacher, kernels, scale = torch.randn(2, columns, device="cuda"), TritonKernels(KINDS["gkd-0.5"], 1.0), far[:, 0]
    expected, student = torch.empty(2, columns, dtype=torch.bfloat16, device="cuda"), far.contiguous()
    _, sums = kernels.fused(student, teacher, scale.float(), expected)
    _, far_sums = kernels.fused(far, teacher, scale.float(), far)
    assert torch.equal(far, expected)
    assert torch.equal(far_sums, sums)


def test_a_row_gets_the_same_bits_in_any_batch() -> None:
    with torch.device("cuda"):
        student, teacher = logits(300, 19008, torch.bfloat16, torch.bfloat16)
        kernels, scale = TritonKernels(KINDS["lambda_jsd-0.1"], 1.0), torch.ones(300)
        _, alone = kernels.fused(student[7:8], teacher[7:8], scale[:1], None)
        _, together = kernels.fused(student, teacher, scale, None)
    assert torch.equal(alone[:, 0], together[:, 7])


@pytest.mark.parametrize("type", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_both_forms_equal_dense_float64(type: str, dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    shapes = [(128, 256), (19008, 256), (128, 192), (19008, 192)]
    hidden, head, t_hidden, t_head = (
        (torch.randn(shape, device="cuda") * shape[1] ** (-0.25)).to(dtype).requires_grad_(i < 2)
        for i, shape in enumerate(shapes)
    )
    dense = [x.detach().double().requires_grad_() for x in (hidden, head)]
    logits_of = [dense[0] @ dense[1].T, t_hidden.double() @ t_head.double().T]
    expected = dense_divergence(logits_of[0], logits_of[1:], type, temperature=2.0)
    expected_logits, *expected_gradients = torch.autograd.grad(expected.sum(), (logits_of[0], *dense))

    student = logits_of[0].detach().to(dtype).requires_grad_()
    loss = vocab_parallel_divergence(student, logits_of[1].to(dtype), type=type, temperature=2.0)
    loss.sum().backward()
    assert relative_error(loss, expected) <= limit
    assert relative_error(student.grad, expected_logits) <= limit

    loss_sum, per_token = linear_divergence(hidden, head, [(t_hidden, t_head)], type=type, temperature=2.0)
    loss_sum.backward()
    assert relative_error(per_token, expected) <= limit
    for x, gradient in zip((hidden, head), expected_gradients, strict=True):
        assert relative_error(x.grad, gradient) <= limit
