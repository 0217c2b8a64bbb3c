"""Which nodes exist: the API's list, merged with what this process did and the API does not show yet.

One listing answers all questions for a few seconds. Between what we do and what the list shows there is a delay, so

* a node we created is known from the moment the creation is answered, until the list shows it;
* a node that is missing from the list is gone only when the API, asked for it alone, does not know it;
* an instance that must go is doomed: destroyed, hidden once that is confirmed, and destroyed again if it comes back;
* a creation whose answer was lost is doubtful: if its launch mark turns up in the list later, the instance is doomed.
"""

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.clock import Clock
from cluster.renting.tags import ClusterNode, node_of
from cluster.vast.client import VastClient
from cluster.vast.errors import VastError, VastUnavailableError
from cluster.vast.models import Instance

logger = logging.getLogger(__name__)

STALE_LIMIT_S = 600.0
"""How long an outage of the API is bridged with the last list; afterwards asking is an error."""

LIST_DEADLINE_S = 20.0
CONFIRM_DEADLINE_S = 5.0
DESTROY_DEADLINE_S = 10.0
RETRY_S = 10.0
"""Between attempts to ask again, to destroy again, and to look up a creation that the list does not show."""

LISTING_LAG_S = 60.0
"""How long the list may lag behind creations and destructions without anything being done about it."""

REMEMBERED_S = 900.0
"""How long doomed instances and doubtful launches are looked out for."""


@dataclass
class _Created:
    node: ClusterNode
    check_at: float


@dataclass
class _Doomed:
    price: float
    since: float
    retry_at: float
    confirmed: bool = False


