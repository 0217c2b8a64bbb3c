"""The node provider against the imitation: what Ray relies on, and that nothing is left billed by accident."""

import itertools
import threading
from pathlib import Path

import pytest
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import (
    STATUS_UNINITIALIZED,
    STATUS_UP_TO_DATE,
    STATUS_WAITING_FOR_SSH,
    TAG_RAY_CLUSTER_NAME,
    TAG_RAY_FILE_MOUNTS_CONTENTS,
    TAG_RAY_LAUNCH_REQUEST,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_RUNTIME_CONFIG,
)

from cluster.errors import ClusterError, NodeError
from cluster.node_provider import VastNodeProvider
from cluster.renting.tags import Label, creation_env, node_of
from cluster.settings import ClusterSettings
from cluster.vast.models import Instance
from tests.cluster.fake_vast.api import Fault
from tests.cluster.fake_vast.cluster import (
    NODE_CONFIG,
    ODD_ROWS,
    PUBLIC_KEY,
    ImitatedCluster,
    head_tags,
    worker_tags,
)
from tests.support.provider_helpers import READY, WORKERS, billed, create_worker, later


def test_a_new_node_is_listed_with_its_tags_at_once_even_if_the_api_is_slow(tmp_path: Path) -> None:
    world = ImitatedCluster.make(tmp_path, listing_lag_s=55.0)
    provider = world.provider("laptop")
    [head] = provider.create_node(NODE_CONFIG, head_tags(), 1)
    assert provider.non_terminated_nodes(head_tags()) == [head]
    for _ in range(20):  # `ray up` asks for 50 seconds
        world.clock.sleep(5)
        assert provider.non_terminated_nodes(head_tags()) == [head]
    assert head in billed(world) and len(billed(world)) == 1


def test_life_of_a_node_as_ray_sees_it(world: ImitatedCluster) -> None:
    provider = world.autoscaler()
    node = create_worker(provider)
    assert not provider.is_running(node) and not provider.is_terminated(node)
    assert provider.external_ip(node) is None
    assert provider.internal_ip(node) == "127.77.0.2"
    later(world, 40, provider)
    assert provider.is_running(node)
    assert provider.external_ip(node) == world.vast.row(world.vast.instances[int(node)])["public_ipaddr"].strip()
    assert provider.get_node_id("127.77.0.2", use_internal_ip=True) == node
    assert provider.get_node_id(str(provider.external_ip(node))) == node
    provider.terminate_node(node)
    assert provider.is_terminated(node) and provider.non_terminated_nodes(WORKERS) == []
    assert provider.node_tags(node)[TAG_RAY_NODE_KIND] == "worker" and provider.internal_ip(node) == "127.77.0.2"
    assert provider.node_tags("12345") == {}
    assert billed(world) == set()


def test_tags_survive_the_process_and_are_the_same_everywhere(world: ImitatedCluster) -> None:
    head, laptop = world.autoscaler(), world.provider("laptop")
    node = create_worker(head, "request-7")
    hashes = {TAG_RAY_RUNTIME_CONFIG: "ab" * 20, TAG_RAY_FILE_MOUNTS_CONTENTS: "cd" * 20}
    head.set_node_tags(node, {**READY, **hashes})
    for reader in (head, laptop, world.autoscaler()):
        tags = reader.node_tags(node)
        assert tags[TAG_RAY_NODE_STATUS] == STATUS_UP_TO_DATE
        assert tags[TAG_RAY_LAUNCH_REQUEST] == "request-7"
        assert tags[TAG_RAY_CLUSTER_NAME] == "demo"
        assert {tag: tags[tag] for tag in hashes} == hashes
        assert reader.non_terminated_nodes(WORKERS | READY) == [node]


