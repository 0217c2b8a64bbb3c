"""Eight workers that are 60 ms away join within three minutes, whatever mesh: a figure of benchmarks/RESULTS.md, at
night."""

import logging

import pytest

from benchmarks.mesh_size import MESHES
from benchmarks.network import WORKERS, joining
from cluster.settings import MeshKind
from tests.cluster.ssh import KeyPair

logger = logging.getLogger(__name__)
pytestmark = [
    *(pytest.mark.nightly, pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow),
    *(pytest.mark.xdist_group("lab"), pytest.mark.timeout(1200)),
]

LONGEST_S = 180.0


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_workers_join_within_three_minutes(namespaces: None, key: KeyPair, mesh: MeshKind) -> None:
    joined = joining(mesh, key.private)
    logger.info("%d workers in %s: %s", WORKERS, mesh, joined)
    assert joined.tasks_s is not None and joined.tasks_s < LONGEST_S
