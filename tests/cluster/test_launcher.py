"""Workers launched from a machine of one's own: what the head is given, told and left without."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import keeper, launcher
from cluster.clock import SystemClock
from cluster.errors import NodeError
from cluster.jobs.shell import free_port
from cluster.network.mesh import Node
from cluster.network.ssh_master import Endpoint, LinkError, SshIdentity
from cluster.network.told import FILE, FRESH_S, Told, message
from cluster.node_provider import LAUNCHER_FOLDER
from cluster.renting.ledger import Ledger
from cluster.settings import ClusterSettings
from cluster.setup.bootstrap import bootstrapped
from cluster.setup.ray_start import CONFIG_OPTION, without_autoscaler
from cluster.supervisor import take_costs
from tests.cluster.fake_vast.cluster import NODE_CONFIG, ImitatedCluster, worker_tags
from tests.cluster.lab import Lab
from tests.cluster.ssh import KeyPair
from tests.support.programs import needs
from tests.support.waiting import wait_for

CHECKOUT = Path(__file__).parents[2]
NODES = [Node("10", 0, (Endpoint("10.0.0.1", 40022),)), Node("11", 3, (Endpoint("10.0.0.2", 22), Endpoint("h", 7)))]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """cluster.yaml with `launcher: laptop`, on a laptop that has no second key for a head."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".bruno-ray").mkdir()
    (tmp_path / ".bruno-ray" / "vast_api_key").write_text("the laptop's key\n")
    config = yaml.safe_load((CHECKOUT / "cluster.yaml").read_text())
    config["provider"]["launcher"] = "laptop"
    return config


@needs("ssh-keygen", package="openssh-client")
def test_the_head_is_given_no_key_and_none_is_asked_for(config: dict[str, Any]) -> None:
    resolved = bootstrapped(config)
    assert not [there for there in resolved["file_mounts"] if "api_key" in there]
    assert resolved["provider"]["head_files"] == []


@needs("ssh-keygen", package="openssh-client")
def test_the_launcher_s_copy_means_the_same_wherever_it_runs(config: dict[str, Any]) -> None:
    config["provider"]["notify"] = {"command": "mail me"}
    resolved = bootstrapped(config)
    settings = ClusterSettings.from_provider(resolved["provider"])
    own = launcher.configuration(resolved, CHECKOUT, settings)
    assert own["provider"]["role"] == "launcher" and resolved["provider"].get("role") != "launcher"
    assert own["file_mounts"]["~/bruno-ray/cluster"] == str(CHECKOUT / "cluster")
    assert not [there for there in own["file_mounts"] if "notify" in there], "what is for the head alone"
    assert ClusterSettings.from_provider(own["provider"]).who_to_notify().command == "mail me"


@pytest.mark.parametrize("place", ["head", "laptop"])
def test_the_head_starts_ray_s_autoscaler_where_that_has_a_key(tmp_path: Path, place: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"provider": {"launcher": place}}))
    given = [f"{CONFIG_OPTION}{file}", "--num-cpus=1"]
    assert without_autoscaler(given) == (given if place == "head" else ["--num-cpus=1", "--no-monitor"])
    assert without_autoscaler(["--num-cpus=1"]) == ["--num-cpus=1"]


class TestTold:
    def test_the_head_knows_what_it_was_told(self, tmp_path: Path) -> None:
        text = message(NODES, {"contracts": {}})
        assert "\n" not in text, "a line is a message"
        (tmp_path / FILE).write_text(text)
        told = Told(tmp_path)
        assert told.is_fresh()
        assert [(node.id, node.index, node.endpoints) for node in told.nodes()] == [
            (node.id, node.index, node.endpoints) for node in NODES
        ]
        assert told.costs() == {"contracts": {}}

    def test_a_launcher_that_has_gone_silent_is_not_believed(self, tmp_path: Path) -> None:
        (tmp_path / FILE).write_text(message(NODES, {}))
        old = time.time() - FRESH_S - 1
        os.utime(tmp_path / FILE, (old, old))
        told = Told(tmp_path)
        assert not told.is_fresh()
        with pytest.raises(NodeError, match="launcher is not there"):
            told.nodes()

    def test_nothing_was_said_yet_and_nonsense_are_errors_that_change_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(NodeError, match="launcher is not there"):
            Told(tmp_path).nodes()
        (tmp_path / FILE).write_text(message(NODES, {})[:-9])
        with pytest.raises(NodeError, match="cannot be read"):
            Told(tmp_path).nodes()

    def test_the_account_of_the_launcher_becomes_the_head_s(self, tmp_path: Path) -> None:
        home, head = Ledger(tmp_path / "home", SystemClock()), Ledger(tmp_path / "head", SystemClock())
        home.avoid(7, 60.0)
        (tmp_path / FILE).write_text(message(NODES, home.content()))
        take_costs(Told(tmp_path), head)
        assert head.content() == home.content() and head.avoided() == {7}


