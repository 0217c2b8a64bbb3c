"""`launcher: laptop` with real Ray: the head has no key, workers come and go from the laptop, and end without it."""

import logging
from pathlib import Path

import psutil
import pytest

from cluster import keeper
from cluster.node_provider import LAUNCHER_FOLDER
from tests.cluster.fake_vast.api import API_KEY, HEAD_KEY
from tests.cluster.lab import Lab
from tests.cluster.lab.far_away import ROUND_TRIP_S
from tests.cluster.lab.laptop import Laptop
from tests.cluster.lab.ray_cluster import PATIENCE_S, RayCluster
from tests.cluster.test_isolation import files_with
from tests.cluster.test_watched_faults import Watch
from tests.support.waiting import wait_for

logger = logging.getLogger(__name__)
pytestmark = [
    *(pytest.mark.nightly, pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow),
    *(pytest.mark.xdist_group("lab"), pytest.mark.timeout(2400)),
]

PATIENCE_OF_WORKERS_S = 90.0
"""Longer than a minute, in which a head that is told of them shows itself once."""


def launchers(cluster: RayCluster) -> list[int]:
    """Processes of the launcher of this laptop."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "cluster.launcher" in words and any(str(cluster.home) in word for word in words):
            found.append(process.pid)
    return found


def test_workers_are_launched_from_the_laptop_and_end_themselves_without_it(
    namespaces: None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("laptop")
    (folder / "work").mkdir()
    provider = {"launcher": "laptop", "dead_mans_switch_s": PATIENCE_OF_WORKERS_S}
    with Lab(ROUND_TRIP_S) as lab, RayCluster(lab, folder, provider=provider) as cluster:
        (cluster.home / ".bruno-ray" / "vast_api_key_head").unlink()
        laptop = Laptop(cluster, folder / "work")
        assert "launcher: this machine" in laptop.run("up", "--yes")
        watch = Watch(cluster)
        assert not files_with(cluster.head(), API_KEY) and not files_with(cluster.head(), HEAD_KEY)
        said = laptop.run("status")
        assert "launcher: this machine, process" in said and said.count(" up ") >= 2

        lost, rented = cluster.billed("worker")[0], set(cluster.vast.instances)
        cluster.vast.host_deletes(lost.id)
        wait_for(lambda: set(cluster.vast.instances) - rented, "a machine instead", PATIENCE_S, cluster.logs)
        wait_for(lambda: len(cluster.billed("worker")) == 2, "two machines", PATIENCE_S, cluster.logs)
        wait_for(lambda: len(watch.answering(3)) == 2, "answers from two workers", PATIENCE_S, cluster.logs)
        assert watch.last()["errors"] == 0

        keeper.end_for_good(cluster.folder / LAUNCHER_FOLDER)  # the laptop is gone
        assert launchers(cluster) == []
        wait_for(lambda: not cluster.billed("worker"), "the end of the workers", PATIENCE_S, cluster.logs)
        assert len(cluster.billed("head")) == 1, "which holds the runs"
        assert "none on this machine" in laptop.run("status")

        laptop.run("up", "--yes")
        wait_for(lambda: len(cluster.billed("worker")) == 2, "workers again", PATIENCE_S, cluster.logs)
        wait_for(lambda: len(watch.answering(3)) == 2, "answers from two workers", PATIENCE_S, cluster.logs)
        said = laptop.run("down", "--yes")
        assert "launcher: this machine" in said and "nothing is billed" in said
        assert cluster.vast.billed() == [] and launchers(cluster) == []
        assert not list(Path(cluster.folder).rglob("*.sock"))
