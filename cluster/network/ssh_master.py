"""One ssh connection to one machine, kept as a control master, through which ports are forwarded and commands run.

The master is a process of its own that outlives whoever started it: a supervisor that is killed finds the sockets of
its predecessor and adopts the connections, so that no tunnel breaks.
"""

import asyncio
import logging
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import NodeError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 4
LOGIN_TIMEOUT_S = 20.0
"""From the start of ssh to a usable control socket, on a slow machine."""
COMMAND_TIMEOUT_S = 20.0
ROUND_TRIP_S = 0.5
"""What each forward may take that is added to a connection: ssh waits for the answer to one before it asks for the
next, across an ocean 0.2 s. Those of its own command line it asks for all at once."""
ALIVE_INTERVAL_S = 3
ALIVE_COUNT = 3
"""ssh gives up a connection that has been silent for ALIVE_INTERVAL_S * ALIVE_COUNT seconds."""
FORWARDS_PER_COMMAND = 50
COMMANDS_AT_ONCE = 8
"""Forwards that are added later, so many by each ssh command, and so many commands side by side."""
POLL_S = 0.05
REFUSED = "remote port forwarding failed"
"""ssh's words, at log level INFO."""

INNER_SSHD = """\
set -e
umask 077
d="$HOME/.bruno-ray/mesh"
mkdir -p "$d" /run/sshd
[ -f "$d/host_key" ] || ssh-keygen -q -t ed25519 -N "" -f "$d/host_key"
printf "%s\\n" "HostKey $d/host_key" "GatewayPorts clientspecified" "AllowTcpForwarding yes" "UsePAM no" \
  "PasswordAuthentication no" "PermitRootLogin prohibit-password" "PrintMotd no" "PidFile none" \
  "ClientAliveInterval 3" "ClientAliveCountMax 3" > "$d/sshd_config"
exec /usr/sbin/sshd -i -f "$d/sshd_config"
"""
"""An sshd of our own that speaks over the first connection's standard input and output: it opens no port and ends
with the connection."""


class LinkError(NodeError):
    """Raised when an ssh connection cannot be made or one of its forwards cannot be had."""


class ListenError(LinkError):
    """Raised when the machine's sshd does not listen where it was asked to."""


@dataclass(frozen=True)
class Endpoint:
    """Where an sshd answers."""

    host: str
    port: int
    user: str = "root"

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"


@dataclass(frozen=True)
class SshIdentity:
    """What a connection is made with."""

    key: Path
    known_hosts: Path
    accept_new: bool = True
    """Pin the host key at first contact; False for keys that somebody else has pinned."""

    def options(self, host_key_alias: str, connect_timeout_s: int = CONNECT_TIMEOUT_S) -> list[str]:
        """ssh options; the host key is pinned under the alias at first contact and must not change afterwards."""
        pairs = {
            "IdentityFile": str(self.key),
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
            "StrictHostKeyChecking": "accept-new" if self.accept_new else "yes",
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "HostKeyAlias": host_key_alias,
            "ConnectTimeout": str(connect_timeout_s),
            "ServerAliveInterval": str(ALIVE_INTERVAL_S),
            "ServerAliveCountMax": str(ALIVE_COUNT),
            "LogLevel": "ERROR",
        }
        return ["-F", "/dev/null", *(word for key, value in pairs.items() for word in ("-o", f"{key}={value}"))]


@dataclass(frozen=True)
class Forward:
    """``side`` "L" listens here and connects there, "R" listens there and connects here; the same address on both."""

    side: str
    address: str
    port: int

    def words(self) -> list[str]:
        return [f"-{self.side}", f"{self.address}:{self.port}:{self.address}:{self.port}"]


