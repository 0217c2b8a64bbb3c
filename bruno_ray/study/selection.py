"""What came out of a study: its trials as plain records, the Pareto front, and one pick from it.

No torch and no Ray: ``bruno-ray front`` reads a study that another process is still writing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from bruno_ray.errors import SettingsError, StudyError
from bruno_ray.study.trial_result import ORIGIN, PLAN, RESULT, TRAINING, TrialResult, is_whole

BEHAVIOUR = "behaviour_rate"
KL = "kl_divergence"
EVASION = "evasion_rate"
INCOHERENCE = "incoherence"
MISMATCH = "elicited_mismatch"
DOUBT = "doubt"

COUNTED = ("COMPLETE", "PRUNED")
"""States of trials that count towards `study.n_trials`."""

SIMILAR_DOUBT = 0.05
"""Edits whose doubt differs by less are equally sure of their answers."""

MET = 0.5
"""What the unedited model can be made to say tells edits apart where some edit misses less of it than this: references
that no edit comes near are none. (Organisms: the best miss 0 to 0.14; SmolLM2, `disclaimers`: 0.69 to 0.77.)"""

BROKEN = 0.5
"""Share of the answers without the behaviour that may be improper before a pick is said to look broken."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial as the study's storage has it."""

    number: int
    state: str
    """COMPLETE, PRUNED, FAIL or RUNNING. PRUNED trials are complete to Optuna (``pruning.py``)."""

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

    training: dict[str, Any] | None = None
    """Of a trained trial: its plan, and what `TrainedEdit.account` gives."""

    origin: str = ""
    """Of an edit that was given, not sampled (``starts.py``): where it is from."""


def load_trials(study: optuna.Study) -> list[TrialRecord]:
    """All trials by number. The study may be running: in-flight trials come out as RUNNING."""
    return [record(trial) for trial in study.get_trials(deepcopy=False)]


def record(trial: FrozenTrial) -> TrialRecord:
    result = TrialResult.from_json(trial.user_attrs.get(RESULT) or {})
    complete = trial.state == TrialState.COMPLETE
    if damaged := complete and not is_whole(trial.user_attrs):
        complete, result = False, replace(result, error="a part of its record is lost from the study's journal")
    pruned = complete and result.pruned
    complete = complete and not pruned
    return TrialRecord(
        number=trial.number,
        state="FAIL" if damaged else "PRUNED" if pruned else trial.state.name,
        edit=trial.user_attrs.get("edit"),
        values=result.values if complete else {},
        counts=result.counts if complete else {},
        seconds=result.seconds,
        worker=result.worker,
        error=None if complete else result.error,
        params=dict(trial.params),
        samples=result.samples,
        training={"plan": trial.user_attrs[PLAN], **trial.user_attrs.get(TRAINING, {})}
        if PLAN in trial.user_attrs
        else None,
        origin=trial.user_attrs.get(ORIGIN, ""),
    )


def pareto_front(trials: Sequence[TrialRecord], objectives: Sequence[str]) -> list[TrialRecord]:
    """COMPLETE trials that no other trial beats on every objective, sorted by the objectives in their order.

    All objectives are minimised. Trials with equal values are all kept, as ``study.best_trials`` does.
    """
    complete = [trial for trial in trials if trial.state == "COMPLETE"]
    points = [tuple(trial.values[name] for name in objectives) for trial in complete]
    best: list[tuple[float, ...]] = []
    for point in sorted(set(points)):  # whatever beats a point stands before it; of two objectives, the last one does
        if not any(_dominates(other, point) for other in reversed(best)):
            best.append(point)
    kept = set(best)
    front = [trial for trial, point in zip(complete, points) if point in kept]
    return sorted(front, key=lambda trial: (*(trial.values[name] for name in objectives), trial.number))


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b))


@dataclass(frozen=True)
class Choice:
    """The trial that the rule takes, and why."""

    trial: TrialRecord
    reason: str
    """One line: what the trial has, how many others are as good, and by what it was told from them."""

    runner_up: TrialRecord | None = None
    """What the rule would take without it."""


