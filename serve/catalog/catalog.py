"""Which models there are: base models, trials of runs, selected trials, saved model folders. No torch, no Ray.

    BASE             the unedited model of a run
    BASE:trial-N     any COMPLETE trial of its study, as a row of BASE; the Pareto front's are listed
    RUN              the trial that the run selected, likewise
    RUN:trial-N      the same as BASE:trial-N, and the only name when several runs have one base
    ID*X             any of these three with every strength multiplied by X
    FOLDER           a saved model, with an engine of its own

A run may still be going on: ``refresh`` looks for what is new. What cannot be served is in ``problems``, and the rest
goes on without it.
"""

import datetime
import logging
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import BrunoError, SettingsError
from bruno_ray.files import expanded
from bruno_ray.model.locating import is_gguf
from bruno_ray.model.named_models import find_named
from bruno_ray.runs import records
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.settings import ModelSettings
from bruno_ray.study.selection import TrialRecord
from bruno_ray.study.tables import describe_edit
from serve.catalog.folders import model_folders, problem_of, saved_trial
from serve.catalog.runs import ServedRun
from serve.errors import UnknownModel
from serve.settings import ServeArgs

logger = logging.getLogger(__name__)

SCALED = re.compile(r"(.+)\*(\d{1,3}(?:\.\d+)?|\.\d+)")
LARGEST_SCALE = 2.0
SCALE_STEP = 0.01
"""Every scale that is asked for is an edit of its own in the engines."""

TRIAL = re.compile(r"(.+):trial-(\d+)")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
REFRESH_SECONDS = 2.0


@dataclass(frozen=True)
class ServedModel:
    """One model id."""

    id: str
    kind: Literal["base", "trial", "run", "saved"]
    base: str
    """Key of the engine that answers for it."""

    edit: dict[str, Any] | None = None
    """``Edit.to_dict()``."""

    edit_key: str | None = None
    """Name of the edit in the engine."""

    scale: float = 1.0
    """What the strengths of the trial's edit have been multiplied by."""

    run: Path | None = None
    """Run directory it comes from."""

    run_name: str | None = None
    trial: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    description: str = ""
    system_prompt: str | None = None
    """Of requests that bring none: as the run had it when it measured."""

    response_prefix: str = ""
    """What every answer starts with, unseen, as in the run."""

    date: datetime.date = field(default_factory=datetime.date.today)
    """For chat templates that print one: the run's, or the day the server started."""

    created: int = 0
    """Unix time."""


@dataclass(frozen=True)
class ServedBase:
    """A model that is loaded, and how: an engine's own, of which the edits are rows."""

    key: str
    settings: ModelSettings


@dataclass(frozen=True)
class Problem:
    """Something that was asked for and cannot be served."""

    id: str
    reason: str


