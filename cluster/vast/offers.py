"""From requirements to ranked offers, with the reason why each other one was rejected.

Only the kind of GPU is left to Vast.ai's search. Everything else is judged here, because an offer that the search
leaves out cannot be counted, and "no offer" is only useful together with which requirement excludes how many.

Offers are ranked by cost per useful GPU-hour: the price per GPU and hour divided by the share of the time that is
useful. Lost are the time to boot and to download the model, spread over `PLANNED_HOURS`, and the host's downtime.
A node that needs no particular GPUs (the head) is ranked by the cost of the machine instead.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from cluster.errors import NoOfferError
from cluster.settings import Requirements
from cluster.vast.models import Offer

PLANNED_HOURS = 4.0
"""How long a machine is expected to be kept."""

BOOT_HOURS = 0.1
"""From renting to the first trial, without the model's download."""

SEARCH_LIMIT = 1000


@dataclass(frozen=True)
class RankedOffer:
    """An offer that meets the requirements."""

    offer: Offer

    price_per_hour: float
    """Dollars, with the disk; for an interruptible machine with our bid."""

    bid: float | None
    """What to bid, in dollars per hour; None rents on demand."""

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
        return f"{len(self.accepted) + len(self.rejected)} offers: " + ", ".join(parts)

    def best(self) -> tuple[RankedOffer, ...]:
        """The accepted offers. Raises `NoOfferError` that says which requirement to relax."""
        if not self.accepted:
            found = self.explanation() if self.rejected else "the search found none of these GPUs at all"
            raise NoOfferError(f"no machine on offer meets the requirements: {found}; relax one in cluster.yaml")
        return self.accepted


def search_query(requirements: Requirements, disk_gb: float) -> dict[str, Any]:
    """Vast.ai's search for everything worth judging, priced with `disk_gb` of disk."""
    query: dict[str, Any] = {
        "rentable": {"eq": True},
        "rented": {"eq": False},
        "external": {"eq": False},
        "type": "bid" if requirements.interruptible else "on-demand",
        "allocated_storage": disk_gb,
        "order": [["dph_total", "asc"]],
        "limit": SEARCH_LIMIT,
    }
    if requirements.gpu_names:
        query["gpu_name"] = {"in": list(requirements.gpu_names)}
    return query


def rank(
    offers: list[Offer],
    requirements: Requirements,
    disk_gb: float,
    *,
    avoided: frozenset[int] = frozenset(),
    model_gb: float = 0.0,
) -> Ranking:
    """Judge `offers`.

    Args:
        avoided: machine ids that failed a while ago; their offers are rejected as "avoided".
        model_gb: what each machine downloads before it is useful.
    """
    accepted, rejected = [], []
    for offer in offers:
        priced = _priced(offer, requirements, model_gb)
        reasons = _shortcomings(priced, requirements, disk_gb, avoided)
        if reasons:
            rejected.append(RejectedOffer(offer, reasons))
        else:
            accepted.append(priced)
    accepted.sort(key=lambda ranked: (ranked.useful_cost, ranked.offer.id))
    return Ranking(tuple(accepted), tuple(rejected))


def _priced(offer: Offer, requirements: Requirements, model_gb: float) -> RankedOffer:
    price, bid = offer.dph_total, None
    if requirements.interruptible:
        bid = round(offer.min_bid * (1 + requirements.bid_margin), 4)
        price = bid + max(offer.dph_total - offer.min_bid, 0.0)  # what is left of the total is the disk
    download_hours = 8000 * model_gb / offer.inet_down / 3600 if offer.inet_down else 0.0
    kept = max(1 - (BOOT_HOURS + download_hours) / PLANNED_HOURS, 0.01)
    useful = kept * max(offer.reliability2, 0.01)
    gpus = offer.num_gpus if requirements.num_gpus else 1
    return RankedOffer(offer, price, bid, price / max(gpus, 1) / useful)


def _shortcomings(
    ranked: RankedOffer, requirements: Requirements, disk_gb: float, avoided: frozenset[int]
) -> tuple[str, ...]:
    offer = ranked.offer
    cap = requirements.max_price_per_hour
    misses = {
        "avoided (failed a while ago)": offer.machine_id in avoided,
        "not rentable": offer.rentable is False,
        "gpu_names": bool(requirements.gpu_names) and offer.gpu_name not in requirements.gpu_names,
        "num_gpus": requirements.num_gpus is not None and offer.num_gpus != requirements.num_gpus,
        "min_gpu_ram_gb": offer.gpu_ram < 1000 * requirements.min_gpu_ram_gb,
        "min_cpus": offer.cpu_cores_effective < requirements.min_cpus,
        "min_ram_gb": offer.cpu_ram < 1000 * requirements.min_ram_gb,
        "disk_gb": offer.disk_space < disk_gb,
        "min_reliability": offer.reliability2 < requirements.min_reliability,
        "verified": requirements.verified and not offer.is_verified,
        "max_price_per_hour": cap is not None and ranked.price_per_hour > cap,
        "locations": bool(requirements.locations) and offer.country not in requirements.locations,
        "min_cuda": offer.cuda_max_good < requirements.min_cuda,
        "min_download_mbps": offer.inet_down < requirements.min_download_mbps,
    }
    return tuple(reason for reason, missed in misses.items() if missed)
