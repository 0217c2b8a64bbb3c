"""The study's pages: the run's own study, only to be looked at, only with the key, under any prefix."""

import hashlib
import json
import re
from pathlib import Path

import optuna
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from bruno_ray.errors import StudyError
from bruno_ray.study.storage import open_storage
from serve.pages import study
from serve.pages.read_only_storage import OneStudy
from tests.support import finished_run

OBJECTIVES = ["behaviour_rate", "kl_divergence"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "tiny"
    made = finished_run.make(path, n_trials=12)
    storage = open_storage(None, path)
    optuna.create_study(storage=storage, study_name="another", directions=["minimize"])
    name = made.record.settings.study.name
    optuna.copy_study(from_study_name="s", from_storage=made.study._storage, to_storage=storage, to_study_name=name)
    return path


def client(run: Path, accepts=None, prefix: str = "") -> TestClient:
    app = FastAPI()
    study.mount(app, {"runs/tiny": run}, accepts)
    outer = FastAPI()
    outer.mount(prefix or "/", app)
    return TestClient(outer)


def digest(run: Path) -> str:
    return hashlib.sha256((run / "study.journal").read_bytes()).hexdigest()


@pytest.mark.parametrize("prefix", ["", "/some/prefix"])
def test_page_and_data_of_the_runs_own_study(run: Path, prefix: str):
    before = digest(run)
    pages = client(run, prefix=prefix)
    page = pages.get(f"{prefix}/study/runs-tiny")
    assert re.fullmatch(re.escape(prefix) + r"/study/runs-tiny/dashboard/studies/\d+", page.url.path)
    study_id = page.url.path.rsplit("/", 1)[1]
    # What the page refers to is found from where it stands.
    script = re.search(r'<script defer src="([^"]+)"', page.text)[1]
    assert pages.get(str(page.url.join(script))).text.count("location.pathname.replace") == 4

    studies = pages.get(f"{prefix}/study/runs-tiny/api/studies").json()["study_summaries"]
    assert [study["study_name"] for study in studies] == ["tiny-verbosity"]
    detail = pages.get(f"{prefix}/study/runs-tiny/api/studies/{study_id}").json()
    assert len(detail["trials"]) == 12
    assert detail["objective_names"] == OBJECTIVES
    assert pages.get(f"{prefix}/study/runs-tiny/csv/{study_id}").text.count("COMPLETE") == 12
    assert digest(run) == before


def test_nothing_can_be_written(run: Path):
    before = digest(run)
    pages = client(run)
    for method, path in [
        ("DELETE", "api/studies/1"),
        ("POST", "api/studies"),
        ("PUT", "api/studies/1/note"),
        ("POST", "api/trials/1/tell"),
    ]:
        assert pages.request(method, f"/study/runs-tiny/{path}", json={}).status_code == 405
    study = OneStudy(open_storage(None, run, read_only=True), "tiny-verbosity", OBJECTIVES)
    with pytest.raises(StudyError, match="read only"):
        study.delete_study(study.study_id)
    with pytest.raises(StudyError, match="read only"):
        optuna.create_study(storage=study, study_name="new")
    with pytest.raises(StudyError, match="read only"):
        optuna.load_study(storage=study, study_name="tiny-verbosity").set_user_attr("driver", "me")
    with pytest.raises(KeyError):
        optuna.load_study(storage=study, study_name="another")
    assert digest(run) == before


def test_asks_for_the_key_once(run: Path):
    pages = client(run, accepts=lambda key: key == "the key", prefix="/p")
    asked = pages.get("/p/study/runs-tiny/")
    assert asked.status_code == 401
    for path in ("api/studies", "static/bundle.js", "dashboard/", "csv/1"):
        assert pages.get(f"/p/study/runs-tiny/{path}").status_code == 401

    form = str(asked.url.join(re.search(r'action="([^"]+)"', asked.text)[1]))
    wrong = pages.post(form, data={"key": "a guess"})
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
    again = str(wrong.url.join(re.search(r'action="([^"]+)"', wrong.text)[1]))
    opened = pages.post(again, data={"key": "the key"})
    assert opened.status_code == 200 and opened.url.path.startswith("/p/study/runs-tiny/dashboard/studies/")
    cookie = opened.history[0].headers["set-cookie"]
    assert "Path" not in cookie  # so it is sent to this folder only
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "the key" not in cookie
    assert pages.get("/p/study/runs-tiny/api/studies").status_code == 200


def test_a_cookie_cannot_be_made_up_or_kept_for_ever(run: Path, monkeypatch: pytest.MonkeyPatch):
    pages = client(run, accepts=lambda key: key == "k")
    got = pages.post("/study/login", headers={"Authorization": "Bearer k"})
    assert got.status_code == 200
    until, signature = pages.cookies[study.COOKIE].split(".")
    pages.cookies.clear()

    def status(cookie: str) -> int:
        headers = {"Cookie": f"{study.COOKIE}={cookie}"}
        return pages.get("/study/runs-tiny/api/studies", headers=headers).status_code

    assert status(f"{until}.{signature}") == 200
    for forged in (f"{int(until) + 1}.{signature}", f"{until}.", "x", f"{until}.{'0' * 64}", f"x.{signature}"):
        assert status(forged) == 401
    monkeypatch.setattr(study.time, "time", lambda: float(until) + 1)
    assert status(f"{until}.{signature}") == 401


def test_what_is_missing_is_said(run: Path, tmp_path: Path):
    pages = client(run)
    assert pages.get("/study/other/").status_code == 404
    finished_run.make(tmp_path / "empty", n_trials=0)
    app = FastAPI()
    study.mount(app, {"empty": tmp_path / "empty"}, None)
    answer = TestClient(app).get("/study/empty/")
    assert answer.status_code == 503 and "there is no study" in answer.text
    assert json.dumps("Traceback") not in answer.text