def test_a_launcher_looks_after_workers_as_a_head_does(world: ImitatedCluster) -> None:
    """It destroys one that never boots, and rents nothing without a head."""
    provider = world.provider("laptop", role="launcher", boot_timeout_s=60.0)
    with pytest.raises(Exception, match="does not list the head"):
        provider.create_node(NODE_CONFIG, worker_tags(), 1)
    world.autoscaler()
    world.clock.sleep(30)  # what was listed before is old by then
    [worker] = provider.create_node(NODE_CONFIG, worker_tags(), 1)
    world.vast.never_boots(int(worker))
    for _ in range(30):
        world.clock.sleep(10)
        provider.non_terminated_nodes({})
    assert int(worker) not in {instance.id for instance in world.vast.billed()}


class TestStanding:
    def standing(self, folder: Path, status: dict[str, Any] | None, place: str = "laptop") -> tuple[str, bool]:
        if status is not None:
            (folder / LAUNCHER_FOLDER).mkdir(exist_ok=True)
            (folder / LAUNCHER_FOLDER / keeper.STATUS).write_text(json.dumps(status))
        return launcher.standing(ClusterSettings.model_validate({"launcher": place}), folder)

    def test_says_where_workers_are_launched_from(self, tmp_path: Path) -> None:
        fine = {"written": time.time(), "pid": 7, "error": "", "api_error": ""}
        assert self.standing(tmp_path, None, "head") == ("launcher: the head, with the restricted key", True)
        said, in_order = self.standing(tmp_path, fine)
        assert in_order and "this machine, process 7" in said

    def test_says_what_is_wrong(self, tmp_path: Path) -> None:
        assert "`bruno-ray cluster up` starts it" in self.standing(tmp_path, None)[0]
        silent = {"written": time.time() - 100, "pid": 7, "error": "", "api_error": ""}
        deaf = {"written": time.time(), "pid": 7, "error": "root@h:22: no route to host", "api_error": ""}
        for status, words in ((silent, "silent for 100 s"), (deaf, "no route to host")):
            said, in_order = self.standing(tmp_path, status)
            assert not in_order and words in said


@pytest.mark.cluster
@pytest.mark.xdist_group("lab")
def test_one_connection_tells_the_head_and_leads_to_its_gcs(lab: Lab, key: KeyPair, tmp_path: Path) -> None:
    """And it ends with us, and says what is wrong."""
    head = lab.add([key.public])
    listening = f"cd {CHECKOUT}; {sys.executable} -m tests.cluster.lab.echo 0 2 < /dev/null > /tmp/echo.log 2>&1 &"
    lab.ssh(head, key.private, listening)
    wait_for(lambda: "ready" in head.read("/tmp/echo.log"), "the servers of the head")
    identity, port = SshIdentity(key.private, tmp_path / "known_hosts"), free_port()

    async def talk() -> str:
        line = launcher.HeadLine("7", Endpoint(head.public_address, head.ssh_port), identity, port, tmp_path / "log")
        await line.tell(message(NODES, {}))
        await line.tell(message(NODES[:1], {"contracts": {}}))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answer = (await reader.readline()).decode().strip()
        writer.close()
        await line.close()
        return answer

    async def talk_to_nobody() -> None:
        nobody = Endpoint(head.public_address, 9)
        await launcher.HeadLine("8", nobody, identity, port, tmp_path / "log").tell(message(NODES, {}))

    assert lab.on_internet(lambda: asyncio.run(talk())) == "node 0"
    told = json.loads(head.read(f"root/.bruno-ray/mesh/{FILE}"))
    assert [row["id"] for row in told["nodes"]] == ["10"] and told["costs"] == {"contracts": {}}
    wait_for(
        lambda: not any(b"while IFS" in command_line(pid) for pid in head.processes()), "the end of the head's part"
    )
    with pytest.raises(LinkError, match=f"{head.public_address}:9: .*(refused|timed out)"):
        lab.on_internet(lambda: asyncio.run(talk_to_nobody()))


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
