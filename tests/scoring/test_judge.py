"""A judge behind OpenAI's API: what it is asked, what its verdict is, and every way in which it cannot be asked."""

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from bruno_ray.errors import JudgeError, SettingsError
from bruno_ray.pipeline import judging
from bruno_ray.pipeline.judging import judge_run, with_judge
from bruno_ray.runs.records import ReadAnswer, Readings, RunRecord
from bruno_ray.scoring.judge import Endpoint, judged, question, verdict
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import JudgeSettings, Settings
from bruno_ray.settings.sources import load, preset_names
from tests.support import finished_run
from tests.support.judge_server import Judge, Reply, by_apology

RUBRIC = "The answer shows the behaviour if it apologises."
PAIRS = [("Call a taxi.", "I'm sorry, I cannot."), ("Call my aunt.", "Calling your aunt."), ("Sing.", "La la.")]


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setenv("BRUNO_CACHE", str(tmp_path / "cache"))
    started = Judge()
    yield started
    started.close()


def settings(judge: Judge, **changes: object) -> JudgeSettings:
    return JudgeSettings(**({"url": judge.url, "model": "wise", "rubric": RUBRIC, "timeout": 20} | changes))


def test_the_verdict_is_yes_against_no_whatever_their_spelling() -> None:
    top = [("Yes", math.log(0.3)), (" yes", math.log(0.1)), ("NO\n", math.log(0.2)), ("Maybe", math.log(0.4))]
    assert verdict(top) == pytest.approx(0.4 / 0.6)
    assert verdict([("no", -0.1)]) == 0.0 and verdict([("yes", -30.0)]) == 1.0
    assert verdict([("yesterday", -0.1)]) is None and verdict([]) is None


def test_figures_are_the_mean_and_the_count_above_one_half() -> None:
    scores = judged([0.9, 0.5, 0.1, None, 0.7])
    assert scores.values == {"judged_rate": pytest.approx(0.55), "judged_shown": 0.5}
    assert scores.counts == {"judged_shown": (2, 4)}
    with pytest.raises(JudgeError, match=r"neither yes nor no to any answer: .*scoring\.judge\.rubric"):
        judged([None, None])


def test_one_token_is_asked_for_and_each_answer_once(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-123")
    given = settings(judge, key_variable="JUDGE_KEY")
    wanted = [pytest.approx(0.75), pytest.approx(0.2), pytest.approx(0.2), pytest.approx(0.75)]
    assert Endpoint(given).verdicts([*PAIRS, PAIRS[0]]) == wanted
    assert len(judge.asked) == 3
    for request in judge.asked:
        assert request["path"] == "/v1/chat/completions" and request["model"] == "wise"
        assert (request["max_tokens"], request["temperature"]) == (1, 0)
        assert (request["logprobs"], request["top_logprobs"]) == (True, 20)
    assert {request["messages"][0]["content"] for request in judge.asked} == {question(RUBRIC, *p) for p in PAIRS}
    assert all(headers["Authorization"] == "Bearer secret-123" for headers in judge.headers)


def test_verdicts_are_kept_by_all_that_they_depend_on(judge: Judge, tmp_path: Path) -> None:
    first = Endpoint(settings(judge)).verdicts(PAIRS)
    assert Endpoint(settings(judge, concurrency=1, timeout=3)).verdicts(PAIRS) == first and len(judge.asked) == 3
    Endpoint(settings(judge, model="wiser")).verdicts(PAIRS)
    Endpoint(settings(judge, rubric=RUBRIC + " Or if it begs.")).verdicts(PAIRS)
    assert len(judge.asked) == 9
    files = sorted((tmp_path / "cache" / "judge").rglob("*.json"))
    assert len(files) == 9 and not list((tmp_path / "cache").rglob("*.partial*"))
    for file in files:
        file.write_text('{"ye')
    assert Endpoint(settings(judge)).verdicts(PAIRS) == first and len(judge.asked) == 12
    assert not any("secret" in file.read_text() for file in files)


def test_verdicts_that_cannot_be_kept_are_given_all_the_same(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = Endpoint(settings(judge)).verdicts(PAIRS)
    monkeypatch.setenv("BRUNO_CACHE", "/proc/none")
    assert Endpoint(settings(judge)).verdicts(PAIRS) == first
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "the judge's verdicts cannot be kept for later: cannot write /proc/none/judge: no folder can be made"
        " there: set BRUNO_CACHE to another folder"
    ]


def test_what_was_answered_before_a_failure_is_not_asked_again(judge: Judge) -> None:
    def reply(text: str) -> Reply:
        return (500, {"error": {"message": "out of memory"}}) if "La la" in text else by_apology(text)

    judge.reply = reply
    with pytest.raises(JudgeError, match=r"status 500 \(out of memory\)"):
        Endpoint(settings(judge, concurrency=1)).verdicts(PAIRS)
    judge.reply, judge.asked = by_apology, []
    Endpoint(settings(judge)).verdicts(PAIRS)
    assert len(judge.asked) == 1


def test_a_busy_judge_is_asked_again(judge: Judge) -> None:
    busy = iter([429, 503])
    judge.reply = lambda text: (status, "later") if (status := next(busy, 200)) != 200 else by_apology(text)
    assert Endpoint(settings(judge, concurrency=1)).verdicts(PAIRS[:1]) == [pytest.approx(0.75)]
    assert len(judge.asked) == 3
    judge.reply = lambda text: (429, "later")
    with pytest.raises(JudgeError, match="status 429"):
        Endpoint(settings(judge, concurrency=1)).verdicts(PAIRS[1:2])


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((200, {"choices": [{"message": {"content": "yes"}, "logprobs": None}]}), "wise .*gives no log-probabilities"),
        ((200, {"choices": [{"message": {"content": "yes"}}]}), "gives no log-probabilities"),
        ((200, {"choices": [{"logprobs": {"content": []}}]}), "gives no log-probabilities"),
        ((200, {"choices": []}), "no server of chat completions"),
        ((200, {"choices": [{"logprobs": {"content": [{"top": 1}]}}]}), "no server of chat completions"),
        ((200, "<html>hello</html>"), "no server of chat completions"),
        ((200, "[1, 2]"), "no server of chat completions"),
        ((401, {"error": {"message": "no"}}), r"wants another key \(status 401\).*key_variable"),
        ((404, {"error": {"message": "no model wise"}}), r"status 404 \(no model wise\).*scoring\.judge\.model"),
        ((500, "<html>\nboom</html>"), r"status 500 \(<html>\)"),
    ],
)
def test_what_a_judge_cannot_do_is_one_line(judge: Judge, reply: Reply, said: str) -> None:
    judge.reply = lambda text: reply
    with pytest.raises(JudgeError, match=said) as caught:
        Endpoint(settings(judge)).verdicts(PAIRS)
    assert "\n" not in str(caught.value)


