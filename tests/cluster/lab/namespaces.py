"""The kernel's side of the lab: named network namespaces, and what is left behind by a session that was killed.

Every lab owns a folder ``bruno-lab-ID`` under the temporary folder and holds a lock in it; its namespaces are called
``bruno-lab-ID-...``. A lab whose lock is free belongs to nobody any more and is swept.
"""

import ctypes
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

PREFIX = "bruno-lab-"
PROGRAMS = ("ip", "nft", "sshd", "ssh", "ssh-keygen", "rsync", "unshare", "setpriv", "pivot_root", "chroot", "uptime")
CLONE_NEWNET = 0x40000000
NETNS_FOLDER = Path("/run/netns")


def run(*command: str, input: str | None = None, timeout: float = 30) -> str:
    """Run a command and return what it printed; a failure carries what it said."""
    result = subprocess.run(command, input=input, capture_output=True, text=True, timeout=timeout)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {result.returncode}: {result.stderr.strip()}")
    return result.stdout


def missing_for_lab() -> str | None:
    """Why this machine cannot hold a lab, or None if it can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=path)]
    if missing:
        return f"missing programs: {', '.join(missing)} (install iproute2 nftables openssh-server rsync procps)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"{PREFIX}probe-{os.getpid()}"
    try:
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "add", "bridge0", "type", "bridge")
        rules = "table ip probe {\n chain c { type nat hook prerouting priority 0; }\n}\n"
        run("ip", "netns", "exec", name, "nft", "-f", "-", input=rules)
        run("unshare", "--mount", "--pid", "--fork", "mount", "--make-rprivate", "/")
    except RuntimeError as error:
        return "no right to make namespaces: " + str(error).partition("\n")[0]
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None


def inside(namespace: str, action: Callable[[], Result]) -> Result:
    """Run ``action`` with the calling thread in the named network namespace; sockets it opens stay there."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(NETNS_FOLDER / namespace, os.O_RDONLY)
    try:
        if libc.setns(there, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        try:
            return action()
        finally:
            if libc.setns(home, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot leave the namespace")
    finally:
        os.close(home)
        os.close(there)


def processes_in(namespace: str) -> list[int]:
    """Process ids, as the host sees them, of everything that runs in a network namespace."""
    return [int(pid) for pid in run("ip", "netns", "pids", namespace).split()]


def remove_namespace(namespace: str) -> None:
    """Kill what runs in a namespace of the lab, then delete it."""
    if not namespace.startswith(PREFIX):
        raise ValueError(f"{namespace} is not a namespace of the lab")
    if not (NETNS_FOLDER / namespace).exists():
        return
    deadline = time.monotonic() + 10
    while (pids := processes_in(namespace)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    run("ip", "netns", "del", namespace)


def namespaces_of(prefix: str) -> list[str]:
    if not NETNS_FOLDER.is_dir():
        return []
    return sorted(entry.name for entry in NETNS_FOLDER.iterdir() if entry.name.startswith(prefix))


def lock_folder(folder: Path) -> IO[str] | None:
    """The open lock of a lab's folder, or None when another process holds it."""
    handle = open(folder / "lock", "w")  # noqa: SIM115 - the lock lives as long as the lab
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle


def sweep() -> list[str]:
    """Remove labs whose owner is gone; returns the namespaces that were removed."""
    base = Path(tempfile.gettempdir())
    living = set()
    for folder in base.glob(f"{PREFIX}*"):
        lock = lock_folder(folder)
        if lock is None:
            living.add(folder.name)
        else:
            for namespace in namespaces_of(folder.name + "-"):
                remove_namespace(namespace)
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()
    probes = f"{PREFIX}probe-"
    orphans = [
        name
        for name in namespaces_of(PREFIX)
        if not name.startswith(probes) and not any(name.startswith(owner + "-") for owner in living)
    ]
    for namespace in orphans:
        logger.warning("removing %s, which an earlier session left behind", namespace)
        remove_namespace(namespace)
    return orphans
