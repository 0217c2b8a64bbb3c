"""Files that appear whole or not at all, and what goes wrong with them in one line."""

import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from bruno_ray.errors import OutputError

# Beyond the files themselves: tokenizer, card, and what the file system needs for itself.
SPARE_BYTES = 64 * 1024**2
SAMPLE_BYTES = 1024**2

REASONS = {
    errno.ENOSPC: "the disk is full: free some space or choose another output.directory",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another output.directory",
    errno.EFBIG: "the file is larger than this file system allows: set a smaller output.max_shard_size",
    errno.EACCES: "no permission to write there: choose another output.directory",
    errno.EPERM: "no permission to write there: choose another output.directory",
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
        raise OutputError(f"Cannot write {path}: {reason}.") from error


def require_free_space(folder: Path, n_bytes: int, what: str) -> None:
    """Raise OutputError unless the disk that holds ``folder`` has ``n_bytes`` and a little more to spare."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    needed = n_bytes + SPARE_BYTES
    if free < needed:
        raise OutputError(
            f"The disk that holds {existing} is too full for {what}: it needs {needed / 1e9:.2f} GB and has"
            f" {free / 1e9:.2f} GB free. Free some space or choose another output.directory."
        )


def write_text(path: Path, text: str) -> None:
    """Write ``path`` whole: beside it, flushed to the disk, then renamed over what was there."""
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with output_errors(path):
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, whole or not at all. Numbers must be finite (ValueError)."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A folder that appears complete or not at all: yields a temporary sibling, renamed to ``path`` at the end.

    Raises:
        OutputError: ``path`` exists, its parent cannot be written, or the disk runs full on the way.
    """
    path = Path(path).absolute()
    if path.exists():
        raise OutputError(f"{path} exists already: choose another folder or remove it first.")
    owner = f"{socket.gethostname()}-"
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left_over in path.parent.glob(f".{path.name}.partial-{owner}*"):
            if not psutil.pid_exists(int(left_over.name.rpartition("-")[2])):  # its process was killed
                shutil.rmtree(left_over)
        aside = path.with_name(f".{path.name}.partial-{owner}{os.getpid()}")
        aside.mkdir()
        try:
            yield aside
            _flush_tree(aside)
            os.rename(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _flush_tree(folder: Path) -> None:
    """fsync every file and folder, so that the rename never outlives the content."""
    for place in (folder, *folder.rglob("*")):
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
    """A folder under BRUNO_CACHE, or ~/.cache/bruno-ray when that is not set. It need not exist."""
    return Path(os.environ.get("BRUNO_CACHE") or Path.home() / ".cache" / "bruno-ray").expanduser() / name
