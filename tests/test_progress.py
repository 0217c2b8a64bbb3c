"""What a running study shows, drawn from a snapshot."""

import logging
import time

from rich.console import Console

from bruno_ray import progress
from bruno_ray.study.progress import LogView, Snapshot, render, status_line
from bruno_ray.study.selection import TrialRecord
from bruno_ray.workers.worker_actor import WorkerState
from tests.support.waiting import wait_for

EDIT = {
    "components": {"attention": {"max_weight": 1.2, "max_weight_position": 5.0}},
    "direction_set": "difference_in_means@0",
    "direction_index": 4.5,
}
SNAPSHOT = Snapshot(
    name="gadgets",
    objectives=("behaviour_rate", "kl_divergence"),
    target=200,
    complete=24,
    running=16,
    failed=1,
    elapsed=31.2,
    remaining=229.0,
    memory=700 * 10**6,
    front=tuple(
        TrialRecord(
            17 + i, "COMPLETE", EDIT, {"behaviour_rate": 0.03, "kl_divergence": 0.0213}, {"behaviour_rate": (3, 100)}
        )
        for i in range(11)
    ),
    workers=(
        WorkerState("worker 0", "busy", "head", 4711, memory=3 * 10**9, gpu_memory=14 * 10**9, calls=3),
        WorkerState("worker 1", "lost", losses=2),
    ),
)


def drawn(snapshot: Snapshot) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(snapshot))
    return console.export_text()


def test_the_live_view_shows_counts_as_they_are_and_every_worker():
    text = drawn(SNAPSHOT)
    for part in ("24/200", "16 running, 1 failed", "0:00:31", "0:03:49", "3/100", "0.0213", "8 of 11", "700.0 MB"):
        assert part in text
    for part in ("worker 0", "busy", "head:4711", "3.0 GB", "14.0 GB", "worker 1", "lost"):
        assert part in text
    assert "0.03 " not in text and "3%" not in text


def test_a_log_line_has_the_same_and_no_more_than_one_line():
    line = status_line(SNAPSHOT)
    assert "\n" not in line
    for part in ("24/200", "behaviour_rate 3/100", "(trial 17)", "to go 0:03:49", "1 busy, 1 lost", "memory 3.7 GB"):
        assert part in line


def test_nothing_is_claimed_before_the_first_batch_is_back():
    empty = Snapshot("s", ("kl_divergence",), 10, 0, 8, 0, 0.0, None, 2**20)
    assert "to go ?" in status_line(empty)
    assert "front" not in drawn(empty).lower()


def test_away_from_a_terminal_each_batch_is_a_line_and_the_front_comes_last(caplog):
    with caplog.at_level(logging.INFO, "bruno_ray.study.progress"), LogView(lambda: SNAPSHOT) as view:
        view.batch()
        view.batch()
    lines = [record.getMessage() for record in caplog.records]
    assert [line.startswith("trials 24/200") for line in lines[:3]] == [True, True, False]
    assert lines[2] == "Pareto front:" and len(lines) == 2 + 1 + 1 + 11


def test_a_long_phase_speaks_and_only_the_innermost_one(caplog, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    caplog.set_level(logging.INFO)
    said = lambda text: any(text in message for message in caplog.messages)  # noqa: E731
    with progress.phase("reading", lambda: "3/7 prompts"):
        with progress.phase("loading"):
            wait_for(lambda: said("loading: 0:00:00"), "a line of the inner phase", 30)
        assert not said("reading")
        wait_for(lambda: said("reading: 0:00:00; 3/7 prompts"), "a line of the outer phase", 30)
    assert said("reading: 0:00:00; 3/7 prompts")
    n_lines = len(caplog.messages)
    time.sleep(0.3)
    assert len(caplog.messages) == n_lines, "what is over says nothing"


def test_silence_is_of_the_whole_program_and_no_phase_starts_the_time_anew(caplog, monkeypatch):
    """Two phases of nine seconds each would otherwise be eighteen seconds without a line."""
    monkeypatch.setattr(progress, "EVERY_S", 30.0)
    monkeypatch.setattr(progress._ear, "heard", time.monotonic() - 31.0)
    caplog.set_level(logging.INFO)
    with progress.phase("outer"), progress.phase("short"):
        wait_for(lambda: caplog.messages == ["short: 0:00:00"], "a line of a phase that has just begun", 30)


def test_what_others_say_counts_as_said(caplog, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 30.0)
    monkeypatch.setattr(progress._ear, "heard", time.monotonic() - 31.0)
    caplog.set_level(logging.INFO)
    progress.listen()
    logging.getLogger("bruno_ray.some").info("a line")
    assert time.monotonic() - progress._ear.heard < 30
    with progress.phase("talked about"):
        time.sleep(0.3)
    assert caplog.messages == ["a line"]


def test_what_has_just_spoken_is_not_repeated(caplog, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 30.0)
    caplog.set_level(logging.INFO)
    with progress.phase("short"):
        pass
    assert not caplog.messages
