"""A plain transformers engine behind the RolloutEngine protocol: no process, no cache, no speed. For tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from opd_megatron.config import RunConfig, decided
from opd_megatron.errors import NonFiniteError, RolloutError
from opd_megatron.rollout.base import WHOLE_MACHINE, MachineShare, Sleeper
from opd_megatron.types import DTYPES, Rollout, SampleRequest, Sampling
from opd_megatron.weight_sync.format import WeightFormat, WeightPayload, tensors_of
from opd_megatron.weights.transformers_names import parameter_named


class TorchEngine:
    """Builds the architecture of `model_dir/config.json`; weights come only from `update_weights`."""

    def __init__(
        self,
        model_dir: Path,
        max_model_len: int,
        dtype: torch.dtype = torch.float32,
        banned_ids: Sequence[int] = (),
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self.policy_version = -1
        self._model_dir = model_dir
        self._max_model_len = max_model_len
        self._dtype = dtype
        self._overrides = dict(overrides or {})
        self._banned = torch.tensor(banned_ids, dtype=torch.int64)
        self._model: Any = None

    def spawn(self) -> None:
        """Does nothing: there is no process."""

    def wait_ready(self) -> None:
        """Builds the model with weights that no method will use."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(self._model_dir, local_files_only=True, **self._overrides)
        self._model = AutoModelForCausalLM.from_config(config, dtype=self._dtype).eval()
        self.policy_version = -1

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Rollout]:
        """Samples one answer a request. Raises RolloutError before the first update, or for a prompt too long."""
        self._check_ready()
        return [self._answer(request, sampling) for request in requests]

    @torch.no_grad()
    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Logprobs in nats of tokens 1 .. len - 1 of each sequence, at temperature 1."""
        self._check_ready()
        result = []
        for ids in sequences:
            tokens = torch.tensor([list(ids)])
            logprobs = self._model(tokens).logits[0, :-1].float().log_softmax(-1)
            result.append(logprobs.gather(-1, tokens[0, 1:, None])[:, 0].tolist())
        return result

    @torch.no_grad()
    def update_weights(self, payloads: Iterable[WeightPayload], version: int) -> None:
        """Copies full HF tensors in. Raises RolloutError when one is missing, unknown or of the wrong shape."""
        if self._model is None:
            raise RolloutError("the rollout engine is not running: call wait_ready first")
        self.policy_version = -1
        state = self._model.state_dict()
        filled: Counter[int] = Counter()
        for name, tensor in (pair for bucket in payloads for pair in tensors_of(bucket)):
            target = parameter_named(state, name)
            if target is None or target.shape != tensor.shape:
                expected = "no such tensor" if target is None else f"shape {tuple(target.shape)}"
                raise RolloutError(
                    f"weights of version {version}: {name!r} of shape {tuple(tensor.shape)} does not fit the "
                    f"architecture in {self._model_dir}/config.json, which has {expected}"
                )
            target.copy_(tensor)
            filled[_storage(target)] += target.numel()
        missing = [name for name, target in state.items() if filled[_storage(target)] < target.numel()]
        if missing:
            raise RolloutError(
                f"weights of version {version} lack {', '.join(missing[:5])} ({len(missing)} tensors): "
                "the stream must hold the whole model"
            )
        self.policy_version = version

    def sleep(self) -> None:
        """Does nothing: it has no GPU."""

    def wake(self, what: Sleeper) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Drops the model."""
        self._model, self.policy_version = None, -1

    def _check_ready(self) -> None:
        if self._model is None or self.policy_version < 0:
            raise RolloutError("the rollout engine has no weights yet (policy version -1): call update_weights first")

    @torch.no_grad()
    def _answer(self, request: SampleRequest, sampling: Sampling) -> Rollout:
        prompt = request.prompt
        if len(prompt.token_ids) + sampling.max_new_tokens > self._max_model_len:
            raise RolloutError(
                f"prompt {prompt.id!r}: {len(prompt.token_ids)} tokens + max_new_tokens={sampling.max_new_tokens} is "
                f"more than the engine's max_model_len={self._max_model_len}: "
                "shorten data.max_prompt_tokens or rollout.max_new_tokens"
            )
        generator = torch.Generator()
        if request.seed is None:
            generator.seed()
        else:
            generator.manual_seed(request.seed)
        ids: list[int] = []
        logprobs: list[float] = []
        inputs, cache = torch.tensor([prompt.token_ids]), None
        while len(ids) < sampling.max_new_tokens and not (ids and ids[-1] in sampling.stop_token_ids):
            output = self._model(inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[0, -1].float().index_fill(0, self._banned, -torch.inf)
            if logits.isnan().any():
                raise NonFiniteError(
                    f"the student's logits are not numbers ({self._model_dir}, policy version {self.policy_version}): "
                    "its weights hold NaN or infinite values, take other weights or an earlier checkpoint"
                )
            policy = _policy(logits, sampling)
            token = _draw(policy, sampling, generator)
            ids.append(token)
            logprobs.append(float(policy[token]))
            inputs = torch.tensor([[token]])
        reason = "stop" if ids and ids[-1] in sampling.stop_token_ids else "length"
        return Rollout(
            prompt, torch.tensor(ids), torch.tensor(logprobs), self.policy_version, reason, group=request.group
        )


def weight_format(config: RunConfig, hf_config: PretrainedConfig) -> WeightFormat:
    """Takes full tensors: it is one process."""
    return WeightFormat(DTYPES[decided(config.rollout.dtype)], config.rollout.tensor)


def build_engine(
    config: RunConfig, model_dir: Path, max_model_len: int, log_path: Path, banned_ids: Sequence[int] = (),
    overrides: Mapping[str, Any] | None = None, share: MachineShare = WHOLE_MACHINE,
) -> TorchEngine:  # fmt: skip
    """See `rollout.build_engine`."""
    return TorchEngine(model_dir, max_model_len, DTYPES[decided(config.rollout.dtype)], banned_ids, overrides)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _policy(logits: Tensor, sampling: Sampling) -> Tensor:
    """Turns [V] logits into the [V] logprobs that tokens are drawn from; temperature 0 keeps the model's own."""
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    if sampling.top_k:
        threshold = logits.topk(min(sampling.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        # A token stays while the mass before it is below top_p, so the first one always does.
        outside = order[ordered.cumsum(-1) - ordered >= sampling.top_p]
        logits = logits.index_fill(0, outside, -torch.inf)
    return logits.log_softmax(-1)


def _draw(policy: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(policy.argmax())
    return int(torch.multinomial(policy.exp(), 1, generator=generator))
