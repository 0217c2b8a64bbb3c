"""Several directions per stream point: one for each way in which the target prompts depart from the baseline.

A behaviour that is several behaviours (refusals of several kinds) has a mean difference that is none of them
(Wollschlaeger et al. 2025, https://arxiv.org/abs/2502.17420, find cones; clustering is bruno's way to them). Target
residuals about the baseline mean are clustered by their direction alone, so that long residuals do not decide. The
number of clusters is the one with the best silhouette; without a clear one all prompts are one cluster. The edit
removes what the clusters' means span, all of it.
"""

import logging

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.directions.basis import centred, spanning

logger = logging.getLogger(__name__)

MOST_CLUSTERS = 5
SMALLEST_CLUSTER = 10
LEAST_SILHOUETTE = 0.1
STARTS = 10


def concept_cones(
    target_NLD: Float[Tensor, "n_target point d_model"],
    baseline_MLD: Float[Tensor, "n_baseline point d_model"],
    rank: int,
) -> Float[Tensor, "point rank d_model"]:
    """Orthonormal rows that span the clusters' means, those of most prompts first; zero where there are no more.

    With rank 1 it is the direction of the weightiest cluster.
    """
    points, clusters = [], []
    for point in range(target_NLD.shape[1]):
        target_ND, _ = centred(target_NLD[:, point], baseline_MLD[:, point])
        labels_N = _labels(target_ND)
        clusters.append(int(labels_N.max()) + 1)
        members_KN = (labels_N == torch.arange(clusters[-1])[:, None]).double()
        means_KD = members_KN @ target_ND / members_KN.sum(dim=1, keepdim=True)
        points.append(spanning(means_KD, members_KN.sum(dim=1), rank))
    logger.info("concept_cones: clusters at each stream point: %s", clusters)
    return torch.stack(points).float()


def _labels(target_ND: Float[Tensor, "n_target d_model"]) -> Tensor:
    """Cluster of each prompt; all 0 where no number of clusters is clear."""
    from sklearn.cluster import KMeans  # takes as long to import as torch, in every process that knows the methods
    from sklearn.metrics import silhouette_score

    alone_N = torch.zeros(len(target_ND), dtype=torch.long)
    lengths_N1 = target_ND.norm(dim=-1, keepdim=True)
    if len(target_ND) < 2 * SMALLEST_CLUSTER or (lengths_N1 == 0).any():
        return alone_N
    coordinates = torch.linalg.qr((target_ND / lengths_N1).T)[1].T.numpy()  # distances are the same in what they span
    best, labels = LEAST_SILHOUETTE, alone_N
    for n_clusters in range(2, min(MOST_CLUSTERS, len(target_ND) // SMALLEST_CLUSTER) + 1):
        found = KMeans(n_clusters, n_init=STARTS, random_state=0).fit_predict(coordinates)
        found_N = torch.from_numpy(found).long()
        if found_N.bincount(minlength=n_clusters).min() < SMALLEST_CLUSTER:
            continue
        silhouette = float(silhouette_score(coordinates, found))
        if silhouette > best:
            best, labels = silhouette, found_N
    return labels
