"""A process that outlives whoever started it: a keeper, which runs it and runs it again whenever it ends.

One keeper per folder, where process ids, logs and what the process last reported are. The supervisor on the head and
the launcher on a machine of one's own are kept so.
"""

import contextlib
import fcntl
import json
import logging
import logging.handlers
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import psutil

from cluster.errors import NodeError

logger = logging.getLogger(__name__)

RESTART_S = 1.0
START_TIMEOUT_S = 60.0
END_S = 10.0
STATUS = "status.json"
"""What the child reports, in the keeper's folder."""
PROGRAMS = ("supervis", "launcher")
"""In the command line of what may be ended: a process id may be somebody else's by now."""


def keep(command: Sequence[str], folder: Path) -> None:
    """Be the keeper: run ``command`` and run it again whenever it ends; one keeper per folder."""
    lock = hold(folder)
    if lock is None:
        logger.info("another keeper is at work")
        return
    with lock:
        while True:
            started = time.monotonic()
            child = subprocess.Popen([*command, "--parent", str(os.getpid())], stdin=subprocess.DEVNULL)
            (folder / "supervisor.pid").write_text(str(child.pid))
            status = child.wait()
            logger.warning("it ended with %d after %.0f s", status, time.monotonic() - started)
            time.sleep(RESTART_S)


def hold(folder: Path) -> IO[str] | None:
    """The lock of the keeper with our process id in it, or None when a living keeper holds it."""
    lock = open(folder / "keeper.lock", "a+")  # noqa: SIM115 - held for the life of the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def start(keeper: Sequence[str], folder: Path) -> None:
    """Have a keeper in the background that runs the code of today; wait until its child has reported.

    Raises `NodeError` with the end of the log when it does not.
    """
    end(folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    begun = time.time()
    process = spawn(keeper, folder)
    while time.time() < begun + START_TIMEOUT_S and process.poll() is None:
        if read_status(folder).get("written", 0.0) > begun:
            return
        time.sleep(0.2)
    log = (folder / "keeper.log").read_text(errors="replace")[-1500:]
    raise NodeError(f"it did not report; look into the logs in {folder}; its keeper said: {log}")


def spawn(keeper: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a keeper that outlives us; what it and its child write to standard error is kept."""
    with open(folder / "keeper.log", "wb") as log:
        return subprocess.Popen(keeper, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def end(folder: Path) -> None:
    """End keeper and child; the tunnels stay."""
    for name in ("keeper.lock", "supervisor.pid"):  # the keeper first, or it would start another child
        try:
            pid = int((folder / name).read_text())
            if any(program in " ".join(psutil.Process(pid).cmdline()) for program in PROGRAMS):
                os.kill(pid, signal.SIGKILL)
        except (OSError, ValueError, psutil.Error):
            continue


def end_for_good(folder: Path) -> None:
    """End keeper, child, tunnels and the child's own child; nothing happens where there are none."""
    end(folder)
    end_tunnels(folder)
    with contextlib.suppress(psutil.Error, KeyError, TypeError):  # it looks itself whether its parent is there
        psutil.Process(read_status(folder)["child"]).wait(END_S)
    (folder / STATUS).unlink(missing_ok=True)


def read_status(folder: Path) -> dict:
    """What the child last reported; empty before it reported anything."""
    try:
        return json.loads((folder / STATUS).read_text())
    except FileNotFoundError:
        return {}


def end_tunnels(folder: Path) -> None:
    for socket in folder.glob("*.sock"):
        subprocess.run(["ssh", "-S", str(socket), "-O", "exit", socket.stem], capture_output=True, timeout=20)


def log_to(folder: Path, name: str = "supervisor") -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = logging.handlers.RotatingFileHandler(folder / f"{name}.log", maxBytes=2_000_000, backupCount=2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
