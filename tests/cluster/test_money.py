"""The end of money and time: jobs are stopped, workers destroyed, and whatever nobody looks after ends itself."""

import re
from pathlib import Path

import pytest
from ray.autoscaler.node_launch_exception import NodeLaunchException

from cluster.errors import BudgetError
from cluster.renting.budget import CLOSING_S
from tests.cluster.fake_vast.cluster import NODE_CONFIG, ImitatedCluster, head_tags, worker_tags
from tests.support.provider_helpers import READY, WORKERS, billed, create_worker, later


def test_the_total_is_a_limit(world: ImitatedCluster, caplog: pytest.LogCaptureFixture) -> None:
    """Jobs stop minutes before, workers end before it is passed, the head stays and says so."""
    limit = 1.0
    head = world.autoscaler(budget={"max_total_cost": limit})
    for _ in range(2):
        head.set_node_tags(create_worker(head), READY)
    stopped_at = closed_at = None
    for _ in range(2000):
        later(world, 5, head)
        if stopped_at is None and world.jobs_stopped:
            stopped_at = world.clock.time()
        if not billed(world):
            closed_at = world.clock.time()
            break
    assert stopped_at is not None and closed_at is not None
    assert CLOSING_S - 30 <= closed_at - stopped_at <= CLOSING_S + 60
    assert 0.9 * limit < world.vast.cost() <= limit
    with pytest.raises(NodeLaunchException, match="max_total_cost"):
        create_worker(head)
    assert "GOES ON COSTING" in caplog.text and "cluster down" in caplog.text
    assert len(head.non_terminated_nodes({})) == 1, "the head may hold what is not fetched"


def test_hours_are_a_limit_from_the_heads_beginning(world: ImitatedCluster) -> None:
    laptop = world.provider("laptop", budget={"max_hours": 2})
    [head_id] = laptop.create_node(NODE_CONFIG, head_tags(), 1)
    begun = world.clock.time()
    laptop.set_node_tags(head_id, READY)
    head = world.provider("head", budget={"max_hours": 2})
    head.set_node_tags(create_worker(head), READY)
    later(world, 2 * 3600 - 400 - (world.clock.time() - begun), head)
    assert len(head.non_terminated_nodes(WORKERS)) == 1 and not world.jobs_stopped
    later(world, 300, head)
    assert world.jobs_stopped and len(head.non_terminated_nodes(WORKERS)) == 1
    later(world, 120, head)
    assert billed(world) == {head_id}
    assert world.clock.time() - begun <= 2 * 3600 + 60


def test_a_restarted_autoscaler_keeps_the_limit(world: ImitatedCluster) -> None:
    first = world.autoscaler(budget={"max_total_cost": 0.5})
    first.set_node_tags(create_worker(first), READY)
    later(world, 3600, first, step=20)
    second = world.autoscaler(budget={"max_total_cost": 0.5})
    later(world, 3600, second)
    assert billed(world) == set() and world.vast.cost() <= 0.5


def test_nothing_is_rented_that_would_be_ended_at_once(world: ImitatedCluster) -> None:
    head = world.autoscaler(budget={"max_total_cost": 0.05})
    with pytest.raises(NodeLaunchException, match="nearly spent"):
        create_worker(head)
    assert billed(world) == set()


def test_a_head_is_not_rented_with_a_spent_budget(world: ImitatedCluster) -> None:
    with pytest.raises(BudgetError, match="nearly spent"):
        world.provider("laptop", budget={"max_total_cost": 0.01}).create_node(NODE_CONFIG, head_tags(), 1)


def test_traffic_counts(world: ImitatedCluster) -> None:
    """The host takes a cent per GB; the machine downloads 6 GB and a model of 100."""
    world.vast.add_offers(1, inet_down_cost=0.01, gpu_name="H100 SXM")
    head = world.autoscaler()
    config = {"disk_gb": 300, "model_size_gb": 100, "requirements": {"gpu_names": ["H100_SXM"]}}
    head.create_node(config, worker_tags(), 1)
    assert head.cost().so_far == pytest.approx(1.06, abs=0.01)
    assert world.provider("laptop").cost().so_far == pytest.approx(1.06, abs=0.01), "it is on the instance"


def test_workers_whose_head_is_gone_end_themselves(tmp_path: Path) -> None:
    world = ImitatedCluster.make(tmp_path)
    laptop = world.provider("laptop")
    [head_id] = laptop.create_node(NODE_CONFIG, head_tags(), 1)
    head = world.provider("head")
    workers = {create_worker(head) for _ in range(2)}
    reached = {int(worker) for worker in workers}
    for _ in range(60):  # an hour with a head
        later(world, 60, head, step=20)
        for worker in workers:
            head.set_node_tags(worker, READY)
        world.vast.let_dead_mans_switches_act(reached)
    assert billed(world) == {head_id, *workers}
    world.vast.host_deletes(int(head_id))
    gone_at = world.clock.time()
    while billed(world) and world.clock.time() < gone_at + 4000:
        world.clock.sleep(30)
        world.vast.let_dead_mans_switches_act(set())
    assert world.clock.time() - gone_at <= 1800 + 60


def test_every_worker_has_a_switch_and_an_end_and_the_head_has_none(world: ImitatedCluster) -> None:
    laptop = world.provider("laptop", budget={"max_hours": 3})
    [head_id] = laptop.create_node(NODE_CONFIG, head_tags(), 1)
    begun = world.clock.time()
    head = world.provider("head", budget={"max_hours": 3})
    with_hours = create_worker(head)
    head = world.provider("head", budget={"max_total_cost": 2.0})
    without = create_worker(head)
    found = {}
    for node in (with_hours, without):
        instance = world.vast.instances[int(node)]
        switch = re.search(r"PATIENCE_S=(\d+) END=(\d+)", instance.onstart)
        assert switch is not None
        found[node] = (int(switch[1]), int(switch[2]) - begun, instance.price)
    assert found[with_hours][:2] == (1800, pytest.approx(3 * 3600, abs=30))
    patience, end, price = found[without]
    assert patience == 1800 and end == pytest.approx(2.0 / price * 3600, rel=0.05), "alone it cannot spend more"
    assert "PATIENCE_S" not in world.vast.instances[int(head_id)].onstart
