"""What a running study shows: a live view on a terminal, plain log lines anywhere else.

Both are drawn from a ``Snapshot``, so what is shown can be tested without a terminal or a study.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bruno_ray.files import size_text
from bruno_ray.progress import duration, phase
from bruno_ray.study.selection import TrialRecord
from bruno_ray.study.tables import front_lines, front_table, metric_text
from bruno_ray.workers.worker_actor import BUSY, WorkerState

logger = logging.getLogger(__name__)

FRONT_ROWS = 8
"""Rows of the front in the live view; the whole front is printed at the end."""


@dataclass(frozen=True)
class Snapshot:
    """A study at one moment."""

    name: str
    objectives: tuple[str, ...]
    target: int
    complete: int
    running: int
    failed: int
    elapsed: float
    """Seconds since this driver started."""

    remaining: float | None
    """Estimated seconds to go; None before the first batch is back."""

    memory: int
    """Resident bytes of the driver."""

    front: tuple[TrialRecord, ...] = ()
    workers: tuple[WorkerState, ...] = ()
    note: str = ""
    pruned: int = 0
    """Of the complete ones."""


def counts_of_states(workers: Sequence[WorkerState]) -> str:
    states = dict.fromkeys(worker.state for worker in workers)
    return ", ".join(f"{sum(worker.state == state for worker in workers)} {state}" for state in states)


def status_line(snapshot: Snapshot) -> str:
    """The study in one plain line, for logs."""
    parts = [f"trials {snapshot.complete}/{snapshot.target}"]
    if snapshot.pruned:
        parts.append(f"{snapshot.pruned} of them pruned")
    if snapshot.running:
        parts.append(f"{snapshot.running} running")
    if snapshot.failed:
        parts.append(f"{snapshot.failed} failed")
    if snapshot.front:
        best = snapshot.front[0]
        scores = ", ".join(f"{name} {metric_text(best, name)}" for name in snapshot.objectives)
        parts.append(f"lowest {scores} (trial {best.number})")
    parts.append(f"elapsed {duration(snapshot.elapsed)}, to go {duration(snapshot.remaining)}")
    memory = snapshot.memory + sum(worker.memory for worker in snapshot.workers)
    parts.append(f"memory {size_text(memory)}")
    if snapshot.workers:
        parts.append(f"workers: {counts_of_states(snapshot.workers)}")
        parts += [worker.doing for worker in snapshot.workers[:1] if worker.doing]
    if snapshot.note:
        parts.append(snapshot.note)
    return "; ".join(parts)


def render(snapshot: Snapshot) -> RenderableType:
    """The live view."""
    head = Table.grid(padding=(0, 2))
    head.add_row(
        Text(f"{snapshot.complete}/{snapshot.target} trials", style="bold"),
        ProgressBar(total=snapshot.target, completed=snapshot.complete, width=30),
        f"{snapshot.running} running, {snapshot.failed} failed"
        + (f", {snapshot.pruned} pruned" if snapshot.pruned else ""),
        f"elapsed {duration(snapshot.elapsed)}",
        f"to go {duration(snapshot.remaining)}",
        f"driver {size_text(snapshot.memory)}",
    )
    rows: list[RenderableType] = [head]
    if snapshot.front:
        shown = snapshot.front[:FRONT_ROWS]
        more = len(snapshot.front) - len(shown)
        title = f"Pareto front ({len(shown)} of {len(snapshot.front)})" if more else "Pareto front"
        rows.append(front_table(shown, snapshot.objectives, title, one_line=True))
    if snapshot.workers:
        rows.append(worker_table(snapshot.workers))
    if snapshot.note:
        rows.append(Text(snapshot.note, style="yellow"))
    return Panel(Group(*rows), title=snapshot.name, title_align="left")


def worker_table(workers: Sequence[WorkerState]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("worker", "state", "doing", "where", "memory", "GPU memory", "batches", "lost"):
        table.add_column(name)
    for worker in workers:
        table.add_row(
            worker.name,
            worker.state,
            worker.doing if worker.state == BUSY else "",
            f"{worker.host}:{worker.pid}" if worker.pid else "",
            size_text(worker.memory) if worker.memory else "",
            size_text(worker.gpu_memory) if worker.gpu_memory else "",
            str(worker.calls),
            str(worker.losses or ""),
        )
    return table


class LogView:
    """A line per batch that has come back, one now and then in between, and the front at the end."""

    def __init__(self, source: Callable[[], Snapshot]):
        self._source = source
        self._between = ExitStack()

    def __enter__(self) -> "LogView":
        self._between.enter_context(phase("searching", lambda: status_line(self._source())))
        return self

    def batch(self) -> None:
        logger.info("%s", status_line(self._source()))

    def __exit__(self, *_: Any) -> None:
        self._between.close()
        snapshot = self._source()
        if snapshot.front:
            logger.info("Pareto front:")
            for line in front_lines(snapshot.front, snapshot.objectives):
                logger.info("%s", line)


class LiveView:
    """Redraws in place twice a second, from a thread of its own; prints the front at the end."""

    def __init__(self, source: Callable[[], Snapshot], console: Console):
        self._source = source
        self._console = console
        self._live = Live(
            get_renderable=lambda: render(source()), console=console, refresh_per_second=2, transient=True
        )

    def __enter__(self) -> "LiveView":
        self._live.start()
        return self

    def batch(self) -> None:
        """The next redraw shows it."""

    def __exit__(self, *_: Any) -> None:
        self._live.stop()
        snapshot = self._source()
        self._console.print(status_line(snapshot))
        if snapshot.front:
            self._console.print(front_table(snapshot.front, snapshot.objectives))


def make_view(source: Callable[[], Snapshot]) -> LogView | LiveView:
    """The live view when stdout is a terminal, log lines otherwise."""
    return LiveView(source, Console()) if sys.stdout.isatty() else LogView(source)
