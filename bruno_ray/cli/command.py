"""A command of the command line, and those that other packages bring.

A package adds a command to `bruno-ray` by an entry point of the group `bruno_ray.commands` whose name is that of the
command and whose object is a `Command`. Its module is imported for every `bruno-ray --help`, so it must be light.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from bruno_ray.errors import first_line

GROUP = "bruno_ray.commands"


def no_arguments(parser: argparse.ArgumentParser) -> None:
    """For a command that has settings only."""


@dataclass(frozen=True)
class Command:
    """What the command line needs of one command."""

    description: str
    run: Callable[[argparse.Namespace], Any] = lambda arguments: None
    """Does what the arguments say; returns the exit code, or None for 0."""

    add_arguments: Callable[[argparse.ArgumentParser], None] = no_arguments
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings that may be given as flags, flag -> dotted key; `run` finds them in `arguments.settings_flags`."""

    unavailable: str = ""
    """Why it cannot be called here, and what to do."""


def installed_commands() -> dict[str, Command]:
    """Name -> command, of every package that is installed and brings one."""
    return {entry.name: _load(entry) for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def _load(entry: EntryPoint) -> Command:
    """A command that cannot be imported must not break the others: it says why when somebody calls it."""
    try:
        return entry.load()
    except ImportError as error:
        package = f"{entry.dist.name}[{entry.name}]" if entry.dist else entry.name
        reason = f"it needs a package that is not installed ({first_line(error)}): pip install '{package}'"
        return Command("not available: a package is missing", unavailable=reason)
