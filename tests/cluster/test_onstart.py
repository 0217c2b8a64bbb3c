"""What a machine does when it has booted: its own end, with a real shell and the imitation's server."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cluster.errors import ClusterSettingsError
from cluster.vast.onstart import LONGEST, NO_TMUX, Switch, onstart
from tests.cluster.fake_vast.api import FakeApi
from tests.cluster.fake_vast.server import FakeServer
from tests.cluster.fake_vast.state import FakeInstance, FakeVast
from tests.support.programs import needs
from tests.support.waiting import wait_for

KEY = "ssh-ed25519 " + "A" * 68 + " bruno-ray-demo"
PATIENCE_S = 5.0
pytestmark = needs("bash", "curl", "setsid", package="bash, curl and util-linux")


@dataclass
class Booted:
    """Two instances; the first has run `onstart` in a home folder of its own."""

    vast: FakeVast
    server: FakeServer
    instance: FakeInstance
    other: FakeInstance
    home: Path

    def boot(self, patience_s: float, end: float | None = None, path: str = "") -> None:
        text = onstart(KEY, "echo own > ~/own", Switch(self.server.url + "/", patience_s, end, look_s=0.1))
        environment = {
            "HOME": str(self.home),
            "PATH": path or os.environ["PATH"],
            "CONTAINER_ID": str(self.instance.id),
            "CONTAINER_API_KEY": self.instance.key,
        }
        bash = shutil.which("bash")
        assert bash is not None
        subprocess.run([bash, "-c", text], env=environment, check=True, timeout=60)

    def switches(self) -> list[int]:
        """Process ids of what runs in the machine."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"HOME={self.home}\0".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def end(self) -> None:
        """Kill what runs on it still."""
        for pid in self.switches():
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(pid, signal.SIGKILL)

    def is_there(self) -> bool:
        return self.instance.destroyed_at is None


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Booted]:
    vast = FakeVast(boot_s=0.0)
    vast.add_offers(2)
    instances = [
        vast.rent(offer.id, {"image": "x", "disk": 10, "label": "l", "env": {}}) for offer in vast.free_offers()
    ]
    assert instances[0] is not None and instances[1] is not None
    with FakeServer(FakeApi(vast)) as server:
        booted = Booted(vast, server, instances[0], instances[1], tmp_path / "home")
        booted.home.mkdir()
        yield booted
        booted.end()


def test_sessions_run_commands_and_the_cluster_is_let_in(machine: Booted) -> None:
    machine.boot(patience_s=1000)
    assert (machine.home / ".no_auto_tmux").exists() and (machine.home / "own").read_text() == "own\n"
    assert (machine.home / ".ssh" / "authorized_keys").read_text() == KEY + "\n"
    assert onstart(KEY, "", None).splitlines()[0] == NO_TMUX


def test_a_machine_without_a_head_destroys_itself_and_nothing_else(machine: Booted) -> None:
    machine.boot(patience_s=1)
    wait_for(lambda: not machine.is_there(), "its own end", detail=(machine.home / ".bruno-ray/switch.log").read_text)
    assert machine.other.destroyed_at is None


def test_it_lives_as_long_as_the_head_shows_itself(machine: Booted) -> None:
    """Two machines with the same patience: the head shows itself to the first, and the second ends."""
    machine.boot(patience_s=PATIENCE_S)
    heartbeat = machine.home / ".bruno-ray" / "heartbeat"
    os.utime(heartbeat, (time.time() + 3600, time.time() + 3600))
    alone = replace(machine, instance=machine.other, other=machine.instance, home=machine.home / "of the other")
    alone.home.mkdir()
    alone.boot(patience_s=PATIENCE_S)
    wait_for(lambda: not alone.is_there(), "the end of the machine without a head")
    assert machine.is_there()
    os.utime(heartbeat, (0, 0))
    wait_for(lambda: not machine.is_there(), "its end after the last heartbeat")
    alone.end()


def test_the_absolute_end_comes_although_the_head_is_there(machine: Booted) -> None:
    machine.boot(patience_s=1000, end=time.time() + 1)
    wait_for(lambda: not machine.is_there(), "the end")


def test_it_tries_until_it_is_heard_also_without_curl(machine: Booted, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "date", "stat", "sleep", "setsid", "nohup", "python3", "mkdir", "touch", "chmod", "grep"):
        found = shutil.which(name)
        assert found is not None, name
        (tools / name).symlink_to(sys.executable if name == "python3" else found)  # not a wrapper that needs others
    machine.server.close()
    machine.boot(patience_s=1, path=str(tools))
    log = machine.home / ".bruno-ray" / "switch.log"
    wait_for(lambda: log.read_text().count("Connection refused") >= 2, "two attempts", detail=log.read_text)
    port = int(machine.server.url.rpartition(":")[2])
    with FakeServer(FakeApi(machine.vast), port=port):
        wait_for(lambda: not machine.is_there(), "its end when the API is back", detail=log.read_text)


def test_what_the_api_would_refuse_is_refused_before_anything_is_searched() -> None:
    switch = Switch("https://console.vast.ai", 1800.0, 9_999_999_999.0)
    assert len(onstart("k" * 150, "", switch)) < 0.6 * LONGEST, "room for a user's commands"
    with pytest.raises(ClusterSettingsError, match="setup_commands"):
        onstart("k" * 150, "x" * 3000, switch)
