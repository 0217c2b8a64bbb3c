"""`reproduce`: the figures of a result, measured again."""

import argparse
from pathlib import Path

from bruno_ray.cli.command import Command
from bruno_ray.settings.flags import flag_values
from bruno_ray.settings.keys import FLAGS

MISMATCH = 1
"""Exit code where a figure differs by more than its tolerance."""

SETTINGS = ("model.", "prompts.", "ray.", "directions.methods", "scoring.scorers", "scoring.report_scorers")
REPRODUCE_FLAGS = {flag: key for flag, key in FLAGS.items() if key.startswith((*SETTINGS, "scoring.markers"))}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="a reproduce.json, bruno-ray's or heretic's, or the folder of a run or a saved model with one in it",
    )
    parser.add_argument("--model", metavar="MODEL", help="the base model, if it has another name or path here")
    parser.usage = "%(prog)s FILE [--model MODEL] [--prompts.SIDE.PART.source FILE] [OPTIONS]"
    parser.epilog = (
        "Settings come from the file; flags replace them, such as where the model and the prompts lie here. The last"
        f" line is MATCH, or how many figures differ, and the exit code is 0 or {MISMATCH}."
    )


def _reproduce(arguments: argparse.Namespace) -> int:
    flags = list(arguments.settings_flags)
    if arguments.model is not None:
        flags.append(f"--model.id={arguments.model}")
    overrides = flag_values(flags, REPRODUCE_FLAGS)
    from rich.table import Table

    from bruno_ray.pipeline.reproducing import reproduce
    from bruno_ray.publishing.reproduction import TOLERANCES
    from bruno_ray.terminal import console

    lines = reproduce(arguments.file, overrides)
    table = Table("", "figure", "in the file", "measured now", "")
    for line in lines:
        table.add_row(line.whose, line.metric, line.recorded, line.found, "" if line.same else "differs")
    console().print(table)
    differing = sum(not line.same for line in lines)
    if differing:
        print(f"{differing} of {len(lines)} figures differ ({TOLERANCES})")
        return MISMATCH
    print(f"MATCH: {len(lines)} figures ({TOLERANCES})")
    return 0


COMMANDS = {
    "reproduce": Command(
        "rebuild the edit of a reproduce.json and measure it again", _reproduce, _arguments, REPRODUCE_FLAGS
    )
}
