"""Pausing the head: its machine is stopped and keeps its disk, and is started again if its host still has room.

A stopped machine is billed for its disk, and its place may be taken by others. Vast.ai then refuses to start it, or
takes the order and leaves it waiting; one that waits would start, and cost, whenever there is room, so the order is
withdrawn.
"""

import logging
from dataclasses import replace

from cluster.clock import Clock
from cluster.errors import NodeError
from cluster.renting.cost import node_cost, storage_price
from cluster.renting.listing import NodeList
from cluster.renting.tags import ClusterNode, Label, Pause
from cluster.vast.client import VastClient
from cluster.vast.errors import VastError, VastRefusedError
from cluster.vast.models import State

logger = logging.getLogger(__name__)

STOP_S = 120.0
"""How long a machine may take until it is listed as stopped."""

START_S = 180.0
"""How long one may take until it runs again: its image is there. Vast.ai's own advice is to give up after 30 s."""

LOOK_S = 4.0
CHANGE_DEADLINE_S = 20.0
WITHDRAWAL_DEADLINE_S = 60.0


class Pausing:
    """Of one cluster, from the user's computer; Ray no longer runs on the head when it is stopped."""

    def __init__(self, client: VastClient, nodes: NodeList, clock: Clock) -> None:
        self._client = client
        self._nodes = nodes
        self._clock = clock

    def stop(self, head: ClusterNode) -> None:
        """Returns when the machine is stopped, and what it has cost until then is in its label. Raises `VastError`."""
        self._client.set_state(head.instance.id, "stopped", CHANGE_DEADLINE_S)
        now = self._clock.time()
        seconds = head.label.pause.seconds if head.label.pause else 0.0
        own = node_cost(head, now).so_far - head.traffic
        self._set_label(head, replace(head.label, pause=Pause(own, now, seconds, True)))
        if not self._wait_for(head, State.STOPPED, STOP_S):
            logger.warning("instance %s is not listed as stopped after %.0f s: look again soon", head.id, STOP_S)

    def start(self, head: ClusterNode) -> None:
        """Returns when the machine runs again. Raises `NodeError` where it does not, and then it stays stopped."""
        try:
            self._client.set_state(head.instance.id, "running", CHANGE_DEADLINE_S)
            runs = self._wait_for(head, State.RUNNING, START_S)
            reason = "" if runs else f"it does not run after {START_S:.0f} s"
        except VastError as error:
            reason = str(error)
        except BaseException:
            self._withdraw(head)
            raise
        if reason:
            self._withdraw(head)
            raise NodeError(
                f"head {head.id} cannot be started now ({reason}): as a rule others have its host's room; it is stopped"
                " and nothing was rented; try again later, or give it up with `bruno-ray cluster down --discard`"
            )
        if head.label.pause is not None and head.label.pause.paused:
            before, now = head.label.pause, self._clock.time()
            own = node_cost(head, now).so_far - head.traffic
            self._set_label(
                head, replace(head.label, pause=Pause(own, now, before.seconds + now - before.since, False))
            )

    def _withdraw(self, head: ClusterNode) -> None:
        """Take the order to start back. Raises `NodeError` where that fails: the machine may start by itself."""
        try:
            self._client.set_state(head.instance.id, "stopped", WITHDRAWAL_DEADLINE_S)
            self._nodes.relabelled()
        except VastError as error:
            if isinstance(error, VastRefusedError) and error.means_gone:
                return
            raise NodeError(
                f"head {head.id} may START BY ITSELF and cost: the order to start it could not be taken back ({error});"
                " repeat `bruno-ray cluster up`, or stop it in Vast.ai's console"
            ) from error

    def _wait_for(self, head: ClusterNode, state: State, seconds: float) -> bool:
        """Whether the machine is in `state` within so long."""
        deadline = self._clock.time() + seconds
        while True:
            try:
                found = self._client.instance(head.instance.id, CHANGE_DEADLINE_S)
            except VastError as error:
                logger.debug("instance %s could not be asked for: %s", head.id, error)
            else:
                if found is None:
                    raise NodeError(f"head {head.id} is gone; `bruno-ray cluster up` rents another")
                if found.state is state and (state is not State.RUNNING or found.ssh_endpoints):
                    return True
            if self._clock.time() + LOOK_S > deadline:
                return False
            self._clock.sleep(LOOK_S)

    def _set_label(self, head: ClusterNode, label: Label) -> None:
        """Where that fails the time of the pause counts as if it had run, which is too much."""
        try:
            self._client.set_label(head.instance.id, label.text(), WITHDRAWAL_DEADLINE_S)
        except VastError as error:
            logger.warning("the label of instance %s could not be set, the books count too much: %s", head.id, error)
        self._nodes.relabelled()


def cost_per_day(head: ClusterNode) -> float | None:
    """Dollars that a stopped machine costs; None where the API does not say what its disk costs."""
    return None if head.instance.storage_total_cost is None else 24 * storage_price(head.instance)
