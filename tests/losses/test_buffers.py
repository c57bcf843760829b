"""Memory that the loss uses again: it comes back by itself, and never while somebody still looks at it."""

import gc

import pytest
import torch

from opd_megatron.losses import linear_divergence
from opd_megatron.losses.core.buffers import BufferPool, gradient_memory, release_memory

CPU = torch.device("cpu")


def _empty(memory: BufferPool, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return memory.empty(shape, dtype, CPU)


class TestReusedMemory:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_looks_like_an_empty_tensor(self, dtype):
        result = _empty(BufferPool(keep=1, slack=1.0), 3, 5, dtype=dtype)
        assert (result.shape, result.dtype, result.is_contiguous()) == ((3, 5), dtype, True)
        assert result.fill_(2).sum() == 30
        assert _empty(BufferPool(keep=1, slack=1.0), 0, 5).shape == (0, 5)

    def test_a_freed_tensor_gives_its_memory_to_the_next(self):
        memory = BufferPool(keep=1, slack=1.0)
        first = _empty(memory, 100)
        place = first.data_ptr()
        del first
        assert _empty(memory, 100).data_ptr() == place

    @pytest.mark.parametrize("look", [lambda x: x[3:7], lambda x: x.detach(), lambda x: x.numpy(), lambda x: x.data])
    def test_memory_that_is_still_looked_at_is_not_lent_again(self, look):
        memory = BufferPool(keep=1, slack=1.0)
        view = look(_empty(memory, 100).fill_(1))
        _empty(memory, 100).fill_(2)
        gc.collect()
        assert (view == 1).all()

    def test_sizes_that_waste_more_than_the_slack_get_memory_of_their_own(self):
        memory = BufferPool(keep=1, slack=2.0)
        place = _empty(memory, 100).data_ptr()  # freed at once
        small, near = _empty(memory, 49), _empty(memory, 50)
        assert small.data_ptr() != place
        assert near.data_ptr() == place

    def test_keeps_no_more_than_it_should_and_releases_all_of_it(self):
        memory = BufferPool(keep=2, slack=1.0)
        tensors = [_empty(memory, size) for size in (100, 101, 102)]
        while tensors:
            tensors.pop(0)
        assert [len(whole) for whole in memory._free] == [404, 408]
        memory.release()
        assert not memory._free


class TestGradientOfTheHead:
    def _head_gradient(self, scale: float) -> torch.Tensor:
        torch.manual_seed(0)
        head = torch.randn(40, 8, requires_grad=True)
        hidden = torch.randn(6, 8)
        linear_divergence(scale * hidden, head, [(hidden, torch.randn(40, 8))])[0].backward()
        assert head.grad is not None
        return head.grad

    def test_survives_the_calls_that_follow(self):
        release_memory()
        kept = self._head_gradient(1.0)
        copy = kept.clone()
        for _ in range(3):
            self._head_gradient(2.0)
        assert torch.equal(kept, copy)

    def test_once_freed_serves_the_next_call(self):
        release_memory()
        place = self._head_gradient(1.0).data_ptr()
        assert len(gradient_memory._free) == 1
        assert self._head_gradient(1.0).data_ptr() == place

    @pytest.mark.parametrize("factor", [1.0, 3.0])
    def test_of_a_kept_graph_is_made_anew_by_every_backward(self, factor):
        head, hidden = torch.randn(40, 8, requires_grad=True), torch.randn(6, 8)
        loss = factor * linear_divergence(hidden, head, [(torch.randn(6, 8), torch.randn(40, 8))])[0]
        first, second = (torch.autograd.grad(loss, head, retain_graph=True)[0] for _ in range(2))
        last = torch.autograd.grad(loss, head)[0]
        expected = first.clone()
        first.zero_()  # whoever got it may do with it what it likes
        assert torch.equal(second, expected)
        assert torch.equal(last, expected)
