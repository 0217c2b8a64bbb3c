"""One direction per stream point: a weighted sum of the supervised probe's and the first of contrastive PCA.

The mixture is bruno's. An eigenvector has no sign of its own. Here it takes the probe's, so that the two cannot cancel.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.directions.contrastive_pca import contrastive_pca
from bruno_ray.directions.supervised_probe import supervised_probe

PROBE, PCA = 0.7, 0.3
"""Weights of the two unit vectors."""


def probe_pca_ensemble(
    target_NLD: Float[Tensor, "n_target point d_model"],
    baseline_MLD: Float[Tensor, "n_baseline point d_model"],
    rank: int = 1,
) -> Float[Tensor, "point 1 d_model"]:
    """Unit vectors; one per point whatever the `rank`. Where one of the two finds nothing, it is the other alone."""
    probe_L1D = supervised_probe(target_NLD, baseline_MLD).double()
    pca_L1D = contrastive_pca(target_NLD, baseline_MLD, 1).double()
    sign_L11 = torch.where((probe_L1D * pca_L1D).sum(dim=-1, keepdim=True) < 0, -1.0, 1.0)
    mixed_L1D = PROBE * probe_L1D + PCA * sign_L11 * pca_L1D
    return torch.nn.functional.normalize(mixed_L1D, dim=-1).float()
