"""A cluster as its user's machine sees it: cluster.yaml, the provider, and a shell on each node."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler.tags import STATUS_UP_TO_DATE

from cluster.errors import ClusterSettingsError, NodeError
from cluster.jobs.shell import Shell
from cluster.network.keys import KEY_NAME, KNOWN_HOSTS_NAME, host_key_alias
from cluster.network.probe import runs_commands
from cluster.network.ssh_master import SshIdentity
from cluster.node_provider import VastNodeProvider
from cluster.renting.tags import ClusterNode
from cluster.settings import ClusterSettings
from cluster.setup.bootstrap import bootstrapped
from cluster.vast.models import State

logger = logging.getLogger(__name__)

WAIT_S = 30.0
"""How long a node that is set up may leave a command of its user's without an answer: a dropped connection, or a
machine that computes at its limit."""

PAUSE_S = 1.0
MOST_PATIENCE = 4.0
"""Times the usual time for a login; a machine that is at its limit needs more each time it is asked."""


@dataclass(frozen=True)
class Session:
    """Made with `open`. Asks the API through the provider and changes nothing by itself."""

    config_file: Path
    config: dict[str, Any]
    """cluster.yaml as `ray up` completes it."""

    provider: VastNodeProvider

    @classmethod
    def open(cls, config_file: Path) -> "Session":
        """Raises `ClusterSettingsError` that names what to correct, before anything is asked."""
        config = bootstrapped(read_config(config_file))
        return cls(config_file, config, VastNodeProvider(config["provider"], config["cluster_name"]))

    @property
    def name(self) -> str:
        return self.config["cluster_name"]

    @property
    def settings(self) -> ClusterSettings:
        return self.provider.settings

    @property
    def folder(self) -> Path:
        """Key pair, known hosts and token of the cluster on this machine."""
        return self.provider.folder

    def nodes(self) -> list[ClusterNode]:
        """Everything that carries this cluster's label now, never from memory. Raises `VastError`."""
        nodes = self.provider.cluster_nodes(force=True)
        return sorted(nodes, key=lambda node: (node.label.index, node.id))

    def head(self) -> ClusterNode:
        """Raises `NodeError` when there is none, or it is not set up."""
        heads = [node for node in self.nodes() if node.is_head]
        if not heads:
            raise NodeError(f"cluster {self.name} is not up: start it with `bruno-ray cluster up`")
        if heads[0].instance.state is State.STOPPED:
            raise NodeError(f"head {heads[0].id} is stopped: `bruno-ray cluster up` starts it again")
        if heads[0].label.status != STATUS_UP_TO_DATE:
            raise NodeError(
                f"head {heads[0].id} is {heads[0].label.status}: wait for `bruno-ray cluster up`, or run it again"
            )
        return heads[0]

    def shell(self, node: ClusterNode, wait_s: float | None = None) -> Shell:
        """Commands on a node. Raises `NodeError` when none of its addresses runs any.

        Args:
            wait_s: after which it is not asked again, `WAIT_S` where nothing is given; 0 asks each address once.
        """
        identity = SshIdentity(self.folder / KEY_NAME, self.folder / KNOWN_HOSTS_NAME)
        deadline, patience = time.monotonic() + (WAIT_S if wait_s is None else wait_s), 1.0
        while True:
            for endpoint in node.instance.ssh_endpoints:
                if runs_commands(endpoint, identity, host_key_alias(node.id), patience):
                    return Shell(endpoint, identity, host_key_alias(node.id))
            if time.monotonic() >= deadline:
                break
            logger.info("instance %s does not answer yet: asking again", node.id)
            time.sleep(PAUSE_S)
            patience = min(2 * patience, MOST_PATIENCE)
        tried = ", ".join(str(endpoint) for endpoint in node.instance.ssh_endpoints) or "it has no address yet"
        raise NodeError(f"instance {node.id} does not answer ({tried}): see `bruno-ray cluster status`, try again")

    def head_shell(self, wait_s: float | None = None) -> Shell:
        return self.shell(self.head(), wait_s)

    def token(self) -> str:
        """What Ray's dashboard and job API ask for."""
        return (self.folder / "auth_token").read_text().strip()


def read_config(config_file: Path) -> dict[str, Any]:
    """cluster.yaml as it stands. Raises `ClusterSettingsError`."""
    try:
        config = yaml.safe_load(config_file.read_text())
    except OSError as error:
        raise ClusterSettingsError(
            f"{config_file} cannot be read ({error.strerror}): run this in the checkout, or give --config FILE"
        ) from error
    except yaml.YAMLError as error:
        raise ClusterSettingsError(f"{config_file} is not YAML ({error}): correct it") from error
    missing = [key for key in ("cluster_name", "provider", "available_node_types") if key not in (config or {})]
    if missing:
        raise ClusterSettingsError(f"{config_file} has no {missing[0]}: take the project's cluster.yaml as a model")
    return config
