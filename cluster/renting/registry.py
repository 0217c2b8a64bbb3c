"""The nodes of the cluster with Ray's tags, and what each change of them asks for.

Notes what is gone in the ledger, brings labels up to date, destroys a head that was rented twice and, on the head, the
workers that cannot be used, and all of them when money or time are over.

The API is the truth about which machines exist. What is remembered beside it, about one machine x:

    state of x                                 who remembers it                   until
    -----------------------------------------  ---------------------------------  ----------------------------------
    its creation is being asked for            Ledger, pending launches (price)   the list shows it, or 3 minutes
    created without an answer, not wanted      NodeList._unconfirmed_launches     it is listed (destroyed), 15 min
    created, not in the API's list yet         NodeList._known, not yet shown     it is listed, or the API denies it
    listed                                     NodeList._known                    list and API both deny it
    known to an earlier process, not listed    NodeList._inherited                it is listed, or the API answers
    must go (given back, unfit, unwanted)      NodeList._destructions             15 min after it is confirmed
    Ray's tags that this process has set       NodeRegistry._own_tags             it is gone
    at the last look (to notice that it went)  NodeRegistry._last                 the next look
    gone; Ray may still ask for address, tags  NodeRegistry._gone                 the process ends
    since when it boots, runs, is silent       WorkerHealth (workers, head only)  it is gone
    its image is no use anywhere               WorkerHealth                       10 minutes
    what it has cost                           Ledger, contracts                  `ray down` (file)
    its host failed us                         Ledger, avoided                    provider.avoid_machine_s (file)
    it had an index that is not given away     Ledger, resting                    provider.index_rest_s (file)

Everything else about a node (kind, index, status, mark of its launch) is on the instance itself; see
cluster/renting/tags.py.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from ray.autoscaler.tags import STATUS_UNINITIALIZED, TAG_RAY_NODE_STATUS

from cluster.clock import Clock
from cluster.errors import BudgetError, NodeError
from cluster.network.addresses import max_addresses
from cluster.notices.notices import Notices
from cluster.renting.budget import Limit, Phase, limit
from cluster.renting.cost import ClusterCost, cluster_cost, tell_credit
from cluster.renting.ledger import Ledger
from cluster.renting.listing import NodeList
from cluster.renting.tags import HASH_TAGS, LASTING_STATUSES, ClusterNode, Label
from cluster.renting.worker_health import WorkerHealth, foreign_ports
from cluster.settings import ClusterSettings
from cluster.vast.client import VastClient
from cluster.vast.errors import VastError, VastRefusedError
from cluster.vast.models import State

logger = logging.getLogger(__name__)

LABEL_DEADLINE_S = 6.0
TELL_AGAIN_S = 60.0
REMIND_S = 600.0
SPENT_STEP = 0.05
"""Dollars by which the head's account may differ from its label."""

SPENT_SHARE = 0.8
"""Of max_total_cost, when somebody is told."""

CREDIT_S, CREDIT_DEADLINE_S = 600.0, 5.0
"""How often the head asks for the account's credit, and how long it waits for the answer."""


@dataclass
class _OwnTags:
    """What this process set on a node, on top of what the instance says."""

    tags: dict[str, str] = field(default_factory=dict)
    unwritten: bool = False
    """The label does not say it yet."""


