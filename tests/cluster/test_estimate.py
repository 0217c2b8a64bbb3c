"""What is said beforehand about time and money, and afterwards about the cost of a run."""

import os
from pathlib import Path

import pytest
import yaml

from cluster.jobs import at_head
from cluster.renting.estimate import Machine, Study, estimate
from cluster.renting.ledger import Ledger
from tests.cluster.fake_vast.clock import VirtualClock
from tests.cluster.fake_vast.cluster import ImitatedCluster
from tests.support.provider_helpers import READY, create_worker, later

HEAD = Machine(0.1, traffic_cost=0.05, download_hours=0.1, copies=1)
WORKER = Machine(0.5, traffic_cost=0.2, download_hours=0.4, copies=2)


def test_an_estimate_of_a_study() -> None:
    """Head 0.1 + 0.1 h; workers 0.1 + 0.4 h; 400 trials x 36 s on 4 copies 1 h."""
    made = estimate(HEAD, [WORKER, WORKER], Study(400, 36.0), hours=9.0, head_is_up=False)
    assert (made.head_hours, made.worker_hours, made.work_hours) == pytest.approx((0.2, 0.5, 1.0))
    assert made.machines == pytest.approx(0.1 * 1.7 + 2 * 0.5 * 1.5) and made.traffic == pytest.approx(0.45)


def test_an_estimate_without_a_study_is_of_the_hours_that_were_asked_for() -> None:
    made = estimate(HEAD, [WORKER], None, hours=4.0, head_is_up=True)
    assert made.hours == pytest.approx(4.0)
    assert made.total == pytest.approx(0.1 * 4.0 + 0.5 * 4.0 + 0.2), "a head that is there downloads nothing"
    alone = estimate(HEAD, [], Study(10, 1.0), hours=2.0, head_is_up=False)
    assert alone.total == pytest.approx(0.1 * 2.0 + 0.05)


def test_an_estimate_is_what_the_imitation_bills(tmp_path: Path) -> None:
    """One worker from creation on, for as long as the estimate says, with a price that counts from creation."""
    world = ImitatedCluster.make(tmp_path, boot_s=0.0)
    head = world.autoscaler()
    head.set_node_tags(create_worker(head), READY)
    [rented] = [found for found in world.vast.billed() if found.price]
    machine = Machine(rented.price, rented.offer.inet_down_cost * 6.0, 0.0, 1)
    made = estimate(Machine(0.0), [machine], Study(100, 30.0), 4.0, head_is_up=True)
    later(world, 3600 * made.hours, head, step=60)
    assert head.cost().so_far == pytest.approx(made.total, rel=0.05)
    assert world.vast.cost() == pytest.approx(made.machines, rel=0.05)


def test_a_run_costs_what_was_rented_while_it_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines of 0.36 $/h: one from an hour before the run, one from its middle on, with a download of 0.5 $."""
    begun = 1_700_000_000.0
    settings = {"state_folder": str(tmp_path / "state"), "type": "external"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"cluster_name": "demo", "provider": settings}))
    monkeypatch.setattr(at_head, "CLUSTER_CONFIG", tmp_path / "config.yaml")
    ledger = Ledger(tmp_path / "state" / "demo", VirtualClock())
    contract = '{"price": 0.36, "begin": %f, "ended": %s, "traffic": %f}'
    contracts = f'"1": {contract % (begun - 3600, "null", 9.0)}, "2": {contract % (begun + 1000, begun + 1500, 0.5)}'
    (tmp_path / "state" / "demo" / "ledger.json").write_text(
        f'{{"contracts": {{{contracts}}}, "avoided": {{}}, "intents": {{}}, "resting": {{}}}}'
    )
    run = tmp_path / "run"
    run.mkdir()
    for name, at in (("settings.json", begun), ("run.json", begun + 1200), ("report.html", begun + 2000)):
        (run / name).write_text("")
        os.utime(run / name, (at, at))
    assert at_head.cost(at_head.RunDirectory(run)) == pytest.approx(0.36 * (2000 + 500) / 3600 + 0.5)
    assert ledger.cost_between(begun - 7200, begun - 3600) == 0.0


def test_where_no_account_is_kept_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_head, "CLUSTER_CONFIG", tmp_path / "none.yaml")
    assert at_head.cost(at_head.RunDirectory(tmp_path)) is None
