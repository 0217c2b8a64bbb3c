"""Directional ablation as closed forms. Tensors in, tensors out; modules are touched in ``live.py``.

An edit removes a subspace V (rows orthonormal, ``rank`` x ``d_model``) from what a module writes to the residual
stream. With W the module's weight (``d_model`` x ``in``), rho its row norms, What = W / rho, lambda the strength
and A = V What, the edited weight is

    none:  W' = W - lambda V^T (V W)                    weight orthogonalization, Arditi et al. 2024, section 4
    pre:   W' = W - lambda rho (V^T A)                  directions measured against the row-normalised weight
    full:  W' = rho * rownormalise(What - lambda V^T A) row norms preserved (MPOA)

All three are functions of the module's output y = W x (its bias left out): ``y' = scale * (y - left^T (right y))``

    none:  left = lambda V,      right = V        needs no weight: exact on any quantised base
    pre:   left = lambda rho V,  right = V / rho
    full:  as pre, and scale_i = 1 / |row i of What - lambda V^T A|, where, with H = What A^T and G = A A^T,
           |row i|^2 = 1 - 2 lambda sum_k V_ki H_ik + lambda^2 sum_kl V_ki G_kl V_li

so the same small ``Factors`` edit a weight or an activation, and both agree exactly. H is linear in V and
G = V H: once H is known at the bank's points, an interpolated direction costs O(d_model).

Several weights whose outputs are summed (the experts of one block) count as one map [W_1 ... W_E] over the
concatenated inputs: rho is the norm of the concatenated rows, H and G are sums over the experts.

Three further forms are made of the same factors.

* *Some columns.* With the columns in blocks, W = [W_1 ... W_n] (experts of a mixture, heads of an output projection),
  an edit of the blocks S is the edit of [W_s for s in S], whose row norms count. Live it acts on y_S, what these blocks
  write: ``y' = y + (edited(y_S) - y_S)``.
* *What is read.* A weight that reads x becomes W' = W (I - s U^T U), the map x -> x - s U^T U x before W. Where
  x is the residual stream behind a norm with gain g, U spans V diag(g) (``seen_through``): W' responds to what the norm
  makes of V with 1 - s of what W did, and of all such weights it is the nearest to W.
* *Addition.* y' = y - s m, with m the difference of the means that target and baseline prompts have there (contrastive
  activation addition, Rimsky et al. 2023, https://arxiv.org/abs/2312.06681). It is baked into a bias.

Dimension names: d = d_model, r = rank, n = any number of direction rows, L = layers, P = L + 1 stream points.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bruno_ray.ablation.edit import SHIFTS, Edit, NormMode

DirectionBank = dict[str, Tensor]
"""Name of a direction set -> (n_layers + 1, rank, d_model) float32, orthonormal rows per point. Point 0 is the
embedding's output, point l + 1 the residual stream after block l."""

DEAD_ROW = 1e-10
"""Rows of a weight whose norm is at most this share of the largest are left out of `pre` and `full` edits."""

SMALLEST_SEEN = 1e-6
"""Share of the largest gain of a norm below which what comes through of a direction counts as nothing."""

SMALLEST_REMAINDER = 1e-6
"""Floor of |row|^2 / |row before|^2 in `full`: a row that the edit wipes out is not blown up more than 1000 times."""


@dataclass(frozen=True)
class Factors:
    """``y' = scale * (y - left^T (right y)) + offset``; the strength is folded into ``left``."""

    left: Float[Tensor, "r d"]
    right: Float[Tensor, "r d"]
    scale: Float[Tensor, " d"] | None = None
    offset: Float[Tensor, " d"] | None = None
    """Needs a bias to be baked. Of an edit only where it adds a difference of means; see also ``interchanged``."""

    def to(self, device: torch.device) -> "Factors":
        scale, offset = (None if t is None else t.to(device) for t in (self.scale, self.offset))
        return Factors(self.left.to(device), self.right.to(device), scale, offset)


# ----- which direction a layer gets -----


@dataclass(frozen=True)
class Mixture:
    """A layer's direction as a linear map of bank points: ``V = weights @ concat(bank[points])``."""

    points: tuple[int, ...]
    weights: Float[Tensor, "r points*r"]

    def of(self, rows_by_point: Sequence[Float[Tensor, "r d"]]) -> Float[Tensor, "r d"]:
        """The mixture of any quantity that is linear in the direction, one (r, d) tensor per point."""
        if len(self.points) == 1:
            return rows_by_point[0]
        rows = torch.cat([row.double() for row in rows_by_point])
        return (self.weights.to(rows.device) @ rows).float()


