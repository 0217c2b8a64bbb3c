"""Noticing that machines are asked for again and again, and none can be had."""

import threading

from cluster.clock import Clock
from cluster.errors import BudgetError, ClusterError
from cluster.notices.notices import Notices

DROUGHT_S = 600.0
"""How long in vain before somebody is told."""

ASKED_AGAIN_S = 120.0
"""The autoscaler asks every few seconds for what a job needs; after so long without a question nothing is needed."""


class Drought:
    """Of the workers of one cluster, whatever their type. Thread-safe; Unix seconds."""

    def __init__(self, clock: Clock, notices: Notices) -> None:
        self._clock = clock
        self._notices = notices
        self._lock = threading.Lock()
        self._since: float | None = None
        self._last = 0.0

    def refused(self, error: ClusterError, has_workers: bool) -> None:
        """A machine could not be had. That the budget allows no more beside those that work is as it should be."""
        if has_workers and isinstance(error, BudgetError):
            return
        with self._lock:
            now = self._clock.time()
            if self._since is None or now > self._last + ASKED_AGAIN_S:
                self._since = now
            self._last = now
            seconds = now - self._since
        if seconds >= DROUGHT_S:
            self._notices.tell("nothing-to-rent", f"no machine could be rented for {seconds / 60:.0f} minutes: {error}")

    def over(self) -> None:
        """A machine was rented."""
        with self._lock:
            self._since = None
        self._notices.arm("nothing-to-rent")
