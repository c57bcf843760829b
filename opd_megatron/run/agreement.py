"""A check at the start of a run: student and teacher give one short sequence the likelihood that transformers gives
it.

Whatever reads a model wrongly (a head that is not the embedding, another rotary base, a layer out of place) shows in
it. transformers' model is loaded whole where memory allows, and layer by layer where it does not.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from opd_megatron.config import MegatronTeacherConfig, ServedTeacherConfig, decided
from opd_megatron.errors import WeightsError, one_line
from opd_megatron.mcore.cpu.platform import release_memory
from opd_megatron.system.collectives import on_rank_0
from opd_megatron.teacher import AlignedTeacher, CachedTeacher, LiveTeacher
from opd_megatron.types import Prompt, Rollout
from opd_megatron.weights.hf_reader import SafetensorsSource, load_hf_config
from opd_megatron.weights.transformers_names import parameter_named

if TYPE_CHECKING:
    from opd_megatron.run.build import RunParts

TOKENS = 48
"""Of the sequence, at most."""
_LIMITS = {"fp32": 2e-3, "bf16": 5e-2}
"""Nats a token by which a right model may differ, by its dtype."""


def check_agreement(run: RunParts, *, served_alone: bool = False) -> list[str]:
    """Compares the student and every teacher, each alone, with transformers; returns notes. Collective.

    `served_alone`: only teachers on servers elsewhere, which may serve anything.

    Raises:
        WeightsError: on every rank, where they differ.
    """
    sequence = agreement_sequence(run.prompts.dataset[0])
    found, notes = [], []
    for number, (teacher, (folder, _)) in enumerate(zip(run.config.teachers, run.models.teachers, strict=True)):
        if served_alone and not isinstance(teacher, ServedTeacherConfig):
            continue
        scored = _scored_by(run, number, sequence)
        if isinstance(scored, str):
            notes.append(f"teacher {teacher.path}: not compared with transformers ({scored})")
            continue
        dtype = decided(teacher.dtype) if isinstance(teacher, MegatronTeacherConfig) else "bf16"
        found.append(("teacher", teacher.path, folder, dtype, *scored))
    if not served_alone:
        student, itself = run.config.student, LiveTeacher(run.student, 1.0)
        nll = run.evaluator.likelihoods(run.student, sequence, itself)["nll"]
        columns: int | None = run.models.vocab_size
        found.insert(0, ("student", student.path, run.models.student, decided(student.dtype), nll, sequence, columns))
    for kind, name, folder, dtype, nll, read, columns in found:
        compare = _comparison(kind, name, folder, dtype, nll, read, columns)
        notes += on_rank_0(compare, f"{kind} {name!r}", WeightsError)
    return notes


def _scored_by(run: RunParts, number: int, sequence: Rollout) -> tuple[float, Rollout, int | None] | str:
    """What a teacher gives the sequence in nats a token, the sequence as it reads it, and how many columns of its
    vocabulary count; or why it cannot be asked. Collective."""
    teacher, read, columns = run.teachers[number], sequence, run.models.vocab_size
    translation = None
    if isinstance(teacher, AlignedTeacher):
        read, translation = run.views.translated(number, sequence)
        if min(*translation.spans, *translation.of_teacher) < 0:
            return "the first prompt is not whole in both tokenizations"
    held = teacher.teacher if isinstance(teacher, AlignedTeacher) else teacher
    if isinstance(held, CachedTeacher) and not held.holds(read):
        return "its cache is of other data"
    nll = run.evaluator.likelihoods(run.student, sequence, teacher, number)["teacher_nll"]
    if translation is None:
        return nll, read, columns
    return nll * len(sequence.response_ids) / len(translation.ids), read, None


def _comparison(
    kind: str, name: str, folder: Path, dtype: str, nll: float, sequence: Rollout, columns: int | None
) -> Callable[[], list[str]]:
    def compare() -> list[str]:
        ids = [*sequence.prompt.token_ids, *sequence.response_ids.tolist()]
        try:
            theirs = reference_nll(folder, ids, len(sequence.response_ids), columns)
        except Exception as error:  # a reference that cannot be had is no fault of the run
            return [f"{kind} {name}: not compared with transformers ({one_line(error)})"]
        finally:
            gc.collect()
            release_memory()
        if not math.isfinite(nll):
            raise WeightsError(
                f"{kind} {name!r} gives a sequence of {len(ids)} tokens {nll} nats a token: its weights hold NaN or "
                "infinite values, download it again"
            )
        if not abs(nll - theirs) <= _LIMITS[dtype] * max(1.0, abs(theirs)):
            raise WeightsError(
                f"{kind} {name!r} gives a sequence of {len(ids)} tokens {nll:.4f} nats a token in Megatron and "
                f"{theirs:.4f} in transformers: config.json and weights do not belong together, or it is a model that "
                "is read wrongly here (please report it); set evaluation.agreement=false to go on all the same"
            )
        return []

    return compare


def agreement_sequence(prompt: Prompt) -> Rollout:
    """Takes the first prompt of a run and its gold answer, or its own second half, cut to a few tokens."""
    ids = [*prompt.token_ids, *(prompt.answer_ids or ())][:TOKENS]
    half = max(1, len(ids) // 2)
    context = replace(prompt, token_ids=tuple(ids[:half]), contexts={})
    return Rollout(context, torch.tensor(ids[half:] or ids[:1]), None, policy_version=-1)


@torch.no_grad()
def reference_nll(folder: Path, ids: list[int], scored: int, columns: int | None = None) -> float:
    """Computes transformers' mean negative log-likelihood of the last `scored` of `ids`, in nats a token and fp32.

    `columns`: of the vocabulary, those that all models of the run have.
    """
    logging.disable_progress_bar()
    model = _whole(folder) if _fits(folder) else _by_layers(folder)
    tokens = torch.tensor([ids])
    logprobs = model(input_ids=tokens, use_cache=False).logits[0, -scored - 1 : -1, :columns].float().log_softmax(-1)
    return float(-logprobs.gather(-1, tokens[0, -scored:, None]).double().mean())


def _whole(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, attn_implementation="eager"
    )
    return model.eval()


def _fits(folder: Path) -> bool:
    """Whether the model in fp32, twice while it is read, stays within half of the free memory."""
    with SafetensorsSource(folder) as source:
        elements = sum(int(torch.Size(source.shape(name)).numel()) for name in source.names)
    return 8 * elements < _free_bytes() / 2


def _free_bytes() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 * 2**30


def _by_layers(folder: Path) -> Any:
    """Builds the model without weights; each layer reads its own before it runs and drops them after it has."""
    from transformers import AutoModelForCausalLM

    config = load_hf_config(folder)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its table is computed, not read
    source = SafetensorsSource(folder)
    parts = {f"model.layers.{index}": layer for index, layer in enumerate(model.model.layers)}
    parts |= {"model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm, "lm_head": model.lm_head}
    tied = {"lm_head": "model.embed_tokens"} if config.tie_word_embeddings else {}
    for prefix, part in parts.items():
        part.register_forward_pre_hook(_reading(source, prefix, tied.get(prefix, prefix)))
        part.register_forward_hook(lambda module, inputs, output: (module.to("meta"), None)[1])
    return model


def _reading(source: SafetensorsSource, prefix: str, stored: str) -> Callable[[Any, Any], None]:
    def read(module: torch.nn.Module, inputs: Any) -> None:
        module.to_empty(device="cpu")
        state = {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
        for name in source.names:
            if name.startswith(f"{stored}."):
                target = parameter_named(state, prefix + name.removeprefix(stored))
                if target is not None:
                    target.copy_(source.get_slice(name))

    return read
