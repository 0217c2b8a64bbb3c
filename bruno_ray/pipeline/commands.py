"""What can be done beside a run and with one afterwards; one function per command of the command line.

What computes in this process is imported where it does: torch and transformers take ten seconds.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from bruno_ray import organism as organisms
from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import OutputError, SettingsError, first_line
from bruno_ray.files import output_errors, write_json, write_text
from bruno_ray.model.coverage_table import format_coverage
from bruno_ray.pipeline.choosing import ask_for_trial, pick, pick_automatically, print_front, study_of, trials_of
from bruno_ray.pipeline.finishing import finish
from bruno_ray.pipeline.judging import judge_run, with_judge
from bruno_ray.pipeline.steps import evaluation_context, find_model, find_response_prefix, for_workers, worker_pool
from bruno_ray.prompts.sets import load_prompts
from bruno_ray.publishing import report as reports
from bruno_ray.publishing import wording
from bruno_ray.publishing.bench_picture import bench_svg, compared
from bruno_ray.publishing.hub import check, plan, send
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord, ScoresRecord
from bruno_ray.settings import Settings
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
    public: bool = False,
) -> Path:
    """Bake a trial, write the model, measure what was written; returns its folder.

    A model in RUN/model is the run's own, and the trial becomes the selected one. What is saved elsewhere leaves
    selection, report and RUN/model alone. Where it is uploaded, login and repository are looked at first.
    """
    run = RunDirectory.open(path)
    record = run.read()
    folder = (to or run.model_folder).absolute()
    own = folder.resolve() == run.model_folder.resolve()
    if folder.exists():
        raise OutputError(f"{folder} exists already: name another folder with --to, or remove it")
    repository = check(upload_to, private=not public) if upload_to else None
    if trial is None and (auto or not can_ask()):
        print_front(run)
    prompts = load_prompts(record.settings)
    picked = None if auto and trial is None else pick(run, trial)
    if picked is None and not auto:
        raise OutputError(f"no trial was chosen: `bruno-ray save {run.name} --trial N` saves one, --auto picks by rule")
    number = finish(run, prompts, lambda pool: picked or pick_automatically(run, prompts, pool), folder, own)
    if not own:
        logger.info("%s", _what_stays(run, number))
    if repository:
        logger.info("uploaded to %s", send(plan(folder, repository)))
    return folder


def _what_stays(run: RunDirectory, number: int) -> str:
    selected = run.read().selected
    own = f"its selected trial stays {selected.number}" if selected else "no trial of it is selected"
    return f"{run.name} keeps its own model and report, and notes where trial {number} lies: {own}"


def report(path: Path) -> Path:
    """Write report.html again, from what the run directory and the study hold now.

    Answers that the run's judge has not read yet, since it could not be asked, are brought to it first.
    """
    run = RunDirectory.open(path)
    judge_run(run)
    return reports.write_report(run, study_of(path, run.read().settings))


def evaluate(settings: Settings, base: str | None = None) -> None:
    """Score a model on the test prompts, against a base model if one is named, and print the table.

    The base is loaded with the model's own settings: dtypes, quantization, revision and placement are the same.
    """
    prompts = load_prompts(settings)
    name = settings.model.id
    settings = find_model(settings)
    reference = settings
    if base is not None:
        reference = settings.model_copy(update={"model": settings.model.model_copy(update={"id": base})})
        reference = find_model(reference)
    record = RunRecord(settings=reference)
    with ray_session(settings.ray), worker_pool(reference, workers=1) as pool:
        pool.wait_ready()
        record = record.model_copy(update={"response_prefix": find_response_prefix(record, prompts, pool)})
        pool.set_context(evaluation_context(record, prompts, "test", {}))
        measured = [(base or name, pool.call("baseline", with_context=True))]
        if base is not None:
            measured.append((name, pool.call("measure_other", for_workers(settings.model), with_context=True)))
    columns = [(column, ScoresRecord.of(with_judge(settings, scores, record))) for column, scores in measured]
    table = Table("metric", *(name for name, _ in columns), title="Test prompts")
    for metric in columns[0][1].values:
        table.add_row(wording.label(metric), *(wording.measured(scores, metric) for _, scores in columns))
    console().print(table)


def coverage(settings: Settings) -> None:
    """Load the model, print where it is and which share of what writes to its residual stream an edit reaches."""
    from bruno_ray.ablation.places import further_places
    from bruno_ray.model.coverage import coverage as coverage_of
    from bruno_ray.model.loading import load_model

    loaded = load_model(find_model(settings).model, only_look=True)
    architecture = loaded.architecture
    name = f"{settings.model.id}: {architecture.family}"
    print(f"{name}, {architecture.n_layers} layers, {loaded.dtype} on {loaded.device}")
    print(format_coverage(coverage_of(loaded.model, architecture)))
    print("\nother edits that apply to this model (docs/search.md):")
    for name, reason in further_places(architecture).items():
        print(f"{name:<16} {f'no, {reason}' if reason else 'yes'}")
    if architecture.probed:
        print(
            f"{architecture.family} is in no table of architectures: this was found by probing and has passed its"
            " checks. Accept it for this model with --model.accept-probed true"
        )


def bench(
    settings: Settings,
    at_once: int,
    prompt_tokens: int,
    seconds: float,
    to: Path,
    compare: Path | None = None,
    began: float | None = None,
) -> None:
    """Time trials of a model in this process; figures go to ``to``, a picture beside it.

    Args:
        began: when the command began, of ``time.perf_counter``; now when not given.

    Raises:
        SettingsError: ``compare`` is no earlier bench, or one of another load.
        ModelError: the model cannot be loaded, or not one trial fits.
    """
    load_fields = {
        "prompts": settings.prompts.n_validation,
        "prompt_tokens": prompt_tokens,
        "response_tokens": settings.scoring.response_tokens,
        "kl_tokens": settings.scoring.kl_tokens,
    }
    began = time.perf_counter() if began is None else began
    old = _earlier_bench(compare, load_fields) if compare is not None else None
    with output_errors(to):
        to.parent.mkdir(parents=True, exist_ok=True)
    from bruno_ray.model.loading import load_model
    from bruno_ray.pipeline import benching

    def say(line: str) -> None:
        console().print(line, highlight=False)

    start = time.perf_counter()
    loaded = load_model(find_model(settings).model)
    before = {"program": start - began, "model": time.perf_counter() - start}
    say(f"loading the program {before['program']:.1f} s, the model {before['model']:.1f} s")
    load = benching.Load(**load_fields, most_trials=at_once, seconds=seconds)
    result = benching.bench(loaded, load, say) | {"seconds_before": before}
    with output_errors(to):
        write_json(to, result)
        write_text(to.with_suffix(".svg"), bench_svg(result))
    if old is not None:
        for line in compared(old, result):
            say(line)


def _earlier_bench(path: Path, load: dict[str, int]) -> dict[str, Any]:
    try:
        old = json.loads(path.read_text())
        same = {name: old["load"][name] for name in load}
        rows = [(row["trials"], row["trials_per_hour"]) for row in old["rows"]]
        known = old["bench"] == 1 and rows and old["date"] and old["machine"] and old["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"--compare: {path} is not a file of bruno-ray bench ({first_line(error)}): give one"
        ) from error
    if not known:
        raise SettingsError(f"--compare: {path} is of another version of bruno-ray bench: measure both again")
    for name, value in load.items():
        if same[name] != value:
            raise SettingsError(f"--compare: {path} has {name} = {same[name]}, this is {value}: make them the same")
    return old


def chat(
    path: Path, trial: int | None = None, unedited: bool = False, system_prompt: str | None = None, **options: Any
) -> None:
    """Talk to a trial (the selected one, if none is named) in the terminal, applied live to the base model."""
    from bruno_ray.generation.engine import BatchEngine
    from bruno_ray.model.loading import load_model
    from bruno_ray.pipeline.chat import chat_loop

    run = RunDirectory.open(path)
    settings = run.read().settings
    if trial is None and run.read().selected is None and not unedited:
        trial = ask_for_trial(run, "Which trial do you want to talk to?")
        if trial is None:
            raise OutputError(f"no trial was chosen: name one as {run.name}:TRIAL, see `bruno-ray front {run.name}`")
    record = run.read()
    settings = record.settings
    edit = record.selected.edit if record.selected else None
    if trial is not None:
        edit = selection.find_trial(trials_of(path, settings), trial).edit
    engine = BatchEngine(load_model(settings.model))
    resolved = engine.editor.resolve(Edit.from_dict(edit), run.load_directions()) if edit else None
    chat_loop(
        engine,
        resolved,
        response_prefix=record.response_prefix,
        date=record.date,
        edited=not unedited,
        system_prompt=settings.prompts.system_prompt if system_prompt is None else system_prompt,
        **options,
    )


def organism(recipe: str, to: Path | None = None) -> Path:
    """Train the embedded model organism, once; returns its folder."""
    return organisms.build(to, recipe=recipe)
