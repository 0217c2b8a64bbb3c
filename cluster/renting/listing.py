"""Which nodes exist: the API's list, merged with what this process did and the API does not show yet.

One listing answers all questions for a few seconds. Between what we do and what the list shows there is a delay, so

* a node we created is known from the moment the creation is answered, before the list shows it;
* a node that is missing from the list is gone only when the API, asked for it alone, does not know it;
* an instance that must go is marked for destruction: destroyed, hidden once the API has confirmed that, and destroyed
  again if it comes back;
* a creation whose answer was lost is an unconfirmed launch: if its mark turns up in the list later, the instance is
  marked for destruction.

Who remembers what about a machine is a table in cluster/renting/registry.py.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.clock import Clock
from cluster.renting.polling import InstanceList
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
"""How long destroyed instances and unconfirmed launches are watched for in the list."""


@dataclass
class _Known:
    """A node that exists as far as is known."""

    node: ClusterNode
    ask_at: float | None = None
    """None for a node that the API has shown. For one we created, when to ask for it alone, Unix seconds."""

    @property
    def is_shown(self) -> bool:
        return self.ask_at is None


@dataclass
class _Destruction:
    """An instance that must go. Dollars per hour and Unix seconds."""

    price: float
    since: float
    retry_at: float
    confirmed: bool = False
    """The API has accepted it; the list may go on showing the instance for a while."""


class NodeList:
    """Thread-safe. Network calls are made without holding the lock of the state."""

    def __init__(
        self, client: VastClient, instances: InstanceList, cluster_name: str, clock: Clock, refresh_s: float
    ) -> None:
        self._client = client
        self._instances = instances
        self._cluster = cluster_name
        self._clock = clock
        self._refresh_s = refresh_s
        self._refreshing = threading.Lock()
        self._lock = threading.RLock()
        self._known: dict[str, _Known] = {}
        self._inherited: set[str] = set()
        """Contracts of an earlier process of which it is not known whether they ended."""
        self._dearest: dict[str, float] = {}
        """The highest price of each contract that was seen when it was not stopped, dollars per hour."""
        self._destructions: dict[str, _Destruction] = {}
        self._unconfirmed_launches: dict[str, float] = {}
        """Mark of the launch to the time until which the list is searched for it."""
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
                self._refresh(force=True)
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

    def expect(self, contracts: Mapping[str, float]) -> None:
        """These existed when an earlier process last looked: the list must show them, or the API not know them.

        With their prices in dollars per hour, 0 where the whole price was never seen.
        """
        with self._lock:
            self._inherited.update(contracts)
            self._dearest.update({name: price for name, price in contracts.items() if price})

    def unaccounted(self) -> list[str]:
        """Contracts of an earlier process that the list did not show and that could not be asked for one by one."""
        with self._lock:
            return sorted(self._inherited)

    def unpriced(self) -> list[str]:
        """Nodes that may start again at a price that is not known: they were stopped whenever they were seen."""
        with self._lock:
            return [
                node.id for node in self._view().values() if node.is_stopped_by_host and node.id not in self._dearest
            ]

    def created(self, node: ClusterNode) -> None:
        """A creation was answered."""
        self._instances.outdate()
        with self._lock:
            self._known.setdefault(node.id, _Known(node, self._clock.time() + LISTING_LAG_S))
            self._dearest.setdefault(node.id, node.instance.dph_total)
            self.version += 1

    def relabelled(self) -> None:
        """A label was changed, which other processes read."""
        self._instances.outdate()

    def unconfirmed_launch(self, launch: str) -> None:
        """A creation with this mark may have happened; its instance is destroyed if it is ever listed."""
        with self._lock:
            self._unconfirmed_launches[launch] = self._clock.time() + REMEMBERED_S

    def mark_for_destruction(self, node_id: str, price: float) -> bool:
        """Destroy an instance of ours now, or keep trying with every refresh; True when the API has confirmed it."""
        now = self._clock.time()
        with self._lock:
            self._destructions.setdefault(node_id, _Destruction(price, now, now))
        return self._destroy(node_id)

    def unconfirmed_price(self) -> float:
        """Dollars per hour of instances that must go, are not known to be gone and are not among the nodes."""
        with self._lock:
            nodes = self._view()
            return sum(
                destruction.price
                for name, destruction in self._destructions.items()
                if not destruction.confirmed and name not in nodes
            )

    def listed_launches(self) -> set[str]:
        """Marks of the launches that the API's own list shows."""
        with self._lock:
            return {known.node.launch for known in self._known.values() if known.is_shown and known.node.launch}

    def _is_due(self) -> bool:
        if self._asked is None:
            return True
        return self._clock.time() >= self._asked + (RETRY_S if self.is_stale else self._refresh_s)

    def _view(self) -> dict[str, ClusterNode]:
        with self._lock:
            by_age = sorted(self._known.values(), key=lambda known: known.node.instance.id)
            return {known.node.id: known.node for known in by_age if not self._is_destroyed(known.node.id)}

    def _is_bridged(self) -> bool:
        return self._answered is not None and self._clock.time() - self._answered < STALE_LIMIT_S

    def _refresh(self, *, force: bool = False) -> None:
        try:
            listed, begun = self._instances.get(LIST_DEADLINE_S, force=force)
            instances = {str(instance.id): instance for instance in listed}
        except VastError as error:
            with self._lock:
                self._asked, self._error = self._clock.time(), error
            logger.warning("the list of instances could not be had: %s", error)
            return
        missing = self._missing(instances)
        with self._lock:
            rows = {name: self._priced(instance) for name, instance in (instances | missing).items()}
            ours = {name: node_of(instance, self._cluster) for name, instance in rows.items()}
            unshown = {name: known for name, known in self._known.items() if not known.is_shown and name not in ours}
            self._known = unshown | {name: _Known(node) for name, node in ours.items() if node is not None}
            self._asked = self._answered = self._clock.time()
            self._error = None
            self.version += 1
        self._find_unwanted()
        self._clear_away(instances, begun)

    def _priced(self, instance: Instance) -> Instance:
        """With the price that it had, where the row says none or less: a machine that its host has stopped may be
        listed at the price of its disk, and starts again when it likes. One that we paused does not."""
        node = node_of(instance, self._cluster)
        if node is None or (node.is_paused and instance.dph_total):
            return instance
        with self._lock:
            dearest = max(instance.dph_total, self._dearest.get(node.id, 0.0))
            if not node.is_stopped_by_host:
                self._dearest[node.id] = dearest
        return instance.model_copy(update={"dph_total": dearest})

    def _missing(self, instances: dict[str, Instance]) -> dict[str, Instance]:
        """Nodes that the list lacks although they exist; those that do not are forgotten."""
        now = self._clock.time()
        with self._lock:
            self._inherited -= instances.keys()
            due = {name for name, known in self._known.items() if known.ask_at is None or known.ask_at <= now}
            asked = {name for name in (due | self._inherited) - instances.keys() if not self._is_destroyed(name)}
        found = {}
        for name in asked:
            try:
                instance = self._client.instance(int(name), CONFIRM_DEADLINE_S)
            except VastError as error:
                logger.warning("instance %s is not listed and could not be asked for: %s", name, error)
                instance = self._unconfirmed(name)
            else:
                with self._lock:
                    self._inherited.discard(name)
                    if instance is None:
                        self._forget_unshown(name)
            if instance is not None:
                found[name] = instance
        return found

    def _unconfirmed(self, name: str) -> Instance | None:
        """What counts for a node that is not listed and cannot be asked for: one that was shown is still there."""
        with self._lock:
            known = self._known.get(name)
            if known is not None and not known.is_shown:
                known.ask_at = self._clock.time() + RETRY_S
            return known.node.instance if known is not None and known.is_shown else None

    def _forget_unshown(self, name: str) -> None:
        """Forget a node that we created and the API has never shown."""
        if name in self._known and not self._known[name].is_shown:
            del self._known[name]

    def _is_destroyed(self, name: str) -> bool:
        return name in self._destructions and self._destructions[name].confirmed

    def _find_unwanted(self) -> None:
        """Mark for destruction what unconfirmed launches have left behind."""
        with self._lock:
            shown = [known.node for known in self._known.values() if known.is_shown]
            unwanted = [node for node in shown if node.launch in self._unconfirmed_launches]
        for node in unwanted:
            logger.warning("instance %s comes from a creation whose answer was lost: destroying it", node.id)
            self.mark_for_destruction(node.id, node.instance.dph_total)
            with self._lock:
                self._unconfirmed_launches.pop(node.launch, None)

    def _clear_away(self, instances: dict[str, Instance], begun: float) -> None:
        """Destroy again what should be gone, and forget what is."""
        now = self._clock.time()
        with self._lock:
            for launch in [launch for launch, until in self._unconfirmed_launches.items() if until <= now]:
                del self._unconfirmed_launches[launch]
            again = []
            for name, destruction in list(self._destructions.items()):
                if name in instances and node_of(instances[name], self._cluster) is None:
                    logger.warning("instance %s no longer carries this cluster's label and is left alone", name)
                    del self._destructions[name]
                elif destruction.confirmed and name not in instances:
                    if now > destruction.since + REMEMBERED_S:
                        del self._destructions[name]
                elif now >= destruction.retry_at and begun >= destruction.since:
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
            self._instances.outdate()
        with self._lock:
            if destruction := self._destructions.get(name):
                destruction.confirmed, destruction.retry_at = confirmed, self._clock.time() + retry
                if confirmed:
                    self._forget_unshown(name)
                    self.version += 1
        return confirmed