def test_a_status_of_the_moment_costs_no_call_and_a_lost_one_is_written_later(world: ImitatedCluster) -> None:
    head = world.autoscaler()
    node = create_worker(head)
    asked = len(world.api.requests)
    head.set_node_tags(node, {TAG_RAY_NODE_STATUS: STATUS_WAITING_FOR_SSH})
    assert head.node_tags(node)[TAG_RAY_NODE_STATUS] == STATUS_WAITING_FOR_SSH
    assert len(world.api.requests) == asked
    world.api.outage = Fault.SERVER_ERROR
    head.set_node_tags(node, READY)
    assert head.node_tags(node)[TAG_RAY_NODE_STATUS] == STATUS_UP_TO_DATE
    world.api.outage = None
    later(world, 30, head)
    assert world.provider("laptop").node_tags(node)[TAG_RAY_NODE_STATUS] == STATUS_UP_TO_DATE


def test_a_label_that_the_api_finds_too_long_still_carries_the_status(world: ImitatedCluster) -> None:
    world.vast.max_label = 60
    head = world.autoscaler()
    node = create_worker(head)
    head.set_node_tags(node, {**READY, TAG_RAY_RUNTIME_CONFIG: "ab" * 20})
    assert world.provider("laptop").node_tags(node)[TAG_RAY_NODE_STATUS] == STATUS_UP_TO_DATE
    assert head.node_tags(node)[TAG_RAY_RUNTIME_CONFIG] == "ab" * 20


def test_tags_fit_into_a_variable_and_are_read_back() -> None:
    label = Label("a" * 24, "worker", 110)
    tags = {**worker_tags("12345678-1234-1234-1234-123456789012", "a_gpu_with_a_very_long_name_4x80gb"), **label.tags}
    env = creation_env(label, tags, "0123456789ab", 1.2345)
    assert max(map(len, env.values())) <= 256
    instance = Instance.model_validate({"id": 1, "label": label.text(), "extra_env": list(env.items())})
    node = node_of(instance, "a" * 24)
    assert node is not None and (node.tags, node.launch, node.traffic) == (tags, "0123456789ab", 1.2345)


def test_labels_fit_and_are_read_back() -> None:
    longest = Label("a" * 24, "head", 0, STATUS_UP_TO_DATE, 1234.56)
    assert len(longest.text()) <= 60
    assert Label.parse(longest.text()) == longest
    hashed = Label("demo", "worker", 17, STATUS_UP_TO_DATE, 0.0, ("ab" * 20, ""))
    assert Label.parse(hashed.text()) == hashed
    assert Label.parse(hashed.text()[:-5]) == Label("demo", "worker", 17, STATUS_UP_TO_DATE)
    for foreign in ("", "bruno-ray", "bruno-ray:demo", "bruno-ray:demo:x1", "my bruno-ray:demo:w1", "ray:demo:w1"):
        assert Label.parse(foreign) is None


def test_instances_of_others_are_neither_seen_nor_touched(world: ImitatedCluster) -> None:
    foreign = world.foreign_instance()
    other_cluster = world.provider("laptop", "demo-two").create_node(NODE_CONFIG, head_tags(), 1)
    provider = world.provider("laptop")
    [own] = provider.create_node(NODE_CONFIG, head_tags(), 1)
    assert provider.nodes_for_teardown({}) == [own]
    for node_id in (str(foreign), *other_cluster, own):
        provider.terminate_node(node_id)
    assert billed(world) == {str(foreign), *other_cluster}


def test_a_node_that_is_relabelled_is_let_go(world: ImitatedCluster) -> None:
    provider = world.autoscaler()
    node = create_worker(provider)
    world.vast.instances[int(node)].label = "kept for something else"
    later(world, 10, provider)
    assert provider.is_terminated(node)
    provider.terminate_node(node)
    assert billed(world) == {node}


def test_one_listing_answers_for_all_nodes_and_every_page_counts(tmp_path: Path) -> None:
    world = ImitatedCluster.make(tmp_path, offers=40)
    provider = world.autoscaler(max_cpus=16, budget={"max_price_per_hour": 100})
    nodes = list(provider.create_node(NODE_CONFIG, worker_tags(), 30))
    later(world, 60, provider)
    world.clock.sleep(10)
    asked = len(world.api.requests)
    assert sorted(provider.non_terminated_nodes(WORKERS)) == sorted(nodes)
    assert all(provider.is_running(node) and provider.node_tags(node) for node in nodes)
    assert len({provider.internal_ip(node) for node in nodes}) == 30
    assert len(world.api.requests) - asked == 2, "30 instances are two pages"


