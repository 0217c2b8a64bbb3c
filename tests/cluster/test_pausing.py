"""A cluster that is paused: its head keeps its disk, is billed for that alone, and goes on, or stays stopped."""

from pathlib import Path

import pytest

from cluster.errors import NodeError
from cluster.node_provider import VastNodeProvider
from cluster.renting.pausing import cost_per_day
from cluster.renting.tags import Label, Pause
from cluster.vast.errors import VastError
from tests.cluster.fake_vast.api import Fault
from tests.cluster.fake_vast.cluster import NODE_CONFIG, ImitatedCluster, head_tags
from tests.cluster.fake_vast.state import FakeInstance
from tests.support.provider_helpers import READY, billed, create_worker, later

HOUR = 3600.0
ONE_INSTANCE = r"/v0/instances/\d+/$"


@pytest.fixture
def laptop(world: ImitatedCluster) -> VastNodeProvider:
    """With a head that is set up and runs."""
    laptop = world.provider("laptop")
    [head] = laptop.create_node(NODE_CONFIG, head_tags(), 1)
    later(world, 60, laptop)
    laptop.set_node_tags(head, READY)
    return laptop


def the_head(world: ImitatedCluster) -> FakeInstance:
    [head] = [instance for instance in world.vast.billed() if ":h0" in instance.label]
    return head


@pytest.mark.parametrize("stopped_is_cheap", [False, True])
def test_the_books_are_those_of_the_host(
    world: ImitatedCluster, laptop: VastNodeProvider, stopped_is_cheap: bool
) -> None:
    """Twice paused; whatever a stopped machine's row says of its price."""
    world.vast.stopped_is_cheap = stopped_is_cheap
    head = the_head(world)
    booting = head.price * world.vast.boot_s / HOUR  # our books count the whole price from creation on
    downloads = laptop.cost().so_far - head.price * (world.clock.time() - head.created_at) / HOUR
    for _ in range(2):
        later(world, HOUR, laptop, step=60)
        laptop.pause()
        laptop.cluster_nodes(force=True)
        assert world.vast.status(head) == "stopped"
        assert laptop.cost().per_hour == pytest.approx(head.storage_price)
        later(world, 10 * HOUR, laptop, step=600)
        laptop.resume()
        later(world, 60, laptop)
        assert world.vast.status(head) == "running" and laptop.cost().per_hour == pytest.approx(head.price)
    books, truth = laptop.cost().so_far - downloads, world.vast.cost_of(head)
    assert truth <= books + 1e-4 and books == pytest.approx(truth + booting, abs=0.02)
    assert books < 0.3 * 22 * head.price, "20 of 22 hours were paused"
    assert world.provider("elsewhere").cost().so_far == pytest.approx(laptop.cost().so_far), "it is in the label"


def test_what_a_run_has_cost_counts_a_pause_for_its_disk(world: ImitatedCluster, laptop: VastNodeProvider) -> None:
    head = the_head(world)
    on_head, begun = world.provider("head"), world.clock.time()
    later(world, HOUR, on_head, step=60)
    laptop.pause()
    world.clock.sleep(10 * HOUR)
    laptop.resume()
    again = world.provider("head")
    later(world, HOUR, again, step=60)
    expected = 2 * head.price + 10 * head.storage_price
    cost = again._ledger.cost_between(begun, world.clock.time())
    assert cost == pytest.approx(expected, rel=0.05)


def test_workers_are_destroyed_and_the_head_goes_on_with_what_is_on_it(
    world: ImitatedCluster, laptop: VastNodeProvider
) -> None:
    on_head = world.provider("head")
    for _ in range(2):
        on_head.set_node_tags(create_worker(on_head), READY)
    head = the_head(world)
    assert laptop.pause() == []
    assert billed(world) == {str(head.id)}
    laptop.resume()
    create_worker(world.provider("head"))
    assert the_head(world) is head and len(billed(world)) == 2


def test_hours_do_not_pass_while_it_is_paused(world: ImitatedCluster) -> None:
    laptop = world.provider("laptop", budget={"max_hours": 3})
    [head] = laptop.create_node(NODE_CONFIG, head_tags(), 1)
    later(world, HOUR, laptop, step=60)
    laptop.set_node_tags(head, READY)
    laptop.pause()
    later(world, 20 * HOUR, laptop, step=600)
    laptop.resume()
    on_head = world.provider("head", budget={"max_hours": 3})
    worker = create_worker(on_head)
    on_head.set_node_tags(worker, READY)
    later(world, 1.5 * HOUR, on_head, step=60)
    assert worker in on_head.non_terminated_nodes({})
    later(world, 0.6 * HOUR, on_head, step=60)
    assert worker not in on_head.non_terminated_nodes({})


