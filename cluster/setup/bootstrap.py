"""From cluster.yaml to the configuration that `ray up` works with: complete, and checked before it costs money."""

import copy
import os
import sys
from types import TracebackType
from typing import Any

from bruno_ray.errors import BrunoError
from cluster.errors import ClusterSettingsError
from cluster.network.addresses import max_nodes
from cluster.network.keys import ensure_key_pair
from cluster.settings import ClusterSettings, NodeSettings, checked_cluster_name
from cluster.setup.mounts import add_mounts, add_notify
from cluster.vast.disk import ModelSize, disk_for, head_disk_for, head_ram_for, model_size
from cluster.vast.onstart import Switch, onstart

MAX_HOURS_VARIABLE = "BRUNO_CLUSTER_MAX_HOURS"
"""How `bruno-ray cluster up --max-hours` tells it to the `ray up` that it starts; comes before cluster.yaml."""

LONGEST_KEY = "k" * 150
LATEST = 9_999_999_999.0
"""Stand-ins, as long as a public key and an end can be: whether `onstart` fits is known before anything is searched."""


def bootstrapped(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of `config` with the key pair, and the disk of every node type in GB.

    Raises `ClusterSettingsError` that names what to correct.
    """
    config = copy.deepcopy(config)
    name = checked_cluster_name(config["cluster_name"])
    if hours := os.environ.get(MAX_HOURS_VARIABLE):
        config["provider"]["budget"] = {**(config["provider"].get("budget") or {}), "max_hours": hours}
    settings = ClusterSettings.from_provider(config["provider"])
    if (config.get("docker") or {}).get("container_name"):
        raise ClusterSettingsError("rented machines are containers themselves; drop docker, set node_config.image")
    head_type = config.get("head_node_type")
    sizes: dict[str, ModelSize] = {}
    head: NodeSettings | None = None
    for type_name, node_type in config.get("available_node_types", {}).items():
        where = f"available_node_types.{type_name}"
        node = NodeSettings.from_config(node_type.get("node_config") or {})
        if type_name == head_type and node.requirements.interruptible:
            raise ClusterSettingsError(f"{where}: the head holds the study and must not be interruptible")
        if (cpus := (node_type.get("resources") or {}).get("CPU", 0)) > settings.max_cpus:
            raise ClusterSettingsError(
                f"{where}: {cpus} CPUs are more than provider.max_cpus {settings.max_cpus}; raise it"
            )
        if (size := _size(node)) is not None:
            sizes[type_name] = size
        node_type["node_config"] = _with_disk(node, size)
        onstart(LONGEST_KEY, node.onstart, Switch(settings.vast_url, settings.dead_mans_switch_s, LATEST))
        if type_name == head_type:
            head = node
    if head is not None:
        values = config["available_node_types"][head_type]["node_config"]
        _fit_head(head, values, f"available_node_types.{head_type}", sizes)
    limit = max_nodes(settings.max_cpus, settings.mesh)
    if config.get("max_workers", 0) + 1 > limit:
        raise ClusterSettingsError(
            f"max_workers is {config['max_workers']}, but with provider.max_cpus {settings.max_cpus} and mesh"
            f" {settings.mesh} only {limit - 1} workers have ports; lower one of the two"
        )
    key = ensure_key_pair(settings.folder(name), name)
    auth = config.setdefault("auth", {})
    if auth.get("ssh_private_key", str(key)) != str(key):
        raise ClusterSettingsError(
            f"auth.ssh_private_key is set, but Ray copies that key to a rented machine; leave it out, {key} is used"
        )
    auth.update(ssh_private_key=str(key))
    auth.setdefault("ssh_user", "root")
    key_mount = config["provider"].get("api_key_file", ClusterSettings.model_fields["api_key_file"].default)
    head_key = None if settings.launcher == "laptop" else settings.head_api_key_file
    add_mounts(config, settings.folder(name), str(key_mount), head_key)
    add_notify(config, settings.folder(name), settings.notify)
    return config


def _size(node: NodeSettings) -> ModelSize | None:
    """Of its model, which is looked up here, because the head may not reach the hub or the folder."""
    if node.model:
        return model_size(node.model)
    return ModelSize.of_gb(node.model_size_gb) if node.model_size_gb else None


def _with_disk(node: NodeSettings, size: ModelSize | None) -> dict[str, Any]:
    """As plain values, with the disk where it is given or follows from the node's own model."""
    values = node.model_dump(mode="json", exclude_defaults=True, exclude={"model"})
    values["disk_gb"] = node.disk_gb or disk_for(size)
    if size is not None:
        values["model_size_gb"] = size.gb
    return values


def _fit_head(head: NodeSettings, values: dict[str, Any], where: str, sizes: dict[str, ModelSize]) -> None:
    """Disk and memory that hold the largest model of the cluster, which the head saves and keeps until it is fetched.

    Raises `ClusterSettingsError` where less is asked for.
    """
    largest = max(sizes, key=lambda name: sizes[name].gb, default="")
    why = f"the model of {largest} has {sizes[largest].gb:.0f} GB, and the head saves it" if largest else "it is a head"
    disk, ram = head_disk_for(sizes.values()), head_ram_for(sizes.values())
    needs = values.setdefault("requirements", {})
    for key, given, least in (
        ("disk_gb", head.disk_gb, disk),
        ("requirements.min_ram_gb", needs.get("min_ram_gb"), ram),
    ):
        if given is not None and given < least:
            raise ClusterSettingsError(f"{where}.node_config.{key}: {given:g} GB are too few: {why}; give {least:.0f}")
    values["disk_gb"] = max(values["disk_gb"], disk)
    needs["min_ram_gb"] = max(needs.get("min_ram_gb", 0.0), ram)


def one_line_errors() -> None:
    """Let an error of ours that nobody catches end this process with its message instead of a traceback."""
    sys.excepthook = _print_error


def _print_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if isinstance(error, BrunoError):
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    else:
        sys.__excepthook__(kind, error, traceback)