def mixture(directions_Prd: Float[Tensor, "P r d"], direction_index: float) -> Mixture:
    """Which bank points make the global direction at a float layer index.

    It is the normalised linear interpolation of the points after blocks floor(i) and floor(i) + 1. For a rank above 1
    the second basis is first rotated onto the first (orthogonal Procrustes), then the mix is made orthonormal by
    its polar factor, so that the span moves continuously with i.
    """
    n_points, rank, _ = directions_Prd.shape
    identity = torch.eye(rank, dtype=torch.float64)
    index = min(max(direction_index, 0.0), n_points - 2.0)
    low = math.floor(index)
    share = index - low
    if share == 0:
        return Mixture((low + 1,), identity)
    first, second = directions_Prd[low + 1].double().cpu(), directions_Prd[low + 2].double().cpu()
    rotation = identity
    if rank > 1:
        u, _, vt = torch.linalg.svd(first @ second.T)
        rotation = u @ vt
    mixed = (1 - share) * first + share * (rotation @ second)
    squared_lengths, u = torch.linalg.eigh(mixed @ mixed.T)
    if squared_lengths.min() < 1e-12:  # opposite directions cancel half-way: take the nearer one
        return Mixture((low + 1 if share < 0.5 else low + 2,), identity)
    polar = u @ torch.diag(squared_lengths.rsqrt()) @ u.T
    return Mixture((low + 1, low + 2), polar @ torch.cat([(1 - share) * identity, share * rotation], dim=1))


def mixtures(edit: Edit, directions_Prd: Float[Tensor, "P r d"]) -> list[Mixture]:
    """What each layer is edited with: the point after its own block, or one global mixture for all of them."""
    n_points, rank, _ = directions_Prd.shape
    if edit.direction_index is not None:
        return [mixture(directions_Prd, edit.direction_index)] * (n_points - 1)
    identity = torch.eye(rank, dtype=torch.float64)
    return [Mixture((point,), identity) for point in range(1, n_points)]


def directions_for(edit: Edit, bank: DirectionBank) -> Float[Tensor, "L r d"]:
    """The orthonormal rows that each layer is edited with, float32."""
    directions_Prd = bank[edit.direction_set]
    layers = mixtures(edit, directions_Prd)
    return torch.stack([mix.of([directions_Prd[point] for point in mix.points]).float() for mix in layers])


# ----- closed forms -----


def row_norms(weights: Iterable[Float[Tensor, "d in"]]) -> Float[Tensor, " d"]:
    """Row norms rho of the concatenated weights, float32 on the CPU; squares are summed over weights in float64."""
    squares = [torch.linalg.vector_norm(weight, dim=1).cpu().double().square() for weight in weights]
    return torch.stack(squares).sum(0).sqrt().float()


def responses(
    weights: Iterable[Float[Tensor, "d in"]], rho: Float[Tensor, " d"], directions: Float[Tensor, "n d"]
) -> Float[Tensor, "n d"]:
    """H^T = V What What^T for many direction rows at once, so that one reading of the weights serves them all.

    It has a gradient, for which the weights are read once more: none of them is kept.
    """
    return _Responses.apply(directions, weights, rho)


class _Responses(torch.autograd.Function):
    """What What^T is symmetric, so a gradient goes back through the same map. Left to itself, autograd would keep every
    weight in float32."""

    @staticmethod
    def forward(
        ctx: Any, directions: Float[Tensor, "n d"], weights: Iterable[Tensor], rho: Float[Tensor, " d"]
    ) -> Float[Tensor, "n d"]:
        ctx.given = weights, rho
        total = torch.zeros_like(directions)
        inverse = _inverse(rho).to(directions.device)
        for weight in weights:
            total += ((directions * inverse) @ weight) @ weight.T * inverse
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], None, None]:
        return _Responses.apply(*gradients, *ctx.given), None, None


def factors_from(
    directions: Float[Tensor, "r d"],
    strength: float | Float[Tensor, ""],
    norm_mode: NormMode,
    rho: Float[Tensor, " d"] | None = None,
    response: Float[Tensor, "r d"] | None = None,
) -> Factors:
    """Closed form from what is known about the weight: ``rho`` for `pre`, also H^T (``responses``) for `full`.

    All on one device that has float64.
    """
    if norm_mode == "none":
        return Factors(strength * directions, directions)
    assert rho is not None
    inverse = _inverse(rho)
    directions = directions * (inverse > 0)  # a dead row neither gives nor takes
    left, right = strength * rho * directions, directions * inverse
    if norm_mode == "pre":
        return Factors(left, right)
    assert response is not None
    v, h = directions.double(), response.double()
    gram = v @ h.T
    squared = 1 - 2 * strength * (v * h).sum(0) + strength**2 * torch.einsum("ki,kl,li->i", v, gram, v)
    return Factors(left, right, squared.clamp(min=SMALLEST_REMAINDER).rsqrt().float())


