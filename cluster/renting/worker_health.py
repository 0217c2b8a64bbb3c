"""Which workers are lost, stuck or never join. The head destroys those and avoids the hosts of those that never joined.

Ray replaces what disappears, so all that is needed is to make it disappear, at a bounded cost.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from ray.autoscaler.tags import STATUS_UP_TO_DATE, STATUS_UPDATE_FAILED

from cluster.renting.ledger import Ledger
from cluster.renting.tags import ClusterNode
from cluster.settings import ClusterSettings
from cluster.vast.models import State

logger = logging.getLogger(__name__)

STOPPED_GRACE_S = 15.0
"""An outbid machine shows as stopped and does not come back by itself; one look could be a moment of a restart."""

UNREACHABLE_GRACE_S = 180.0
"""How long a host may be without a heartbeat. Its tunnels tell Ray much sooner what can be used."""


@dataclass
class _Observed:
    node: ClusterNode
    state: State
    since: float
    joined: bool = False
    """Was set up completely at some time."""


class WorkerHealth:
    """Remembers since when each worker is in its state; times are this process's, so clocks need not agree."""

    def __init__(self, settings: ClusterSettings, ledger: Ledger) -> None:
        self._settings = settings
        self._ledger = ledger
        self._workers: dict[str, _Observed] = {}

    def unfit(self, workers: Iterable[tuple[ClusterNode, str]], now: float) -> list[tuple[ClusterNode, str]]:
        """Workers to destroy, each with the reason. `workers` are all of them, each with Ray's status."""
        unfit, present = [], set()
        for node, status in workers:
            present.add(node.id)
            state = node.instance.state
            observed = self._workers.get(node.id)
            if observed is None or observed.state is not state:
                joined = observed is not None and observed.joined
                observed = self._workers[node.id] = _Observed(node, state, now, joined)
            observed.joined = observed.joined or status == STATUS_UP_TO_DATE
            if reason := self._reason(observed, now - observed.since):
                unfit.append((node, reason))
                del self._workers[node.id]
                if not observed.joined and state is not State.STOPPED:
                    self._avoid(node, reason)
        for name in self._workers.keys() - present:
            observed = self._workers.pop(name)
            if not observed.joined:
                self._avoid(observed.node, "it vanished before it had joined")
        return unfit

    def terminated(self, node: ClusterNode, status: str) -> None:
        """Ray gives `node` back, which is no fault of its host unless its set-up failed."""
        self._workers.pop(node.id, None)
        if status == STATUS_UPDATE_FAILED:
            self._avoid(node, "its set-up failed")

    def _reason(self, observed: _Observed, seconds: float) -> str | None:
        settings = self._settings
        if observed.state is State.STOPPED and seconds >= STOPPED_GRACE_S:
            return "it is stopped (outbid, or its host took it)"
        if observed.state is State.UNREACHABLE and seconds >= UNREACHABLE_GRACE_S:
            return f"its host has been silent for {seconds:.0f} s"
        if observed.state is State.BOOTING and seconds >= settings.boot_timeout_s:
            return f"it has not booted within {settings.boot_timeout_s:.0f} s"
        if observed.state is State.RUNNING and not observed.joined and seconds >= settings.join_timeout_s:
            return f"it has not joined within {settings.join_timeout_s:.0f} s of booting"
        return None

    def _avoid(self, node: ClusterNode, reason: str) -> None:
        hours = self._settings.avoid_machine_s / 3600
        logger.warning("machine %d is not rented again for %.1f h: %s", node.instance.machine_id, hours, reason)
        self._ledger.avoid(node.instance.machine_id, self._settings.avoid_machine_s)
