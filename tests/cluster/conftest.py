"""The imitated internet for the tests marked ``cluster``; everything is gone afterwards, also after a crash."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.fake_vast.cluster import ImitatedCluster
from tests.cluster.lab import Lab, missing_for_lab, sweep


@dataclass(frozen=True)
class KeyPair:
    private: Path
    public: str


def make_key(folder: Path, name: str = "key") -> KeyPair:
    private = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(private)], check=True)
    return KeyPair(private, private.with_suffix(".pub").read_text().strip())


@pytest.fixture(scope="session")
def namespaces() -> Iterator[None]:
    """Skip, with the reason, where namespaces cannot be made; remove what earlier and this session left."""
    reason = missing_for_lab()
    if reason:
        pytest.skip(reason)
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
