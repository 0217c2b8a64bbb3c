"""How Ray is started on a node, what is copied there, and that cluster.yaml is what Ray and the provider accept."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.errors import ClusterSettingsError, NodeError
from cluster.jobs.shell import free_port
from cluster.network.addresses import NodeAddress
from cluster.network.ssh_master import ALIVE_COUNT, ALIVE_INTERVAL_S
from cluster.settings import ClusterSettings, NodeSettings
from cluster.setup import ray_start
from cluster.setup.mounts import (
    TOKEN_MOUNT,
    VERSIONS_MOUNT,
    add_mounts,
    ensure_token,
    installed_versions,
    without_head_files,
)
from cluster.setup.ray_start import (
    ENVIRONMENT,
    GCS_RECONNECT_S,
    HEALTH_CHECK_FAILURES,
    HEALTH_CHECK_PERIOD_MS,
    address_here,
    command_line,
    wait_for_head,
)
from cluster.setup.versions import differences

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIG_TEXT = (CHECKOUT / "cluster.yaml").read_text()


def options(command: list[str]) -> dict[str, str]:
    return {name: value for name, _, value in (word.partition("=") for word in command if word.startswith("--"))}


def test_every_port_of_a_node_lies_in_what_the_tunnels_carry() -> None:
    for index in (0, 1, 30):
        here = NodeAddress(index, 8)
        given = options(command_line(here))
        ports = [int(value) for name, value in given.items() if name.endswith("-port")]
        workers = [int(port) for port in given["--worker-port-list"].split(",")]
        assert set(ports + workers) <= set(here.ports) and len(ports) >= 6
        assert len(set(ports + workers)) == len(ports + workers), "no port is given twice"
        assert len(workers) >= 2 * 8 + 32
        assert given["--node-ip-address"] == here.alias


def test_worker_joins_the_head_under_its_alias_and_only_node_0_is_head() -> None:
    assert options(command_line(NodeAddress(3, 8)))["--address"] == "127.77.0.1:6379"
    assert "--head" not in command_line(NodeAddress(3, 8)) and "--head" in command_line(NodeAddress(0, 8))
    assert "--num-cpus=1" in command_line(NodeAddress(3, 8), ["--num-cpus=1"])


def test_limits_let_a_cut_of_45_s_pass_and_notice_a_lost_machine_within_two_minutes() -> None:
    """In a cut, one check hangs for up to 10 s until ssh gives up, and then every check fails at once."""
    dead_after = ALIVE_INTERVAL_S * ALIVE_COUNT + HEALTH_CHECK_FAILURES * HEALTH_CHECK_PERIOD_MS / 1000
    assert 45 + 15 < dead_after < 120
    assert dead_after < GCS_RECONNECT_S


def test_start_without_the_provider_says_what_is_missing() -> None:
    assert address_here({"CLUSTER_NODE_INDEX": "2", "CLUSTER_MAX_CPUS": "8"}) == NodeAddress(2, 8)
    for environment in ({}, {"CLUSTER_NODE_INDEX": "2"}, {"CLUSTER_NODE_INDEX": "x", "CLUSTER_MAX_CPUS": "8"}):
        with pytest.raises(ClusterSettingsError, match="CLUSTER_NODE_INDEX"):
            address_here(environment)


def test_worker_waits_for_the_tunnel_and_gives_up_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_start, "GCS_PORT", port := free_port())
    here = NodeAddress(1, 2)
    with pytest.raises(NodeError, match="supervisor"):
        wait_for_head(here, timeout_s=0)
    with socket.create_server((NodeAddress(0, 2).alias, port)):
        wait_for_head(here, timeout_s=0)


def test_token_and_versions_go_to_all_nodes_and_the_api_key_to_the_head_alone(tmp_path: Path) -> None:
    key = tmp_path / "restricted"
    config = {"provider": {}, "file_mounts": {"~/mine": "mine"}}
    with pytest.raises(ClusterSettingsError, match="restricted"):
        add_mounts(config, tmp_path, "~/key", key)
    key.write_text("k")
    add_mounts(config, tmp_path, "~/key", key)
    assert config["file_mounts"] == {
        "~/mine": "mine",
        "~/key": str(key),
        TOKEN_MOUNT: str(tmp_path / "auth_token"),
        VERSIONS_MOUNT: str(tmp_path / "laptop_versions.json"),
    }
    assert set(without_head_files(config)["file_mounts"]) == {"~/mine", TOKEN_MOUNT, VERSIONS_MOUNT}
    assert "~/key" in config["file_mounts"], "the head itself still gets it"
    assert json.loads((tmp_path / "laptop_versions.json").read_text()) == installed_versions()


def test_token_is_made_once_and_is_nobody_elses_to_read(tmp_path: Path) -> None:
    token = ensure_token(tmp_path)
    first = token.read_text()
    assert len(first) >= 64 and stat.S_IMODE(token.stat().st_mode) == 0o600
    assert ensure_token(tmp_path).read_text() == first


def test_other_versions_on_a_node_are_named() -> None:
    laptop = {"python": "3.11", "ray": "2.60.0"}
    assert differences(laptop, laptop) == []
    assert differences({"python": "3.12", "ray": "2.60.0"}, laptop) == ["python is 3.12 here and 3.11 on the laptop"]


def test_cluster_yaml_is_accepted_by_ray_and_by_the_provider() -> None:
    config = yaml.safe_load(CONFIG_TEXT)
    validate_config(prepare_config(yaml.safe_load(CONFIG_TEXT)))
    settings = ClusterSettings.from_provider(config["provider"])
    for name, node_type in config["available_node_types"].items():
        NodeSettings.from_config(node_type["node_config"])
        assert node_type["resources"]["CPU"] <= settings.max_cpus, name
    head = NodeSettings.from_config(config["available_node_types"]["head"]["node_config"])
    assert not head.requirements.interruptible
    assert all((CHECKOUT / local).exists() for local in config["file_mounts"].values())


def test_examples_in_cluster_yaml_are_node_types_too() -> None:
    """The commented node types become valid when their comment signs are taken away."""
    lines = CONFIG_TEXT.splitlines()
    types = lines.index("available_node_types:")
    begins = [number for number, line in enumerate(lines) if number > types and re.fullmatch(r"  # \w+:", line)]
    names = []
    for number in begins:
        end = next(at for at in range(number, len(lines)) if not lines[at].startswith("  #"))
        example = yaml.safe_load("\n".join(line.replace("# ", "", 1) for line in lines[number:end]))
        ((name, node_type),) = example.items()
        NodeSettings.from_config(node_type["node_config"])
        names.append(name)
    assert {"h100", "box", "rtx4090_bid"} <= set(names)


def test_every_setting_in_cluster_yaml_has_a_comment_above() -> None:
    """Above itself, or above the block of short requirements it belongs to."""
    lines = CONFIG_TEXT.splitlines()
    top = [number for number, line in enumerate(lines) if line and line[0] not in " #" and ":" in line]
    bare = [lines[number] for number in top if not lines[number - 1].startswith("#")]
    allowed = {"available_node_types:", "provider:", "auth:", "worker_setup_commands: []"}
    assert {line for line in bare if line not in allowed} == {"file_mounts_sync_continuously: false"}


@pytest.mark.parametrize(("patience", "attempts"), [(0.0, 3), (60.0, 1)])
def test_ray_is_started_again_where_it_ran_out_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float, attempts: int
) -> None:
    program, log = tmp_path / "ray", tmp_path / "log"
    program.write_text(f'#!/bin/sh\necho "$1" >> {log}\n[ "$1" = stop ]\n')
    program.chmod(0o700)
    monkeypatch.setattr(ray_start, "RAYS_PATIENCE_S", patience)
    assert ray_start.start([str(program), "start"]) == 1
    assert log.read_text().split() == ["start", "stop"] * (attempts - 1) + ["start"]
    program.write_text("#!/bin/sh\nexit 0\n")
    assert ray_start.start([str(program), "start"]) == 0


STORED = """
import numpy, ray
from ray._private.internal_api import memory_summary

ray.init("local", num_cpus=1, object_store_memory=200 * 1024**2, include_dashboard=False, log_to_driver=False)

@ray.remote(num_cpus=0)
class Holder:
    def __init__(self, given): self.given = given
    def size(self): return self.given.nbytes

holder = Holder.remote(numpy.zeros(2_000_000, dtype=numpy.uint8))
assert ray.get(holder.size.remote()) == 2_000_000
print(memory_summary(ray.get_runtime_context().gcs_address, stats_only=True))
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize(("of_ours", "objects"), [(False, 1), (True, 0)])
def test_what_an_actor_is_given_is_no_object_of_its_own(of_ours: bool, objects: int) -> None:
    """Of an object, the worker that an actor was offered to first may keep a copy, which others cannot fetch."""
    names = ("RAY_max_direct_call_object_size", "RAY_object_manager_pull_timeout_ms")
    environment = {**os.environ, **({name: ENVIRONMENT[name] for name in names} if of_ours else {})}
    said = subprocess.run([sys.executable, "-c", STORED], env=environment, capture_output=True, text=True, check=True)
    assert f", {objects} objects," in said.stdout
