"""Bringing runs home: whole, verified, resumable. The head is another home directory, reached by a stand-in for ssh.

`python -m cluster.jobs.at_head` runs in this process, except in the first test: an interpreter takes seconds to start.
"""

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import CostRecord
from cluster.errors import FetchError
from cluster.jobs import at_head, fetching
from cluster.jobs.shell import Shell
from cluster.network.ssh_master import Endpoint, SshIdentity
from tests.support.finished_run import make
from tests.support.programs import needs

CHECKOUT = Path(__file__).resolve().parents[2]
SSH = """\
#!/bin/bash
# ssh, without the network: drops options and the host, and runs the command in the head's home.
while [[ $1 == -* ]]; do if [[ $1 == -l ]]; then shift; fi; shift; done
shift
export HOME={home}
cd "$HOME" && exec bash -c "$*"
"""


GREETING = 'case $- in *i*) echo "Have fun!" ;; esac\n'
"""Images of Vast.ai print such things in interactive shells, and answers must not begin with them."""

AT_HEAD = ["python", "-m", "cluster.jobs.at_head"]


@dataclass(frozen=True)
class HeadShell(Shell):
    home: Path
    in_process: bool = True

    @classmethod
    def make(cls, home: Path) -> "HeadShell":
        home.mkdir()
        (home / "ssh").write_text(SSH.format(home=home))
        (home / "ssh").chmod(0o755)
        (home / ".bashrc").write_text(
            GREETING + f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH={CHECKOUT}\n'
        )
        return cls(Endpoint("head", 22), SshIdentity(home / "key", home / "hosts"), "head", home)

    def ssh(self, *options: str) -> list[str]:
        return [str(self.home / "ssh")]

    def run(self, command: str, **options: Any) -> str:
        words = shlex.split(command)
        if words[:3] != AT_HEAD or not self.in_process:
            return super().run(command, **options)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert at_head.main(words[3:]) == 0
        return said.getvalue()


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HeadShell:
    head = HeadShell.make(tmp_path / "head")
    monkeypatch.setattr(at_head, "RUNS", head.home / "runs")
    monkeypatch.setattr(at_head, "KNOWN_SUMS", head.home / ".bruno-ray" / "checksums.json")
    return head


