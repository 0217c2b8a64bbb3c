"""Get the figures of a reproduce.json again: `bruno-ray reproduce`. And write such files.

A file may come from anybody. So it never makes code run: `trust_remote_code` and methods or scorers in files count only
where the user says them again. It names no judge, whose address would be sent answers, and a key.
"""

import datetime
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bruno_ray import plugins
from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.plan import PREFIX, unpack
from bruno_ray.errors import OutputError, PromptError, SettingsError, TrialError, first_line
from bruno_ray.pipeline.steps import (
    describe_model,
    evaluation_context,
    find_model,
    find_response_prefix,
    read_bank,
    with_plugins,
    worker_pool,
)
from bruno_ray.progress import phase
from bruno_ray.prompts.sets import PARTS, PromptParts, Prompts, hash_of, load_prompts, load_rows
from bruno_ray.publishing.base import find_base
from bruno_ray.publishing.reproduction import Line, compared
from bruno_ray.runs import heretic, reproduction
from bruno_ray.runs.records import RunRecord, ScoresRecord, installed_versions
from bruno_ray.settings import DatasetSettings, PromptSet, Settings
from bruno_ray.settings.source_values import SourceValues
from bruno_ray.settings.sources import apply
from bruno_ray.study.fingerprint import same_model
from bruno_ray.workers.exchanged import ModelInfo
from bruno_ray.workers.pool import WorkerPool
from bruno_ray.workers.session import ray_session

if TYPE_CHECKING:
    from bruno_ray.ablation.closed_forms import DirectionBank

logger = logging.getLogger(__name__)

CODE = ("directions.methods", "scoring.scorers", "scoring.report_scorers")
"""Settings that may name files with Python in them."""

ALL = 1_000_000
"""Rows of a stream without an end that are read at most, where a file says "all"."""


@dataclass(frozen=True)
class Recipe:
    """What a file asks for, whichever tool wrote it."""

    settings: Settings
    edit: Edit
    date: datetime.date
    recorded: dict[str, ScoresRecord]
    """`unedited` and `edited`."""

    load: Callable[[Settings], Prompts]
    """Reads the prompts, and raises PromptError if they are not those of the file."""

    versions: dict[str, str]
    trained: dict[str, Any] | None = None
    response_prefix: str | None = None
    """None: looked for."""

    fingerprint: str = ""
    notes: tuple[str, ...] = field(default=())


def reproduce(path: Path, overrides: SourceValues) -> list[Line]:
    """Rebuild directions and edit, measure again on the test prompts; every figure as it was and as it is.

    Args:
        path: the file, or the folder that it lies in.
        overrides: settings in place of the file's, such as where the model lies.

    Raises:
        OutputError: it is no such file.
        SettingsError: it asks for code to be run that the user has not named.
        PromptError: the prompts are not those that the figures are of.
        ModelError, TrialError: the model cannot be loaded, or has no scores.
    """
    recipe = read_recipe(path, overrides)
    settings = with_plugins(find_model(recipe.settings))
    find_base(settings.model)  # a wrong name is told before anything is started
    prompts = recipe.load(settings)
    record = RunRecord(settings=settings, date=recipe.date)
    for note in recipe.notes:
        logger.warning("%s", note)
    _say_versions(recipe.versions)
    with ray_session(settings.ray), worker_pool(settings, workers=1) as pool:
        pool.wait_ready()
        info = describe_model(settings, pool)
        _say_model(recipe.fingerprint, info)
        prefix = recipe.response_prefix
        prefix = find_response_prefix(record, prompts, pool) if prefix is None else prefix
        record = record.model_copy(update={"response_prefix": prefix})
        bank = _bank(recipe, record, info, prompts, pool)
        if recipe.edit.direction_set not in bank:
            raise OutputError(
                f"{path} names the directions {recipe.edit.direction_set}, which its settings do not make"
                f" ({', '.join(bank)}): get it again"
            )
        pool.set_context(evaluation_context(record, prompts, "test", bank))
        with phase("measuring on the test prompts", pool.progress):
            unedited = pool.call("baseline", with_context=True)
            (outcome,) = pool.call("evaluate", [recipe.edit], with_context=True)
    if outcome.scores is None:
        raise TrialError(f"the edit has no scores here ({outcome.error}): load the model in another dtype")
    return compared(recipe.recorded, {"unedited": ScoresRecord.of(unedited), "edited": ScoresRecord.of(outcome.scores)})


def _bank(recipe: Recipe, record: RunRecord, info: ModelInfo, prompts: Prompts, pool: WorkerPool) -> "DirectionBank":
    """A trained subspace is in the file; any other is read off the residual stream again."""
    if recipe.trained is None:
        with phase("reading residuals", pool.progress):
            return read_bank(record, info, prompts, pool)[0]
    import torch

    directions = unpack(recipe.trained)
    name = PREFIX + hashlib.sha256(directions.tobytes()).hexdigest()[:12]
    if name != recipe.edit.direction_set:
        raise OutputError("the file's trained directions are damaged: get it again")
    return {name: torch.from_numpy(directions)}


# ----- reading -----


def read_recipe(path: Path, overrides: SourceValues) -> Recipe:
    """Of our own files and heretic's. Raises OutputError, SettingsError as `reproduce`."""
    path, content = reproduction.read_json(path)
    recipe = _of_heretic(content, path) if heretic.is_heretic(content) else _of_ours(content, path)
    settings = _without_code(recipe.settings, path, overrides)
    settings = apply(_found_beside(settings, path.parent), overrides)
    return replace(recipe, settings=settings)


