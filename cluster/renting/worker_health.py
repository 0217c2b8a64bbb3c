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

END_MARGIN_S = 1800.0
"""How long before the end of its contract a worker is replaced: afterwards it is stopped, whatever it does."""

IMAGE_FAULT_S = 600.0
"""How long nothing is rented after a host has said that the image does not exist, or one published ports of its own."""


@dataclass
class _Observed:
    node: ClusterNode
    state: State
    since: float
    joined: bool = False
    """Was set up completely at some time."""
    ran: bool = False
    """Was seen running."""


class WorkerHealth:
    """Remembers since when each worker is in its state; times are this process's, so clocks need not agree."""

    def __init__(self, settings: ClusterSettings, ledger: Ledger) -> None:
        self._settings = settings
        self._ledger = ledger
        self._workers: dict[str, _Observed] = {}
        self._image_fault: tuple[float, str] = (0.0, "")

    def unfit(self, workers: Iterable[tuple[ClusterNode, str]], now: float) -> list[tuple[ClusterNode, str]]:
        """Workers to destroy, each with the reason. `workers` are all of them, each with Ray's status."""
        unfit, present = [], set()
        for node, status in workers:
            present.add(node.id)
            state = node.instance.state
            observed = self._workers.get(node.id)
            if observed is None or observed.state is not state:
                joined = observed is not None and observed.joined
                ran = observed is not None and observed.ran
                observed = self._workers[node.id] = _Observed(node, state, now, joined, ran)
            observed.node = node
            observed.joined = observed.joined or status == STATUS_UP_TO_DATE
            observed.ran = observed.ran or state is State.RUNNING
            if reason := self._reason(observed, now):
                unfit.append((node, reason))
                del self._workers[node.id]
                self._blame(observed, reason, now)
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

    def image_fault(self, now: float) -> str:
        """Why it is no use to rent another machine for the same image now; empty where it is."""
        until, fault = self._image_fault
        return fault if now < until else ""

    def _reason(self, observed: _Observed, now: float) -> str | None:
        settings, instance, seconds = self._settings, observed.node.instance, now - observed.since
        if not (observed.joined or observed.ran) and instance.boot_error:
            return f"it will never run: {instance.boot_error}"
        if extra := foreign_ports(observed.node, settings):
            return extra
        if observed.state is State.STOPPED and seconds >= STOPPED_GRACE_S:
            return "it is stopped (outbid, or its host took it)"
        if observed.state is State.UNREACHABLE and seconds >= UNREACHABLE_GRACE_S:
            return f"its host has been silent for {seconds:.0f} s"
        if observed.state is State.BOOTING and seconds >= settings.boot_timeout_s:
            return f"it has not booted within {settings.boot_timeout_s:.0f} s"
        if observed.state is State.RUNNING and not observed.joined and seconds >= settings.join_timeout_s:
            return f"it has not joined within {settings.join_timeout_s:.0f} s of booting"
        if instance.end_date is not None and now >= instance.end_date - END_MARGIN_S:
            return f"its contract ends in {max(instance.end_date - now, 0) / 60:.0f} minutes"
        return None

    def _blame(self, observed: _Observed, reason: str, now: float) -> None:
        """Remember whose fault it was: the machine's, the image's, or nobody's."""
        instance = observed.node.instance
        if foreign_ports(observed.node, self._settings) or (not observed.joined and instance.is_image_error):
            self._image_fault = now + IMAGE_FAULT_S, f"the image of instance {observed.node.id} is no use: {reason}"
        elif not observed.joined and (observed.state is not State.STOPPED or instance.boot_error):
            self._avoid(observed.node, reason)

    def _avoid(self, node: ClusterNode, reason: str) -> None:
        if not node.instance.machine_id:
            return
        hours = self._settings.avoid_machine_s / 3600
        logger.warning("machine %d is not rented again for %.1f h: %s", node.instance.machine_id, hours, reason)
        self._ledger.avoid(node.instance.machine_id, self._settings.avoid_machine_s)


def foreign_ports(node: ClusterNode, settings: ClusterSettings) -> str:
    """What is wrong with the ports that the internet reaches on a node; empty where nothing is."""
    extra = sorted(node.instance.published_ports - set(settings.allowed_ports))
    if node.instance.state is not State.RUNNING or not extra:
        return ""
    return (
        f"it publishes {', '.join(extra)}, where Ray's own services listen: take an image that EXPOSEs nothing, or add"
        " what may be reached to provider.allowed_ports"
    )
