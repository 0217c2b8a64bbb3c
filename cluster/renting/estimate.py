"""What a cluster will probably take, in hours and dollars, before anything is rented.

    ready   the head boots, then the workers, each of which downloads what is installed and its model
    work    trials x seconds / copies of the model, where both are known, else the time that was asked for
    price   every machine for the time it is there, and what its host takes for the downloads

It is the price of an undisturbed start with the offers of now. What jobs send and what is fetched is not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.vast.offers import BOOT_HOURS, INSTALLED_GB, RankedOffer

MEGABITS_PER_GB = 8000.0


@dataclass(frozen=True)
class Study:
    """How much work there is."""

    trials: int
    seconds: float
    """Of one trial on one copy of the model."""


@dataclass(frozen=True)
class Machine:
    """One that will be rented, or is there already."""

    price_per_hour: float
    traffic_cost: float = 0.0
    """Dollars, once."""
    download_hours: float = 0.0
    """For what is installed and for the model."""
    copies: int = 0
    """Of the model that it holds: one for each GPU."""

    @classmethod
    def of(cls, ranked: RankedOffer, model_gb: float = 0.0) -> "Machine":
        """A worker, or with no model a head: the head's GPUs do no work."""
        offer = ranked.offer
        hours = MEGABITS_PER_GB * (INSTALLED_GB + model_gb) / offer.inet_down / 3600 if offer.inet_down else 0.0
        return cls(ranked.price_per_hour, ranked.traffic_cost, hours, offer.num_gpus)


@dataclass(frozen=True)
class Estimate:
    """Hours and dollars."""

    head_hours: float
    """Until the head is ready; 0 for one that is."""
    worker_hours: float
    """From then until the slowest worker has its model."""
    work_hours: float
    machines: float
    traffic: float

    @property
    def hours(self) -> float:
        return self.head_hours + self.worker_hours + self.work_hours

    @property
    def total(self) -> float:
        return self.machines + self.traffic


def estimate(
    head: Machine, workers: Sequence[Machine], study: Study | None, hours: float, head_is_up: bool
) -> Estimate:
    """Of `head` and `workers` until `study` is done; without one, or without workers, for so many `hours` in all."""
    head_hours = 0.0 if head_is_up else BOOT_HOURS + head.download_hours
    worker_hours = max((BOOT_HOURS + worker.download_hours for worker in workers), default=0.0)
    copies = sum(worker.copies for worker in workers)
    if study is not None and copies:
        work_hours = study.trials * study.seconds / copies / 3600
    else:
        work_hours = max(hours - head_hours - worker_hours, 0.0)
    per_hour = sum(worker.price_per_hour for worker in workers)
    whole = head_hours + worker_hours + work_hours
    machines = head.price_per_hour * whole + per_hour * (worker_hours + work_hours)
    traffic = (0.0 if head_is_up else head.traffic_cost) + sum(worker.traffic_cost for worker in workers)
    return Estimate(head_hours, worker_hours, work_hours, machines, traffic)