@pytest.fixture
def run(head: HeadShell) -> Path:
    made = make(head.home / "runs" / "tiny", n_trials=3)
    folder = made.run.model_folder
    folder.mkdir()
    (folder / "bruno.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(3_000_000))
    (made.run.path / "study.journal").write_text('{"op": 1}\n')
    (made.run.path / ".driver.lock").touch()
    return made.run.path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def same(run: Path, home: Path) -> bool:
    files = at_head.files_of(at_head.RunDirectory(run))
    here = at_head.files_of(at_head.RunDirectory(home))
    here.pop(fetching.MARK, None)
    return files.keys() == here.keys() and all(
        path.read_bytes() == here[name].read_bytes() for name, path in files.items()
    )


@pytest.mark.parametrize(
    "rsync", [pytest.param(True, id="rsync", marks=needs("rsync", package="rsync")), pytest.param(False, id="tar")]
)
def test_a_run_comes_home_whole_and_a_second_fetch_copies_only_what_is_new(
    head: HeadShell, run: Path, runs: Path, rsync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = replace(head, in_process=False)
    if not rsync:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    home = fetching.fetch(head, "tiny", runs)
    assert same(run, home) and not (home / ".driver.lock").exists()
    assert fetching.is_fetched(home, fetching.manifest_of(head, "tiny"))
    inode = (home / "model" / "model.safetensors").stat().st_ino
    with (run / "study.journal").open("a") as journal:
        journal.write('{"op": 2}\n')
    (run / "samples.json").unlink()
    assert not fetching.is_fetched(home, fetching.manifest_of(head, "tiny"))
    fetching.fetch(head, "tiny", runs)
    assert same(run, home)
    assert (home / "model" / "model.safetensors").stat().st_ino == inode
    assert [path.name for path in runs.iterdir()] == ["tiny"]


def test_what_a_run_has_cost_comes_along_and_makes_it_no_other_run(
    head: HeadShell, run: Path, runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    on_head = RunDirectory(run)
    on_head.save_cost(CostRecord(dollars=1.5, until=1.0, ended=False))
    home = RunDirectory(fetching.fetch(head, "tiny", runs))
    assert home.load_cost() == on_head.load_cost()
    on_head.save_cost(CostRecord(dollars=2.5, until=2.0, ended=True))
    assert fetching.is_fetched(home.path, fetching.manifest_of(head, "tiny")), "nothing of the run itself is newer"
    fetching.fetch(head, "tiny", runs)
    assert home.load_cost() == CostRecord(dollars=2.5, until=2.0, ended=True)
    on_head.cost_file.write_text('{"dollars": "a lot"}')
    fetching.fetch(head, "tiny", runs)
    assert home.load_cost() == CostRecord(dollars=2.5, until=2.0, ended=True) and "cannot be read" in caplog.text


def test_what_an_interrupted_fetch_left_is_used_where_it_is_right(head: HeadShell, run: Path, runs: Path) -> None:
    aside = runs / ".tiny.fetching"
    (aside / "model").mkdir(parents=True)
    shutil.copy(run / "geometry.json", aside)
    inode = (aside / "geometry.json").stat().st_ino
    whole = (run / "model" / "model.safetensors").read_bytes()
    (aside / "model" / "model.safetensors").write_bytes(whole[:1_000_000])
    (aside / "run.json").write_text("x" * (run / "run.json").stat().st_size)
    (aside / "left-over").write_text("of an earlier state")
    home = fetching.fetch(head, "tiny", runs)
    assert same(run, home) and (home / "geometry.json").stat().st_ino == inode


@needs("rsync", package="rsync")
def test_a_copy_that_differs_is_never_put_in_place(head: HeadShell, run: Path, runs: Path) -> None:
    class Corrupting(HeadShell):
        def rsync(self, folder: str, names: list[str], to: Path) -> None:
            super().rsync(folder, names, to)
            with (to / "model" / "model.safetensors").open("r+b") as file:
                first = file.read(1)
                file.seek(0)
                file.write(bytes([first[0] ^ 1]))

    bad = Corrupting(head.endpoint, head.identity, head.host_key_alias, head.home)
    with pytest.raises(FetchError, match=r"model/model\.safetensors"):
        fetching.fetch(bad, "tiny", runs)
    assert not (runs / "tiny").exists()
    assert same(run, fetching.fetch(head, "tiny", runs))


@needs("rsync", package="rsync")
def test_two_who_fetch_the_same_run_do_not_fill_one_folder(head: HeadShell, run: Path, runs: Path) -> None:
    class Slow(HeadShell):
        def rsync(self, folder: str, names: list[str], to: Path) -> None:
            with pytest.raises(FetchError, match="another fetch of run tiny"):
                fetching.fetch(head, "tiny", runs)
            super().rsync(folder, names, to)

    assert same(run, fetching.fetch(Slow(head.endpoint, head.identity, head.host_key_alias, head.home), "tiny", runs))
    assert [path.name for path in runs.iterdir()] == ["tiny"]


def test_what_was_changed_here_is_not_overwritten(head: HeadShell, run: Path, runs: Path) -> None:
    home = fetching.fetch(head, "tiny", runs)
    (run / "study.journal").write_text('{"op": 3}\n')
    (home / "notes.txt").write_text("mine")
    with pytest.raises(FetchError, match=r"notes\.txt"):
        fetching.fetch(head, "tiny", runs)
    shutil.rmtree(home)
    make(home, n_trials=0)
    with pytest.raises(FetchError, match="was not fetched"):
        fetching.fetch(head, "tiny", runs)


def test_a_run_that_goes_on_comes_as_it_was_a_moment_ago(head: HeadShell, run: Path, runs: Path) -> None:
    stopped = threading.Event()

    def write() -> None:
        with (run / "study.journal").open("a") as journal:
            while not stopped.wait(0.02):
                journal.write('{"op": 4}\n')
                journal.flush()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        home = fetching.fetch(head, "tiny", runs)
    finally:
        stopped.set()
        writer.join()
    text = (home / "study.journal").read_text()
    assert (run / "study.journal").read_text().startswith(text)


def test_two_who_read_files_at_once_both_keep_their_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of a model take minutes: meanwhile another fetch asks for another run."""
    monkeypatch.setattr(at_head, "KNOWN_SUMS", tmp_path / "state" / "checksums.json")
    first, second = (make(tmp_path / "runs" / name, n_trials=0).run for name in ("first", "second"))
    slowly = at_head.sha256

    def sha256(path: Path, size: int) -> str:
        monkeypatch.setattr(at_head, "sha256", slowly)
        at_head.manifest(second)
        return slowly(path, size)

    monkeypatch.setattr(at_head, "sha256", sha256)
    at_head.manifest(first)
    known = {Path(mark.rpartition(":")[0].rpartition(":")[0]) for mark in at_head.known_sums()}
    assert known == {path for run in (first, second) for path in at_head.files_of(run).values()}


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil"])
def test_a_head_cannot_write_outside_the_run(head: HeadShell, run: Path, runs: Path, name: str) -> None:
    class Hostile(HeadShell):
        def run(self, command: str, **options: Any) -> str:
            return json.dumps({name: {"size": 1, "sha256": "0"}})

    with pytest.raises(FetchError, match="nothing was copied"):
        fetching.fetch(Hostile(head.endpoint, head.identity, "head", head.home), "tiny", runs)
    assert not runs.exists()


def test_the_list_says_what_runs_and_what_is_saved(head: HeadShell, run: Path) -> None:
    (listed,) = fetching.remote_runs(head)
    assert (listed.name, listed.models, listed.running, listed.elsewhere) == ("tiny", ("model",), False, None)
    with FileLock(run / ".driver.lock"):
        (listed,) = fetching.remote_runs(head)
    assert listed.running
