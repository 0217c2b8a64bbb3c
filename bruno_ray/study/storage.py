"""Where a study lives: a journal file in the run directory, or any Optuna storage URL.

``open_study`` is the one way in for a driver: it checks that the stored study is the same experiment and that no
other driver is running it, and marks itself as the driver until it leaves.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import optuna
import psutil
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend
from sqlalchemy.exc import SQLAlchemyError

from bruno_ray.errors import NoStudyError, StudyError, first_line
from bruno_ray.optuna_internals import journal_backend, storage_of
from bruno_ray.settings.passwords import with_password, without_password
from bruno_ray.study.fingerprint import first_difference

logger = logging.getLogger(__name__)

JOURNAL = "study.journal"

_told: set[tuple[Path, int]] = set()
"""Places of journals that were said to be lost: a command opens a study several times."""


class RunJournal(BaseJournalBackend):
    """Journal file that writes several records at once and survives ``kill -9`` at any point.

    Differences from Optuna's own file backend: records made inside ``with journal.batch()`` reach the disk in one
    append and one fsync (sampling one trial makes about twelve, an fsync each is 2-3 ms); the lock is one that the
    kernel gives back when its holder dies; a last line that was cut off is removed, and what a power loss has left as
    NUL bytes is skipped, instead of making the whole file unreadable.
    """

    def __init__(self, path: Path, read_only: bool = False):
        self._path = path
        self._lock = FileLock(f"{path}.lock")
        self._offsets = [0]  # byte at which record i starts; the last entry is where the next one will
        self.n_lost = 0
        """Lines that were skipped so far."""

        self._pending: list[dict[str, Any]] | None = None
        if not read_only:
            with self._lock:
                self._repair()

    def _repair(self) -> None:
        with open(self._path, "ab+") as file:
            file.seek(0)
            content = file.read()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                logger.warning("%s ended in half a record, which was removed", self._path)
                file.truncate(end)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        with open(self._path, "rb") as file:
            position = min(log_number_from, len(self._offsets) - 1)
            file.seek(self._offsets[position])
            for line in file:
                if not line.endswith(b"\n"):  # being written right now
                    break
                is_new = position + 1 == len(self._offsets)
                # Blocks that a power loss has kept from the disk read as NULs; a record may go on behind them.
                whole = line.rpartition(b"\0")[2]
                if whole != line:
                    if is_new:
                        self._lose(self._offsets[-1], line, whole)
                    if _record(whole) is None:
                        if is_new:
                            self._offsets[-1] += len(line)
                        continue
                if is_new:
                    self._offsets.append(self._offsets[-1] + len(line))
                if position >= log_number_from:
                    if (record := _record(whole)) is None:
                        start = self._offsets[position]
                        raise ValueError(f"no record at byte {start}: {line[:40]!r}")
                    yield record
                position += 1
        for number, log in enumerate(self._pending or (), start=position):
            if number >= log_number_from:
                yield json.loads(json.dumps(log))

    def _lose(self, start: int, line: bytes, whole: bytes) -> None:
        self.n_lost += 1
        n_bytes = len(line) - (len(whole) if _record(whole) else 0)
        if (self._path, start) not in _told:
            _told.add((self._path, start))
            logger.warning(
                "%s: %d bytes from byte %d on are lost (NUL bytes, as a power loss leaves them) and skipped: the rest"
                " is read",
                *(self._path, n_bytes, start),
            )

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self._pending is not None:
            self._pending.extend(logs)
            return
        with self._lock:
            self._write(logs)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Hold records back and write them together at the end, also when the block raises.

        The file is locked meanwhile, so the held-back records keep the numbers they were read back under.
        """
        with self._lock:
            self._pending = []
            try:
                yield
            finally:
                pending, self._pending = self._pending, None
                self._write(pending)

    def _write(self, logs: list[dict[str, Any]]) -> None:
        if not logs:
            return
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with open(self._path, "ab", buffering=0) as file:
            file.write(text.encode())
            os.fsync(file.fileno())


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line of the journal says; None if it is no record of Optuna's."""
    try:
        record = json.loads(line.decode())  # given bytes, json guesses an encoding
    except ValueError:
        return None
    return record if isinstance(record, dict) and "op_code" in record else None


def batched(storage: BaseStorage):
    """Context manager in which writes to a journal are held together; does nothing for other storages."""
    backend = journal_backend(storage)
    return backend.batch() if isinstance(backend, RunJournal) else nullcontext()


