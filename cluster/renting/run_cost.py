"""What runs cost: all machines of the cluster while a run was there, noted in its folder for the report.

Of two runs at once each is charged with everything.
"""

import logging
import math
from pathlib import Path

from bruno_ray.errors import OutputError
from bruno_ray.runs.directory import RUN_FILE, RunDirectory
from bruno_ray.runs.records import CostRecord
from cluster.clock import Clock
from cluster.notices.runs import is_running
from cluster.renting.ledger import Ledger

logger = logging.getLogger(__name__)

WRITE_S = 60.0
"""Between two notes of a run that is under way."""


def run_cost(run: RunDirectory, ledger: Ledger, running: bool, now: float) -> CostRecord:
    """From the run's first file to its last, or to Unix time `now` while it is `running`."""
    files = [path for path in run.path.rglob("*") if path.is_file() and path != run.cost_file]
    times = [path.stat().st_mtime for path in files]
    end = now if running else max(times)
    return CostRecord(dollars=ledger.cost_between(min(times), end), until=end, ended=not running)


class CostWriter:
    """Notes the cost of each run that is under way, and once more when it has ended."""

    def __init__(self, runs: Path, ledger: Ledger, clock: Clock) -> None:
        self._runs = runs
        self._ledger = ledger
        self._clock = clock
        self._written: dict[Path, float] = {}
        """Of the runs that are under way, Unix seconds."""

    def look(self) -> None:
        for file in self._runs.glob(f"*/{RUN_FILE}"):
            run, now = RunDirectory(file.parent), self._clock.time()
            try:
                running = is_running(run)
                if running and now >= self._written.get(run.path, -math.inf) + WRITE_S:
                    self._written[run.path] = now
                    run.save_cost(run_cost(run, self._ledger, running, now))
                elif not running and self._written.pop(run.path, None) is not None:
                    run.save_cost(run_cost(run, self._ledger, running, now))
            except (OSError, OutputError) as error:  # a file that has just gone, a disk that is full
                logger.debug("the cost of run %s could not be noted: %s", run.name, error)
