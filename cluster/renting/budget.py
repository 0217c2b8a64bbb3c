"""Whether the budget allows another machine."""

from cluster.errors import BudgetError
from cluster.renting.cost import ClusterCost
from cluster.settings import BudgetSettings


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
