"""Commands that rent machines, show them and give them back: list, up, status, down, stop."""

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from bruno_ray import terminal
from cluster import launcher
from cluster.cli.asking import agree
from cluster.cli.planning import asked_study, plan
from cluster.errors import ClusterError, ClusterSettingsError, FetchError, NodeError, RefusedError
from cluster.jobs import fetching, submitting
from cluster.jobs.session import Session
from cluster.renting.budget import DESTRUCTION_S, Phase
from cluster.renting.cost import LOW_CREDIT_H, ClusterCost, hours_left, tell_credit
from cluster.renting.tags import ClusterNode
from cluster.setup.bootstrap import MAX_HOURS_VARIABLE
from cluster.vast.errors import VastError
from cluster.vast.models import State
from cluster.vast.offers import RankedOffer

logger = logging.getLogger(__name__)

SHOWN_OFFERS = 8
GPU_COMMAND = (
    "command -v nvidia-smi > /dev/null && nvidia-smi"
    " --query-gpu=utilization.gpu,memory.used,memory.total --format=csv,noheader,nounits || true"
)
TUNNELS_COMMAND = "cat ~/.bruno-ray/mesh/status.json 2> /dev/null || true"
STILL_BILLED_S = 60.0
"""How long the list of instances may go on showing what has been destroyed, beside the time that each of them takes."""

SOON_S = 86400.0

FLUSH_S = 20.0
"""How long a command waits for what it has to tell somebody."""


def list_offers(arguments: argparse.Namespace) -> int:
    """What could be rented now for each node type, and why the rest could not."""
    session = Session.open(arguments.cluster_config)
    console = terminal.console()
    for name, node_type in _node_types(session, arguments.type).items():
        console.print(offer_table(session, name, node_type["node_config"], arguments.limit))
    return 0


def offer_table(session: Session, name: str, node_config: dict[str, Any], limit: int) -> RenderableType:
    ranking = session.provider.offers(node_config)
    table = Table(title=f"{name}: {len(ranking.accepted)} offers, the best first", title_justify="left")
    for column in ("offer", "GPU", "GPU GB", "$/h", "$/useful GPU-h", "disk GB", "reliability", "Mbit/s", "where"):
        table.add_column(column, justify="left" if column in ("GPU", "where") else "right")
    for ranked in ranking.accepted[:limit]:
        table.add_row(*offer_cells(ranked, node_config["disk_gb"]))
    return Group(table, Text(ranking.explanation(), style="dim"), Text())


def offer_cells(ranked: RankedOffer, disk_gb: float) -> list[str]:
    offer = ranked.offer
    return [
        str(offer.id),
        f"{offer.num_gpus} x {offer.gpu_name or '?'}" + (" (bid)" if ranked.bid is not None else ""),
        f"{offer.gpu_ram / 1000:.0f}",
        f"{ranked.price_per_hour:.3f}",
        f"{ranked.useful_cost:.3f}",
        f"{disk_gb:.0f} of {offer.disk_space:.0f}",
        f"{offer.uptime:.3f}",
        f"{offer.inet_down:.0f}",
        offer.geolocation or "?",
    ]


def _node_types(session: Session, chosen: str | None) -> dict[str, Any]:
    types = session.config["available_node_types"]
    if chosen is not None and chosen not in types:
        raise ClusterSettingsError(
            f"command line: no node type {chosen!r}: {session.config_file} has {', '.join(types)}"
        )
    return {chosen: types[chosen]} if chosen else types


# --------------------------------------------------------------------------------------------------------------


