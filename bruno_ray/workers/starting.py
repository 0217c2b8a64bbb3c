"""A Ray cluster of our own on this machine, wherever that is: what Ray takes for granted of a machine is arranged.

Ray needs a folder for its sockets whose path is short, a home for its token, and, under `uv run`, packs the working
directory, models included, for workers that have it already.
"""

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from bruno_ray.errors import SettingsError, WorkerError, first_line
from bruno_ray.ray_internals import forget_uv_run

logger = logging.getLogger(__name__)

STARTS = 3

TIMED_OUT = "timed out during startup"
NOT_REACHED = "Failed to connect to GCS"

ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # Ray lets workers give way to whatever else runs; a study would wait for it
}

LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
"""Bytes of a path that the kernel takes for a socket."""

SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")

SHARED_MEMORY = Path("/dev/shm")


def start_local(**options: Any) -> None:
    """Start a cluster in this process. Ray gives its own processes 30 s, which a busy machine needs more than once.

    Raises WorkerError when they were not enough STARTS times, or when this machine does not let Ray start;
    SettingsError when it has no room for the object store.
    """
    for left in reversed(range(STARTS)):
        try:
            ray.init(address="local", **options)
            return
        except OSError as error:
            raise WorkerError(
                f"Ray cannot be started here ({first_line(error)}): set RAY_TMPDIR to a folder that can be written, and"
                " make sure that the disk has room"
            ) from error
        except ValueError as error:
            raise SettingsError(
                f"Ray cannot be started with these settings ({first_line(error)}): lower ray.object_store_memory"
            ) from error
        except Exception as error:  # Ray has no type of its own for it
            if not any(slow in str(error) for slow in (TIMED_OUT, NOT_REACHED)):
                raise
            if not left:
                raise WorkerError(
                    f"Ray did not start within 30 s, {STARTS} times: stop other programs that keep this machine busy,"
                    " or join a cluster with ray.address"
                ) from error
            logger.warning("Ray did not start within 30 s: trying again")


@contextmanager
def local_options() -> Iterator[dict[str, Any]]:
    """What to start Ray with on this machine, beside the settings; the environment is as before afterwards.

    Raises WorkerError if there is no folder for Ray's files.
    """
    forget_uv_run()
    folder = _ray_folder()
    options = {} if folder is None else {"_temp_dir": str(folder)}
    if not (SHARED_MEMORY.is_dir() and _is_usable(SHARED_MEMORY)):
        store = (folder or _usual_folder()).parent
        store.mkdir(parents=True, exist_ok=True)
        options["_plasma_directory"] = str(store)
    variables = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if not _has_token():
        variables["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.update(variables)
    try:
        yield options
    finally:
        for name in variables:
            del os.environ[name]


def _ray_folder() -> Path | None:
    """For Ray's sockets and logs; None for the one that Ray takes by itself."""
    usual = _usual_folder()
    if _holds_sockets(usual) and _is_usable(usual):
        return None
    reason = "cannot be written" if _holds_sockets(usual) else "is too long a path for sockets"
    for name in SHORT_FOLDERS:
        folder = Path(name) / "ray"
        if _is_usable(folder):
            logger.warning("%s %s: Ray keeps its files in %s", usual.parent, reason, folder)
            return folder
    raise WorkerError(
        f"{usual.parent} {reason}, and Ray needs a folder: set RAY_TMPDIR to one that can be written, with a short path"
    )


def _usual_folder() -> Path:
    """Where Ray keeps its files by itself."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def _holds_sockets(folder: Path) -> bool:
    """Whether the longest of Ray's sockets has a path there that the kernel takes."""
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    return len(os.fsencode(folder / session / "sockets" / "plasma_store")) <= LONGEST_SOCKET


def _is_usable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        probe = existing / f".bruno-ray-{os.getpid()}-{secrets.token_hex(4)}"
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


def _has_token() -> bool:
    """Whether Ray finds a token, or can write one: it guards local clusters by default, and keeps it in ~/.ray."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return True
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    try:
        folder = Path.home() / ".ray"
    except RuntimeError:  # neither HOME nor an entry for this user
        return False
    return os.access(folder / "auth_token", os.R_OK) or _is_usable(folder)
