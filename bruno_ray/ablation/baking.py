"""The edit written into the weights."""

from bruno_ray.ablation.closed_forms import DirectionBank, apply_to_columns
from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.resolving import ResolvedEdit, Resolver, matrices_of
from bruno_ray.model.architectures import Architecture
from bruno_ray.model.writers import Writer


def bake(architecture: Architecture, edit: Edit | ResolvedEdit, bank: DirectionBank | None = None) -> None:
    """Write the edit into the weights: computed in float32, cast back to the stored dtype.

    `bank` is needed unless the edit is resolved. Raises ModelError for quantised or offloaded weights, before any
    weight is changed.
    """
    if isinstance(edit, Edit):
        if bank is None:
            raise ValueError("an edit that is not resolved needs its direction bank")
        edit = Resolver(architecture).resolve_all([edit], bank)[0]
    sites = architecture.sites
    work = [(site, factors) for site, factors in zip(sites, edit.factors) if factors is not None]
    for site, _ in work:
        for matrix in site.matrices:
            matrix.check_writable()
    for site, factors in work:
        for matrix, columns in matrices_of(edit.edit, site):
            matrix.write(apply_to_columns(matrix.read(), factors.to(matrix.device), columns))
        if isinstance(site, Writer) and factors.offset is not None:
            site.add_to_bias(factors.offset)
