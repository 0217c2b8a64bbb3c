"""After the study: choose a trial, score it on the test prompts, save it, and measure what was saved."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import optuna

from bruno_ray import organism
from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import NoStudyError, TrialError
from bruno_ray.pipeline.judging import judge_run, read_answers, with_judge
from bruno_ray.pipeline.steps import evaluation_context, score_unedited, timed, worker_pool
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt, Prompts
from bruno_ray.publishing.report import write_report
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import Readings, RunRecord, Sample, ScoresRecord, SelectedRecord
from bruno_ray.scoring.markers import Markers
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ModelSettings, Settings
from bruno_ray.study import selection
from bruno_ray.study.selection import TrialRecord, load_trials
from bruno_ray.study.storage import load_study
from bruno_ray.study.tables import describe_edit, front_lines, front_table, with_selected
from bruno_ray.terminal import ask_number, can_ask, console
from bruno_ray.workers.exchanged import EvaluationContext
from bruno_ray.workers.pool import WorkerPool
from bruno_ray.workers.session import ray_session

logger = logging.getLogger(__name__)

SAMPLES = 12
"""Test prompts whose answers before and after go into the report."""


def study_of(path: Path, settings: Settings) -> optuna.Study:
    """The study of a run, for reading, also while another process runs it."""
    return load_study(settings.study.storage, path, settings.study.name or path.name)


def trials_of(path: Path, settings: Settings) -> list[TrialRecord]:
    return load_trials(study_of(path, settings))


def n_complete(path: Path, settings: Settings) -> int:
    """Completed trials of a run; none if its search has not begun."""
    try:
        return sum(trial.state == "COMPLETE" for trial in trials_of(path, settings))
    except NoStudyError:
        return 0


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
    title += f" (* trial {number} is selected)" if number is not None else ""
    console().print(front_table(shown, objectives, title=title, selected=number))


def note_trials(run: RunDirectory) -> list[TrialRecord]:
    """Note in run.json how many trials are in which state; returns them."""
    trials = trials_of(run.path, run.read().settings)
    states = [trial.state for trial in trials]
    run.update(n_trials={state: states.count(state) for state in dict.fromkeys(states)})
    return trials


def ask_for_trial(run: RunDirectory, question: str) -> int | None:
    """Show the front and ask for a trial; None if there is nobody to ask, or nobody answers.

    Hold no workers meanwhile. Ctrl-C is KeyboardInterrupt; nothing has been written then.
    """
    if not can_ask():
        return None
    print_front(run)
    trials = trials_of(run.path, run.read().settings)
    return ask_number(question, [trial.number for trial in trials if trial.state == "COMPLETE"])


def choose(run: RunDirectory, auto: bool, number: int | None = None) -> SelectedRecord | None:
    """Select a trial by number, by rule, or by asking on a terminal; None if none was.

    Where it may ask, hold no workers (see `ask_for_trial`).
    """
    selected = pick(run, auto, number)
    if selected is not None:
        select(run, selected)
    return selected


def pick(run: RunDirectory, auto: bool, number: int | None = None) -> SelectedRecord | None:
    """As `choose`, but the run's own selection stays what it is."""
    settings = run.read().settings
    trials = note_trials(run)
    reason = ""
    if number is None and auto:
        choice = selection.auto_select(trials, settings.selection.max_kl, settings.scoring.objectives)
        number, reason = choice.trial.number, choice.reason
    elif number is None:
        number = ask_for_trial(run, "Which trial shall be saved?")
    if number is None:
        return None
    trial = selection.find_trial(trials, number)
    edit = dict(trial.edit or {})
    if reason:
        explain(trial, trials, settings.scoring.objectives, reason)
    logger.info("trial %d: %s", number, describe_edit(edit))
    return SelectedRecord(number=number, reason=reason, edit=edit, validation=ScoresRecord.of(trial))


def explain(picked: TrialRecord, trials: Sequence[TrialRecord], objectives: Sequence[str], reason: str) -> None:
    """Log why a trial was picked, and the front it is compared with where it is not a part of that."""
    logger.info("picked trial %d: %s", picked.number, reason)
    front = selection.pareto_front(trials, objectives)
    if picked not in front:
        logger.info("it (*) is not on the Pareto front of %s:", ", ".join(objectives))
        for line in front_lines(with_selected(front, trials, picked.number), objectives, picked.number):
            logger.info("%s", line)


def select(run: RunDirectory, selected: SelectedRecord) -> None:
    """Make a trial the run's own selection. What only the one before had, such as its truth score, goes with that."""

    def change(record: RunRecord) -> dict[str, Any]:
        same = record.selected is not None and record.selected.number == selected.number
        return {"selected": selected, "extra": record.extra if same else {}}

    run.change(change)


def score_selected(run: RunDirectory, context: EvaluationContext, pool: WorkerPool) -> None:
    """Test scores, readings and sample answers of the selected trial, applied live.

    Raises TrialError if it has no scores there (a logit is not a number).
    """
    selected = run.read().selected
    assert selected is not None
    selected, readings = score_on_test(run, selected, context, pool)
    select(run, selected)
    run.save_readings(readings)
    run.save_samples(sample_answers(Edit.from_dict(selected.edit), context, pool))


