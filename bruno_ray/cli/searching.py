"""Commands that search: `run` and `resume`."""

import argparse

from bruno_ray.cli import values
from bruno_ray.cli.command import Command
from bruno_ray.cli.setting_flags import RESUMABLE_FLAGS, load_settings, takes_settings
from bruno_ray.progress import phase
from bruno_ray.runs.directory import refuse_existing
from bruno_ray.runs.lookup import find_run
from bruno_ray.settings import sources
from bruno_ray.settings.flags import flag_values
from bruno_ray.settings.keys import FLAGS
from bruno_ray.settings.source_values import nest

LOADING = "loading the program"
"""Seconds, and on a busy machine more than ten of them."""


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    takes_settings(parser)
    parser.add_argument(
        "--repeats",
        type=values.count,
        metavar="N",
        help="make N runs, with seeds from study.seed upwards, and print how far apart they end; needs --auto-select",
    )


def _run(arguments: argparse.Namespace) -> None:
    loaded = load_settings(arguments)
    if arguments.repeats is not None:
        from bruno_ray.pipeline.repeating import repeat

        for path in repeat(loaded.settings, arguments.repeats):
            print(path)
        return
    if (name := loaded.settings.study.name) is not None:  # said before ten seconds of imports
        refuse_existing(loaded.settings.output.directory / name)
    with phase(LOADING):
        from bruno_ray.pipeline.run import run

    print(run(loaded.settings, began=arguments.began))


def _resume_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, or its name below the output directory")
    number = parser.add_mutually_exclusive_group()
    number.add_argument(
        "--trials", type=values.count, metavar="N", help="completed trials in total [as the run was set]"
    )
    number.add_argument(
        "--more", type=values.count, metavar="N", help="this many trials in addition to those completed"
    )


def _resume(arguments: argparse.Namespace) -> None:
    overrides = flag_values(arguments.settings_flags, RESUMABLE_FLAGS)
    run = find_run(arguments.run)
    sources.apply(run.read().settings, overrides)  # a wrong value is reported by its flag
    with phase(LOADING):
        from bruno_ray.pipeline.run import resume

    print(
        resume(run.path, total=arguments.trials, more=arguments.more, overrides=nest(overrides), began=arguments.began)
    )


COMMANDS = {
    "run": Command(
        "search for an edit, from the prompt sets to a saved model and a report", _run, _run_arguments, FLAGS
    ),
    "resume": Command(
        "continue a run that was stopped, or add trials to a finished one",
        _resume,
        _resume_arguments,
        RESUMABLE_FLAGS,
    ),
}
