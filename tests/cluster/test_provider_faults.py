"""The node provider when offers, machines, hosts and the API fail: nothing is lost, kept or billed by accident."""

from pathlib import Path

import pytest
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import (
    STATUS_UPDATE_FAILED,
    TAG_RAY_NODE_STATUS,
)

from cluster.errors import NodeError
from cluster.vast.errors import VastUnavailableError
from tests.cluster.fake_vast.api import Fault
from tests.cluster.fake_vast.cluster import NODE_CONFIG, ImitatedCluster, head_tags, worker_tags
from tests.support.provider_helpers import READY, WORKERS, billed, create_worker, later


def test_an_offer_taken_by_somebody_else_costs_the_next_one(world: ImitatedCluster) -> None:
    world.api.faults.extend([None, None, Fault.TAKEN, Fault.TAKEN])
    provider = world.autoscaler()
    provider.non_terminated_nodes({})
    node = create_worker(provider)
    assert billed(world) == {node}
    assert world.vast.instances[int(node)].offer.id == 7_000_003


def test_a_creation_that_fails_after_the_contract_leaves_nothing(world: ImitatedCluster) -> None:
    provider = world.autoscaler()
    provider.non_terminated_nodes({})
    world.api.faults.extend([None, Fault.FAILS_AFTER_CONTRACT])
    node = create_worker(provider)
    assert billed(world) == {node}
    later(world, 120, provider)
    assert billed(world) == {node}


def test_a_contract_that_cannot_be_destroyed_yet_is_tried_until_it_is(world: ImitatedCluster) -> None:
    provider = world.autoscaler()
    provider.non_terminated_nodes({})
    world.api.faults.extend([None, Fault.FAILS_AFTER_CONTRACT, *[Fault.SERVER_ERROR] * 12])
    with pytest.raises(NodeLaunchException, match="cannot be destroyed yet"):
        create_worker(provider)
    assert len(billed(world)) == 1
    later(world, 60, provider)
    assert billed(world) == set()


@pytest.mark.parametrize("fault", [Fault.LOST_ANSWER, Fault.GARBAGE, Fault.NOTHING])
def test_a_creation_whose_answer_is_lost_is_found_by_its_mark(world: ImitatedCluster, fault: Fault) -> None:
    provider = world.autoscaler()
    provider.non_terminated_nodes({})
    world.api.faults.extend([None, fault])
    node = create_worker(provider)
    assert billed(world) == {node}
    later(world, 120, provider)
    assert billed(world) == {node}


def test_a_creation_whose_answer_is_lost_and_that_is_listed_late_is_destroyed(tmp_path: Path) -> None:
    world = ImitatedCluster.make(tmp_path, listing_lag_s=40.0)
    provider = world.autoscaler()
    provider.non_terminated_nodes({})
    world.api.faults.extend([None, Fault.LOST_ANSWER])
    with pytest.raises(NodeLaunchException, match="will be destroyed when it is listed"):
        create_worker(provider)
    assert len(billed(world)) == 1
    later(world, 60, provider)
    assert billed(world) == set()


def test_an_outage_is_bridged_and_nothing_is_taken_for_gone(world: ImitatedCluster) -> None:
    provider = world.autoscaler()
    node = create_worker(provider)
    later(world, 40, provider)
    for outage in (Fault.SERVER_ERROR, Fault.TOO_FREQUENT, Fault.GARBAGE, Fault.NOTHING, Fault.SILENCE):
        world.api.outage = outage
        later(world, 60, provider)
        assert provider.non_terminated_nodes(WORKERS) == [node] and provider.is_running(node)
        assert not provider.safe_to_scale()
        world.api.outage = None
        later(world, 30, provider)
        assert provider.safe_to_scale()
    world.api.outage = Fault.SERVER_ERROR
    with pytest.raises(VastUnavailableError):
        later(world, 1200, provider)
    with pytest.raises(VastUnavailableError):
        provider.non_terminated_nodes({})


def test_the_laptop_never_takes_down_a_cluster_from_memory(world: ImitatedCluster) -> None:
    provider = world.provider("laptop")
    provider.create_node(NODE_CONFIG, head_tags(), 1)
    world.api.outage = Fault.SERVER_ERROR
    with pytest.raises(VastUnavailableError):
        provider.nodes_for_teardown({})


def test_a_failed_destruction_is_an_error_on_the_laptop_and_repeated_on_the_head(world: ImitatedCluster) -> None:
    laptop, head = world.provider("laptop"), world.autoscaler()
    first, second = create_worker(head), create_worker(head)
    laptop.non_terminated_nodes({})
    world.api.outage = Fault.SERVER_ERROR
    with pytest.raises(NodeError, match="repeat the command"):
        laptop.terminate_nodes([first])
    head.terminate_nodes([second])
    assert second in head.non_terminated_nodes(WORKERS), "it is still billed"
    world.api.outage = None
    later(world, 30, head)
    assert billed(world) == {first}
    laptop.terminate_node(first)
    assert billed(world) == set()


