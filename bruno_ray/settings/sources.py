"""Reads `Settings` from every place that may say something about them, and remembers who said what.

Sources, highest precedence first:

    command line    --study.n-trials 50       (kebab-case; some have a short flag too, keys.ALIASES)
    environment     BRUNO_STUDY__N_TRIALS=50
    config file     --config FILE, else config.toml in the working directory, if there is one
    preset          presets/<behaviour>.toml, or the .toml file that `behaviour` names
    defaults        schema.py

What a source says is a flat dict from dotted key to value (`SourceValues`) that holds only what was *said* there,
so a default can never override a file, and one field of a nested group can be set alone. Two rules go beyond that:

- A data set named above the preset replaces the preset's: with `train.source` the preset's whole side (target or
  baseline) is dropped, else only that part. Otherwise one's own training prompts would be scored on the preset's.
- The word `none` stands for "not set" in every optional field, since TOML has no null.
"""

import difflib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from bruno_ray.errors import SettingsError
from bruno_ray.settings import Settings
from bruno_ray.settings.flags import flag_values
from bruno_ray.settings.keys import (
    ENV_PREFIX,
    FIELDS,
    SECTIONS,
    nearest,
    parse_json,
    parse_text,
    section_of,
    variable_of,
)
from bruno_ray.settings.source_values import Provenance, SourceValues, did_you_mean, flatten, nest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RESERVED_ENV = frozenset({"BRUNO_CACHE", "BRUNO_API_KEY", "BRUNO_RAY_START_OPTIONS"})
"""Read elsewhere (cache folder), so not settings."""

PRESETS = Path(__file__).parent.parent / "presets"

MAX_ERRORS_SHOWN = 3

DEFAULT = "default"
"""Origin of a value that nobody gave."""


@dataclass(frozen=True)
class Loaded:
    settings: Settings
    origins: dict[str, str]
    """Dotted key of every effective value -> where it came from."""


# --------------------------------------------------------------------------------------------------------------
# One function per source