class NodeList:
    """Thread-safe. Network calls are made without holding the lock of the state."""

    def __init__(self, client: VastClient, cluster_name: str, clock: Clock, refresh_s: float) -> None:
        self._client = client
        self._cluster = cluster_name
        self._clock = clock
        self._refresh_s = refresh_s
        self._refreshing = threading.Lock()
        self._lock = threading.RLock()
        self._listed: dict[str, ClusterNode] = {}
        self._created: dict[str, _Created] = {}
        self._expected: set[str] = set()
        """Contracts of an earlier process of which it is not known that they ended."""
        self._doomed: dict[str, _Doomed] = {}
        self._doubtful: dict[str, float] = {}
        """Mark of the launch to the time until which it is looked out for."""
        self._answered: float | None = None
        """When the last list was had."""
        self._asked: float | None = None
        self.version = 0
        """Grows whenever the nodes may have changed."""
        self._error: VastError | None = None
        """Why the last attempt to list failed."""

    @property
    def is_stale(self) -> bool:
        """Whether the last attempt to list failed."""
        return self._error is not None

    def nodes(self, *, force: bool = False) -> dict[str, ClusterNode]:
        """All nodes of the cluster by id, including those of which the API has not confirmed the end.

        Raises `VastError` where the API could not be asked and no list of the last minutes is at hand.
        """
        if force:
            with self._refreshing:
                self._refresh()
            if self._error is not None:
                raise VastUnavailableError(str(self._error)) from self._error
        # One thread asks; the others make do with the list at hand, if there is one.
        elif self._is_due() and self._refreshing.acquire(blocking=self._answered is None):
            try:
                if self._is_due():
                    self._refresh()
            finally:
                self._refreshing.release()
        if self._error is not None and not self._is_bridged():
            raise VastUnavailableError(str(self._error)) from self._error
        return self._view()

    def expect(self, contracts: Iterable[str]) -> None:
        """These existed when an earlier process last looked: the list must show them, or the API not know them."""
        with self._lock:
            self._expected.update(contracts)

    def unaccounted(self) -> list[str]:
        """Contracts of an earlier process that the list did not show and that could not be asked for one by one."""
        with self._lock:
            return sorted(self._expected)

    def created(self, node: ClusterNode) -> None:
        """A creation was answered."""
        with self._lock:
            self._created[node.id] = _Created(node, self._clock.time() + LISTING_LAG_S)
            self.version += 1

    def doubt(self, launch: str) -> None:
        """A creation with this mark may have happened; it is not wanted any more."""
        with self._lock:
            self._doubtful[launch] = self._clock.time() + REMEMBERED_S

    def doom(self, node_id: str, price: float) -> bool:
        """Destroy an instance of ours, now or as soon as it can be; True when it is confirmed."""
        now = self._clock.time()
        with self._lock:
            self._doomed.setdefault(node_id, _Doomed(price, now, now))
        return self._destroy(node_id)

    def unconfirmed_price(self) -> float:
        """Dollars per hour of instances that must go, are not known to be gone and are not among the nodes."""
        with self._lock:
            known = self._view()
            return sum(
                doomed.price for name, doomed in self._doomed.items() if not doomed.confirmed and name not in known
            )

    def listed_launches(self) -> set[str]:
        """Marks of the launches that the API's own list shows."""
        with self._lock:
            return {node.launch for node in self._listed.values() if node.launch}

    def _is_due(self) -> bool:
        if self._asked is None:
            return True
        return self._clock.time() >= self._asked + (RETRY_S if self.is_stale else self._refresh_s)

    def _view(self) -> dict[str, ClusterNode]:
        with self._lock:
            nodes = {name: created.node for name, created in self._created.items()} | self._listed
            return {
                name: node
                for name, node in sorted(nodes.items(), key=lambda item: item[1].instance.id)
                if not (name in self._doomed and self._doomed[name].confirmed)
            }

    def _is_bridged(self) -> bool:
        return self._answered is not None and self._clock.time() - self._answered < STALE_LIMIT_S

    def _refresh(self) -> None:
        begun = self._clock.time()
        try:
            instances = {str(instance.id): instance for instance in self._client.instances(LIST_DEADLINE_S)}
        except VastError as error:
            with self._lock:
                self._asked, self._error = self._clock.time(), error
            logger.warning("the list of instances could not be had: %s", error)
            return
        missing = self._missing(instances)
        with self._lock:
            ours = {name: node_of(instance, self._cluster) for name, instance in (instances | missing).items()}
            self._listed = {name: node for name, node in ours.items() if node is not None}
            for name in ours.keys() & self._created.keys():
                del self._created[name]
            self._asked = self._answered = self._clock.time()
            self._error = None
            self.version += 1
        self._find_unwanted()
        self._clear_away(instances, begun)

    def _missing(self, instances: dict[str, Instance]) -> dict[str, Instance]:
        """Nodes that the list lacks although they exist; those that do not are forgotten."""
        now = self._clock.time()
        with self._lock:
            self._expected -= instances.keys()
            vanished = {
                name
                for name in self._listed.keys() | self._expected
                if name not in instances and not self._is_gone(name)
            }
            overdue = {
                name for name, created in self._created.items() if name not in instances and created.check_at <= now
            }
        found = {}
        for name in vanished | overdue:
            try:
                instance = self._client.instance(int(name), CONFIRM_DEADLINE_S)
            except VastError as error:
                logger.warning("instance %s is not listed and could not be asked for: %s", name, error)
                instance = self._listed[name].instance if name in self._listed else None
                with self._lock:
                    if name in self._created:
                        self._created[name].check_at = now + RETRY_S
            else:
                with self._lock:
                    self._expected.discard(name)
                    if instance is None:
                        self._created.pop(name, None)
            if instance is not None:
                found[name] = instance
        return found

    def _is_gone(self, name: str) -> bool:
        return name in self._doomed and self._doomed[name].confirmed

    def _find_unwanted(self) -> None:
        """Doom what lost creations have left behind."""
        with self._lock:
            unwanted = [node for node in self._listed.values() if node.launch and node.launch in self._doubtful]
        for node in unwanted:
            logger.warning("instance %s comes from a creation whose answer was lost: destroying it", node.id)
            self.doom(node.id, node.instance.dph_total)
            with self._lock:
                self._doubtful.pop(node.launch, None)

    def _clear_away(self, instances: dict[str, Instance], begun: float) -> None:
        """Destroy again what should be gone, and forget what is."""
        now = self._clock.time()
        with self._lock:
            for launch in [launch for launch, until in self._doubtful.items() if until <= now]:
                del self._doubtful[launch]
            again = []
            for name, doomed in list(self._doomed.items()):
                if name in instances and node_of(instances[name], self._cluster) is None:
                    logger.warning("instance %s no longer carries this cluster's label and is left alone", name)
                    del self._doomed[name]
                elif doomed.confirmed and name not in instances:
                    if now > doomed.since + REMEMBERED_S:
                        del self._doomed[name]
                elif now >= doomed.retry_at and begun >= doomed.since:
                    again.append(name)
        for name in again:
            self._destroy(name)

    def _destroy(self, name: str) -> bool:
        try:
            self._client.destroy_instance(int(name), DESTROY_DEADLINE_S)
        except VastError as error:
            logger.error("instance %s could not be destroyed and is still billed; tried again soon: %s", name, error)
            confirmed, retry = False, RETRY_S
        else:
            confirmed, retry = True, LISTING_LAG_S
        with self._lock:
            if doomed := self._doomed.get(name):
                doomed.confirmed, doomed.retry_at = confirmed, self._clock.time() + retry
                if confirmed:
                    self._created.pop(name, None)
                    self.version += 1
        return confirmed