class Catalog:
    """Make it with ``discover``."""

    def __init__(self) -> None:
        self.engines: dict[str, ServedBase] = {}
        self.runs: dict[str, ServedRun] = {}
        """By unique name."""

        self.entries: list[ServedModel] = []
        """What is listed: bases, trials of the Pareto fronts, selected trials, saved models."""

        self.problems: list[Problem] = []
        self._fixed: list[ServedModel] = []
        self._base_of: dict[str, str] = {}  # run -> engine
        self._started = records.today()
        self._by_id: dict[str, ServedModel] = {}
        self._refreshed = 0.0

    @classmethod
    def discover(
        cls,
        runs: Sequence[str | Path],
        models: Sequence[str | Path],
        output_directory: Path,
        quantization: str = "none",
    ) -> "Catalog":
        """Look through everything that was asked for; what is broken becomes a problem."""
        catalog = cls()
        for reference in dict.fromkeys(map(str, runs)):
            try:
                catalog._add_run(RunDirectory.find(reference, output_directory))
            except BrunoError as error:
                catalog._refuse(Path(reference).name or reference, str(error))
        for reference in dict.fromkeys(map(str, models)):
            catalog._add_models(reference, quantization)
        catalog._list()
        return catalog

    # ----- what is there -----

    def _refuse(self, name: str, reason: str) -> None:
        reason = " ".join(reason.split())
        logger.warning("%s cannot be served: %s", name, reason)
        self.problems.append(Problem(self._unique([name], {p.id for p in self.problems}), reason))

    def _unique(self, names: Iterable[str], more: Iterable[str] = ()) -> str:
        """The first of the names that is free, or the last one with a number."""
        taken = {*self.engines, *self.runs, *more}
        for name in (names := list(names)):
            if name not in taken:
                return name
        number = 2
        while f"{names[-1]}-{number}" in taken:
            number += 1
        return f"{names[-1]}-{number}"

    def _add_run(self, directory: RunDirectory) -> None:
        run = ServedRun.open(directory)
        model = run.model
        # A GGUF file is looked through when it is made a folder.
        if Path(model.id).is_absolute() and not is_gguf(model) and (problem := problem_of(Path(model.id))):
            return self._refuse(directory.name, f"its base model {model.id} cannot be loaded: {problem}")
        run.name = self._unique([directory.name, f"{directory.path.parent.name}/{directory.name}"])
        self.runs[run.name] = run
        self._base_of[run.name] = self._engine(model, _name_of(model.id))
        return None

    def _engine(self, model: ModelSettings, *names: str) -> str:
        """Key of the engine that has loaded exactly this model; a new one if none has."""
        for engine in self.engines.values():
            if engine.settings == model:
                return engine.key
        if model.quantization != "none":
            names = (*names, f"{names[0]}-{model.quantization}")
        key = self._unique(names)
        self.engines[key] = ServedBase(key, model)
        return key

    def _add_models(self, reference: str, quantization: str) -> None:
        path = expanded(reference)
        on_hub = not path.exists() and HUB_ID.fullmatch(reference) and "/" in reference
        if on_hub or find_named(reference) or path.suffix.lower() == ".gguf":
            model = ModelSettings(id=reference, quantization=quantization)
            self._fixed.append(self._base_entry(self._engine(model, _name_of(reference))))
            return
        for folder in model_folders(path.absolute()):
            if problem := problem_of(folder):
                self._refuse(_name_of(str(folder), saved=True), problem)
                continue
            model = ModelSettings(id=str(folder), quantization=quantization)
            parent = f"{folder.parent.name}/{folder.name}"
            key = self._engine(model, _name_of(str(folder), saved=True), parent)
            if not any(entry.base == key for entry in self._fixed):
                self._fixed.append(_saved_entry(folder, key, self._started))

    # ----- what is listed -----

    def refresh(self) -> None:
        """Read the runs again if they have changed since; at most every two seconds."""
        if time.monotonic() - self._refreshed < REFRESH_SECONDS:
            return
        if any([run.refresh() for run in self.runs.values()]):
            self._list()
        self._refreshed = time.monotonic()

    def _list(self) -> None:
        bases = list(dict.fromkeys(self._base_of.values()))
        entries = [self._base_entry(key) for key in bases]
        for name, run in self.runs.items():
            front = [self._trial_entry(name, trial) for trial in run.front()]
            entries += [entry for entry in front if entry is not None]
            if (selected := self._selected_entry(name)) is not None:
                entries.append(selected)
        self.entries = entries + self._fixed
        self._by_id = {entry.id: entry for entry in self.entries}

    def _base_entry(self, key: str) -> ServedModel:
        run = next((run for name, run in self.runs.items() if self._base_of[name] == key), None)
        if run is None:
            return ServedModel(key, "base", key, description="unedited model", date=self._started)
        return ServedModel(
            key,
            "base",
            key,
            run=run.path,
            run_name=run.name,
            metrics=run.unedited_metrics(),
            description="unedited model",
            created=run.created,
            **run.rendering(),
        )

    def _trial_entry(self, name: str, trial: TrialRecord) -> ServedModel | None:
        run, base = self.runs[name], self._base_of[name]
        if trial.edit is None or trial.state != "COMPLETE":
            return None
        return ServedModel(
            self.trial_id(name, trial.number),
            "trial",
            base,
            edit=trial.edit,
            edit_key=f"{name}:trial-{trial.number}",
            run=run.path,
            run_name=name,
            trial=trial.number,
            metrics=trial.values,
            description=describe_edit(trial.edit),
            created=run.created,
            **run.rendering(),
        )

    def _selected_entry(self, name: str) -> ServedModel | None:
        run = self.runs[name]
        if (selected := run.selected) is None:
            return None
        return ServedModel(
            name,
            "run",
            self._base_of[name],
            edit=selected.edit,
            edit_key=f"{name}:trial-{selected.number}",
            run=run.path,
            run_name=name,
            trial=selected.number,
            metrics=(selected.test or selected.validation).values,
            description=describe_edit(selected.edit),
            created=run.created,
            **run.rendering(),
        )

    # ----- which one is meant -----

    def base_of(self, run: str) -> str:
        """Model id of a run's unedited model."""
        return self._base_of[run]

    def trial_id(self, run: str, number: int) -> str:
        """Model id of a trial: by its base, or by its run where several have that base."""
        base = self._base_of[run]
        alone = list(self._base_of.values()).count(base) == 1
        return f"{base if alone else run}:trial-{number}"

    def resolve(self, model_id: str) -> ServedModel:
        """The model of that id, as of the last ``refresh``. Raises UnknownModel."""
        entry = self._by_id.get(model_id) or self._unlisted(model_id)
        if entry is None and (match := SCALED.fullmatch(model_id)) is not None:
            unscaled = self._by_id.get(match[1]) or self._unlisted(match[1])
            entry = None if unscaled is None else _scaled(unscaled, float(match[2]))
        if entry is None:
            reason = next((problem.reason for problem in self.problems if problem.id == model_id), None)
            raise UnknownModel(
                f"The model {model_id!r} cannot be served: {reason}"
                if reason
                else f"The model {model_id!r} does not exist; GET /v1/models lists those that do."
            )
        return entry

    def _unlisted(self, model_id: str) -> ServedModel | None:
        """A trial that is not on the front, or that goes by its run's name."""
        match = TRIAL.fullmatch(model_id)
        if match is None:
            return None
        name, number = match[1], int(match[2])
        owners = [name] if name in self.runs else [run for run, base in self._base_of.items() if base == name]
        if len(owners) > 1:
            choices = ", ".join(f"{owner}:trial-{number}" for owner in owners)
            raise UnknownModel(f"{model_id!r} could be a trial of several runs: say which one, as {choices}.")
        trial = self.runs[owners[0]].trial(number) if owners else None
        return None if trial is None else self._trial_entry(owners[0], trial)


