"""How a trained edit came about, for the report and the card."""

from typing import Any

from bruno_ray.ablation.edit import SHIFTS
from bruno_ray.ablation.plan import PREFIX
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import SelectedRecord

SOURCES = {
    "answers": "desired answers that were given",
    "few-shot answers": "answers of the unedited model with some of those before it as examples",
    "suppress": "answers of the unedited model that show the behaviour",
    "retain": "answers of the unedited model to baseline prompts",
    "induce": "pairs of a baseline prompt and the behaviour's own text, which the subspace must cause",
    "protect": "answers of the unedited model to the prompts whose answers must stay",
    "own behaviour": "answers of the edit in training that still showed the behaviour",
    "agreed answers": "proper answers of the edit in training that it was sure of, and that other edits gave as well",
    "own answers": "proper answers of the edit in training that it was sure of",
}


def training_account(run: RunDirectory, selected: SelectedRecord | None) -> dict[str, Any] | None:
    """What is known of the training of the selected trial; None if it was searched."""
    if selected is None or selected.training is None:
        return None
    training = selected.training
    curves = training.get("curves", {})
    return {
        "rows": plan_rows(training["plan"], training.get("start_layer", training["plan"]["start_layer"])),
        "sources": source_lines(selected),
        "few_shot": training.get("few_shot", []),
        "curves": [(term, [f"{value:.4f}" for value in values]) for term, values in curves.items()],
        "points": max(map(len, curves.values()), default=0),
        "cosines": cosines(run, selected.edit["direction_set"]),
        "cost": f"{training.get('seconds', 0.0):.1f} s, {training.get('tokens', 0):,} tokens forward and back",
    }


def source_lines(selected: SelectedRecord) -> list[str]:
    """What a trained edit was trained on, and how much of it."""
    sources = (selected.training or {}).get("sources", {})
    return [f"{n} {SOURCES.get(name, name)}" for name, n in sources.items()]


def plan_rows(plan: dict[str, Any], start_layer: float | None) -> list[tuple[str, str]]:
    """What was asked for, in words; ``start_layer``: of the start that it came from, None if that was polished."""
    shared = "shared by all layers" if plan["shared"] else "of each layer its own"
    rivals = plan.get("rivals", ())
    polished = plan["base"] and (start_layer is None or not rivals)
    start = "the best searched trial by then, polished"
    if not polished:
        start = f"{plan['start_set']} after layer {plan['start_layer'] if start_layer is None else start_layer:.1f}"
    if rivals:
        start += f", the best of {1 + len(rivals)} starts"
    given = [(term, plan[term]) for term in ("answers", "suppress", "retain")]
    given += [(term, plan[term]) for term in ("induce", "protect", "inform", "entropy") if plan.get(term)]
    until = plan.get("suppress_steps")
    when = {"suppress": "" if until is None else f" in the first {until} steps"}
    weights = ", ".join(f"{term} {weight:.3g}{when.get(term, '')}" for term, weight in given)
    return [
        ("Subspace", f"rank {plan['rank']}, {shared}"),
        ("Start", start),
        ("Weights of the loss", weights),
        ("Steps", f"{plan['steps']} at a learning rate of {plan['learning_rate']:g}"),
        ("Strengths", f"{plan.get('scale', 1.0):g} times what was trained"),
    ]


def cosines(run: RunDirectory, name: str) -> list[tuple[str, str, str]]:
    """Rows (direction set of the bank, cosine with the nearest of its directions, stream point of that)."""
    import torch

    bank = run.load_directions()
    trained_rd = bank[name][-1]
    rows = []
    for other, directions_Prd in bank.items():
        if other.startswith(PREFIX) or other == SHIFTS:
            continue
        # The cosine of the smallest angle between the two subspaces.
        cosine_P = torch.linalg.matrix_norm(directions_Prd @ trained_rd.T, ord=2)
        point = int(cosine_P.argmax())
        where = "the embedding" if point == 0 else f"layer {point - 1}"
        rows.append((other, f"{float(cosine_P[point]):.3f}", where))
    return rows
