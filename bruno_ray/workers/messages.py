"""What the driver, the lane, the broker and the workers say to each other. This imports no torch and no Ray.

    driver --Swap--> lane --Swap--> broker --edits--> worker
    driver <--(batch_id, BatchResult)-- lane <--(batch_id, CallReply | Exception)-- broker <--EditOutcome-- worker

The broker passes references to outcomes on without opening them; the lane opens them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.plan import TrainedEdit, TrainingPlan


@dataclass(frozen=True)
class EditOutcome:
    """What evaluating one edit has given: metrics, or the reason why there are none."""

    values: dict[str, float] = field(default_factory=dict)
    """Metric -> value; empty with an error."""

    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Metric -> (cases, prompts) for metrics that are rates."""

    samples: tuple[tuple[str, str], ...] = ()
    """(user's message, answer) of a few target prompts."""

    seconds: float | None = None
    """This edit's share of the time its batch took."""

    error: str | None = None

    pruned: bool = False
    """Whether it was left half-way, dominated by a rival: values and counts are those of what it was asked."""

    trained: TrainedEdit | None = None
    """The edit, where a plan to train one was handed in."""


class Scores(Protocol):
    """`scoring.Scores`, without importing torch."""

    @property
    def values(self) -> dict[str, float]: ...
    @property
    def counts(self) -> dict[str, tuple[int, int]]: ...


class TrialOutcome(Protocol):
    """`model_worker.TrialOutcome`, without importing torch."""

    @property
    def scores(self) -> Scores | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def seconds(self) -> float: ...
    @property
    def samples(self) -> tuple[tuple[str, str], ...]: ...
    @property
    def pruned(self) -> bool: ...
    @property
    def trained(self) -> TrainedEdit | None: ...


def edit_outcome(outcome: TrialOutcome) -> EditOutcome:
    """A worker's own outcome as it travels."""
    if outcome.error or outcome.scores is None:
        return EditOutcome(seconds=outcome.seconds, error=outcome.error or "no scores")
    return EditOutcome(
        outcome.scores.values,
        outcome.scores.counts,
        outcome.samples,
        outcome.seconds,
        pruned=outcome.pruned,
        trained=outcome.trained,
    )


@dataclass(frozen=True)
class CallReply:
    """A call that a worker has finished, well or not."""

    worker: str
    result: list[Any]
    """One object reference, in a list so that it is passed on unopened. Getting it raises what the call raised."""


@dataclass(frozen=True)
class Submission:
    """A batch to evaluate."""

    batch_id: int
    """Names this evaluation; it is run once, however often it is handed in."""

    edits: tuple[Edit | TrainingPlan, ...]

    rivals: tuple[tuple[float, float], ...] = ()
    """What may prune its edits (``study/pruning.py``): of told trials, share without a proper answer and KL."""


@dataclass(frozen=True)
class Swap:
    """What the driver sends to the broker. Finished batches come back for it."""

    submit: tuple[Submission, ...] = field(repr=False)  # Tune makes the name of a folder out of this
    received: tuple[int, ...]
    """Ids of the batches whose results have reached the driver: the broker may forget them."""

    block: bool
    """Whether to wait until something has finished."""


@dataclass(frozen=True)
class Scored:
    """A batch was evaluated; single edits may have errors of their own."""

    worker: str
    outcomes: tuple[EditOutcome, ...]
    """In the order of the batch's edits."""


@dataclass(frozen=True)
class Failed:
    """Evaluating the batch has raised an error, or has cost two workers their lives. It would again."""

    error: str
    traceback: str | None = None
    """Of an error that is a defect."""


@dataclass(frozen=True)
class Lost:
    """The batch was evaluated, and its outcomes went away with the machine that had them."""

    reason: str


@dataclass(frozen=True)
class NoWorkers:
    """The batch was not evaluated: no worker is left."""

    reason: str


BatchResult = Scored | Failed | Lost | NoWorkers
Reply = tuple[int, CallReply | Exception]
"""A batch's id, and what the broker has of it."""

BatchResults = Sequence[tuple[int, BatchResult]]