def test_an_index_rests_before_it_is_given_to_another_machine(world: ImitatedCluster) -> None:
    provider = world.autoscaler(index_rest_s=300)
    first = create_worker(provider)
    alias = provider.internal_ip(first)
    provider.terminate_node(first)
    second = create_worker(provider)
    assert provider.internal_ip(second) != alias
    restarted = world.autoscaler(index_rest_s=300)
    assert restarted.internal_ip(create_worker(restarted)) not in (alias, provider.internal_ip(second))
    later(world, 400, provider)
    assert provider.internal_ip(create_worker(provider)) == alias


def test_nodes_for_the_mesh_have_direct_addresses_first_and_none_while_booting(world: ImitatedCluster) -> None:
    head = world.provider("head")
    [head_id] = world.provider("laptop").create_node(NODE_CONFIG, head_tags(), 1)
    worker = create_worker(head)
    supervisor = world.provider("head")
    assert [(node.id, node.index, node.endpoints) for node in supervisor.nodes_for_mesh()] == [
        (head_id, 0, ()),
        (worker, 1, ()),
    ]
    world.clock.sleep(40)
    for node in supervisor.nodes_for_mesh():
        row = world.vast.row(world.vast.instances[int(node.id)])
        assert [endpoint.host for endpoint in node.endpoints] == [row["public_ipaddr"].strip(), row["ssh_host"]]


def test_the_cluster_key_gets_in_and_no_secret_is_shown(world: ImitatedCluster) -> None:
    create_worker(world.autoscaler())
    [instance] = [instance for instance in world.vast.billed() if instance.price]
    assert PUBLIC_KEY in instance.onstart and instance.ssh_keys == [PUBLIC_KEY]
    assert not any(name.startswith("-p") for name in instance.env), "no port is published"
    assert "key-of-container" not in str(world.vast.row(instance))


# Money.


def test_the_price_per_hour_is_never_passed_and_says_so(world: ImitatedCluster) -> None:
    provider = world.autoscaler(budget={"max_price_per_hour": 1.0})
    with pytest.raises(NodeLaunchException, match=r"2 of 5 rented.*max_price_per_hour 1\.000"):
        provider.create_node(NODE_CONFIG, worker_tags(), 5)
    assert len(provider.non_terminated_nodes(WORKERS)) == 2
    assert provider.cost().per_hour <= 1.0
    asked = len(world.api.requests)
    with pytest.raises(NodeLaunchException):
        create_worker(provider)
    assert not any("bundles" in path for _, path in world.api.requests[asked:]), "a refusal stands for a while"
    provider.terminate_node(provider.non_terminated_nodes(WORKERS)[0])
    world.clock.sleep(31)
    create_worker(provider)


def test_the_total_counts_what_is_gone_and_stops_scaling_up(world: ImitatedCluster) -> None:
    provider = world.autoscaler(budget={"max_total_cost": 1.0})
    node = create_worker(provider)
    provider.set_node_tags(node, READY)
    later(world, 2 * 3600, provider, step=60)
    provider.terminate_node(node)
    assert provider.cost().per_hour == 0
    assert provider.cost().so_far == pytest.approx(world.vast.cost() + 0.006, rel=0.01), "6 GB at 0.001 dollars"
    second = create_worker(provider)
    provider.set_node_tags(second, READY)
    later(world, 2 * 3600, provider, step=60)
    with pytest.raises(NodeLaunchException, match="max_total_cost"):
        create_worker(provider)
    assert billed(world) == set()


def test_laptop_and_a_new_head_learn_what_has_been_spent_from_the_label(world: ImitatedCluster) -> None:
    laptop, head = world.provider("laptop"), world.provider("head")
    [head_id] = laptop.create_node(NODE_CONFIG, head_tags(), 1)
    worker = create_worker(head)
    head.set_node_tags(worker, READY)
    later(world, 3600, head, step=60)
    head.terminate_node(worker)
    later(world, 60, head)
    assert laptop.cost().so_far == pytest.approx(world.vast.cost(), rel=0.05, abs=0.05)
    assert laptop.cost().gone > 0.3
    laptop.set_node_tags(head_id, READY)
    world.clock.sleep(10)
    assert world.provider("elsewhere").cost().gone > 0.3, "another writer keeps the account"