class SshMaster:
    """A control master for one machine; `open` or `adopt` it first."""

    def __init__(self, socket: Path, identity: SshIdentity, host_key_alias: str) -> None:
        self.socket = socket
        self.identity = identity
        self.host_key_alias = host_key_alias
        self.pid: int | None = None
        self.endpoint: Endpoint | None = None
        self.inner_sshd = False
        self._process: asyncio.subprocess.Process | None = None

    async def adopt(self) -> bool:
        """Take over the connection that an earlier process left at our socket; False when there is none."""
        if not self.socket.exists():
            return False
        status, output = await self._ssh("-O", "check", self.host_key_alias)
        match = re.search(r"pid=(\d+)", output)
        if status or match is None:
            self.socket.unlink(missing_ok=True)
            return False
        self.pid = int(match.group(1))
        try:
            words = Path(f"/proc/{self.pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
        except OSError:
            return False
        user, _, host = words[-1].partition("@")
        self.endpoint = Endpoint(host, int(words[-2]), user)
        self.inner_sshd = any(word.startswith("ProxyCommand=") for word in words)
        return True

    async def open(self, endpoint: Endpoint, inner_sshd: bool = False, forwards: Sequence[Forward] = ()) -> None:
        """Connect, through an sshd of our own if ``inner_sshd``. Raises `LinkError` with what ssh said.

        All of `forwards` are asked for at once. ssh goes on without those that cannot be had: see `refused_forwards`,
        and look at the listeners.
        """
        self.socket.unlink(missing_ok=True)
        log = self.socket.with_suffix(".log")
        target = ["-p", str(endpoint.port), f"{endpoint.user}@{endpoint.host}"]
        options = self.identity.options(self.host_key_alias)
        if inner_sshd:
            outer = shlex.join(["ssh", *options, *target, f"/bin/sh -c {shlex.quote(INNER_SSHD)}"])
            options = self.identity.options(f"{self.host_key_alias}-inner")
            options += ["-o", f"ProxyCommand={outer.replace('%', '%%')}"]
        with open(log, "wb") as stderr:
            self._process = await asyncio.create_subprocess_exec(
                *("ssh", "-M", "-N", "-S", str(self.socket), "-o", "LogLevel=INFO", *options),  # the first one counts
                *(word for forward in forwards for word in forward.words()),
                *target,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        self.pid, self.endpoint, self.inner_sshd = self._process.pid, endpoint, inner_sshd
        try:
            await asyncio.wait_for(self._appearance(self._process), LOGIN_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise LinkError(f"{endpoint}: no login within {LOGIN_TIMEOUT_S:.0f} s") from None
        except LinkError:
            raise LinkError(f"{endpoint}: {last_line(log) or 'ssh ended without a word'}") from None
        finally:
            if not self.socket.exists():
                await self.close()

    async def _appearance(self, process: asyncio.subprocess.Process) -> None:
        """Wait for the control socket, which ssh makes once it is logged in."""
        while not self.socket.exists():
            if process.returncode is not None:
                raise LinkError(f"ssh ended with {process.returncode}")
            await asyncio.sleep(POLL_S)

    def refused_forwards(self) -> int:
        """How many of the command line's `-R` the machine has refused; certain once a command has run through here."""
        return self.socket.with_suffix(".log").read_text(errors="replace").count(REFUSED)

    def alive(self) -> bool:
        """Whether the master still runs; says nothing about the machine beyond ssh's own keep-alive."""
        if self.pid is None:
            return False
        if self._process is not None:
            return self._process.returncode is None
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state != "Z"

    async def forward(self, forwards: Sequence[Forward]) -> None:
        """Add port forwards; those that exist already are left alone.

        Raises `ListenError` when the machine refuses to listen on one, `LinkError` for everything else.
        """
        await self._change("forward", forwards)

    async def cancel(self, forwards: Sequence[Forward]) -> None:
        """Stop listening; connections that already run through a forward go on."""
        await self._change("cancel", forwards)

    async def run(self, command: str, input: str = "") -> str:
        """Run a shell command on the machine and return what it printed. Raises `LinkError` when it fails."""
        status, output = await self._ssh(self.host_key_alias, command, input=input)
        if status:
            raise LinkError(f"a command on {self.host_key_alias} ended with {status}: {output.strip()[-300:]}")
        return output

    async def close(self) -> None:
        """End the connection and everything that runs through it."""
        if self.pid is not None and self.alive():
            try:
                os.kill(self.pid, 15)
            except ProcessLookupError:
                logger.debug("the ssh master %d had just ended", self.pid)
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), 5)
            except asyncio.TimeoutError:
                self._process.kill()
                await self._process.wait()
        self.pid = self._process = None
        self.socket.unlink(missing_ok=True)

    async def _change(self, action: str, forwards: Sequence[Forward]) -> None:
        places = asyncio.Semaphore(COMMANDS_AT_ONCE)

        async def change(part: Sequence[Forward]) -> None:
            words = [word for forward in part for word in forward.words()]
            async with places:
                timeout = COMMAND_TIMEOUT_S + ROUND_TRIP_S * len(part)
                status, output = await self._ssh("-O", action, *words, self.host_key_alias, timeout_s=timeout)
            if REFUSED in output:
                raise ListenError(f"{self.host_key_alias}: {output.strip()[-300:]}")
            if status:
                raise LinkError(f"{self.host_key_alias}: {action} of ports failed: {output.strip()[-300:]}")

        starts = range(0, len(forwards), FORWARDS_PER_COMMAND)
        parts = [change(forwards[start : start + FORWARDS_PER_COMMAND]) for start in starts]
        for outcome in await asyncio.gather(*parts, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _ssh(self, *words: str, input: str = "", timeout_s: float = COMMAND_TIMEOUT_S) -> tuple[int, str]:
        """Exit status and output of an ssh command that goes through the master."""
        process = await asyncio.create_subprocess_exec(
            *("ssh", "-F", "/dev/null", "-S", str(self.socket), "-o", "BatchMode=yes", "-o", "ProxyCommand=false"),
            *words,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(input.encode()), timeout_s)
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()
            return 255, f"no answer within {timeout_s:.0f} s"
        assert process.returncode is not None
        return process.returncode, output.decode(errors="replace")


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
