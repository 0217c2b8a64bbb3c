"""How much of the weights an edit changes."""

import math
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from bruno_ray.ablation.closed_forms import Factors, apply_to_columns, apply_to_weight
from bruno_ray.ablation.resolving import ResolvedEdit, part_of
from bruno_ray.model.architectures import Architecture
from bruno_ray.model.readers import Reader
from bruno_ray.model.writers import Matrix, Writer


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
        for matrix in site.matrices:
            weight = matrix.read().float()
            before[site.component] += float(weight.square().sum())
            for edit, squares in zip(edits, changed):
                factors = edit.factors[i]
                if factors is not None:
                    edited = _edited(site, matrix, weight, factors.to(weight.device), edit)
                    squares[site.component] += float((edited - weight).square().sum())
    return [
        {name: math.sqrt(squares[name] / total) if total else 0.0 for name, total in before.items()}
        for squares in changed
    ]


def _edited(site: Writer | Reader, matrix: Matrix, weight: Tensor, factors: Factors, edit: ResolvedEdit) -> Tensor:
    """As ``baking.bake`` writes it."""
    if isinstance(site, Reader):
        return apply_to_weight(weight, factors)
    for chosen, columns in site.chosen(part_of(edit.edit, site)):
        if chosen is matrix:
            return apply_to_columns(weight, factors, columns)
    return weight
