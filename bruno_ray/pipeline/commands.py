"""What can be done beside a run and with one afterwards; one function per command of the command line."""

import logging
from pathlib import Path
from typing import Any

from rich.table import Table

from bruno_ray import organism as organisms
from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import OutputError
from bruno_ray.generation.engine import Engine
from bruno_ray.model.coverage import coverage as coverage_of
from bruno_ray.model.coverage import format_coverage
from bruno_ray.model.loading import load_model
from bruno_ray.pipeline.chat import chat_loop
from bruno_ray.pipeline.finishing import ask_for_trial, choose, finish, print_front, study_of, trials_of
from bruno_ray.pipeline.steps import evaluation_context, find_model, find_response_prefix, worker_pool
from bruno_ray.prompts.sets import load_prompts
from bruno_ray.publishing import report as reports
from bruno_ray.publishing import wording
from bruno_ray.publishing.hub import upload
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import ScoresRecord
from bruno_ray.settings import ModelSettings, Settings
from bruno_ray.study import selection
from bruno_ray.terminal import can_ask, console
from bruno_ray.workers.session import ray_session

logger = logging.getLogger(__name__)


def front(path: Path, all_trials: bool = False) -> None:
    """Print the Pareto front, or every completed trial; works while the study is running."""
    print_front(RunDirectory.open(path), all_trials)


def save(
    path: Path,
    trial: int | None = None,
    auto: bool = False,
    to: Path | None = None,
    upload_to: str | None = None,
    private: bool = False,
) -> Path:
    """Bake a trial, write the model, measure what was written; returns its folder."""
    run = RunDirectory.open(path)
    record = run.read()
    folder = (to or run.model_folder).absolute()
    if folder.exists():
        raise OutputError(f"{folder} exists already: name another folder with --to, or remove it")
    if trial is None and (auto or not can_ask()):
        print_front(run)
    if not choose(run, auto=auto, number=trial):
        raise OutputError(f"no trial was chosen: `bruno-ray save {run.name} --trial N` saves one, --auto picks by rule")
    finish(run, load_prompts(record.settings), folder)
    reports.write_report(run, study_of(path, record.settings))
    if upload_to:
        logger.info("uploaded to %s", upload(folder, upload_to, private=private))
    return folder


def report(path: Path) -> Path:
    """Write report.html again, from what the run directory and the study hold now."""
    run = RunDirectory.open(path)
    return reports.write_report(run, study_of(path, run.read().settings))


def evaluate(settings: Settings, base: str | None = None) -> None:
    """Score a model on the test prompts, against a base model if one is named, and print the table."""
    prompts = load_prompts(settings)
    settings = find_model(settings)
    reference = settings if base is None else settings.model_copy(update={"model": ModelSettings(id=base)})
    with ray_session(settings.ray), worker_pool(find_model(reference), workers=1) as pool:
        pool.wait_ready()
        prefix = find_response_prefix(settings, prompts, pool)
        pool.set_context(evaluation_context(settings, prompts, "test", {}, prefix))
        columns = {reference.model.id: ScoresRecord.of(pool.call("baseline", with_context=True))}
        if base is not None:
            other = pool.call("measure_other", settings.model, with_context=True)
            columns[settings.model.id] = ScoresRecord.of(other)
    table = Table("metric", *columns, title="Test prompts")
    for metric in next(iter(columns.values())).values:
        table.add_row(wording.label(metric), *(wording.measured(scores, metric) for scores in columns.values()))
    console().print(table)


def coverage(settings: Settings) -> None:
    """Print which share of the parameters that write to the residual stream an edit reaches."""
    loaded = load_model(find_model(settings).model)
    print(format_coverage(coverage_of(loaded.model, loaded.architecture)))


def chat(
    path: Path, trial: int | None = None, unedited: bool = False, system_prompt: str | None = None, **options: Any
) -> None:
    """Talk to a trial (the selected one, if none is named) in the terminal, applied live to the base model."""
    run = RunDirectory.open(path)
    settings = run.read().settings
    if trial is None and run.read().selected is None and not unedited:
        trial = ask_for_trial(run, "Which trial do you want to talk to?")
        if trial is None:
            raise OutputError(f"no trial was chosen: name one as {run.name}:TRIAL, see `bruno-ray front {run.name}`")
    record = run.read()
    edit = record.selected.edit if record.selected else None
    if trial is not None:
        edit = selection.find_trial(trials_of(path, settings), trial).edit
    engine = Engine(load_model(settings.model))
    resolved = engine.editor.resolve(Edit.from_dict(edit), run.load_directions()) if edit else None
    chat_loop(
        engine,
        resolved,
        response_prefix=record.response_prefix,
        edited=not unedited,
        system_prompt=settings.prompts.system_prompt if system_prompt is None else system_prompt,
        **options,
    )


def organism(recipe: str, to: Path | None = None) -> Path:
    """Train the embedded model organism, once; returns its folder."""
    return organisms.build(to, recipe=recipe)
