"""The books of a cluster: what is counted, what survives, and when the budget says no."""

import json
from pathlib import Path

import pytest

from cluster.errors import BudgetError
from cluster.renting.budget import price_room
from cluster.renting.cost import ClusterCost, NodeCost, cluster_cost
from cluster.renting.ledger import Ledger
from cluster.renting.tags import ClusterNode, Label
from cluster.settings import BudgetSettings
from cluster.vast.models import Instance
from tests.cluster.fake_vast.clock import VirtualClock

BUDGET = BudgetSettings(max_price_per_hour=1.0, max_total_cost=10.0)


def node(number: int, price: float, start: float, index: int = 1, launch: str = "") -> ClusterNode:
    instance = Instance(
        id=number, machine_id=number, dph_total=price, start_date=start, gpu_name="RTX 4090", num_gpus=1
    )
    return ClusterNode(instance, Label("demo", "worker", index), {}, launch)


def costing(per_hour: float, so_far: float) -> ClusterCost:
    return ClusterCost((NodeCost("1", 0, "", 0, per_hour, 0.0),), so_far)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


def test_room_is_what_nodes_and_unconfirmed_machines_leave() -> None:
    assert price_room(BUDGET, costing(0.3, 9.99), 0.2) == pytest.approx(0.5)
    with pytest.raises(BudgetError, match=r"cost 1\.000 of max_price_per_hour 1\.000"):
        price_room(BUDGET, costing(0.6, 0.0), 0.4)
    with pytest.raises(BudgetError, match=r"10\.00 of max_total_cost 10\.00"):
        price_room(BUDGET, costing(0.1, 10.0), 0.0)


def test_cost_adds_what_runs_and_what_is_gone(clock: VirtualClock) -> None:
    now = clock.time()
    nodes = [node(2, 0.5, now - 7200, index=2), node(1, 0.25, now - 3600, index=1), node(3, 1.0, now + 60, index=3)]
    cost = cluster_cost(nodes, now, gone=4.0)
    assert [part.index for part in cost.nodes] == [1, 2, 3]
    assert cost.per_hour == pytest.approx(1.75)
    assert cost.so_far == pytest.approx(4.0 + 0.25 + 1.0), "a clock that is ahead does not earn money"


def test_contracts_that_end_are_charged_until_they_were_last_known(tmp_path: Path, clock: VirtualClock) -> None:
    ledger = Ledger(tmp_path, clock)
    start = clock.time()
    ledger.observe([node(1, 0.5, start), node(2, 1.0, start)])
    clock.sleep(3600)
    ledger.observe([node(2, 1.0, start)])
    clock.sleep(3600)
    assert Ledger(tmp_path, clock).ended_cost() == pytest.approx(0.5)
    ledger.observe([node(1, 0.5, start), node(2, 1.0, start)])
    assert ledger.ended_cost() == 0, "an instance that turns up again was not gone"


def test_what_is_avoided_rests_or_was_begun_is_known_to_the_next_process(tmp_path: Path, clock: VirtualClock) -> None:
    first = Ledger(tmp_path, clock)
    first.avoid(77, 100)
    first.rest([4], 50)
    first.intend("mark-a", 0.3, 5, 60)
    first.intend("mark-b", 0.4, 6, 60)
    second = Ledger(tmp_path, clock)
    assert second.avoided() == {77}
    assert second.unavailable_indices() == {4, 5, 6}
    assert second.intended_price(["mark-b"]) == pytest.approx(0.3)
    second.refused("mark-a")
    second.observe([], settled=["mark-b"])
    assert first.intended_price([]) == 0 and first.unavailable_indices() == {4}
    clock.sleep(101)
    first.observe([])
    assert first.avoided() == first.unavailable_indices() == frozenset()
    assert json.loads((tmp_path / "ledger.json").read_text())["avoided"] == {}


def test_an_intent_is_forgotten_only_after_its_time(tmp_path: Path, clock: VirtualClock) -> None:
    ledger = Ledger(tmp_path, clock)
    ledger.intend("mark", 0.3, 1, 60)
    clock.sleep(59)
    ledger.observe([])
    assert ledger.intended_price([]) == pytest.approx(0.3)
    clock.sleep(2)
    assert ledger.intended_price([]) == 0


def test_a_damaged_file_is_begun_anew(tmp_path: Path, clock: VirtualClock, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "ledger.json").write_text("{")
    ledger = Ledger(tmp_path, clock)
    assert ledger.ended_cost() == 0
    assert "begun anew" in caplog.text
    ledger.avoid(1, 10)
    assert ledger.avoided() == {1}
