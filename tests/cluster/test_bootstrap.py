"""From cluster.yaml to what `ray up` works with, through Ray's own functions."""

import json
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.util import hash_launch_conf, validate_config

from cluster.errors import ClusterSettingsError
from cluster.network.keys import authorize_command, ensure_key_pair, public_key
from cluster.settings import ClusterSettings, NodeSettings
from cluster.setup.bootstrap import MAX_HOURS_VARIABLE, bootstrapped
from tests.support.programs import needs

pytestmark = needs("ssh-keygen", package="openssh-client")
CLUSTER_YAML = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The project's cluster.yaml on a laptop with keys."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VAST_URL", "http://127.0.0.1:9")
    folder = tmp_path / ".bruno-ray"
    folder.mkdir()
    (folder / "vast_api_key").write_text("the laptop's key\n")
    (folder / "vast_api_key_head").write_text("the head's key\n")
    return yaml.safe_load(CLUSTER_YAML.read_text())


def test_the_projects_cluster_yaml_is_accepted_by_ray_and_by_us(config: dict[str, Any]) -> None:
    resolved = _bootstrap_config(config, no_config_cache=True)
    validate_config(resolved)
    settings = ClusterSettings.from_provider(resolved["provider"])
    assert settings.vast_url == "http://127.0.0.1:9"
    assert settings.api_key() == "the laptop's key"
    for node_type in resolved["available_node_types"].values():
        assert NodeSettings.from_config(node_type["node_config"]).disk_gb
        hash_launch_conf(node_type["node_config"], resolved["auth"])
    key = Path(resolved["auth"]["ssh_private_key"])
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert resolved["file_mounts"]["~/.bruno-ray/vast_api_key"].endswith("vast_api_key_head")
    assert "the laptop's key" not in json.dumps(resolved)
    assert bootstrapped(resolved) == resolved, "Ray caches the result and may bootstrap it again"


def model_of(gb: int, folder: Path) -> str:
    """A folder with a model of so many GB, which take no room."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    with open(folder / "model.safetensors", "r+b") as weights:
        weights.truncate(gb * 10**9)
    return str(folder)


def test_the_disk_follows_from_the_model(config: dict[str, Any], tmp_path: Path) -> None:
    worker = config["available_node_types"]["rtx4090"]["node_config"]
    worker.pop("model_size_gb")
    worker["model"] = model_of(25, tmp_path / "model")
    resolved = bootstrapped(config)["available_node_types"]["rtx4090"]["node_config"]
    assert resolved["disk_gb"] == pytest.approx(70)
    assert resolved["model_size_gb"] == pytest.approx(25)
    assert "model" not in resolved


def test_the_head_holds_the_largest_model(config: dict[str, Any], tmp_path: Path) -> None:
    """It saves the model in its memory and keeps it on its disk until it is fetched."""
    types = config["available_node_types"]
    types["rtx4090"]["node_config"] = {"model": model_of(140, tmp_path / "model"), "disk_gb": 400}
    head = bootstrapped(config)["available_node_types"]["head"]["node_config"]
    assert head["disk_gb"] == pytest.approx(200) and head["requirements"]["min_ram_gb"] == pytest.approx(152)
    types["head"]["node_config"]["disk_gb"] = 100
    with pytest.raises(ClusterSettingsError, match=r"head\.node_config\.disk_gb: 100 GB are too few.*give 200"):
        bootstrapped(config)
    types["head"]["node_config"].pop("disk_gb")
    types["head"]["node_config"]["requirements"]["min_ram_gb"] = 32
    with pytest.raises(ClusterSettingsError, match=r"min_ram_gb: 32 GB are too few.*140 GB.*give 152"):
        bootstrapped(config)


def test_hours_of_the_command_line_come_before_those_of_the_file(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config["provider"]["budget"]["max_hours"] = 24
    monkeypatch.setenv(MAX_HOURS_VARIABLE, "2.5")
    assert ClusterSettings.from_provider(bootstrapped(config)["provider"]).budget.max_hours == 2.5
    monkeypatch.setenv(MAX_HOURS_VARIABLE, "-1")
    with pytest.raises(ClusterSettingsError, match=r"budget\.max_hours"):
        bootstrapped(config)


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.split("/")
    section = config
    for parent in parents:
        section = section[parent]
    section[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("cluster_name", "My Cluster", "up to 24 lower-case"),
        ("max_workers", 1000, "lower one of the two"),
        ("provider/max_cpus", 2, "more than provider.max_cpus"),
        ("provider/budgett", {}, r"provider\.budgett"),
        ("provider/budget/max_total_cost", -1, r"provider\.budget\.max_total_cost"),
        ("available_node_types/head/node_config/requirements/interruptible", True, "must not be interruptible"),
        ("available_node_types/head/node_config/requirements/min_cuda", "new", r"requirements\.min_cuda"),
        ("available_node_types/rtx4090/node_config/onstart", "x" * 4000, "setup_commands"),
        ("docker", {"image": "ray", "container_name": "ray"}, "containers themselves"),
        ("auth/ssh_private_key", "~/.ssh/id_ed25519", "copies that key to a rented machine"),
        ("provider/head_api_key_file", "~/nowhere", "does not exist"),
    ],
)
def test_what_makes_no_sense_is_refused_before_it_costs_money(
    config: dict[str, Any], path: str, value: Any, message: str
) -> None:
    with pytest.raises(ClusterSettingsError, match=message):
        bootstrapped(changed(config, path, value))


def test_a_missing_key_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VAST_API_KEY", raising=False)
    settings = ClusterSettings.from_provider({"api_key_file": str(tmp_path / "key")})
    with pytest.raises(ClusterSettingsError, match=r"put the key there.*VAST_API_KEY"):
        settings.api_key()
    (tmp_path / "key").write_text("\n")
    with pytest.raises(ClusterSettingsError, match="is empty"):
        settings.api_key()
    monkeypatch.setenv("VAST_API_KEY", " from-the-environment ")
    assert settings.api_key() == "from-the-environment"


def test_a_cluster_has_one_key_pair_and_it_opens_once(tmp_path: Path) -> None:
    key = ensure_key_pair(tmp_path / "a", "a")
    line = public_key(key)
    assert ensure_key_pair(tmp_path / "a", "a") == key and public_key(key) == line
    assert public_key(ensure_key_pair(tmp_path / "b", "b")) != line
    command = authorize_command(line)
    for _ in range(2):
        subprocess.run(["sh", "-c", command], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=True)
    authorized = tmp_path / ".ssh" / "authorized_keys"
    assert authorized.read_text() == line + "\n"
    assert stat.S_IMODE(authorized.stat().st_mode) == 0o600


def test_a_home_that_cannot_be_written_is_one_line() -> None:
    with pytest.raises(ClusterSettingsError, match=r"/proc/none/a cannot be used .*: set provider\.state_folder"):
        ensure_key_pair(Path("/proc/none/a"), "a")