def read_toml(path: Path, what: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise SettingsError(f"{what} {path} does not exist; check the path") from None
    except OSError as error:
        raise SettingsError(f"{what} {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{what} {path} is not valid TOML: {error}") from None


def config_values(config: Path | None, directory: Path | None = None) -> SourceValues:
    """`config` if given (it must exist), else config.toml of the working directory if there is one."""
    if config is None:
        config = (directory or Path.cwd()) / "config.toml"
        if not config.is_file():
            return {}
    return flatten(read_toml(config, "config file"), str(config) if config.parent != Path.cwd() else config.name)


def environment_values(environ: Mapping[str, str]) -> SourceValues:
    """Variables that begin with BRUNO_, in any case; one that matches no setting is an error."""
    keys = {variable_of(key): key for key in FIELDS}
    groups = {variable_of(key): key for key in SECTIONS}
    said: SourceValues = {}
    # Groups first (shorter names sort first), so that BRUNO_STUDY__SEED wins over seed in BRUNO_STUDY.
    for variable in sorted(name for name in environ if name.upper().startswith(ENV_PREFIX)):
        upper, text, origin = variable.upper(), environ[variable], f"environment {variable}"
        if upper in RESERVED_ENV:
            continue
        if upper in keys:
            field = FIELDS[keys[upper]]
            said[keys[upper]] = Provenance(parse_text(field, text, origin), origin, origin)
        elif upper in groups:
            tree = parse_json(text, origin)
            for part in reversed(groups[upper].split(".")):
                tree = {part: tree}
            said |= flatten(tree, origin)
        else:
            key = nearest(upper.removeprefix(ENV_PREFIX).lower().replace("__", "."))
            hint = did_you_mean(key and variable_of(key))
            raise SettingsError(f"environment {variable}: no setting has this name{hint}")
    return said


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_values(behaviour: str, label: str = "behaviour") -> SourceValues:
    """The preset of that name, or a .toml file; sources in it that lie beside the file are found there."""
    is_file = behaviour.endswith(".toml")
    path = Path(behaviour) if is_file else PRESETS / f"{behaviour}.toml"
    if not is_file and not path.is_file():
        close = difflib.get_close_matches(behaviour, preset_names(), 1, 0.6)
        others = f"there are {', '.join(preset_names())}; or give a .toml file"
        hint = f"did you mean {close[0]!r}?" if close else others
        raise SettingsError(f"{label}: no preset named {behaviour!r}; {hint}")
    said = flatten(read_toml(path, "preset"), f"preset {behaviour}")
    if "behaviour" in said:
        raise SettingsError(f"preset {behaviour}: a preset cannot name another behaviour; remove that line")
    for key, given in said.items():
        beside = path.parent / given.value if key.endswith(".source") and isinstance(given.value, str) else None
        if is_file and beside is not None and beside.exists():
            said[key] = given._replace(value=str(beside))
    if is_file and isinstance(protect := said.get("prompts.protect"), Provenance):
        said["prompts.protect"] = protect._replace(value=_beside(path.parent, protect.value))
    return said


def _beside(folder: Path, sets: Any) -> Any:
    """Named prompt sets, those found there whose sources lie in the folder of a preset file."""
    if not isinstance(sets, Mapping):
        return sets
    named = {name: {"source": each} if isinstance(each, str) else each for name, each in sets.items()}
    return {
        name: {**each, "source": str(folder / each["source"])}
        if isinstance(each, Mapping) and isinstance(each.get("source"), str) and (folder / each["source"]).exists()
        else each
        for name, each in named.items()
    }


# --------------------------------------------------------------------------------------------------------------
# Putting them together


def load(
    argv: Sequence[str] = (),
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """Settings from all sources. `argv` holds settings flags only; `overrides` is for programs, above all else.

    Raises SettingsError, one line, that names source, key and what was wrong.
    """
    said: SourceValues = {}
    for more in (
        config_values(config),
        environment_values(os.environ if environ is None else environ),
        flag_values(argv),
        flatten(overrides or {}, "overrides"),
    ):
        said |= more

    behaviour = said.get("behaviour")
    name = behaviour.value if behaviour else Settings.model_fields["behaviour"].default
    if not isinstance(name, str):
        raise SettingsError(f"{behaviour.label}: {name!r} is not the name of a preset; write a string")
    preset: SourceValues = {}
    if not (_own_prompts(said) and _is_plain_name(name)):
        preset = preset_values(name, behaviour.label if behaviour else "behaviour")
    replaced = _replaced_sources(said)
    merged = {key: given for key, given in preset.items() if not key.startswith(replaced)} | said

    settings = _validate(merged)
    effective = dict(values(settings))
    return Loaded(settings, {key: merged[key].origin if key in merged else DEFAULT for key in effective})


def _own_prompts(said: SourceValues) -> bool:
    """Whether both prompt sets are given, so that a behaviour needs no preset and may have any name."""
    return all(f"prompts.{side}.train.source" in said for side in ("target", "baseline"))


def _is_plain_name(behaviour: str) -> bool:
    return not behaviour.endswith(".toml") and behaviour not in preset_names()


def _replaced_sources(said: SourceValues) -> tuple[str, ...]:
    """Key prefixes under which the preset has nothing more to say."""
    prefixes = []
    for key in said:
        if match := re.fullmatch(r"(prompts\.\w+)\.(\w+)\.source", key):
            side, part = match.groups()
            prefixes.append(f"{side}." if part == "train" else f"{side}.{part}.")
    return tuple(prefixes)


def _validate(said: SourceValues) -> Settings:
    try:
        return Settings.model_validate(nest(said))
    except ValidationError as error:
        found = error.errors(include_url=False)
        lines = [_explain(item, said) for item in found[:MAX_ERRORS_SHOWN]]
        more = f"; and {len(found) - MAX_ERRORS_SHOWN} more" if len(found) > MAX_ERRORS_SHOWN else ""
        raise SettingsError("; ".join(lines) + more) from None


def _explain(item: Mapping[str, Any], said: SourceValues) -> str:
    """One pydantic error as `source: value: what was wrong`."""
    parts = [str(part) for part in item["loc"]]
    key = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in FIELDS), "")
    where = said[key].label if key in said else None
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if where is None:
        # A required field that is missing, or settings that disagree: name who spoke about that group.
        group = key.rpartition(".")[0]
        speakers = [given.label for name, given in said.items() if group and name.startswith(group + ".")]
        subject = f"{speakers[0]} is set but {key} is not" if speakers else key or "settings"
        return f"{subject}: {message}"
    given = item["input"] if len(parts) > len(key.split(".")) else said[key].value
    return f"{where}: {given!r}: {message}"


def values(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Every effective (dotted key, value); groups that are not set (None) are left out."""

    def walk(node: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, field in type(node).model_fields.items():
            value = getattr(node, name)
            if isinstance(value, BaseModel):
                yield from walk(value, f"{prefix}{name}.")
            elif section_of(field.annotation) is None:
                yield prefix + name, value

    yield from walk(settings, "")


def apply(settings: Settings, overrides: SourceValues) -> Settings:
    """`settings` with ``overrides`` in place; for a resumed run."""
    return _validate({key: Provenance(value, "run", f"run: {key}") for key, value in values(settings)} | overrides)
