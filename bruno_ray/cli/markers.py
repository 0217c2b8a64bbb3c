"""`markers`: what could mark a behaviour of one's own."""

import argparse

from bruno_ray.cli import values
from bruno_ray.cli.command import Command
from bruno_ray.cli.setting_flags import run_or_settings, takes_run_or_settings
from bruno_ray.cli.show_config import toml_value
from bruno_ray.settings.keys import FLAGS


def _arguments(parser: argparse.ArgumentParser) -> None:
    takes_run_or_settings(parser)
    parser.add_argument("--most", type=values.count, default=20, metavar="N", help="rows of the table [20]")
    parser.add_argument(
        "--tokens", type=values.count, metavar="N", help="longest answer that is read [scoring.report_tokens]"
    )
    parser.epilog = (
        "The unedited model answers the train prompts of both sides; what tells its answers apart is listed, then the"
        " present markers with those proposals that see answers which nothing before them sees, as lines for a config"
        " or behaviour file. Read the answers before you trust them: a phrase may go with the subject of the prompts."
    )


def _markers(arguments: argparse.Namespace) -> None:
    record = run_or_settings(arguments, "markers")
    from bruno_ray.pipeline.proposing import propose_markers

    markers = propose_markers(record, most=arguments.most, n_tokens=arguments.tokens)
    print(f"[scoring]\nmarkers = {toml_value(markers)}")


COMMANDS = {
    "markers": Command(
        "propose markers from what the unedited model answers to target and baseline prompts",
        _markers,
        _arguments,
        FLAGS,
    )
}