class NodeRegistry:
    """One per process that does more than read. Thread-safe."""

    def __init__(
        self,
        client: VastClient,
        nodes: NodeList,
        ledger: Ledger,
        settings: ClusterSettings,
        clock: Clock,
        stop_jobs: Callable[[], None],
        notices: Notices,
    ) -> None:
        """`stop_jobs` tells all jobs of the cluster to end, and returns at once."""
        self.own_head: str | None = None
        """The head that this process rented."""
        self._heads_that_ran: set[str] = set()
        self._client = client
        self._nodes = nodes
        nodes.expect(ledger.open_contracts())
        self._ledger = ledger
        self._settings = settings
        self._clock = clock
        self._health = WorkerHealth(settings, ledger)
        self._lock = threading.RLock()
        self._reacting = threading.Lock()
        self._reacted_version = -1
        self._own_tags: dict[str, _OwnTags] = {}
        self._last: dict[str, ClusterNode] = {}
        """The nodes at the last look, to notice which are gone."""
        self._gone: dict[str, ClusterNode] = {}
        """What was known of nodes that are gone; a few hundred bytes each."""
        self._noted: tuple[dict[str, float], set[str], list[str]] | None = None
        """What the ledger was last told."""
        self._ended_cost = 0.0
        self._stop_jobs = stop_jobs
        self._notices = notices
        self._credit_at: float | None = -math.inf
        """When the account's credit was last asked for; None where this key is not told."""
        self._told_jobs = self._reminded = -math.inf

    def current(self, *, force: bool = False) -> dict[str, ClusterNode]:
        nodes = self._nodes.nodes(force=force)
        if self._nodes.version != self._reacted_version and self._reacting.acquire(blocking=False):
            try:
                self._reacted_version = self._nodes.version
                self._react(self._nodes.nodes())  # as new as the version, and as what another thread last saw
            finally:
                self._reacting.release()
            nodes = self._nodes.nodes()
        return nodes

    def _react(self, nodes: dict[str, ClusterNode]) -> None:
        """Do what a change of the nodes asks for."""
        with self._lock:
            gone = {name: node for name, node in self._last.items() if name not in nodes}
            self._last = nodes
            for name, node in gone.items():
                self._gone[name] = replace(node, label=node.labelled(self.tags_of(node), 0.0))
                self._own_tags.pop(name, None)
            unwritten = [name for name, own in self._own_tags.items() if own.unwritten and name in nodes]
        prices = {node.id: node.instance.dph_total for node in nodes.values()}
        launches, unaccounted = self._nodes.listed_launches(), self._nodes.unaccounted()
        if (noted := (prices, launches, unaccounted)) != self._noted:
            self._ledger.observe(nodes.values(), launches | {node.launch for node in gone.values()}, unaccounted)
            self._noted, self._ended_cost = noted, self._ledger.ended_cost()
        if gone:
            self._ledger.rest({node.label.index for node in gone.values()} - {0}, self._settings.index_rest_s)
        self._yield_to_older_head(nodes)
        for name in unwritten:
            self._write_label(nodes[name])
        if self._settings.looks_after_workers:
            self._keep_limit(nodes)
            self._look_at_money(nodes)
            self._destroy_unfit_workers(nodes)
            self._write_account([node for node in nodes.values() if node.is_head])
        else:
            self._check_heads([node for node in nodes.values() if node.is_head])

    def _yield_to_older_head(self, nodes: dict[str, ClusterNode]) -> None:
        """Of two heads that were rented at the same time the older one stays."""
        heads = [name for name, node in nodes.items() if node.is_head]
        if self.own_head in heads and heads[0] != self.own_head:
            own, self.own_head = self.own_head, None
            self._nodes.mark_for_destruction(own, nodes[own].instance.dph_total)
            raise NodeError(f"another `ray up` rented head {heads[0]} at the same time and keeps it; ours is destroyed")

    def _check_heads(self, heads: list[ClusterNode]) -> None:
        """A head that never booted holds nothing and goes; one that is stopped may hold a study and stays."""
        for extra in heads[1:]:
            if extra.label.status == STATUS_UNINITIALIZED:
                logger.error("head %s was rented beside head %s and is destroyed", extra.id, heads[0].id)
                self._nodes.mark_for_destruction(extra.id, extra.instance.dph_total)
        for head in heads[:1]:
            if head.instance.state is State.RUNNING:
                self._heads_that_ran.add(head.id)
            if reason := self._useless(head):
                logger.error("head %s is destroyed; run `ray up` again: %s", head.id, reason)
                if head.instance.machine_id and not foreign_ports(head, self._settings):
                    self._ledger.avoid(head.instance.machine_id, self._settings.avoid_machine_s)
                self._nodes.mark_for_destruction(head.id, head.instance.dph_total)
            elif head.instance.state is State.STOPPED and not head.is_paused:
                logger.error("head %s is stopped; `bruno-ray cluster up` starts it, `ray down` destroys it", head.id)

    def _useless(self, head: ClusterNode) -> str:
        """Why a head that has never been set up will not be; empty for one that may hold something."""
        if head.label.status != STATUS_UNINITIALIZED:
            return ""
        age, limit = self._clock.time() - head.instance.start_date, self._settings.boot_timeout_s
        if head.id not in self._heads_that_ran and head.instance.boot_error:
            return f"it will never run: {head.instance.boot_error}"
        if head.instance.state is State.BOOTING and age > limit:
            return f"it has not booted within {limit:.0f} s"
        return foreign_ports(head, self._settings)

    def _destroy_unfit_workers(self, nodes: dict[str, ClusterNode]) -> None:
        workers = [
            (node, self.tags_of(node).get(TAG_RAY_NODE_STATUS, "")) for node in nodes.values() if not node.is_head
        ]
        for node, reason in self._health.unfit(workers, self._clock.time()):
            logger.warning("destroying instance %s: %s", node.id, reason)
            self._nodes.mark_for_destruction(node.id, node.instance.dph_total)

    def cost(self, nodes: Iterable[ClusterNode]) -> ClusterCost:
        """What the cluster costs per hour and has cost so far."""
        nodes = list(nodes)
        labelled = max((node.label.spent for node in nodes if node.is_head), default=0.0)
        return cluster_cost(nodes, self._clock.time(), max(labelled, self._ledger.ended_cost()))

    def limit(self, nodes: Iterable[ClusterNode]) -> Limit:
        """How far the cluster is from the end of its money and its time."""
        nodes = list(nodes)
        now = self._clock.time()
        return limit(self._settings.budget, self.cost(nodes), began(nodes, now), now)

    def _keep_limit(self, nodes: dict[str, ClusterNode]) -> None:
        """Stop the jobs shortly before money or time are over, and destroy the workers when they are."""
        stand, now = self.limit(nodes.values()), self._clock.time()
        if stand.phase is Phase.OPEN:
            return
        if now >= self._told_jobs + TELL_AGAIN_S:
            logger.error("%s: jobs are told to stop, nothing more is rented", stand.reason)
            self._told_jobs = now
            self._stop_jobs()
            kept = "workers end within minutes, the head stays and goes on costing until `bruno-ray cluster down`"
            limits = f"{self._settings.budget.max_total_cost:g} {self._settings.budget.max_hours}"
            self._notices.tell("limit", f"{stand.reason}: jobs are told to stop, {kept}", limits)
        if stand.phase is not Phase.OVER:
            return
        for node in nodes.values():
            if not node.is_head:
                logger.warning("destroying instance %s: %s", node.id, stand.reason)
                self._nodes.mark_for_destruction(node.id, node.instance.dph_total)
        if now >= self._reminded + REMIND_S:
            self._reminded = now
            per_hour = sum(node.instance.dph_total for node in nodes.values() if node.is_head)
            logger.error(
                "%s: the workers are destroyed. The head holds the runs and GOES ON COSTING %.3f dollars per hour: "
                "`bruno-ray cluster down` fetches what is not home yet and ends it",
                stand.reason,
                per_hour,
            )

    def _look_at_money(self, nodes: dict[str, ClusterNode]) -> None:
        """Tell of a budget that is nearly spent, and of credit that is."""
        if not self._notices.wanted:
            return
        cost, total = self.cost(nodes.values()), self._settings.budget.max_total_cost
        if cost.so_far >= SPENT_SHARE * total:
            said = f"{cost.so_far:.2f} of max_total_cost {total:.2f} dollars are spent ({cost.so_far / total:.0%})"
            self._notices.tell("budget", f"{said}; it costs {cost.per_hour:.3f} dollars per hour now", f"{total:g}")
        now = self._clock.time()
        if self._credit_at is None or now < self._credit_at + CREDIT_S:
            return
        self._credit_at = now
        try:
            credit = self._client.credit(CREDIT_DEADLINE_S)
        except VastError as error:
            logger.debug("the credit could not be asked for: %s", error)
            return
        if credit is None:
            self._credit_at = None
        else:
            tell_credit(self._notices, credit, cost)

    def _write_account(self, heads: list[ClusterNode]) -> None:
        """What is gone has cost money, which the head's label says, so that it outlives the ledger."""
        for head in heads:
            if self._ended_cost > head.label.spent + SPENT_STEP:
                self._write_label(head)

    def check_launch(self, is_head: bool) -> None:
        """Raises `NodeError` where another node would be one too many, or what exists is not known for sure."""
        stand = self.limit(self.current().values())
        if stand.phase is not Phase.OPEN:
            raise BudgetError(
                f"{stand.reason}, nothing more is rented; raise it in cluster.yaml, or take the cluster down"
            )
        self._check_image()
        heads = [node for node in self.current(force=is_head).values() if node.is_head]
        if is_head and any(head.instance.state is State.STOPPED for head in heads):
            raise NodeError(f"head {heads[0].id} is stopped, not gone: `bruno-ray cluster up` starts it again")
        has_head = bool(heads)
        if is_head and has_head:
            raise NodeError("the cluster has a head already, which another `ray up` has just rented; run it again")
        if is_head and 0 in self._ledger.unavailable_indices():
            raise NodeError("another `ray up` has just rented a head that is not listed yet; try again in 3 minutes")
        if unaccounted := self._nodes.unaccounted():
            raise NodeError(
                f"an earlier process rented {', '.join(unaccounted)}, which the API does not list (yet) and could not"
                " be asked for: what the machines cost together is not known; try again"
            )
        if unpriced := self._nodes.unpriced():
            raise NodeError(
                f"instance {', '.join(unpriced)} was stopped by its host before it was first seen here, and may"
                " start again at a price that is not listed: what the machines cost together is not known; try again"
            )
        if self._settings.looks_after_workers and not has_head:
            raise NodeError("the API does not list the head (yet), so its list is not to be relied on; try again")

    def _check_image(self) -> None:
        if fault := self._health.image_fault(self._clock.time()):
            raise NodeError(fault)

    def free_index(self) -> int:
        """An index that no node has or had lately. Raises `NodeError` when all are taken."""
        taken = {node.label.index for node in self.current().values()} | self._ledger.unavailable_indices()
        limit = max_addresses(self._settings.max_cpus)
        for index in range(1, limit):
            if index not in taken:
                return index
        raise NodeError(f"all {limit} addresses are taken or rested a while; lower max_workers or provider.max_cpus")

    def known(self, node_id: str) -> ClusterNode:
        """The node, or what it was when it was last seen. Raises `NodeError` for one that was never ours."""
        node = self.current().get(node_id) or self._gone.get(node_id)
        if node is None:
            raise NodeError(f"instance {node_id} is not known in this cluster")
        return node

    def tags_of(self, node: ClusterNode) -> dict[str, str]:
        with self._lock:
            own = self._own_tags.get(node.id)
            return node.tags if own is None else {**node.tags, **own.tags}

    def set_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Remember tags; what lasts is written on the instance, now or with one of the next listings."""
        lasting = tags.get(TAG_RAY_NODE_STATUS) in LASTING_STATUSES or any(tag in tags for tag in HASH_TAGS)
        with self._lock:
            own = self._own_tags.setdefault(node_id, _OwnTags())
            own.tags.update(tags)
            own.unwritten |= lasting
        node = self.current().get(node_id)
        if node is not None and own.unwritten:
            self._write_label(node)

    def terminate(self, node: ClusterNode) -> bool:
        """Destroy a node that Ray gives back; False where that has to be tried again."""
        self._health.terminated(node, self.tags_of(node).get(TAG_RAY_NODE_STATUS, ""))
        return self._nodes.mark_for_destruction(node.id, node.instance.dph_total)

    def _write_label(self, node: ClusterNode) -> None:
        """Bring the label up to date. A failure is tried again with the next listing."""
        label = node.labelled(self.tags_of(node), max(node.label.spent, self._ledger.ended_cost()))
        try:
            self._set_label(node.instance.id, label)
        except VastError as error:
            logger.warning("the label of instance %s could not be set yet: %s", node.id, error)
        else:
            self._nodes.relabelled()
            with self._lock:
                if node.id in self._own_tags:
                    self._own_tags[node.id].unwritten = False

    def _set_label(self, instance_id: int, label: Label) -> None:
        try:
            self._client.set_label(instance_id, label.text(), LABEL_DEADLINE_S)
        except VastRefusedError:
            if not any(label.hashes):
                raise
            self._client.set_label(instance_id, label.text(with_hashes=False), LABEL_DEADLINE_S)


def began(nodes: Iterable[ClusterNode], now: float) -> float | None:
    """When the cluster's head was rented, Unix seconds, later by the time for which it was paused; None if unknown."""
    heads = [node for node in nodes if node.is_head and node.instance.start_date]
    return min(
        (node.instance.start_date + (node.label.pause.total(now) if node.label.pause else 0.0) for node in heads),
        default=None,
    )
