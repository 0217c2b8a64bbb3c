"""Settings as options of a command, with their documentation and defaults from the schema."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from pydantic.fields import FieldInfo

from bruno_ray.cli.show_config import documentation, toml_value
from bruno_ray.errors import SettingsError
from bruno_ray.runs.lookup import find_run, run_named
from bruno_ray.settings import sources
from bruno_ray.settings.flags import join_flags
from bruno_ray.settings.keys import ALIASES, FIELDS, FLAGS, is_resumable, is_switch
from bruno_ray.settings.sources import Loaded

if TYPE_CHECKING:
    from bruno_ray.runs.records import RunRecord

RESUMABLE_FLAGS = {flag: key for flag, key in FLAGS.items() if is_resumable(key)}
"""Flags of the settings a resumed run may change."""

DATA_SET_GROUP = re.compile(r"prompts\.(target|baseline)\.(train|validation|test)\.")
DATA_SET_HELP = "SIDE is target or baseline, PART is train, validation or test; one of the six data sets is shown."


def add_setting_flags(parser: argparse.ArgumentParser, flags: Mapping[str, str]) -> None:
    """One option per setting, grouped as in the schema, with its documentation and default in the help.

    The values are read by `settings.flags`; argparse only has to know the flags and to print them.
    """
    groups: dict[str, Any] = {}
    names: dict[str, list[str]] = {}
    for flag, key in flags.items():
        names.setdefault(key, []).append(flag)
    for key, options in names.items():
        field, data_set = FIELDS[key], DATA_SET_GROUP.match(key)
        title = "prompts.SIDE.PART" if data_set else key.split(".")[0] if "." in key else "settings"
        if title not in groups:
            groups[title] = parser.add_argument_group(title, DATA_SET_HELP if data_set else None)
        shown = not data_set or data_set.groups() == ("target", "train")
        aliases_only = data_set is not None and not shown and any(option in ALIASES for option in options)
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        text = f"{documentation(key)} [{default}]".replace("%", "%%")
        if aliases_only:
            options = [option for option in options if option in ALIASES]
            text = f"The same for {key}."
        groups[title].add_argument(
            *options,
            dest=key,
            metavar=_metavar(field),
            default=argparse.SUPPRESS,
            help=text if shown or aliases_only else argparse.SUPPRESS,
        )


def _default(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "empty"
    return toml_value(value).strip('"') or "empty"


def _metavar(field: FieldInfo) -> str:
    kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    if is_switch(field):
        return "true|false"
    if get_origin(field.annotation) is tuple or tuple in kinds:
        return "LOW,HIGH" if len(kinds) == 2 and Ellipsis not in kinds else "A,B"
    if all(isinstance(kind, str) for kind in kinds):
        return "|".join(kinds)
    names = {int: "N", float: "X", Path: "PATH"}
    if get_origin(kinds[0]) is dict:
        return "K=V,K=V"
    return names.get(kinds[0], "TEXT")


def split_settings(argv: Sequence[str], flags: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(settings flags joined to their values, everything else)."""
    joined = join_flags(argv, flags)
    mine = [token for token in joined if token.partition("=")[0] in flags]
    return mine, [token for token in joined if token.partition("=")[0] not in flags]


def takes_settings(parser: argparse.ArgumentParser) -> None:
    """MODEL, --config, and where settings come from in the help."""
    parser.usage = "%(prog)s [MODEL] [OPTIONS] [--SECTION.SETTING VALUE ...]"
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="Hugging Face model id, a folder, a GGUF file, or smollm2; the same as --model.id",
    )
    _takes_config(parser)
    parser.epilog = (
        "Settings come from the command line, then BRUNO_* environment variables (BRUNO_STUDY__SEED=1), then the"
        " config file, then the behaviour's preset, then the defaults shown here in brackets. Lists are a,b,c or"
        " JSON; `none` empties an optional setting. `bruno-ray show-config` prints what is in effect and why."
    )


def _takes_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="config file [config.toml, if it exists]")


def load_settings(arguments: argparse.Namespace, model_needed: bool = True) -> Loaded:
    """The settings of a command that `takes_settings`. Raises SettingsError."""
    flags = list(arguments.settings_flags)
    if arguments.model is not None:
        flags.append(f"--model.id={arguments.model}")
    loaded = sources.load(flags, arguments.config)
    if model_needed and not loaded.settings.model.id:
        raise SettingsError("command line: no model; write bruno-ray run MODEL, or set model.id in the config file")
    return loaded


def takes_run_or_settings(parser: argparse.ArgumentParser) -> None:
    """RUN or MODEL, and --config, of which `run_or_settings` makes a record."""
    parser.add_argument(
        "run",
        metavar="RUN|MODEL",
        nargs="?",
        help="run directory, or its name below the output directory; or, with settings that say which prompts, a model"
        " as `bruno-ray run` takes it",
    )
    _takes_config(parser)


def run_or_settings(arguments: argparse.Namespace, command: str) -> "RunRecord":
    """The record of RUN, or one of the settings alone, whose model MODEL is. Raises SettingsError for a run and
    settings, or neither."""
    from bruno_ray.runs.records import RunRecord

    if arguments.run is not None:
        if not (arguments.settings_flags or arguments.config):
            return find_run(arguments.run).read()
        if run_named(arguments.run):
            raise SettingsError("command line: RUN has its own settings; leave it out, or leave out the flags")
    arguments.model = arguments.run
    settings = load_settings(arguments, model_needed=False).settings
    if not settings.model.id:
        raise SettingsError(f"command line: no run and no model; write bruno-ray {command} RUN, or name a MODEL")
    return RunRecord(settings=settings)
