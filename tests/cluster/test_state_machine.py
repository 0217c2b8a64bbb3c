"""Random histories of a cluster on the imitation, with everything that can go wrong: no money is lost.

A laptop brings the cluster up and down, the head's autoscaler rents and gives back, the market and the hosts do what
they like, the API fails in every way it knows, processes die and start again. Time is virtual. Always:

* the machines of the cluster together never cost more per hour than the budget allows;
* no worker goes on when the total is spent, but for one look at the cost;
* no instance of somebody else is ever destroyed;
* a head that is paused is billed for its disk, and one that could not be started again does not start by itself;
* nothing is asked sooner than Vast.ai's documented rate limits allow.

And once the faults have passed and some time has gone by, the API's instances with our label are exactly those that the
provider knows; none is left that nobody ordered, that was given back, or that cannot be used. Workers whose head is
gone end themselves, and when the cluster is taken down nothing is left at all.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, target
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import STATUS_UP_TO_DATE, STATUS_UPDATE_FAILED, TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS

from cluster.errors import ClusterError
from cluster.node_provider import VastNodeProvider
from cluster.renting.budget import LOOK_S
from tests.cluster.fake_vast.api import CREATIONS_ONLY, Fault
from tests.cluster.fake_vast.cluster import NODE_CONFIG, ODD_ROWS, ImitatedCluster, head_tags, worker_tags
from tests.cluster.fake_vast.state import FakeInstance

RUNS = 60
"""The same histories in each run: the suite judges a change, not the luck of a draw."""

NIGHTLY_RUNS = int(os.environ.get("HISTORIES", "1000"))
"""New ones each time."""

STEPS = 18
IN_MEMORY = Path("/dev/shm")
"""Each history writes hundreds of small files."""

SETTLED_S = 160
"""How long after the last fault nothing may be left that nobody wants."""

MAX_PRICE = 2.0
"""Dollars per hour: room for five machines."""

LEAST_PRICE = 0.5
"""Dollars per hour of a head and a worker, or less."""

INDEX_REST_S = 60
SWITCH_S = 2000
"""Longer than a worker does without its head."""

SETTINGS: dict[str, Any] = {
    "boot_timeout_s": 300,
    "join_timeout_s": 300,
    "avoid_machine_s": 600,
    "index_rest_s": INDEX_REST_S,
}
ONE_INSTANCE, ALL_INSTANCES, CREATIONS = r"/v0/instances/\d+/$", "/v1/instances/", "/v0/asks/"
FOREIGN_LABELS = ("bruno-ray:demo-two:w1:up-to-date", "", "somebody else's", "bruno-ray:demo-two:h0:up-to-date")
BID_CONFIG = {**NODE_CONFIG, "requirements": {**NODE_CONFIG["requirements"], "interruptible": True}}

NO_CONTAINER = "Error response from daemon: failed to create task for container: OCI runtime create failed"

PASSING = [fault for fault in Fault if fault is not Fault.QUOTA]
OUTAGES = [fault for fault in PASSING if fault not in CREATIONS_ONLY]
LAPTOP_ERRORS = (ClusterError,)
HEAD_ERRORS = (ClusterError, NodeLaunchException)


class ClusterHistory(RuleBasedStateMachine):
    """One history. The head's provider exists as long as its head does, like the process it stands for."""

    foreign = Bundle("foreign")
    begun = 0
    """Histories so far."""

    def __init__(self) -> None:
        super().__init__()
        ClusterHistory.begun += 1
        self.folder = tempfile.TemporaryDirectory(
            prefix="bruno-history-", dir=IN_MEMORY if IN_MEMORY.is_dir() else None
        )
        self.world: ImitatedCluster
        self.head: VastNodeProvider | None = None
        self.laptop: VastNodeProvider
        self.foreign_ids: set[int] = set()
        self.heads = 0
        self.ordered: set[str] = set()
        """What creations returned, and what a process that died may have left to its successor."""
        self.given_back: set[str] = set()
        """What the living process of the head was told to terminate."""
        self.rented: set[int] = set()
        """What creations returned to the living process of the head."""
        self.total = 1000.0
        self.calm = False
        """Whether nothing was wrong with the API at the last look."""

    @initialize(
        boot_s=st.sampled_from([5.0, 60.0]),
        listing_lag_s=st.sampled_from([0.0, 8.0, 40.0, 100.0]),
        destroying_lag_s=st.sampled_from([0.0, 10.0]),
        foreign=st.sampled_from([1, 3, 28]),
        workers=st.sampled_from([None, 1, 3]),
        total=st.sampled_from([1000.0, 1000.0, 0.3]),
        stopped_is_cheap=st.booleans(),
    )
    def begin(
        self,
        boot_s: float,
        listing_lag_s: float,
        destroying_lag_s: float,
        foreign: int,
        workers: int | None,
        total: float = 1000.0,
        stopped_is_cheap: bool = False,
    ) -> None:
        """28 foreign instances put ours on the second page of the list; most histories begin with a cluster."""
        self.total = total
        self.world = ImitatedCluster.make(
            Path(self.folder.name),
            offers=foreign + 12,
            boot_s=boot_s,
            listing_lag_s=listing_lag_s,
            destroying_lag_s=destroying_lag_s,
        )
        self.world.vast.stopped_is_cheap = stopped_is_cheap
        for number in range(foreign):
            label, odd = FOREIGN_LABELS[number % len(FOREIGN_LABELS)], ODD_ROWS[number % len(ODD_ROWS)]
            self.foreign_ids.add(self.world.foreign_instance(label, odd))
        self.laptop = self.world.provider("laptop", **self.settings())
        if workers is not None:
            self.ray_up()
            self._wait(120, step=30.0)
            assert self.head is not None
            with contextlib.suppress(*HEAD_ERRORS):  # the total may not be enough for all of them
                self.rented |= set(map(int, self.head.create_node(NODE_CONFIG, worker_tags(), workers)))
            self._what_exists_may_stay()
            for node in self.head.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"}):
                self.head.set_node_tags(node, {TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE})
            self._wait(120, step=30.0)

    def settings(self) -> dict[str, Any]:
        return {**SETTINGS, "budget": {"max_price_per_hour": MAX_PRICE, "max_total_cost": self.total}}

    # The laptop.

    @rule()
    def ray_up(self) -> None:
        self._start_laptop_process()
        try:
            heads = self.laptop.non_terminated_nodes({TAG_RAY_NODE_KIND: "head"})
            if not heads:
                heads = list(self.laptop.create_node(NODE_CONFIG, head_tags(), 1))
                self.ordered.update(heads)
                assert self.laptop.non_terminated_nodes(head_tags()) == heads, "a new head is listed at once"
            self.laptop.set_node_tags(heads[0], {TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE})
        except LAPTOP_ERRORS:
            return
        if self.head is None and heads == [str(stopped.id) for stopped in self._stopped_heads()]:
            return  # Ray finds nobody there
        self._a_new_head_starts()

    @precondition(lambda self: self.head is None and not self._ours())
    @rule(then=st.sampled_from(["both go on", "both are set up", "the second dies"]))
    def two_laptops_ray_up_at_once(self, then: str) -> None:
        """Both ask before one of them creates; neither sees the other's until the list shows it."""
        self._start_laptop_process()
        laptops = [self.laptop, self.world.provider("elsewhere", **self.settings())]
        heads: dict[str, VastNodeProvider] = {}
        for laptop in laptops:
            with contextlib.suppress(*LAPTOP_ERRORS):
                laptop.non_terminated_nodes({})
        for laptop in laptops:
            with contextlib.suppress(*LAPTOP_ERRORS):
                heads.update(dict.fromkeys(laptop.create_node(NODE_CONFIG, head_tags(), 1), laptop))
        self.ordered.update(heads)
        for head, laptop in heads.items():
            if then == "both are set up":
                with contextlib.suppress(*LAPTOP_ERRORS):
                    laptop.set_node_tags(head, {TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE})
        for _ in range(8):
            self.world.clock.sleep(20)
            for laptop in laptops[:1] if then == "the second dies" else laptops:
                with contextlib.suppress(*LAPTOP_ERRORS):
                    laptop.non_terminated_nodes({})
        self._a_new_head_starts()

    def _a_new_head_starts(self) -> None:
        """Set-up takes longer than the list lags; a new head is a new machine, with nothing remembered."""
        if self.head is None:
            self._wait(60, step=30.0)
            self.heads += 1
            self._start_head_process()
            self._head_process_lives_with_its_machine()

    @rule()
    def ray_down(self) -> None:
        """The processes on the head end with it."""
        self._start_laptop_process()
        with contextlib.suppress(*LAPTOP_ERRORS):
            self.laptop.terminate_nodes(self.laptop.nodes_for_teardown({}))
        self._head_process_lives_with_its_machine()

    @precondition(lambda self: self.head is not None)
    @rule(then=st.sampled_from(["nothing", "goes on", "its place is taken", "its place is taken for a while"]))
    def pause(self, then: str) -> None:
        """Ray and the tunnels end first; what cannot be destroyed now ends itself, since nobody looks after it."""
        self._start_laptop_process()
        self.head = None
        self.given_back.clear()
        with contextlib.suppress(*LAPTOP_ERRORS):
            self.laptop.pause()
        self._wait(600, step=200.0)
        for taken in {"goes on": [False], "its place is taken": [True], "nothing": []}.get(then, [True, False]):
            self.somebody_rents_the_place_of_a_stopped_head(taken)
            if self._stopped_heads():
                self.resume()

    @precondition(lambda self: bool(self._stopped_heads()))
    @rule()
    def resume(self) -> None:
        self._start_laptop_process()
        [head, *_] = self._stopped_heads()
        is_calm = not self.world.api.outage and not self.world.api.faults
        try:
            self.laptop.resume()
        except LAPTOP_ERRORS:
            assert not is_calm or not head.waits, "it would start, and cost, whenever there is room"
            return
        if self.head is None:
            self._start_head_process()  # with what is on its disk

    @precondition(lambda self: bool(self._stopped_heads()))
    @rule(taken=st.booleans())
    def somebody_rents_the_place_of_a_stopped_head(self, taken: bool) -> None:
        for head in self._stopped_heads():
            self.world.vast.place_is_taken(head.id, taken)

    def _stopped_heads(self) -> list[FakeInstance]:
        return [found for found in self._ours() if ":h0" in found.label and found.forced == "stopped"]

    # The head.

    @precondition(lambda self: self.head is not None)
    @rule(count=st.sampled_from([1, 1, 1, 2, 4]), bid=st.booleans())
    def scale_up(self, count: int, bid: bool) -> None:
        """Of several machines those stay that were rented before an error; of one that failed nothing may stay."""
        assert self.head is not None
        try:
            created = self.head.create_node(BID_CONFIG if bid else NODE_CONFIG, worker_tags(), count)
        except HEAD_ERRORS:
            if count > 1:
                self._what_exists_may_stay()
            return
        self.ordered.update(created)
        listed = self.head.non_terminated_nodes({})
        assert set(created) <= set(listed), "new nodes are listed at once"
        addresses = [self.head.internal_ip(node) for node in listed]
        assert len(set(addresses)) == len(addresses)
        for node in map(self.world.vast.instances.get, map(int, created)):
            assert node is not None
            for former in map(self.world.vast.instances.get, self.rented):
                assert former is not None
                if former.destroyed_at is not None and former.label.split(":")[2] == node.label.split(":")[2]:
                    assert node.created_at >= former.destroyed_at + INDEX_REST_S, "an address rests a while"
        self.rented.update(map(int, created))

    @precondition(lambda self: self.head is not None)
    @rule(data=st.data(), away=st.booleans())
    def scale_down(self, data: st.DataObject, away: bool) -> None:
        """Also while the API is away."""
        assert self.head is not None
        if (node := self._some_worker(data)) is not None:
            before = self.world.api.outage, self.world.api.outage_path
            if away:
                self.world.api.outage, self.world.api.outage_path = Fault.SERVER_ERROR, ""
            self.head.terminate_node(node)
            self.world.api.outage, self.world.api.outage_path = before
            self.given_back.add(node)

    @precondition(lambda self: self.head is not None)
    @rule(data=st.data(), status=st.sampled_from([STATUS_UP_TO_DATE, STATUS_UP_TO_DATE, STATUS_UPDATE_FAILED]))
    def set_up_ends(self, data: st.DataObject, status: str) -> None:
        assert self.head is not None
        if (node := self._some_worker(data)) is not None:
            self.head.set_node_tags(node, {TAG_RAY_NODE_STATUS: status})

    @precondition(lambda self: self.head is not None)
    @rule()
    def autoscaler_dies_and_starts_again(self) -> None:
        self._start_head_process()

    @precondition(lambda self: self.head is not None)
    @rule()
    def autoscaler_dies_while_renting(self) -> None:
        """Its successor is asked for more at once, when the list may not show yet what was rented."""
        for _ in range(2):
            assert self.head is not None
            with contextlib.suppress(*HEAD_ERRORS):
                self.ordered.update(self.head.create_node(NODE_CONFIG, worker_tags(), 4))
            self._start_head_process()

    # Time and the world.

    @rule(seconds=st.sampled_from([1, 5, 20, 60, 400]))
    def time_passes(self, seconds: int) -> None:
        self._wait(seconds, step=max(seconds / 4, 1.0))

    @rule(data=st.data(), event=st.sampled_from(["outbids", "deletes"]))
    def a_worker_is_lost(self, data: st.DataObject, event: str) -> None:
        self._happens(data, ":w", event)

    @rule(data=st.data(), event=st.sampled_from(["offline", "stuck", "cannot boot", "exits"]))
    def a_worker_cannot_be_used(self, data: st.DataObject, event: str) -> None:
        self._happens(data, ":w", event)

    @rule(data=st.data(), event=st.sampled_from(["deletes", "outbids", "offline", "stuck"]))
    def something_happens_to_the_head(self, data: st.DataObject, event: str) -> None:
        self._happens(data, ":h", event)

    @rule(data=st.data())
    def a_host_is_back(self, data: st.DataObject) -> None:
        self._happens(data, "", "back")

    def _happens(self, data: st.DataObject, kind: str, event: str) -> None:
        machines = [instance.id for instance in self._ours() if kind in instance.label]
        if not machines:
            return
        happen = {
            "deletes": self.world.vast.host_deletes,
            "outbids": self.world.vast.outbid,
            "offline": self.world.vast.host_offline,
            "back": self.world.vast.host_back,
            "stuck": self.world.vast.never_boots,
            "cannot boot": lambda machine: self.world.vast.cannot_boot(machine, "loading", NO_CONTAINER),
            "exits": lambda machine: self.world.vast.cannot_boot(machine, "exited"),
        }[event]
        happen(data.draw(st.sampled_from(machines)))
        self._head_process_lives_with_its_machine()

    @precondition(lambda self: self.head is not None and not self.world.api.outage and not self.world.api.faults)
    @rule(data=st.data(), meanwhile=st.sampled_from(["nothing", "no answer", "new process"]))
    def the_list_forgets_a_machine(self, data: st.DataObject, meanwhile: str) -> None:
        """Asked for the machine alone, the API may have nothing to say either."""
        assert self.head is not None
        if (node := self._some_worker(data)) is not None:
            self.world.vast.unlisted_until[int(node)] = self.world.clock.time() + 20
            speechless = meanwhile == "no answer"
            if meanwhile == "new process":
                self._start_head_process()
            self.world.api.outage, self.world.api.outage_path = Fault.SERVER_ERROR if speechless else None, ONE_INSTANCE
            self._wait(6, step=6)
            self.world.api.outage, self.world.api.outage_path = None, ""
            listed = self.head.non_terminated_nodes({})  # which may be when what was given back is destroyed at last
            if self.world.vast.instances[int(node)].destroyed_at is None:
                assert node in listed, "a machine is not gone because one list lacks it"

    @rule()
    def the_market_moves(self) -> None:
        for offer in self.world.vast.free_offers()[:4]:
            offer.hidden = True
        self.world.vast.add_offers(2)

    @rule(faults=st.lists(st.sampled_from([None, None, *PASSING]), min_size=1, max_size=6))
    def requests_will_fail(self, faults: list[Fault | None]) -> None:
        self.world.api.faults.extend(faults)

    @rule(
        outage=st.sampled_from([None, *OUTAGES]), path=st.sampled_from(["", "", ALL_INSTANCES, ONE_INSTANCE, CREATIONS])
    )
    def the_api_goes_and_comes(self, outage: Fault | None, path: str) -> None:
        """The whole of it, or a part."""
        self.world.api.outage, self.world.api.outage_path = outage, path

    @rule()
    def the_dust_settles(self) -> None:
        """All faults pass, the lags too, and every deadline for machines that do not work."""
        self.world.api.outage, self.world.api.outage_path = None, ""
        self.world.api.faults.clear()
        # Longer than the list lags, shorter than any deadline for machines, which would hide what is left behind.
        self._wait(SETTLED_S, step=20.0)
        self._books_agree()
        self._wait(1000 - SETTLED_S, step=100.0)
        self._books_agree()
        if self.head is not None:
            workers = [instance for instance in self._ours() if ":w" in instance.label]
            broken = [instance.id for instance in workers if self.world.vast.status(instance) != "running"]
            assert broken == [], "what cannot be used is not kept"
        heads = [instance for instance in self._ours() if instance.label.startswith("bruno-ray:demo:h0")]
        assert len(heads) <= 1

    def _books_agree(self) -> None:
        billed = {str(instance.id) for instance in self._ours()}
        assert billed <= self.ordered, "nothing is kept that nobody ordered"
        assert not billed & self.given_back, "what was given back is gone"
        for provider in filter(None, [self.laptop, self.head]):
            for _ in range(3):  # the head may have destroyed a machine since the laptop looked, a moment ago
                known, billed = set(provider.non_terminated_nodes({})), {str(instance.id) for instance in self._ours()}
                if known == billed:
                    break
                self.world.clock.sleep(10)
            assert known == billed, "known and billed are the same"

    # Always.

    @invariant()
    def the_budget_holds(self) -> None:
        if hasattr(self, "world"):
            assert sum(instance.price for instance in self._ours()) <= MAX_PRICE + 1e-6

    @invariant()
    def the_rate_limits_are_kept(self) -> None:
        if hasattr(self, "world"):
            assert self.world.api.rates.passed == []

    @invariant()
    def nothing_of_others_is_touched(self) -> None:
        if hasattr(self, "world"):
            billed = {instance.id for instance in self.world.vast.billed()}
            assert self.foreign_ids <= billed
            assert all(self.world.vast.instances[number].label in FOREIGN_LABELS for number in self.foreign_ids)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.the_dust_settles()
            self._everything_ends()
            target(float(len(self.world.vast.instances) - len(self.foreign_ids)), label="instances rented")
        self.folder.cleanup()

    def _everything_ends(self) -> None:
        if self.total < MAX_PRICE and self.head is not None:
            self._wait(3600 * self.total / LEAST_PRICE, step=60.0)
            assert not any(":w" in instance.label for instance in self._ours()), "by now the total is spent"
        if self.head is None:
            self._wait(SWITCH_S, step=50.0)
            left = [instance.id for instance in self._ours() if ":w" in instance.label]
            running = [
                number for number in left if self.world.vast.status(self.world.vast.instances[number]) == "running"
            ]
            assert running == [], "workers without a head end themselves"
        self.ray_down()
        self._wait(SETTLED_S, step=20.0)
        assert self._ours() == [], "a cluster that is taken down leaves nothing"

    def _ours(self) -> list[FakeInstance]:
        return [instance for instance in self.world.vast.billed() if instance.label.startswith("bruno-ray:demo:")]

    def _some_worker(self, data: st.DataObject) -> str | None:
        assert self.head is not None
        try:
            workers = self.head.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})
        except HEAD_ERRORS:
            return None
        return data.draw(st.sampled_from(workers)) if workers else None

    def _wait(self, seconds: float, step: float) -> None:
        """The autoscaler asks all the time."""
        end = self.world.clock.time() + seconds
        while self.world.clock.time() < end:
            before = self.world.clock.time()
            self.world.clock.sleep(step)
            self._machines_look_after_themselves()
            for provider in filter(None, [self.laptop, self.head]):
                try:
                    provider.non_terminated_nodes({})
                except HEAD_ERRORS:
                    continue
            self._the_total_holds(self.world.clock.time() - before)

    def _machines_look_after_themselves(self) -> None:
        """The supervisor on a head that runs shows the workers that it is there."""
        ours = self._ours()
        heads = [instance for instance in ours if ":h0" in instance.label]
        is_there = self.head is not None and any(self.world.vast.status(head) == "running" for head in heads)
        self.world.vast.let_dead_mans_switches_act({instance.id for instance in ours} if is_there else set())

    def _the_total_holds(self, seconds: float) -> None:
        """What the head and its workers have cost since it began, after two looks with nothing wrong at the API."""
        was_calm = self.calm
        self.calm = self.head is not None and not self.world.api.outage and not self.world.api.faults
        if not (was_calm and self.calm):
            return
        ours = self._ours()
        heads = [instance for instance in ours if instance.label.startswith("bruno-ray:demo:h0")]
        if len(heads) != 1 or not any(":w" in instance.label for instance in ours):
            return
        since = heads[0].created_at
        everything = [
            found for found in self.world.vast.instances.values() if found.label.startswith("bruno-ray:demo:")
        ]
        spent = sum(self.world.vast.cost_of(found) for found in everything if found.created_at >= since)
        assert spent <= self.total + MAX_PRICE * (seconds + LOOK_S) / 3600, "workers go on although the total is spent"

    def _start_laptop_process(self) -> None:
        self._what_exists_may_stay()
        self.laptop = self.world.provider("laptop", **self.settings())

    def _what_exists_may_stay(self) -> None:
        """A process that ends no longer clears away what it had begun; the next finds it in the list, as a node."""
        self.ordered |= {str(instance.id) for instance in self._ours()}

    def _start_head_process(self) -> None:
        self._what_exists_may_stay()
        self.given_back.clear()
        self.rented.clear()
        folder = Path(self.folder.name) / f"head-{self.heads}"
        self.head = self.world.provider("head", **self.settings(), state_folder=str(folder))

    def _head_process_lives_with_its_machine(self) -> None:
        if not any(instance.label.startswith("bruno-ray:demo:h0") for instance in self._ours()):
            self._what_exists_may_stay()
            self.given_back.clear()
            self.head = None


