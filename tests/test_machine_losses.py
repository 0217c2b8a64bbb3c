"""A worker that is lost with its machine: it is started on the next machine, however often that happens."""

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import ActorDiedError, ActorUnavailableError

from bruno_ray.workers.broker import OF_A_CALL, OF_A_SLOT, Losses, is_loss_of_machine
from bruno_ray.workers.pool import WorkerPool
from tests.support.fakes import FakeWorker
from tests.support.study_driver import settings
from tests.support.waiting import wait_for

STORE = 100 * 1024**2


CUT = ActorUnavailableError("The actor is temporarily unavailable: RpcError: RPC error: Socket closed", None)
GONE = ActorDiedError()
GONE.error_msg = "The actor died because its node has died. Node Id: 7680d6"
CRASHED = ActorDiedError()
CRASHED.error_msg = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"


@pytest.mark.parametrize("bound", [OF_A_SLOT, OF_A_CALL])
def test_a_machine_that_goes_is_not_the_workers_fault(bound: Losses) -> None:
    """As Ray 2.60 says it, seen when a raylet and when a worker was killed."""
    assert [is_loss_of_machine(error) for error in (CUT, GONE, CRASHED)] == [True, True, False]
    losses = Losses()
    for _ in range(bound.crashes):
        losses.add(CUT)
        losses.add(GONE)
    assert losses == Losses(0, 2 * bound.crashes) and not (bound.machines > losses.machines and losses.reach(bound))
    for _ in range(bound.crashes):
        losses.add(CRASHED)
    assert losses.reach(bound)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    ray.shutdown()  # of the one that other tests of this process share
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False},
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(600)
def test_a_worker_whose_machines_go_one_after_the_other_is_never_given_up(cluster: Cluster) -> None:
    one = settings(workers=1).ray.model_copy(update={"cpus_per_worker": 1.0})
    machine = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    with WorkerPool(FakeWorker, (), one) as pool:
        for lost in range(OF_A_SLOT.crashes):  # so many crashes would be the end of it
            wait_for(lambda: pool.snapshot()[0].state == "idle", "a worker", detail=pool.snapshot)
            cluster.remove_node(machine, allow_graceful=False)
            wait_for(lambda lost=lost: pool.snapshot()[0].losses > lost, "the loss", detail=pool.snapshot)
            machine = cluster.add_node(num_cpus=1, object_store_memory=STORE)
        pool.set_context(40)
        assert pool.call("add", 2, with_context=True) == 42
