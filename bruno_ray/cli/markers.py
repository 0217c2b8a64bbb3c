"""`markers`: what could mark a behaviour of one's own."""

import argparse
from pathlib import Path

from bruno_ray.cli import values
from bruno_ray.cli.command import Command
from bruno_ray.cli.setting_flags import load_settings
from bruno_ray.cli.show_config import toml_value
from bruno_ray.errors import SettingsError
from bruno_ray.runs.lookup import find_run
from bruno_ray.settings.keys import FLAGS


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        help="run directory, or its name below the output directory; without it, settings say which model and prompts",
    )
    parser.add_argument("--most", type=values.count, default=20, metavar="N", help="rows of the table [20]")
    parser.add_argument(
        "--tokens", type=values.count, metavar="N", help="longest answer that is read [scoring.report_tokens]"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="config file [config.toml, if it is there]")
    parser.epilog = (
        "The unedited model answers the train prompts of both sides; what tells its answers apart is listed, then the"
        " present markers with those proposals that see answers which nothing before them sees, as lines for a config"
        " or behaviour file. Read the answers before you trust them: a phrase may go with the subject of the prompts."
    )


def _markers(arguments: argparse.Namespace) -> None:
    from bruno_ray.runs.records import RunRecord

    if arguments.run is not None:
        if arguments.settings_flags or arguments.config:
            raise SettingsError("command line: RUN has its own settings; leave it out, or leave out the flags")
        record = find_run(arguments.run).read()
    else:
        arguments.model = None
        record = RunRecord(settings=load_settings(arguments, model_needed=False).settings)
        if not record.settings.model.id:
            raise SettingsError("command line: no run and no model; write bruno-ray markers RUN, or give --model.id")
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