def test_the_account_is_closed_when_the_cluster_is_taken_down(world: ImitatedCluster) -> None:
    laptop = world.provider("laptop")
    laptop.create_node(NODE_CONFIG, head_tags(), 1)
    later(world, 3600, laptop, step=60)
    laptop.terminate_nodes(laptop.nodes_for_teardown({}))
    assert billed(world) == set()
    assert world.provider("laptop").cost().so_far == 0


# Several at once.


def test_two_heads_rented_at_the_same_time_become_one(tmp_path: Path) -> None:
    world = ImitatedCluster.make(tmp_path, listing_lag_s=20.0)
    one, two = world.provider("laptop"), world.provider("elsewhere")
    [kept] = one.create_node(NODE_CONFIG, head_tags(), 1)
    two.create_node(NODE_CONFIG, head_tags(), 1)
    assert len(billed(world)) == 2
    with pytest.raises(NodeError, match="at the same time"):
        later(world, 30, two)
    later(world, 30, one, two)
    assert billed(world) == {kept}
    assert one.non_terminated_nodes({}) == two.non_terminated_nodes({}) == [kept]


def test_a_second_ray_up_on_the_same_machine_waits_for_the_first(world: ImitatedCluster) -> None:
    first, second = world.provider("laptop"), world.provider("laptop")
    config = {"provider": {"type": "external"}, "file_mounts": {}}
    first.prepare_for_head_node(config)
    with pytest.raises(NodeError, match="another `ray up` is setting this cluster's head up"):
        second.prepare_for_head_node(config)
    world.provider("elsewhere").prepare_for_head_node(config)


def test_a_head_is_destroyed_by_taking_the_cluster_down_and_by_nothing_else(world: ImitatedCluster) -> None:
    """Ray would replace a head that was rented with another key: one that another computer uses."""
    [head] = world.provider("elsewhere").create_node(NODE_CONFIG, head_tags(), 1)
    laptop = world.provider("laptop")
    with pytest.raises(NodeError, match="rented by another computer"):
        laptop.terminate_node(head)
    assert billed(world) == {head}
    laptop.terminate_nodes(laptop.nodes_for_teardown({}))
    assert billed(world) == set()


def test_a_head_that_never_boots_is_replaced_by_the_next_ray_up(world: ImitatedCluster) -> None:
    laptop = world.provider("laptop", boot_timeout_s=300)
    [head] = laptop.create_node(NODE_CONFIG, head_tags(), 1)
    world.vast.never_boots(int(head))
    world.clock.sleep(310)
    again = world.provider("laptop", boot_timeout_s=300)
    again.non_terminated_nodes({})
    assert again.non_terminated_nodes({}) == [] and billed(world) == set()
    [second] = again.create_node(NODE_CONFIG, head_tags(), 1)
    assert world.vast.instances[int(second)].offer.machine_id != world.vast.instances[int(head)].offer.machine_id


def test_a_head_that_reboots_is_kept(world: ImitatedCluster) -> None:
    laptop = world.provider("laptop", boot_timeout_s=300)
    [head] = laptop.create_node(NODE_CONFIG, head_tags(), 1)
    world.clock.sleep(60)
    laptop.set_node_tags(head, READY)
    world.clock.sleep(3600)
    world.vast.instances[int(head)].forced = "rebooting"
    later(world, 60, laptop)
    assert laptop.non_terminated_nodes({}) == [head]


def test_offers_are_shown_with_what_is_wrong_with_the_rest(world: ImitatedCluster) -> None:
    world.vast.add_offers(2, num_gpus=8)
    ranking = world.autoscaler().offers(NODE_CONFIG)
    assert len(ranking.accepted) == 30 and ranking.rejected == ()
    nothing = {**NODE_CONFIG, "requirements": {**NODE_CONFIG["requirements"], "num_gpus": 4}}
    ranking = world.autoscaler().offers(nothing)
    assert ranking.accepted == () and {rejection.reasons for rejection in ranking.rejected} == {("num_gpus",)}


