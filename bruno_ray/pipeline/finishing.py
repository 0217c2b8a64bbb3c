"""After the choice: score the trial on the test prompts, save it, and measure what was saved."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any

import psutil

from bruno_ray import organism
from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import ModelError, TrialError
from bruno_ray.files import write_json
from bruno_ray.pipeline.choosing import study_of
from bruno_ray.pipeline.judging import judge_run, read_answers, with_judge
from bruno_ray.pipeline.side_effects import measure_changes, measure_kept
from bruno_ray.pipeline.stages import Laps, timed
from bruno_ray.pipeline.steps import evaluation_context, score_unedited, worker_pool
from bruno_ray.progress import phase
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt, Prompts
from bruno_ray.publishing.comparing import comparison_lines
from bruno_ray.publishing.report import write_report
from bruno_ray.publishing.reproduction import describe
from bruno_ray.runs import reproduction
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import Readings, RunRecord, Sample, ScoresRecord, SelectedRecord, TestPrompt
from bruno_ray.scoring.markers import Markers
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ModelSettings
from bruno_ray.workers.exchanged import EvaluationContext
from bruno_ray.workers.pool import WorkerPool
from bruno_ray.workers.session import ray_session

logger = logging.getLogger(__name__)

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
ROOM = 2.0
"""Times the size of the model that must be free to save it while a worker has it."""

SAMPLES = 12
"""Test prompts whose answers before and after go into the report."""

SAMPLE_TOKENS = 100
"""Longest of them that is made for it."""

SHOWN, LINE = 3, 160
"""Of these, that many are shown in the log, up to so many characters each."""


def select(run: RunDirectory, selected: SelectedRecord) -> None:
    """Make a trial the run's own selection. What only the one before had, such as its truth score, goes with that; what
    was measured of the same trial's saved model stays."""

    def change(record: RunRecord) -> dict[str, Any]:
        before = record.selected
        if before is None or before.number != selected.number:
            return {"selected": selected, "extra": {}}
        kept = {name: getattr(before, name) for name in ("saved", "saved_path") if getattr(selected, name) is None}
        return {"selected": selected.model_copy(update=kept)}

    run.change(change)


def score_selected(
    run: RunDirectory, selected: SelectedRecord, prompts: Prompts, pool: WorkerPool, own: bool = True
) -> SelectedRecord:
    """Test scores of a trial, applied live, and of its runner-up beside it; the trial with them.

    Args:
        own: it becomes the run's selected trial, with sample answers. Otherwise only what the unedited model scores is
            noted.

    Raises:
        TrialError: it has no scores there (a logit is not a number).
    """
    record = run.read()
    context = evaluation_context(record, prompts, "test", run.load_directions())
    unedited = score_unedited(run, "test", context, pool)
    edit = Edit.from_dict(selected.edit)
    runner_up = selected.runner_up if own else None
    edits = [edit, Edit.from_dict(runner_up.edit)] if runner_up else [edit]
    outcome, *second = pool.call("evaluate", edits, with_context=True)  # together they take little longer than alone
    if outcome.scores is None:
        raise TrialError(
            f"trial {selected.number} has no scores on the test prompts ({outcome.error}): choose another one with"
            f" `bruno-ray save {run.name} --trial N`"
        )
    if runner_up is not None and second[0].scores is not None:
        runner_up = runner_up.model_copy(update={"test": ScoresRecord.of(second[0].scores)})
    selected = selected.model_copy(update={"test": ScoresRecord.of(outcome.scores), "runner_up": runner_up})
    if own:
        selected = measure_kept(run, measure_changes(run, selected, pool), prompts, pool)
        select(run, selected)
        run.save_test_prompts(
            [
                TestPrompt(side=side, prompt=prompt.user, category=prompt.category)
                for side in ("target", "baseline")
                for prompt in getattr(prompts, side).test
            ]
        )
        answers = {"unedited": read_answers(unedited), "edited": read_answers(outcome.scores)}
        run.save_readings(Readings(trial=selected.number, **answers))
        write_reproduction(run, run.read(), prompts, run.path, public=False)
        if entropies := routing_entropies(edit, context, pool):
            run.update(extra=entropies)
        samples = sample_answers(edit, context, pool, (unedited, outcome.scores))
        run.save_samples(samples)
        for line in sample_lines([sample for sample in samples if sample.side == "target"][:SHOWN]):
            logger.info("%s", line)
    for line in comparison_lines(run.read().model_copy(update={"selected": selected})):
        logger.info("%s", line)
    return selected


