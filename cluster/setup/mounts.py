"""Files that `ray up` copies to the nodes beside what cluster.yaml mounts.

On every node: Ray's token, without which no port of Ray answers anybody, and the versions that the laptop runs. On the
head alone: the restricted API key, and who is told of what happens. Ray would have the head copy its own mounts on to
the workers, so the head's copy of the configuration must go through `without_head_files`.
"""

import json
import os
import platform
import secrets
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bruno_ray.files import write_json
from cluster.errors import ClusterSettingsError
from cluster.settings import NotifySettings

TOKEN_MOUNT = "~/.ray/auth_token"
VERSIONS_MOUNT = "~/.bruno-ray/laptop_versions.json"
NOTIFY_MOUNT = "~/.bruno-ray/notify.json"
HEAD_FILES = "head_files"
"""Key of the provider section that names the mounts which are for the head only."""


def add_mounts(config: dict[str, Any], folder: Path, key_mount: str, key_file: Path | None) -> None:
    """Add token, versions and the head's API key to ``config["file_mounts"]``.

    ``folder`` is the cluster's folder on the laptop, ``key_mount`` where the head looks for the key and ``key_file``
    the restricted key on the laptop, None for a head without. Raises `ClusterSettingsError` when there is no such key.
    """
    if key_file is not None and not key_file.is_file():
        raise ClusterSettingsError(
            f"the head's API key {key_file} does not exist; docs/cluster.md says how to make a restricted one"
        )
    versions = folder / "laptop_versions.json"
    write_json(versions, installed_versions())
    mounts = config.setdefault("file_mounts", {})
    mounts.update({TOKEN_MOUNT: str(ensure_token(folder)), VERSIONS_MOUNT: str(versions)})
    config["provider"][HEAD_FILES] = []
    if key_file is not None:
        mounts[key_mount] = str(key_file)
        config["provider"][HEAD_FILES].append(key_mount)


def add_notify(config: dict[str, Any], folder: Path, settings: NotifySettings) -> None:
    """Take command and webhook out of ``config``, which Ray logs, and mount them on the head as a file."""
    provider, file = config["provider"], folder / "notify.json"
    provider.pop("notify", None)
    if not settings.is_set:
        file.unlink(missing_ok=True)
        return
    content = {"command": settings.command}
    if settings.webhook is not None:
        content["webhook"] = settings.webhook.get_secret_value()
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as secret:
        json.dump(content, secret)
    config["file_mounts"][NOTIFY_MOUNT] = provider["notify_file"] = str(file)
    provider[HEAD_FILES].append(NOTIFY_MOUNT)


def without_head_files(config: dict[str, Any]) -> dict[str, Any]:
    """The head's copy of the configuration, from which it sets up workers: without the files that are its own."""
    own = config["provider"].get(HEAD_FILES, [])
    mounts = {remote: local for remote, local in config.get("file_mounts", {}).items() if remote not in own}
    return {**config, "file_mounts": mounts}


def head_provider(provider: dict[str, Any]) -> dict[str, Any]:
    """What of the provider section is different on the head: where its own files are."""
    return {"notify_file": NOTIFY_MOUNT} if provider.get("notify_file") else {}


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
