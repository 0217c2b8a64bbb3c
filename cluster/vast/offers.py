"""From requirements to ranked offers, with the reason why each other one was rejected.

One search brings 64 offers at most, so Vast.ai is asked for what is required (`Wanted.query`) and for the next 64 by
price while too few of them will do. It does not apply every filter every time, so everything is judged here again.
Where nothing will do, one search without the filters shows which requirement excludes how many (`explain`).

Offers are ranked by cost per useful GPU-hour: the price per GPU and hour, and what the host takes for the bytes that
come in, divided by the share of the time that is useful. Lost are the time to boot and to download the model, spread
over `PLANNED_HOURS`, and the host's downtime. A node that needs no particular GPUs (the head) is ranked by the cost of
the machine instead.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import NoOfferError
from cluster.settings import NodeSettings, Requirements
from cluster.vast.client import OFFERS_PER_SEARCH, VastClient
from cluster.vast.disk import ModelSize, disk_for
from cluster.vast.models import Offer

PLANNED_HOURS = 4.0
"""How long a machine is expected to be kept."""

BOOT_HOURS = 0.1
"""From renting to the first trial, without the model's download."""

INSTALLED_GB = 6.0
"""What a machine downloads besides its model: parts of the image that its host lacks, and this project's packages."""

ENOUGH_OFFERS = 32
"""So many that will do are a choice; the search does not go on for more."""

MOST_PAGES = 4
"""Of ten searches a minute, all processes of this machine together."""


@dataclass(frozen=True)
class Wanted:
    """What is searched for."""

    requirements: Requirements
    disk_gb: float
    min_cuda: float = 0.0
    model_gb: float = 0.0
    """What each machine downloads before it is useful."""

    @classmethod
    def of(cls, node: NodeSettings) -> "Wanted":
        size = None if node.model_size_gb is None else ModelSize.of_gb(node.model_size_gb)
        return cls(node.requirements, node.disk_gb or disk_for(size), node.min_cuda, node.model_size_gb or 0.0)

    @property
    def download_gb(self) -> float:
        return INSTALLED_GB + self.model_gb

    def query(self, dearer_than: float | None = None) -> dict[str, Any]:
        """Vast.ai's search for what will do, cheapest first; `dearer_than` begins at that price."""
        needs = self.requirements
        query = self.everything()
        least = {
            "gpu_ram": 1000 * needs.min_gpu_ram_gb,
            "cpu_cores_effective": needs.min_cpus,
            "cpu_ram": 1000 * needs.min_ram_gb,
            "disk_space": self.disk_gb,
            "reliability2": needs.min_reliability,
            "inet_down": needs.min_download_mbps,
            "cuda_max_good": self.min_cuda,
            "direct_port_count": 1,
            "duration": 3600 * needs.min_duration_h,
        }
        query |= {name: {"gte": value} for name, value in least.items() if value}
        query |= {
            "inet_down_cost": {"lte": needs.max_traffic_price_per_gb},
            "cpu_arch": {"eq": "amd64"},
            "gpu_arch": {"eq": "nvidia"},
        }
        if needs.num_gpus is not None:
            query["num_gpus"] = {"eq": needs.num_gpus}
        if needs.verified:
            query["verified"] = {"eq": True}
        if needs.locations:
            query["geolocation"] = {"in": list(needs.locations)}
        price = {}
        if dearer_than is not None:
            price["gte"] = dearer_than
        if needs.max_price_per_hour is not None:
            price["lte"] = needs.max_price_per_hour
        return {**query, "dph_total": price} if price else query

    def everything(self) -> dict[str, Any]:
        """Vast.ai's search for all that is free of this kind, priced with our disk."""
        query: dict[str, Any] = {
            "rentable": {"eq": True},
            "rented": {"eq": False},
            "external": {"eq": False},
            "type": "bid" if self.requirements.interruptible else "on-demand",
            "allocated_storage": self.disk_gb,
            "order": [["dph_total", "asc"]],
            "limit": OFFERS_PER_SEARCH,
        }
        if self.requirements.gpu_names:
            query["gpu_name"] = {"in": list(self.requirements.gpu_names)}
        return query


@dataclass(frozen=True)
class RankedOffer:
    """An offer that meets the requirements."""

    offer: Offer

    price_per_hour: float
    """Dollars, with the disk; for an interruptible machine with our bid."""

    bid: float | None
    """What to bid, in dollars per hour; None rents on demand."""

    traffic_cost: float
    """Dollars, once, for what the machine downloads before it is useful."""

    useful_cost: float
    """Dollars per useful GPU-hour (per useful hour of the machine where GPUs do not matter)."""


@dataclass(frozen=True)
class RejectedOffer:
    offer: Offer

    reasons: tuple[str, ...]
    """Names of the requirements that it misses, as in cluster.yaml; never empty."""


