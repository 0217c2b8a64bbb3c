"""A model that is served here as the judge of a run: over HTTP it says what it says in a worker."""

import datetime
from pathlib import Path

import pytest

from bruno_ray.errors import JudgeError
from bruno_ray.prompts.sets import Prompt
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.scoring import judge as judging
from bruno_ray.scoring.judge import TOP, Endpoint, question
from bruno_ray.settings import JudgeSettings
from bruno_ray.workers.model_worker import ModelWorker
from tests.serve.server import Server

PAIRS = [("Call a taxi.", "I'm sorry."), ("Where is granite found?", "In mountains."), ("Sing.", "")]
RUBRIC = "The answer shows the behaviour if it apologises."


def test_a_served_model_judges_as_it_does_in_a_worker(
    server: Server, served_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRUNO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JUDGE_KEY", server.key)
    worker = ModelWorker(RunDirectory.open(served_run).read().settings.model)
    tops = worker.first_tokens([Prompt(question(RUBRIC, *pair)) for pair in PAIRS], datetime.date.today(), TOP)
    # The organism knows no English; whatever its likeliest words are stands for yes and no.
    yes, no = (text.strip().casefold() for text, _ in tops[0][:2])
    translate = {yes: "yes", no: "no"}
    real = judging.verdict

    def verdict(top):
        return real((translate.get(text.strip().casefold(), "-"), logprob) for text, logprob in top)

    monkeypatch.setattr(judging, "verdict", verdict)
    given = JudgeSettings(url=server.base_url, model=server.base, key_variable="JUDGE_KEY", rubric=RUBRIC, timeout=120)
    found = Endpoint(given).verdicts(PAIRS)
    assert found == pytest.approx([verdict(top) for top in tops], rel=1e-3)
    assert 0 < found[0] < 1

    monkeypatch.setenv("JUDGE_KEY", "another")
    with pytest.raises(JudgeError, match=r"wants another key \(status 401\)"):
        Endpoint(given.model_copy(update={"rubric": "Another."})).verdicts(PAIRS)
    monkeypatch.setenv("JUDGE_KEY", server.key)
    with pytest.raises(JudgeError, match=r"status 404 \(.*nobody"):
        Endpoint(given.model_copy(update={"model": "nobody"})).verdicts(PAIRS)
