"""Ray's ssh command runner for machines whose sshd has a port of its own and, failing that, a proxy."""

import logging
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from bruno_ray.ray_internals import ssh_command_runner
from cluster.errors import NodeError
from cluster.network.addresses import NodeAddress
from cluster.network.keys import KNOWN_HOSTS_NAME, host_key_alias
from cluster.network.probe import runs_commands
from cluster.network.ssh_master import Endpoint, SshIdentity

logger = logging.getLogger(__name__)


class NodeDirectory(Protocol):
    """What the runner asks about nodes; the node provider is one."""

    folder: Path
    """Holds the host keys that were met."""

    def is_stopped(self, node_id: str) -> bool: ...

    def is_terminated(self, node_id: str) -> bool: ...

    def ssh_endpoints(self, node_id: str) -> tuple[Endpoint, ...]:
        """Where its sshd may answer, best first; empty while it boots and when it is gone."""
        ...

    def address(self, node_id: str) -> NodeAddress: ...


class VastCommandRunner(ssh_command_runner()):
    """Runs commands and rsync on one node. Every command finds out on which node it runs from

    CLUSTER_NAME, CLUSTER_NODE_INDEX, CLUSTER_NODE_ADDRESS (the loopback alias) and CLUSTER_MAX_CPUS.
    """

    provider: NodeDirectory

    def __init__(
        self,
        log_prefix: str,
        node_id: str,
        provider: NodeDirectory,
        auth_config: dict[str, Any],
        cluster_name: str,
        process_runner: ModuleType,
        use_internal_ip: bool,
    ) -> None:
        super().__init__(log_prefix, node_id, provider, auth_config, cluster_name, process_runner, use_internal_ip)
        self.ssh_options.arg_dict.update(
            StrictHostKeyChecking="accept-new",
            UserKnownHostsFile=str(provider.folder / KNOWN_HOSTS_NAME),
            GlobalKnownHostsFile="/dev/null",
            HostKeyAlias=host_key_alias(node_id),
            LogLevel="ERROR",
        )
        self._identity = SshIdentity(Path(auth_config["ssh_private_key"]), provider.folder / KNOWN_HOSTS_NAME)

    def _get_node_ip(self) -> str | None:
        """The first endpoint that runs commands; None while none does, and Ray asks again for a quarter of an hour.

        Raises `NodeError` for a machine that is stopped, so that `ray down` does not wait for it, and for one that is
        gone.
        """
        if self.provider.is_terminated(self.node_id):
            raise NodeError(f"instance {self.node_id} is gone, its log says why; another is rented when you try again")
        if self.provider.is_stopped(self.node_id):
            raise NodeError(f"instance {self.node_id} is stopped: `bruno-ray cluster up` starts it again")
        for endpoint in self.provider.ssh_endpoints(self.node_id):
            if runs_commands(endpoint, self._identity, host_key_alias(self.node_id)):
                self.ssh_options.arg_dict["Port"] = endpoint.port
                return endpoint.host
        return None

    def run(self, cmd: str | None = None, *args: Any, **options: Any) -> str:
        # Ray repeats the key here to have options of its own, which would lack port and known hosts.
        options.pop("ssh_options_override_ssh_key", None)
        return super().run(self._with_identity(cmd) if cmd else cmd, *args, **options)

    def remote_shell_command_str(self) -> str:
        target = self._get_ssh_target()
        words = ["ssh", *self.ssh_options.to_ssh_options_list(timeout=60), f"{self.ssh_user}@{target}"]
        return shlex.join(words) + "\n"

    def _with_identity(self, command: str) -> str:
        address = self.provider.address(self.node_id)
        variables = {
            "CLUSTER_NAME": self.cluster_name,
            "CLUSTER_NODE_INDEX": address.index,
            "CLUSTER_NODE_ADDRESS": address.alias,
            "CLUSTER_MAX_CPUS": address.max_cpus,
        }
        exports = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in variables.items())
        return f"export {exports}; {command}"