def auto_select(
    trials: Sequence[TrialRecord],
    max_kl: float,
    objectives: Sequence[str] = (),
    searched: Mapping[int, TrialRecord] | None = None,
) -> Choice:
    """The trial that leaves the fewest target prompts without a proper answer, for as little damage as that takes.

    Among the trials whose mean KL is at most ``max_kl`` nats, in turn:

    1. fewest prompts without a proper answer (`unanswered`);
    2. the other objectives in their order, except the KL and what the first step counts; then how unsure the model is
       of its answers (`confidence`) and how much they miss of what the unedited model can be made to say
       (`elicited_answers`), where they were measured and some edit comes near;
    3. the lowest KL, and of equals the lowest number.

    Finalists are told apart by few prompts. With ``searched``, what the search found of each trial by number, the first
    step is taken there once more, and the KL, for its bound and for the last step, is that over the prompts of both:
    what ten prompts cannot tell, the search's hundred may.

    Where `confidence` was measured, which tells edits apart that these few prompts cannot, the first step keeps whoever
    is within a standard error. Otherwise a step keeps whoever is no more than one prompt worse than the best: half a
    prompt decides nothing, and a hundredth of one has decided before a KL two hundred times as high.

    Raises:
        StudyError: no trial is complete, or none is under the bound (the message has the lowest KL there is).
        SettingsError: the study did not measure behaviour rate and KL.
    """
    searched = searched or {}
    return _pick(_within(trials, max_kl, searched), max_kl, objectives, searched=searched)


def finalists(trials: Sequence[TrialRecord], max_kl: float, objectives: Sequence[str], most: int) -> list[TrialRecord]:
    """What `auto_select` takes first, second, third and so on. Raises as that does."""
    left = _within(trials, max_kl)
    chosen: list[TrialRecord] = []
    while left and len(chosen) < most:
        best = _pick(left, max_kl, objectives, runner_up=False).trial
        chosen.append(best)
        left = _others(left, best)
    return chosen


def unanswered(trial: TrialRecord) -> float:
    """Share of target prompts without a proper answer.

    The evasion rate where it was measured: it counts the behaviour, what reads like it, answers beside the point and
    broken ones. Otherwise the behaviour rate and the incoherence of the other answers.
    """
    if EVASION in trial.values:
        return trial.values[EVASION]
    return trial.values[BEHAVIOUR] + trial.values.get(INCOHERENCE, 0.0)


def looks_broken(trial: TrialRecord) -> str:
    """A sentence if most of what the edit has freed of the behaviour is not an answer; otherwise empty."""
    freed = 1 - trial.values[BEHAVIOUR]
    not_answers = max(unanswered(trial) - trial.values[BEHAVIOUR], trial.values.get(INCOHERENCE, 0.0))
    if freed <= 0 or not_answers <= BROKEN * freed:
        return ""
    return (
        f"{not_answers:.0%} of its answers have no marker of the behaviour and are no proper answers either: read them"
        " before you use it"
    )


def _within(
    trials: Sequence[TrialRecord], max_kl: float, searched: Mapping[int, TrialRecord] | None = None
) -> list[TrialRecord]:
    complete = [trial for trial in trials if trial.state == "COMPLETE"]
    if not complete:
        raise StudyError("the study has no completed trial to select from: run it first")
    for name in (BEHAVIOUR, KL):
        if name not in complete[0].values:
            raise SettingsError(
                f"automatic selection needs the metric {name}: add it to scoring.scorers or pick a trial"
            )
    kl = {trial.number: _kl(trial, (searched or {}).get(trial.number)) for trial in complete}
    under = [trial for trial in complete if kl[trial.number] <= max_kl]
    if not under:
        lowest = min(kl, key=kl.__getitem__)
        raise StudyError(
            f"no trial has a KL divergence of at most {max_kl:g}: the lowest is {kl[lowest]:.4g} (trial"
            f" {lowest}); raise selection.max_kl, run more trials, or pick a trial by its number"
        )
    return under


def _one_prompt(trial: TrialRecord) -> float:
    """What one prompt is of all that a trial was measured on; 0 if nothing of it was counted."""
    n = _n_prompts(trial)
    return 1 / n if n else 0.0


def _n_prompts(trial: TrialRecord) -> int:
    return max((total for _, total in trial.counts.values()), default=0)


def _all_have(name: str, trials: Sequence[TrialRecord]) -> bool:
    """Whether a metric was measured for all: a search that is gone on with by training has not asked for doubt."""
    return all(name in trial.values for trial in trials)