def test_several_machines_share_a_search(world: ImitatedCluster) -> None:
    provider = world.autoscaler(budget={"max_price_per_hour": 100})
    assert len(provider.create_node(NODE_CONFIG, worker_tags(), 8)) == 8
    create_worker(provider)
    assert len(world.api.searches) == 1
    later(world, 120, provider)
    create_worker(provider)
    assert len(world.api.searches) == 2 and world.api.rates.passed == []


def test_a_refusal_stands_longer_each_time(world: ImitatedCluster) -> None:
    provider = world.autoscaler()
    nothing = {**NODE_CONFIG, "requirements": {**NODE_CONFIG["requirements"], "num_gpus": 4}}
    asked = []
    for _ in range(720):
        before = len(world.api.searches)
        with pytest.raises(NodeLaunchException, match="num_gpus excludes"):
            provider.create_node(nothing, worker_tags(), 1)
        if len(world.api.searches) > before:
            asked.append(world.clock.time())
        world.clock.sleep(5)
    waits = [round(later - earlier, -1) for earlier, later in itertools.pairwise(asked)]
    assert waits[:5] == pytest.approx([30, 60, 120, 240, 480], abs=10) and max(waits) <= 610


def ask_in_vain(world: ImitatedCluster, provider: VastNodeProvider, seconds: float) -> None:
    """The autoscaler asks for one more machine, every ten seconds."""
    end = world.clock.time() + seconds
    while world.clock.time() < end:
        with pytest.raises(NodeLaunchException):
            create_worker(provider)
        later(world, 10, provider, step=10)


@pytest.mark.parametrize("how", ["its host deletes it", "it is given back"])
@pytest.mark.parametrize("reason", ["budget", "market"])
def test_a_machine_that_is_gone_is_replaced_however_long_more_were_refused(
    world: ImitatedCluster, how: str, reason: str
) -> None:
    """A job that asks for more than there is was refused for ten minutes at a time; its losses were, too."""
    head = world.autoscaler(budget={"max_price_per_hour": 0.8 if reason == "budget" else 5.0})
    workers = [create_worker(head) for _ in range(2)]
    for worker in workers:
        head.set_node_tags(worker, READY)
    if reason == "market":
        for offer in world.vast.free_offers():
            offer.hidden = True
    ask_in_vain(world, head, 1500)
    if how == "it is given back":
        head.terminate_node(workers[0])
    else:
        world.vast.host_deletes(int(workers[0]))
    later(world, 20, head)
    create_worker(head)
    assert len(billed(world)) == 2
    searches = len(world.api.searches)
    ask_in_vain(world, head, 600)
    assert len(world.api.searches) <= searches + 10, "and what is too much is refused for longer each time, as before"


def test_what_was_refused_an_hour_ago_makes_no_refusal_longer(world: ImitatedCluster) -> None:
    head = world.autoscaler()
    for offer in world.vast.free_offers():
        offer.hidden = True
    ask_in_vain(world, head, 1500)
    later(world, 3600, head, step=60)
    ask_in_vain(world, head, 10)
    world.vast.add_offers(1)
    later(world, 30, head)
    create_worker(head)


def test_a_used_up_quota_stands_for_all_types_until_midnight(world: ImitatedCluster) -> None:
    provider = world.autoscaler()
    provider.non_terminated_nodes({})
    world.api.faults.append(Fault.QUOTA)
    for node_type in ("gpu", "other"):
        with pytest.raises(NodeLaunchException, match="quota"):
            provider.create_node(NODE_CONFIG, worker_tags(node_type=node_type), 1)
    assert len(world.api.searches) == 0
    midnight = world.clock.time() - world.clock.time() % 86400 + 86400
    later(world, midnight - world.clock.time() - 300, provider, step=60)
    with pytest.raises(NodeLaunchException, match="quota"):
        create_worker(provider)
    later(world, 400, provider)
    create_worker(provider)


