"""Reads `Settings` from every place that may say something about them, and remembers who said what.

Layers, highest precedence first:

    command line    --study.n-trials 50       (kebab-case; a few short names, settings_fields.ALIASES)
    environment     BRUNO_STUDY__N_TRIALS=50
    config file     --config FILE, else config.toml in the working directory, if there is one
    preset          presets/<behaviour>.toml, or the .toml file that `behaviour` names
    defaults        settings.py

A layer is a flat dict from dotted key to value that holds only what was *said* there, so a default can
never override a file, and one field of a nested group can be set alone. Two rules go beyond that:

- A layer above the preset that names a `source` of its own replaces the preset's: with `train.source` the
  preset's whole side (target or baseline) is dropped, else only that part. Otherwise one's own training
  prompts would be scored on the preset's.
- The word `none` stands for "not set" in every optional field, since TOML has no null.
"""

import difflib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from bruno_ray.errors import SettingsError
from bruno_ray.settings import Settings
from bruno_ray.settings.keys import (
    ENV_PREFIX,
    FIELDS,
    FLAGS,
    SECTIONS,
    flag_of,
    is_optional,
    is_switch,
    nearest,
    parse_json,
    parse_text,
    section_of,
    variable_of,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RESERVED_ENV = frozenset({"BRUNO_CACHE", "BRUNO_API_KEY", "BRUNO_RAY_START_OPTIONS"})
"""Read elsewhere (cache folder), so not settings."""

PRESETS = Path(__file__).parent.parent / "presets"

MAX_ERRORS_SHOWN = 3


class Given(NamedTuple):
    """One value somebody gave."""

    value: Any
    origin: str
    """For `show-config`: command line, environment BRUNO_STUDY__SEED, config.toml, preset refusal."""
    label: str
    """For errors, as the user wrote it: --study.seed, BRUNO_STUDY__SEED, config.toml: study.seed."""


Layer = dict[str, Given]


@dataclass(frozen=True)
class Loaded:
    settings: Settings
    origins: dict[str, str]
    """Dotted key of every effective value -> where it came from."""


# --------------------------------------------------------------------------------------------------------------
# One function per layer


def flatten(tree: Mapping[str, Any], origin: str) -> Layer:
    """A nested dict as a layer. Unknown keys, and values where a group belongs, are errors at every depth."""
    layer: Layer = {}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key in SECTIONS:
                if not isinstance(value, Mapping):
                    raise SettingsError(f"{origin}: {key} is a group of settings, not a value; write [{key}]")
                walk(value, key + ".")
            elif key in FIELDS:
                if is_optional(FIELDS[key]) and value == "none":
                    value = None
                layer[key] = Given(value, origin, f"{origin}: {key}")
            else:
                raise SettingsError(f"{origin}: unknown setting {key!r}{_did_you_mean(nearest(key))}")

    walk(tree, "")
    return layer


def _did_you_mean(name: str | None) -> str:
    return f"; did you mean {name!r}?" if name else "; `bruno-ray show-config --describe` lists all settings"


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


def config_layer(config: Path | None, directory: Path | None = None) -> Layer:
    """`config` if given (it must exist), else config.toml of the working directory if there is one."""
    if config is None:
        config = (directory or Path.cwd()) / "config.toml"
        if not config.is_file():
            return {}
    return flatten(read_toml(config, "config file"), str(config) if config.parent != Path.cwd() else config.name)


def environment_layer(environ: Mapping[str, str]) -> Layer:
    """Variables that begin with BRUNO_, in any case; one that matches no setting is an error."""
    keys = {variable_of(key): key for key in FIELDS}
    groups = {variable_of(key): key for key in SECTIONS}
    layer: Layer = {}
    # Groups first (shorter names sort first), so that BRUNO_STUDY__SEED wins over seed in BRUNO_STUDY.
    for variable in sorted(name for name in environ if name.upper().startswith(ENV_PREFIX)):
        upper, text, origin = variable.upper(), environ[variable], f"environment {variable}"
        if upper in RESERVED_ENV:
            continue
        if upper in keys:
            field = FIELDS[keys[upper]]
            layer[keys[upper]] = Given(parse_text(field, text, origin), origin, origin)
        elif upper in groups:
            tree = parse_json(text, origin)
            for part in reversed(groups[upper].split(".")):
                tree = {part: tree}
            layer |= flatten(tree, origin)
        else:
            key = nearest(upper.removeprefix(ENV_PREFIX).lower().replace("__", "."))
            hint = _did_you_mean(key and variable_of(key))
            raise SettingsError(f"environment {variable}: no setting has this name{hint}")
    return layer


_TRUTH = frozenset({"true", "false", "1", "0", "yes", "no", "on", "off", "none"})


def join_flags(argv: Sequence[str], flags: Mapping[str, str] = FLAGS) -> list[str]:
    """Rewrites `--flag value` as `--flag=value` (and a bare switch as `--switch=true`) for settings.

    argparse then cannot take a value such as `-0.25,1.5` for an option, or MODEL for a switch's value.
    Underscores in a flag's name are accepted. Everything else passes through.
    """
    joined: list[str] = []
    tokens = iter(range(len(argv)))
    for i in tokens:
        name, equals, _ = argv[i].partition("=")
        if argv[i] == "--":
            return [*joined, *argv[i:]]
        flag = name.replace("_", "-")
        if flag not in flags:
            joined.append(argv[i])
            continue
        following = argv[i + 1] if i + 1 < len(argv) else None
        if equals:
            joined.append(flag + argv[i][len(name) :])
        elif is_switch(FIELDS[flags[flag]]) and (following is None or following.lower() not in _TRUTH):
            joined.append(flag + "=true")
        elif following is None or following.split("=")[0] in flags:
            raise SettingsError(f"{flag}: expects a value; write {flag} VALUE")
        else:
            joined.append(f"{flag}={following}")
            next(tokens)
    return joined


def flag_layer(argv: Sequence[str], flags: Mapping[str, str] = FLAGS) -> Layer:
    """Settings given as flags. Anything that is not one is an error."""
    layer: Layer = {}
    for token in join_flags(argv, flags):
        flag, _, text = token.partition("=")
        if flag not in flags:
            raise unknown_flag(flag, flags)
        key = flags[flag]
        value = parse_text(FIELDS[key], text, flag)
        if key in layer and layer[key].value != value:
            earlier = layer[key]
            if isinstance(value, list) and isinstance(earlier.value, list):
                value = earlier.value + value  # a repeated list flag adds to the list
            else:
                raise SettingsError(f"{flag}: {earlier.label} is given too, with another value; leave one out")
        layer[key] = Given(value, "command line", flag)
    return layer


def unknown_flag(flag: str, flags: Mapping[str, str] = FLAGS, others: Sequence[str] = ()) -> SettingsError:
    if not flag.startswith("-"):
        return SettingsError(f"command line: {flag!r} is one argument too many; quote values that contain spaces")
    close = difflib.get_close_matches(flag, [*others, *flags], 1, 0.75)
    key = nearest(flag.lstrip("-").replace("-", "_"))
    guess = close[0] if close else flag_of(key) if key in FIELDS and flag_of(key) in flags else None
    hint = f"; did you mean {guess!r}?" if guess else "; --help lists all options"
    return SettingsError(f"command line: unknown option {flag!r}{hint}")


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_layer(behaviour: str, label: str = "behaviour") -> Layer:
    """The preset of that name, or a .toml file; sources in it that lie beside the file are found there."""
    is_file = behaviour.endswith(".toml")
    path = Path(behaviour) if is_file else PRESETS / f"{behaviour}.toml"
    if not is_file and not path.is_file():
        close = difflib.get_close_matches(behaviour, preset_names(), 1, 0.6)
        others = f"there are {', '.join(preset_names())}; or give a .toml file"
        hint = f"did you mean {close[0]!r}?" if close else others
        raise SettingsError(f"{label}: no preset named {behaviour!r}; {hint}")
    layer = flatten(read_toml(path, "preset"), f"preset {behaviour}")
    if "behaviour" in layer:
        raise SettingsError(f"preset {behaviour}: a preset cannot name another behaviour; remove that line")
    for key, given in layer.items():
        beside = path.parent / given.value if key.endswith(".source") and isinstance(given.value, str) else None
        if is_file and beside is not None and beside.exists():
            layer[key] = given._replace(value=str(beside))
    return layer


# --------------------------------------------------------------------------------------------------------------
# Putting them together


def load(
    argv: Sequence[str] = (),
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """Settings from all layers. `argv` holds settings flags only; `overrides` is for programs, above all else.

    Raises SettingsError, one line, that names source, key and what was wrong.
    """
    said: Layer = {}
    for layer in (
        config_layer(config),
        environment_layer(os.environ if environ is None else environ),
        flag_layer(argv),
        flatten(overrides or {}, "overrides"),
    ):
        said |= layer

    behaviour = said.get("behaviour")
    name = behaviour.value if behaviour else Settings.model_fields["behaviour"].default
    if not isinstance(name, str):
        raise SettingsError(f"{behaviour.label}: {name!r} is not the name of a preset; write a string")
    preset: Layer = {}
    if not (_own_prompts(said) and _is_plain_name(name)):
        preset = preset_layer(name, behaviour.label if behaviour else "behaviour")
    replaced = _replaced_sources(said)
    merged = {key: given for key, given in preset.items() if not key.startswith(replaced)} | said

    settings = _validate(merged)
    effective = dict(values(settings))
    return Loaded(settings, {key: merged[key].origin if key in merged else "default" for key in effective})


def _own_prompts(said: Layer) -> bool:
    """Whether both prompt sets are given, so that a behaviour needs no preset and may have any name."""
    return all(f"prompts.{side}.train.source" in said for side in ("target", "baseline"))


def _is_plain_name(behaviour: str) -> bool:
    return not behaviour.endswith(".toml") and behaviour not in preset_names()


def _replaced_sources(said: Layer) -> tuple[str, ...]:
    """Key prefixes under which the preset has nothing more to say."""
    prefixes = []
    for key in said:
        if match := re.fullmatch(r"(prompts\.\w+)\.(\w+)\.source", key):
            side, part = match.groups()
            prefixes.append(f"{side}." if part == "train" else f"{side}.{part}.")
    return tuple(prefixes)


def nest(layer: Layer) -> dict[str, Any]:
    """The values of a layer as a nested dict."""
    tree: dict[str, Any] = {}
    for key, given in layer.items():
        node = tree
        *groups, leaf = key.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = given.value
    return tree


def _validate(layer: Layer) -> Settings:
    try:
        return Settings.model_validate(nest(layer))
    except ValidationError as error:
        found = error.errors(include_url=False)
        lines = [_explain(item, layer) for item in found[:MAX_ERRORS_SHOWN]]
        more = f"; and {len(found) - MAX_ERRORS_SHOWN} more" if len(found) > MAX_ERRORS_SHOWN else ""
        raise SettingsError("; ".join(lines) + more) from None


def _explain(item: Mapping[str, Any], layer: Layer) -> str:
    """One pydantic error as `source: value: what was wrong`."""
    parts = [str(part) for part in item["loc"]]
    key = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in FIELDS), "")
    where = layer[key].label if key in layer else None
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if where is None:
        # A required field that is missing, or settings that disagree: name who spoke about that group.
        group = key.rpartition(".")[0]
        speakers = [given.label for name, given in layer.items() if group and name.startswith(group + ".")]
        subject = f"{speakers[0]} is set but {key} is not" if speakers else key or "settings"
        return f"{subject}: {message}"
    given = item["input"] if len(parts) > len(key.split(".")) else layer[key].value
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


def apply(settings: Settings, layer: Layer) -> Settings:
    """`settings` with the values of `layer` in place; for a resumed run."""
    return _validate({key: Given(value, "run", f"run: {key}") for key, value in values(settings)} | layer)