def write_reproduction(run: RunDirectory, record: RunRecord, prompts: Prompts, folder: Path, public: bool) -> None:
    """reproduce.json of the selected trial of ``record``, if it has been tested. One that is ``public`` travels."""
    if record.selected is None or record.selected.test is None or "test" not in record.baseline:
        return
    described = describe(record, prompts, run.load_directions(), public)
    write_json(folder / reproduction.FILE, described.model_dump(mode="json"))


def sample_answers(
    edit: Edit, context: EvaluationContext, pool: WorkerPool, before_after: tuple[Scores, Scores]
) -> list[Sample]:
    """Answers to a few test prompts of either side, before and after: those that came with the scores, as far as they
    did, and others made for it."""
    markers = Markers(context.scoring.markers, context.scoring.empty_counts)
    samples = []
    for side in ("target", "baseline"):
        prompts = getattr(context, side)[: SAMPLES // 2]
        if side == "target" and all(scores.answers for scores in before_after):
            answers = [[answer for _, answer in scores.answers[: len(prompts)]] for scores in before_after]
        else:
            n_tokens = min(context.scoring.response_tokens, SAMPLE_TOKENS)
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


def routing_entropies(edit: Edit, context: EvaluationContext, pool: WorkerPool) -> dict[str, str]:
    """How evenly a mixture of experts is used on the target prompts, before and after; nothing where there is none."""
    given = (context.target, context.response_prefix, context.date)
    try:
        before = pool.call("routing", *given).entropy()
        if before is None:
            return {}
        after = pool.call("routing", *given, edit, context.bank).entropy()
    except ModelError as error:
        logger.warning("the entropy of routing is not reported: %s", error)
        return {}
    text = f"{before:.3f} before, {after:.3f} after (1: all experts of a layer get as many tokens)"
    return {"entropy_of_routing": text}


def sample_lines(samples: Sequence[Sample]) -> list[str]:
    """Prompts with the beginnings of their answers before and after, for a log."""
    lines = []
    for sample in samples:
        answers = (("before", sample.before), ("after", sample.after))
        lines += [f"asked: {sample.prompt}", *(f"  {when}: {shorten(text, LINE)}" for when, text in answers)]
    return lines


Choose = Callable[[WorkerPool], SelectedRecord]


def finish(run: RunDirectory, prompts: Prompts, choose: Choose, folder: Path | None, own: bool = True) -> int:
    """Choose a trial, test it, save it and measure what was saved, with a worker of its own; returns its number.

    Args:
        choose: given the worker, since a rule measures the best trials again.
        folder: where the model goes; None only tests.
        own: the trial becomes the selected one, and the report follows. Otherwise selection and report stay.
    """
    laps = Laps()
    if own:
        laps.note_in(run)
    with ray_session(run.read().settings.ray):
        laps.end("ray")
        with worker_pool(run.read().settings, workers=1) as pool:
            if folder is not None:
                with phase("starting workers", pool.progress):  # importing takes as long as the worker needs
                    import_module("bruno_ray.publishing.saving")
            pool.wait_ready()
            laps.end("model")
            picked = choose(pool)
            with timed(run, "test", pool) if own else nullcontext():
                picked = score_selected(run, picked, prompts, pool, own)
            if own:
                write_report(run, study_of(run.path, run.read().settings))  # agrees with the selection if saving fails
            other = None if own else picked
            if folder is not None and has_room(run.read()):
                write_model(run, prompts, folder, other, pool)
                folder = None
            laps.begin()
        laps.end("stopping")
        if own:
            judge_run(run)  # the worker is gone
            laps.end("judge")
        if folder is not None:
            write_model(run, prompts, folder, other)
        laps.begin()
    laps.end("stopping")
    if own:
        write_report(run, study_of(run.path, run.read().settings))
        laps.end("report")
    return picked.number


def saved_folder(run: RunDirectory, trial: int) -> Path | None:
    """Where that trial was saved to, if it is still there."""
    record = run.read()
    places = [Path(folder) for folder, number in record.saved_elsewhere.items() if number == trial]
    if record.selected is not None and record.selected.number == trial and record.selected.saved_path:
        places.insert(0, Path(record.selected.saved_path))
    return next((place for place in places if (place / "README.md").is_file()), None)


def measured_folder(run: RunDirectory) -> Path | None:
    """Where the selected trial was saved to, if it is still there and has been measured."""
    selected = run.read().selected
    return saved_folder(run, selected.number) if selected is not None and selected.saved is not None else None


def folder_to_fill(run: RunDirectory, number: int) -> Path | None:
    """Where that trial is to be saved; None where it is the selected one, and saved and measured already."""
    selected = run.read().selected
    is_selected = selected is not None and selected.number == number
    if is_selected and (folder := measured_folder(run)) is not None:
        logger.info("trial %d is saved in %s already", number, folder)
        return None
    return free_model_folder(run, number)


def free_model_folder(run: RunDirectory, number: int) -> Path | None:
    """`model/`, or a folder named by the trial where a resumed run has saved one before; None if that is there too."""
    folders = (run.model_folder, run.path / f"model-{number}")
    return next((folder for folder in folders if not folder.exists()), None)


def has_room(record: RunRecord) -> bool:
    """Whether this machine can hold the model once more beside a worker that may be here too, and no judge has to read
    the saved model's answers before its card is written."""
    if record.settings.scoring.judge.is_given:
        return False
    n_bytes = record.model.get("n_parameters", 0) * BYTES.get(record.model.get("dtype", ""), 4)
    return bool(psutil.virtual_memory().available > ROOM * n_bytes)


def write_model(
    run: RunDirectory,
    prompts: Prompts,
    folder: Path,
    other: SelectedRecord | None = None,
    pool: WorkerPool | None = None,
) -> None:
    """Save the selected trial. What is reported of it is measured on the files, read back by a worker.

    Args:
        other: this trial is saved, and the run's own selection stays as it is.
        pool: its worker reads the files, and is of no further use; without one, a worker is started for it.
    """
    from bruno_ray.publishing.saving import save_selected

    record = run.read()
    settings = record.settings

    def measure(saved: Path) -> Scores:
        context = evaluation_context(record, prompts, "test", run.load_directions())
        model = settings.model.model_copy(
            update={"id": str(saved), "gguf_file": None, "revision": None, "quantization": "none"}
        )
        with ExitStack() as stack:
            worker = pool
            if worker is None:
                stack.enter_context(ray_session(settings.ray))
                worker = stack.enter_context(worker_pool(settings, workers=1))
                worker.wait_ready()
            worker.set_context(context)
            with phase("measuring the saved model", worker.progress):
                scores = worker.call("measure_other", model, with_context=True)
        scores = with_judge(settings, scores, record)
        if other is None and (readings := run.load_readings()) is not None:
            run.save_readings(readings.model_copy(update={"saved": read_answers(scores)}))
        return scores

    with timed(run, "save") if other is None else nullcontext():
        saved, scores = save_selected(run, measure, folder, other)
    after = run.read()
    if other is not None:
        after = after.model_copy(update={"selected": other.model_copy(update={"saved": scores})})
    else:
        write_reproduction(run, after, prompts, run.path, public=False)
    write_reproduction(run, after, prompts, saved.folder, public=True)
    shown, total = scores.counts["behaviour_rate"]
    low, high = scores.intervals["behaviour_rate"]
    logger.info(
        "saved %s; read back from disk it shows the behaviour in %d/%d test prompts (95%% interval %.1f%% to %.1f%%),"
        " KL %.4f",
        *(saved.folder, shown, total, 100 * low, 100 * high, scores.values["kl_divergence"]),
    )
    laps = Laps()
    truth = score_truth(record, saved.folder)
    if truth and other is None:
        laps.note_in(run)
        laps.end("truth")
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
