"""Commands on a run that is there: `front`, `save`, `report`, `chat`."""

import argparse
from pathlib import Path

from bruno_ray.cli import values
from bruno_ray.cli.command import Command
from bruno_ray.errors import SettingsError
from bruno_ray.runs.lookup import find_run, find_trial


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, or its name below the output directory")


def _trial_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN[:TRIAL]", help="run directory, or its name below the output directory")


def _front_arguments(parser: argparse.ArgumentParser) -> None:
    _run_argument(parser)
    parser.add_argument("--all", action="store_true", help="every completed trial, not only the front")


def _front(arguments: argparse.Namespace) -> None:
    run = find_run(arguments.run)
    from bruno_ray.pipeline import commands

    commands.front(run.path, all_trials=arguments.all)


def _save_arguments(parser: argparse.ArgumentParser) -> None:
    _trial_argument(parser)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--trial", type=values.index, metavar="N", help="number of the trial [asks]")
    choice.add_argument(
        "--auto",
        action="store_true",
        help="pick by rule: the best trials with a KL divergence of at most the run's selection.max_kl are measured"
        " again on prompts that the search has not seen; the one that leaves fewest of them without a proper answer is"
        " taken, and of those within one prompt of it the one with the lowest KL divergence",
    )
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where to save it; must not exist [RUN/model]")
    parser.add_argument("--upload", metavar="REPO", help="also upload to this hub repository (owner/name), see publish")
    parser.add_argument("--public", action="store_true", help="make it public [a new repository is private]")


def _save(arguments: argparse.Namespace) -> None:
    run, trial = find_trial(arguments.run)
    if trial is not None and (arguments.trial is not None or arguments.auto):
        raise SettingsError("command line: the trial is given twice; leave out :TRIAL, --trial or --auto")
    if arguments.public and not arguments.upload:
        raise SettingsError("command line: --public says how to upload; add --upload REPO")
    from bruno_ray.pipeline import commands

    folder = commands.save(
        run.path,
        trial=arguments.trial if trial is None else trial,
        auto=arguments.auto,
        to=arguments.to,
        upload_to=arguments.upload,
        public=arguments.public,
    )
    print(folder)


def _report(arguments: argparse.Namespace) -> None:
    run = find_run(arguments.run)
    from bruno_ray.pipeline import commands

    print(commands.report(run.path))


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    _trial_argument(parser)
    parser.add_argument("--unedited", action="store_true", help="talk to the unedited model")
    parser.add_argument("--max-tokens", type=values.count, default=1024, metavar="N", help="longest answer [1024]")
    parser.add_argument("--temperature", type=values.not_negative, default=0.7, metavar="X", help="0 is greedy [0.7]")
    parser.add_argument("--top-p", type=values.share, default=0.95, metavar="X", help="nucleus sampling [0.95]")
    parser.add_argument("--system-prompt", metavar="TEXT", help="[as in the run]")


def _chat(arguments: argparse.Namespace) -> None:
    run, trial = find_trial(arguments.run)
    from bruno_ray.pipeline import commands

    commands.chat(
        run.path,
        trial=trial,
        unedited=arguments.unedited,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        system_prompt=arguments.system_prompt,
    )


COMMANDS = {
    "front": Command("table of the Pareto front of a run", _front, _front_arguments),
    "save": Command("bake a trial into full weights, save them, measure what was saved", _save, _save_arguments),
    "report": Command("write the report of a run again", _report, _run_argument),
    "chat": Command("talk to the model of a trial in the terminal", _chat, _chat_arguments),
}
