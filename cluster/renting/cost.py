"""What the cluster costs, from the API's data and the ledger's memory of what is gone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.notices.notices import Notices
from cluster.renting.tags import ClusterNode
from cluster.vast.models import Instance

LOW_CREDIT_H = 2.0
"""Credit that lasts for less, at the price of all machines, is low."""


@dataclass(frozen=True)
class NodeCost:
    """One machine; dollars."""

    node_id: str
    index: int
    gpu_name: str
    num_gpus: int
    per_hour: float
    so_far: float


@dataclass(frozen=True)
class ClusterCost:
    """Dollars. `so_far` is an upper bound: a machine that has not started is billed for its disk only. What the host
    takes for the bytes that a machine downloads before it is useful is in it, what jobs send and fetch is not."""

    nodes: tuple[NodeCost, ...]
    """What is billed now, by index."""

    gone: float
    """For machines that are no longer billed."""

    @property
    def per_hour(self) -> float:
        return sum(node.per_hour for node in self.nodes)

    @property
    def so_far(self) -> float:
        return self.gone + sum(node.so_far for node in self.nodes)


def cluster_cost(nodes: Iterable[ClusterNode], now: float, gone: float) -> ClusterCost:
    """The cost of `nodes` at Unix time `now`, and of what is gone."""
    ordered = sorted(nodes, key=lambda node: (node.label.index, node.id))
    return ClusterCost(tuple(node_cost(node, now) for node in ordered), gone)


def node_cost(node: ClusterNode, now: float) -> NodeCost:
    """What one machine costs at Unix time `now`: while it is paused its disk, otherwise its whole price."""
    instance, pause = node.instance, node.label.pause
    per_hour = storage_price(instance) if node.is_paused else instance.dph_total
    before, begin = (pause.spent, pause.since) if pause else (0.0, instance.start_date or now)
    so_far = before + per_hour * max(now - begin, 0.0) / 3600 + node.traffic
    return NodeCost(node.id, node.label.index, instance.gpu_name, instance.num_gpus or 0, per_hour, so_far)


def storage_price(instance: Instance) -> float:
    """Dollars per hour for its disk; the whole price where the API does not say it."""
    return instance.dph_total if instance.storage_total_cost is None else instance.storage_total_cost


def hours_left(credit: float, cost: ClusterCost) -> float:
    """How long `credit` dollars last."""
    return credit / cost.per_hour if cost.per_hour else math.inf


def tell_credit(notices: Notices, credit: float, cost: ClusterCost) -> None:
    """Tell of credit that is low, and again when it is low another time."""
    hours = hours_left(credit, cost)
    if hours < LOW_CREDIT_H:
        said = f"the account has {credit:.2f} dollars left, {hours:.1f} h at {cost.per_hour:.3f} dollars per hour"
        notices.tell("credit-low", f"{said}; without credit Vast.ai stops machines and deletes what is on them")
    else:
        notices.arm("credit-low")
