"""Which trial of a study becomes the model: picked by a person, or by rule among finalists that are measured again.

A search takes the best of hundreds of trials on the same few prompts and reads only the beginning of each answer, so
the best looks better than it is. Before the rule takes one, the best few are measured once more: on prompts that the
search has not seen, with answers of full length.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import optuna

from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import NoStudyError, StudyError
from bruno_ray.pipeline.stages import timed
from bruno_ray.pipeline.steps import evaluation_context
from bruno_ray.prompts.sets import Prompts
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunnerUpRecord, ScoresRecord, SelectedRecord
from bruno_ray.settings import Settings
from bruno_ray.settings.passwords import without_password
from bruno_ray.study import selection
from bruno_ray.study.selection import Choice, TrialRecord, load_trials
from bruno_ray.study.storage import load_study
from bruno_ray.study.tables import describe_edit, front_lines, front_table, with_selected
from bruno_ray.terminal import ask_number, can_ask, console
from bruno_ray.workers.pool import WorkerPool

logger = logging.getLogger(__name__)


def study_of(path: Path, settings: Settings) -> optuna.Study:
    """The study of a run, for reading, also while another process runs it."""
    return load_study(settings.study.storage, path, settings.study.name or path.name)


def trials_of(path: Path, settings: Settings) -> list[TrialRecord]:
    """Trials of a run's study. Says so when there are fewer than the run has had: its journal was cut or replaced."""
    trials = load_trials(study_of(path, settings))
    run = RunDirectory(path)
    noted = sum(run.read().n_trials.values()) if run.run_file.is_file() else 0
    if len(trials) < noted:
        place = without_password(settings.study.storage) if settings.study.storage else run.journal_file
        logger.warning(
            "the study of %s holds %d of its %d trials, so it was cut short or is another one: restore %s from a copy",
            *(path.name, len(trials), noted, place),
        )
    return trials


def n_complete(path: Path, settings: Settings) -> int:
    """Trials of a run that count, pruned ones too; none if its search has not begun."""
    try:
        return sum(trial.state in selection.COUNTED for trial in trials_of(path, settings))
    except NoStudyError:
        return 0


def note_trials(run: RunDirectory) -> list[TrialRecord]:
    """Note in run.json how many trials are in which state; returns them."""
    trials = trials_of(run.path, run.read().settings)
    states = [trial.state for trial in trials]
    run.update(n_trials={state: states.count(state) for state in dict.fromkeys(states)})
    return trials


# ----- by a person -----


def print_front(run: RunDirectory, all_trials: bool = False) -> None:
    """Print the Pareto front and, marked, the selected trial; or every completed trial."""
    record = run.read()
    trials = trials_of(run.path, record.settings)
    complete = [trial for trial in trials if trial.state == "COMPLETE"]
    objectives = record.settings.scoring.objectives
    number = record.selected.number if record.selected else None
    front = selection.pareto_front(complete, objectives)
    shown = complete if all_trials else with_selected(front, complete, number)
    title = f"{run.name}: {'all' if all_trials else 'Pareto front of'} {len(complete)} completed trials"
    pruned = sum(trial.state == "PRUNED" for trial in trials)
    title += f", {pruned} pruned" if pruned else ""
    title += f" (* trial {number} is selected)" if number is not None else ""
    console().print(front_table(shown, objectives, title=title, selected=number))


def ask_for_trial(run: RunDirectory, question: str) -> int | None:
    """Show the front and ask for a trial; None if there is nobody to ask, or nobody answers.

    Hold no workers meanwhile. Ctrl-C is KeyboardInterrupt; nothing has been written then.
    """
    if not can_ask():
        return None
    print_front(run)
    trials = trials_of(run.path, run.read().settings)
    return ask_number(question, [trial.number for trial in trials if trial.state == "COMPLETE"])


def pick(run: RunDirectory, number: int | None = None) -> SelectedRecord | None:
    """The trial of that number, or whichever a person at the terminal names; None if nobody names one.

    The run's own selection stays what it is.
    """
    trials = note_trials(run)
    if number is None:
        number = ask_for_trial(run, "Which trial shall be saved?")
    return None if number is None else _selected(selection.find_trial(trials, number))


# ----- by rule -----


