"""Runs and saved models from the head to this machine: whole, verified, and never half-written.

A run is copied beside its final place, checked against SHA-256 sums made on the head, and renamed. What an interrupted
fetch has copied is kept and used by the next one. `.fetched.json` in the run remembers the sums, so that it can be told
later whether the head has anything newer, and whether something here was changed since.
"""

import fcntl
import json
import logging
import os
import shlex
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from bruno_ray.files import output_errors, require_free_space, write_json
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import CostRecord
from cluster.errors import FetchError
from cluster.jobs.at_head import COST, files_of, sha256
from cluster.jobs.shell import Shell

logger = logging.getLogger(__name__)

MARK = ".fetched.json"
ROUNDS = 4
"""How often the sums are asked for again while a running study changes its files."""

MANIFEST_TIMEOUT_S = 1800.0
"""Reading a 140 GB model once at 100 MB/s."""


@dataclass(frozen=True)
class RemoteRun:
    """A run on the head, as `cluster.jobs.at_head list` describes it."""

    name: str
    running: bool
    complete: int
    """Completed trials, as far as run.json knows."""
    selected: int | None
    models: tuple[str, ...]
    """Folders of saved models in the run."""
    elsewhere: str | None
    """A saved model outside the run, which `fetch` does not see."""
    bytes: int


def remote_runs(shell: Shell) -> list[RemoteRun]:
    rows = json.loads(shell.run("python -m cluster.jobs.at_head list"))
    return [RemoteRun(**{**row, "models": tuple(row["models"])}) for row in rows]


def manifest_of(shell: Shell, name: str) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of a run on the head, by relative name."""
    text = shell.run(f"python -m cluster.jobs.at_head manifest {shlex.quote(name)}", timeout_s=MANIFEST_TIMEOUT_S)
    manifest = json.loads(text)
    for file in manifest:  # the head is a stranger's machine
        parts = PurePosixPath(file).parts
        if PurePosixPath(file).is_absolute() or not parts or ".." in parts or "\0" in file:
            raise FetchError(f"the head names a file {file!r} in run {name}: nothing was copied")
    return manifest


def is_fetched(run: Path, manifest: dict[str, dict[str, Any]]) -> bool:
    """Whether the run here was fetched in exactly this state."""
    return _mark(run) == manifest


def fetch(shell: Shell, name: str, runs: Path) -> Path:
    """Bring one run to ``runs/name``; returns the folder.

    Raises:
        FetchError: files here have changed since the last fetch, the copy differs from the head's sums, or another
            process fetches the same run.
        OutputError: the disk is full or cannot be written.
    """
    target = runs / name
    manifest = manifest_of(shell, name)
    if target.exists():
        _refuse_changes(target)
        if is_fetched(target, manifest):
            _bring_cost(shell, RunDirectory(target))
            return target
    aside = runs / f".{name}.fetching"
    with output_errors(aside):
        aside.mkdir(parents=True, exist_ok=True)
    with _alone(aside, name):
        manifest = _fill(aside, shell, name, target, manifest)
        write_json(aside / MARK, manifest)
        _put_in_place(aside, target)
    _bring_cost(shell, RunDirectory(target))
    return target


def _bring_cost(shell: Shell, run: RunDirectory) -> None:
    """What the head says it has cost; nothing where it keeps no account."""
    text = shell.run(f"cat ~/runs/{shlex.quote(run.name)}/{COST} 2> /dev/null || true").strip()
    try:
        if text:
            run.save_cost(CostRecord.model_validate_json(text))
    except ValidationError as error:
        logger.warning("the cost of run %s on the head cannot be read: %s", run.name, error.errors()[0]["msg"])


@contextmanager
def _alone(aside: Path, name: str) -> Generator[None, None, None]:
    """Hold the folder that is being filled. Raises `FetchError` while another process does."""
    descriptor = os.open(aside, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(descriptor), aside.stat())
        except (BlockingIOError, FileNotFoundError):  # another fills it, or has just put it in place
            held = False
        if not held:
            raise FetchError(f"another fetch of run {name} is running here: wait for it, then repeat the command")
        yield
    finally:
        os.close(descriptor)


def _fill(
    aside: Path, shell: Shell, name: str, target: Path, manifest: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Copy until everything agrees with the head's sums, which are asked for again; returns those it agrees with."""
    for attempt in range(ROUNDS):
        if attempt:
            manifest = manifest_of(shell, name)
        missing = _missing(aside, target, manifest)
        if not missing:
            break
        require_free_space(aside, sum(manifest[file]["size"] for file in missing), f"run {name}")
        logger.info("%s: copying %d of %d files", name, len(missing), len(manifest))
        _copy(shell, name, missing, aside)
    else:
        if missing := _missing(aside, target, manifest):
            raise FetchError(
                f"{len(missing)} files of {name} differ from the head's checksums, {missing[0]} for one: fetch again"
                " (what was copied is kept); a run that is busy writing can be fetched when it has ended"
            )
    for file in files_of(RunDirectory(aside)).keys() - manifest.keys():
        (aside / file).unlink()
    return manifest


def _missing(aside: Path, target: Path, manifest: dict[str, dict[str, Any]]) -> list[str]:
    """Files that are not here yet as the manifest says. Those of an earlier fetch are taken over without copying."""
    missing = []
    for name, row in manifest.items():
        path, before = aside / name, target / name
        if not path.exists() and _agrees(before, row):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(before, path)
        elif path.exists() and path.stat().st_size > row["size"] and sha256(path, row["size"]) == row["sha256"]:
            os.truncate(path, row["size"])  # a journal that grew between the sums and the copy
        elif not _agrees(path, row):
            missing.append(name)
    return missing


def _agrees(path: Path, row: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == row["size"] and sha256(path, row["size"]) == row["sha256"]


def _copy(shell: Shell, name: str, files: list[str], aside: Path) -> None:
    folder = shell.run(f"printf %s ~/runs/{shlex.quote(name)}")
    if shutil.which("rsync") and shell.run("command -v rsync || true").strip():
        shell.rsync(folder, files, aside)
    else:
        shell.untar(folder, files, aside)


def _refuse_changes(target: Path) -> None:
    mark = _mark(target)
    if mark is None:
        raise FetchError(f"{target} exists and was not fetched: move it away, or fetch to another folder with --to")
    here = {name: path for name, path in files_of(RunDirectory(target)).items() if name != MARK}
    changed = sorted({name for name, path in here.items() if name not in mark or not _agrees(path, mark[name])})
    if changed:
        raise FetchError(
            f"{target} was changed since it was fetched ({changed[0]} for one): move it away, or fetch to another"
            " folder with --to"
        )


def _mark(run: Path) -> dict[str, dict[str, Any]] | None:
    try:
        return json.loads((run / MARK).read_text())
    except (OSError, ValueError):
        return None


def _put_in_place(aside: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    with output_errors(target):
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
