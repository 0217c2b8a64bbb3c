"""A job that ends by itself while everything goes wrong: the long form of test_main_job_faults."""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState

from bruno_ray.errors import StudyError
from bruno_ray.study.storage import load_study
from tests.cluster.fake_vast.api import Fault
from tests.cluster.fake_vast.state import FakeInstance
from tests.cluster.lab import Lab
from tests.cluster.lab.laptop import Laptop
from tests.cluster.lab.ray_cluster import PATIENCE_S, RayCluster
from tests.support.waiting import wait_for

logger = logging.getLogger(__name__)
pytestmark = [
    *(pytest.mark.nightly, pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow),
    *(pytest.mark.xdist_group("lab"), pytest.mark.timeout(7200)),
]

TRIALS = 1400
NAME = "fault-run"
JOB = (
    *("bruno-ray", "run", "--behaviour", "organism", "--study.name", NAME, "--study.n-trials", str(TRIALS)),
    *("--study.n-startup-trials", "300", "--study.trials-per-batch", "1", "--ray.workers", "3", "--auto-select"),
    *("--selection.max-kl", "10"),
)
OUTAGE = (Fault.TOO_FREQUENT, Fault.SERVER_ERROR, Fault.GARBAGE, Fault.NOTHING)


@pytest.fixture(scope="module")
def laptop(lab: Lab, organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    folder = tmp_path_factory.mktemp("laptop")
    (folder / "work").mkdir()
    with RayCluster(lab, folder, provider={"boot_timeout_s": 25, "join_timeout_s": 150}) as cluster:
        laptop = Laptop(cluster, folder / "work")
        laptop.run("up", "--yes")
        laptop.give_organism()
        yield laptop


def states(cluster: RayCluster) -> Counter[str]:
    run = cluster.head().home / "runs" / NAME
    if not (run / "study.journal").exists():
        return Counter()
    try:
        study = load_study(None, run, NAME)
    except StudyError:  # the journal is there, its first record is not yet
        return Counter()
    return Counter(trial.state.name for trial in study.get_trials(deepcopy=False))


def joined(cluster: RayCluster) -> list[FakeInstance]:
    return [instance for instance in cluster.billed("worker") if "up-to-date" in instance.label]


def test_the_job_survives_what_happens_to_machines_network_and_api(laptop: Laptop) -> None:
    cluster, vast = laptop.cluster, laptop.cluster.vast
    cluster.api.faults.extend([Fault.TAKEN, Fault.FAILS_AFTER_CONTRACT])
    submitted = laptop.start("submit", "--", *JOB)
    assert submitted.stdout is not None
    line = submitted.stdout.readline()
    while not line.startswith("job "):
        assert line, "submit said nothing of its job"
        line = submitted.stdout.readline()
    job = line.split()[1]
    submitted.kill()  # the laptop is gone

    stuck = cluster.next_worker(set())
    vast.never_boots(stuck.id)
    mute = cluster.next_worker({stuck.id})
    wait_for(lambda: cluster.machines[mute.id].container is not None, "its container", PATIENCE_S, cluster.logs)
    cluster.container(mute).cut()
    logger.info("instance %d is stuck in loading, the ssh of %d never answers", stuck.id, mute.id)

    wait_for(lambda: states(cluster)["COMPLETE"] >= 5, "the first trials", PATIENCE_S, cluster.logs)
    wait_for(lambda: stuck.destroyed_at is not None, "the end of the stuck machine", PATIENCE_S, cluster.logs)
    wait_for(lambda: len(joined(cluster)) >= 2, "two workers", PATIENCE_S, cluster.logs)
    logger.info("trials: %s", states(cluster))

    first, second = joined(cluster)[:2]
    cluster.container(first).cut()
    time.sleep(2)
    cluster.container(first).mend()
    supervisor = json.loads(cluster.head().read("root/.bruno-ray/mesh/status.json"))["pid"]
    cluster.shell(cluster.head(), f"kill -9 {supervisor}")
    for outage in OUTAGE:
        cluster.api.outage = outage
        time.sleep(15)
    cluster.api.outage = None
    logger.info("trials after 60 s without the API: %s", states(cluster))
    cluster.container(first).cut()
    time.sleep(45)
    cluster.container(first).mend()
    logger.info("trials after a cut of 45 s: %s", states(cluster))
    assert first.destroyed_at is None
    vast.host_deletes(second.id)
    assert states(cluster)["COMPLETE"] < TRIALS, "the faults must happen during the job: raise TRIALS"
    output = laptop.run("logs", job, timeout=2400)
    logger.info("the job said:\n%s", output[-2500:])

    laptop.run("fetch", NAME)
    run = laptop.folder / "runs" / NAME
    trials = load_study(None, run, NAME).get_trials()
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    wait_for(lambda: not cluster.billed("worker"), "the end of the idle workers", PATIENCE_S, cluster.logs)
    assert mute.destroyed_at is not None, "a machine whose ssh never answers is given back"

    assert "nothing is billed" in laptop.run("down", "--yes") and vast.billed() == []
