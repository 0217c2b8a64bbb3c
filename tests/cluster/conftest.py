"""The imitated internet for the tests marked ``cluster``; everything is gone afterwards, also after a crash.

Files that use it are of the xdist group "lab": one process runs them one after the other, in their order here.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.cluster.fake_vast.cluster import ImitatedCluster
from tests.cluster.lab import Lab, missing_for_lab, sweep
from tests.cluster.lab.life import LIFE, job, laptop
from tests.cluster.ssh import KeyPair, make_key, sshd

__all__ = ["job", "laptop", "sshd"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of one cluster's life come one after the other."""
    ranks = {f"tests.cluster.{name}": rank for rank, name in enumerate(LIFE)}
    places = [place for place, item in enumerate(items) if module_of(item) in ranks]
    lived = sorted((items[place] for place in places), key=lambda item: ranks[module_of(item)])
    rest = [item for item in items if module_of(item) not in ranks]
    items[:] = [*rest[: places[0]], *lived, *rest[places[0] :]] if places else items


def module_of(item: pytest.Item) -> str:
    return item.module.__name__ if isinstance(item, pytest.Function) else ""


@pytest.fixture(scope="session")
def namespaces() -> Iterator[None]:
    """Skip, with the reason, where namespaces cannot be made; remove what earlier and this session left.

    One process of the machine at a time: a sweep could hit what another process is just building.
    """
    reason = missing_for_lab()
    if reason:
        pytest.skip(reason)
    with FileLock(Path(tempfile.gettempdir()) / "bruno-lab.lock"):
        sweep()
        yield
        sweep()


@pytest.fixture(scope="module")
def lab(namespaces: None) -> Iterator[Lab]:
    with Lab() as running:
        yield running


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_key(tmp_path_factory.mktemp("ssh"))


@pytest.fixture
def world(tmp_path: Path) -> ImitatedCluster:
    """Vast.ai's API with offers, and providers that rent from it."""
    return ImitatedCluster.make(tmp_path)
