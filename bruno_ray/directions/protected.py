"""Directions cleaned of what they share with a protected subspace.

A behaviour's direction may overlap with something that has to stay: the refusal of what is rightly refused, code,
another language. With C the rows that span what is protected, a the ridge and lambda the strength,

    d' = unit(d - lambda C^T (C C^T + a I)^-1 C d)

(Wang et al. 2024, https://arxiv.org/abs/2410.03415, with one row and a = 0; with many rows and the ridge, "Surgical
Refusal Ablation", https://arxiv.org/abs/2601.08489). Here C has, per protected set, the leading principal components
of its residuals about the *baseline* mean, so that the shift of the means is among them, each times its singular value
over the set's largest: the ridge then spares directions of which the set says little.

Shapes as in ``directions``: N prompts, P positions, L stream points, R rank, D d_model; C rows of the subspace.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.directions.basis import INDISTINCT, LEAST_LEFT, NEGLIGIBLE, orthonormalise
from bruno_ray.errors import PromptError

Overlaps = dict[str, dict[str, list[float]]]
"""Protected set -> direction set -> per stream point, the share of the direction's squared length in the subspace."""

MARK = "|protect"
"""Before the strength in the name of a cleaned direction set: ``difference_in_means@0|protect0.5``."""


def protect(
    bank: Mapping[str, Float[Tensor, "point rank d_model"]],
    protected_NPLD: Mapping[str, Float[Tensor, "prompt position point d_model"]],
    baseline_NPLD: Float[Tensor, "n_baseline position point d_model"],
    strengths: Sequence[float],
    rank: int,
    ridge: float,
    projected: bool,
    places: Mapping[str, int] | None = None,
) -> tuple[dict[str, Float[Tensor, "point rank d_model"]], Overlaps]:
    """The bank with every direction cleaned at every strength, and how much each overlapped before.

    Args:
        bank: as ``build_bank`` makes it; the direction sets are not kept but at strength 0.
        protected_NPLD: residuals of every protected set, by its name.
        projected: as of ``build_bank``: what is orthogonal to the baseline mean stays so.
        places: names of positions, as of ``build_bank``; when not given, names are numbers.

    Raises:
        PromptError: so much of a direction is protected that less than LEAST_LEFT of its length remains at every point.
    """
    cleaned: dict[str, Tensor] = {}
    overlaps: Overlaps = {name: {} for name in protected_NPLD}
    for name, directions_LRD in bank.items():
        at = [int(place) if places is None else places[place] for place in name.partition("@")[2].split("+")]
        subspaces = {
            of: torch.cat([components(each[:, place], baseline_NPLD[:, place], rank, projected) for place in at], dim=1)
            for of, each in protected_NPLD.items()
        }
        for of, rows_LCD in subspaces.items():
            overlaps[of][name] = overlap(directions_LRD, rows_LCD, ridge).tolist()
        for strength in strengths:
            if strength == 0:
                cleaned[name] = directions_LRD
                continue
            rest_LRD = clean(directions_LRD, torch.cat(list(subspaces.values()), dim=1), strength, ridge)
            if not rest_LRD[1:].any():
                raise PromptError(
                    f"directions {name} lie in what is protected ({', '.join(protected_NPLD)}): less than"
                    f" {LEAST_LEFT:.0%} of their length is left at every layer with strength {strength:g}; lower"
                    " directions.protect_rank or directions.protect_strengths, or give prompts.protect that differ more"
                    " from the target prompts"
                )
            cleaned[f"{name}{MARK}{strength:g}"] = rest_LRD
    return cleaned, overlaps


def components(
    protected_ND: Float[Tensor, "prompt point d_model"],
    baseline_ND: Float[Tensor, "n_baseline point d_model"],
    rank: int,
    projected: bool,
) -> Float[Tensor, "point component d_model"]:
    """Leading principal components of the protected residuals about the baseline mean, float64, the first of length 1
    and the others as much shorter as their singular values are; zero where there are fewer.

    With ``projected``, only what is orthogonal to the baseline mean: a direction that is so too stays so when these
    are taken out of it.
    """
    middle_LD = baseline_ND.mean(dim=0, dtype=torch.float64)
    about_LND = (protected_ND.double() - middle_LD).transpose(0, 1)
    _, sizes_LC, rows_LCD = torch.linalg.svd(about_LND, full_matrices=False)
    sizes_LC, rows_LCD = sizes_LC[:, :rank], rows_LCD[:, :rank]
    rounding_L1 = INDISTINCT * middle_LD.norm(dim=-1, keepdim=True) * about_LND.shape[1] ** 0.5
    largest_L1 = sizes_LC[:, :1].clamp(min=torch.finfo(torch.float64).tiny)
    shares_LC = torch.where(sizes_LC > rounding_L1, sizes_LC / largest_L1, 0.0)
    rows_LCD = rows_LCD * shares_LC[..., None]
    if projected:
        unit_L1D = torch.nn.functional.normalize(middle_LD, dim=-1)[:, None]
        rows_LCD = rows_LCD - (rows_LCD * unit_L1D).sum(dim=-1, keepdim=True) * unit_L1D
    return rows_LCD


def clean(
    directions_LRD: Float[Tensor, "point rank d_model"],
    rows_LCD: Float[Tensor, "point component d_model"],
    strength: float,
    ridge: float,
) -> Float[Tensor, "point rank d_model"]:
    """``unit(d - strength C^T (C C^T + ridge I)^-1 C d)`` for every row, made orthonormal again, in the same order;
    zero where less than LEAST_LEFT of the row's length is left."""
    d_LRD = directions_LRD.double()
    rest_LRD = d_LRD - strength * _shared(d_LRD, rows_LCD, ridge)
    left_LR1 = rest_LRD.norm(dim=-1, keepdim=True) / d_LRD.norm(dim=-1, keepdim=True).clamp(min=NEGLIGIBLE)
    return orthonormalise(torch.where(left_LR1 >= LEAST_LEFT, rest_LRD, 0.0)).float()


def overlap(
    directions_LRD: Float[Tensor, "point rank d_model"],
    rows_LCD: Float[Tensor, "point component d_model"],
    ridge: float,
) -> Float[Tensor, " point"]:
    """Share of the directions' squared length that the rows account for, 0 to 1: d C^T (C C^T + ridge I)^-1 C d over
    d d; of several directions the mean."""
    d_LRD = directions_LRD.double()
    inside_LR = (d_LRD * _shared(d_LRD, rows_LCD, ridge)).sum(dim=-1)
    return inside_LR.sum(dim=-1) / d_LRD.square().sum(dim=(-2, -1)).clamp(min=NEGLIGIBLE)


def _shared(
    d_LRD: Float[Tensor, "point rank d_model"], rows_LCD: Float[Tensor, "point component d_model"], ridge: float
) -> Float[Tensor, "point rank d_model"]:
    """C^T (C C^T + ridge I)^-1 C d for every row d."""
    c_LCD = rows_LCD.double()
    gram_LCC = c_LCD @ c_LCD.mT + ridge * torch.eye(c_LCD.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram_LCC, c_LCD @ d_LRD.mT).mT @ c_LCD
