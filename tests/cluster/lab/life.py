"""One cluster for all tests that need a whole one: they live through it in the order of `LIFE`.

It is brought up once, runs one job that lasts until the tests have done to it what they want to, and is taken down by
the last of them. Its machines are 60 ms away, and workers reach the head alone. Each step is a fixture, so that a file
can be run alone as well.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bruno_ray.errors import StudyError
from bruno_ray.study.storage import load_study
from tests.cluster.fake_vast.api import Fault
from tests.cluster.fake_vast.state import FakeInstance
from tests.cluster.lab import Container, Lab, far_judge
from tests.cluster.lab.far_away import ROUND_TRIP_S
from tests.cluster.lab.laptop import Laptop
from tests.cluster.lab.ray_cluster import PATIENCE_S, RayCluster
from tests.support.waiting import wait_for

logger = logging.getLogger(__name__)

LIFE = ("test_main_job", "test_isolation", "test_main_job_faults", "test_ray_up")
"""The test files in which the cluster lives, in order."""

NAME = "lab-run"
ENDLESS = 100_000
"""Trials of the job: it ends when a test ends it."""
WORKERS = 3
JOB = (
    *("bruno-ray", "run", "--behaviour", "organism", "--study.name", NAME, "--study.n-trials", str(ENDLESS)),
    *("--study.n-startup-trials", str(ENDLESS), "--study.trials-per-batch", "1", "--ray.workers", str(WORKERS)),
    *("--auto-select", "--selection.max-kl", "10"),
    *("--prompts.n-train", "40", "--prompts.n-validation", "12", "--prompts.n-test", "12"),
    *("--scoring.scorers", f"behaviour_rate,kl_divergence,{far_judge.__file__}:FarJudge"),
)
NODES = """
import json, ray
ray.init(address="auto", log_to_driver=False)
print("NODES " + json.dumps({node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}))
"""


@dataclass
class RunningJob:
    """The main job while it runs, and the machines that were no use to it."""

    laptop: Laptop
    id: str
    stuck: FakeInstance
    """Never boots."""
    mute: FakeInstance
    """Boots, and its ssh never answers."""

    @property
    def cluster(self) -> RayCluster:
        return self.laptop.cluster

    @property
    def folder(self) -> Path:
        """Of the run, on the head."""
        return self.cluster.head().home / "runs" / NAME

    def states(self) -> Counter[str]:
        """The study's trials by state."""
        return Counter(self.trials().values())

    def trials(self) -> dict[int, str]:
        """State of each trial by number."""
        if not (self.folder / "study.journal").exists():
            return {}
        try:
            study = load_study(None, self.folder, NAME)
        except StudyError:  # the journal is there, its first record is not yet
            return {}
        return {trial.number: trial.state.name for trial in study.get_trials(deepcopy=False)}

    def goes_on(self, trials: int = 5) -> None:
        """Return when so many more trials are complete."""
        wanted = self.states()["COMPLETE"] + trials
        wait_for(lambda: self.states()["COMPLETE"] >= wanted, f"{trials} more trials", PATIENCE_S, self.cluster.logs)

    def joined(self) -> list[FakeInstance]:
        """Workers that are set up."""
        return [instance for instance in self.cluster.billed("worker") if "up-to-date" in instance.label]

    def uses_every_machine(self) -> bool:
        """Whether as many machines are set up as it has workers, and all of those are at work."""
        return len(self.joined()) == WORKERS and f"workers: {WORKERS} busy" in self.log().rpartition("\n")[0][-500:]

    def given_up(self) -> int:
        """How many of the machines that were no use to it are given back."""
        return sum(instance.destroyed_at is not None for instance in (self.stuck, self.mute))

    def containers(self) -> list[Container]:
        """The head and the workers that are set up."""
        return [self.cluster.head(), *map(self.cluster.container, self.joined())]

    def log(self) -> str:
        """What the job has printed so far."""
        pattern = f"tmp/ray/session_2*/logs/job-driver-{self.id}.log"
        return "".join(path.read_text(errors="replace") for path in self.cluster.head().folder.glob(pattern))

    def ray_nodes(self) -> dict[str, str]:
        """Ray's id of every node that it takes for alive, by address."""
        said = self.cluster.driver(NODES)
        return json.loads(said.rpartition("NODES ")[2])


@pytest.fixture(scope="session")
def laptop(namespaces: None, organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    """The user's machine, after `bruno-ray cluster up`."""
    folder = tmp_path_factory.mktemp("laptop")
    (folder / "work").mkdir()
    settings = {"mesh": "head-only", "boot_timeout_s": 60, "join_timeout_s": 300}
    with Lab(ROUND_TRIP_S) as lab, RayCluster(lab, folder, provider=settings) as cluster:
        laptop = Laptop(cluster, folder / "work")
        try:
            laptop.run("up", "--yes")
            laptop.give_organism()
            yield laptop
        finally:
            logger.info("seconds: %s", {step: round(seconds) for step, seconds in laptop.steps.items()})


@pytest.fixture(scope="session")
def job(laptop: Laptop) -> RunningJob:
    """The main job with two workers at work, although the first offers were no good. Nobody follows it."""
    cluster = laptop.cluster
    cluster.api.faults.extend([Fault.TAKEN, Fault.FAILS_AFTER_CONTRACT])
    submitted = laptop.start("submit", "--", *JOB)
    try:
        assert submitted.stdout is not None
        line = submitted.stdout.readline()
        while not line.startswith("job "):
            assert line, "submit said nothing of its job"
            line = submitted.stdout.readline()
    finally:
        submitted.kill()  # the laptop is gone
    stuck = cluster.next_worker(set())
    cluster.vast.never_boots(stuck.id)
    mute = cluster.next_worker({stuck.id})
    wait_for(lambda: cluster.machines[mute.id].container is not None, "its container", PATIENCE_S, cluster.logs)
    cluster.container(mute).cut()
    logger.info("instance %d is stuck in loading, the ssh of %d never answers", stuck.id, mute.id)
    job = RunningJob(laptop, line.split()[1], stuck, mute)
    wait_for(lambda: job.states()["COMPLETE"] >= 5, "the first trials", PATIENCE_S, cluster.logs)
    wait_for(lambda: len(job.joined()) >= 2, "two workers", PATIENCE_S, cluster.logs)
    job.goes_on()
    return job
