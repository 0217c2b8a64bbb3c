"""No phase is silent: when nothing has been said for ten seconds, the phase that is going on says how far it is."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

logger = logging.getLogger(__name__)

EVERY_S = 10.0

PACKAGE = "bruno_ray"

_open: list["Phase"] = []
"""The phases that are going on, each within the one before. Only the innermost speaks."""


class _Ear(logging.Handler):
    """Knows when the package's loggers, or a phase, have last said something. Silence is of the whole program: a phase
    that begins, or ends, does not start the ten seconds anew."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.heard = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self.heard = time.monotonic()


_ear = _Ear()


def listen() -> None:
    """Let what the package's loggers say count as said. For programs that have set up where log lines go: a logger with
    a handler is none of those whose warnings Python prints by itself."""
    logging.getLogger(PACKAGE).addHandler(_ear)  # a handler that is there already is not added again


class Phase:
    """One phase, while it goes on."""

    def __init__(self, what: str, status: Callable[[], str] | None):
        self._what = what
        self._status = status
        self._began = time.monotonic()
        self._over = threading.Event()

    def close(self) -> None:
        self._over.set()

    def speak(self) -> None:
        """The loop of the phase's thread."""
        while not self._over.wait(max(0.1, _ear.heard + EVERY_S - time.monotonic())):
            if time.monotonic() - _ear.heard < EVERY_S or _open[-1:] != [self]:
                continue
            _ear.heard = time.monotonic()
            status = self._status() if self._status else ""
            line = f"{self._what}: {duration(time.monotonic() - self._began)}" + (f"; {status}" if status else "")
            if not self._over.is_set():
                logger.info("%s", line)


@contextmanager
def phase(what: str, status: Callable[[], str] | None = None) -> Iterator[Phase]:
    """Log ``what`` with the time it takes and its status, until the block ends, when nothing was said for ten seconds.

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


def duration(seconds: float | None) -> str:
    """H:MM:SS; a question mark for what is not known."""
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))
