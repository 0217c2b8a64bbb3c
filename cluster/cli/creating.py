"""`cluster create RTX_4090 4`: a cluster of so many machines of one kind, without editing cluster.yaml."""

import argparse
import copy
import re
from pathlib import Path
from typing import Any

import yaml

from bruno_ray.files import write_text
from cluster.cli.machines import up
from cluster.errors import ClusterSettingsError
from cluster.jobs.session import read_config
from cluster.network.keys import ensure_folder
from cluster.settings import ClusterSettings, Requirements, checked_cluster_name

CPUS_PER_GPU = 8
CREATED = "created.yaml"
"""In the cluster's folder: what `create` made of cluster.yaml. Other commands need only the name of the cluster."""


def create(arguments: argparse.Namespace) -> int:
    """Write the file that says so, and do what `up` does with it."""
    file = arguments.cluster_config
    config = created(read_config(file), file.resolve().parent, arguments)
    settings = ClusterSettings.from_provider(config["provider"])
    folder = settings.folder(checked_cluster_name(config["cluster_name"]))
    ensure_folder(folder)
    write_text(folder / CREATED, yaml.safe_dump(config, sort_keys=False))
    arguments.cluster_config, arguments.restart, arguments.max_hours = folder / CREATED, False, None
    return up(arguments)


def created(config: dict[str, Any], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """`config`, which lies in `folder`, with one type of worker: `count` machines with one `gpu` each at once.

    What cluster.yaml says about a type with such a GPU is kept. Raises `ClusterSettingsError`.
    """
    if arguments.count < 1:
        raise ClusterSettingsError(f"command line: {arguments.count} machines; give at least 1")
    config = copy.deepcopy(config)
    [gpu] = Requirements(gpu_names=(arguments.gpu,)).gpu_names
    types, head = config["available_node_types"], config.get("head_node_type", "head")
    if head not in types:
        raise ClusterSettingsError("available_node_types has no head: take the project's cluster.yaml as a model")
    worker = next((kind for name, kind in types.items() if name != head and _has(kind, gpu)), None) or _plain(
        types[head]
    )
    needs = worker["node_config"].setdefault("requirements", {})
    needs.update(gpu_names=[gpu], num_gpus=1)
    if arguments.model is not None:
        for key in ("model_size_gb", "disk_gb"):
            worker["node_config"].pop(key, None)
        worker["node_config"]["model"] = arguments.model
    worker.update(min_workers=arguments.count, max_workers=arguments.count)
    config["available_node_types"] = {head: types[head], re.sub(r"[^a-z0-9]+", "_", gpu.lower()): worker}
    config["max_workers"] = arguments.count
    budget = config["provider"].setdefault("budget", {})
    if arguments.hours is not None:
        budget["max_hours"] = arguments.hours
    if arguments.budget is not None:
        budget["max_total_cost"] = arguments.budget
    if arguments.hours and arguments.budget:
        budget["max_price_per_hour"] = max(arguments.budget / arguments.hours, budget.get("max_price_per_hour", 0.0))
    mounts = config.get("file_mounts") or {}
    config["file_mounts"] = {there: str(folder / Path(here).expanduser()) for there, here in mounts.items()}
    return config


def _has(node_type: dict[str, Any], gpu: str) -> bool:
    """Whether it is rented from hosts that have one such GPU, for sure and to stay."""
    needs = Requirements.model_validate((node_type.get("node_config") or {}).get("requirements") or {})
    return gpu in needs.gpu_names and needs.num_gpus == 1 and not needs.interruptible


def _plain(head: dict[str, Any]) -> dict[str, Any]:
    """A type of worker that asks for nothing special, with the head's image."""
    node = {"requirements": {"min_cpus": CPUS_PER_GPU, "min_ram_gb": 32}}
    if image := (head.get("node_config") or {}).get("image"):
        node["image"] = image
    return {"resources": {"CPU": CPUS_PER_GPU, "GPU": 1}, "node_config": node}
