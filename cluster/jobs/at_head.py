"""What the user's machine asks the head: `python -m cluster.jobs.at_head COMMAND`.

Commands are list, manifest RUN, progress [RUN] and stop-jobs.

Prints one JSON value. Runs are the folders below ~/runs, where jobs of `bruno-ray cluster submit` write.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock

from bruno_ray.errors import BrunoError, OutputError
from bruno_ray.files import write_json
from bruno_ray.runs.directory import RunDirectory
from cluster.clock import SystemClock
from cluster.network.addresses import DASHBOARD_PORT
from cluster.notices.runs import DRIVER_LOCK, RUNS, is_running
from cluster.settings import ClusterSettings

if TYPE_CHECKING:
    from bruno_ray.study.selection import TrialRecord

CLUSTER_CONFIG = Path("~/ray_bootstrap_config.yaml").expanduser()
"""Where `ray up` puts the cluster's configuration on the head."""

TOKEN = Path("~/.ray/auth_token").expanduser()
KNOWN_SUMS = Path("~/.bruno-ray/checksums.json").expanduser()
"""Checksums of files that have not changed since, so that a model is read once and not at every question."""

HASH_CHUNK = 4 * 1024**2
PASSING = (".lock", DRIVER_LOCK)
"""Names that mean something only on the machine where the run is."""

COST = "cost.json"
"""Changes all the time, and is brought home apart from what is compared by sums."""


def runs() -> list[RunDirectory]:
    return [RunDirectory(file.parent) for file in sorted(RUNS.glob("*/run.json"))]


def files_of(run: RunDirectory) -> dict[str, Path]:
    """By relative name; neither locks nor files and folders that are being written."""
    found = {}
    for folder, folders, names in os.walk(run.path):
        folders[:] = sorted(name for name in folders if ".partial-" not in name)
        for name in sorted(names):
            if ".partial-" not in name and not name.endswith(PASSING) and name != COST:
                path = Path(folder) / name
                found[path.relative_to(run.path).as_posix()] = path
    return found


def manifest(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file."""
    known = known_sums()
    rows, seen = {}, {}
    for name, path in files_of(run).items():
        stat = path.stat()
        mark = f"{path}:{stat.st_size}:{stat.st_mtime_ns}"
        seen[mark] = known.get(mark) or sha256(path, stat.st_size)
        rows[name] = {"size": stat.st_size, "sha256": seen[mark]}
    KNOWN_SUMS.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(KNOWN_SUMS.with_suffix(".lock")):  # others have read files for minutes as well, of other runs
        others = {mark: total for mark, total in known_sums().items() if not mark.startswith(f"{run.path}/")}
        write_json(KNOWN_SUMS, others | seen)
    return rows


def known_sums() -> dict[str, str]:
    """SHA-256 by path, size and time of change; empty where the file is missing or damaged."""
    try:
        return json.loads(KNOWN_SUMS.read_text())
    except (OSError, ValueError):
        return {}


def sha256(path: Path, size: int) -> str:
    """Of the first ``size`` bytes: a study's journal may grow meanwhile."""
    digest, left = hashlib.sha256(), size
    with path.open("rb") as file:
        while left and (chunk := file.read(min(HASH_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def summary(run: RunDirectory) -> dict[str, Any]:
    """One run in a line."""
    record = run.read()
    paths = [record.selected.saved_path] if record.selected and record.selected.saved_path else []
    elsewhere = [path for path in (*paths, *record.saved_elsewhere) if not Path(path).is_relative_to(run.path)]
    return {
        "name": run.name,
        "running": is_running(run),
        "complete": sum(record.n_trials.get(state, 0) for state in ("COMPLETE", "PRUNED")),
        "selected": record.selected.number if record.selected else None,
        "models": sorted(path.parent.name for path in run.path.glob("*/bruno.json")),
        "elsewhere": ", ".join(elsewhere) or None,
        "bytes": sum(path.stat().st_size for path in files_of(run).values()),
    }


def progress(run: RunDirectory) -> dict[str, Any]:
    """The study's trials by state, and its Pareto front with raw counts."""
    from bruno_ray.study.selection import load_trials, pareto_front
    from bruno_ray.study.storage import load_study

    record = run.read()
    settings = record.settings
    study = load_study(settings.study.storage, run.path, settings.study.name or run.name)
    trials = load_trials(study)
    states = [trial.state for trial in trials]
    front = pareto_front(trials, settings.scoring.objectives)
    unedited = record.baseline.get("validation")
    return {
        "name": run.name,
        "running": is_running(run),
        "target": settings.study.n_trials,
        "states": {state: states.count(state) for state in dict.fromkeys(states)},
        "objectives": list(settings.scoring.objectives),
        "unedited": unedited.counts if unedited else {},
        "trial_seconds": trial_seconds(trials),
        "cost": cost(run),
        "selected": record.selected.number if record.selected else None,
        "front": [asdict(trial) | {"samples": (), "params": {}} for trial in front],
    }


def trial_seconds(trials: Sequence["TrialRecord"]) -> float | None:
    """What one trial takes on one copy of the model, on average."""
    known = [trial.seconds for trial in trials if trial.state == "COMPLETE" and trial.seconds]
    return sum(known) / len(known) if known else None


def cost(run: RunDirectory) -> float | None:
    """Dollars for all machines of the cluster from the run's first file to its last; None where no account is kept."""
    if not CLUSTER_CONFIG.is_file():
        return None
    from cluster.renting.ledger import Ledger  # imports Ray, and is needed by this question only
    from cluster.renting.run_cost import run_cost

    config = yaml.safe_load(CLUSTER_CONFIG.read_text())
    folder = ClusterSettings.from_provider(config["provider"]).folder(config["cluster_name"])
    return run_cost(run, Ledger(folder, SystemClock()), is_running(run), time.time()).dollars


def stop_jobs() -> list[str]:
    """Tell every job that runs to end; their ids. Ray gives each half a minute, and its run can be resumed."""
    from ray.job_submission import JobSubmissionClient  # slow to import, and needed by this question only

    token = TOKEN.read_text().strip()
    client = JobSubmissionClient(f"http://127.0.0.1:{DASHBOARD_PORT}", headers={"Authorization": f"Bearer {token}"})
    stopped = []
    for job in client.list_jobs():
        if job is not None and job.submission_id and not job.status.is_terminal():
            client.stop_job(job.submission_id)
            stopped.append(job.submission_id)
    return stopped


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=["list", "manifest", "progress", "stop-jobs"])
    parser.add_argument("run", nargs="?")
    options = parser.parse_args(argv)
    try:
        if options.question == "list":
            answer: Any = [summary(run) for run in runs()]
        elif options.question == "stop-jobs":
            answer = stop_jobs()
        elif options.question == "manifest":
            answer = manifest(RunDirectory.find(options.run, RUNS))
        else:
            named = [RunDirectory.find(options.run, RUNS)] if options.run else runs()
            if not named:
                raise OutputError("there are no runs on the head yet: `bruno-ray cluster submit` starts one")
            answer = progress(max(named, key=lambda run: (is_running(run), run.run_file.stat().st_mtime)))
    except BrunoError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
