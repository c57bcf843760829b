"""The CPU platform: the one file that patches Megatron-Core and torch, and only on a machine without a GPU.

Megatron-Core names the CUDA device in factory calls, asks the CUDA generator for random states and compares
`tensor.type()` with CUDA strings. `init_platform` redirects exactly those to their CPU counterparts, once per
process and before a model is built. With a GPU it does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import itertools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

from opd_megatron.errors import ConfigError, one_line
from opd_megatron.system.groups import DEFAULT_TIMEOUT, collective_timeout
from opd_megatron.system.network import check_reachable
from opd_megatron.system.numa import stay_near
from opd_megatron.system.ranks import Ranks, forget, launched

_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like", "ones_like")
_CPU_TYPE_PREFIX, _CUDA_TYPE_PREFIX = "torch.", "torch.cuda."
_applied = False
_PATIENCE_SECONDS = 20.0


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """Returns the device of this rank's models."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def release_memory() -> None:
    """Returns freed memory to the system after work that needed much more than a step does.

    glibc keeps it for itself otherwise; the GPU's caching allocator needs no such help.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def free_caches() -> None:
    """Gives the GPU memory back that the caching allocator keeps, so that another process can take it."""
    if has_gpu():
        gc.collect()
        torch.cuda.empty_cache()


def quiet_upstream() -> None:
    """Drops warnings about things that are as they should be here: no Apex, torch names that upstream still uses."""
    for message in (".*Apex.*", ".*full scope is deprecated.*", ".*CUDA_DEVICE_MAX_CONNECTIONS.*"):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    for message in (".*torch.distributed.*deprecated.*", ".*deprecating ShardedTensor.*", ".*`load_state_dict` is.*"):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*not a leaf Tensor is being accessed.*", category=UserWarning)


def init_platform() -> None:
    """Makes Megatron-Core runnable on this machine. Idempotent."""
    global _applied
    if _applied:
        return
    _applied = True
    quiet_upstream()
    if has_gpu():
        torch.cuda.set_device(_gpu_of_this_rank())
        gpu: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        stay_near(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0")
    else:
        _patch_torch_cuda()
        _patch_factories()
        _patch_type_checks()
        _patch_lone_collectives()
        _patch_token_dispatch()
        _patch_uneven_collectives()
    _patch_adam_loading()
    _patch_router()
    from megatron.core import parallel_state

    # The stock attention and sequence-parallel linears ask for this buffer; upstream makes it in
    # `initialize_model_parallel`, which we do not call because process groups are arguments here.
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    _seed_rng_tracker()


_meetings = itertools.count()


def _gpu_of_this_rank() -> int:
    """Index of its GPU, among those that this node's ranks share.

    Raises ConfigError when there are fewer than ranks.
    """
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = f"{gpus} GPUs" + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else "")
        raise ConfigError(
            f"{ranks} ranks were started on this node, which has {seen}: each needs one of its own, "
            f"start {gpus} (NPROC_PER_NODE={gpus}) or make more GPUs visible"
        )
    return int(os.environ.get("LOCAL_RANK", "0"))


def let_transfers_overtake(tensor: int) -> None:
    """Has the GPU take work in the order that it was given, so that tensor-parallel transfers begin before the products
    that hide them (Megatron-Core, `tensor_parallel/layers.py`). Before CUDA starts; a user's own setting stays."""
    if tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def init_distributed(*, start_timeout: float = DEFAULT_TIMEOUT, patience: float = DEFAULT_TIMEOUT) -> None:
    """Joins the default process group from torchrun's environment, or makes one of a single rank.

    Args:
        start_timeout: seconds for all ranks to come.
        patience: seconds that a rank waits for the others in a collective, also in those of groups made later.

    Raises:
        ConfigError: this node has more ranks than GPUs, or an address that no other reaches, or not all ranks came in
            time.
    """
    init_platform()
    if dist.is_initialized():
        return
    ranks = launched()
    if ranks is None:
        forget()
        # An in-memory store needs no port, so that two plain runs on one machine never collide.
        dist.init_process_group(
            _backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=patience)
        )
        return
    check_reachable(ranks)
    with _telling_who_is_waited_for(ranks, start_timeout):
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=start_timeout)))
        # Ranks that meet again, for another model, must not find where the groups of the last time were.
        store = dist.PrefixStore(f"meeting_{next(_meetings)}", store)
        dist.init_process_group(
            _backend(), store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=patience),
            # Groups are split from one communicator then, and messages between two ranks need none of their own.
            device_id=device() if has_gpu() else None,
        )  # fmt: skip