def test_one_whose_place_is_taken_stays_stopped_and_does_not_start_by_itself(
    world: ImitatedCluster, laptop: VastNodeProvider
) -> None:
    """Vast.ai refuses, or takes the order and lets it wait: both are answered here, in turns."""
    head = the_head(world)
    laptop.pause()
    later(world, 60, laptop)
    for _ in range(2):
        world.vast.place_is_taken(head.id, True)
        with pytest.raises(NodeError, match="cannot be started now"):
            laptop.resume()
        world.vast.place_is_taken(head.id, False)
        assert world.vast.status(head) == "stopped" and not head.waits
        assert laptop.cost().per_hour == pytest.approx(head.storage_price)
    laptop.resume()
    assert world.vast.status(head) == "running"


def test_an_order_that_cannot_be_taken_back_is_said_loudly(world: ImitatedCluster, laptop: VastNodeProvider) -> None:
    head = the_head(world)
    laptop.pause()
    world.vast.place_is_taken(head.id, True)
    laptop.cluster_nodes(force=True)
    asked = laptop._client.instance

    def then_the_api_is_away(*arguments: float) -> object:
        world.api.outage, world.api.outage_path = Fault.SERVER_ERROR, ONE_INSTANCE
        return asked(*arguments)

    laptop._client.instance = then_the_api_is_away  # type: ignore[method-assign]
    world.api._shapes = iter([0, *range(1000)])  # the order is taken
    with pytest.raises(NodeError, match="START BY ITSELF"):
        laptop.resume()


def test_where_the_head_cannot_be_stopped_nothing_is_destroyed(
    world: ImitatedCluster, laptop: VastNodeProvider
) -> None:
    worker = create_worker(world.provider("head"))
    laptop.cluster_nodes(force=True)
    world.api.outage, world.api.outage_path = Fault.SERVER_ERROR, ONE_INSTANCE
    with pytest.raises(VastError):
        laptop.pause()
    world.api.outage = None
    assert billed(world) == {str(the_head(world).id), worker}


def test_no_second_head_is_rented_beside_a_stopped_one(world: ImitatedCluster, laptop: VastNodeProvider) -> None:
    head = the_head(world)
    laptop.pause()
    for where in ("laptop", "elsewhere"):
        with pytest.raises(NodeError, match=f"head {head.id} is stopped, not gone"):
            world.provider(where).create_node(NODE_CONFIG, head_tags(), 1)
    assert billed(world) == {str(head.id)}


def test_a_paused_head_is_neither_lost_nor_complained_of(
    world: ImitatedCluster, laptop: VastNodeProvider, caplog: pytest.LogCaptureFixture
) -> None:
    assert laptop.losses() == []
    laptop.pause()
    later(world, 600, laptop, step=60)
    assert laptop.losses() == [] and "is stopped" not in caplog.text
    world.vast.host_deletes(the_head(world).id)
    later(world, 60, laptop)
    assert len(laptop.losses()) == 1


def test_the_price_of_a_day_is_what_the_host_takes_for_the_disk(
    world: ImitatedCluster, laptop: VastNodeProvider
) -> None:
    [node] = laptop.cluster_nodes(force=True)
    assert cost_per_day(node) == pytest.approx(24 * the_head(world).storage_price)
    world.vast.tells_storage = False
    laptop.pause()
    [node] = laptop.cluster_nodes(force=True)
    assert cost_per_day(node) is None and laptop.cost().per_hour == pytest.approx(the_head(world).price), (
        "too much at most"
    )


def test_down_takes_a_paused_cluster_down(world: ImitatedCluster, laptop: VastNodeProvider) -> None:
    laptop.pause()
    last = world.provider("laptop")
    last.terminate_nodes(last.nodes_for_teardown({}))
    assert billed(world) == set()


@pytest.mark.parametrize("pause", [None, Pause(1.25, 1_800_000_000, 60, True), Pause(0.0, 1_800_000_000, 0, False)])
@pytest.mark.parametrize("spent", [0.0, 12.34])
def test_the_label_says_it(pause: Pause | None, spent: float) -> None:
    hashes = ("0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef")
    label = Label("demo", "head", 0, "up-to-date", spent, hashes, pause)
    assert Label.parse(label.text()) == label and len(label.text()) < 256
    without = Label.parse(label.text(with_hashes=False))
    assert without is not None and without.pause == pause and without.spent == spent


def test_a_label_of_before_is_read(tmp_path: Path) -> None:
    label = Label.parse("bruno-ray:demo:h0:up-to-date:12.34:ASNFZ4mrze8BI0VniavN7wEjRWc:iavN7wEjRWeJq83vASNFZ4mrze8")
    assert label is not None and label.spent == 12.34 and label.pause is None and all(label.hashes)
