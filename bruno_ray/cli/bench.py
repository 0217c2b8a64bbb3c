"""`bench`: how fast trials of a model are on this machine, and how near that is to its limit."""

import argparse
from pathlib import Path

from bruno_ray.cli import values
from bruno_ray.cli.command import Command
from bruno_ray.cli.setting_flags import load_settings, takes_settings
from bruno_ray.settings.keys import FLAGS


def _arguments(parser: argparse.ArgumentParser) -> None:
    takes_settings(parser)
    parser.add_argument(
        "--at-once", type=values.count, default=32, metavar="N", help="largest number of trials at once [32]"
    )
    parser.add_argument("--prompt-tokens", type=values.count, default=40, metavar="N", help="of each prompt [40]")
    parser.add_argument(
        "--seconds", type=values.positive, default=300.0, metavar="S", help="try no more at once after this [300]"
    )
    parser.add_argument(
        "--to",
        type=Path,
        default=Path("bench.json"),
        metavar="FILE.json",
        help="file for the figures; a picture (.svg) is written beside it",
    )
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="an earlier bench to compare with")
    parser.epilog = (
        "Prompts are random tokens: prompts.n_validation of them a side, answered with scoring.response_tokens, the KL"
        " taken over scoring.kl_tokens. No answer ends early and none is drafted: a study is faster."
    )


def _bench(arguments: argparse.Namespace) -> None:
    loaded = load_settings(arguments)
    from bruno_ray.pipeline import commands

    commands.bench(
        loaded.settings,
        at_once=arguments.at_once,
        prompt_tokens=arguments.prompt_tokens,
        seconds=arguments.seconds,
        to=arguments.to,
        compare=arguments.compare,
        began=arguments.began,
    )
    print(arguments.to)


COMMANDS = {
    "bench": Command("trials per hour of a model here, and the share of the machine's limit", _bench, _arguments, FLAGS)
}
