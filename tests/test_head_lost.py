"""A head that is gone with its disk: with the study's storage elsewhere another machine finishes the study.

The database is SQLite everywhere, and a PostgreSQL server where this machine has one and a driver for it.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from bruno_ray.errors import StudyError
from bruno_ray.study.storage import load_study
from cluster.jobs.shell import free_port
from tests.support.waiting import wait_for

pytest_plugins = ["tests.support.organism_fixture", "tests.support.local_ray"]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

NAME, TRIALS = "lost", 32
PASSWORD = "open-sesame"
"""Neither of the databases asks for it."""


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/elsewhere.db?password={PASSWORD}"
        return
    bins = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not bins or not importlib.util.find_spec("psycopg"):
        pytest.skip("no PostgreSQL server on this machine, or no psycopg")
    folder, port = Path("/tmp") / f"bruno-lost-{os.getpid()}", free_port()
    folder.mkdir()
    shutil.chown(folder, "postgres")
    as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "env", f"HOME={folder}"]
    try:
        subprocess.run([*as_postgres, bins[-1], "-D", folder / "db", "-A", "trust"], check=True, capture_output=True)
        server = [bins[-1].with_name("postgres"), "-D", folder / "db", "-p", str(port), "-k", folder]
        process = subprocess.Popen([*as_postgres, *server], stderr=subprocess.DEVNULL)
        try:
            url = f"postgresql+psycopg://postgres:{PASSWORD}@127.0.0.1:{port}/postgres"
            wait_for(lambda: can_open(url), "the database server answers")
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
    finally:
        shutil.rmtree(folder)


def can_open(url: str) -> bool:
    try:
        optuna.get_all_study_names(url)
    except Exception:  # whatever a server says that is not there yet
        return False
    return True


def machine(folder: Path, hostname: str, storage: str, joining: dict[str, str], *more: str) -> subprocess.Popen[str]:
    """`bruno-ray run` on a machine of that name, with a disk of its own; the cluster is the same."""
    command = [
        *("unshare", "--uts", "sh", "-c", f'hostname {hostname}; exec "$@"', "sh"),
        *(sys.executable, "-m", "bruno_ray.cli.main", "run", "--behaviour", "organism", "--auto-select"),
        *("--selection.max-kl", "10", "--study.name", NAME, "--study.n-trials", str(TRIALS)),
        *("--study.n-startup-trials", "8", "--study.trials-per-batch", "2", "--ray.object-store-memory", "100000000"),
        *("--output.directory", str(folder), "--residuals.cache-dir", str(folder / "residuals")),
        *("--prompts.n-train", "40", "--prompts.n-validation", "12", "--prompts.n-test", "12"),
        *("--study.storage", storage, *more),
    ]
    log = (folder.with_suffix(".log")).open("w")
    variables = {**os.environ, **joining}
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, start_new_session=True, env=variables)


def complete(storage: str, folder: Path) -> int:
    try:
        study = load_study(storage, folder, NAME)
    except (StudyError, optuna.exceptions.StorageInternalError):
        return 0
    return sum(trial.state == TrialState.COMPLETE for trial in study.get_trials(deepcopy=False))


@pytest.mark.skipif(os.geteuid() != 0, reason="another host name needs root")
def test_another_machine_goes_on_with_the_study_of_a_head_that_is_gone(
    organism: Path, tmp_path: Path, storage: str, joining: dict[str, str]
) -> None:
    first = machine(tmp_path / "first", "head-one", storage, joining)
    try:
        wait_for(lambda: complete(storage, tmp_path) >= 4 or first.poll() is not None, "four trials are complete", 600)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    before = complete(storage, tmp_path)
    assert 4 <= before < TRIALS, (tmp_path / "first.log").read_text()[-3000:]
    shutil.rmtree(tmp_path / "first")

    refused = machine(tmp_path / "second", "head-two", storage, joining)
    assert refused.wait(600) == 2
    assert "is being run from head-one" in (tmp_path / "second.log").read_text()
    shutil.rmtree(tmp_path / "second")

    second = machine(tmp_path / "second", "head-two", storage, joining, "--study.take-over")
    assert second.wait(600) == 0, (tmp_path / "second.log").read_text()[-3000:]
    trials = load_study(storage, tmp_path, NAME).get_trials()
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(done) >= TRIALS and [trial.number for trial in trials] == list(range(len(trials)))
    assert (tmp_path / "second" / NAME / "model" / "bruno.json").is_file()
    written = [path for path in tmp_path.glob("second*/**/*") if path.is_file()] + list(tmp_path.glob("*.log"))
    assert tmp_path / "second" / NAME / "report.html" in written
    assert [path for path in written if PASSWORD.encode() in path.read_bytes()] == [], "the password is kept nowhere"