def up(arguments: argparse.Namespace) -> int:
    """Start the cluster, or bring its head up to date, with Ray's own `ray up`."""
    if arguments.max_hours is not None:
        os.environ[MAX_HOURS_VARIABLE] = str(arguments.max_hours)
    session = Session.open(arguments.cluster_config)
    check_mounts(session)
    heads = [node for node in session.nodes() if node.is_head]
    out = terminal.console()
    for line in plan(session, heads, asked_study(session, arguments.trials, arguments.trial_seconds)):
        out.print(line, highlight=False)
    is_stopped = any(head.instance.state is State.STOPPED for head in heads)
    restart = [] if arguments.restart or not heads or is_stopped else ["--no-restart"]
    place = "this machine; the head gets no API key" if session.settings.launcher == "laptop" else "the head"
    out.print(f"launcher: {place}", highlight=False)
    agree("Go on?", arguments.yes)
    if is_stopped:
        out.print(f"starting head {heads[0].id} again ...")
        session.provider.resume()
    code = ray_command(session, "up", "-y", "--no-config-cache", *restart)
    if code:
        out.print(f"ray up ended with {code}", style="red")
        show_billed(Session.open(arguments.cluster_config).nodes(), out)
        return code
    if session.settings.launcher == "laptop":
        launcher.start_here(session.config, session.config_file, session.settings, session.folder)
        out.print("workers are launched from this machine: keep it on, without it they end themselves")
    out.print(f"cluster {session.name} is up; `bruno-ray cluster submit -- bruno-ray run MODEL` starts a job")
    return 0


def check_mounts(session: Session) -> None:
    """Ray notices only after it has rented the head. Raises `ClusterSettingsError`."""
    for remote, local in session.config.get("file_mounts", {}).items():
        if not (session.config_file.parent / Path(local).expanduser()).exists():
            raise ClusterSettingsError(
                f"file_mounts: {local} (for {remote}) is not in {session.config_file.resolve().parent}: keep"
                " cluster.yaml in the checkout, or write full paths"
            )


def ray_command(session: Session, *words: str) -> int:
    """Ray's own command line in a process of its own; its output is the user's. Paths in cluster.yaml are relative to
    it, as Ray takes them relative to where it runs."""
    sys.stdout.flush()
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "ray.scripts.scripts", *words, str(session.config_file.resolve())]
    return subprocess.run(command, env=environment, cwd=session.config_file.resolve().parent).returncode


# --------------------------------------------------------------------------------------------------------------


def status(arguments: argparse.Namespace) -> int:
    session = Session.open(arguments.cluster_config)
    terminal.console().print(status_view(session))
    session.provider.notices.flush(FLUSH_S)
    return 0


def status_view(session: Session) -> RenderableType:
    """Nodes with price, tunnel and GPU use; cost per hour and so far."""
    nodes, losses = session.nodes(), [Text(loss, style="bold red") for loss in session.provider.losses()]
    if not nodes:
        return Group(Text(f"cluster {session.name}: no machines, nothing is billed"), *losses)
    tunnels, gpus, notes = machine_facts(session, nodes)
    cost = session.provider.cost()
    per_hour = {item.node_id: item.per_hour for item in cost.nodes}
    so_far = {item.node_id: item.so_far for item in cost.nodes}
    table = Table(title=f"cluster {session.name}", title_justify="left")
    for column in ("node", "instance", "state", "machine", "$/h", "$ so far", "tunnel", "GPU use"):
        table.add_column(column, justify="right" if column.startswith("$") else "left")
    for node in nodes:
        instance = node.instance
        table.add_row(
            f"{'head' if node.is_head else 'worker'} {node.label.index}",
            node.id,
            f"{'paused' if node.is_paused else instance.state.value}, {node.label.status}",
            f"{instance.num_gpus or 0} x {instance.gpu_name or '-'}, {instance.geolocation or '?'}",
            f"{per_hour.get(node.id, 0.0):.3f}",
            f"{so_far.get(node.id, 0.0):.2f}",
            "-" if node.is_head else tunnels.get(node.id, "-"),
            gpus.get(node.id, "-"),
        )
    notes += ending_notes(nodes)
    said, in_order = launcher.standing(session.settings, session.folder)
    lines = [*losses, Text(said, style="" if in_order else "bold red")]
    lines += [Text(cost_line(session, cost)), credit_text(session, cost)]
    stand = session.provider.limit()
    if stand.phase is not Phase.OPEN:
        said = f"{stand.reason}: workers are destroyed, the head goes on costing until `bruno-ray cluster down`"
        lines.append(Text(said, style="bold red"))
    return Group(table, *lines, *(Text(note, style="yellow") for note in notes))