def test_a_destroyed_instance_that_the_api_goes_on_listing_is_hidden(tmp_path: Path) -> None:
    world = ImitatedCluster.make(tmp_path, destroying_lag_s=30.0)
    provider = world.autoscaler()
    node = create_worker(provider)
    later(world, 40, provider)
    provider.terminate_node(node)
    later(world, 40, provider, step=2)
    assert provider.non_terminated_nodes(WORKERS) == []


def test_a_worker_deleted_by_its_host_is_gone_and_a_head_that_is_stopped_is_not(world: ImitatedCluster) -> None:
    head = world.provider("head")
    [head_id] = world.provider("laptop").create_node(NODE_CONFIG, head_tags(), 1)
    worker = create_worker(head)
    later(world, 40, head)
    world.vast.host_deletes(int(worker))
    world.vast.outbid(int(head_id))
    later(world, 60, head)
    assert head.non_terminated_nodes({}) == [head_id]
    assert not head.is_running(head_id)
    assert billed(world) == {head_id}, "a head may hold the only copy of a study"


def test_an_instance_missing_from_one_list_is_asked_for_before_it_is_given_up(
    world: ImitatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = world.autoscaler()
    node = create_worker(provider)
    later(world, 40, provider)
    monkeypatch.setattr(world.vast, "listed", list)
    later(world, 30, provider)
    assert provider.non_terminated_nodes(WORKERS) == [node]


def test_a_restarted_process_asks_for_what_it_knew_and_the_list_lacks(tmp_path: Path) -> None:
    world = ImitatedCluster.make(tmp_path, listing_lag_s=100.0)
    first = world.autoscaler()
    node = create_worker(first)
    assert first.non_terminated_nodes(WORKERS) == [node]
    assert world.autoscaler().non_terminated_nodes(WORKERS) == [node]


# Machines that fail.


def test_an_outbid_machine_is_lost_and_destroyed(world: ImitatedCluster) -> None:
    config = {**NODE_CONFIG, "requirements": {**NODE_CONFIG["requirements"], "interruptible": True}}
    provider = world.autoscaler()
    [node] = provider.create_node(config, worker_tags(), 1)
    assert world.vast.instances[int(node)].bid == pytest.approx(0.18)
    later(world, 40, provider)
    provider.set_node_tags(node, READY)
    world.vast.outbid(int(node))
    later(world, 5, provider)
    assert not provider.is_running(node)
    later(world, 30, provider)
    assert provider.is_terminated(node) and billed(world) == set()


@pytest.mark.parametrize("failure", ["stuck in loading", "ssh never answers", "set-up failed", "deleted while booting"])
def test_a_machine_that_does_not_join_is_destroyed_and_avoided_for_a_while(
    world: ImitatedCluster, failure: str
) -> None:
    provider = world.autoscaler(boot_timeout_s=300, join_timeout_s=300, avoid_machine_s=3600)
    node = create_worker(provider)
    machine = world.vast.instances[int(node)].offer.machine_id
    if failure == "stuck in loading":
        world.vast.never_boots(int(node))
        later(world, 310, provider)
    elif failure == "ssh never answers":
        later(world, 350, provider)
    elif failure == "set-up failed":
        later(world, 60, provider)
        provider.set_node_tags(node, {TAG_RAY_NODE_STATUS: STATUS_UPDATE_FAILED})
        provider.terminate_node(node)
    else:
        later(world, 10, provider)
        world.vast.host_deletes(int(node))
        later(world, 10, provider)
    assert provider.is_terminated(node) and billed(world) == set()
    again = create_worker(world.autoscaler(avoid_machine_s=3600))  # a restart of the autoscaler remembers
    assert world.vast.instances[int(again)].offer.machine_id != machine
    provider.terminate_node(again)
    world.clock.sleep(3700)
    assert world.vast.instances[int(create_worker(provider))].offer.machine_id == machine


NO_CONTAINER = "Error response from daemon: failed to create task: OCI runtime create failed: nvidia-container-cli"
NO_IMAGE = "Error response from daemon: manifest for mine:latest not found: manifest unknown"


@pytest.mark.parametrize(
    ("status", "message"),
    [("loading", NO_CONTAINER), ("created", NO_CONTAINER), ("exited", None), ("offline", None), ("unknown", None)],
)
def test_a_machine_that_will_never_boot_is_destroyed_at_once_and_avoided(
    world: ImitatedCluster, status: str, message: str | None
) -> None:
    provider = world.autoscaler()
    node = create_worker(provider)
    later(world, 5, provider)
    world.vast.cannot_boot(int(node), status, message)
    later(world, 15, provider)
    assert provider.is_terminated(node) and billed(world) == set()
    again = create_worker(provider)
    machines = [world.vast.instances[int(name)].offer.machine_id for name in (node, again)]
    assert machines[0] != machines[1]


def test_how_far_an_image_is_is_no_error(world: ImitatedCluster) -> None:
    provider = world.autoscaler()
    node = create_worker(provider)
    for message in ("Pulling from vastai/base-image", "a1b2c3: Verifying Checksum", "a1b2c3: Download complete"):
        world.vast.cannot_boot(int(node), "loading", message)
        later(world, 60, provider)
    assert provider.non_terminated_nodes(WORKERS) == [node]


def test_an_image_that_does_not_exist_is_not_tried_on_one_machine_after_the_other(world: ImitatedCluster) -> None:
    provider = world.autoscaler()
    node = create_worker(provider)
    world.vast.cannot_boot(int(node), "loading", NO_IMAGE)
    later(world, 15, provider)
    assert billed(world) == set()
    with pytest.raises(NodeLaunchException, match=r"is no use.*manifest unknown"):
        create_worker(provider)
    later(world, 700, provider)
    create_worker(provider)


def test_a_machine_that_publishes_more_than_ssh_is_destroyed(world: ImitatedCluster) -> None:
    published = {"8265/tcp": [{"HostIp": "0.0.0.0", "HostPort": "41000"}], "9000/tcp": None}
    provider = world.autoscaler()
    node = create_worker(provider)
    world.vast.instances[int(node)].ports = {"9000/tcp": None}
    later(world, 60, provider)
    assert provider.is_running(node), "exposed is not published"
    world.vast.instances[int(node)].ports = published
    later(world, 15, provider)
    assert billed(world) == set()
    with pytest.raises(NodeLaunchException, match=r"publishes 8265/tcp.*allowed_ports"):
        create_worker(provider)
    allowing = world.provider("head", allowed_ports=["22/tcp", "8265/tcp"])
    node = create_worker(allowing)
    world.vast.instances[int(node)].ports = published
    later(world, 60, allowing)
    assert allowing.is_running(node)


def test_a_head_that_cannot_boot_is_destroyed_by_the_ray_up_that_waits_for_it(world: ImitatedCluster) -> None:
    laptop = world.provider("laptop")
    [head] = laptop.create_node(NODE_CONFIG, head_tags(), 1)
    later(world, 5, laptop)
    world.vast.cannot_boot(int(head), "loading", NO_CONTAINER)
    later(world, 15, laptop)
    assert laptop.is_terminated(head) and billed(world) == set()


def test_a_worker_is_replaced_before_its_contract_ends(tmp_path: Path) -> None:
    world = ImitatedCluster.make(tmp_path, offers=0)
    world.vast.add_offers(3, duration=86400.0 + 60)
    provider = world.autoscaler()
    node = create_worker(provider)
    later(world, 60, provider)
    provider.set_node_tags(node, READY)
    later(world, 86400 - 3600, provider, step=300)
    assert provider.is_running(node)
    later(world, 2400, provider)
    assert billed(world) == set()


def test_a_bid_that_is_paused_for_a_moment_goes_on(world: ImitatedCluster) -> None:
    config = {**NODE_CONFIG, "requirements": {**NODE_CONFIG["requirements"], "interruptible": True}}
    provider = world.autoscaler()
    [node] = provider.create_node(config, worker_tags(), 1)
    later(world, 60, provider)
    provider.set_node_tags(node, READY)
    world.vast.outbid(int(node))
    later(world, 10, provider)
    world.vast.host_back(int(node))
    later(world, 60, provider)
    assert provider.is_running(node)


def test_a_machine_that_joined_is_kept_and_one_given_back_is_not_avoided(world: ImitatedCluster) -> None:
    provider = world.autoscaler(boot_timeout_s=300, join_timeout_s=300)
    node = create_worker(provider)
    later(world, 60, provider)
    provider.set_node_tags(node, READY)
    later(world, 2000, provider)
    assert provider.is_running(node)
    machine = world.vast.instances[int(node)].offer.machine_id
    provider.terminate_node(node)
    assert world.vast.instances[int(create_worker(provider))].offer.machine_id == machine


def test_a_silent_host_is_given_three_minutes(world: ImitatedCluster) -> None:
    provider = world.autoscaler()
    node = create_worker(provider)
    later(world, 40, provider)
    provider.set_node_tags(node, READY)
    world.vast.host_offline(int(node))
    later(world, 120, provider)
    world.vast.host_back(int(node))
    later(world, 120, provider)
    assert provider.is_running(node)
    world.vast.host_offline(int(node))
    later(world, 200, provider)
    assert provider.is_terminated(node) and billed(world) == set()
