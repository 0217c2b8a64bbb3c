"""Where the time of a command goes: each of its stages adds its seconds to ``timings`` in run.json.

A stage is the time of the process that steers the run, so no second counts twice, whatever workers do meanwhile, and
the stages add up to what a clock beside the command shows. What is left out is less than a second or two: the lines
between the stages, and Python's end after the last of them.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from bruno_ray.progress import phase
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.workers.pool import WorkerPool

STAGES = {
    "program": "loading the program",
    "prompts": "reading the prompts",
    "ray": "starting Ray",
    "model": "loading the model",
    "response_prefix": "looking for what all answers begin with",
    "directions": "reading residuals",
    "unedited": "preparing the scorers",
    "study": "searching",
    "finalists": "measuring the best trials again",
    "test": "testing the selected trial",
    "save": "saving the model",
    "truth": "asking the organism",
    "stopping": "stopping Ray",
    "judge": "asking the judge",
    "report": "writing the report",
}
"""Stages of a run, as run.json has them, and what they are called while they last."""


@contextmanager
def timed(run: RunDirectory, stage: str, pool: WorkerPool | None = None) -> Iterator[None]:
    """Note the seconds of a stage in run.json, and say now and then how far it has come.

    A stage that goes on after a resume adds up.
    """
    start = time.perf_counter()
    try:
        with phase(STAGES[stage], pool.progress if pool else None):
            yield
    finally:
        run.add_seconds(stage, time.perf_counter() - start)


class Laps:
    """Seconds of stages that follow each other, each from the end of the one before it.

    Those that end before there is a run directory are kept until `note_in` names one.
    """

    def __init__(self, began: float | None = None) -> None:
        """
        Args:
            began: when the first stage began, of ``time.perf_counter``; now when not given.
        """
        self._run: RunDirectory | None = None
        self._kept: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter() if began is None else began

    def note_in(self, run: RunDirectory) -> None:
        """Where all that was kept, and all that comes, is noted."""
        self._run = run
        for stage, seconds in self._kept.items():
            run.add_seconds(stage, seconds)
        self._kept.clear()

    def begin(self) -> None:
        """The next stage begins now: what was since the last one is counted elsewhere."""
        self._last = time.perf_counter()

    def end(self, stage: str) -> None:
        """A stage ends now, and the next begins."""
        assert stage in STAGES
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self._run is None:
            self._kept[stage] += seconds
        else:
            self._run.add_seconds(stage, seconds)
