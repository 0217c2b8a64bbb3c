"""`compare`: several models and trials on the same prompts."""

import argparse
from pathlib import Path

from bruno_ray.cli import values
from bruno_ray.cli.command import Command
from bruno_ray.errors import SettingsError
from bruno_ray.settings import sources
from bruno_ray.settings.flags import flag_values
from bruno_ray.settings.keys import FLAGS


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "references",
        metavar="A",
        nargs="+",
        help="RUN, RUN:TRIAL, a model (hub id, folder, saved model, GGUF file), or MODEL@URL with OpenAI's API",
    )
    parser.usage = "%(prog)s A B [C ...] [--to FILE.html] [OPTIONS]"
    parser.add_argument("--config", type=Path, metavar="FILE", help="config file, if none of them is a run")
    parser.add_argument(
        "--to",
        type=Path,
        default=Path("compare.html"),
        metavar="FILE.html",
        help="page with all answers [compare.html]",
    )
    parser.add_argument("--key-variable", metavar="NAME", help="environment variable that holds the servers' API key")
    parser.add_argument("--timeout", type=values.positive, default=120.0, metavar="S", help="seconds per answer [120]")
    parser.epilog = (
        "Prompts and markers are those of the first run among them, and flags replace them; without a run they come"
        " from --behaviour, --config and flags. Rates are tested against A, prompt by prompt."
    )


def _compare(arguments: argparse.Namespace) -> None:
    if len(arguments.references) < 2:
        raise SettingsError("command line: there is nothing to compare one model with; name two or more")
    from rich.table import Table

    from bruno_ray.pipeline.side_by_side import Loadable, compare, parse_reference
    from bruno_ray.terminal import console

    overrides = flag_values(arguments.settings_flags, FLAGS)
    asked = [parse_reference(text) for text in arguments.references]
    has_run = any(isinstance(one, Loadable) and one.run for one in asked)
    if has_run and (arguments.config or "behaviour" in overrides):
        raise SettingsError("command line: a run has its own prompts; leave out --config and --behaviour")
    settings = None if has_run else sources.load(arguments.settings_flags, arguments.config).settings
    result = compare(arguments.references, settings, overrides, arguments.to, arguments.key_variable, arguments.timeout)
    table = Table("metric", *(one.name for one in result.contestants), title="Test prompts")
    for metric, cells in result.rows():
        table.add_row(metric, *(f"{figure}\n{interval}" if interval else figure for figure, interval in cells))
    console().print(table)
    if result.reference:
        console().print(f"KL divergence is from {result.reference}.", highlight=False, markup=False)
    for line in result.lines():
        console().print(line, highlight=False, markup=False)
    print(arguments.to)


COMMANDS = {
    "compare": Command(
        "any models, trials and servers on the same prompts: figures, tests, answers", _compare, _arguments, FLAGS
    )
}
