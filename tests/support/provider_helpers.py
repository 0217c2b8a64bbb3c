"""What the tests of the provider share: time that passes, a rented worker, what is billed."""

from ray.autoscaler.tags import (
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
)

from cluster.node_provider import VastNodeProvider
from tests.cluster.fake_vast.cluster import NODE_CONFIG, ImitatedCluster, worker_tags

READY = {TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
WORKERS = {TAG_RAY_NODE_KIND: "worker"}


def billed(world: ImitatedCluster) -> set[str]:
    """Everything that costs money, which the head of `autoscaler` does not."""
    return {str(instance.id) for instance in world.vast.billed() if instance.price}


def later(world: ImitatedCluster, seconds: float, *providers: VastNodeProvider, step: float = 5.0) -> None:
    """Let time pass as the autoscaler does: every few seconds each provider is asked for its nodes."""
    end = world.clock.time() + seconds
    while world.clock.time() < end:
        world.clock.sleep(step)
        for provider in providers:
            provider.non_terminated_nodes({})


def create_worker(provider: VastNodeProvider, request: str = "request-1") -> str:
    [node_id] = provider.create_node(NODE_CONFIG, worker_tags(request), 1)
    return node_id
