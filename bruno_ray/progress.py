"""No phase is silent: whatever takes longer than ten seconds says every ten seconds how far it has come."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

logger = logging.getLogger(__name__)

EVERY_S = 10.0

_open: list["Phase"] = []
"""The phases that are going on, each within the one before. Only the innermost speaks."""


class Phase:
    """One phase, while it goes on."""

    def __init__(self, what: str, status: Callable[[], str] | None):
        self._what = what
        self._status = status
        self._began = time.monotonic()
        self._spoke = self._began
        self._over = threading.Event()

    def spoke(self) -> None:
        """Something has just been said of this phase: the next line has time."""
        self._spoke = time.monotonic()

    def close(self) -> None:
        self._over.set()

    def speak(self) -> None:
        """The loop of the phase's thread."""
        while not self._over.wait(max(0.1, self._spoke + EVERY_S - time.monotonic())):
            if time.monotonic() - self._spoke < EVERY_S or _open[-1:] != [self]:
                continue
            self.spoke()
            status = self._status() if self._status else ""
            line = f"{self._what}: {duration(time.monotonic() - self._began)}" + (f"; {status}" if status else "")
            if not self._over.is_set():
                logger.info("%s", line)


@contextmanager
def phase(what: str, status: Callable[[], str] | None = None) -> Iterator[Phase]:
    """Log ``what`` with the time it takes and its status, every ten seconds until the block ends.

    ``status`` is called in another thread and must not raise.
    """
    current = Phase(what, status)
    _open.append(current)
    threading.Thread(target=current.speak, name=f"progress of {what}", daemon=True).start()
    try:
        yield current
    finally:
        current.close()
        _open.remove(current)
        for outer in _open:  # what it covers has not been silent
            outer.spoke()


def duration(seconds: float | None) -> str:
    """H:MM:SS; a question mark for what is not known."""
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))
