"""The edit written into the weights."""

from bruno_ray.ablation.closed_forms import (
    DirectionBank,
    apply_to_weight,
)
from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.resolving import ResolvedEdit, Resolver
from bruno_ray.model.architectures import Architecture


def bake(architecture: Architecture, edit: Edit | ResolvedEdit, bank: DirectionBank | None = None) -> None:
    """Write the edit into the weights: computed in float32, cast back to the stored dtype.

    `bank` is needed unless the edit is resolved. Raises ModelError for quantised or offloaded weights, before any
    weight is changed.
    """
    if isinstance(edit, Edit):
        if bank is None:
            raise ValueError("an edit that is not resolved needs its direction bank")
        edit = Resolver(architecture).resolve_all([edit], bank)[0]
    work = [(writer, factors) for writer, factors in zip(architecture.writers, edit.factors) if factors is not None]
    for writer, _ in work:
        for matrix in writer.matrices:
            matrix.check_writable()
    for writer, factors in work:
        for matrix in writer.matrices:
            matrix.write(apply_to_weight(matrix.read(), factors.to(matrix.device)))