def test_no_credit_stops_the_asking(world: ImitatedCluster) -> None:
    provider = world.autoscaler()
    world.vast.credit = 0.0
    for _ in range(20):
        with pytest.raises(NodeLaunchException, match="no credit"):
            create_worker(provider)
        world.clock.sleep(5)
    created = [path for method, path in world.api.requests if method == "PUT" and "/asks/" in path]
    assert len(created) <= 3
    world.vast.credit = 100.0
    later(world, 600, provider)
    create_worker(provider)


def test_two_processes_of_a_machine_ask_for_the_list_once(world: ImitatedCluster) -> None:
    autoscaler, supervisor = world.autoscaler(), world.provider("head")
    node = create_worker(autoscaler)
    for _ in range(60):
        world.clock.sleep(1)
        autoscaler.non_terminated_nodes({})
        assert {found.id for found in supervisor.nodes_for_mesh()} >= {node}
    lists = [path for _, path in world.api.requests if path == "/api/v1/instances/"]
    assert len(lists) <= 14 and world.api.rates.passed == []


def test_what_others_put_into_their_machines_is_kept_nowhere(world: ImitatedCluster) -> None:
    world.vast.instances[world.foreign_instance()].env = {"HF_TOKEN": "hf_somebody_elses"}
    provider = world.autoscaler()
    node = create_worker(provider)
    later(world, 20, provider)
    kept = (provider.folder / "instances.json").read_text()
    assert node in kept and "hf_somebody_elses" not in kept


def test_a_damaged_row_of_ours_is_a_node_that_costs_and_can_be_destroyed(world: ImitatedCluster) -> None:
    provider = world.autoscaler()
    node = create_worker(provider)
    later(world, 20, provider)
    price = provider.cost().per_hour
    world.vast.instances[int(node)].odd = {"dph_total": "n/a", "machine_id": None, "num_gpus": "?"}
    for odd in ODD_ROWS:
        world.vast.instances[world.foreign_instance()].odd = odd
    later(world, 20, provider)
    assert provider.cost().per_hour == price > 0
    laptop = world.provider("laptop")
    assert node in laptop.nodes_for_teardown({})
    laptop.terminate_node(node)
    assert node not in billed(world)


def test_a_second_head_is_refused(world: ImitatedCluster) -> None:
    world.provider("laptop").create_node(NODE_CONFIG, head_tags(), 1)
    with pytest.raises(NodeError, match="has a head already"):
        world.provider("laptop").create_node(NODE_CONFIG, head_tags(), 1)
    assert len(billed(world)) == 1


def test_threads_get_nodes_with_addresses_of_their_own(world: ImitatedCluster) -> None:
    provider = world.autoscaler(budget={"max_price_per_hour": 100})
    created: list[str] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            for node in provider.create_node(NODE_CONFIG, worker_tags(), 3):
                provider.set_node_tags(node, READY)
                created.append(node)
        except ClusterError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len({provider.internal_ip(node) for node in created}) == 18
    assert sorted(created) == sorted(provider.non_terminated_nodes(WORKERS | READY)) == sorted(billed(world))


def test_ray_hands_over_what_the_settings_understand(tmp_path: Path) -> None:
    world = ImitatedCluster.make(tmp_path)
    laptop = world.provider("laptop")
    config = {"provider": {**laptop.provider_config, "_config_cache_path": "/tmp/x"}, "cluster_name": "demo"}
    remote = laptop.prepare_for_head_node(config)
    settings = ClusterSettings.from_provider(remote["provider"])
    assert (settings.role, settings.public_key) == ("head", PUBLIC_KEY)
    assert config["provider"]["role"] == "laptop"


def test_an_uninitialised_status_is_what_a_new_node_has(world: ImitatedCluster) -> None:
    provider = world.autoscaler()
    node = create_worker(provider)
    assert provider.node_tags(node)[TAG_RAY_NODE_STATUS] == STATUS_UNINITIALIZED
    assert world.provider("laptop").node_tags(node)[TAG_RAY_NODE_STATUS] == STATUS_UNINITIALIZED
