"""`bruno-ray cluster pause` and `up` with real Ray: what was on the head is there again, and workers join it."""

import logging
from pathlib import Path

import pytest

from tests.cluster.lab import Lab
from tests.cluster.lab.laptop import Laptop
from tests.cluster.lab.ray_cluster import RayCluster
from tests.cluster.test_ray_up import DRIVER, result

logger = logging.getLogger(__name__)
pytestmark = [
    *(pytest.mark.nightly, pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow),
    *(pytest.mark.xdist_group("lab"), pytest.mark.timeout(2400)),
]


def test_a_cluster_is_paused_and_goes_on(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("laptop")
    (folder / "work").mkdir()
    with RayCluster(lab, folder) as cluster:
        laptop = Laptop(cluster, folder / "work")
        laptop.run("up", "--yes")
        assert result(cluster.driver(DRIVER, 600))["totals"] == [10_000_000, 5_000_000]
        [head] = cluster.billed("head")
        container = cluster.head()
        (container.home / "kept").write_text("what the disk holds")

        said = laptop.run("pause", "--yes")
        logger.info("pause said:\n%s", said)
        assert f"head {head.id} is paused" in said and "$ a day" in said
        assert cluster.vast.status(head) == "stopped" and cluster.billed("worker") == []
        commands = [Path(f"/proc/{process}/cmdline").read_bytes() for process in container.processes()]
        assert not any(b"raylet" in command or b"cluster.supervisor" in command for command in commands)
        container.cut()
        assert "paused" in laptop.run("status")
        assert "`bruno-ray cluster up` starts it again" in laptop.run("progress", code=2)
        assert "nothing was destroyed" in laptop.run("down", "--yes", code=2)

        cluster.vast.place_is_taken(head.id, True)
        cluster.api._shapes = iter(range(1, 1000, 2))  # Vast.ai refuses at once
        assert "cannot be started now" in laptop.run("up", "--yes", code=2)
        cluster.vast.place_is_taken(head.id, False)
        container.mend()
        laptop.run("up", "--yes")
        assert cluster.billed("head") == [head] and (container.home / "kept").exists()
        assert result(cluster.driver(DRIVER, 600))["totals"] == [10_000_000, 5_000_000]
        laptop.run("down", "--yes")
        assert cluster.vast.billed() == []
