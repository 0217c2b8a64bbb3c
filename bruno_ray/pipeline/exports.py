"""What leaves a run in another form than a saved model, and comes back: `bruno-ray export` and `bruno-ray apply`."""

import logging
from pathlib import Path
from typing import Any

from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import BrunoError, OutputError, first_line
from bruno_ray.exporting.registry import exporter, source_hash
from bruno_ray.pipeline.choosing import trials_of
from bruno_ray.publishing.card import behaviour_name
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.settings import Settings
from bruno_ray.study import selection

logger = logging.getLogger(__name__)


def export(path: Path, trial: int | None, form: str, folder: Path, **options: Any) -> Path:
    """Write a trial (the selected one, if none is named) to ``folder`` in a form of ``exporting.registry``; ``options``
    are those of ``exporting.base``. run.json gets the hash of an exporter from outside.

    Raises SettingsError if there is no such form, and what the exporter raises; one from outside that fails otherwise,
    or writes nothing, is an OutputError.
    """
    from bruno_ray.exporting.base import Options, Source

    write, digest = exporter(form), source_hash(form)
    if folder.exists():
        raise OutputError(f"{folder} exists already: choose another folder or remove it first")
    run = RunDirectory.open(path)
    record = run.read()
    if trial is not None:
        edit = selection.find_trial(trials_of(path, record.settings), trial).edit
    elif record.selected is not None:
        trial, edit = record.selected.number, record.selected.edit
    else:
        raise OutputError(f"no trial of {run.name} is selected: name one, such as `bruno-ray export {run.name}:0`")
    assert edit is not None  # a completed trial has one
    source = Source(
        model=record.settings.model,
        edit=Edit.from_dict(edit),
        bank=_bank(run, edit["direction_set"]),
        run=run.name,
        trial=trial,
        behaviour=behaviour_name(record.settings),
    )
    try:
        done = write(source, folder.absolute(), Options(**options))
    except BrunoError:
        raise
    except Exception as error:
        if not digest:  # a defect of ours
            raise
        raise OutputError(f"the exporter {form} fails ({type(error).__name__}: {first_line(error)}): fix it") from error
    if not folder.exists():
        raise OutputError(f"the exporter {form} has not written {folder}: fix it")
    if digest:
        run.update(hashes=digest)
    logger.info("%s", done)
    return folder


def _bank(run: RunDirectory, name: str) -> dict:
    """What the search chose from, and the set of that name where training has made it."""
    bank = run.load_bank()
    return bank if name in bank else bank | {name: run.load_directions()[name]}


def apply(file: Path, settings: Settings, folder: Path) -> Path:
    """Bake an exported edit into ``settings.model``, another copy of its base model."""
    from bruno_ray.exporting import applying

    saved = applying.apply(file, settings.model, folder.absolute())
    logger.info("saved %s in %s; the edit was measured in the run that it comes from", folder, saved.dtype)
    return folder