def ending_notes(nodes: Sequence[ClusterNode]) -> list[str]:
    """About contracts that end within a day."""
    left = [(node, (node.instance.end_date or math.inf) - time.time()) for node in nodes]
    return [
        f"the contract of instance {node.id} ends in {seconds / 3600:.1f} h; then it stops, with all that is on it"
        for node, seconds in left
        if seconds < SOON_S
    ]


def credit_text(session: Session, cost: ClusterCost) -> Text:
    """What the account has, and how long that lasts."""
    try:
        credit = session.provider.credit()
    except VastError as error:
        return Text(f"credit: could not be asked ({error})", style="yellow")
    if credit is None:
        return Text("credit: not told to this API key (it lacks user_read)", style="dim")
    hours = hours_left(credit, cost)
    tell_credit(session.provider.notices, credit, cost)
    lasts = f", {hours:.1f} h at this price" if cost.per_hour else ""
    return Text(f"credit: {credit:.2f} ${lasts}", style="bold red" if hours < LOW_CREDIT_H else "")


def cost_line(session: Session, cost: ClusterCost) -> str:
    budget = session.settings.budget
    return (
        f"cost: {cost.per_hour:.3f} of {budget.max_price_per_hour:.2f} $/h,"
        f" {cost.so_far:.2f} of {budget.max_total_cost:.2f} $ so far"
    )