def _tells(name: str, trials: Sequence[TrialRecord]) -> bool:
    """Whether a metric that is no objective can tell these trials apart."""
    return _all_have(name, trials) and (name != MISMATCH or min(trial.values[name] for trial in trials) <= MET)


def _standard_error(trials: Sequence[TrialRecord]) -> float:
    """Of the lowest share without a proper answer (the one-standard-error rule, Breiman et al. 1984)."""
    lowest = min(map(unanswered, trials))
    return math.sqrt(lowest * max(0.0, 1 - lowest) * _one_prompt(trials[0]))


def _pick(
    candidates: Sequence[TrialRecord],
    max_kl: float,
    objectives: Sequence[str],
    runner_up: bool = True,
    searched: Mapping[int, TrialRecord] | None = None,
) -> Choice:
    prompt = _one_prompt(candidates[0])
    left, words = list(candidates), ""
    counted = (BEHAVIOUR, EVASION, INCOHERENCE)
    others = [name for name in objectives if name not in counted and not name.startswith("kl_")]
    others += [name for name in (DOUBT, MISMATCH) if _tells(name, candidates) and name not in others]
    nearly = max(prompt, _standard_error(candidates)) if _all_have(DOUBT, candidates) else prompt
    steps: list[tuple[str, Callable[[TrialRecord], float], float]] = [("", unanswered, nearly)]
    if searched:
        tolerance = _one_prompt(searched[candidates[0].number])
        steps.append(
            ("share without a proper answer in the search", lambda trial: unanswered(searched[trial.number]), tolerance)
        )
    steps += [
        (name, lambda trial, name=name: _value(trial, name), SIMILAR_DOUBT if name == DOUBT else prompt)
        for name in others
    ]
    for name, value, tolerance in steps:
        lowest = min(map(value, left))
        kept = [trial for trial in left if value(trial) <= lowest + tolerance * (1 + 1e-9)]
        if name and len(kept) < len(left):
            near = f"{tolerance:g}" if name == DOUBT else "one prompt"
            words += f"; of these {_like(kept)} within {near} of the lowest {name}, {lowest:.4g}"
        elif not name:
            words = (
                f"{len(kept)} of {len(candidates)} trials with KL <= {max_kl:g} are within"
                f" {_how_near(tolerance, prompt)} of the fewest without a proper answer, {_share_text(lowest, prompt)}"
            )
        left = kept
    kl = {trial.number: _kl(trial, (searched or {}).get(trial.number)) for trial in left}
    best = min(left, key=lambda trial: (kl[trial.number], trial.number))
    if len(left) == 1:
        words += "; it is the only one"
    else:
        following = min(kl[trial.number] for trial in left if trial is not best)
        of_both = ", with the prompts of the search" if searched else ""
        words += f"; among them it has the lowest KL ({kl[best.number]:.4g}; next {following:.4g}{of_both})"
    rest = _others(candidates, best)
    second = _pick(rest, max_kl, objectives, False, searched).trial if rest and runner_up else None
    return Choice(best, words, second)


def _others(trials: Sequence[TrialRecord], best: TrialRecord) -> list[TrialRecord]:
    """Without the best, and without the same edit under another number: that would be the same model."""
    return [trial for trial in trials if trial is not best and (trial.edit is None or trial.edit != best.edit)]


def _like(trials: Sequence[TrialRecord]) -> str:
    return "1 is" if len(trials) == 1 else f"{len(trials)} are"


def _how_near(tolerance: float, prompt: float) -> str:
    return "one prompt" if tolerance == prompt else "a standard error"


def _share_text(share: float, prompt: float) -> str:
    return f"{share / prompt:.3g} of {1 / prompt:.0f}" if prompt else f"{share:.4g}"


def _kl(trial: TrialRecord, searched: TrialRecord | None) -> float:
    """Over the prompts of both measurements, if there are two. A trained edit changes few prompts much: its mean over
    twenty of them may be twice that over forty others."""
    if searched is None:
        return _value(trial, KL)
    own, others = (_n_prompts(each) or 1 for each in (trial, searched))
    return (own * _value(trial, KL) + others * _value(searched, KL)) / (own + others)


def _value(trial: TrialRecord, name: str) -> float:
    return trial.values.get(name, math.inf)


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
