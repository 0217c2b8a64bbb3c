"""A real sshd on this machine, and key pairs for it and for the lab's."""

import getpass
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.jobs.shell import free_port
from cluster.network.probe import greets
from cluster.network.ssh_master import Endpoint
from tests.support.waiting import wait_for

LOGIN_SHELL = """\
#!/bin/bash
# A login shell of Vast.ai: into tmux, which needs a terminal, until a file in the home folder forbids it.
export HOME={home}
if [ ! -f ~/.no_auto_tmux ]; then echo "open terminal failed: not a terminal" >&2; exit 1; fi
exec bash -c "$SSH_ORIGINAL_COMMAND"
"""


@dataclass(frozen=True)
class KeyPair:
    private: Path
    public: str


def make_key(folder: Path, name: str = "key") -> KeyPair:
    private = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(private)], check=True)
    return KeyPair(private, private.with_suffix(".pub").read_text().strip())


@dataclass(frozen=True)
class Sshd:
    """A real sshd on this machine, whose shells have a home folder of their own."""

    home: Path
    endpoint: Endpoint
    key: Path


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    home = tmp_path / "home of the machine"
    home.mkdir()
    key, host_key = make_key(tmp_path, "client"), make_key(tmp_path, "host")
    (tmp_path / "authorized_keys").write_text(key.public + "\n")
    (tmp_path / "shell").write_text(LOGIN_SHELL.format(home=shlex.quote(str(home))))
    (tmp_path / "shell").chmod(0o755)
    port = free_port()
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": host_key.private,
        "AuthorizedKeysFile": tmp_path / "authorized_keys",
        "ForceCommand": tmp_path / "shell",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
    }
    (tmp_path / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    Path("/run/sshd").mkdir(parents=True, exist_ok=True)
    server = subprocess.Popen(
        ["/usr/sbin/sshd", "-D", "-e", "-f", str(tmp_path / "sshd_config")], stderr=subprocess.DEVNULL
    )
    endpoint = Endpoint("127.0.0.1", port, getpass.getuser())
    try:
        wait_for(lambda: greets(endpoint), "the greeting of sshd")
        yield Sshd(home, endpoint, key.private)
    finally:
        server.terminate()
        server.wait()
