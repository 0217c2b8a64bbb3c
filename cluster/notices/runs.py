"""Which runs of a head are under way, and which have ended since the last look.

A run is under way while its driver holds a lock, which the kernel takes from a driver that is killed.
"""

import fcntl
import logging
from pathlib import Path

from bruno_ray.errors import OutputError
from bruno_ray.runs.directory import RUN_FILE, RunDirectory
from cluster.notices.notices import Notices

logger = logging.getLogger(__name__)

RUNS = Path("~/runs").expanduser()
"""Where jobs of `bruno-ray cluster submit` write."""

DRIVER_LOCK = ".driver.lock"


def is_running(run: RunDirectory) -> bool:
    """Whether a living driver holds the study. Several may look at once."""
    try:
        with open(run.path / DRIVER_LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class RunWatch:
    """Tells of runs that end. One that ended before the first look is not told of."""

    def __init__(self, runs: Path, notices: Notices) -> None:
        self._runs = runs
        self._notices = notices
        self._running: set[Path] = set()

    def look(self) -> None:
        """Compare with the last look. A file that cannot be read now is read at the next."""
        for file in self._runs.glob(f"*/{RUN_FILE}"):
            run = RunDirectory(file.parent)
            try:
                running = is_running(run)
            except OSError as error:
                logger.debug("whether %s runs could not be looked at: %s", run.path, error)
                continue
            if running:
                self._running.add(run.path)
                self._notices.arm("run-ended", run.name)
            elif run.path in self._running:
                self._running.discard(run.path)
                self._notices.tell("run-ended", f"run {run.name} has ended: {outcome(run)}", run.name)


def outcome(run: RunDirectory) -> str:
    """In a few words."""
    try:
        record = run.read()
    except OutputError as error:
        return f"its record cannot be read ({error})"
    complete = record.n_trials.get("COMPLETE", 0)
    if record.selected is None:
        return f"{complete} trials are complete, none is selected"
    saved = "its model is saved" if record.selected.saved_path else "its model is not saved"
    return f"{complete} trials are complete, trial {record.selected.number} is selected, {saved}"
