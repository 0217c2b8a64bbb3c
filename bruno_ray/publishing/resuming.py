"""A folder that is written over a long time, appears complete or not at all, and survives being interrupted.

`files.atomic_directory` throws away what a killed process has left. Here it is found again by whoever writes the same
folder from the same inputs: it lies in a place that only depends on the folder's name.
"""

import fcntl
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bruno_ray.errors import OutputError
from bruno_ray.files import flush, output_errors, write_json

logger = logging.getLogger(__name__)

LOCK, STATE, FILES = "lock", "state.json", "files"


class PartialFolder:
    """A folder on its way, and which of its files are complete."""

    def __init__(self, place: Path, key: str) -> None:
        """``place`` is the folder's workshop: the files, the state and the lock. Another ``key`` than that of what lies
        there starts anew."""
        self.folder = place / FILES
        self._state, self._key = place / STATE, key
        self._mutex = threading.Lock()
        self._complete = self._left_over()
        if not self._complete:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()

    @property
    def complete(self) -> dict[str, str]:
        """File name -> sha256 of what a killed process has completed, and of what has been since."""
        with self._mutex:
            return dict(self._complete)

    def completed(self, name: str, digest: str) -> None:
        """Note that a file is on the disk as it should be. Safe from several threads."""
        with self._mutex:
            self._complete[name] = digest
            write_json(self._state, {"key": self._key, "complete": self._complete})

    def _left_over(self) -> dict[str, str]:
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        if state.get("key") != self._key:
            return {}
        return {name: digest for name, digest in state["complete"].items() if (self.folder / name).is_file()}


@contextmanager
def resumable_directory(path: Path, key: str) -> Iterator[PartialFolder]:
    """As `files.atomic_directory`, but what a killed or interrupted process has completed is there again.

    It lies beside ``path``, under a hidden name that is its own, and is taken over when the process that wrote it is
    dead: the kernel gives back its lock. An error leaves nothing behind; Ctrl-C and kill do.

    Args:
        key: of the inputs. What was made from others is thrown away.

    Raises:
        OutputError: ``path`` exists, cannot be written, or another process is writing it.
    """
    path = Path(path).absolute()
    place = path.with_name(f".{path.name}.partial-resumable")
    with output_errors(path):
        lock = _enter(path, place)
        try:
            partial = PartialFolder(place, key)
            yield partial
            for found in (partial.folder, *partial.folder.rglob("*")):
                flush(found)
            os.rename(partial.folder, path)
            flush(path.parent)
            shutil.rmtree(place, ignore_errors=True)
        except Exception:
            shutil.rmtree(place, ignore_errors=True)
            raise
        except BaseException:
            logger.info("what is written so far is kept in %s: the same command continues from there", place)
            raise
        finally:
            os.close(lock)


def _enter(path: Path, place: Path) -> int:
    """Make the workshop or take it over; returns the descriptor that holds its lock."""
    while True:
        if path.exists():
            raise OutputError(f"{path} exists already: choose another folder or remove it first")
        place.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(place / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # its owner has just finished and removed it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            raise OutputError(
                f"another process is writing {path}: wait until it has finished, or choose another folder"
            ) from error
        if _is(place / LOCK, descriptor):  # and not that of a process which has finished in between
            return descriptor
        os.close(descriptor)


def _is(path: Path, descriptor: int) -> bool:
    """Whether ``path`` still is the file that is open."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
