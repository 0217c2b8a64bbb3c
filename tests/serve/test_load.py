"""Many readers at a time, some of whom go away or talk nonsense, while a replica dies: nothing is lost or left over."""

import pytest

from benchmarks import serve_load
from tests.serve.server import serving

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROUNDS, REQUESTS, CONNECTIONS = 3, 300, 64


def test_every_request_has_one_end_and_nothing_stays_behind(served_run, tmp_path):
    with serving(tmp_path, str(served_run), "--replicas", "2", "--no-pages") as server:
        asked = serve_load.requests(server)
        rounds = [serve_load.play(server, asked, REQUESTS, CONNECTIONS, seed) for seed in range(ROUNDS)]
    for result in rounds:
        assert not result.wrong
        assert result.outcomes.total() == REQUESTS
        assert result.left_over == 0
        assert result.outcomes["cancelled"] and result.outcomes["malformed, refused"]
        # Only what had begun in the replica that was killed may end with an error.
        assert result.outcomes["answered"] > REQUESTS / 2
    for kind in rounds[0].memory:
        assert serve_load.spread([result.memory[kind] for result in rounds]) < 0.05, kind
