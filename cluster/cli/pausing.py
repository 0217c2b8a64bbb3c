"""The command that keeps the head's disk and ends everything else: pause."""

import argparse
import math
import time
from collections.abc import Sequence

from rich.console import Console

from bruno_ray import terminal
from cluster.cli import RUNS
from cluster.cli.asking import agree
from cluster.cli.machines import unfetched
from cluster.errors import NodeError
from cluster.jobs import submitting
from cluster.jobs.session import Session
from cluster.keeper import end_for_good
from cluster.node_provider import LAUNCHER_FOLDER
from cluster.renting.pausing import cost_per_day
from cluster.renting.tags import ClusterNode
from cluster.vast.errors import VastError
from cluster.vast.models import State

END_RAY = "ray stop > /dev/null 2>&1; python -m cluster.supervisor stop"
"""The autoscaler ends with Ray, so that nothing is rented any more, then the tunnels."""

END_RAY_S = 120.0


def pause(arguments: argparse.Namespace) -> int:
    """Stop jobs, Ray, tunnels and the head's machine, in this order, and destroy the workers."""
    session, out = Session.open(arguments.cluster_config), terminal.console()
    nodes = session.nodes()
    heads = [node for node in nodes if node.is_head]
    if heads and heads[0].instance.state is State.STOPPED:
        out.print(f"head {heads[0].id} is stopped already; {what_it_costs(heads[0])}")
        return 0
    shell = session.head_shell()
    working = submitting.working(session)
    unfetched(session, shell, RUNS, out)
    say(nodes, working, out)
    agree("Go on?", arguments.yes)
    for job in working:
        submitting.stop(session, job)
    end_for_good(session.folder / LAUNCHER_FOLDER)
    shell.run(END_RAY, timeout_s=END_RAY_S)
    try:
        left = session.provider.pause()
    except VastError as error:
        raise NodeError(
            f"the head could not be stopped ({error}): it still costs money, without Ray; repeat the command, or"
            " `bruno-ray cluster up --restart` goes on"
        ) from error
    if left:
        out.print(f"STILL BILLED: workers {', '.join(left)}; they end themselves, `status` shows it", style="bold red")
    [head] = [node for node in session.nodes() if node.is_head]
    out.print(f"head {head.id} is paused; {what_it_costs(head)}; `bruno-ray cluster up` goes on", highlight=False)
    return 1 if left else 0


def say(nodes: Sequence[ClusterNode], working: Sequence[str], out: Console) -> None:
    """What is about to happen."""
    head = next(node for node in nodes if node.is_head)
    workers = [node.id for node in nodes if not node.is_head]
    if working:
        out.print(f"stops the jobs {', '.join(working)}; their runs can be resumed", style="yellow")
    if workers:
        out.print(f"destroys the workers {', '.join(workers)}")
    out.print(f"stops head {head.id}, which keeps its disk; {what_it_costs(head)}", highlight=False)
    out.print(
        "While it is stopped others may rent its place, and then it cannot be started until they are done: fetch first"
        " what you cannot wait for.",
        style="yellow",
    )


def what_it_costs(head: ClusterNode) -> str:
    """Of a stopped head, and until when it is kept."""
    per_day = cost_per_day(head)
    price = "Vast.ai does not say what its disk costs" if per_day is None else f"its disk costs {per_day:.2f} $ a day"
    left = (head.instance.end_date or math.inf) - time.time()
    return price if left == math.inf else f"{price}, and its contract ends in {left / 86400:.1f} days"
