"""After the study: choose a trial, score it on the test prompts, save it, and measure what was saved."""

import logging
from pathlib import Path

import optuna

from bruno_ray import organism
from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import TrialError
from bruno_ray.generation.engine import Engine
from bruno_ray.model.loading import load_model
from bruno_ray.pipeline.steps import evaluation_context, score_unedited, timed, worker_pool
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt, Prompts
from bruno_ray.publishing.saving import save_selected
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import Sample, ScoresRecord, SelectedRecord
from bruno_ray.scoring import Scores
from bruno_ray.scoring.markers import Markers
from bruno_ray.settings import ModelSettings, Settings
from bruno_ray.study import selection
from bruno_ray.study.selection import TrialRecord, load_trials
from bruno_ray.study.storage import load_study
from bruno_ray.study.tables import describe_edit, front_table
from bruno_ray.terminal import ask_number, can_ask, console
from bruno_ray.workers.model_worker import EvaluationContext
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


def print_front(run: RunDirectory, all_trials: bool = False) -> None:
    """Print the Pareto front, or every completed trial."""
    settings = run.read().settings
    trials = trials_of(run.path, settings)
    complete = [trial for trial in trials if trial.state == "COMPLETE"]
    objectives = settings.scoring.objectives
    shown = complete if all_trials else selection.pareto_front(complete, objectives)
    title = f"{run.name}: {'all' if all_trials else 'Pareto front of'} {len(complete)} completed trials"
    console().print(front_table(shown, objectives, title=title))


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


def choose(run: RunDirectory, auto: bool, number: int | None = None) -> bool:
    """Select a trial by number, by rule, or by asking on a terminal; False if none was.

    Where it may ask, hold no workers (see `ask_for_trial`).
    """
    settings = run.read().settings
    trials = note_trials(run)
    if number is None and auto:
        number = selection.auto_select(trials, settings.selection.max_kl, settings.scoring.objectives).number
    elif number is None:
        number = ask_for_trial(run, "Which trial shall be saved?")
    if number is None:
        return False
    trial = selection.find_trial(trials, number)
    edit = dict(trial.edit or {})
    logger.info("trial %d: %s", number, describe_edit(edit))
    run.update(selected=SelectedRecord(number=number, edit=edit, validation=ScoresRecord.of(trial)))
    return True


def score_selected(run: RunDirectory, context: EvaluationContext, pool: WorkerPool) -> None:
    """Test scores and sample answers of the selected trial, applied live.

    Raises TrialError if it has no scores there (a logit is not a number).
    """
    selected = run.read().selected
    assert selected is not None
    edit = Edit.from_dict(selected.edit)
    score_unedited(run, "test", context, pool)
    (outcome,) = pool.call("evaluate", [edit], with_context=True)
    if outcome.scores is None:
        raise TrialError(
            f"trial {selected.number} has no scores on the test prompts ({outcome.error}): choose another one with"
            f" `bruno-ray save {run.name} --trial N`"
        )
    run.update(selected=selected.model_copy(update={"test": ScoresRecord.of(outcome.scores)}))
    markers = Markers(context.scoring.markers, context.scoring.empty_counts)
    samples = []
    for side in ("target", "baseline"):
        prompts = getattr(context, side)[: SAMPLES // 2]
        n_tokens = 2 * context.scoring.response_tokens
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
    run.save_samples(samples)


def finish(run: RunDirectory, prompts: Prompts, folder: Path | None) -> None:
    """What a run does with the selected trial, afterwards and with a worker of its own: test it, save it, measure that.

    Args:
        folder: where the model goes; None only tests.
    """
    record = run.read()
    settings = record.settings
    context = evaluation_context(settings, prompts, "test", run.load_directions(), record.response_prefix)
    with ray_session(settings.ray):
        with timed(run, "test"), worker_pool(settings, workers=1) as pool:
            pool.wait_ready()
            score_selected(run, context, pool)
        if folder is not None:
            write_model(run, prompts, folder)


def free_model_folder(run: RunDirectory) -> Path | None:
    """`model/`, or a folder named by the trial where a resumed run has saved one before; None if that is there too."""
    selected = run.read().selected
    assert selected is not None
    folders = (run.model_folder, run.path / f"model-{selected.number}")
    return next((folder for folder in folders if not folder.exists()), None)


def write_model(run: RunDirectory, prompts: Prompts, folder: Path) -> None:
    """Save the selected trial. What is reported of it is measured on the files, read back by a worker of its own."""
    record = run.read()
    settings = record.settings

    def measure(saved: Path) -> Scores:
        context = evaluation_context(settings, prompts, "test", run.load_directions(), record.response_prefix)
        other = settings.model.model_copy(update={"id": str(saved), "revision": None, "quantization": "none"})
        with ray_session(settings.ray), worker_pool(settings, workers=1) as pool:
            pool.wait_ready()
            pool.set_context(context)
            return pool.call("measure_other", other, with_context=True)

    with timed(run, "save"):
        saved, scores = save_selected(run, measure, folder)
    shown, total = scores.counts["behaviour_rate"]
    low, high = scores.intervals["behaviour_rate"]
    logger.info(
        "saved %s; read back from disk it shows the behaviour in %d/%d test prompts (95%% interval %.1f%% to %.1f%%),"
        " KL %.4f",
        *(saved.folder, shown, total, 100 * low, 100 * high, scores.values["kl_divergence"]),
    )
    score_truth(run)


def score_truth(run: RunDirectory) -> None:
    """For an embedded organism: whether the saved model's answers are right, which no other model can be asked."""
    record = run.read()
    folder = organism.folder_of(record.settings.model.id)
    if folder is None or record.selected is None or record.selected.saved_path is None:
        return
    engine = Engine(load_model(ModelSettings(id=record.selected.saved_path)))

    def generate(prompts: list[str]) -> list[str]:
        ids = render(engine.tokenizer, [Prompt(prompt) for prompt in prompts], record.response_prefix)
        (responses,) = engine.generate(ids, [None], record.settings.scoring.response_tokens)
        return [response.text for response in responses]

    truth = organism.truth_score(generate, folder)
    for name, text in truth.lines().items():
        logger.info("organism, saved model read back: %s %s", name, text)
    run.update(extra={f"organism: {name}": text for name, text in truth.lines().items()})
