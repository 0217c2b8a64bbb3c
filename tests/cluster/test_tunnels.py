"""Tunnels to a node, where ssh fails first. A stand-in for ssh listens on the port that it is told to forward."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cluster.errors import NodeError
from cluster.jobs import shell
from cluster.jobs.shell import Shell
from cluster.network.ssh_master import Endpoint, SshIdentity

SSH = """\
#!{python}
import http.server, pathlib, sys
tries = pathlib.Path({tries!r})
tries.write_text(tries.read_text() + "x")
if len(tries.read_text()) <= {fails}:
    sys.stderr.write({said!r})
    sys.exit(255)
forward = sys.argv[sys.argv.index("-L") + 1]
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(forward.split(":")[1]), bind="127.0.0.1")
"""


@dataclass(frozen=True)
class FailingShell(Shell):
    """The first ``fails`` connections end at once, with ``said``."""

    folder: Path
    fails: int
    said: str = ""

    def __post_init__(self) -> None:
        given = {"python": sys.executable, "tries": str(self.folder / "tries"), "fails": self.fails, "said": self.said}
        (self.folder / "tries").write_text("")
        (self.folder / "ssh").write_text(SSH.format(**given))
        (self.folder / "ssh").chmod(0o755)

    def ssh(self, *options: str) -> list[str]:
        return [str(self.folder / "ssh"), *options]

    @property
    def tries(self) -> int:
        return len((self.folder / "tries").read_text())


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "TUNNEL_PAUSE_S", 0.0)


def failing(folder: Path, fails: int, said: str = "") -> FailingShell:
    identity = SshIdentity(folder / "key", folder / "hosts")
    return FailingShell(Endpoint("head", 22), identity, "head", folder, fails, said)


def test_a_connection_that_is_dropped_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = failing(tmp_path, fails=2)
    with caplog.at_level(logging.INFO), node.tunnel("127.0.0.1", 8000) as port:
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
    assert node.tries == 3
    assert caplog.text.count("no tunnel to root@head:22 (ssh ended with 255): trying again") == 2
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    ("said", "reason"), [("", "ssh ended with 255"), ("Permission denied (publickey).\n", "Permission denied")]
)
def test_one_that_never_comes_says_why(tmp_path: Path, said: str, reason: str) -> None:
    node = failing(tmp_path, fails=99, said=said)
    with pytest.raises(NodeError, match=reason), node.tunnel("127.0.0.1", 8000):
        pytest.fail("there is no tunnel")
    assert node.tries == shell.TUNNEL_TRIES


def test_what_fails_inside_of_a_tunnel_is_not_tried_again(tmp_path: Path) -> None:
    node = failing(tmp_path, fails=0)
    with pytest.raises(ZeroDivisionError), node.tunnel("127.0.0.1", 8000):
        raise ZeroDivisionError
    assert node.tries == 1