def machine_facts(session: Session, nodes: Sequence[ClusterNode]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """What only the machines know, asked all at once: tunnels by node id, GPU use by node id, and complaints."""
    running = [node for node in nodes if node.instance.state is State.RUNNING and node.instance.ssh_endpoints]
    tunnels: dict[str, str] = {}
    notes: list[str] = []

    def ask(node: ClusterNode) -> str:
        shell = session.shell(node, wait_s=0)
        if node.is_head:
            text = shell.run(TUNNELS_COMMAND).strip()
            if text:
                tunnels.update(tunnel_states(json.loads(text), notes))
            else:
                notes.append("the head has no tunnel supervisor yet")
        return gpu_use(shell.run(GPU_COMMAND))

    gpus = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        for node, answer in [(node, pool.submit(ask, node)) for node in running]:
            try:
                gpus[node.id] = answer.result()
            except ClusterError as error:
                notes.append(f"instance {node.id}: {error}")
    return tunnels, gpus, notes


def tunnel_states(report: dict[str, Any], notes: list[str]) -> dict[str, str]:
    """From the supervisor's status file."""
    if report["api"]["error"]:
        notes.append(f"the head cannot ask the API: {report['api']['error']}")
    if (age := time.time() - report["written"]) > 15:
        notes.append(f"the tunnel supervisor last reported {age:.0f} s ago")
    return {
        name: node["state"] + (f" ({node['last_error']})" if node["state"] != "up" and node["last_error"] else "")
        for name, node in report["nodes"].items()
    }


def gpu_use(text: str) -> str:
    """ "97 %, 20.1/24.6 GB" for each GPU from nvidia-smi's table; "-" where there is none."""
    cells = [[float(cell) for cell in line.split(",")] for line in text.splitlines() if line.count(",") == 2]
    return "; ".join(f"{use:.0f} %, {used / 1024:.1f}/{total / 1024:.1f} GB" for use, used, total in cells) or "-"


# --------------------------------------------------------------------------------------------------------------


def down(arguments: argparse.Namespace) -> int:
    """Give everything back, after what is worth keeping is home."""
    return _take_down(arguments, stop_jobs=False)


def stop(arguments: argparse.Namespace) -> int:
    """End the day: stop the jobs, whose runs can be resumed, fetch everything, give everything back."""
    return _take_down(arguments, stop_jobs=True)


def _take_down(arguments: argparse.Namespace, stop_jobs: bool) -> int:
    session, out = Session.open(arguments.cluster_config), terminal.console()
    nodes = session.nodes()
    if not nodes:
        out.print(f"cluster {session.name}: no machines, nothing is billed")
        return 0
    show_billed(nodes, out)
    out.print(launcher.standing(session.settings, session.folder)[0], highlight=False)
    keep_what_is_worth_it(session, arguments, stop_jobs, out)
    per_hour = sum(node.instance.dph_total for node in nodes)
    agree(f"Destroy these {len(nodes)} machines ({per_hour:.3f} $/h) with all that is on them?", arguments.yes)
    code = ray_command(session, "down", "-y")
    left = still_billed(arguments.cluster_config, STILL_BILLED_S + DESTRUCTION_S * len(nodes))
    if left:
        out.print("STILL BILLED:", style="bold red")
        show_billed(left, out)
        out.print("repeat the command, or destroy them in Vast.ai's console")
        return 1
    out.print(f"cluster {session.name}: no machines, nothing is billed")
    return code


def keep_what_is_worth_it(session: Session, arguments: argparse.Namespace, stop_jobs: bool, out: Console) -> None:
    """Say what runs and what has not come home, and fetch it unless the user discards it. Raises `RefusedError`."""
    try:
        shell = session.head_shell()
        working = submitting.working(session)
        if working and stop_jobs:
            out.print(f"running jobs: {', '.join(working)}")
            agree("Stop them? Their runs can be resumed.", arguments.yes)
            for job in working:
                submitting.stop(session, job)
        elif working:
            out.print(f"these jobs are still RUNNING and end with the machines: {', '.join(working)}", style="red")
            if not arguments.discard:
                raise RefusedError(
                    "jobs are running: wait for them, `bruno-ray cluster stop` ends them and brings their runs home,"
                    " --discard ends them as they are"
                )
        pending = unfetched(session, shell, arguments.to, out)
        if pending and not arguments.discard:
            agree(f"Fetch {', '.join(pending)} into {arguments.to} first?", arguments.yes)
            for name in pending:
                out.print(f"fetched {fetching.fetch(shell, name, arguments.to)}")
    except ClusterError as error:
        if arguments.discard:
            out.print(f"not looked at what would be lost: {error}", style="yellow")
            return
        if isinstance(error, NodeError | FetchError):
            raise type(error)(f"{error}; nothing was destroyed (--discard gives up what is on the machines)") from error
        raise


def unfetched(session: Session, shell: Any, runs: Path, out: Console) -> list[str]:
    """Names of the runs that are not here as they are on the head; prints the state of each."""
    names = []
    for run in fetching.remote_runs(shell):
        home = fetching.is_fetched(runs / run.name, fetching.manifest_of(shell, run.name))
        model = f"model saved ({', '.join(run.models)})" if run.models else "NO MODEL SAVED"
        if run.elsewhere:
            model = f"model saved OUTSIDE the run, at {run.elsewhere}, where it is not fetched from"
        text = f"{run.name}: {'RUNNING, ' if run.running else ''}{model}, {'fetched' if home else 'NOT FETCHED'}"
        out.print(text, style=None if home and run.models else "yellow", highlight=False)
        if not home:
            names.append(run.name)
    return names


def show_billed(nodes: Sequence[ClusterNode], out: Console) -> None:
    if not nodes:
        out.print("no machines, nothing is billed")
    for node in nodes:
        kind = "head" if node.is_head else "worker"
        machine = f"{node.instance.num_gpus or 0} x {node.instance.gpu_name or 'no GPU'}"
        out.print(f"  instance {node.id} ({kind} {node.label.index}, {machine}): {node.instance.dph_total:.3f} $/h")


def still_billed(config_file: Path, seconds: float) -> list[ClusterNode]:
    """What the API goes on listing, asked until that is nothing or `seconds` are over."""
    session, deadline = Session.open(config_file), time.monotonic() + seconds
    while (left := session.nodes()) and time.monotonic() < deadline:
        time.sleep(2)
    return left
