"""Commands about runs on the head: progress, fetch, watch."""

import argparse
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from bruno_ray import terminal
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import CostRecord
from bruno_ray.settings.passwords import VARIABLE
from cluster.cli.machines import FLUSH_S, status_view
from cluster.cli.planning import note_study
from cluster.errors import ClusterError, ClusterSettingsError
from cluster.jobs import fetching
from cluster.jobs.session import Session
from cluster.jobs.shell import Shell

FRONT_ROWS = 8


def progress(arguments: argparse.Namespace) -> int:
    session = Session.open(arguments.cluster_config)
    terminal.console().print(progress_view(session.head_shell(), arguments.run, session.folder))
    return 0


def progress_view(shell: Shell, run: str | None, folder: Path) -> RenderableType:
    """The study's trials, what they have cost and the best of its front, rates as raw counts.

    What a trial takes is noted in the cluster's `folder`, for the next estimate.
    """
    from bruno_ray.study.selection import TrialRecord
    from bruno_ray.study.tables import front_table

    # A study elsewhere may need its password, which the run does not keep; on standard input no process list has it.
    command = f"IFS= read -r {VARIABLE}; export {VARIABLE}; python -m cluster.jobs.at_head progress"
    told = os.environ.get(VARIABLE, "") + "\n"
    answer = json.loads(shell.run(f"{command} {shlex.quote(run) if run else ''}", input=told))
    states = answer["states"]
    counted = states.get("COMPLETE", 0) + states.get("PRUNED", 0)
    line = f"{answer['name']}: {counted}/{answer['target']} trials complete"
    line += "".join(f", {count} {state.lower()}" for state, count in states.items() if state != "COMPLETE")
    line += "" if answer["running"] else ", not running"
    note_study(folder, answer)
    parts: list[RenderableType] = [Text(line)]
    if answer.get("cost") is not None:
        parts.append(Text(cost_line(answer)))
    for name, (cases, total) in answer["unedited"].items():
        parts.append(Text(f"unedited model: {name.replace('_', ' ')} {cases}/{total}"))
    rows: list[dict[str, Any]] = [
        {**row, "counts": {name: tuple(pair) for name, pair in row["counts"].items()}} for row in answer["front"]
    ]
    front = [TrialRecord(**row) for row in rows]
    if front:
        title = f"Pareto front ({min(len(front), FRONT_ROWS)} of {len(front)})"
        parts.append(front_table(front[:FRONT_ROWS], answer["objectives"], title, one_line=True))
    return Group(*parts)


def cost_line(answer: dict[str, Any]) -> str:
    """What the machines cost while the run was there: so far, for each completed trial, and for its result."""
    trials = answer["states"].get("COMPLETE", 0) + answer["states"].get("PRUNED", 0)
    cost = CostRecord(dollars=answer["cost"], until=time.time(), ended=not answer["running"])
    return cost.text(trials, answer.get("selected"))


def fetch(arguments: argparse.Namespace) -> int:
    """Bring runs home; without names, all of them."""
    session = Session.open(arguments.cluster_config)
    shell = session.head_shell()
    there = {run.name: run for run in fetching.remote_runs(shell)}
    unknown = [name for name in arguments.runs if name not in there]
    if unknown:
        raise ClusterSettingsError(
            f"command line: no run {unknown[0]!r} on the head: there are {', '.join(there) or 'none'}"
        )
    if not there:
        print("there are no runs on the head")
    for name in arguments.runs or there:
        path = fetching.fetch(shell, name, arguments.to)
        print(path, flush=True)
        if (cost := RunDirectory(path).load_cost()) is not None:
            print(f"  {cost.text(there[name].complete, there[name].selected)}", flush=True)
    return 0


def watch(arguments: argparse.Namespace) -> int:
    """Machines, study and cost, again and again; once where there is no terminal."""
    session, console = Session.open(arguments.cluster_config), terminal.console()
    if not console.is_terminal:
        console.print(watch_view(session))
        session.provider.notices.flush(FLUSH_S)
        return 0
    with Live(Text("asking ..."), console=console, auto_refresh=False, screen=False) as live:
        while True:
            try:
                live.update(watch_view(session), refresh=True)
            except ClusterError as error:
                live.update(Text(f"{time.strftime('%H:%M:%S')} {error}", style="yellow"), refresh=True)
            time.sleep(arguments.interval)


def watch_view(session: Session) -> RenderableType:
    parts: list[RenderableType] = [Text(time.strftime("%H:%M:%S")), status_view(session)]
    try:
        parts.append(progress_view(session.head_shell(wait_s=0), None, session.folder))
    except ClusterError as error:
        parts.append(Text(str(error), style="yellow"))
    return Group(*parts)
