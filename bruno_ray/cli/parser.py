"""The parser of the whole command line, put together from the commands."""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import NoReturn

from bruno_ray import __version__
from bruno_ray.cli import (
    afterwards,
    answers,
    bench,
    beside,
    comparing,
    exports,
    markers,
    publishing,
    reproducing,
    searching,
)
from bruno_ray.cli.command import Command, installed_commands
from bruno_ray.cli.setting_flags import add_setting_flags, split_settings
from bruno_ray.errors import SettingsError
from bruno_ray.settings.flags import unknown_flag
from bruno_ray.settings.keys import FLAGS


class Parser(argparse.ArgumentParser):
    """argparse that reports through SettingsError: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"command line: {message}; see {self.prog} --help")


def all_commands() -> dict[str, Command]:
    """Our own, then those that other packages bring; a name of ours cannot be taken."""
    ours = searching.COMMANDS | afterwards.COMMANDS | exports.COMMANDS | beside.COMMANDS
    ours |= (
        publishing.COMMANDS
        | comparing.COMMANDS
        | reproducing.COMMANDS
        | markers.COMMANDS
        | answers.COMMANDS
        | bench.COMMANDS
    )
    return ours | {name: command for name, command in installed_commands().items() if name not in ours}


def make_parser() -> tuple[Parser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and that of each command by name."""
    parser = Parser(
        prog="bruno-ray",
        description="Find a behaviour in a language model, remove it by directional ablation tuned on Ray, prove what"
        " else changed.",
        epilog="`bruno-ray COMMAND --help` has more. `bruno-ray run --help` documents every setting.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bruno-ray {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=Parser)
    noise = argparse.ArgumentParser(add_help=False)
    volume = noise.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="also log details that help when something fails")
    volume.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")
    for name, command in all_commands().items():
        text = command.description
        sub = commands.add_parser(name, help=text, description=text, parents=[noise], allow_abbrev=False)
        sub.set_defaults(function=command.run, flags=command.settings, unavailable=command.unavailable)
        command.add_arguments(sub)
        add_setting_flags(sub, command.settings)  # last, because argparse prints groups in this order
    return parser, commands.choices


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of one command, with the settings among them in `settings_flags`, as `sources.load` wants them."""
    parser, commands = make_parser()
    name = argv[0] if argv else None
    if name is None:
        parser.print_help()
        raise SystemExit(2)
    if name not in commands:
        if not name.startswith("-"):
            hint = difflib.get_close_matches(name, commands, 1, 0.6)
            known = f"did you mean {hint[0]!r}?" if hint else f"there are {', '.join(commands)}"
            raise SettingsError(f"command line: no command {name!r}; {known}")
        parser.parse_args(argv)
        raise SettingsError(f"command line: a command must come before {name!r}; there are {', '.join(commands)}")
    sub = commands[name]
    if reason := sub.get_default("unavailable"):
        raise SettingsError(f"bruno-ray {name}: {reason}")
    flags = sub.get_default("flags")
    mine, rest = split_settings(argv[1:], flags)
    arguments, unknown = sub.parse_known_args(rest)
    if unknown:
        own = [option for action in sub._actions for option in action.option_strings if option not in FLAGS]
        raise unknown_flag(unknown[0].partition("=")[0], flags, own)
    arguments.settings_flags = mine
    return arguments
