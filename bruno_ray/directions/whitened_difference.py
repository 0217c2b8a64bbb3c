"""One direction per stream point: Fisher's linear discriminant, the difference in means seen through the inverse of the
covariance within a side.

In whitened space the class-mean shift is what LEACE removes (Belrose et al. 2023, https://arxiv.org/abs/2306.03819);
our edit is an orthogonal projection, so this is the direction along which a threshold reads the class, not LEACE.
Where prompts vary strongly along directions that have nothing to do with the behaviour, a mean of few prompts is off
along those, and this is not.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.directions.difference_in_means import difference_in_means


def whitened_difference(
    target_NLD: Float[Tensor, "n_target point d_model"],
    baseline_MLD: Float[Tensor, "n_baseline point d_model"],
    rank: int = 1,
) -> Float[Tensor, "point 1 d_model"]:
    """Unit vectors; one per point whatever the `rank`. Zero where both sides have the same mean.

    No d_model x d_model matrix: the covariance is that of few prompts, so its inverse is known in their span and
    isotropic outside of it.
    """
    difference_LD = difference_in_means(target_NLD, baseline_MLD)[:, 0].double()
    points = [
        _whitened(difference_D, torch.cat([_about_mean(side[:, point]) for side in (target_NLD, baseline_MLD)]))
        for point, difference_D in enumerate(difference_LD)
    ]
    return torch.stack(points)[:, None].float()


def _about_mean(residuals_ND: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt d_model"]:
    residuals_ND = residuals_ND.double()
    return residuals_ND - residuals_ND.mean(dim=0)


def _whitened(
    difference_D: Float[Tensor, " d_model"], within_KD: Float[Tensor, "prompt d_model"]
) -> Float[Tensor, " d_model"]:
    from sklearn.covariance import ledoit_wolf_shrinkage  # takes as long to import as torch

    _, widths_K, axes_KD = torch.linalg.svd(within_KD, full_matrices=False)
    variances_K = widths_K.square() / len(within_KD)
    if variances_K.sum() <= 0:  # nothing varies
        return difference_D
    shrinkage = float(ledoit_wolf_shrinkage(within_KD.numpy(), assume_centered=True))
    isotropic = max(shrinkage, torch.finfo(torch.float64).eps) * variances_K.sum() / len(difference_D)
    along_K = axes_KD @ difference_D
    outside_D = difference_D - along_K @ axes_KD
    inverse_K = isotropic / ((1 - shrinkage) * variances_K + isotropic)  # times the isotropic part, which cancels
    whitened_D = outside_D + (inverse_K * along_K) @ axes_KD
    return whitened_D / whitened_D.norm().clamp(min=torch.finfo(torch.float64).tiny)
