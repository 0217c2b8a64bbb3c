"""Stand-ins for the expensive parts, for tests of scheduling only. Importable, because Ray workers import them too."""

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bruno_ray.ablation.edit import Edit


@dataclass(frozen=True)
class FakeScores:
    values: dict[str, float]
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class FakeOutcome:
    scores: FakeScores | None
    error: str | None = None
    seconds: float = 0.0
    samples: tuple[tuple[str, str], ...] = ()
    pruned: bool = False
    trained: None = None


@dataclass(frozen=True)
class FakeInfo:
    n_layers: int = 8
    components: tuple[str, ...] = ("attention", "mlp")
    fingerprint: str = "fake"
    dtype: str = "float32"


def fake_scores(edit: Edit) -> dict[str, float]:
    """Arithmetic with the right shape: more ablation, lower rate, higher KL."""
    strength = sum(max(kernel.max_weight, 0.0) * kernel.min_weight_distance for kernel in edit.components.values())
    near = 1.0 - abs((edit.direction_index or 3.0) - 4.0) / 8
    return {"behaviour_rate": round(math.exp(-0.3 * strength * near), 2), "kl_divergence": strength**2 / 1000}


class FakeWorker:
    """Has the methods of a ModelWorker that the pool and the study call."""

    def __init__(self, folder: str = "", seconds: float = 0.0, die_at: int = 0, nan_at: int = 0, deaths: int = 1):
        """
        Args:
            folder: where calls and deaths are counted over all processes.
            seconds: time one batch takes.
            die_at: the worker that starts this batch (counted from 1 over all) exits without a word ...
            deaths: ... and so do the next ones that are given the same edits, until so many have died.
            nan_at: the first trial of this batch has a NaN score.
        """
        self.folder = Path(folder)
        self.seconds = seconds
        self.die_at = die_at
        self.deaths = deaths
        self.nan_at = nan_at

    def describe(self) -> FakeInfo:
        return FakeInfo()

    def double(self, values: list[float]) -> np.ndarray:
        self._die_if_told(f"shard {values[0]}")
        time.sleep(self.seconds)
        return 2 * np.asarray(values)

    def fail(self, error: Exception) -> None:
        raise error

    def add(self, context: int, value: int) -> int:
        return context + value

    def evaluate(self, context: object, edits: list[Edit], rivals: tuple = ()) -> list[FakeOutcome]:
        number = self._count("batches")
        if self.die_at and number == self.die_at:
            (self.folder / "doomed").write_text(repr(edits[0]))
        self._die_if_told(repr(edits[0]))
        time.sleep(self.seconds)
        outcomes = [FakeOutcome(FakeScores(fake_scores(edit), {"behaviour_rate": (1, 100)})) for edit in edits]
        if self.nan_at and number == self.nan_at:
            outcomes[0] = FakeOutcome(FakeScores({"behaviour_rate": 0.5, "kl_divergence": float("nan")}))
        return outcomes

    def _die_if_told(self, what: str) -> None:
        doomed = self.folder / "doomed"
        if (
            self.folder != Path()
            and doomed.exists()
            and doomed.read_text() == what
            and self._count("deaths", only_read=True) < self.deaths
        ):
            self._count("deaths")
            os._exit(1)

    def _count(self, name: str, only_read: bool = False) -> int:
        """Number of times this was called in any process: the length of a file that grows by a byte."""
        if self.folder == Path():
            return 0
        path = self.folder / name
        with open(path, "ab", buffering=0) as file:
            if not only_read:
                file.write(b".")
            return file.tell()  # behind our own byte, whatever others have written since


class BrokenWorker:
    """Raises what a worker raises whose model does not exist."""

    def __init__(self) -> None:
        from bruno_ray.errors import ModelError

        raise ModelError("there is no model 'nothing': check model.id")
