"""Folders of the driver's machine on other machines: two nodes of Ray on this one, with a cache each."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from bruno_ray.errors import WorkerError
from bruno_ray.workers.shipping import CHUNK_BYTES, Folders, absolute_if_folder
from bruno_ray.workers.starting import STARTS, TIMED_OUT

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def two_nodes() -> Cluster:
    for left in reversed(range(STARTS)):
        cluster = Cluster()
        try:
            for more in ({"include_dashboard": False}, {"resources": {"elsewhere": 2}}):
                cluster.add_node(num_cpus=1, object_store_memory=100 * 1024**2, **more)
            return cluster
        except Exception as error:  # Ray has no type of its own for it
            cluster.shutdown()
            if not left or TIMED_OUT not in str(error):
                raise
    raise AssertionError


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    ray.shutdown()  # of the one that other tests of this process share
    cluster = two_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "deeper").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(os.urandom(2 * CHUNK_BYTES + 5))
    (folder / "deeper" / "empty.txt").touch()
    (folder / "config.json").symlink_to(folder / "deeper" / "empty.txt")  # as the hub's cache has it
    return folder


@ray.remote(num_cpus=0)
def opened(folders: Folders, name: str, cache: str) -> tuple[str, dict[str, bytes]]:
    os.environ["BRUNO_CACHE"] = cache
    folder = Path(folders.local(name))
    return str(folder), {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_folder_is_the_same_elsewhere_and_copied_once(cluster: Cluster, model: Path, tmp_path: Path) -> None:
    folders, cache = Folders(), str(tmp_path / "cache")
    elsewhere = opened.options(resources={"elsewhere": 1})
    two = ray.get([elsewhere.remote(folders, str(model), cache) for _ in range(2)])
    content = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert len(content) == 3
    for place, files in two:
        assert place.startswith(cache) and files == content
    assert len([path for path in Path(cache, "shipped").iterdir() if path.is_dir()]) == 1

    (model / "deeper" / "empty.txt").write_text("not any more")
    place, files = ray.get(elsewhere.remote(folders, str(model), cache))
    assert files["deeper/empty.txt"] == b"not any more" and place != two[0][0]


def test_on_the_driver_s_machine_nothing_is_copied(cluster: Cluster, model: Path, tmp_path: Path) -> None:
    folders = Folders()
    assert folders.local(str(model)) == str(model)
    assert folders.local("owner/model") == "owner/model"
    assert absolute_if_folder(str(model)) == str(model) and absolute_if_folder("owner/model") == "owner/model"
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_is_not_there_is_said(cluster: Cluster, tmp_path: Path) -> None:
    elsewhere = opened.options(resources={"elsewhere": 1})
    with pytest.raises(WorkerError, match="holds no files"):
        ray.get(elsewhere.remote(Folders(), str(tmp_path / "nothing"), str(tmp_path / "cache")))
