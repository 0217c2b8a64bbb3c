"""Which offers qualify, in which order, and what is said when none does."""

from pathlib import Path

import pytest

from cluster.errors import ClusterSettingsError, NoOfferError
from cluster.settings import NodeSettings, Requirements
from cluster.vast.disk import DEFAULT_DISK_GB, ModelSize, disk_for, model_size
from cluster.vast.models import Offer
from cluster.vast.offers import rank, search_query
from tests.cluster.fake_vast.state import FakeOffer


def offer(number: int = 1, **fields: object) -> Offer:
    return Offer.model_validate(FakeOffer(id=number, machine_id=100 + number, **fields).row(60.0))


RTX = Requirements(gpu_names=("RTX 4090",), num_gpus=1)


@pytest.mark.parametrize(
    ("requirement", "missing", "meeting"),
    [
        ({"gpu_names": ("H100 SXM",)}, {}, {"gpu_name": "H100 SXM"}),
        ({"num_gpus": 8}, {"num_gpus": 4}, {"num_gpus": 8}),
        ({"min_gpu_ram_gb": 48}, {}, {"gpu_ram": 49140.0}),
        ({"min_cpus": 32}, {}, {"cpu_cores_effective": 32.0}),
        ({"min_ram_gb": 128}, {}, {"cpu_ram": 128000.0}),
        ({"min_reliability": 0.99}, {"reliability2": 0.98}, {"reliability2": 0.99}),
        ({"verified": True}, {"verification": "unverified"}, {"verification": "verified"}),
        ({"max_price_per_hour": 0.40}, {"dph_base": 0.40}, {"dph_base": 0.38}),
        ({"locations": ("DE", "NL")}, {"geolocation": "Texas, US"}, {"geolocation": "Utrecht, NL"}),
        ({"min_cuda": 13.0}, {}, {"cuda_max_good": 13.0}),
        ({"min_download_mbps": 1000}, {}, {"inet_down": 1000.0}),
    ],
)
def test_each_requirement_excludes_by_its_own_name(requirement: dict, missing: dict, meeting: dict) -> None:
    requirements = Requirements(**requirement)
    ranking = rank([offer(1, **missing), offer(2, **meeting)], requirements, 60.0)
    assert [ranked.offer.id for ranked in ranking.accepted] == [2]
    assert [rejection.reasons for rejection in ranking.rejected] == [tuple(requirement)]


def test_too_little_disk_and_avoided_machines_are_rejected() -> None:
    ranking = rank([offer(1, disk_space=59.0), offer(2), offer(3)], RTX, 60.0, avoided=frozenset({102}))
    assert [ranked.offer.id for ranked in ranking.accepted] == [3]
    assert [rejection.reasons[0].split()[0] for rejection in ranking.rejected] == ["disk_gb", "avoided"]


def test_the_order_is_by_useful_cost_not_by_price() -> None:
    cheap_slow = offer(1, dph_base=0.30, inet_down=200.0)  # 140 GB take 1.6 of 4 hours
    dear_fast = offer(2, dph_base=0.40, inet_down=5000.0)
    assert [r.offer.id for r in rank([cheap_slow, dear_fast], RTX, 60.0, model_gb=140.0).accepted] == [2, 1]
    assert [r.offer.id for r in rank([cheap_slow, dear_fast], RTX, 60.0).accepted] == [1, 2]


def test_a_machine_of_eight_is_compared_per_gpu_and_a_head_per_machine() -> None:
    single, eight = offer(1, dph_base=0.35), offer(2, num_gpus=8, dph_base=2.0)
    useful = {
        n: rank([o], Requirements(num_gpus=n), 60.0).accepted[0].useful_cost for n, o in ((1, single), (8, eight))
    }
    assert useful[8] < useful[1]
    assert [r.offer.id for r in rank([single, eight], Requirements(), 60.0).accepted] == [1, 2]


def test_an_interruptible_machine_is_priced_and_capped_by_the_bid() -> None:
    requirements = Requirements(interruptible=True, bid_margin=0.2)
    row = offer(1, min_bid=0.10, dph_base=0.10)
    [ranked] = rank([row], requirements, 60.0).accepted
    assert ranked.bid == pytest.approx(0.12)
    assert ranked.price_per_hour == pytest.approx(0.12 + (row.dph_total - row.min_bid))
    capped = Requirements(interruptible=True, bid_margin=0.2, max_price_per_hour=0.115)
    assert rank([row], capped, 60.0).rejected[0].reasons == ("max_price_per_hour",)
    assert search_query(requirements, 60.0)["type"] == "bid"


def test_no_offer_says_which_requirement_excludes_how_many() -> None:
    offers = [offer(1, dph_base=2.0), offer(2, dph_base=2.0, reliability2=0.5), offer(3, reliability2=0.5)]
    with pytest.raises(NoOfferError) as none_left:
        rank(offers, Requirements(max_price_per_hour=1.0), 60.0).best()
    assert "3 offers" in str(none_left.value)
    assert "max_price_per_hour excludes 2 (1 of them by itself)" in str(none_left.value)
    assert "min_reliability excludes 2 (1 of them by itself)" in str(none_left.value)
    with pytest.raises(NoOfferError, match="none of these GPUs"):
        rank([], RTX, 60.0).best()


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