def pick_automatically(run: RunDirectory, prompts: Prompts, pool: WorkerPool) -> SelectedRecord:
    """What `selection.auto_select` takes of the finalists, measured again.

    Raises:
        StudyError: no trial is complete, or none is under the KL bound.
    """
    settings = run.read().settings
    objectives, max_kl = settings.scoring.objectives, settings.selection.max_kl
    trials = note_trials(run)
    best = selection.finalists(trials, max_kl, objectives, settings.selection.finalists)
    with timed(run, "finalists", pool):
        measured = measure_again(run, prompts, best, pool)
    try:
        choice = selection.auto_select(measured, max_kl, objectives, {trial.number: trial for trial in trials})
        reason = f"measured again on {_how(prompts, settings)}: {choice.reason}"
    except StudyError:
        # Longer answers and other prompts: all of them may be above the bound now.
        choice = selection.auto_select(best, max_kl, objectives)
        reason = f"no finalist keeps to KL <= {max_kl:g} when measured again; by the search: {choice.reason}"
    picked = next(trial for trial in trials if trial.number == choice.trial.number)
    explain(picked, trials, objectives, reason)
    if broken := selection.looks_broken(choice.trial):
        logger.warning("trial %d: %s", picked.number, broken)
    return _selected(picked, reason, broken, choice)


def measure_again(
    run: RunDirectory, prompts: Prompts, trials: Sequence[TrialRecord], pool: WorkerPool
) -> list[TrialRecord]:
    """The same trials with their scores on the finalists' prompts, noted in run.json.

    Where there are no such prompts, on those of the search, with longer answers at least. A trial that has no scores
    there (a logit is not a number) is left out, unless that leaves none.
    """
    record = run.read()
    part = "finalists" if prompts.target.finalists and prompts.baseline.finalists else "validation"
    scoring = record.settings.scoring.for_report(further=False)
    context = evaluation_context(record, prompts, part, run.load_directions(), scoring)
    logger.info("measuring the %d best trials again, on %s", len(trials), _how(prompts, record.settings))
    pool.set_context(context)
    outcomes = pool.call("evaluate", [Edit.from_dict(dict(trial.edit or {})) for trial in trials], with_context=True)
    found = {
        trial.number: ScoresRecord.of(outcome.scores) for trial, outcome in zip(trials, outcomes) if outcome.scores
    }
    run.change(lambda _: {"finalists": {str(number): scores for number, scores in found.items()}})
    measured = [
        # What only guides the search is not measured again.
        replace(trial, values=trial.values | found[trial.number].values, counts=found[trial.number].counts)
        for trial in trials
        if trial.number in found
    ]
    for line in front_lines(measured, record.settings.scoring.objectives):
        logger.info("  %s", line)
    return measured or list(trials)


def _how(prompts: Prompts, settings: Settings) -> str:
    unseen = min(len(prompts.target.finalists), len(prompts.baseline.finalists))
    which = f"{len(prompts.target.finalists)} unseen" if unseen else f"the search's {len(prompts.target.validation)}"
    return f"{which} prompts, up to {settings.scoring.report_tokens} tokens"


def explain(picked: TrialRecord, trials: Sequence[TrialRecord], objectives: Sequence[str], reason: str) -> None:
    """Log why a trial was picked, and the front it is compared with where it is not a part of that."""
    logger.info("picked trial %d: %s", picked.number, reason)
    front = selection.pareto_front(trials, objectives)
    if picked not in front:
        logger.info("it (*) is not on the Pareto front of %s:", ", ".join(objectives))
        for line in front_lines(with_selected(front, trials, picked.number), objectives, picked.number):
            logger.info("%s", line)


def _selected(trial: TrialRecord, reason: str = "", warning: str = "", choice: Choice | None = None) -> SelectedRecord:
    edit = dict(trial.edit or {})
    logger.info("trial %d: %s", trial.number, describe_edit(edit))
    second = choice.runner_up if choice else None
    return SelectedRecord(
        number=trial.number,
        reason=reason,
        warning=warning,
        edit=edit,
        validation=ScoresRecord.of(trial),
        training=trial.training,
        runner_up=RunnerUpRecord(number=second.number, edit=dict(second.edit or {})) if second else None,
    )
