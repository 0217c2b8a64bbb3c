"""What came out of a study: its trials as plain records, the Pareto front, and one pick from it.

No torch and no Ray: ``bruno-ray front`` reads a study that another process is still writing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from bruno_ray.errors import SettingsError, StudyError
from bruno_ray.study.trial_result import RESULT, TrialResult

BEHAVIOUR = "behaviour_rate"
KL = "kl_divergence"


@dataclass(frozen=True)
class TrialRecord:
    """One trial as the study's storage has it."""

    number: int
    state: str
    """COMPLETE, FAIL or RUNNING."""

    edit: dict[str, Any] | None
    """``Edit.to_dict()``; None when the driver died before it was stored."""

    values: dict[str, float]
    """Every metric the scorers gave, objectives included; empty unless COMPLETE."""

    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Metric -> (cases, prompts) for metrics that are rates."""

    seconds: float | None = None
    """Share of its batch's evaluation time."""

    worker: str | None = None
    error: str | None = None
    """Why a FAIL trial has no scores."""

    params: dict[str, Any] = field(default_factory=dict)

    samples: tuple[tuple[str, str], ...] = ()
    """(user's message, answer) of a few target prompts."""


def load_trials(study: optuna.Study) -> list[TrialRecord]:
    """All trials by number. The study may be running: in-flight trials come out as RUNNING."""
    return [record(trial) for trial in study.get_trials(deepcopy=False)]


def record(trial: FrozenTrial) -> TrialRecord:
    result = TrialResult.from_json(trial.user_attrs.get(RESULT) or {})
    complete = trial.state == TrialState.COMPLETE
    return TrialRecord(
        number=trial.number,
        state=trial.state.name,
        edit=trial.user_attrs.get("edit"),
        values=result.values if complete else {},
        counts=result.counts if complete else {},
        seconds=result.seconds,
        worker=result.worker,
        error=None if complete else result.error,
        params=dict(trial.params),
        samples=result.samples,
    )


def pareto_front(trials: Sequence[TrialRecord], objectives: Sequence[str]) -> list[TrialRecord]:
    """COMPLETE trials that no other trial beats on every objective, sorted by the objectives in their order.

    All objectives are minimised. Trials with equal values are all kept, as ``study.best_trials`` does.
    """
    complete = [trial for trial in trials if trial.state == "COMPLETE"]
    points = [tuple(trial.values[name] for name in objectives) for trial in complete]
    distinct = set(points)
    best = {mine for mine in distinct if not any(_dominates(other, mine) for other in distinct)}
    front = [trial for trial, point in zip(complete, points) if point in best]
    return sorted(front, key=lambda trial: (*(trial.values[name] for name in objectives), trial.number))


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b))


@dataclass(frozen=True)
class Choice:
    """The trial that the rule takes, and why."""

    trial: TrialRecord
    reason: str
    """One line: what the trial has, how many others have the same, and by what the tie was broken."""


def auto_select(trials: Sequence[TrialRecord], max_kl: float, objectives: Sequence[str] = ()) -> Choice:
    """The trial with the lowest behaviour rate among those whose mean KL is at most ``max_kl`` nats.

    Ties go to the lower value of the other objectives in their order, then of the remaining metrics
    (incoherence and the like) by name, then to the lower KL and the lower number.

    Raises:
        StudyError: no trial is complete, or none is under the bound (the message has the lowest KL there is).
        SettingsError: the study did not measure behaviour rate and KL.
    """
    complete = [trial for trial in trials if trial.state == "COMPLETE"]
    if not complete:
        raise StudyError("the study has no completed trial to select from: run it first")
    for name in (BEHAVIOUR, KL):
        if name not in complete[0].values:
            raise SettingsError(
                f"automatic selection needs the metric {name}: add it to scoring.scorers or pick a trial"
            )
    under = [trial for trial in complete if trial.values[KL] <= max_kl]
    if not under:
        lowest = min(complete, key=lambda trial: trial.values[KL])
        raise StudyError(
            f"no trial has a KL divergence of at most {max_kl:g}: the lowest is {lowest.values[KL]:.4g} (trial"
            f" {lowest.number}); raise selection.max_kl, run more trials, or pick a trial by its number"
        )

    others = [name for name in objectives if name not in (BEHAVIOUR, KL)]
    others += sorted(
        name for name in under[0].values if name not in (BEHAVIOUR, *others) and not name.startswith("kl_")
    )
    criteria = (BEHAVIOUR, *others, KL)
    best = min(under, key=lambda trial: (*(_value(trial, name) for name in criteria), trial.number))
    return Choice(best, _reason(best, under, criteria, f"KL <= {max_kl:g}"))


def _value(trial: TrialRecord, name: str) -> float:
    return trial.values.get(name, float("inf"))


def _reason(best: TrialRecord, candidates: Sequence[TrialRecord], criteria: Sequence[str], bound: str) -> str:
    """Which criteria told ``best`` from the candidates, in their order; the others are not named."""
    first, *others = criteria
    tied = [trial for trial in candidates if _value(trial, first) == _value(best, first)]
    if len(tied) == 1:
        return f"the lowest {_lowest(best, candidates, first)} of {len(candidates)} trials with {bound}"
    same = f"{len(tied) - 1} other{'s' if len(tied) > 2 else ''}"
    steps = [f"{first} {metric_text(best, first)} like {same} with {bound}"]
    for name in others:
        left = [trial for trial in tied if _value(trial, name) == _value(best, name)]
        if len(left) < len(tied):
            among = "among these" if len(steps) == 1 else "then"
            steps.append(f"{among} the lowest {_lowest(best, tied, name)}")
        tied = left
    if len(tied) > 1:
        steps.append("then the lowest number")
    return "; ".join(steps)


def _lowest(best: TrialRecord, candidates: Sequence[TrialRecord], name: str) -> str:
    """A metric with its lowest value and the second lowest, if there is one."""
    higher = [trial for trial in candidates if _value(trial, name) > _value(best, name)]
    following = min(higher, key=lambda trial: _value(trial, name), default=None)
    values = [metric_text(best, name)] + ([f"next {metric_text(following, name)}"] if following else [])
    return f"{name} ({'; '.join(values)})"


def find_trial(trials: Sequence[TrialRecord], number: int) -> TrialRecord:
    """The COMPLETE trial with that number. Raises StudyError otherwise."""
    for trial in trials:
        if trial.number == number:
            if trial.state != "COMPLETE":
                raise StudyError(f"trial {number} is {trial.state}, not COMPLETE: pick one from the front")
            return trial
    raise StudyError(f"the study has no trial {number}: its numbers go from 0 to {len(trials) - 1}")


def metric_text(trial: TrialRecord, name: str) -> str:
    """A rate as the raw count it is (3/100), any other metric with four significant digits."""
    if name in trial.counts:
        cases, total = trial.counts[name]
        return f"{cases}/{total}"
    value = trial.values.get(name)
    return "-" if value is None else f"{value:.4g}"