def factors(
    weights: Sequence[Float[Tensor, "d in"]],
    directions: Float[Tensor, "r d"],
    strength: float,
    norm_mode: NormMode,
) -> Factors:
    """Factors of one edit of one map; several weights are the blocks of one concatenated map."""
    rho = row_norms(weights) if norm_mode != "none" else None
    response = None
    if norm_mode == "full" and rho is not None:
        response = responses(weights, rho, directions.to(weights[0].device)).cpu()
    return factors_from(directions.cpu(), strength, norm_mode, rho, response).to(directions.device)


def interchanged(factors: Factors, other_d: Float[Tensor, " d"]) -> Factors:
    """Not only takes the subspace's part of an output out, but puts that of another output in its place.

    ``other_d`` is without the module's bias. At strength 1 in mode `none`, ``V y' = V other``.
    """
    offset = (factors.right @ other_d) @ factors.left
    return replace(factors, offset=offset if factors.scale is None else factors.scale * offset)


def shifts_of(edit: Edit, bank: DirectionBank) -> Float[Tensor, "P 1 d"]:
    """What the edit's addition adds: the bank's differences of means, or, where it has those of several runs, those of
    the edit's own."""
    return bank[own] if (own := f"{edit.direction_set}:{SHIFTS}") in bank else bank[SHIFTS]


def added(factors: Factors | None, shift_d: Float[Tensor, " d"], strength: float) -> Factors:
    """``factors``, which may be those of no edit, and minus ``strength`` times the difference of means."""
    if factors is None:
        none = shift_d.new_zeros(0, len(shift_d))
        factors = Factors(none, none)
    return replace(factors, offset=-strength * shift_d)


def seen_through(directions: Float[Tensor, "r d"], gain: Float[Tensor, " d"], centred: bool) -> Float[Tensor, "r d"]:
    """Orthonormal rows that span what a norm makes of the directions; zero where there is nothing.

    ``gain`` multiplies each value of what is normalised, from which the mean is taken first if ``centred``.
    """
    seen = directions.double()
    if centred:
        seen = seen - seen.mean(dim=1, keepdim=True)
    seen = seen * gain
    _, lengths, rows = torch.linalg.svd(seen, full_matrices=False)
    there = lengths > SMALLEST_SEEN * max(float(gain.abs().max()), 1e-30)
    return (rows * there[:, None]).float()


def apply_to_weight(weight: Float[Tensor, "d in"], factors: Factors, in_place: bool = False) -> Float[Tensor, "d in"]:
    """The edited weight, float32; with ``in_place``, which wants a float32 weight, in the memory of the weight."""
    removed = factors.right @ weight.float()
    edited = torch.addmm(weight.float(), factors.left.T, removed, alpha=-1, out=weight if in_place else None)
    return edited if factors.scale is None else edited.mul_(factors.scale[:, None])


def apply_to_columns(
    weight: Float[Tensor, "d in"], factors: Factors, columns: Sequence[int] | None
) -> Float[Tensor, "d in"]:
    """``apply_to_weight`` to some columns (None: all); the others are what they were, in float32."""
    if columns is None:
        return apply_to_weight(weight, factors)
    edited = weight.float().clone()
    edited[:, columns] = apply_to_weight(edited[:, columns], factors)
    return edited


def apply_to_output(
    y: Float[Tensor, "... d"],
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "n d"],
    scale: Float[Tensor, "... d"] | None = None,
    bias: Float[Tensor, " d"] | None = None,
    member: Bool[Tensor, "... n"] | None = None,
    offset: Float[Tensor, "... d"] | None = None,
) -> Float[Tensor, "... d"]:
    """The edited output in y's dtype, computed in float32.

    The n direction rows may belong to several edits: ``member`` (broadcast against y's leading axes) says which of
    them apply to which row of the batch. With no member set, scale 1 and offset 0 a row passes bit for bit. ``bias`` is
    what the module adds to its output; it is not edited.
    """
    exact = y.to(torch.promote_types(y.dtype, torch.float32))
    linear = exact if bias is None else exact - bias
    projections = linear @ right.T
    if member is not None:
        projections = projections.masked_fill(~member, 0.0)
    removed = projections @ left
    if scale is None:
        edited = exact - removed  # the bias cancels: y + b - left(right y)
    elif bias is None:
        edited = (exact - removed) * scale
    else:
        # Written as a change of y, so that with a bias, too, a row with scale 1 and nothing removed is y itself.
        edited = torch.addcmul(exact, scale - 1, linear).addcmul_(scale, removed, value=-1)
    return (edited if offset is None else edited + offset).to(y.dtype)


def _inverse(rho: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """1 / rho, and 0 for dead rows."""
    alive = rho > DEAD_ROW * rho.max()
    return torch.where(alive, 1 / torch.where(alive, rho, 1.0), 0.0)