def _of_ours(content: dict[str, Any], path: Path) -> Recipe:
    file = reproduction.parse(content, path)
    try:
        settings = Settings.model_validate(file.settings)
        edit = Edit.from_dict(file.edit)
    except (KeyError, TypeError, ValueError) as error:  # pydantic's is a ValueError
        raise OutputError(
            f"{path} does not fit this version of bruno-ray ({first_line(error)}): use the one that wrote it"
            f" ({file.bruno_ray}), or get the file again"
        ) from error

    def load(settings: Settings) -> Prompts:
        if file.trained:  # its directions come along, so nothing is cleaned of what was protected
            chosen = settings.prompts.model_copy(update={"protect": {}})
            settings = settings.model_copy(update={"prompts": chosen})
        prompts = load_prompts(settings)
        for side, parts in file.prompts.items():
            for part in ("test",) if file.trained else ("train", "test"):
                place = f"prompts.{side}.{part}"
                source = place.replace(".test", ".train") if part in parts and parts[part].split is None else place
                _require_same(place, getattr(getattr(prompts, side), part), parts.get(part), f"--{source}.source")
        for name, each in prompts.protect.items():
            flag = f"--prompts.protect {name}=FILE"
            _require_same(f"prompts.protect.{name}", each, file.protected.get(name), flag)
        return prompts

    return Recipe(
        settings=settings,
        edit=edit,
        date=file.date,
        recorded={"unedited": file.measured.unedited, "edited": file.measured.edited},
        load=load,
        versions=file.versions,
        trained=file.trained,
        response_prefix=file.response_prefix,
        fingerprint=file.base_model.fingerprint,
    )


def _require_same(name: str, prompts: tuple, recorded: reproduction.PartRecord | None, flag: str) -> None:
    if recorded is not None and hash_of(prompts) != recorded.sha256:
        raise PromptError(
            f"{name} has {len(prompts)} prompts that are not the {recorded.n} the figures are of: give those with"
            f" {flag}"
        )


def _of_heretic(content: dict[str, Any], path: Path) -> Recipe:
    file = heretic.parse(content, path)

    def load(settings: Settings) -> Prompts:
        if not settings.scoring.markers:
            raise SettingsError(f"{path} does not name its keyword markers: give them with --scoring.markers A,B")
        target, baseline = (_as_they_are(settings, side) for side in ("target", "baseline"))
        return Prompts(target, baseline, hash_of([*target.train, *target.test, *baseline.train, *baseline.test]))

    def _as_they_are(settings: Settings, side: str) -> PromptParts:
        given: PromptSet = getattr(settings.prompts, side)
        parts = {}
        for part in ("train", "test"):
            dataset: DatasetSettings | None = getattr(given, part)
            if dataset is None:
                key = f"prompts.{side}.{part}"
                raise SettingsError(f"{path} does not name its {side} {part} prompts: give --{key}.source")
            parts[part] = load_rows(dataset, settings.prompts.system_prompt, ALL)
        return PromptParts(validation=(), **parts)

    return Recipe(
        settings=file.settings,
        edit=file.edit,
        date=file.date,
        recorded=file.recorded,
        load=load,
        versions=file.versions,
        response_prefix=None
        if file.settings.prompts.response_prefix == "auto"
        else file.settings.prompts.response_prefix,
        notes=file.notes,
    )


def _without_code(settings: Settings, path: Path, overrides: SourceValues) -> Settings:
    """Nothing of the file's own choice is run."""
    for key in CODE:
        section, name = key.split(".")
        files = [entry for entry in getattr(getattr(settings, section), name) if plugins.is_file(entry)]
        if files and key not in overrides:
            raise SettingsError(
                f"{path.name} needs code that is not part of bruno-ray ({files[0]}): read it, then give it with"
                f" --{key.replace('_', '-')}"
            )
    if settings.model.trust_remote_code and "model.trust_remote_code" not in overrides:
        raise SettingsError(
            f"{path.name} is of a model that brings its own code: read it, then add --model.trust-remote-code true"
        )
    return settings


def _found_beside(settings: Settings, folder: Path) -> Settings:
    """Prompt files that are not where the file says, but beside it."""

    def moved(dataset: DatasetSettings | None) -> DatasetSettings | None:
        if dataset is None or ":" in dataset.source or Path(dataset.source).expanduser().exists():
            return dataset
        beside = folder / Path(dataset.source).name
        return dataset.model_copy(update={"source": str(beside.absolute())}) if beside.is_file() else dataset

    sides = {
        side: PromptSet(**{part: moved(getattr(getattr(settings.prompts, side), part)) for part in PARTS[:3]})
        for side in ("target", "baseline")
    }
    protect = {name: moved(dataset) for name, dataset in settings.prompts.protect.items()}
    return settings.model_copy(update={"prompts": settings.prompts.model_copy(update={**sides, "protect": protect})})


# ----- what else may differ -----


def _say_versions(recorded: dict[str, str]) -> None:
    here = installed_versions()
    other = [
        f"{name} {version} (here {here[name]})"
        for name, version in recorded.items()
        if name in here and name != "platform" and here[name] != version
    ]
    if other:
        logger.info("measured with %s", ", ".join(other))


def _say_model(recorded: str, info: ModelInfo) -> None:
    if not recorded or same_model(recorded, info.fingerprint):
        return
    if recorded.rpartition(":")[2] == info.fingerprint.rpartition(":")[2]:
        logger.info("the base model is another copy with the same tensors")
    else:
        logger.warning("the base model has other weights than the one of the file, or was loaded differently")
