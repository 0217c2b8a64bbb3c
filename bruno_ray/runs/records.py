"""What run.json and samples.json hold. Importable without torch."""

import datetime
import platform
import sys
from importlib import metadata
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bruno_ray.intervals import wilson_interval
from bruno_ray.settings import Settings

SCHEMA_VERSION = 1


VERSIONED_PACKAGES = ("bruno-ray", "torch", "transformers", "tokenizers", "ray", "optuna", "numpy", "bitsandbytes")


def today() -> datetime.date:
    """The day, by this machine's clock. Asked once where something begins, and kept."""
    return datetime.date.today()


def first_mistake(error: ValidationError) -> str:
    """Where a file's content does not fit, and why, in one line."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ScoresRecord(Record):
    """Scores of one edit (or of the unedited model) on one part of the prompts."""

    values: dict[str, float]
    counts: dict[str, tuple[int, int]] = {}
    """For rates: events and prompts, such as (3, 100)."""

    intervals: dict[str, tuple[float, float]] = {}
    """Wilson 95 % interval of every rate in `counts`."""

    rows: dict[str, tuple[float, ...]] = {}
    """Metric to its value on each prompt, where it is known: what paired comparisons need."""

    @classmethod
    def of(cls, scores: Any) -> "ScoresRecord":
        """From a `scoring.Scores`, with an interval for every rate that has counts."""
        return cls(
            values=dict(scores.values),
            counts=dict(scores.counts),
            intervals={name: wilson_interval(events, total) for name, (events, total) in scores.counts.items()},
            rows=dict(getattr(scores, "rows", {})),
        )


class CostRecord(Record):
    """What rented machines have cost while the run was there, from its first file to its last."""

    dollars: float
    until: float
    """Unix seconds."""

    ended: bool
    """Whether the run had ended by then."""

    def text(self, trials: int, selected: int | None) -> str:
        """In one line, for each of the completed `trials` too; of the result where a trial is `selected`."""
        each = f", {self.dollars / trials:.4f} $ for each completed trial" if trials else ""
        if selected is None or not self.ended:
            return f"cost of this run so far: {self.dollars:.2f} ${each}"
        return f"cost of its result (trial {selected}): {self.dollars:.2f} ${each}"


class RunnerUpRecord(Record):
    """The trial that the rule would have taken next, to compare with."""

    number: int
    edit: dict[str, Any]
    test: ScoresRecord | None = None


class SelectedRecord(Record):
    """The trial that was chosen. `test` is the live edit, `saved` the model written to disk and read back."""

    number: int
    reason: str = ""
    """Why the rule took this trial; empty if it was named by its number."""

    warning: str = ""
    """What is suspicious about its answers."""

    edit: dict[str, Any]
    validation: ScoresRecord
    test: ScoresRecord | None = None
    saved: ScoresRecord | None = None
    saved_path: str | None = None
    runner_up: RunnerUpRecord | None = None
    training: dict[str, Any] | None = None
    """How a trained edit came about: its plan, loss curves, what it was trained on, cost."""

    changed: dict[str, float] = {}
    """Component -> relative Frobenius norm of what the edit changes of its weights."""

    kept: dict[str, tuple[int, int]] = {}
    """Protected set -> prompts that are handled as before, of how many."""


class MethodRecord(Record):
    """The best trial of one way to find directions, and how much of the weights it changes."""

    method: str
    trial: int
    validation: ScoresRecord
    changed: dict[str, float]
    """Component -> relative Frobenius norm."""


class Sample(Record):
    """One prompt's answers, for people to read."""

    side: str
    """`target` or `baseline`."""

    prompt: str
    before: str
    after: str
    shows_before: bool | None = None
    """Whether the answer shows the behaviour, by the study's markers; None where that was not looked at."""

    shows_after: bool | None = None


class TestPrompt(Record):
    """A prompt of the test part, by which the rows of scores can be told."""

    __test__ = False  # pytest takes it for a test

    side: str
    prompt: str
    category: str | None = None


