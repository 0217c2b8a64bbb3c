"""How much of the weights an edit changes."""

import math
from collections import defaultdict
from collections.abc import Sequence

from bruno_ray.ablation.closed_forms import apply_to_columns
from bruno_ray.ablation.resolving import ResolvedEdit, matrices_of
from bruno_ray.model.architectures import Architecture
from bruno_ray.model.writers import Writer


def changed_shares(architecture: Architecture, edits: Sequence[ResolvedEdit]) -> list[dict[str, float]]:
    """Per edit: component -> ||W' - W|| / ||W||, Frobenius norms over all matrices of the component, edited or not.

    Components are those that write to the residual stream, and of those that read from it what some edit touches. A
    bias is no matrix. Each weight is read (and dequantised) once for all edits, and one of them is in memory at a time,
    in float32. Raises ModelError for one that cannot be read.
    """
    before: defaultdict[str, float] = defaultdict(float)
    changed: list[defaultdict[str, float]] = [defaultdict(float) for _ in edits]
    touched = {
        site.component
        for i, site in enumerate(architecture.sites)
        if isinstance(site, Writer) or any(edit.factors[i] is not None for edit in edits)
    }
    for i, site in enumerate(architecture.sites):
        if site.component not in touched:
            continue
        chosen = [{id(matrix): columns for matrix, columns in matrices_of(edit.edit, site)} for edit in edits]
        for matrix in site.matrices:
            weight = matrix.read().float()
            before[site.component] += float(weight.square().sum())
            for edit, columns, squares in zip(edits, chosen, changed):
                factors = edit.factors[i]
                if factors is not None and id(matrix) in columns:
                    edited = apply_to_columns(weight, factors.to(weight.device), columns[id(matrix)])
                    squares[site.component] += float((edited - weight).square().sum())
    return [
        {name: math.sqrt(squares[name] / total) if total else 0.0 for name, total in before.items()}
        for squares in changed
    ]
