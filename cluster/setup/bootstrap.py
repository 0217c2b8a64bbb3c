"""From cluster.yaml to the configuration that `ray up` works with: complete, and checked before it costs money."""

import copy
import sys
from types import TracebackType
from typing import Any

from bruno_ray.errors import BrunoError
from cluster.errors import ClusterSettingsError
from cluster.network.addresses import max_nodes
from cluster.network.keys import ensure_key_pair
from cluster.settings import ClusterSettings, NodeSettings, checked_cluster_name
from cluster.setup.mounts import add_mounts
from cluster.vast.disk import ModelSize, disk_for, model_size


def bootstrapped(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of `config` with the key pair, and the disk of every node type in GB.

    Raises `ClusterSettingsError` that names what to correct.
    """
    config = copy.deepcopy(config)
    name = checked_cluster_name(config["cluster_name"])
    settings = ClusterSettings.from_provider(config["provider"])
    if (config.get("docker") or {}).get("container_name"):
        raise ClusterSettingsError("rented machines are containers themselves; drop docker, set node_config.image")
    head_type = config.get("head_node_type")
    for type_name, node_type in config.get("available_node_types", {}).items():
        where = f"available_node_types.{type_name}"
        node = NodeSettings.from_config(node_type.get("node_config") or {})
        if type_name == head_type and node.requirements.interruptible:
            raise ClusterSettingsError(f"{where}: the head holds the study and must not be interruptible")
        if (cpus := (node_type.get("resources") or {}).get("CPU", 0)) > settings.max_cpus:
            raise ClusterSettingsError(
                f"{where}: {cpus} CPUs are more than provider.max_cpus {settings.max_cpus}; raise it"
            )
        node_type["node_config"] = _with_disk(node)
    limit = max_nodes(settings.max_cpus)
    if config.get("max_workers", 0) + 1 > limit:
        raise ClusterSettingsError(
            f"max_workers is {config['max_workers']}, but with provider.max_cpus {settings.max_cpus} only {limit - 1} "
            "workers have ports; lower one of the two"
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
    add_mounts(config, settings.folder(name), str(key_mount), settings.head_api_key_file)
    return config


def _with_disk(node: NodeSettings) -> dict[str, Any]:
    """As plain values; the model is resolved here, because the head may not reach the hub or the folder."""
    size = None
    if node.model:
        size = model_size(node.model)
    elif node.model_size_gb:
        size = ModelSize.of_gb(node.model_size_gb)
    values = node.model_dump(mode="json", exclude_defaults=True, exclude={"model"})
    values["disk_gb"] = node.disk_gb or disk_for(size)
    if size is not None:
        values["model_size_gb"] = size.gb
    return values


def one_line_errors() -> None:
    """Let an error of ours that nobody catches end this process with its message instead of a traceback."""
    sys.excepthook = _print_error


def _print_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if isinstance(error, BrunoError):
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    else:
        sys.__excepthook__(kind, error, traceback)
