"""The worker pool on a real local Ray cluster, with workers that do arithmetic."""

import time

import numpy as np
import pytest
import ray
import yaml

from bruno_ray.errors import ModelError, TrialError, WorkerError
from bruno_ray.settings import RaySettings
from bruno_ray.workers.pool import WorkerPool
from bruno_ray.workers.session import STARTS, autoscaler_has_gpus, ray_session, start_local
from tests.support.fakes import BrokenWorker, FakeWorker

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SETTINGS = RaySettings(workers=2, cpus_per_worker=0.5, gpus_per_worker=0, object_store_memory=100 * 1024**2)


@pytest.fixture(scope="module")
def session():
    with ray_session(SETTINGS):
        yield


@pytest.fixture(scope="module")
def pool(session):
    with WorkerPool(FakeWorker, (), SETTINGS) as pool:
        pool.wait_ready()
        yield pool


@pytest.mark.parametrize(
    ("failures", "message", "expected", "tries"),
    [
        (STARTS - 1, "The current node timed out during startup.", None, STARTS),
        (STARTS, "The current node timed out during startup.", WorkerError, STARTS),
        (1, "no room for sockets", OSError, 1),
    ],
)
def test_ray_gets_more_time_on_a_busy_machine_and_for_nothing_else(monkeypatch, failures, message, expected, tries):
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


def test_calls_reach_a_worker_and_its_errors_come_back_as_they_are(pool):
    assert pool.call("describe").n_layers == 8
    with pytest.raises(TrialError, match="not finite"):
        pool.call("fail", TrialError("not finite"))
    with pytest.raises(ZeroDivisionError):
        pool.call("fail", ZeroDivisionError("a defect"))
    pool.set_context(40)
    assert pool.call("add", 2, with_context=True) == 42


def test_shards_come_back_under_their_index(pool):
    shards = [([float(i), i + 1.0],) for i in range(9)]
    results = dict(pool.map_shards("double", shards))
    assert set(results) == set(range(9))
    for i, result in results.items():
        np.testing.assert_array_equal(result, [2.0 * i, 2.0 * i + 2])


def test_both_workers_are_seen_with_their_memory(pool):
    deadline = time.monotonic() + 60
    while (states := pool.snapshot()) and not all(s.state == "idle" and s.memory for s in states):
        assert time.monotonic() < deadline, states
        time.sleep(0.2)
    assert len({state.pid for state in states}) == 2


def test_a_shard_whose_worker_dies_is_run_once_more_elsewhere(session, tmp_path):
    (tmp_path / "doomed").write_text("shard 3.0")
    with WorkerPool(FakeWorker, (str(tmp_path),), SETTINGS) as pool:
        results = dict(pool.map_shards("double", [([float(i)],) for i in range(6)]))
        assert {i: r.tolist() for i, r in results.items()} == {i: [2.0 * i] for i in range(6)}
        assert (tmp_path / "deaths").stat().st_size == 1
        deadline = time.monotonic() + 30  # the loss is counted by another of the broker's tasks
        while not (losses := sum(state.losses for state in pool.snapshot())) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert losses == 1


def test_a_call_that_kills_two_workers_is_given_up_and_the_pool_lives_on(session, tmp_path):
    (tmp_path / "doomed").write_text("shard 3.0")
    with WorkerPool(FakeWorker, (str(tmp_path), 0.0, 0, 0, 9), SETTINGS) as pool:
        with pytest.raises(WorkerError, match="it lost worker"):
            pool.call("double", [3.0])
        assert (tmp_path / "deaths").stat().st_size == 2
        assert pool.call("double", [1.0]).tolist() == [2.0]


def test_an_idle_worker_that_is_killed_is_replaced(session, tmp_path):
    with WorkerPool(FakeWorker, (str(tmp_path),), SETTINGS.model_copy(update={"workers": 1})) as pool:
        pool.wait_ready()
        before = wait_for(pool, lambda s: s.state == "idle" and s.pid)
        ray.get(kill_process.remote(before))
        after = wait_for(pool, lambda s: s.state == "idle" and s.losses == 1 and s.pid != before and s.pid)
        assert after != before
        assert pool.call("double", [1.0]).tolist() == [2.0]


def wait_for(pool, condition) -> int:
    deadline = time.monotonic() + 60
    while not condition(state := pool.snapshot()[0]):
        assert time.monotonic() < deadline, state
        time.sleep(0.2)
    return state.pid


@ray.remote(num_cpus=0)
def kill_process(pid: int) -> None:
    import os
    import signal

    os.kill(pid, signal.SIGKILL)


def test_a_worker_that_cannot_be_built_says_why(session):
    with WorkerPool(BrokenWorker, (), SETTINGS) as pool:
        with pytest.raises(ModelError, match="no model"):
            pool.wait_ready()
        with pytest.raises(ModelError, match="no model"):
            pool.call("describe")


def test_no_room_for_a_worker_is_said_after_the_time_limit(session):
    settings = SETTINGS.model_copy(update={"cpus_per_worker": 64.0, "start_timeout": 1.0})
    with WorkerPool(FakeWorker, (), settings) as pool:
        with pytest.raises(WorkerError, match=r"no worker started within 1 s .*64 CPU"):
            pool.wait_ready()


def test_gpus_that_the_autoscaler_may_add_are_seen_in_its_configuration(tmp_path):
    config = tmp_path / "ray_bootstrap_config.yaml"
    assert not autoscaler_has_gpus(config)
    for gpus, most, expected in ((1, 2, True), (0, 2, False), (1, 0, False)):
        workers = {"resources": {"CPU": 8, "GPU": gpus}, "max_workers": most}
        head = {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 0}
        types = {"head": head, "workers": workers}
        config.write_text(yaml.safe_dump({"head_node_type": "head", "available_node_types": types}))
        assert autoscaler_has_gpus(config) is expected
