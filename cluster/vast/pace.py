"""Keeping to Vast.ai's documented rate limits, with every process of this machine that asks with the same key.

The limits are per endpoint and per key and address (`x-rate-limit` in Vast.ai's OpenAPI files), and autoscaler,
supervisor and commands of one machine share both. So turns are given out from a file. Whoever comes too early is
refused, and renting too early is refused for another 12 s each time: a turn is waited for, not tried.
"""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock

from bruno_ray.files import write_json
from cluster.clock import Clock

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 900.0
"""No refusal bars an endpoint for longer, whatever it says; a quota is an error of its own."""


@dataclass(frozen=True)
class Rate:
    """At most `requests` in `seconds`, which is a little longer than the documented time: requests arrive unevenly."""

    requests: int
    seconds: float
    penalty_s: float
    """How long to stay away after a refusal that does not say it."""


class Endpoint(Enum):
    """What has a limit of its own."""

    SEARCH = "search"
    CREATE = "create"
    DESTROY = "destroy"
    SHOW = "show"
    LIST = "list"
    CHANGE = "change"
    BID = "bid"
    OTHER = "other"
    """No limit is documented."""


RATES = {
    Endpoint.SEARCH: Rate(10, 61.0, 12.0),
    Endpoint.CREATE: Rate(1, 5.0, 12.5),
    Endpoint.DESTROY: Rate(1, 3.3, 3.5),
    Endpoint.SHOW: Rate(1, 2.2, 2.5),
    Endpoint.LIST: Rate(1, 1.2, 1.5),
    Endpoint.CHANGE: Rate(1, 1.2, 1.5),
    Endpoint.BID: Rate(1, 6.0, 6.0),
    Endpoint.OTHER: Rate(1, 0.0, 1.5),
}


@dataclass
class _Turns:
    """Of one endpoint; Unix seconds."""

    given: list[float] = field(default_factory=list)
    """The last turns, some of them still to come."""
    barred_until: float = 0.0


class TooSoonError(Exception):
    """The next turn comes after the deadline; nothing was asked."""


class Pace:
    """Thread-safe. Without a `folder` it only knows of this process."""

    def __init__(self, clock: Clock, folder: Path | None = None) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._own: dict[str, Any] = {}
        self._file: Path | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = folder / "pace.json"
            self._file_lock = FileLock(folder / "pace.lock")

    def wait(self, endpoint: Endpoint, deadline: float) -> None:
        """Return when it is our turn. Raises `TooSoonError` at once where that is after `deadline` (Unix seconds)."""
        rate, now = RATES[endpoint], self._clock.time()
        if not rate.seconds and endpoint is Endpoint.OTHER:
            return
        with self._turns(endpoint) as turns:
            turns.given = [turn for turn in turns.given if now - rate.seconds < turn < now + LONGEST_WAIT_S]
            turn = max(now, turns.barred_until)
            if len(turns.given) >= rate.requests:
                turn = max(turn, sorted(turns.given)[-rate.requests] + rate.seconds)
            if turn > max(deadline, now):
                raise TooSoonError(f"Vast.ai's limit for this kind of request leaves no turn for {turn - now:.0f} s")
            turns.given.append(turn)
        if turn > now:
            self._clock.sleep(turn - now)

    def refused(self, endpoint: Endpoint, wait_s: float | None) -> float:
        """The API said that we ask too often; returns the seconds for which nobody here asks again."""
        wait = RATES[endpoint].penalty_s if wait_s is None else max(wait_s, RATES[endpoint].penalty_s)
        wait = min(wait, LONGEST_WAIT_S)
        with self._turns(endpoint) as turns:
            turns.barred_until = max(turns.barred_until, self._clock.time() + wait)
        return wait

    @contextmanager
    def _turns(self, endpoint: Endpoint) -> Iterator[_Turns]:
        with self._lock:
            if self._file is None:
                yield self._own.setdefault(endpoint.value, _Turns())
                return
            with self._file_lock:
                content = self._read(self._file)
                turns = _Turns(**content.get(endpoint.value, {}))
                yield turns
                content[endpoint.value] = vars(turns)
                write_json(self._file, content, durable=False)

    @staticmethod
    def _read(file: Path) -> dict[str, Any]:
        try:
            return json.loads(file.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            logger.warning("%s cannot be read (%s) and is begun anew", file, error)
            return {}
