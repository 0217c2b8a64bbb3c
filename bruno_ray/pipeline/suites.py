"""`bruno-ray evaluate X --suite S`: lm-eval asks the base model and its edit, side by side on a server of our own."""

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import ServerError, SettingsError
from bruno_ray.evaluating.harness import Harness, command_of, find_lm_eval
from bruno_ray.evaluating.own_server import Server, ended_by_sigterm, own_server
from bruno_ray.evaluating.results import TaskResult, compare, read_result
from bruno_ray.evaluating.suite import Suite, Task, load_suite
from bruno_ray.files import atomic_directory, file_chunks, write_json
from bruno_ray.model.locating import locate
from bruno_ray.pipeline.choosing import study_of, trials_of
from bruno_ray.progress import phase
from bruno_ray.publishing import task_table
from bruno_ray.publishing.report import write_report
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord, TaskRecord
from bruno_ray.settings import ModelSettings, Settings
from bruno_ray.study import selection
from bruno_ray.terminal import console
from bruno_ray.workers.shipping import absolute_if_folder

logger = logging.getLogger(__name__)

GATED = 1
"""Exit code when the edit costs more than the gate allows."""


@dataclass(frozen=True)
class Asked:
    """One of the models that are compared."""

    name: str
    """`base` or `edited`, for the log."""

    identity: dict[str, Any]
    """What its answers depend on."""

    tokenizer: ModelSettings


@dataclass(frozen=True)
class Plan:
    """What is served, and which of it is asked."""

    serve: list[str]
    """Arguments of `bruno-ray serve`."""

    asked: list[Asked]
    """The base, then the edited model; a single model where nothing is compared."""

    ids: list[str | None]
    """What the server calls each; None takes them in the order in which they were given."""

    folder: Path
    """Where results are kept."""

    run: RunDirectory | None = None
    trial: int | None = None


def evaluate_suite(
    settings: Settings,
    suite_name: str,
    run: RunDirectory | None,
    trial: int | None,
    base: str | None,
    gate: float | None,
) -> int:
    """Run a suite and print what it found; of a run it is noted in run.json, its report and its card.

    Args:
        run: its trial (the selected one, if none is named) is compared with its base model; without a run,
            ``settings.model`` with ``base``.
        gate: the largest loss that is allowed on any task, as a share; more is exit code `GATED`.

    Raises:
        SettingsError: no such suite, lm-eval is not installed, or there is nothing to compare with.
        ServerError: a model cannot be served.
        OutputError: lm-eval fails.
    """
    suite = load_suite(suite_name)
    plan = _plan_of_run(run, trial) if run is not None else _plan_of_models(settings, base)
    if gate is not None and len(plan.asked) < 2:
        raise SettingsError("command line: --gate compares with a base model: name one with --base")
    pairs = [(task, [_place(plan, asked, suite, task) for asked in plan.asked]) for task in suite.task]
    missing = [(task, places) for task, places in pairs if not all(place.is_dir() for place in places)]
    if len(missing) < len(pairs):
        logger.info("%d of %d tasks were done before", len(pairs) - len(missing), len(pairs))
    if missing:
        program = find_lm_eval(settings.evaluation.lm_eval)
        with ended_by_sigterm(), own_server(plan.serve) as server:
            ids = _ids(plan, server)
            for i, (task, places) in enumerate(missing, 1):
                with phase(f"{task.name}, task {i} of {len(missing)}"):
                    _ask(program, suite, task, plan, server, ids, places)
    results = [[read_result(place, task) for place in places] for task, places in pairs]
    if len(plan.asked) < 2:
        _print_alone(plan.asked[0].name, suite, [found for (found,) in results])
        return 0
    found = [compare(before, after, suite.name, plan.trial) for before, after in results]
    if plan.run is not None:
        _note(plan.run, found)
    _print(suite, found)
    return _gate(found, gate)


# ----- what is compared -----


def _plan_of_run(run: RunDirectory, trial: int | None) -> Plan:
    record = run.read()
    if trial is not None:
        edit = selection.find_trial(trials_of(run.path, record.settings), trial).edit
    elif record.selected is not None:
        trial, edit = record.selected.number, record.selected.edit
    else:
        raise SettingsError(f"no trial of {run.name} is selected: name one, such as `{run.name}:0`")
    assert edit is not None  # a completed trial has one
    selected = record.selected is not None and trial == record.selected.number
    base = {"model": record.hashes.get("model", record.settings.model.id)}
    directions = _digest(run.file_of_directions(Edit.from_dict(edit).direction_set))
    return Plan(
        serve=[str(run.path)],
        asked=[
            Asked("base", base, record.settings.model),
            Asked("edited", {**base, "edit": edit, "directions": directions}, record.settings.model),
        ],
        ids=[None, run.name if selected else f"{run.name}:trial-{trial}"],
        folder=run.path / "evaluations",
        run=run,
        trial=trial,
    )