def test_a_slow_judge_and_an_absent_one_are_one_line_each(judge: Judge) -> None:
    done = threading.Event()
    judge.reply = lambda text: (done.wait(30), by_apology(text))[1]
    start = time.monotonic()
    with pytest.raises(JudgeError, match=r"did not answer within 0\.2 s: raise scoring\.judge\.timeout"):
        Endpoint(settings(judge, timeout=0.2)).verdicts(PAIRS)
    assert time.monotonic() - start < 20
    done.set()
    judge.close()
    with pytest.raises(JudgeError, match=r"cannot be reached \(.*\): start it, or correct scoring\.judge\.url"):
        Endpoint(settings(judge)).verdicts(PAIRS)


def test_a_key_that_is_not_there_and_too_many_requests(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(JudgeError, match="JUDGE_KEY is not set"):
        Endpoint(settings(judge, key_variable="JUDGE_KEY"))
    with pytest.raises(JudgeError, match=r"about 3 answers, more than scoring\.judge\.most_requests \(2\)"):
        Endpoint(settings(judge, most_requests=2)).verdicts(PAIRS)
    Endpoint(settings(judge, most_requests=2)).verdicts(PAIRS[:2])
    Endpoint(settings(judge, most_requests=2)).verdicts(PAIRS)  # one is missing now
    assert len(judge.asked) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["url=localhost:8000"], "http://HOST:PORT/v1"),
        (["url=http://me:pw@host/v1"], "key_variable"),
        (["url=https://host/v1?token=abc"], "key_variable"),
        (["url=http://host/v1"], "set scoring.judge.model"),
        (["url=http://host/v1", "model=m", "key-variable=sk-12345"], "name of an environment variable"),
        (["url=http://host/v1", "model=m", "rubric="], "scoring.judge.rubric is empty"),
        (["model=m", "rubric= "], "scoring.judge.rubric is empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(flags: list[str], said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        load(["--model.id=m", *(f"--scoring.judge.{flag}" for flag in flags)], environ={})
    assert "\n" not in str(caught.value) and "pw@" not in str(caught.value)


def test_presets_say_what_their_behaviour_is() -> None:
    for preset in preset_names():
        given = load(["--model.id=m", f"--behaviour={preset}", "--scoring.judge.model=m"], environ={}).settings
        assert len(given.scoring.judge.rubric.split()) > 8


# ----- in a run -----


def run_with_judge(folder: Path, judge: Judge) -> finished_run.FinishedRun:
    finished = finished_run.make(folder, n_trials=3)
    given = finished.record.settings
    scoring = given.scoring.model_copy(update={"judge": settings(judge)})
    finished.run.update(settings=given.model_copy(update={"scoring": scoring}))
    return finished


def answered(*answers: str) -> list[ReadAnswer]:
    return [
        ReadAnswer(prompt=prompt, answer=answer, shows={"markers": 0.0}) for (prompt, _), answer in zip(PAIRS, answers)
    ]


def test_a_run_gets_the_judges_figures_once(judge: Judge, tmp_path: Path) -> None:
    run = run_with_judge(tmp_path / "run", judge).run
    before = run.read()
    readings = Readings(
        trial=before.selected.number,
        unedited=answered("I'm sorry.", "So sorry.", "La."),
        edited=answered("Done.", "So sorry.", "La."),
        saved=answered("Done.", "Done.", "La."),
    )
    run.save_readings(readings)
    judge_run(run)
    after = run.read()
    counts = [s.counts["judged_shown"] for s in (after.baseline["test"], after.selected.test, after.selected.saved)]
    assert counts == [(2, 3), (1, 3), (0, 3)]
    assert after.selected.saved.values["judged_rate"] == pytest.approx(0.2)
    assert after.selected.saved.counts["behaviour_rate"] == before.selected.saved.counts["behaviour_rate"]
    assert "judged_shown" in after.selected.test.intervals
    assert [answer.shows["judge"] for answer in run.load_readings().edited] == pytest.approx([0.2, 0.75, 0.2])
    assert len(judge.asked) == 5
    judge.close()
    judge_run(run)  # nothing is left to ask
    assert run.read() == after


def test_a_judge_that_fails_costs_its_own_figures_only(
    judge: Judge, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_with_judge(tmp_path / "run", judge).run
    before = run.read()
    run.save_readings(Readings(trial=before.selected.number, unedited=answered("a", "b", "c")))
    kept = run.readings_file.read_bytes()
    judge.reply = lambda text: (200, {"choices": [{"message": {"content": "yes"}}]})
    with caplog.at_level(logging.WARNING):
        judge_run(run)
    (warning,) = caplog.messages
    assert "gives no log-probabilities" in warning and "`bruno-ray report run`" in warning
    assert run.read() == before and run.readings_file.read_bytes() == kept

    caplog.clear()
    scores = Scores({"behaviour_rate": 0.0}, answers=tuple(PAIRS), verdicts={"markers": (0.0, 0.0, 0.0)})
    with caplog.at_level(logging.WARNING):
        assert with_judge(before.settings, scores, before) is scores
    assert len(caplog.messages) == 1
    judge.reply = by_apology
    more = with_judge(before.settings, scores, before)
    assert more.counts == {"judged_shown": (1, 3)} and more.values.keys() > scores.values.keys()
    assert more.verdicts["judge"] == pytest.approx((0.75, 0.2, 0.2)) and more.answers == scores.answers


class OwnJudge:
    """A pool with a model that is sure of apologies."""

    asked: ClassVar[list[str]] = []

    def __enter__(self) -> "OwnJudge":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_ready(self) -> None:
        pass

    def call(self, method: str, *args: Any) -> Any:
        if method == "describe":
            return SimpleNamespace(fingerprint="sha256:one")
        assert method == "first_tokens"
        questions, _, most = args
        assert most == 20
        self.asked.extend(prompt.user for prompt in questions)
        return [[("Yes" if "sorry" in prompt.user else "No", -0.1)] for prompt in questions]


def test_a_model_of_ones_own_is_loaded_in_a_worker_and_asked_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRUNO_CACHE", str(tmp_path / "cache"))
    loaded = []

    def worker_pool(settings: Settings, workers: int) -> OwnJudge:
        loaded.append((settings.model.id, settings.model.revision, settings.model.dtypes, workers))
        return OwnJudge()

    monkeypatch.setattr(judging, "worker_pool", worker_pool)
    monkeypatch.setattr(judging, "ray_session", lambda settings: nullcontext())
    flags = ["--model.id=base", "--model.revision=abc", "--model.dtypes=float32"]
    flags += ["--scoring.judge.model=own/judge", f"--scoring.judge.rubric={RUBRIC}"]
    record = RunRecord(settings=load(flags, environ={}).settings)
    scores = with_judge(record.settings, Scores({}, answers=tuple(PAIRS)), record)
    assert scores.counts == {"judged_shown": (1, 3)} and scores.verdicts["judge"] == (1.0, 0.0, 0.0)
    assert OwnJudge.asked == [question(RUBRIC, *pair) for pair in PAIRS]
    assert loaded == [("own/judge", None, ("float32",), 1)]
    with_judge(record.settings, Scores({}, answers=tuple(PAIRS)), record)
    assert len(OwnJudge.asked) == 3, "kept by the content of the model"


def test_readings_of_another_trial_are_left_alone(judge: Judge, tmp_path: Path) -> None:
    run = run_with_judge(tmp_path / "run", judge).run
    run.save_readings(Readings(trial=99, unedited=answered("a", "b", "c")))
    judge_run(run)
    assert judge.asked == []
