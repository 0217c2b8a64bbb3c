"""Ray's own code on our provider: autoscaler v2's adapter, and the commands that its runner is given."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.autoscaler import NonTerminatedNodes
from ray.autoscaler._private.event_summarizer import EventSummarizer
from ray.autoscaler._private.node_launcher import BaseNodeLauncher
from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
from ray.autoscaler._private.util import ConcurrentCounter
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.v2.instance_manager.config import FileConfigReader
from ray.autoscaler.v2.instance_manager.node_provider import LaunchNodeError, NodeProviderAdapter
from ray.core.generated.instance_manager_pb2 import NodeKind

from cluster.errors import NodeError
from cluster.jobs.shell import free_port
from cluster.network.probe import greets
from cluster.network.ssh_master import Endpoint
from cluster.node_provider import VastNodeProvider
from cluster.setup import command_runner
from tests.cluster.fake_vast.cluster import ImitatedCluster, worker_tags
from tests.cluster.ssh import Sshd
from tests.support.programs import needs
from tests.support.waiting import wait_for

CLUSTER_YAML = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    config = yaml.safe_load(CLUSTER_YAML.read_text())
    (tmp_path / "key").write_text("Ray hashes it with the configuration of a node")
    config["auth"]["ssh_private_key"] = str(tmp_path / "key")
    for node_type in config["available_node_types"].values():
        node_type["node_config"]["disk_gb"] = 40
    path = tmp_path / "bootstrap.yaml"
    path.write_text(json.dumps(config))
    return path


def test_autoscaler_v2_launches_sees_and_terminates(world: ImitatedCluster, config_file: Path) -> None:
    provider = world.autoscaler(budget={"max_price_per_hour": 1.2})
    adapter = NodeProviderAdapter(provider, FileConfigReader(str(config_file), skip_content_hash=True))
    adapter.launch({"rtx4090": 2}, "request-1")
    wait_for(lambda: len(adapter.get_non_terminated()) == 3, "head and two workers")
    workers = [node for node in adapter.get_non_terminated().values() if node.node_kind == NodeKind.WORKER]
    assert {(node.node_type, node.request_id, node.is_running) for node in workers} == {("rtx4090", "request-1", False)}
    world.clock.sleep(40)
    assert all(node.is_running for node in adapter.get_non_terminated().values())
    adapter.launch({"rtx4090": 2}, "request-2")
    errors: list[Any] = []
    wait_for(lambda: errors.extend(adapter.poll_errors()) or errors, "an error of the launch")
    assert isinstance(errors[0], LaunchNodeError) and errors[0].request_id == "request-2"
    assert "max_price_per_hour" in str(errors[0].__cause__)
    adapter.terminate([node.cloud_instance_id for node in workers], "request-3")
    wait_for(
        lambda: not any(node.request_id == "request-1" for node in adapter.get_non_terminated().values()),
        "the end of the first two workers",
    )
    assert {instance.env["CLUSTER_NODE_INDEX"] for instance in world.vast.billed() if instance.env} == {"3"}


def test_autoscaler_v1_launches_sees_and_says_why_not(world: ImitatedCluster, config_file: Path) -> None:
    provider = world.autoscaler(budget={"max_price_per_hour": 1.0})
    config = json.loads(config_file.read_text())
    pending, events, tracker = ConcurrentCounter(), EventSummarizer(), NodeProviderAvailabilityTracker()
    launcher = BaseNodeLauncher(provider, pending, events, tracker, session_name="imitated")
    pending.inc("rtx4090", 4)
    launcher.launch_node(config, 4, "rtx4090")
    nodes = NonTerminatedNodes(provider)
    assert nodes.head_id is not None and len(nodes.worker_ids) == 2
    assert pending.value == 0
    [said] = events.summary()
    assert "2 of 4 rented" in said and "max_price_per_hour" in said
    provider.terminate_nodes(nodes.worker_ids)
    assert NonTerminatedNodes(provider).worker_ids == []


def test_nothing_that_ray_may_call_is_left_to_its_base_class_by_accident() -> None:
    inherited = {
        name
        for name, method in vars(NodeProvider).items()
        if callable(method) and not name.startswith("__") and name not in vars(VastNodeProvider)
    }
    assert inherited == {
        "is_readonly",
        "create_node_with_resources_and_labels",
        "fillout_available_node_types_resources",
        "post_process",
    }


class RecordingRunner:
    """Stands where Ray's command runner calls `subprocess`, and keeps the command lines."""

    CalledProcessError = subprocess.CalledProcessError

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def check_output(self, command: list[str]) -> bytes:
        self.commands.append(command)
        return b"done"


