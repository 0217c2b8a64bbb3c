"""Commands, files and tunnels over the cluster's own ssh, from the user's machine to one node."""

import logging
import shlex
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import NodeError
from cluster.network.ssh_master import Endpoint, SshIdentity

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 20
"""A user's command waits longer for the key exchange than the tunnels, which soon try again by themselves."""

COMMAND_TIMEOUT_S = 60.0
TUNNEL_TIMEOUT_S = 30.0
TUNNEL_TRIES = 3
"""An ssh that ends before its port listens is tried again: one connection that is dropped should end no command."""

TUNNEL_PAUSE_S = 1.0
NO_LOGIN = 255
"""ssh's own exit code, when it is not the command that failed."""

LOGIN = "bash --login -i -c {} 3>&1 4>&2 >/dev/null 2>/dev/null"
"""An interactive login shell, as Ray uses: the set-up commands put the installation into ~/.bashrc. It complains about
the missing terminal, and images print greetings from there, so both its outputs are dropped and the command gets the
real ones."""


@dataclass(frozen=True)
class Shell:
    """One node. Every method raises `NodeError` when the node cannot be reached."""

    endpoint: Endpoint
    identity: SshIdentity
    host_key_alias: str

    def ssh(self, *options: str) -> list[str]:
        given = self.identity.options(self.host_key_alias, CONNECT_TIMEOUT_S)
        return ["ssh", *given, *options, "-p", str(self.endpoint.port)]

    @property
    def target(self) -> str:
        return f"{self.endpoint.user}@{self.endpoint.host}"

    def run(self, command: str, *, input: str = "", timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """What ``command`` prints. Raises `NodeError` with the end of its standard error when it fails."""
        wrapped = LOGIN.format(shlex.quote(f"source ~/.bashrc; exec 1>&3 2>&4 3>&- 4>&-; {command}"))
        try:
            done = subprocess.run(
                [*self.ssh(), self.target, wrapped], input=input, capture_output=True, text=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired as error:
            raise NodeError(f"{self.endpoint} gave no answer within {timeout_s:.0f} s: try again") from error
        if done.returncode == NO_LOGIN:
            raise NodeError(f"{self.endpoint} cannot be reached ({_last_line(done.stderr)}): try again")
        if done.returncode:
            said = _last_line(done.stderr) or _last_line(done.stdout)
            raise NodeError(f"a command on {self.endpoint} ended with {done.returncode}: {said}")
        return done.stdout

    def rsync(self, folder: str, names: Sequence[str], to: Path) -> None:
        """Copy files below ``folder`` to below ``to``; of what lies there already only the differences are sent."""
        remote = f"{self.target}:{shlex.quote(folder)}/"
        command = ["rsync", "-rtRI", "--partial", "--inplace", "--no-links", "--from0", "--files-from=-"]
        command += ["--timeout=60", "-e", shlex.join(self.ssh()), remote, f"{to}/"]
        done = subprocess.run(command, input="\0".join(names), capture_output=True, text=True)
        if done.returncode not in (0, 23, 24):  # 23 and 24: files vanished or changed; the checksums tell
            raise NodeError(f"rsync from {self.endpoint} ended with {done.returncode}: {_last_line(done.stderr)}")

    def untar(self, folder: str, names: Sequence[str], to: Path) -> None:
        """The same by a tar pipe, where rsync is missing; whole files only."""
        command = f"tar -C {shlex.quote(folder)} --null -T - -cf -"
        with subprocess.Popen([*self.ssh(), self.target, command], stdin=-1, stdout=-1, stderr=-1) as process:
            assert process.stdin and process.stdout and process.stderr
            process.stdin.write("\0".join(names).encode())
            process.stdin.close()
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                    archive.extractall(to, filter="data")
            except (tarfile.TarError, EOFError) as error:
                process.kill()
                said = _last_line(process.stderr.read().decode(errors="replace"))
                raise NodeError(f"the tar pipe from {self.endpoint} broke ({said or error}): try again") from error

    @contextmanager
    def tunnel(self, remote_host: str, remote_port: int, local_port: int = 0) -> Iterator[int]:
        """Forward a port of this machine's loopback interface; yields its number."""
        for left in reversed(range(TUNNEL_TRIES)):
            port = local_port or free_port()
            forward = f"127.0.0.1:{port}:{remote_host}:{remote_port}"
            options = ("-n", "-N", "-o", "ExitOnForwardFailure=yes", "-L", forward)
            process = subprocess.Popen([*self.ssh(*options), self.target], stderr=subprocess.PIPE, text=True)
            try:
                if self._opens(process, port):
                    yield port
                    return
            finally:
                process.terminate()
                _, said = process.communicate()
            reason = _last_line(said) or f"ssh ended with {process.returncode}"
            if not left:
                raise NodeError(f"no tunnel to {self.endpoint} ({reason}): try again")
            logger.info("no tunnel to %s (%s): trying again", self.endpoint, reason)
            time.sleep(TUNNEL_PAUSE_S)

    def _opens(self, process: subprocess.Popen[str], port: int) -> bool:
        """Wait until the tunnel listens; whether it does, rather than that ssh has ended."""
        deadline = time.monotonic() + TUNNEL_TIMEOUT_S
        while process.poll() is None:
            if _listens(port) and process.poll() is None:
                return True
            if time.monotonic() > deadline:
                raise NodeError(f"no tunnel to {self.endpoint} within {TUNNEL_TIMEOUT_S:.0f} s: try again")
            time.sleep(0.1)
        return False


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""
