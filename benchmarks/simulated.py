"""Workers that only take time. Their module imports next to nothing, so that many start on one machine."""

import time
from dataclasses import dataclass, field
from pathlib import Path

OBJECTIVES = ("behaviour_rate", "kl_divergence")


@dataclass(frozen=True)
class SimulatedScores:
    """`scoring.Scores`, without importing torch."""

    values: dict[str, float]
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class SimulatedOutcome:
    """`worker.TrialOutcome`, without importing torch."""

    scores: SimulatedScores
    error: str | None = None
    seconds: float = 0.0
    samples: tuple[tuple[str, str], ...] = ()
    pruned: bool = False
    trained: None = None


class SleepingWorker:
    """Gives the same scores for every edit, after a pause."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def evaluate(self, context: object, edits: list, rivals: tuple = ()) -> list[SimulatedOutcome]:
        time.sleep(self.seconds)
        return [SimulatedOutcome(SimulatedScores(dict(zip(OBJECTIVES, (0.5, 0.1))))) for _ in edits]


class StampingWorker(SleepingWorker):
    """Leaves a file behind at its first evaluation."""

    def __init__(self, seconds: float, stamp: Path):
        super().__init__(seconds)
        self.stamp = stamp

    def evaluate(self, context: object, edits: list, rivals: tuple = ()) -> list[SimulatedOutcome]:
        if not self.stamp.exists():
            self.stamp.touch()
        return super().evaluate(context, edits, rivals)
