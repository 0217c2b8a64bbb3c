"""Direction methods, scorers, judges and exporters of other people: from an installed package, or from a file.

    [directions]
    methods = ["difference_in_means", "trimmed_difference"]     # a name of the entry-point group, see GROUPS

    [scoring]
    scorers = ["behaviour_rate", "kl_divergence", "length.py:Length"]    # FILE.py:NAME

    [scoring.judge]
    plugin = "judge.py:Judge"

    bruno-ray export RUN --to table.py:export FOLDER

What is found is recorded with a hash of its source: a study is gone on with only while that of its methods and scorers
is the same. A file of those must be there on every machine of a cluster, a package is installed there with the others;
judges and exporters run on the machine of the command.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from bruno_ray.errors import SettingsError, first_line

GROUPS = {
    "directions.methods": "bruno_ray.direction_methods",
    "scoring.scorers": "bruno_ray.scorers",
    "scoring.judge.plugin": "bruno_ray.judges",
    "export --to": "bruno_ray.exporters",
}
"""Setting, or option, -> entry-point group in which packages name what they bring for it."""


def find(name: str, built_in: Mapping[str, Any], setting: str) -> Any:
    """What a setting's name means: one of ours, one of an installed package, or ``FILE.py:NAME``.

    Raises SettingsError if there is none, or if its code cannot be imported.
    """
    if name in built_in:
        return built_in[name]
    if is_file(name):
        return _from_file(name, setting)
    entry = _entry(name, setting)
    if entry is None:
        others = ", ".join([*built_in, *(found.name for found in entry_points(group=GROUPS[setting]))])
        raise SettingsError(f"{setting} has no {name}: choose from {others}, or give FILE.py:NAME")
    try:
        return entry.load()
    except Exception as error:  # whatever its modules do when they are imported
        raise SettingsError(
            f"{setting}: {name} of {_package(entry)} cannot be imported ({first_line(error)})"
        ) from error


def is_file(name: str) -> bool:
    return ".py:" in name


def short(name: str) -> str:
    """A name for tables and keys: ``mine.py:Length`` is Length."""
    return name.rpartition(":")[2] if is_file(name) else name


def absolute(names: Sequence[str]) -> tuple[str, ...]:
    """The names with files that are found from any working directory, such as a worker's."""
    return tuple(_join(*_split(name)) if is_file(name) else name for name in names)


def digests(setting: str, names: Sequence[str]) -> dict[str, str]:
    """A hash of the source of each name that comes from a file or a package. Nothing of it is imported.

    Raises SettingsError if there is no such file.
    """
    found = {}
    for name in names:
        if is_file(name):
            content = _file(name, setting).read_bytes()
        elif (entry := _entry(name, setting)) is not None:
            spec = importlib.util.find_spec(entry.module)
            content = f"{_package(entry)} {entry.value}".encode()
            content += Path(spec.origin).read_bytes() if spec is not None and spec.origin is not None else b""
        else:
            continue  # one of ours, or none at all, which is said where it is looked up
        found[short(name)] = hashlib.sha256(content).hexdigest()[:16]
    return found


def _from_file(name: str, setting: str) -> Any:
    path, attribute = _file(name, setting), _split(name)[1]
    content = path.read_bytes()
    # Named by its content, so that classes of it can be sent between processes that have loaded it.
    module_name = f"bruno_ray_plugin_{path.stem}_{hashlib.sha256(content).hexdigest()[:12]}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            # Python's own cache would take what has the same size and was written in the same second for the same.
            exec(compile(content, path, "exec"), module.__dict__)
        except Exception as error:  # whatever it does when it is imported
            del sys.modules[module_name]
            raise SettingsError(f"{setting}: {path} cannot be imported ({first_line(error)}): fix it") from error
    if not hasattr(module, attribute):
        raise SettingsError(f"{setting}: {path} has no {attribute}: give FILE.py:NAME with a name that it defines")
    return getattr(module, attribute)


def _file(name: str, setting: str) -> Path:
    path = Path(_split(name)[0]).expanduser().absolute()
    if not path.is_file():
        raise SettingsError(f"{setting}: there is no {path}: give FILE.py:NAME, or install a package that brings it")
    return path


def _split(name: str) -> tuple[str, str]:
    path, _, attribute = name.rpartition(":")
    return path, attribute


def _join(path: str, attribute: str) -> str:
    return f"{Path(path).expanduser().absolute()}:{attribute}"


def _entry(name: str, setting: str) -> EntryPoint | None:
    return next(iter(entry_points(group=GROUPS[setting], name=name)), None)


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.module