@dataclass(frozen=True)
class Ranking:
    accepted: tuple[RankedOffer, ...]
    """Best first."""

    rejected: tuple[RejectedOffer, ...]

    is_sample: bool = False
    """There are more offers than were looked at."""

    def explanation(self) -> str:
        """Which requirement excludes how many, and how many would qualify without it."""
        if not self.rejected:
            return f"{len(self.accepted)} offers, none rejected"
        missed = Counter(reason for rejection in self.rejected for reason in rejection.reasons)
        alone = Counter(rejection.reasons[0] for rejection in self.rejected if len(rejection.reasons) == 1)
        parts = [
            f"{reason} excludes {count}" + (f" ({alone[reason]} of them by itself)" if alone[reason] else "")
            for reason, count in missed.most_common()
        ]
        kind = "of the cheapest" if self.is_sample else "of"
        return f"{kind} {len(self.accepted) + len(self.rejected)} offers " + ", ".join(parts)

    def best(self) -> tuple[RankedOffer, ...]:
        """The accepted offers. Raises `NoOfferError` that says which requirement to relax."""
        if not self.accepted:
            found = self.explanation() if self.rejected else "the search found none of these GPUs at all"
            raise NoOfferError(f"no machine on offer meets the requirements: {found}; relax one in cluster.yaml")
        return self.accepted


def find_offers(client: VastClient, wanted: Wanted, avoided: frozenset[int] = frozenset()) -> Ranking:
    """What could be rented now, best first; where that is nothing, what excludes the cheapest of this kind.

    Args:
        avoided: machine ids that failed a while ago; their offers are rejected as "avoided".

    Raises `VastError`.
    """
    found: dict[int, Offer] = {}
    ranking, price, cut = Ranking((), ()), None, True
    for _ in range(MOST_PAGES):
        page = client.search_offers(wanted.query(price))
        fresh = {offer.id: offer for offer in page.offers if offer.id not in found}
        found |= fresh
        ranking, cut = rank(list(found.values()), wanted, avoided), page.cut
        if not page.cut or not fresh or len(ranking.accepted) >= ENOUGH_OFFERS:
            break
        price = max(offer.dph_total for offer in page.offers)
    if not ranking.accepted:
        page = client.search_offers(wanted.everything())
        found |= {offer.id: offer for offer in page.offers}
        ranking, cut = rank(list(found.values()), wanted, avoided), page.cut
    return replace(ranking, is_sample=cut)


def rank(offers: list[Offer], wanted: Wanted, avoided: frozenset[int] = frozenset()) -> Ranking:
    """Judge `offers`."""
    accepted, rejected = [], []
    for offer in offers:
        priced = _priced(offer, wanted)
        reasons = _shortcomings(priced, wanted, avoided)
        if reasons:
            rejected.append(RejectedOffer(offer, reasons))
        else:
            accepted.append(priced)
    accepted.sort(key=lambda ranked: (ranked.useful_cost, ranked.offer.id))
    return Ranking(tuple(accepted), tuple(rejected))


def _priced(offer: Offer, wanted: Wanted) -> RankedOffer:
    requirements = wanted.requirements
    price, bid = offer.dph_total, None
    if requirements.interruptible:
        bid = round(offer.min_bid * (1 + requirements.bid_margin), 4)
        price = bid + max(offer.dph_total - offer.min_bid, 0.0)  # what is left of the total is the disk
    download_hours = 8000 * wanted.model_gb / offer.inet_down / 3600 if offer.inet_down else 0.0
    traffic = wanted.download_gb * offer.inet_down_cost
    kept = max(1 - (BOOT_HOURS + download_hours) / PLANNED_HOURS, 0.01)
    useful = kept * max(offer.uptime, 0.01)
    gpus = offer.num_gpus if requirements.num_gpus else 1
    return RankedOffer(offer, price, bid, traffic, (price + traffic / PLANNED_HOURS) / max(gpus, 1) / useful)


def _shortcomings(ranked: RankedOffer, wanted: Wanted, avoided: frozenset[int]) -> tuple[str, ...]:
    offer, requirements = ranked.offer, wanted.requirements
    cap = requirements.max_price_per_hour
    misses = {
        "avoided (failed a while ago)": offer.machine_id in avoided,
        "not rentable": offer.rentable is False or offer.rented is True,
        "no amd64 and nvidia": offer.cpu_arch not in ("", "amd64") or offer.gpu_arch not in ("", "nvidia"),
        "no direct ssh port": offer.direct_port_count == 0,
        "no lowest bid": requirements.interruptible and offer.min_bid <= 0,
        "gpu_names": bool(requirements.gpu_names) and offer.gpu_name not in requirements.gpu_names,
        "num_gpus": requirements.num_gpus is not None and offer.num_gpus != requirements.num_gpus,
        "min_gpu_ram_gb": offer.gpu_ram < 1000 * requirements.min_gpu_ram_gb,
        "min_cpus": offer.cpu_cores_effective < requirements.min_cpus,
        "min_ram_gb": offer.container_ram < 1000 * requirements.min_ram_gb,
        "disk_gb": offer.disk_space < wanted.disk_gb,
        "min_reliability": offer.uptime < requirements.min_reliability,
        "verified": requirements.verified and not offer.is_verified,
        "max_price_per_hour": cap is not None and ranked.price_per_hour > cap,
        "locations": bool(requirements.locations) and offer.country not in requirements.locations,
        "min_cuda": offer.cuda_max_good < wanted.min_cuda,
        "min_download_mbps": offer.inet_down < requirements.min_download_mbps,
        "max_traffic_price_per_gb": max(offer.inet_down_cost, offer.inet_up_cost)
        > requirements.max_traffic_price_per_gb,
        "min_duration_h": offer.duration is not None and offer.duration < 3600 * requirements.min_duration_h,
    }
    return tuple(reason for reason, missed in misses.items() if missed)
