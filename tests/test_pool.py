"""The worker pool on a real local Ray cluster, with workers that do arithmetic."""

from collections.abc import Callable

import numpy as np
import psutil
import pytest
import ray
from ray import cloudpickle
from ray.exceptions import TaskCancelledError

from bruno_ray.errors import ModelError, TrialError, WorkerError
from bruno_ray.workers.pool import WorkerPool
from bruno_ray.workers.worker_actor import WorkerState
from tests.support.fakes import BrokenWorker, FakeWorker
from tests.support.study_driver import settings
from tests.support.waiting import wait_for

pytest_plugins = ["tests.support.local_ray"]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("local_ray")]

SETTINGS = settings(workers=2).ray
ONE_WORKER = SETTINGS.model_copy(update={"workers": 1})


@pytest.fixture(scope="module")
def pool(local_ray):
    with WorkerPool(FakeWorker, (), SETTINGS) as pool:
        pool.wait_ready()
        yield pool


def test_calls_reach_a_worker_and_its_errors_come_back_as_they_are(pool):
    assert pool.call("describe").n_layers == 8
    with pytest.raises(TrialError, match="not finite"):
        pool.call("fail", TrialError("not finite"))
    with pytest.raises(ZeroDivisionError):
        pool.call("fail", ZeroDivisionError("a defect"))
    pool.set_context(40)
    assert pool.call("add", 2, with_context=True) == 42


def test_a_context_reaches_every_worker_and_those_that_come_after(tmp_path):
    with WorkerPool(FakeWorker, (str(tmp_path),), SETTINGS) as pool:
        wait_for(lambda: all(state.state == "idle" and state.pid for state in pool.snapshot()), "two workers")
        for context in (40, 50):
            pool.set_context(context)
            assert [pool.call("add", 2, with_context=True) for _ in range(4)] == [context + 2] * 4
        assert all(state.calls for state in pool.snapshot()), "both were asked"
        for state in pool.snapshot():
            psutil.Process(state.pid).kill()
        wait_for(lambda: all(state.state == "idle" and state.losses for state in pool.snapshot()), "their successors")
        assert [pool.call("add", 2, with_context=True) for _ in range(2)] == [52] * 2


def test_shards_come_back_under_their_index(pool):
    shards = [([float(i), i + 1.0],) for i in range(9)]
    results = dict(pool.map_shards("double", shards))
    assert set(results) == set(range(9))
    for i, result in results.items():
        np.testing.assert_array_equal(result, [2.0 * i, 2.0 * i + 2])


def test_both_workers_are_seen_with_their_memory(pool):
    wait_for(
        lambda: all(s.state == "idle" and s.memory for s in pool.snapshot()), "both are idle", detail=pool.snapshot
    )
    assert len({state.pid for state in pool.snapshot()}) == 2


def test_a_shard_whose_worker_dies_is_run_once_more_elsewhere(tmp_path):
    (tmp_path / "doomed").write_text("shard 3.0")
    with WorkerPool(FakeWorker, (str(tmp_path),), SETTINGS) as pool:
        results = dict(pool.map_shards("double", [([float(i)],) for i in range(6)]))
        assert {i: r.tolist() for i, r in results.items()} == {i: [2.0 * i] for i in range(6)}
        assert (tmp_path / "deaths").stat().st_size == 1
        # The loss is counted by another of the broker's tasks.
        wait_for(lambda: sum(state.losses for state in pool.snapshot()), "the loss is counted")
        wait_for(lambda: all(state.state == "idle" for state in pool.snapshot()), "the worker is replaced")
        assert sum(state.losses for state in pool.snapshot()) == 1


def test_a_call_that_kills_two_workers_is_given_up_and_the_pool_lives_on(tmp_path):
    (tmp_path / "doomed").write_text("shard 3.0")
    with WorkerPool(FakeWorker, (str(tmp_path), 0.0, 0, 0, 9), SETTINGS) as pool:
        with pytest.raises(WorkerError, match="it lost worker"):
            pool.call("double", [3.0])
        assert (tmp_path / "deaths").stat().st_size == 2
        assert pool.call("double", [1.0]).tolist() == [2.0]


def test_an_idle_worker_that_is_killed_is_replaced(tmp_path):
    with WorkerPool(FakeWorker, (str(tmp_path),), ONE_WORKER) as pool:
        pool.wait_ready()
        before = only(pool, lambda state: state.state == "idle" and state.pid).pid
        psutil.Process(before).kill()
        after = only(pool, lambda state: state.state == "idle" and state.losses == 1 and state.pid not in (0, before))
        assert after.pid != before
        assert pool.call("double", [1.0]).tolist() == [2.0]


def only(pool: WorkerPool, condition: Callable[[WorkerState], object]) -> WorkerState:
    """The state of the only worker once it fulfils the condition."""
    (state,) = wait_for(
        lambda: [state for state in pool.snapshot() if condition(state)], "the worker's state", detail=pool.snapshot
    )
    return state


def test_a_worker_is_idle_again_after_a_call_that_was_stopped(tmp_path):
    """And not before: it is busy until it has finished what nobody waits for any more."""
    with WorkerPool(FakeWorker, (str(tmp_path), 1.0), ONE_WORKER) as pool:
        pool.wait_ready()
        call = pool.broker.run.remote("double", cloudpickle.dumps(([1.0],)))
        only(pool, lambda state: state.state == "busy")
        pool.cancel()
        with pytest.raises(WorkerError, match="stopped before this call came back"):
            ray.get(call)
        assert only(pool, lambda state: state.state == "idle").calls == 1


@pytest.mark.parametrize("recursive", [False, True])
def test_a_call_that_its_caller_cancels_leaves_its_worker_to_the_next(recursive, tmp_path):
    """Whether Ray cancels the worker's part in it as well or lets that finish."""
    with WorkerPool(FakeWorker, (str(tmp_path), 1.0), ONE_WORKER) as pool:
        pool.wait_ready()
        running, waiting = (pool.broker.run.remote("double", cloudpickle.dumps(([1.0],))) for _ in range(2))
        only(pool, lambda state: state.state == "busy")
        for call in (waiting, running):
            ray.cancel(call, recursive=recursive)
            with pytest.raises(TaskCancelledError):
                ray.get(call)
        assert pool.call("double", [2.0]).tolist() == [4.0]
        state = only(pool, lambda state: state.state == "idle")
        assert (state.calls, state.losses) == (2, 0), "the waiting call was never made"


def test_a_worker_that_cannot_be_built_says_why():
    with WorkerPool(BrokenWorker, (), SETTINGS) as pool:
        with pytest.raises(ModelError, match="no model"):
            pool.wait_ready()
        with pytest.raises(ModelError, match="no model"):
            pool.call("describe")


def test_no_room_for_a_worker_is_said_after_the_time_limit():
    settings = SETTINGS.model_copy(update={"cpus_per_worker": 64.0, "start_timeout": 1.0})
    with WorkerPool(FakeWorker, (), settings) as pool:
        with pytest.raises(WorkerError, match=r"no worker started within 1 s .*64 CPU"):
            pool.wait_ready()
