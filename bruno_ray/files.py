"""Files that appear whole or not at all, and what goes wrong with them in one line."""

import errno
import glob
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock
from safetensors import SafetensorError

from bruno_ray.errors import OutputError, SettingsError

# Beyond the files themselves: tokenizer, card, and what the file system needs for itself.
SPARE_BYTES = 64 * 1024**2
SAMPLE_BYTES = 1024**2

REASONS = {
    errno.ENOSPC: "the disk is full: free some space or choose another output.directory",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another output.directory",
    errno.EFBIG: "the file is larger than this file system allows: choose another output.directory",
    errno.EACCES: "no permission to write there: choose another output.directory",
    errno.EPERM: "no permission to write there: choose another output.directory",
    errno.ENOLCK: "this file system cannot lock files: choose another output.directory",
    errno.EOPNOTSUPP: "this file system cannot lock files: choose another output.directory",
    errno.EROFS: "the file system is read-only: choose another output.directory",
    errno.ENOENT: "no folder can be made there: choose another output.directory",
    errno.ENOTDIR: "a part of the path is a file: choose another output.directory",
    errno.EEXIST: "it exists already: choose another name or remove it",
    errno.ENOTEMPTY: "it exists already: choose another name or remove it",
}


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about writing ``path`` into one line that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError):
            number = error.errno
        else:  # safetensors hands the errno on only within its text
            found = re.search(r"\(os error (\d+)\)", str(error))
            number = int(found[1]) if found else None
        reason = REASONS.get(number or 0)
        if reason is None:
            raise
        if _is_cached(path):
            reason = reason.replace("choose another output.directory", "set BRUNO_CACHE to another folder")
        raise OutputError(f"cannot write {path}: {reason}") from error


def require_free_space(folder: Path, n_bytes: int, what: str) -> None:
    """Raise OutputError unless the disk that holds ``folder`` has ``n_bytes`` and a little more to spare."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    needed = n_bytes + SPARE_BYTES
    if free < needed:
        raise OutputError(
            f"the disk that holds {existing} is too full for {what} (it needs {size_text(needed)} and has"
            f" {size_text(free)} free): free some space or choose another output.directory"
        )


def size_text(n_bytes: float) -> str:
    """A size for people, in the decimal units that disks and hubs count in: 3.1 MB, 16.2 GB, 512 bytes."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} bytes"
    for unit in ("kB", "MB", "GB", "TB"):
        n_bytes /= 1000
        if n_bytes < 999.95 or unit == "TB":
            return f"{n_bytes:.1f} {unit}"
    raise AssertionError("the last unit holds any size")


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Write ``path`` whole, over what was there. Raises OutputError, as `atomic_file`."""
    with output_errors(path), atomic_file(path, durable) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, durable: bool = True) -> None:
    """Write ``data`` as indented JSON, whole or not at all. Numbers must be finite (ValueError)."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", durable)


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """A file that appears whole or not at all: yields the name of a temporary sibling for the caller to write, which
    is flushed to the disk and renamed over ``path`` at the end.

    Without ``durable`` it is not flushed: readers still see all or nothing, a power cut may lose it. Several processes
    may write the same path: the last one wins. Raises OSError as it comes; `output_errors` turns it into one line.
    """
    aside = _aside(path)
    aside.touch()
    mode = aside.stat().st_mode
    try:
        yield aside
        aside.chmod(mode)  # safetensors puts a file of its own there, which its owner alone may read
        if durable:
            flush(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A new folder that appears complete or not at all: yields a temporary sibling, renamed to ``path`` at the end.

    Raises:
        OutputError: ``path`` exists, its parent cannot be written, or the disk runs full on the way.
    """
    path = Path(path).absolute()
    if path.exists():
        raise OutputError(f"{path} exists already: choose another folder or remove it first")
    with output_errors(path), whole_directory(path) as aside:
        yield aside


@contextmanager
def whole_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """As `atomic_directory`, but errors come as the OSError they are, and an empty folder at ``path`` is no obstacle.

    Args:
        replace: when the new folder is complete, remove what is at ``path``. For callers that hold a lock.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    aside.mkdir()
    mode = aside.stat().st_mode
    try:
        yield aside
        for place in (aside, *aside.rglob("*")):
            if place.is_file():  # as above
                place.chmod(place.stat().st_mode | (mode & 0o666))
            flush(place)
        if replace and path.exists():
            shutil.rmtree(path)
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep every other process out that asks for the same lock, for as long as ``path`` is read, changed and written.

    The lock is a hidden file beside ``path``, which stays; the kernel gives it back when its holder dies. Not
    re-entrant. Raises OutputError where no file can be made.
    """
    with output_errors(path):
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _aside(path: Path) -> Path:
    """A name beside ``path`` that nobody else uses. What killed processes of this machine left there is removed."""
    owner = f".{path.name}.partial-{socket.gethostname()}-"
    for left_over in path.parent.glob(f"{glob.escape(owner)}*"):
        pid = left_over.name.removeprefix(owner).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            if left_over.is_dir():
                shutil.rmtree(left_over, ignore_errors=True)
            else:
                left_over.unlink(missing_ok=True)
    return path.with_name(f"{owner}{os.getpid()}-{uuid.uuid4().hex[:8]}")


def flush(place: Path) -> None:
    """fsync a file or a folder, so that the rename never outlives the content."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_chunks(path: Path, whole: bool = False) -> Iterator[bytes]:
    """What a hash of a file is made of: all of it, or its first, its last and 14 evenly spaced megabytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if whole or size <= 16 * SAMPLE_BYTES:
            while chunk := file.read(SAMPLE_BYTES):
                yield chunk
            return
        for i in range(16):
            file.seek(i * (size - SAMPLE_BYTES) // 15)
            yield file.read(SAMPLE_BYTES)


def cache_folder(name: str) -> Path:
    """A folder under BRUNO_CACHE, or ~/.cache/bruno-ray when that is not set. It need not exist.

    Raises OutputError if BRUNO_CACHE is not set and this user has no home.
    """
    return _cache() / name


def _cache() -> Path:
    if given := os.environ.get("BRUNO_CACHE"):
        return expanded(given)
    try:
        return Path.home() / ".cache" / "bruno-ray"
    except RuntimeError as error:  # no HOME, and no entry for this user: as in a container that runs as any number
        raise OutputError("this user has no home directory: set BRUNO_CACHE to a folder that can be written") from error


def _is_cached(path: Path) -> bool:
    try:
        return path.is_relative_to(_cache())
    except OutputError:  # no cache without a home
        return False


def expanded(path: str | Path) -> Path:
    """``path`` with ``~`` written out. Raises SettingsError where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise SettingsError(f"{path}: there is no such home directory; write the path in full") from error