def runner_for(
    world: ImitatedCluster,
    monkeypatch: pytest.MonkeyPatch,
    endpoints: tuple[Endpoint, ...],
    recorder: RecordingRunner,
    key: Path = Path("/keys/id"),
) -> command_runner.VastCommandRunner:
    provider = world.autoscaler()
    [node] = provider.create_node({"disk_gb": 40}, worker_tags(), 1)
    monkeypatch.setattr(provider, "ssh_endpoints", lambda node_id: endpoints)
    auth = {"ssh_user": "root", "ssh_private_key": str(key)}
    runner = provider.get_command_runner("", node, auth, "demo", recorder, False)  # type: ignore[arg-type]
    assert isinstance(runner, command_runner.VastCommandRunner)
    return runner


@needs("ssh-keygen", package="openssh-client")
def test_a_laptop_uses_its_own_key_whatever_ray_has_cached(world: ImitatedCluster) -> None:
    """Two home folders with the same cluster.yaml share Ray's cached configuration, not their keys."""
    laptop = world.provider("laptop")
    auth = {"ssh_user": "root", "ssh_private_key": "/home/somebody/else/id_ed25519"}
    runner = laptop.get_command_runner("", "1", auth, "demo", RecordingRunner(), False)  # type: ignore[arg-type]
    assert isinstance(runner, command_runner.VastCommandRunner)
    key = laptop.folder / "id_ed25519"
    assert key.exists() and runner.ssh_private_key == str(key) and auth["ssh_private_key"] != str(key)


@needs("/usr/sbin/sshd", "ssh-keygen", package="openssh-server")
def test_commands_go_to_the_first_address_that_runs_them_and_know_their_node(
    world: ImitatedCluster, monkeypatch: pytest.MonkeyPatch, sshd: Sshd
) -> None:
    """An sshd that answers is not enough: its shells may put every command into tmux."""
    nobody = Endpoint("127.0.0.1", free_port())
    recorder = RecordingRunner()
    runner = runner_for(world, monkeypatch, (nobody, sshd.endpoint), recorder, sshd.key)
    assert greets(sshd.endpoint) and runner._get_node_ip() is None
    (sshd.home / ".no_auto_tmux").touch()
    assert runner.run("uptime", with_output=True, ssh_options_override_ssh_key="/another/key") == b"done"
    [command] = recorder.commands
    text = " ".join(command)
    assert f"Port={sshd.endpoint.port}" in text and "root@127.0.0.1" in text and f"-i {sshd.key}" in text
    assert "export CLUSTER_NAME=demo CLUSTER_NODE_INDEX=1 CLUSTER_NODE_ADDRESS=127.77.0.2 CLUSTER_MAX_CPUS=48" in text
    assert "StrictHostKeyChecking=accept-new" in text and f"HostKeyAlias=bruno-ray-{runner.node_id}" in text
    assert str(runner.provider.folder) in text and "UserKnownHostsFile=/dev/null" not in text
    shell = runner.remote_shell_command_str()
    assert f"Port={sshd.endpoint.port}" in shell and "StrictHostKeyChecking=no" not in shell


def test_a_machine_whose_sshd_does_not_greet_has_no_address_yet(
    world: ImitatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_for(world, monkeypatch, (Endpoint("127.0.0.1", free_port()),), RecordingRunner())
    assert runner._get_node_ip() is None
    world.vast.outbid(int(runner.node_id))
    world.clock.sleep(10)
    with pytest.raises(NodeError, match="is stopped"):
        runner._get_node_ip()
    world.vast.host_deletes(int(runner.node_id))
    world.clock.sleep(10)
    with pytest.raises(NodeError, match="is gone"):
        runner._get_node_ip()
