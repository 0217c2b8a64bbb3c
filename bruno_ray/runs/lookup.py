"""Runs as people name them: a folder, or a name below `output.directory`.

The settings are read only where a name has to be looked up: a `config.toml` that is broken, or another program's, must
not get in the way of a path.
"""

from pathlib import Path

from bruno_ray.errors import OutputError
from bruno_ray.files import expanded
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.settings import sources


def find_run(reference: str, directory: Path | None = None) -> RunDirectory:
    """The run at a path or of a name, in ``directory`` or where the settings say. Raises OutputError if there is none,
    SettingsError as `sources.load`."""
    name, colon, number = reference.rpartition(":")
    if colon and not Path(reference).exists() and _holds_run(name, directory):
        what = "this is about a whole run" if number.isdigit() else "after a colon stands a trial's number, from 0 on"
        raise OutputError(f"{reference}: {what}: give {name}, or see its trials with `bruno-ray front {name} --all`")
    if is_path(reference):
        return RunDirectory.open(expanded(reference))
    return RunDirectory.find(reference, directory or output_directory())


def find_trial(reference: str, directory: Path | None = None) -> tuple[RunDirectory, int | None]:
    """The run and the trial of ``RUN`` or ``RUN:TRIAL``. Raises as `find_run`."""
    name, colon, number = reference.rpartition(":")
    if colon and number.isdigit() and not Path(reference).exists():
        return find_run(name, directory), int(number)
    return find_run(reference, directory), None


def is_path(reference: str) -> bool:
    """Whether it is written as a path, or a run lies there, so that no name has to be looked up."""
    return reference.startswith((".", "/", "~")) or (Path(reference) / "run.json").is_file()


def output_directory() -> Path:
    """Where runs are looked for by name, as the settings say."""
    return sources.load().settings.output.directory


def run_named(reference: str) -> tuple[RunDirectory, int | None] | None:
    """As `find_trial`, or None where no run has that name or place, so that it is a model's.

    A run with something after it that is no trial's number is meant as a run: that raises, as it does there.
    """
    name, _, _ = reference.rpartition(":")
    places = [reference, name] if name and not Path(reference).exists() else [reference]
    return find_trial(reference) if any(map(_holds_run, places)) else None


def _holds_run(place: str, directory: Path | None = None) -> bool:
    folders = [expanded(place)] if is_path(place) else [Path(place), (directory or output_directory()) / place]
    return any((folder / "run.json").is_file() for folder in folders)
