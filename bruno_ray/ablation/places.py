"""Whether a model has a place for what an edit may change beside all that writes to the residual stream."""

from bruno_ray.ablation.edit import ADDITION, INPUTS
from bruno_ray.ablation.resolving import takes_addition
from bruno_ray.model.architectures import Architecture
from bruno_ray.model.read_sites import READING


def further_places(architecture: Architecture) -> dict[str, str]:
    """Each component of ``INPUTS``, ``ADDITION``, `experts` and `heads` -> why this model has no place for it, in a few
    words; "" where it has."""
    unknown = "" if architecture.family in READING else f"what reads the stream in {architecture.family} is in no table"
    has = {reader.component for reader in architecture.readers}
    mixture = any(writer.experts for writer in architecture.writers)
    stacked = any(writer.stacked > 1 for writer in architecture.writers)
    router = (
        "it is no mixture of experts" if not (mixture or stacked) else unknown or "its routers are no plain matrices"
    )
    found = {name: "" if name in has else (router if name == "router" else unknown) for name in INPUTS}
    with_bias = any(takes_addition(writer) for writer in architecture.writers)
    found[ADDITION] = "" if with_bias else "its attention has no bias at the output, which an addition is baked into"
    sums = "its experts are summed elsewhere" if stacked else "it is no mixture of experts"
    found["experts"] = "" if mixture else sums
    with_heads = any(writer.heads for writer in architecture.writers)
    found["heads"] = "" if with_heads else "its attention is not known by heads"
    return found