def _plan_of_models(settings: Settings, base: str | None) -> Plan:
    model = settings.model
    models = [model] if base is None else [model.model_copy(update={"id": base}), model]
    names = [Path(model.id).name] if base is None else ["base", "edited"]
    located = [locate(each) for each in models]
    serve = ["--quantization", model.quantization]
    for each in located:
        serve += ["--model", each.id]
    asked = [
        Asked(name, {"model": _identity(each), "quantization": model.quantization}, each)
        for name, each in zip(names, located)
    ]
    return Plan(serve, asked, [None] * len(asked), settings.output.directory / "evaluations")


def _identity(model: ModelSettings) -> str:
    """By content for a folder; a hub id stands for its revision."""
    path = Path(model.id)
    if not path.is_dir():
        return f"{model.id}@{model.revision}"
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".json", ".jinja"))
    return _digest(*(file for file in files if file.name != "bruno.json"))


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        for chunk in file_chunks(file):
            digest.update(chunk)
    return digest.hexdigest()


def _place(plan: Plan, asked: Asked, suite: Suite, task: Task) -> Path:
    """Where the result is, or will be: it is named by everything that it depends on."""
    said = {"asked": asked.identity, "task": task.model_dump(exclude={"metric"}), "include": suite.digest()}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return (plan.folder / f"{task.name}-{digest[:12]}").absolute()


def _ids(plan: Plan, server: Server) -> list[str]:
    """What the server calls the models. Raises ServerError if one of them cannot be asked."""
    unnamed = iter([model["id"] for model in server.models if model["bruno"]["kind"] in ("base", "saved")])
    problems = [model for model in server.models if model["bruno"]["problem"]]
    if problems:
        raise ServerError(f"{problems[0]['id']} cannot be served: {problems[0]['bruno']['problem']}")
    return [server.require(name if name is not None else next(unnamed)) for name in plan.ids]


# ----- asking -----


def _ask(
    program: Path, suite: Suite, task: Task, plan: Plan, server: Server, ids: Sequence[str], places: Sequence[Path]
) -> None:
    """One task, of the models that have not done it, at the same time: their questions share the server's batches."""
    running: dict[str, Harness] = {}
    with (
        ExitStack() as stack,
        phase(task.name, lambda: ", ".join(f"{name} {each.progress}" for name, each in running.items())),
    ):
        begun: set[Path] = set()
        for asked, model, place in zip(plan.asked, ids, places):
            if place.is_dir() or place in begun:  # two models of the same content are asked once
                continue
            begun.add(place)
            aside = stack.enter_context(atomic_directory(place))
            tokenizer, context = _tokenizer(asked.tokenizer)
            command = command_of(program, suite, task, server.url, model, tokenizer, context, aside)
            harness = running[asked.name] = Harness(command, suite.include, key="none")
            stack.callback(harness.stop)
        for name, harness in running.items():
            harness.wait(f"{task.name} with the {name} model", lambda text: logger.debug("%s", text))


def _tokenizer(model: ModelSettings) -> tuple[str, int]:
    """Folder or id, as a program with another working directory finds it, and the tokens that the model can look at."""
    from transformers import AutoConfig

    from bruno_ray.model.context import context_length

    located = locate(model)
    config = AutoConfig.from_pretrained(
        located.id, revision=located.revision, trust_remote_code=located.trust_remote_code
    )
    return absolute_if_folder(located.id), context_length(config)


# ----- what was found -----


def _note(run: RunDirectory, found: Sequence[TaskRecord]) -> None:
    """In run.json, in place of what the same suite found before; then report and card."""
    new = {(each.suite, each.task, each.trial) for each in found}

    def change(record: RunRecord) -> dict[str, Any]:
        kept = [each for each in record.evaluations if (each.suite, each.task, each.trial) not in new]
        return {"evaluations": [*kept, *found]}

    from bruno_ray.publishing.saving import renew_card

    run.change(change)
    write_json(run.path / "evaluations" / "latest.json", [each.model_dump() for each in found])
    write_report(run, study_of(run.path, run.read().settings))
    renew_card(run)


def _print(suite: Suite, found: Sequence[TaskRecord]) -> None:
    table = Table(*task_table.HEADER, title=f"Suite {suite.name}")
    for row in task_table.task_rows(found):
        table.add_row(*row)
    console().print(table)


def _print_alone(name: str, suite: Suite, found: Sequence[TaskResult]) -> None:
    table = Table("Task", "Metric", "Questions", name, title=f"Suite {suite.name}")
    for result in found:
        error = "" if result.stderr is None else f" \u00b1 {result.stderr:.4f}"
        table.add_row(result.task, result.metric, str(len(result.rows) or ""), f"{result.value:.4f}{error}")
    console().print(table)


def _gate(found: Sequence[TaskRecord], gate: float | None) -> int:
    """The exit code; says which tasks lose too much."""
    if gate is None:
        return 0
    lost = [each for each in found if task_table.is_share(each) and each.loss > gate + 1e-9]
    for each in lost:
        logger.warning("gate: %s loses %.1f pp, more than %g", each.task, 100 * each.loss, 100 * gate)
    ungated = [each.task for each in found if not task_table.is_share(each)]
    if ungated:
        logger.warning("gate: %s is not a share and was not checked", ", ".join(ungated))
    return GATED if lost else 0
