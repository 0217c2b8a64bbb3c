"""The books of a cluster: what is counted, what survives, and when the budget says no."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import BudgetError
from cluster.renting.budget import Phase, limit, price_room
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
    first.add_pending_launch("mark-a", 0.3, 5, 60)
    first.add_pending_launch("mark-b", 0.4, 6, 60)
    second = Ledger(tmp_path, clock)
    assert second.avoided() == {77}
    assert second.unavailable_indices() == {4, 5, 6}
    assert second.pending_price(["mark-b"]) == pytest.approx(0.3)
    second.drop_pending_launch("mark-a")
    second.observe([], settled=["mark-b"])
    assert first.pending_price([]) == 0 and first.unavailable_indices() == {4}
    clock.sleep(101)
    first.observe([])
    assert first.avoided() == first.unavailable_indices() == frozenset()
    assert json.loads((tmp_path / "ledger.json").read_text())["avoided"] == {}


def test_a_pending_launch_is_forgotten_only_after_its_time(tmp_path: Path, clock: VirtualClock) -> None:
    ledger = Ledger(tmp_path, clock)
    ledger.add_pending_launch("mark", 0.3, 1, 60)
    clock.sleep(59)
    ledger.observe([])
    assert ledger.pending_price([]) == pytest.approx(0.3)
    clock.sleep(2)
    assert ledger.pending_price([]) == 0


def test_a_file_of_the_code_before_is_understood(tmp_path: Path, clock: VirtualClock) -> None:
    now = clock.time()
    before = {
        "contracts": {"31": {"price": 0.5, "begin": now - 3600, "ended": now}},
        "avoided": {"77": now + 100},
        "intents": {"mark": {"price": 0.3, "index": 4, "until": now + 60}},
        "resting": {"5": now + 100},
    }
    (tmp_path / "ledger.json").write_text(json.dumps(before, indent=1))
    ledger = Ledger(tmp_path, clock)
    assert ledger.ended_cost() == pytest.approx(0.5) and ledger.pending_price([]) == pytest.approx(0.3)
    assert ledger.avoided() == {77} and ledger.unavailable_indices() == {4, 5}
    ledger.rest([], 0)
    assert json.loads((tmp_path / "ledger.json").read_text()) == before, "the code before can go on with it as well"


HOUR = 3600.0


@pytest.mark.parametrize(
    ("so_far", "hours", "phase"),
    [
        (0.0, 0.0, Phase.OPEN),
        (9.8, 0.0, Phase.OPEN),
        (9.92, 0.0, Phase.CLOSING),  # a dollar an hour: five minutes are 0.083
        (9.995, 0.0, Phase.OVER),
        (12.0, 0.0, Phase.OVER),
        (1.0, 5.8, Phase.OPEN),
        (1.0, 5.95, Phase.CLOSING),
        (1.0, 5.999, Phase.OVER),
        (1.0, 7.0, Phase.OVER),
    ],
)
def test_the_end_comes_in_two_steps_and_before_the_money_is_spent(
    clock: VirtualClock, so_far: float, hours: float, phase: Phase
) -> None:
    budget = BudgetSettings(max_price_per_hour=1.0, max_total_cost=10.0, max_hours=6.0)
    now = clock.time()
    stand = limit(budget, costing(1.0, so_far), now - hours * HOUR, now)
    assert stand.phase is phase and bool(stand.reason) is (phase is not Phase.OPEN)


def test_without_hours_only_the_money_ends(clock: VirtualClock) -> None:
    assert limit(BUDGET, costing(1.0, 1.0), clock.time() - 1000 * HOUR, clock.time()).phase is Phase.OPEN
    assert limit(BUDGET, costing(0.0, 1.0), None, clock.time()).phase is Phase.OPEN


def test_traffic_is_counted_once_and_survives(tmp_path: Path, clock: VirtualClock) -> None:
    start = clock.time()
    machine = replace(node(1, 0.5, start), traffic=0.25)
    assert cluster_cost([machine], start + HOUR, 0.0).so_far == pytest.approx(0.75)
    Ledger(tmp_path, clock).observe([machine])
    clock.sleep(HOUR)
    Ledger(tmp_path, clock).observe([])
    assert Ledger(tmp_path, clock).ended_cost() == pytest.approx(0.75)


def avoid_each(folder: Path, machines: range) -> None:
    ledger = Ledger(folder, VirtualClock())
    for machine in machines:
        ledger.avoid(machine, 1000)


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path, clock: VirtualClock) -> None:
    fork = multiprocessing.get_context("fork")
    parts = [range(first, first + 40) for first in (0, 40, 80)]
    processes = [fork.Process(target=avoid_each, args=(tmp_path, part)) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert Ledger(tmp_path, clock).avoided() == set(range(120))
    assert {path.name for path in tmp_path.iterdir()} == {"ledger.json", "ledger.lock"}


def test_a_damaged_file_is_begun_anew(tmp_path: Path, clock: VirtualClock, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "ledger.json").write_text("{")
    ledger = Ledger(tmp_path, clock)
    assert ledger.ended_cost() == 0
    assert "begun anew" in caplog.text
    ledger.avoid(1, 10)
    assert ledger.avoided() == {1}