def open_storage(url: str | None, run_dir: Path, read_only: bool = False) -> BaseStorage:
    """``url`` is None (journal in the run directory), a database URL, or the path of a journal file.

    Raises StudyError, on one line, when it cannot be reached, or its password is not known (passwords.py).
    """
    if url is not None and "://" in url:
        try:
            return RDBStorage(with_password(url))
        except (SQLAlchemyError, ImportError, optuna.exceptions.StorageInternalError) as error:
            reason = first_line(without_password(str(error.__cause__ or error)))
            raise StudyError(
                f"the study's storage {without_password(url)} cannot be used ({reason}): check study.storage"
            ) from error
    path = run_dir / JOURNAL if url is None else Path(url)
    if read_only and not path.exists():
        raise NoStudyError(f"there is no study at {path}: the search has not begun, or this file is to be restored")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        journal = RunJournal(path, read_only)
        storage = JournalStorage(journal)
    except OSError as error:
        raise StudyError(
            f"the study's journal {path} cannot be opened ({error.strerror or error}): check study.storage"
        ) from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:  # the last three from Optuna, of a bad record
        raise StudyError(
            f"{path} is not a study's journal or is damaged ({error}): move it away or give another path"
        ) from error
    if journal.n_lost and not storage.get_all_studies():
        raise StudyError(
            f"{path} has lost its beginning, and the study with it: restore it from a copy or move it away"
        )
    return storage


def load_study(url: str | None, run_dir: Path, name: str) -> optuna.Study:
    """The study for reading, whoever is running it. Raises NoStudyError when there is none."""
    try:
        return optuna.load_study(study_name=name, storage=open_storage(url, run_dir, read_only=True))
    except KeyError as error:
        raise NoStudyError(f"the storage has no study {name!r}: check study.name and study.storage") from error


@contextmanager
def open_study(
    name: str,
    url: str | None,
    run_dir: Path,
    objectives: Sequence[str],
    fingerprint: dict[str, Any],
    take_over: bool = False,
) -> Iterator[optuna.Study]:
    """Create the study or continue it, as its only driver.

    Args:
        fingerprint: what the results depend on (``fingerprint.py``); a stored study must have the same.
        take_over: continue although a driver on another machine has not signed off.

    Raises:
        StudyError: the storage cannot be used, the study is another experiment, or another driver is running it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".driver.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StudyError(f"another process is running the study in {run_dir}: wait for it or stop it") from error
    try:
        study = optuna.create_study(
            storage=open_storage(url, run_dir),
            study_name=name,
            directions=["minimize"] * len(objectives),
            load_if_exists=True,
        )
        with batched(storage_of(study)):
            _check_fingerprint(study, {**fingerprint, "objectives": list(objectives)})
            _check_driver(study, take_over)
            me = psutil.Process()
            study.set_user_attr("driver", {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time()})
        try:
            yield study
        finally:
            study.set_user_attr("driver", None)
    finally:
        lock.release()


def _check_fingerprint(study: optuna.Study, mine: dict[str, Any]) -> None:
    mine = json.loads(json.dumps(mine))
    stored = study.user_attrs.get("fingerprint")
    if stored is None:
        if study.get_trials(deepcopy=False):
            raise StudyError(f"study {study.study_name!r} was not made by bruno-ray: choose another study.name")
        study.set_user_attr("fingerprint", mine)
        return
    difference = first_difference(stored, mine)
    if difference:
        part, theirs, ours = difference
        raise StudyError(
            f"study {study.study_name!r} was made with {part} = {theirs}, this run has {ours}:"
            " choose another study.name, or make the settings agree"
        )


def _check_driver(study: optuna.Study, take_over: bool) -> None:
    driver = study.user_attrs.get("driver")
    if driver is None:
        return
    host, pid = driver["host"], driver["pid"]
    if host != socket.gethostname():
        if not take_over:
            raise StudyError(
                f"study {study.study_name!r} is being run from {host} (process {pid}): wait for it, or pass"
                " --study.take-over if that machine is gone"
            )
        logger.warning("taking study %s over from %s", study.study_name, host)
        return
    if pid == os.getpid():  # an earlier run of this process that could not sign off
        return
    try:
        alive = abs(psutil.Process(pid).create_time() - driver["started"]) < 1.0
    except psutil.NoSuchProcess:
        alive = False
    if alive:
        raise StudyError(f"study {study.study_name!r} is being run by process {pid}: wait for it or stop it")
