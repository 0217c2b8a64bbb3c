"""`bruno-ray cluster`: the arguments of every command. What they do is imported only when one is called."""

import argparse
import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from bruno_ray.cli.command import Command
from bruno_ray.cli.exits import exit_code

DESCRIPTION = "A Ray cluster of rented Vast.ai machines: start it, give it work, bring the results home, end it."
RUNS = Path("runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands; give what argparse makes of them to ``run``."""
    commands = parser.add_subparsers(title="cluster commands", dest="cluster_command", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config",
        dest="cluster_config",
        type=Path,
        default=Path("cluster.yaml"),
        metavar="FILE",
        help="the cluster [cluster.yaml]",
    )

    def command(name: str, function: str, text: str, yes: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)
        sub.set_defaults(cluster_function=function)
        if yes:
            sub.add_argument("--yes", "-y", action="store_true", help="do not ask")
        return sub

    sub = command("list", "machines:list_offers", "what could be rented now, and why the rest could not")
    sub.add_argument("--type", metavar="TYPE", help="one node type of the cluster [all]")
    sub.add_argument("--limit", type=int, default=8, metavar="N", help="offers shown of each type [8]")

    sub = command("up", "machines:up", "start the cluster, or bring it up to date", yes=True)
    sub.add_argument("--restart", action="store_true", help="restart Ray on a head that runs; ends its jobs")
    sub.add_argument(
        "--max-hours",
        type=float,
        metavar="N",
        help="stop the jobs and destroy the workers this many hours after the head started [budget.max_hours]",
    )
    _add_study(sub)

    sub = command("create", "creating:create", "as up, with so many machines of one GPU from the beginning", yes=True)
    sub.add_argument("gpu", metavar="GPU", help="as Vast.ai names it, such as RTX_4090 or 'H100 SXM'")
    sub.add_argument("count", type=int, metavar="N", help="machines with one such GPU, beside the head")
    sub.add_argument("--hours", type=float, metavar="H", help="what --max-hours of up says [budget.max_hours]")
    sub.add_argument("--budget", type=float, metavar="DOLLARS", help="in total [budget.max_total_cost]")
    sub.add_argument("--model", metavar="MODEL", help="decides about disk and memory [what cluster.yaml says]")
    _add_study(sub)

    command("doctor", "doctor:doctor", "rent one cheap machine for some minutes, and write down what it does", yes=True)

    command("status", "machines:status", "machines, cost, tunnels, GPU use")

    sub = command("watch", "runs:watch", "machines, the running study and the cost, live")
    sub.add_argument("--interval", type=float, default=5.0, metavar="SECONDS", help="[5]")

    sub = command("submit", "jobs:submit", "run a command on the head and follow it; ends with its exit code")
    sub.add_argument("--detach", action="store_true", help="do not follow it")
    sub.add_argument("--working-dir", type=Path, default=Path("."), metavar="FOLDER", help="goes with the job [.]")
    sub.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="leave more files of it out; may be repeated"
    )
    sub.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="NAME",
        help="send a file or folder even if it looks like a secret (.env, keys ...); may be repeated",
    )
    sub.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="for the job, such as HF_TOKEN, with the value it has here if none is given; may be repeated",
    )
    sub.add_argument("entrypoint", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="what to run")

    sub = command("logs", "jobs:logs", "follow a job from its beginning, or show an instance's last lines")
    sub.add_argument("job", nargs="?", metavar="JOB|INSTANCE", help="a number is an instance [the newest job]")
    sub.add_argument("--tail", type=int, default=1000, metavar="N", help="lines of an instance [1000]")
    sub.add_argument("--host", action="store_true", help="show the log of the host's container service instead")

    sub = command("cancel", "jobs:cancel", "stop one job; the machines stay until they are idle", yes=True)
    sub.add_argument("job", nargs="?", metavar="JOB", help="[the newest]")

    sub = command("progress", "runs:progress", "trials and Pareto front of a study on the head, with raw counts")
    sub.add_argument("run", nargs="?", metavar="RUN", help="[the running one, or the newest]")

    sub = command("fetch", "runs:fetch", "bring runs and saved models home, verified; goes on where it stopped")
    sub.add_argument("runs", nargs="*", metavar="RUN", help="[all]")
    sub.add_argument("--to", type=Path, default=RUNS, metavar="FOLDER", help="[runs]")

    sub = command("notify", "notifying:notify", "try whether the command or webhook of provider.notify works")
    sub.add_argument("text", nargs="?", default="this is a test", metavar="TEXT", help="[this is a test]")

    command("pause", "pausing:pause", "stop the jobs and the head, which keeps its disk; `up` goes on", yes=True)

    sub = command("stop", "machines:stop", "stop the jobs, fetch everything, give everything back", yes=True)
    _add_keeping(sub)
    sub = command("down", "machines:down", "fetch what is not home yet, give everything back", yes=True)
    _add_keeping(sub)

    sub = command("dashboard", "jobs:dashboard", "open Ray's dashboard through a tunnel")
    _add_door(sub, 8265)
    sub = command("serve", "jobs:serve", "open what `bruno-ray serve` serves on the head through a tunnel")
    _add_door(sub, 8000)
    sub.add_argument("--remote-port", type=int, default=8000, metavar="N", help="its port on the head [8000]")


def _add_study(parser: argparse.ArgumentParser) -> None:
    """For the estimate only."""
    parser.add_argument("--trials", type=int, metavar="N", help="for the estimate [as the study last looked at]")
    parser.add_argument("--trial-seconds", type=float, metavar="S", help="of one trial on one GPU, for the estimate")


def _add_keeping(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--discard", action="store_true", help="give up what has not been fetched")
    parser.add_argument("--to", type=Path, default=RUNS, metavar="FOLDER", help="where runs are fetched to [runs]")


def _add_door(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--port", type=int, default=port, metavar="N", help=f"on this machine; 0 for any [{port}]")
    parser.add_argument("--open", action="store_true", help="open it in the browser")


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit code."""
    module, _, name = arguments.cluster_function.partition(":")
    function: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(f"cluster.cli.{module}"), name)
    return function(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m cluster.cli`: the same as `bruno-ray cluster`."""
    parser = argparse.ArgumentParser(prog="bruno-ray cluster", description=DESCRIPTION)
    add_arguments(parser)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("cluster").setLevel(logging.INFO)
    return exit_code(lambda: run(parser.parse_args(argv)))


COMMAND = Command(DESCRIPTION, run, add_arguments)
"""`bruno-ray cluster`, an entry point of pyproject.toml."""
