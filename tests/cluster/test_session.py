"""A shell on a machine that does not answer at once: a real sshd, whose shells run nothing at first."""

import logging
import shutil
import time
from dataclasses import dataclass

import pytest

from cluster.errors import NodeError
from cluster.jobs import session as sessions
from cluster.jobs.session import Session
from cluster.network import probe
from cluster.network.keys import KEY_NAME
from cluster.renting.tags import ClusterNode
from cluster.vast.models import Instance
from tests.cluster.fake_vast.cluster import ImitatedCluster
from tests.cluster.ssh import Sshd
from tests.support.programs import needs

pytestmark = needs("/usr/sbin/sshd", "ssh-keygen", package="openssh-server")


@dataclass
class Waiting:
    """Stands where `Session.shell` looks for `time`. The machine runs commands after so many pauses."""

    sshd: Sshd
    pauses: int
    paused: int = 0
    monotonic = staticmethod(time.monotonic)

    def sleep(self, seconds: float) -> None:
        self.paused += 1
        if self.paused == self.pauses:
            (self.sshd.home / ".no_auto_tmux").touch()


@pytest.fixture
def node(world: ImitatedCluster, sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> ClusterNode:
    provider = world.provider("laptop")
    world.autoscaler()
    monkeypatch.setattr(Instance, "ssh_endpoints", property(lambda instance: (sshd.endpoint,)))
    return provider.cluster_nodes(force=True)[0]


@pytest.fixture
def session(world: ImitatedCluster, sshd: Sshd) -> Session:
    provider = world.provider("laptop")
    shutil.copy(sshd.key, provider.folder / KEY_NAME)
    return Session(world.folder / "cluster.yaml", {"cluster_name": "demo"}, provider)


def test_a_machine_that_is_busy_is_asked_again_with_more_patience(
    session: Session,
    node: ClusterNode,
    sshd: Sshd,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    waiting, patience = Waiting(sshd, pauses=4), []
    greets = probe.greets
    monkeypatch.setattr(sessions, "time", waiting)
    monkeypatch.setattr(probe, "greets", lambda endpoint, limit_s: patience.append(limit_s) or greets(endpoint))
    with caplog.at_level(logging.INFO):
        shell = session.shell(node)
    assert shell.endpoint == sshd.endpoint and waiting.paused == 4
    assert patience == [times * probe.GREETING_S for times in (1, 2, 4, 4, 4)]
    assert caplog.text.count(f"instance {node.id} does not answer yet: asking again") == 4


def test_who_only_looks_does_not_wait(
    session: Session, node: ClusterNode, sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = Waiting(sshd, pauses=1)
    monkeypatch.setattr(sessions, "time", waiting)
    with pytest.raises(NodeError, match=rf"instance {node.id} does not answer \(.*{sshd.endpoint.port}\)"):
        session.shell(node, wait_s=0)
    assert waiting.paused == 0
