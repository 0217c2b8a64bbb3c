"""What is known of an evaluated trial, as it is kept in the trial's user attribute ``result``."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bruno_ray.ablation.plan import TrainedEdit
from bruno_ray.workers.messages import EditOutcome

RESULT = "result"
"""The user attribute. It is there as soon as a trial's batch is back, before the trial is told."""

EDIT, PLAN, TRAINING, DIRECTIONS = "edit", "plan", "training", "directions"
"""Others: what is scored; what was asked for where that had to be trained, how the training went, and what it found."""

ORIGIN = "origin"
"""Of a trial whose edit was given, not sampled (``starts.py``): where it is from, in words."""


def is_whole(attributes: Mapping[str, Any]) -> bool:
    """Whether the user attributes of a trial that was told hold what it was told from. Only a damaged journal, which
    `RunJournal` reads as far as it goes, has one that does not."""
    return EDIT in attributes and RESULT in attributes


@dataclass(frozen=True)
class TrialResult:
    """Scores, or the error for which the trial FAILs."""

    values: dict[str, float] = field(default_factory=dict)
    """Every metric the scorers gave, objectives included; all finite."""

    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Metric -> (cases, prompts) for metrics that are rates."""

    samples: tuple[tuple[str, str], ...] = ()
    """(user's message, answer) of a few target prompts."""

    seconds: float | None = None
    """Share of its batch's evaluation time."""

    worker: str | None = None
    error: str | None = None

    pruned: bool = False
    """Whether it was left half-way, dominated by a trial told before (``pruning.py``). Values are then those of what it
    was asked, and its samples are missing."""

    trained: TrainedEdit | None = field(default=None, compare=False)
    """The edit that was scored, where the trial was a plan to train one; kept beside the result, not in it."""

    @classmethod
    def of(cls, outcome: EditOutcome, objectives: Sequence[str], worker: str) -> "TrialResult":
        """An outcome whose objectives are not all finite is an error."""
        error = outcome.error
        if error is None:
            bad = [name for name in objectives if not math.isfinite(outcome.values.get(name, math.nan))]
            error = f"{bad[0]} is {outcome.values.get(bad[0], 'missing')}" if bad else None
        if error is not None:
            return cls(seconds=outcome.seconds, worker=worker, error=error)
        values = {name: float(value) for name, value in outcome.values.items() if math.isfinite(value)}
        return cls(
            values,
            dict(outcome.counts),
            outcome.samples,
            outcome.seconds,
            worker,
            None,
            outcome.pruned,
            outcome.trained,
        )

    def to_json(self) -> dict[str, Any]:
        """Journals of older versions hold the same."""
        seconds = {} if self.seconds is None else {"seconds": self.seconds}
        if self.error is not None:
            return {"error": self.error, **seconds, "worker": self.worker}
        return {
            "values": self.values,
            "counts": {name: list(pair) for name, pair in self.counts.items()},
            "samples": [list(pair) for pair in self.samples],
            **seconds,
            "worker": self.worker,
            **({"pruned": True} if self.pruned else {}),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "TrialResult":
        return cls(
            values=dict(stored.get("values", {})),
            counts={name: (pair[0], pair[1]) for name, pair in stored.get("counts", {}).items()},
            samples=tuple((pair[0], pair[1]) for pair in stored.get("samples", ())),
            seconds=stored.get("seconds"),
            worker=stored.get("worker"),
            error=stored.get("error"),
            pruned=stored.get("pruned", False),
        )
