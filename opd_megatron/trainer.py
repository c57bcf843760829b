"""On-policy distillation, one step at a time.

    prompts -> rollout -> teachers -> fused divergence -> backward -> optimizer -> weights into the engine

`OPDTrainer.step` is that line, its pieces stand right under it, and the rest is the order of a run: start, resume,
evaluate, save, finish. The student learns from its own samples, so it is corrected where it goes wrong itself:
GKD (arXiv 2306.13649); "On-Policy Distillation" (https://thinkingmachines.ai/blog/on-policy-distillation/). What the
loss computes is written out densely in `losses/reference.py`.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from types import TracebackType
from typing import Any

import torch.distributed as dist

from opd_megatron.config import RunConfig, decided
from opd_megatron.data.saved_rollouts import save_rollouts
from opd_megatron.data.stages import apply_stages, prefixes
from opd_megatron.data.transcript import readable_sample
from opd_megatron.errors import MissingPathError, StopRequestedError, one_line
from opd_megatron.evaluation import Accuracy
from opd_megatron.mcore.checkpoint import checkpoint_state, load_checkpoint, named_checkpoint
from opd_megatron.metrics import MetricsLog, NullLog, PhaseTimers, Watch, peak_memory_bytes, profile
from opd_megatron.models import ResolvedModels
from opd_megatron.models.sizes import BYTES_PER_ELEMENT, parameters
from opd_megatron.models.utilization import peak_flops, training_flops
from opd_megatron.rewards import StepRewards
from opd_megatron.run.agreement import check_agreement
from opd_megatron.run.ahead import StepRollouts
from opd_megatron.run.build import RunParts, build_run
from opd_megatron.run.export import export_hf
from opd_megatron.run.identity import check_identity, student_only, unchanged_part
from opd_megatron.run.report import write_report
from opd_megatron.run.step_plan import StepPlanner
from opd_megatron.system.collectives import all_ranks_max
from opd_megatron.system.signals import leave_word_of_stop, stop_requested
from opd_megatron.teacher import ask_teachers, meters
from opd_megatron.types import DTYPES, Rollout, Sampling, StepMetrics, StepOutput


@dataclass(kw_only=True)
class OPDTrainer(RunParts):
    """A run on this rank. Use as a context manager: leaving it ends the rollout engine."""

    step_count: int = field(default=0, init=False)
    """Optimizer steps done; the policy version of the weights."""
    timers: PhaseTimers = field(default_factory=PhaseTimers, init=False)
    watch: Watch = field(default_factory=Watch, init=False)
    """Warns of what the numbers say is going wrong."""

    def __post_init__(self) -> None:
        rollout = self.config.rollout
        planner = StepPlanner(self.config, self.prompts, self.given)
        self.rollouts = StepRollouts(
            self.rollout_client, self.prompts, planner.plan, self._sampling(), rollout.steps_ahead,
            self.config.steps,
        )  # fmt: skip
        taken = BYTES_PER_ELEMENT[decided(rollout.dtype)]
        self._weights_bytes = parameters(self.models.student_config) * taken
        """What a sync brings to an engine."""
        self._ranks = dist.get_world_size() + self.config.teacher_ranks + (self.config.rollout.hosts or 0)
        """Of the whole job."""
        self._cursor = self.prompts.state_dict()
        """Where the prompts of the next step begin; the stream itself is further on while a step is under way."""
        self._saved_step = 0
        self._answering = False

    @classmethod
    def from_config(
        cls,
        config: RunConfig,
        models: ResolvedModels | None = None,
        *,
        sampling: bool = True,
        scoring: bool = True,
        answering: bool = False,
    ) -> OPDTrainer:
        """Checks everything, joins the process group and loads the models.

        A command that only looks does without `sampling`: no training and, unless it is `answering`, no rollout engine;
        an export without `scoring` too (no teachers).
        """
        return build_run(cls, config, models, sampling=sampling, scoring=scoring, answering=answering)

    def __enter__(self) -> OPDTrainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The line

    def step(self) -> StepMetrics:
        """Makes one optimizer step on fresh samples of the student."""
        timers = self.timers
        with timers.phase("sync"):
            if self.config.samples:
                self.rollout_client.wake()
        with timers.phase("rollout"):
            rollouts = self.rollouts.take(self.step_count)
        rollouts = apply_stages(rollouts, self.stages)
        if self.rewards is not None:
            self.rewards.begin(rollouts)
        objective = self.config.objective.at(self.step_count)
        scored: StepRewards | None = None
        of_siblings: dict[str, float] = {}
        if self.siblings is not None:  # who read a right answer wait until it is known to be one
            scored = self._scores()
            assert scored is not None
            rollouts, of_siblings = self.siblings.shown(rollouts, scored)
        trained = prefixes(rollouts, objective.prefix_tokens)
        micro_batches = self.batches.build(trained)
        with timers.phase("teacher"):
            teachers = ask_teachers(self.teachers, micro_batches, self.views)
        scored = scored or self._scores()
        if scored is not None and objective.uses_rewards:
            micro_batches.score(scored.advantages)
        with timers.phase("train"):
            output = self.student.update(micro_batches, teachers, objective, self.models.vocab_size)
            for teacher in self.teachers:
                teacher.after_step()
        self.step_count += 1
        with timers.phase("rollout"):
            self.rollouts.collect()
        with timers.phase("sync"):
            if self.config.samples:
                self.rollout_client.sync_weights(self.step_count)
        self._show_sample(rollouts)
        self._save_rollouts(rollouts)
        others = {} if scored is None else scored.metrics | of_siblings
        others |= {name: getattr(objective, name) for name in objective.schedules}
        others["mfu"] = self._utilization(trained, output.tokens)
        return self._metrics(rollouts, output, others | meters(teachers, self.config.teacher_names))

    # Pieces of the line

    def _sampling(self) -> Sampling:
        rollout = self.config.rollout
        return Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            stop_token_ids=self.stop_token_ids,
        )

    def _scores(self) -> StepRewards | None:
        """Waits for what the answers are worth; None where nobody judges."""
        if self.rewards is None:
            return None
        with self.timers.phase("reward"):
            return self.rewards.finish()

    def _show_sample(self, rollouts: list[Rollout]) -> None:
        every = self.config.logging.sample_every
        if every and (self.step_count == 1 or self.step_count % every == 0):
            try:
                own = next((rollout for rollout in rollouts if rollout.policy_version >= 0), rollouts[0])
                self.display.sample(readable_sample(own, self.tokenizer))
            except Exception as error:  # a tokenizer that cannot decode what it encoded ends no run
                self.display.note(f"sample: cannot be shown ({one_line(error)})")

    def _save_rollouts(self, rollouts: list[Rollout]) -> None:
        if self.config.logging.rollouts and dist.get_rank() == 0:
            try:
                save_rollouts(self.run_dir.rollouts, self.step_count, rollouts, self.tokenizer)
            except Exception as error:  # a full disk, or a tokenizer that cannot decode, ends no run
                self.display.note(f"warning: rollouts of step {self.step_count} are not saved ({one_line(error)})")

    def _metrics(self, rollouts: list[Rollout], output: StepOutput, others: dict[str, float]) -> StepMetrics:
        own = [rollout for rollout in rollouts if rollout.policy_version >= 0]
        version = min((rollout.policy_version for rollout in own), default=self.step_count - 1)
        means, seconds = dict(output.metrics), self.timers.collect()
        return StepMetrics(
            step=self.step_count,
            tokens=output.tokens,
            policy_version=version,
            grad_norm=output.grad_norm,
            lr=output.lr,
            loss=means.pop("loss"),
            reverse_kl=means.pop("reverse_kl", None),
            forward_kl=means.pop("forward_kl", None),
            extra={
                **means,
                **others,
                "policy_lag": self.step_count - 1 - version,
                **_of_rollouts(own),
                **({"rollout/on_policy": len(own) / len(rollouts)} if self.given is not None else {}),
                **seconds,
                "sync/bytes": self._weights_bytes,
                "sync/gb_per_second": _rate(self._weights_bytes / 1e9, seconds["time/sync"]),
                **_rates(output.tokens, seconds["time/step"], self._ranks),
                "memory/peak": peak_memory_bytes(),
            },
        )

    def _utilization(self, rollouts: list[Rollout], tokens: int) -> float:
        """Share of the devices' peak that the update has used (`models.utilization`)."""
        lengths = [len(each.prompt.token_ids) + len(each.response_ids) for each in rollouts]
        peak = peak_flops(DTYPES[decided(self.config.student.dtype)], fp8=self.config.precision.fp8 is not None)
        flops = training_flops(self.models.student_config, lengths, tokens)
        return _rate(flops, self.timers.so_far("train") * peak * dist.get_world_size())

    # The run

    def train(self) -> None:
        """Trains to the last step, resuming from the newest checkpoint of the run directory if there is one.

        A stop signal on any rank (`system.signals`) ends it after the current step, with a checkpoint of that step.
        """
        self.restore("latest" if self.resume_from else "initial")
        with self._log() as log:
            wholly = self.step_count == 0 and self.config.evaluation.agreement
            for note in check_agreement(self, served_alone=not wholly):
                self.display.note(note)
            first = self._step_zero() if self.step_count == 0 else {}
            if first and self.accuracy is None:  # whose answers come when the engine runs
                log.write(first)
                first = {}
            try:
                if self.step_count < self.config.steps and not self._between_steps():
                    if self.step_count == 0:
                        self.student.make_optimizer_state()  # before the engine takes its share
                    if self.config.uses_engine:
                        self.rollout_client.start(self.step_count)
                    if first:
                        log.write(first | self.answer())
                        first = {}
                    while self.step_count < self.config.steps:
                        self._train_step(log)
                        if self._between_steps():
                            break
            except StopRequestedError:  # on all ranks: an engine that was coming up was given up
                pass
        if self.step_count > self._saved_step:
            self.save({})
        self.saver.finish()
        if self.step_count == self.config.steps:
            self._finish()
        else:
            if dist.get_rank() == 0:
                leave_word_of_stop()
            self.display.note(f"stopped after step {self.step_count}: the same command goes on from there")

    def restore(self, name: str = "latest") -> None:
        """Takes weights, optimizer and data cursor from a checkpoint: `latest` (the newest whole one), `best`, or a
        step. `initial` leaves the student's own weights as they are.

        Raises:
            MissingPathError: there is no such checkpoint.
            CheckpointError: it is damaged, or another run's.
        """
        newest = self.resume_from
        for warning in newest.skipped if newest else ():
            self.display.note(warning)
        if name == "initial":
            return
        if name == "latest" and newest is None:
            raise MissingPathError(
                f"{str(self.run_dir.root)!r} holds no checkpoint to take: train first, name another run, or ask for "
                "the student's own weights with --checkpoint initial"
            )
        path = newest.path if newest and name == "latest" else named_checkpoint(self.run_dir.checkpoints, name)
        state = checkpoint_state(path)
        theirs = state.get("identity", {})
        allowed = self.config.checkpoint.allow_changed
        ours = unchanged_part(self.identity, allowed) if self.trains else student_only(self.identity)
        for note in check_identity(theirs, ours, f"checkpoint {str(path)!r}"):
            self.display.note(note)
        load_checkpoint(path, self.student)
        if self.trains:
            self.prompts.load_state_dict(state["prompts"])
            self.rollouts.restore(int(state["policy_version"]), state.get("rollouts"))
            self._cursor = self.rollouts.cursor()
        self.step_count = self._saved_step = int(state["policy_version"])
        self.display.note(f"resumed from step {self.step_count} ({path})")

    def save(self, metrics: dict[str, float]) -> None:
        """Begins a checkpoint of this very step; its `metrics` may make it the best one."""
        identity = self.identity
        state: dict[str, Any] = {
            "step": self.step_count,
            "policy_version": self.step_count,
            "prompts": self._cursor,
            "rollouts": self.rollouts.state(),
            "metrics": {key: value for key, value in metrics.items() if key == self.config.checkpoint.best_metric},
            "identity": identity,
            "config_hash": sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        }
        self.saver.save(self.step_count, self.student, state)
        self._saved_step = self.step_count

    def evaluate(self) -> dict[str, float]:
        """Measures the student on held-out gold answers at temperature 1, in nats per token (`Evaluator.evaluate`)."""
        return self.evaluator.evaluate(self.student)

    def answer(self) -> dict[str, float]:
        """Has the student answer held-out prompts, and says how many are right (`AccuracyEvaluator`): nothing where no
        task is evaluated. The engine must run."""
        if self.accuracy is None:
            return {}
        if not self.config.samples and self.step_count > 0:  # who trains on given answers syncs for this alone
            self.rollout_client.sync_weights(self.step_count)
        found = self.accuracy.measure(self.config.student.path, self.step_count)
        return found.metrics() | {"time/answers": found.seconds}

    def answers(self, name: str, step: int | None) -> Accuracy:
        """The same, whole, of weights that are trained no further: those of now, called `name`."""
        assert self.accuracy is not None, "no task is evaluated"
        if self._answering:
            self.rollout_client.sync_weights(self.step_count)
        else:
            self.rollout_client.start(self.step_count)
            self._answering = True
        return self.accuracy.measure(name, step, lambda done, of: self.display.note(f"{name}: {done} of {of} answers"))

    def _train_step(self, log: MetricsLog | NullLog) -> None:
        number = self.step_count + 1
        with ExitStack() as stack:
            if number == self.config.logging.profile_step:
                folder = self.run_dir.root / profile.FOLDER
                stack.enter_context(profile.profiled(folder, number, dist.get_rank(), self.display.note))
            metrics = self.step()
        self._cursor = self.rollouts.cursor()
        saves = self._due(self.config.checkpoint.every)
        if self._evaluates(saves):
            metrics.extra.update(self.evaluate() | self.answer())
        log.write(metrics)
        self.display.step(metrics)
        for finding in self.watch.look(metrics.as_dict()):
            self.display.note(f"warning: {finding}")
        if saves:
            self.save(metrics.as_dict())

    def _between_steps(self) -> bool:
        """Publishes the checkpoint that all ranks have written; True when any rank was asked to stop."""
        stop, writing = all_ranks_max(stop_requested(), self.saver.is_writing)
        if self.saver.pending and not writing:
            self.saver.finish()
        return stop

    def _finish(self) -> None:
        """Exports the student and shows what came of the run."""
        exported = export_hf(self) if self.config.checkpoint.export_hf else None
        if dist.get_rank() == 0:
            self.display.close()
            try:
                self.display.print(write_report(self.run_dir.root))
            except Exception as error:  # the student is trained, whatever can be drawn of it
                self.display.note(f"warning: no report ({one_line(error)}): `opd-megatron report` makes one later")
            if exported is not None:
                self.display.note(f"student   {exported}")

    def _log(self) -> MetricsLog | NullLog:
        """Opens metrics.jsonl on rank 0. The run directory is this run's from here on."""
        if dist.get_rank() > 0:
            return NullLog()
        logging = self.config.logging
        return MetricsLog(
            self.run_dir.root,
            tensorboard=logging.tensorboard,
            wandb_project=logging.wandb_project,
            config_dict=self.config.model_dump(mode="json"),
            resume_step=self.step_count or None,
            on_problem=self.display.note,
        )

    def _step_zero(self) -> dict[str, Any]:
        """Evaluates the untrained student for row 0 of the metrics, and shows a line that tells a wrong or half-loaded
        teacher before it has taught."""
        metrics = self.evaluate()
        teachers = zip(self.config.teacher_names, self.config.teachers, strict=True)
        named = {f"teacher/{name}/fingerprint": teacher.fingerprint for name, teacher in teachers}
        for line in self.evaluator.summary(metrics):
            self.display.note(line)
        return {"step": 0, "policy_version": 0, **named, **metrics}

    def _evaluates(self, saves: bool) -> bool:
        every, best = self.config.evaluation.every, self.config.checkpoint.best_metric
        return every > 0 and (self._due(every) or (saves and best is not None and best.startswith("eval/")))

    def _due(self, every: int) -> bool:
        return self.step_count == self.config.steps or (every > 0 and self.step_count % every == 0)


def _rates(tokens: int, seconds: float, ranks: int) -> dict[str, float]:
    """Response tokens a second of a whole step, of all ranks and of each of the devices that they share."""
    rate = _rate(tokens, seconds)
    return {"tokens_per_second": rate, "tokens_per_second_per_gpu": rate / ranks}


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0


def _of_rollouts(sampled: list[Rollout]) -> dict[str, float]:
    """Of what the student has sampled; nothing where it has not."""
    if not sampled:
        return {}
    count = len(sampled)
    return {
        "rollout/mean_length": sum(len(rollout.response_ids) for rollout in sampled) / count,
        "rollout/finished": sum(rollout.finish_reason == "stop" for rollout in sampled) / count,
        "rollout/truncated": sum(rollout.finish_reason == "length" for rollout in sampled) / count,
    }
