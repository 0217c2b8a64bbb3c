"""What the selected edit does beside what it was searched for: how much of the weights it and the best edits of the
other methods change, and whether protected prompts are handled as before."""

import logging
from collections.abc import Sequence

from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.plan import PREFIX
from bruno_ray.errors import ModelError, StudyError
from bruno_ray.pipeline.choosing import trials_of
from bruno_ray.prompts.sets import Prompts
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import MethodRecord, ScoresRecord, SelectedRecord
from bruno_ray.scoring.markers import Markers
from bruno_ray.settings import Settings
from bruno_ray.study.selection import TrialRecord, auto_select
from bruno_ray.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

TRAINED = "trained"
MOST_TOKENS = 100
"""Of an answer to a protected prompt: how it is handled shows at its beginning."""


def method_of(direction_set: str) -> str:
    """ "subspace@0|protect0.5" is of the method subspace."""
    return TRAINED if direction_set.startswith(PREFIX) else direction_set.partition("@")[0]


def best_by_method(trials: Sequence[TrialRecord], settings: Settings) -> dict[str, TrialRecord]:
    """Method -> its trial that the rule would take; where none keeps to the KL bound, the one of lowest KL."""
    objectives, max_kl = settings.scoring.objectives, settings.selection.max_kl
    of_method: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        if trial.state == "COMPLETE" and trial.edit is not None and "kl_divergence" in trial.values:
            of_method.setdefault(method_of(trial.edit["direction_set"]), []).append(trial)
    best = {}
    for method, some in of_method.items():
        try:
            best[method] = auto_select(some, max_kl, objectives).trial
        except StudyError:
            best[method] = min(some, key=lambda trial: trial.values["kl_divergence"])
    return best


def measure_changes(run: RunDirectory, selected: SelectedRecord, pool: WorkerPool) -> SelectedRecord:
    """Note in run.json what the best edit of each method changes; the selected trial with what it changes.

    The pool's context holds the run's directions. Where a weight cannot be read, nothing is noted.
    """
    settings = run.read().settings
    best = best_by_method(trials_of(run.path, settings), settings)
    edits = [Edit.from_dict(dict(trial.edit or {})) for trial in best.values()]
    try:
        shares, *others = pool.call("changed", [Edit.from_dict(selected.edit), *edits], with_context=True)
    except ModelError as error:
        logger.info("the change of the weights is not known: %s", error)
        return selected
    methods = [
        MethodRecord(method=method, trial=trial.number, validation=ScoresRecord.of(trial), changed=changed)
        for (method, trial), changed in zip(best.items(), others)
    ]
    run.change(lambda _: {"methods": methods})
    logger.info("trial %d changes %s", selected.number, changed_text(shares))
    return selected.model_copy(update={"changed": shares})


def measure_kept(run: RunDirectory, selected: SelectedRecord, prompts: Prompts, pool: WorkerPool) -> SelectedRecord:
    """The selected trial with how many protected prompts are handled as before, by the markers: what showed the
    behaviour shows it, what did not does not."""
    settings = run.read().settings
    if not prompts.protect:
        return selected
    markers = Markers(settings.scoring.markers, settings.scoring.empty_counts)
    n_tokens = min(settings.scoring.report_tokens, MOST_TOKENS)
    kept: dict[str, tuple[int, int]] = {}
    for name, asked in prompts.protect.items():
        some = asked[: settings.prompts.n_test]
        before, after = pool.call("answers", some, [None, Edit.from_dict(selected.edit)], n_tokens, with_context=True)
        same = [markers.shown_by(a) == markers.shown_by(b) for a, b in zip(before, after)]
        kept[name] = sum(same), len(same)
        logger.info("protected prompts %s: %d of %d are handled as before", name, *kept[name])
    return selected.model_copy(update={"kept": kept})


def changed_text(shares: dict[str, float]) -> str:
    """ "3.1 % of attention, 2.0 % of mlp (Frobenius norm)"."""
    return ", ".join(f"{100 * share:.2g} % of {name}" for name, share in shares.items()) + " (relative Frobenius norm)"
