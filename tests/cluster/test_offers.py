"""Which offers qualify, in which order, and what is said when none does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ClusterSettingsError, NoOfferError
from cluster.settings import NodeSettings, Requirements
from cluster.vast.disk import DEFAULT_DISK_GB, ModelSize, disk_for, model_size
from cluster.vast.models import Offer
from cluster.vast.offers import ENOUGH_OFFERS, Wanted, find_offers, rank
from tests.cluster.fake_vast.cluster import ImitatedCluster
from tests.cluster.fake_vast.state import FakeOffer


def offer(number: int = 1, **fields: object) -> Offer:
    return Offer.model_validate(FakeOffer(id=number, machine_id=100 + number, **fields).row(60.0))


def wanted(disk_gb: float = 60.0, model_gb: float = 0.0, min_cuda: float = 0.0, **requirements: Any) -> Wanted:
    needs = Requirements(**requirements)
    return Wanted(needs, disk_gb, max(min_cuda, needs.min_cuda), model_gb)


RTX = wanted(gpu_names=("RTX 4090",), num_gpus=1)


@pytest.mark.parametrize(
    ("requirement", "missing", "meeting"),
    [
        ({"gpu_names": ("H100 SXM",)}, {}, {"gpu_name": "H100 SXM"}),
        ({"num_gpus": 8}, {"num_gpus": 4}, {"num_gpus": 8}),
        ({"min_gpu_ram_gb": 48}, {}, {"gpu_ram": 49140.0}),
        ({"min_cpus": 32}, {}, {"cpu_cores_effective": 32.0}),
        ({"min_ram_gb": 128}, {}, {"cpu_ram": 128000.0}),
        ({"min_ram_gb": 60}, {"cpu_ram": 256000.0, "cpu_cores": 128.0}, {"cpu_ram": 512000.0, "cpu_cores": 128.0}),
        ({"min_ram_gb": 60}, {"cpu_ram": 256000.0, "cpu_cores": None, "gpu_frac": 0.125}, {}),
        ({"min_reliability": 0.99}, {"reliability2": 0.98}, {"reliability2": 0.99}),
        ({"min_reliability": 0.99}, {"reliability2": None}, {"reliability2": None, "reliability": 0.995}),
        ({"verified": True}, {"verification": "unverified"}, {"verification": "verified"}),
        ({"max_price_per_hour": 0.40}, {"dph_base": 0.40}, {"dph_base": 0.38}),
        ({"locations": ("DE", "NL")}, {"geolocation": "Texas, US"}, {"geolocation": "Utrecht, NL"}),
        ({"min_cuda": 13.0}, {}, {"cuda_max_good": 13.0}),
        ({"min_download_mbps": 1000}, {}, {"inet_down": 1000.0}),
        ({"max_traffic_price_per_gb": 0.01}, {"inet_down_cost": 0.02}, {"inet_down_cost": None}),
        ({"max_traffic_price_per_gb": 0.01}, {"inet_up_cost": 0.02}, {}),
        ({"min_duration_h": 168.0}, {"duration": 3 * 86400.0}, {"duration": None}),
    ],
)
def test_each_requirement_excludes_by_its_own_name(requirement: dict, missing: dict, meeting: dict) -> None:
    ranking = rank([offer(1, **missing), offer(2, **meeting)], wanted(**requirement))
    assert [ranked.offer.id for ranked in ranking.accepted] == [2]
    assert [rejection.reasons for rejection in ranking.rejected] == [tuple(requirement)]


def test_too_little_disk_and_avoided_machines_are_rejected() -> None:
    ranking = rank([offer(1, disk_space=59.0), offer(2), offer(3)], RTX, avoided=frozenset({102}))
    assert [ranked.offer.id for ranked in ranking.accepted] == [3]
    assert [rejection.reasons[0].split()[0] for rejection in ranking.rejected] == ["disk_gb", "avoided"]


def test_the_order_is_by_useful_cost_not_by_price() -> None:
    cheap_slow = offer(1, dph_base=0.30, inet_down=200.0)  # 140 GB take 1.6 of 4 hours
    dear_fast = offer(2, dph_base=0.40, inet_down=5000.0)
    assert [r.offer.id for r in rank([cheap_slow, dear_fast], replace(RTX, model_gb=140.0)).accepted] == [2, 1]
    assert [r.offer.id for r in rank([cheap_slow, dear_fast], RTX).accepted] == [1, 2]


def test_what_the_host_takes_for_traffic_counts() -> None:
    cheap, free = offer(1, dph_base=0.30, inet_down_cost=0.02), offer(2, dph_base=0.35, inet_down_cost=0.0)
    large = rank([cheap, free], replace(RTX, model_gb=140.0)).accepted
    assert [ranked.offer.id for ranked in large] == [2, 1]
    assert [ranked.traffic_cost for ranked in large] == pytest.approx([0.0, 0.02 * 146])
    assert [ranked.offer.id for ranked in rank([cheap, free], RTX).accepted] == [1, 2]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"direct_port_count": 0}, "no direct ssh port"),
        ({"cpu_arch": "arm64"}, "no amd64 and nvidia"),
        ({"gpu_arch": "amd"}, "no amd64 and nvidia"),
    ],
)
def test_what_cannot_work_is_rejected_whatever_is_required(fields: dict, reason: str) -> None:
    ranking = rank([offer(1, **fields), offer(2)], wanted())
    assert [ranked.offer.id for ranked in ranking.accepted] == [2]
    assert ranking.rejected[0].reasons == (reason,)


def test_what_is_rented_by_now_is_rejected() -> None:
    row = {**FakeOffer(id=1, machine_id=101).row(60.0), "rented": True}
    assert rank([Offer.model_validate(row)], wanted()).rejected[0].reasons == ("not rentable",)


def test_a_machine_of_eight_is_compared_per_gpu_and_a_head_per_machine() -> None:
    single, eight = offer(1, dph_base=0.35), offer(2, num_gpus=8, dph_base=2.0)
    useful = {n: rank([o], wanted(num_gpus=n)).accepted[0].useful_cost for n, o in ((1, single), (8, eight))}
    assert useful[8] < useful[1]
    assert [r.offer.id for r in rank([single, eight], wanted()).accepted] == [1, 2]


def test_an_interruptible_machine_is_priced_and_capped_by_the_bid() -> None:
    bidding = wanted(interruptible=True, bid_margin=0.2)
    row = offer(1, min_bid=0.10, dph_base=0.10)
    [ranked] = rank([row], bidding).accepted
    assert ranked.bid == pytest.approx(0.12)
    assert ranked.price_per_hour == pytest.approx(0.12 + (row.dph_total - row.min_bid))
    capped = wanted(interruptible=True, bid_margin=0.2, max_price_per_hour=0.115)
    assert rank([row], capped).rejected[0].reasons == ("max_price_per_hour",)
    assert rank([offer(2, min_bid=0.0)], bidding).rejected[0].reasons == ("no lowest bid",)
    assert bidding.query()["type"] == "bid"


def test_no_offer_says_which_requirement_excludes_how_many() -> None:
    offers = [offer(1, dph_base=2.0), offer(2, dph_base=2.0, reliability2=0.5), offer(3, reliability2=0.5)]
    with pytest.raises(NoOfferError) as none_left:
        rank(offers, wanted(max_price_per_hour=1.0)).best()
    assert "3 offers" in str(none_left.value)
    assert "max_price_per_hour excludes 2 (1 of them by itself)" in str(none_left.value)
    assert "min_reliability excludes 2 (1 of them by itself)" in str(none_left.value)
    with pytest.raises(NoOfferError, match="none of these GPUs"):
        rank([], RTX).best()


def test_a_rare_machine_is_found_in_a_large_market(tmp_path: Path) -> None:
    """One search brings 64, cheapest first, and the cheapest are no good."""
    world = ImitatedCluster.make(tmp_path, offers=0)
    world.vast.add_offers(300, dph_base=0.05, reliability2=0.9)
    world.vast.add_slices(8, machine_id=90, num_gpus=1, dph_base=0.1, cpu_ram=512000.0)
    [box] = world.vast.add_offers(1, num_gpus=8, dph_base=2.0)
    needed = {"num_gpus": 8, "min_reliability": 0.99}
    assert [r.offer.id for r in find_offers(world.client(), wanted(**needed)).accepted] == [box.id]
    assert len(world.api.searches) == 1
    world.api.ignored_filters |= {"reliability2", "num_gpus"}
    assert find_offers(world.client(), wanted(**needed, max_price_per_hour=3.0)).accepted == ()


def test_filters_that_are_not_applied_cost_pages_and_no_mistake(tmp_path: Path) -> None:
    world = ImitatedCluster.make(tmp_path, offers=0)
    world.vast.add_offers(150, direct_port_count=0)
    good = {offer.id for offer in world.vast.add_offers(10)}
    ranking = find_offers(world.client(), RTX)
    assert {ranked.offer.id for ranked in ranking.accepted} == good and not ranking.is_sample
    starts = [search["dph_total"].get("gte") if "dph_total" in search else None for search in world.api.searches]
    assert len(starts) == 3 and starts[0] is None and 0 < starts[1] < starts[2]


def test_the_search_ends_when_there_is_a_choice(tmp_path: Path) -> None:
    world = ImitatedCluster.make(tmp_path, offers=200)
    ranking = find_offers(world.client(), RTX)
    assert len(world.api.searches) == 1 and len(ranking.accepted) == 64 >= ENOUGH_OFFERS


def test_a_slice_does_not_pass_for_the_whole_machine(tmp_path: Path) -> None:
    world = ImitatedCluster.make(tmp_path, offers=0)
    world.vast.add_slices(8, machine_id=90, cpu_ram=256000.0)
    with pytest.raises(NoOfferError, match=r"of 8 offers min_ram_gb excludes 8 \(8 of them by itself\)"):
        find_offers(world.client(), wanted(min_ram_gb=160)).best()
    assert len(find_offers(world.client(), wanted(min_ram_gb=32)).accepted) == 8


def test_the_explanation_is_searched_for_only_where_nothing_will_do(tmp_path: Path) -> None:
    world = ImitatedCluster.make(tmp_path, offers=100)
    with pytest.raises(NoOfferError, match="of the cheapest 64 offers min_gpu_ram_gb excludes 64"):
        find_offers(world.client(), wanted(min_gpu_ram_gb=80)).best()
    filtered, unfiltered = world.api.searches
    assert "gpu_ram" in filtered and "gpu_ram" not in unfiltered


def test_names_are_understood_as_the_command_line_writes_them() -> None:
    assert Requirements(gpu_names=("RTX_4090", " H100_SXM")).gpu_names == ("RTX 4090", "H100 SXM")


def test_the_image_says_which_driver_it_needs() -> None:
    node = NodeSettings.from_config({"image": "vastai/base-image:cuda-12.8.1-auto", "disk_gb": 40})
    assert Wanted.of(node).min_cuda == 12.8
    assert rank([offer(1, cuda_max_good=12.4)], Wanted.of(node)).rejected[0].reasons == ("min_cuda",)
    newer = NodeSettings.from_config({"image": "mine", "requirements": {"min_cuda": 13.0}})
    assert newer.min_cuda == 13.0


@pytest.mark.parametrize(
    ("size", "disk"),
    [
        (None, DEFAULT_DISK_GB),
        (ModelSize.of_gb(1.0), 22.0),
        (ModelSize.of_gb(16.0), 52.0),  # 8B
        (ModelSize.of_gb(65.5), 200.0),  # 32B
        (ModelSize(18.0, 32.8), 200.0),  # 32B in four bits
        (ModelSize.of_gb(141.0), 302.0),  # 70B
        (ModelSize(40.0, 70.6), 300.0),
    ],
)
def test_disk_by_the_rule(size: ModelSize | None, disk: float) -> None:
    assert disk_for(size) == pytest.approx(disk)


def test_the_size_of_a_local_model_counts_its_weights_once(tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(b"0" * 3000)
    (tmp_path / "model-2.safetensors").write_bytes(b"0" * 2000)
    (tmp_path / "pytorch_model.bin").write_bytes(b"0" * 5000)
    assert model_size(str(tmp_path)).gb == pytest.approx(5e-6)


def test_a_model_whose_size_is_unknown_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ClusterSettingsError, match="no weights"):
        model_size(str(tmp_path))
    with pytest.raises(ClusterSettingsError, match="model_size_gb"):
        model_size("nobody/no-such-model")


def test_node_settings_refuse_unknown_keys_and_two_sizes() -> None:
    with pytest.raises(ClusterSettingsError, match=r"node_config\.requirements\.gpu_nmae"):
        NodeSettings.from_config({"requirements": {"gpu_nmae": "H100"}})
    with pytest.raises(ClusterSettingsError, match="not both"):
        NodeSettings.from_config({"model": "a/b", "model_size_gb": 16})
