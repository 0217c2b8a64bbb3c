"""The real application on the organism, started once for all tests that talk to a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.server import Server, make_run, serving


@pytest.fixture(scope="session")
def served_run(organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the organism with six trials, one selected and saved in ``model``."""
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def server(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Base, trials, the run and its saved model, behind a key."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, str(served_run), "--model", str(served_run / "model")) as server:
        server.run = served_run
        yield server
