"""Starting Ray on this machine, and what is known of a cluster before it has grown. Nothing here starts Ray."""

from pathlib import Path

import pytest
import ray
import yaml

from bruno_ray.errors import WorkerError
from bruno_ray.workers.session import STARTS, autoscaler_has_gpus, start_local


@pytest.mark.parametrize(
    ("failures", "message", "expected", "tries"),
    [
        (STARTS - 1, "The current node timed out during startup.", None, STARTS),
        (STARTS, "The current node timed out during startup.", WorkerError, STARTS),
        (1, "no room for sockets", OSError, 1),
    ],
)
def test_ray_gets_more_time_on_a_busy_machine_and_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch, failures: int, message: str, expected: type[Exception] | None, tries: int
) -> None:
    calls = []

    def init(**options):
        calls.append(options)
        if len(calls) <= failures:
            raise (Exception if "timed out" in message else OSError)(message)

    monkeypatch.setattr(ray, "init", init)
    if expected is None:
        start_local(num_cpus=1)
    else:
        with pytest.raises(expected):
            start_local(num_cpus=1)
    assert calls == [{"address": "local", "num_cpus": 1}] * tries


def test_gpus_that_the_autoscaler_may_add_are_seen_in_its_configuration(tmp_path: Path) -> None:
    config = tmp_path / "ray_bootstrap_config.yaml"
    assert not autoscaler_has_gpus(config)
    for gpus, most, expected in ((1, 2, True), (0, 2, False), (1, 0, False)):
        workers = {"resources": {"CPU": 8, "GPU": gpus}, "max_workers": most}
        head = {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 0}
        types = {"head": head, "workers": workers}
        config.write_text(yaml.safe_dump({"head_node_type": "head", "available_node_types": types}))
        assert autoscaler_has_gpus(config) is expected
