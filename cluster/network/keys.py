"""The ssh key pair of a cluster and the host keys it has met, in the cluster's folder.

Ray copies the private key to the rented head, whose host can read it, so every cluster has a pair of its own and the
user's key is never used. Host keys are pinned at first contact under an alias made of the contract's number, because
addresses and ports of rented machines come back with other machines behind them.
"""

import contextlib
import os
import subprocess
from pathlib import Path

from filelock import FileLock

from cluster.errors import ClusterSettingsError

KEY_NAME = "id_ed25519"
KNOWN_HOSTS_NAME = "known_hosts"


def ensure_folder(folder: Path) -> None:
    """Make a cluster's folder, for its user alone. Raises `ClusterSettingsError` where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        reason = None if os.access(folder, os.W_OK) else "no permission to write there"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise ClusterSettingsError(
            f"{folder} cannot be used for keys and ledger ({reason}): set provider.state_folder in cluster.yaml to a"
            " folder that can be written"
        )


def ensure_key_pair(folder: Path, cluster_name: str) -> Path:
    """Path of the private key, generated where there is none.

    Raises `ClusterSettingsError` without ssh-keygen, and where the folder cannot be made.
    """
    ensure_folder(folder)
    key = folder / KEY_NAME
    with FileLock(folder / "keys.lock"):
        if not (key.exists() and public_key_file(key).exists()):
            with contextlib.suppress(FileNotFoundError):
                key.unlink()
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"bruno-ray-{cluster_name}", "-f", str(key)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", "") or error
                raise ClusterSettingsError(f"no key pair in {folder}: {reason}; is OpenSSH installed?") from error
        os.chmod(key, 0o600)
    return key


def public_key_file(private_key: Path) -> Path:
    return private_key.with_name(private_key.name + ".pub")


def public_key(private_key: Path) -> str:
    """The line for authorized_keys."""
    return public_key_file(private_key).read_text().strip()


def host_key_alias(node_id: str) -> str:
    """The name under which a node's host key is pinned, the same for its own address and for the proxy."""
    return f"bruno-ray-{node_id}"


def authorize_command(key: str) -> str:
    """Shell commands, for the machine's first start, that let the cluster's key in. Safe to run again."""
    return (
        "mkdir -p ~/.ssh && chmod 700 ~/.ssh && touch ~/.ssh/authorized_keys && "
        f"(grep -qxF '{key}' ~/.ssh/authorized_keys || echo '{key}' >> ~/.ssh/authorized_keys); "
        "chmod 600 ~/.ssh/authorized_keys"
    )
