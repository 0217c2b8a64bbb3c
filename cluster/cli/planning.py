"""What `cluster up` says before it rents: which machines, at what price, for how long, and whether the money lasts."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bruno_ray.files import write_json
from cluster.errors import ClusterSettingsError, RefusedError
from cluster.jobs.session import Session
from cluster.renting.estimate import Machine, Study, estimate
from cluster.renting.tags import ClusterNode
from cluster.vast.models import State
from cluster.vast.offers import PLANNED_HOURS, RankedOffer

logger = logging.getLogger(__name__)

LAST_STUDY = "last_study.json"
"""In the cluster's folder: trials and seconds of the study that was last looked at."""


def plan(session: Session, heads: Sequence[ClusterNode], study: Study | None) -> list[str]:
    """What `up` is about to do and what that costs, as lines. Raises `RefusedError` where the credit does not last."""
    config, budget = session.config, session.settings.budget
    head_type = config["head_node_type"]
    lines = [f"cluster {session.name} on {session.settings.vast_url}, from {session.config_file}"]
    offered: list[Machine] = []
    if heads:
        what = ", ".join(f"{node.id} at {node.instance.dph_total:.3f} $/h" for node in heads)
        stopped = any(node.instance.state is State.STOPPED for node in heads)
        state = "is stopped and is started again" if stopped else "is there already and is brought up to date"
        lines.append(f"head: instance {what} {state}; nothing is rented for it")
        head = Machine(sum(node.instance.dph_total for node in heads))
    else:
        best = session.provider.offers(config["available_node_types"][head_type]["node_config"]).best()[0]
        lines.append(f"head: rents {describe(best)} now")
        head = Machine.of(best)
    for name, node_type in config["available_node_types"].items():
        most = min(node_type.get("max_workers", 0), config.get("max_workers", 0))
        if name == head_type or not most:
            continue
        least = node_type.get("min_workers", 0)
        ranking = session.provider.offers(node_type["node_config"])
        what = f"nothing on offer now ({ranking.explanation()})"
        if ranking.accepted:
            what = describe(ranking.accepted[0])
            model_gb = node_type["node_config"].get("model_size_gb", 0.0)
            offered += [Machine.of(ranking.accepted[0], model_gb)] * most
        lines.append(f"{name}: {least} workers from the beginning, up to {most} when jobs ask for them; now {what}")
    spent = session.provider.cost().so_far
    hours = "" if budget.max_hours is None else f" and {budget.max_hours:g} h"
    lines.append(
        f"budget: at most {budget.max_price_per_hour:.2f} $/h, {budget.max_total_cost:.2f} $ in total{hours};"
        f" {spent:.2f} $ spent so far"
    )
    dearest = sorted(offered, key=lambda machine: machine.price_per_hour, reverse=True)[: config.get("max_workers", 0)]
    wanted = head.price_per_hour + sum(machine.price_per_hour for machine in dearest)
    per_hour = min(wanted, max(budget.max_price_per_hour, head.price_per_hour))
    once = head.traffic_cost + sum(machine.traffic_cost for machine in dearest)
    expected = per_hour * (budget.max_hours or PLANNED_HOURS) + once
    left = budget.max_total_cost - spent
    lines.append(estimate_line(head, affordable(head, dearest, per_hour), study, bool(heads), session, left))
    return [*lines, credit_line(session, per_hour, min(expected, left))]


def affordable(head: Machine, workers: Sequence[Machine], per_hour: float) -> list[Machine]:
    """As many of the workers as `per_hour` dollars pay for beside the head."""
    chosen, left = [], per_hour - head.price_per_hour
    for worker in workers:
        if worker.price_per_hour <= left + 1e-9:
            chosen.append(worker)
            left -= worker.price_per_hour
    return chosen


def estimate_line(
    head: Machine, workers: Sequence[Machine], study: Study | None, head_is_up: bool, session: Session, left: float
) -> str:
    """How long it takes and what it costs, with the machines that are on offer now; `left` dollars are left."""
    known = study if workers else None
    made = estimate(head, workers, known, session.settings.budget.max_hours or PLANNED_HOURS, head_is_up)
    parts = [] if head_is_up else [f"head ready after {minutes(made.head_hours)}"]
    if workers:
        parts.append(f"{len(workers)} workers with their model {minutes(made.worker_hours)} later")
    if known is not None:
        copies = sum(worker.copies for worker in workers)
        parts.append(f"{known.trials} trials x {known.seconds:g} s on {copies} GPUs {minutes(made.work_hours)}")
    over = "" if made.total <= left else f", MORE than the {max(left, 0):.2f} $ that are left of max_total_cost"
    return (
        f"estimate: {', '.join(parts) or 'the head alone'}; {minutes(made.hours)} in all: {made.machines:.2f} $ for"
        f" machines and {made.traffic:.2f} $ for their downloads = {made.total:.2f} ${over}"
    )


def minutes(hours: float) -> str:
    return f"{60 * hours:.0f} min" if hours < 3 else f"{hours:.1f} h"


def asked_study(session: Session, trials: int | None, seconds: float | None) -> Study | None:
    """From the command line, and what is not said there from the study that was last looked at; None where unknown.

    Raises `ClusterSettingsError`.
    """
    if (trials is not None and trials < 1) or (seconds is not None and not 0 < seconds < float("inf")):
        raise ClusterSettingsError("command line: --trials and --trial-seconds are numbers above 0")
    last = last_study(session.folder / LAST_STUDY)
    trials, seconds = trials or (last.trials if last else None), seconds or (last.seconds if last else None)
    return None if trials is None or seconds is None else Study(trials, seconds)


def note_study(folder: Path, answer: dict[str, Any]) -> None:
    """Remember how long trials take; `answer` is what the head says of a study's progress."""
    seconds = answer.get("trial_seconds")
    if seconds and answer["target"]:
        write_json(folder / LAST_STUDY, {"trials": answer["target"], "seconds": round(seconds, 2)})


def last_study(file: Path) -> Study | None:
    try:
        return Study(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        logger.warning("%s cannot be read (%s); the estimate does without it", file, error)
        return None


def credit_line(session: Session, per_hour: float, expected: float) -> str:
    """Raises `RefusedError` where the account has less than is `expected` to be spent, in dollars."""
    hours = session.settings.budget.max_hours or PLANNED_HOURS
    plan = f"up to {per_hour:.3f} $/h, {max(expected, 0):.2f} $ within {hours:g} h"
    credit = session.provider.credit()
    if credit is None:
        return f"plan: {plan}; what the account has is not told to this API key (it lacks user_read)"
    if credit < expected and session.settings.budget.credit_must_cover:
        raise RefusedError(
            f"nothing was rented: the account has {credit:.2f} $ and the plan is {plan}; without credit Vast.ai stops"
            " machines and deletes what is on them: add credit, lower max_workers or budget, give --max-hours, or set"
            " budget.credit_must_cover to false where a card is charged by itself"
        )
    return f"plan: {plan}; the account has {credit:.2f} $"


def describe(ranked: RankedOffer) -> str:
    offer = ranked.offer
    return (
        f"offer {offer.id} ({offer.num_gpus} x {offer.gpu_name or 'no GPU'} in {offer.geolocation or '?'}) at"
        f" {ranked.price_per_hour:.3f} $/h, {ranked.traffic_cost:.2f} $ for its downloads"
    )
