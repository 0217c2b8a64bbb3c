"""Many readers at a time, some of whom go away or talk nonsense, while a replica dies: nothing is lost or left over.

``test_replicas.py`` has one short round; these are three, long enough to see memory that is not given back.
"""

from pathlib import Path

import pytest

from benchmarks import serve_load
from tests.serve.server import serving

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.nightly]

ROUNDS, REQUESTS, CONNECTIONS = 3, 300, 64


def test_every_request_has_one_end_and_nothing_stays_behind(served_run: Path, tmp_path: Path) -> None:
    with serving(tmp_path, str(served_run), "--replicas", "2", "--no-pages") as server:
        asked = serve_load.requests(server)
        rounds = [serve_load.play(server, asked, REQUESTS, CONNECTIONS, seed) for seed in range(ROUNDS)]
    for result in rounds:
        check_round(result, REQUESTS)
    for kind in rounds[0].memory:
        assert serve_load.spread([result.memory[kind] for result in rounds]) < 0.05, kind


def check_round(result: serve_load.Round, n_requests: int) -> None:
    """What holds of any round, whatever was killed when."""
    assert not result.wrong
    assert result.outcomes.total() == n_requests
    assert result.left_over == 0
    assert result.outcomes["cancelled"] and result.outcomes["malformed, refused"]
    # Only what had begun in the replica that was killed may end with an error.
    assert result.outcomes["answered"] > n_requests / 2
