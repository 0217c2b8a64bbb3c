"""The searcher as Tune calls it: one swap at a time, as long as anything is out, whatever becomes of the lane."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.tune.search import Searcher

from bruno_ray.errors import WorkerError
from bruno_ray.study.lane import RESULTS, SWAP
from bruno_ray.study.searcher import LANES_LOST_IN_A_ROW, BatchOptunaSearch
from bruno_ray.workers.messages import BatchResult, EditOutcome, Scored, Submission, Swap
from tests.support.fakes import fake_scores
from tests.support.schedules import in_memory, make_schedule, memory_folder, opened, params

__all__ = ["memory_folder"]


class Lane:
    """What Tune does with a searcher, one Tune trial at a time."""

    def __init__(self, search: BatchOptunaSearch):
        self.search = search
        self.swap: Swap | None = None
        self.flying: dict[int, Submission] = {}
        self.taken: list[list[int]] = []
        self._n_trials = 0

    def start(self) -> bool:
        """Whether there is a swap to make."""
        self._n_trials += 1
        config = self.search.suggest(f"trial {self._n_trials}")
        if not isinstance(config, dict):
            assert config == Searcher.FINISHED
            return False
        assert self.search.suggest("another") is None, "one at a time"
        self.swap = config[SWAP]
        self.flying.update({submission.batch_id: submission for submission in self.swap.submit})
        self.taken.append([submission.batch_id for submission in self.swap.submit])
        return True

    def bring(self, *batch_ids: int) -> None:
        results: list[tuple[int, BatchResult]] = []
        for batch_id in batch_ids:
            edits = self.flying[batch_id].edits
            results.append((batch_id, Scored("worker 0", tuple(EditOutcome(fake_scores(edit)) for edit in edits))))
        self.search.on_trial_complete(f"trial {self._n_trials}", {RESULTS: results})

    def die(self) -> None:
        self.search.on_trial_complete(f"trial {self._n_trials}", None, error=True)

    def finish(self) -> None:
        """Bring batches one by one in the order of their ids, until the search ends."""
        brought: set[int] = set()
        while self.start():
            assert self.swap is not None
            due = sorted(self.flying.keys() - brought)[:1] if self.swap.block else []
            brought.update(due)
            self.bring(*due)


@pytest.fixture
def lane(memory_folder: Path) -> Iterator[Lane]:
    with opened(memory_folder) as study:
        yield Lane(BatchOptunaSearch(make_schedule(study)))


@pytest.fixture(scope="module")
def uninterrupted() -> list[dict]:
    with in_memory() as folder, opened(folder) as study:
        lane = Lane(BatchOptunaSearch(make_schedule(study)))
        lane.finish()
        return params(study)


def test_a_swap_is_under_way_as_long_as_anything_is_out(lane: Lane) -> None:
    """Tune ends the process of a lane without one, and starts another when there is one: seconds each time."""
    lane.finish()
    assert lane.search.schedule.finished
    assert [] in lane.taken, "even with nothing to take along"


def test_the_pool_is_told_what_has_arrived(lane: Lane) -> None:
    lane.start()
    assert lane.swap == Swap(lane.swap.submit, received=(), block=True)
    lane.bring(0)
    lane.start()
    assert lane.swap.received == (0,)
    lane.die()
    lane.start()
    assert lane.swap.received == (0,), "which the lane may have taken to its grave"
    lane.bring(1)
    lane.start()
    assert lane.swap.received == (1,)


def test_a_full_swap_does_not_wait(memory_folder: Path) -> None:
    with opened(memory_folder) as study:
        lane = Lane(BatchOptunaSearch(make_schedule(study, window=12, workers=8, target=160)))
        lane.start()
        assert len(lane.swap.submit) == 12 and not lane.swap.block
        lane.bring()
        lane.start()
        assert lane.swap.submit == () and lane.swap.block
        lane.bring(*lane.flying)
        swaps = []
        while lane.start() and lane.swap.submit:
            swaps.append((len(lane.swap.submit), lane.swap.block))
            lane.bring()
        assert swaps == [(4, False)] * 3


def test_a_lost_lane_costs_nothing(lane: Lane, uninterrupted: list[dict]) -> None:
    lane.start()
    lane.die()
    lane.start()
    assert lane.taken == [[0, 1], [0, 1]]
    lane.bring(0)
    lane.start()
    lane.bring(0)  # again: it was on its way when the lane was lost
    lane.flying.pop(0)
    lane.finish()
    study = lane.search.schedule.study.study
    assert params(study) == uninterrupted
    assert lane.search.schedule.complete == len(study.trials) == 30


def test_lanes_that_keep_dying_end_the_run(lane: Lane) -> None:
    lane.start()
    lane.bring(0)
    for _ in range(LANES_LOST_IN_A_ROW):
        assert lane.start()
        lane.die()
    assert isinstance(lane.search.schedule.failure, WorkerError)
    assert not lane.start()


def test_lanes_that_die_now_and_then_do_not(lane: Lane) -> None:
    lane.start()
    for batch_id in range(LANES_LOST_IN_A_ROW):
        lane.die()
        lane.start()
        lane.bring(batch_id)
        lane.start()
    assert lane.search.schedule.failure is None


def test_what_comes_after_cancelling_is_ignored(lane: Lane) -> None:
    lane.start()
    lane.search.cancelled = True
    lane.bring(0)
    assert lane.search.schedule.complete == 0 and lane.search.schedule.running == 8
    assert not lane.start()
