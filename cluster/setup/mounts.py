"""Files that `ray up` copies to the nodes beside what cluster.yaml mounts.

On every node: Ray's token, without which no port of Ray answers anybody, and the versions that the laptop runs. On the
head alone: the restricted API key. Ray would have the head copy its own mounts on to the workers, so the head's copy of
the configuration must go through `without_head_files`.
"""

import os
import platform
import secrets
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bruno_ray.files import write_json
from cluster.errors import ClusterSettingsError

TOKEN_MOUNT = "~/.ray/auth_token"
VERSIONS_MOUNT = "~/.bruno-ray/laptop_versions.json"
HEAD_FILES = "head_files"
"""Key of the provider section that names the mounts which are for the head only."""


def add_mounts(config: dict[str, Any], folder: Path, key_mount: str, key_file: Path) -> None:
    """Add token, versions and the head's API key to ``config["file_mounts"]``.

    ``folder`` is the cluster's folder on the laptop, ``key_mount`` where the head looks for the key and ``key_file``
    the restricted key on the laptop. Raises `ClusterSettingsError` when there is no such key.
    """
    if not key_file.is_file():
        raise ClusterSettingsError(
            f"the head's API key {key_file} does not exist; docs/cluster.md says how to make a restricted one"
        )
    versions = folder / "laptop_versions.json"
    write_json(versions, installed_versions())
    mounts = config.setdefault("file_mounts", {})
    mounts.update({TOKEN_MOUNT: str(ensure_token(folder)), VERSIONS_MOUNT: str(versions), key_mount: str(key_file)})
    config["provider"][HEAD_FILES] = [key_mount]


def without_head_files(config: dict[str, Any]) -> dict[str, Any]:
    """The head's copy of the configuration, from which it sets up workers: without the files that are its own."""
    own = config["provider"].get(HEAD_FILES, [])
    mounts = {remote: local for remote, local in config.get("file_mounts", {}).items() if remote not in own}
    return {**config, "file_mounts": mounts}


def ensure_token(folder: Path) -> Path:
    """Path of the cluster's token for Ray, made where there is none; only its owner can read it."""
    path = folder / "auth_token"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    with os.fdopen(descriptor, "w") as token:
        token.write(secrets.token_hex(32))
    return path


def installed_versions() -> dict[str, str]:
    """What must agree between laptop and nodes: Ray's protocol and pickles of functions depend on both."""
    return {"python": ".".join(platform.python_version_tuple()[:2]), "ray": version("ray")}
