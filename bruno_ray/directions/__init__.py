"""From residuals to a bank of directions: tensors in, tensors out, no model and no Ray.

Every method is one file with one function, and one line in ``METHODS``, or comes from outside (``plugins.py``). It
takes the residuals of the target and of the baseline prompts at one position and returns an orthonormal basis per
stream point:

    method(target_NLD, baseline_MLD, rank) -> (L, r, D), r <= rank, float32

Shapes: N, M prompts; P positions (0 the last prompt token, i the i-th answer token, then those of an answer that was
made to begin as baseline answers do); L = n_layers + 1 stream points
(0 the embedding output, l + 1 the residual stream after block l); R = rank; D = d_model.

A row that the residuals do not determine is zero, and ablating zero changes nothing. That happens at the embedding
output, where all prompts end in the same token and so have the same residual, and where fewer prompts than
`rank` were given.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray import plugins
from bruno_ray.directions.basis import orthonormalise
from bruno_ray.directions.concept_cones import concept_cones
from bruno_ray.directions.contrastive_pca import contrastive_pca
from bruno_ray.directions.coordinate_median import coordinate_median
from bruno_ray.directions.difference_in_means import difference_in_means
from bruno_ray.directions.geometric_median import geometric_median
from bruno_ray.directions.probe_pca_ensemble import probe_pca_ensemble
from bruno_ray.directions.self_organising_map import self_organising_map
from bruno_ray.directions.subspace import subspace
from bruno_ray.directions.supervised_probe import supervised_probe
from bruno_ray.directions.variance_normalised import variance_normalised
from bruno_ray.directions.whitened_difference import whitened_difference
from bruno_ray.errors import ModelError, PromptError, SettingsError

logger = logging.getLogger(__name__)

Method = Callable[[Tensor, Tensor, int], Tensor]

METHODS: dict[str, Method] = {
    "difference_in_means": difference_in_means,
    "subspace": subspace,
    "geometric_median": geometric_median,
    "coordinate_median": coordinate_median,
    "variance_normalised": variance_normalised,
    "whitened_difference": whitened_difference,
    "supervised_probe": supervised_probe,
    "contrastive_pca": contrastive_pca,
    "probe_pca_ensemble": probe_pca_ensemble,
    "concept_cones": concept_cones,
    "self_organising_map": self_organising_map,
}

QUANTILE_LIMIT = 2**23  # elements; torch.quantile refuses more than 2**24


def build_bank(
    target_NPLD: Float[Tensor, "n_target position point d_model"],
    baseline_NPLD: Float[Tensor, "n_baseline position point d_model"],
    methods: Sequence[str] = ("difference_in_means",),
    positions: Sequence[int] | Mapping[str, int] = (0,),
    rank: int = 1,
    projected: bool = True,
    winsorize_quantile: float = 1.0,
    joined: bool = False,
) -> dict[str, Float[Tensor, "point rank d_model"]]:
    """Directions of every method at every position, named like ``difference_in_means@0``, or as ``positions`` names
    them.

    With ``joined``, also what all positions together span, of rank ``rank`` times positions, in their order and named
    like ``difference_in_means@0+1+2``: a refusal may lie in one direction before the answer and in another within it.

    Raises:
        SettingsError: a method is unknown, two have one name, or a position was not extracted.
        PromptError: a side has no prompts, or the two sides have the same residuals at every block.
        ModelError: residuals are not finite.
    """
    found: dict[str, Method] = {}
    for name in dict.fromkeys(methods):
        short = plugins.short(name)
        if short in found:
            raise SettingsError(f"directions.methods: two methods are called {short}; rename yours")
        found[short] = plugins.find(name, METHODS, "directions.methods")
    places = positions if isinstance(positions, Mapping) else {str(position): position for position in positions}
    available = min(target_NPLD.shape[1], baseline_NPLD.shape[1])
    if max(places.values(), default=0) >= available:
        raise SettingsError(
            f"directions.positions asks for position {max(places.values())} of {available}: raise"
            " residuals.answer_tokens"
        )
    for side, residuals in (("target", target_NPLD), ("baseline", baseline_NPLD)):
        if len(residuals) == 0:
            raise PromptError(f"there are no {side} prompts to take a direction from: give some in prompts.{side}")
        if not torch.isfinite(residuals).all():
            raise ModelError(f"residuals of {side} prompts are not finite: set model.dtypes to bfloat16 or float32")

    bank = {}
    for place, position in places.items():
        target_NLD = winsorize(target_NPLD[:, position], winsorize_quantile)
        baseline_NLD = winsorize(baseline_NPLD[:, position], winsorize_quantile)
        for name, method in found.items():
            directions_LRD = method(target_NLD, baseline_NLD, rank)
            if projected:
                directions_LRD = project_out(directions_LRD, mean(baseline_NLD))
            bank[f"{name}@{place}"] = directions_LRD
    if joined and len(places) > 1:
        for name in found:
            rows_LRD = torch.cat([bank[f"{name}@{place}"] for place in places], dim=1)
            bank[f"{name}@{'+'.join(places)}"] = orthonormalise(rows_LRD).float()
    for name, directions_LRD in bank.items():
        _check(name, directions_LRD)
    return bank


def mean(residuals_NLD: Float[Tensor, "prompt point d_model"]) -> Float[Tensor, "point d_model"]:
    """Mean over prompts in float64. What the two sides share is far larger than what they differ in."""
    return residuals_NLD.mean(dim=0, dtype=torch.float64)


def project_out(
    directions_LRD: Float[Tensor, "point rank d_model"], mean_LD: Float[Tensor, "point d_model"]
) -> Float[Tensor, "point rank d_model"]:
    """The part of each direction that is orthogonal to a mean residual, made orthonormal again, in the same order.

    Removing a direction that shares a component with the baseline mean also moves baseline prompts ("projected
    abliteration", grimjim 2025). A direction parallel to the mean leaves nothing and becomes zero.
    """
    mean_L1D = mean_LD.double()[:, None]
    return orthonormalise(torch.cat([mean_L1D, directions_LRD.double()], dim=1))[:, 1:].float()


def winsorize(residuals_NLD: Float[Tensor, "prompt point d_model"], quantile: float) -> Float[Tensor, "prompt point d"]:
    """Clamp each prompt's residual at each point to +- the quantile of its own magnitudes; 1 changes nothing.

    Some models carry a few coordinates hundreds of times larger than the rest ("massive activations", Sun et al.
    2024, https://arxiv.org/abs/2402.17762), which would decide the direction alone.
    """
    if quantile >= 1.0:
        return residuals_NLD
    n_prompts = max(1, QUANTILE_LIMIT // residuals_NLD[0].numel())
    clamped = []
    for chunk_NLD in residuals_NLD.split(n_prompts):
        limit_NL1 = torch.quantile(chunk_NLD.abs(), quantile, dim=-1, keepdim=True)
        clamped.append(chunk_NLD.clamp(-limit_NL1, limit_NL1))
    return torch.cat(clamped)


def _check(name: str, directions_LRD: Float[Tensor, "point rank d_model"]) -> None:
    if not torch.isfinite(directions_LRD).all():
        raise ModelError(f"directions {name} are not finite: set model.dtypes to float32")
    empty_LR = (directions_LRD == 0).all(dim=-1)
    if empty_LR[1:, 0].all():
        raise PromptError(
            f"directions {name}: target and baseline prompts have the same residuals at every layer;"
            " give prompt sets that differ in the behaviour"
        )
    if empty_LR[1:].any():
        points = empty_LR.any(dim=-1).nonzero().flatten().tolist()
        logger.info("directions %s: fewer than %d at stream points %s", name, directions_LRD.shape[1], points)