def _scaled(entry: ServedModel, scale: float) -> ServedModel:
    """The model with its edit made weaker or stronger. Raises UnknownModel where that is no edit, or out of range."""
    if entry.edit is None:
        raise UnknownModel(f"{entry.id!r} has no edit whose strength could be multiplied: leave out *{scale:g}.")
    if scale > LARGEST_SCALE or abs(scale / SCALE_STEP - round(scale / SCALE_STEP)) > 1e-6:
        raise UnknownModel(
            f"A strength is multiplied by 0 to {LARGEST_SCALE:g} in steps of {SCALE_STEP:g}, not {scale:g}."
        )
    return replace(
        entry,
        id=f"{entry.id}*{scale:g}",
        edit=Edit.from_dict(entry.edit).scaled(scale).to_dict(),
        edit_key=f"{entry.edit_key}*{scale:g}",
        scale=scale,
        metrics={},  # of another edit
        description=f"{entry.description}; strengths times {scale:g}",
    )


def discovered(args: ServeArgs) -> Catalog:
    """What the arguments ask for. Raises SettingsError unless some of it can be served."""
    if not args.runs and not args.models:
        raise SettingsError("there is nothing to serve: give a run, or a folder with a saved model (--model)")
    catalog = Catalog.discover(args.runs, args.models, args.output_directory, args.quantization)
    if not catalog.engines:
        reasons = "; ".join(f"{problem.id}: {problem.reason}" for problem in catalog.problems)
        raise SettingsError(f"nothing of this can be served: {reasons}")
    return catalog


def _name_of(model: str, saved: bool = False) -> str:
    """Last part of a model's id; for a folder called model the one above says more."""
    path = Path(model)
    if path.name != "model" or not path.parent.name:
        return path.name
    return f"{path.parent.name}/model" if saved else path.parent.name


def _saved_entry(folder: Path, key: str, started: datetime.date) -> ServedModel:
    """A saved model; one inside of its run directory is asked as the run asked it, any other as of ``started``."""
    created = int((folder / "config.json").stat().st_mtime)
    try:
        run = ServedRun.open(RunDirectory.open(folder.parent))
    except BrunoError:  # it stands alone: prompts are what its chat template makes of them
        description = f"saved model in {folder.name}"
        return ServedModel(key, "saved", key, description=description, created=created, date=started)
    trial, selected = saved_trial(folder), run.selected
    if trial is None and selected is not None:
        trial = selected.number
    elif selected is not None and trial != selected.number:  # it was saved beside the run's own model
        selected = None
    scores = selected and (selected.saved or selected.test or selected.validation)
    return ServedModel(
        key,
        "saved",
        key,
        run=run.path,
        run_name=folder.parent.name,
        trial=trial,
        metrics=scores.values if scores else {},
        description="saved model" if trial is None else f"saved trial {trial}",
        created=created,
        **run.rendering(),
    )
