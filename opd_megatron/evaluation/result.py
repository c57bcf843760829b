"""An evaluation: its figures, a table of several, and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from opd_megatron.errors import ConfigError
from opd_megatron.evaluation.intervals import Estimate, bootstrap, ks_of, pass_at, wilson


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Of the answers to one prompt."""

    id: str
    greedy: float
    samples: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How one model has done."""

    task: str
    model: str
    step: int | None
    """Optimizer steps of its run; None for weights of no run."""
    scores: list[PromptScores]
    temperature: float
    """Of the samples."""
    max_new_tokens: int
    truncated: float
    """Share of the greedy answers that were cut there, and so score 0."""
    mean_length: float
    """Of the greedy answers, in tokens."""
    timeouts: int
    errors: int
    """Answers whose verifier was too slow, or failed; they score 0."""
    seconds: float
    pass_at: list[int] = field(default_factory=list)
    """The k of pass@k; powers of two where there are none."""

    def estimates(self) -> dict[str, Estimate]:
        """`accuracy` of greedy answers (Wilson's interval); `avg@k` and `pass@k` of samples (bootstrap over
        prompts)."""
        found = {"accuracy": wilson([each.greedy for each in self.scores])}
        samples = len(self.scores[0].samples)
        if samples:
            found[f"avg@{samples}"] = bootstrap([sum(each.samples) / samples for each in self.scores])
            for k in self.pass_at or ks_of(samples):
                found[f"pass@{k}"] = bootstrap([_pass(k, each.samples) for each in self.scores])
        return found

    def metrics(self) -> dict[str, float]:
        """The same as columns of metrics.jsonl."""
        found = {f"eval/{name}": estimate.value for name, estimate in self.estimates().items()}
        return found | {"eval/truncated": self.truncated}


def _pass(k: int, scores: Sequence[float]) -> float:
    return pass_at(k, len(scores), sum(score >= 1 - 1e-9 for score in scores))


def to_json(results: Sequence[Accuracy]) -> str:
    """Writes evaluations, figures first and every prompt's scores last."""
    tree = [
        {
            **{key: value for key, value in asdict(result).items() if key != "scores"},
            "prompts": len(result.scores),
            "estimates": {name: estimate._asdict() for name, estimate in result.estimates().items()},
            "scores": [asdict(each) for each in result.scores],
        }
        for result in results
    ]
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> list[Accuracy]:
    """Reads what `to_json` wrote. Raises ConfigError for anything else."""
    try:
        tree: list[dict[str, Any]] = json.loads(text)
        for each in tree:
            del each["prompts"], each["estimates"]
            each["scores"] = [PromptScores(**scores) for scores in each["scores"]]
        return [Accuracy(**each) for each in tree]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"this is no evaluation in JSON ({error}): give a file that `evaluate` wrote") from None


def comparison(results: Sequence[Accuracy]) -> Table:
    """Builds the table of models that answered the same prompts: a row each."""
    first = results[0]
    title = f"{first.task}, {len(first.scores)} prompts (95% intervals)"
    table = Table(title=title, title_justify="left")
    table.add_column("model", overflow="fold")
    names = list(first.estimates())
    for name in (*names, "truncated", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        cells = [_cell(result.estimates()[name]) for name in names]
        table.add_row(result.model, *cells, f"{result.truncated:.0%}", f"{result.mean_length:.0f}")
    return table


def _cell(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