def narrow_world(size: int) -> None:
    """Makes the first `size` ranks the default process group of each other, so that what asks for "all ranks"
    (checkpoints, Megatron) means those that hold the student. Groups made before still reach beyond. Collective.

    The other ranks keep the whole world, where they have their own number.
    """
    group = dist.new_group(list(range(size)), timeout=collective_timeout())
    if dist.get_rank() < size:
        # A rank's number is the same in both, which is what torch reckons with when it looks a group's ranks up.
        dist.distributed_c10d._update_default_pg(group)


def start_store() -> dist.Store:
    """The store that all ranks met at; call it before `narrow_world`."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


@contextlib.contextmanager
def _telling_who_is_waited_for(ranks: Ranks, patience: float) -> Iterator[None]:
    """Says after a while that other ranks have not come: silence would look like a hang. In the end it is an error."""
    text = (
        f"rank {ranks.rank} of {ranks.world_size} is waiting for the others at {ranks.meeting_point}: are all of them "
        "started, with the same MASTER_ADDR and MASTER_PORT?"
    )
    timer = threading.Timer(_PATIENCE_SECONDS, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    except dist.DistError as error:
        raise ConfigError(
            f"rank {ranks.rank} of {ranks.world_size} did not meet the others at {ranks.meeting_point} within "
            f"parallel.start_timeout={patience:g} s ({one_line(error)}): start all of them with the same MASTER_ADDR, "
            "MASTER_PORT and number of nodes; `opd-megatron doctor` shows the interface that is used, INTERFACE sets it"
        ) from error
    finally:
        timer.cancel()


def _backend() -> str:
    # Gloo beside NCCL carries the Python objects (rollouts, statuses) that live on the CPU.
    return "cpu:gloo,cuda:nccl" if has_gpu() else "gloo"


def _patch_torch_cuda() -> None:
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu  # passed on as `device=` by tensor-parallel layers, buffers and schedules
    cuda.set_device = lambda *_: None  # called by dist_checkpointing's writer processes
    cuda.synchronize = lambda *_: None  # called around pipeline communication and checkpoint writes
    cuda.empty_cache = lambda: None  # called when optimizer state is offloaded
    cuda.manual_seed = torch.manual_seed  # the model-parallel RNG tracker seeds through these three
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    cuda.reset_peak_memory_stats = lambda *_: None  # called at the start of a checkpoint load

    from megatron.core.tensor_parallel import random as mcore_random

    # These two bypass torch.cuda's public functions and reach for the CUDA generators themselves.
    mcore_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _patch_factories() -> None:
    def redirect(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return wrapper

    # `with torch.device("meta")`, which transformers loads models under, recognises factories by identity. Let it
    # remember the real ones before they are replaced; the wrappers call those.
    _device_constructors()
    for name in _FACTORIES:  # token counters, norms and found-inf flags are made with device="cuda"
        setattr(torch, name, redirect(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self  # tied embeddings are moved with .cuda() before their all-reduce


def _patch_lone_collectives() -> None:
    """A data-parallel group of one rank gathers and scatters a buffer into itself; gloo copies it all the same."""
    from megatron.core.distributed import param_and_grad_buffer

    def skip_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def wrapper(output: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if output.numel() == source.numel():
                assert output.data_ptr() == source.data_ptr(), "a shard of a buffer is a view of it"
                return None
            return collective(output, source, *args, **kwargs)

        return wrapper

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(param_and_grad_buffer, name, skip_alone(getattr(param_and_grad_buffer, name)))


class _InertStream:
    """A stream, or an event in one, where everything has happened by the time it is asked for. There is only one."""

    _only: _InertStream | None = None

    def __new__(cls, *_: Any, **__: Any) -> _InertStream:
        cls._only = cls._only or super().__new__(cls)
        return cls._only

    def wait_stream(self, stream: _InertStream) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> _InertStream:
        return self


def _patch_token_dispatch() -> None:
    """The all-to-all dispatcher of expert layers copies its counts to the host on a stream of its own."""
    cuda: Any = torch.cuda
    # Made by the dispatcher's constructor. A class, as the original is: libraries imported later annotate with it.
    cuda.Stream = cuda.Event = _InertStream
    cuda.current_stream = lambda *_: _InertStream()  # compared with and waited for by the dispatcher's stream
    cuda.stream = lambda *_: contextlib.nullcontext()  # entered around the copies
    from megatron.core.transformer.moe import token_dispatcher

    original = token_dispatcher.maybe_move_tensor_to_cpu

    @functools.wraps(original)
    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Upstream leaves alone what is on the CPU already, also where a NumPy array of sizes is asked for.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu


def _patch_uneven_collectives() -> None:
    """Tensor-parallel ranks gather tokens of which each has another number, routed to the same experts. Gloo's gather
    and reduce-scatter want equal numbers; its all-to-all does not."""
    from megatron.core.tensor_parallel import mappings

    even_gather, even_reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(input_: torch.Tensor, group: dist.ProcessGroup, sizes: Any = None, buffer: bool = False) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even_gather(input_, group, sizes, buffer)
        output = input_.new_empty(sum(sizes), *input_.shape[1:])
        copies = torch.cat([input_] * group.size())
        dist.all_to_all_single(output, copies, list(sizes), [len(input_)] * group.size(), group=group)
        return output

    def reduce_scatter(
        input_: torch.Tensor, group: dist.ProcessGroup, sizes: Any = None, buffer: bool = False
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even_reduce_scatter(input_, group, sizes, buffer)
        mine = sizes[group.rank()]
        parts = input_.new_empty(group.size(), mine, *input_.shape[1:])
        dist.all_to_all_single(
            parts.flatten(0, 1), input_.contiguous(), [mine] * group.size(), list(sizes), group=group
        )
        return parts.sum(0)

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, reduce_scatter


def _patch_router() -> None:
    """Also needed on a GPU without Transformer Engine: upstream asks whether this name is None, and a failed import has
    left it undefined. With None the router multiplies by a plain matmul."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _patch_type_checks() -> None:
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        # The distributed optimizer and gradient clipping accept a tensor only if its type string says CUDA.
        if isinstance(result, str) and not result.startswith(_CUDA_TYPE_PREFIX):
            return result.replace(_CPU_TYPE_PREFIX, _CUDA_TYPE_PREFIX, 1)
        return result

    tensor: Any = torch.Tensor
    tensor.type = type_


def _patch_adam_loading() -> None:
    """Also needed on a GPU without Transformer Engine and Apex: it is torch's AdamW that upstream stumbles over."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(original)
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        # torch's AdamW keeps a step count beside the moments. Checkpoints hold it once for all parameters, and this
        # method looks for it in every one of them.
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        original(self, model_param, {"step": state["step"], **tensors} if "step" in state else tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def _seed_rng_tracker() -> None:
    """Registers the tracker's states; layers fork them even when dropout is 0."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    state = torch.get_rng_state()
    model_parallel_cuda_manual_seed(0, tp_rank=0, ep_rank=0, etp_rank=0)
    torch.set_rng_state(state)