def score_on_test(
    run: RunDirectory, selected: SelectedRecord, context: EvaluationContext, pool: WorkerPool
) -> tuple[SelectedRecord, Readings]:
    """The trial with its scores on the test prompts, applied live, and the answers that they are of.

    Notes the scores of the unedited model in run.json.

    Raises TrialError if it has none (a logit is not a number).
    """
    unedited = score_unedited(run, "test", context, pool)
    (outcome,) = pool.call("evaluate", [Edit.from_dict(selected.edit)], with_context=True)
    if outcome.scores is None:
        raise TrialError(
            f"trial {selected.number} has no scores on the test prompts ({outcome.error}): choose another one with"
            f" `bruno-ray save {run.name} --trial N`"
        )
    readings = Readings(trial=selected.number, unedited=read_answers(unedited), edited=read_answers(outcome.scores))
    return selected.model_copy(update={"test": ScoresRecord.of(outcome.scores)}), readings


def sample_answers(edit: Edit, context: EvaluationContext, pool: WorkerPool) -> list[Sample]:
    """Answers to a few test prompts of either side, before and after."""
    markers = Markers(context.scoring.markers, context.scoring.empty_counts)
    samples = []
    for side in ("target", "baseline"):
        prompts = getattr(context, side)[: SAMPLES // 2]
        n_tokens = context.scoring.response_tokens
        answers = pool.call("answers", prompts, [None, edit], n_tokens, with_context=True)
        for prompt, before, after in zip(prompts, *answers):
            shows = (markers.shown_by(before), markers.shown_by(after))
            samples.append(
                Sample(
                    side=side,
                    prompt=prompt.user,
                    before=before,
                    after=after,
                    shows_before=shows[0],
                    shows_after=shows[1],
                )
            )
    return samples


def finish(run: RunDirectory, prompts: Prompts, picked: SelectedRecord, folder: Path | None, own: bool = True) -> None:
    """What a run does with a trial that was picked, with a worker of its own: test it, save it, measure what was saved.

    Args:
        folder: where the model goes; None only tests.
        own: the trial becomes the selected one, and the report follows. Otherwise selection and report stay.
    """
    record = run.read()
    settings = record.settings
    context = evaluation_context(record, prompts, "test", run.load_directions())
    with ray_session(settings.ray):
        with timed(run, "test") if own else nullcontext(), worker_pool(settings, workers=1) as pool:
            pool.wait_ready()
            picked, readings = score_on_test(run, picked, context, pool)
            samples = sample_answers(Edit.from_dict(picked.edit), context, pool) if own else []
        if own:
            select(run, picked)
            run.save_samples(samples)
            run.save_readings(readings)
            judge_run(run)
            write_report(run, study_of(run.path, settings))  # selection and report agree if saving fails
        if folder is not None:
            write_model(run, prompts, folder, None if own else picked)
    if own:
        write_report(run, study_of(run.path, settings))


def free_model_folder(run: RunDirectory, number: int) -> Path | None:
    """`model/`, or a folder named by the trial where a resumed run has saved one before; None if that is there too."""
    folders = (run.model_folder, run.path / f"model-{number}")
    return next((folder for folder in folders if not folder.exists()), None)


def write_model(run: RunDirectory, prompts: Prompts, folder: Path, other: SelectedRecord | None = None) -> None:
    """Save the selected trial. What is reported of it is measured on the files, read back by a worker of its own.

    With ``other``, that trial is saved and the run's own selection stays as it is.
    """
    from bruno_ray.publishing.saving import save_selected

    record = run.read()
    settings = record.settings

    def measure(saved: Path) -> Scores:
        context = evaluation_context(record, prompts, "test", run.load_directions())
        model = settings.model.model_copy(
            update={"id": str(saved), "gguf_file": None, "revision": None, "quantization": "none"}
        )
        with ray_session(settings.ray), worker_pool(settings, workers=1) as pool:
            pool.wait_ready()
            pool.set_context(context)
            scores = pool.call("measure_other", model, with_context=True)
        scores = with_judge(settings, scores, record)
        if other is None and (readings := run.load_readings()) is not None:
            run.save_readings(readings.model_copy(update={"saved": read_answers(scores)}))
        return scores

    with timed(run, "save") if other is None else nullcontext():
        saved, scores = save_selected(run, measure, folder, other)
    shown, total = scores.counts["behaviour_rate"]
    low, high = scores.intervals["behaviour_rate"]
    logger.info(
        "saved %s; read back from disk it shows the behaviour in %d/%d test prompts (95%% interval %.1f%% to %.1f%%),"
        " KL %.4f",
        *(saved.folder, shown, total, 100 * low, 100 * high, scores.values["kl_divergence"]),
    )
    truth = score_truth(record, saved.folder)
    if truth and other is None:
        run.update(extra=truth)


def score_truth(record: RunRecord, saved: Path) -> dict[str, str]:
    """For an embedded organism: whether the saved model's answers are right, which no other model can be asked."""
    folder = organism.folder_of(record.settings.model.id)
    if folder is None:
        return {}

    from bruno_ray.generation.engine import BatchEngine
    from bruno_ray.model.loading import load_model

    lean_forward = record.settings.model.lean_forward
    engine = BatchEngine(load_model(ModelSettings(id=str(saved), lean_forward=lean_forward)))

    def generate(prompts: list[str]) -> list[str]:
        asked = [Prompt(prompt) for prompt in prompts]
        ids = render(engine.tokenizer, asked, record.response_prefix, date=record.date)
        (responses,) = engine.generate(ids, [None], record.settings.scoring.response_tokens)
        return [response.text for response in responses]

    lines = organism.truth_score(generate, folder).lines()
    for name, text in lines.items():
        logger.info("organism, saved model read back: %s %s", name, text)
    return {f"organism: {name}": text for name, text in lines.items()}