class ReadAnswer(Record):
    """One whole answer to a target prompt of the test part, and what its readers make of it."""

    prompt: str
    answer: str
    shows: dict[str, float | None] = {}
    """Reader (`markers`, `detector`, `judge`) -> probability that the answer shows the behaviour; None where it has
    none."""


class Readings(Record):
    """What readings.json holds: the answers that the report's rates are of, prompt by prompt the same in each list."""

    trial: int
    """Of `edited` and `saved`."""

    unedited: list[ReadAnswer] = []
    edited: list[ReadAnswer] = []
    saved: list[ReadAnswer] = []


class TaskFigure(Record):
    """Of one model on one task, with its standard error where there is one."""

    value: float
    stderr: float | None = None


class TaskRecord(Record):
    """An edit and its base model on one task of lm-eval."""

    suite: str
    task: str
    metric: str
    filter: str = "none"
    """Of lm-eval: how an answer is taken out of what was generated."""

    higher_is_better: bool = True
    trial: int | None = None
    """None where the edited model is of no run."""

    base: TaskFigure
    edited: TaskFigure
    difference: float
    """Edited minus base."""

    interval: tuple[float, float] | None = None
    """95 %, of the difference, by a bootstrap over questions. None where they cannot be paired."""

    questions: int | None = None
    only_base: int | None = None
    """Questions that only the base model has right, where answers are right or wrong."""

    only_edited: int | None = None
    p: float | None = None
    """Of McNemar's exact test."""

    lm_eval: str = "unknown"
    """Its version."""

    @property
    def loss(self) -> float:
        """What the edit costs: above 0 where it is worse than the base."""
        return -self.difference if self.higher_is_better else self.difference


class RunRecord(Record):
    """What run.json holds. Fields are filled as the run gets there."""

    schema_version: int = SCHEMA_VERSION
    settings: Settings
    """Resolved: every value that was in effect, from whatever source."""

    command: list[str] = []
    """Command line that started the run."""

    versions: dict[str, str] = {}
    hashes: dict[str, str] = {}
    """Fingerprints of `model` and `prompts`."""

    seeds: dict[str, int] = {}
    timings: dict[str, float] = {}
    """Seconds per stage (`pipeline/stages.py`), of all commands that this run took; together about their wall time."""

    model: dict[str, Any] = {}
    """Family, layers, width, dtype, parameters."""

    coverage: list[dict[str, Any]] = []
    """Per component: parameters that write to the residual stream, and how many of them the edit reaches."""

    prompts: dict[str, dict[str, int]] = {}
    """Number of prompts: side -> part -> count."""

    left_out: dict[str, str] = {}
    """What the settings ask to edit and the model has no place for -> why."""

    choices: dict[str, dict[str, list[list[int] | None]]] = {}
    """Of experts and heads, "SETTING:CHOICE" -> component -> by layer those that edits keep to; None is all."""

    response_prefix: str = ""
    date: datetime.date = Field(default_factory=today)
    """The day the run began. Chat templates that print a date print this one, whenever the run goes on or its model is
    asked."""

    n_trials: dict[str, int] = {}
    """Trials of the study by state."""

    baseline: dict[str, ScoresRecord] = {}
    """The unedited model, by part (`validation`, `test`)."""

    finalists: dict[str, ScoresRecord] = {}
    """The best trials by number, measured again before the rule took one of them."""

    selected: SelectedRecord | None = None
    methods: list[MethodRecord] = []
    """The best trial of each direction method that competed."""

    saved_elsewhere: dict[str, int] = {}
    """Folders outside of the run that a trial was saved to, whichever is selected: folder -> number of the trial."""

    evaluations: list[TaskRecord] = []
    """Of `bruno-ray evaluate --suite`: the latest of each suite, task and trial."""

    extra: dict[str, Any] = {}
    """Figures only some runs have, such as the organism's truth score."""


def installed_versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that decide a result."""
    versions = {"python": sys.version.split()[0], "platform": platform.platform()}
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    for name in VERSIONED_PACKAGES:
        if name in installed:
            versions[name] = installed[name]
    if "bruno-ray" not in versions:  # run from a source tree that is not installed
        from bruno_ray import __version__

        versions["bruno-ray"] = __version__
    return versions