@pytest.mark.slow
def test_no_history_loses_money() -> None:
    live_through(RUNS, derandomize=True)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(max(600, 12 * NIGHTLY_RUNS))
def test_no_new_history_loses_money() -> None:
    live_through(NIGHTLY_RUNS, derandomize=False)


def live_through(runs: int, derandomize: bool) -> None:
    """So many histories of up to STEPS steps."""
    histories = settings(
        max_examples=runs,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        derandomize=derandomize,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    begun = ClusterHistory.begun
    run_state_machine_as_test(ClusterHistory, settings=histories)
    assert ClusterHistory.begun - begun >= runs


@contextlib.contextmanager
def found_history(listing_lag_s: float, workers: int | None, cheap: bool = True) -> Iterator[ClusterHistory]:
    """A history that was found: it begins so, and the budget holds after what is done in it."""
    history = ClusterHistory()
    try:
        history.begin(5.0, listing_lag_s, 0.0, foreign=1, workers=workers, stopped_is_cheap=cheap)
        yield history
        history.the_budget_holds()
        history.the_dust_settles()
    finally:
        history.folder.cleanup()


def test_what_nobody_can_be_asked_about_counts_for_the_budget() -> None:
    """Found by a history: two successors in a row, while the list lags and single instances cannot be asked for."""
    with found_history(100.0, workers=3, cheap=False) as history:
        history.autoscaler_dies_while_renting()
        history.the_api_goes_and_comes(Fault.TOO_FREQUENT, ONE_INSTANCE)
        history.autoscaler_dies_while_renting()


def test_a_machine_that_its_host_has_stopped_counts_in_full() -> None:
    """Found by a history: the API lists it at the price of its disk, and it may start again at any time."""
    with found_history(0.0, workers=1) as history:
        [head] = [instance for instance in history._ours() if ":h0" in instance.label]
        history.world.vast.outbid(head.id)
        history.autoscaler_dies_while_renting()


def test_nothing_is_rented_beside_a_machine_that_was_stopped_before_its_head_first_saw_it() -> None:
    """Found by a history: a new head remembers nothing, and finds an outbid worker at the price of its disk."""
    with found_history(0.0, workers=3) as history:
        history.world.vast.host_deletes(next(each.id for each in history._ours() if ":h0" in each.label))
        history._head_process_lives_with_its_machine()
        history._wait(20, step=5.0)
        history.world.vast.outbid(next(each.id for each in history._ours() if ":w" in each.label))
        history.ray_up()
        assert history.head is not None
        history.autoscaler_dies_while_renting()


def test_a_stopped_machine_that_is_asked_for_by_itself_counts_in_full() -> None:
    """Found by a history: the list lags, and what an earlier process rented is asked for one by one."""
    with found_history(40.0, workers=None) as history:
        history.ray_up()
        history._wait(60, step=20.0)
        history.autoscaler_dies_while_renting()
        history.world.vast.outbid(next(each.id for each in history._ours() if ":w" in each.label))
        history.autoscaler_dies_while_renting()
