"""Whether the budget allows another machine, and when it is over for those that run."""

from dataclasses import dataclass
from enum import Enum

from cluster.errors import BudgetError
from cluster.renting.cost import ClusterCost
from cluster.settings import BudgetSettings
from cluster.vast.offers import RankedOffer

CLOSING_S = 300.0
"""How long before the end jobs are told to stop: Ray gives each half a minute, then what they wrote is on the head."""

LEAST_USE_H = 0.25
"""A machine that could not be kept for so long is not rented: it would be ended before it has done anything."""

LOOK_S = 15.0
"""How far apart two looks at the cost may be; workers are ended so long before the money is spent."""

DESTRUCTION_S = 3.5
"""What the destruction of one machine takes, by the API's limits."""


class Phase(Enum):
    OPEN = "open"
    CLOSING = "closing"
    """Nothing more is rented, jobs are told to stop."""
    OVER = "over"
    """Workers are destroyed."""


@dataclass(frozen=True)
class Limit:
    """How far the cluster is from its end, and what ends it."""

    phase: Phase
    reason: str = ""


def end_of_time(budget: BudgetSettings, began: float | None) -> float | None:
    """Unix seconds at which max_hours are over for a cluster whose head began then; None for never."""
    return None if budget.max_hours is None or began is None else began + 3600 * budget.max_hours


def limit(budget: BudgetSettings, cost: ClusterCost, began: float | None, now: float) -> Limit:
    """Where the cluster stands at Unix time `now`."""
    per_s = cost.per_hour / 3600
    left = budget.max_total_cost - cost.so_far
    end = end_of_time(budget, began)
    spent = f"{cost.so_far:.2f} of max_total_cost {budget.max_total_cost:.2f} dollars are spent"
    late = f"max_hours {budget.max_hours} are over" if end is not None else ""
    over_s = LOOK_S + DESTRUCTION_S * len(cost.nodes)
    for phase, margin_s in ((Phase.OVER, over_s), (Phase.CLOSING, over_s + CLOSING_S)):
        if left <= per_s * margin_s:
            return Limit(phase, spent)
        if end is not None and now >= end - margin_s:
            return Limit(phase, late if now >= end else f"max_hours {budget.max_hours} are nearly over")
    return Limit(Phase.OPEN)


def price_room(budget: BudgetSettings, cost: ClusterCost, reserved: float) -> float:
    """What another machine may cost per hour, in dollars.

    Args:
        reserved: dollars per hour of machines that may exist although the API has not confirmed them.

    Raises `BudgetError` when there is no room at all or the total is spent.
    """
    if cost.so_far >= budget.max_total_cost:
        raise BudgetError(
            f"the budget is spent ({cost.so_far:.2f} of max_total_cost {budget.max_total_cost:.2f} dollars), nothing "
            "more is rented; raise budget.max_total_cost in cluster.yaml, or take the cluster down, which still costs"
        )
    room = budget.max_price_per_hour - cost.per_hour - reserved
    if room <= 0:
        raise over_budget(budget, cost, reserved)
    return room


def over_budget(
    budget: BudgetSettings, cost: ClusterCost, reserved: float, cheapest: float | None = None
) -> BudgetError:
    """The error that says by how much the price per hour does not fit."""
    wanted = "" if cheapest is None else f" and the cheapest machine that qualifies costs {cheapest:.3f}"
    return BudgetError(
        f"the machines cost {cost.per_hour + reserved:.3f} of max_price_per_hour {budget.max_price_per_hour:.3f} "
        f"dollars{wanted}; nothing more is rented; raise budget.max_price_per_hour in cluster.yaml, or do with less"
    )


def is_worth_while(budget: BudgetSettings, cost: ClusterCost, ranked: RankedOffer) -> bool:
    """Whether what is left of the total keeps the machine, beside all others, long enough to be of use."""
    left = budget.max_total_cost - cost.so_far - ranked.traffic_cost
    return left >= LEAST_USE_H * (cost.per_hour + ranked.price_per_hour)


def nearly_spent(budget: BudgetSettings, cost: ClusterCost) -> BudgetError:
    return BudgetError(
        f"the budget is nearly spent ({cost.so_far:.2f} of max_total_cost {budget.max_total_cost:.2f} dollars): "
        f"another machine would be ended within {60 * LEAST_USE_H:.0f} minutes; raise max_total_cost in cluster.yaml"
    )
