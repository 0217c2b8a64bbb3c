"""Starts Ray on a node of the cluster: the one place for the flags and limits that the tunnels need.

    python -m cluster.setup.ray_start head|worker [MORE OPTIONS OF ray start]

Which node this is comes in the environment, from the provider's command runner: CLUSTER_NODE_INDEX and
CLUSTER_MAX_CPUS. Options for one machine, such as the size of its object store, may stand in
BRUNO_RAY_START_OPTIONS. Flags were tried with Ray 2.60.
"""

import argparse
import logging
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from cluster.errors import ClusterSettingsError, NodeError
from cluster.network.addresses import CLIENT_PORT, DASHBOARD_PORT, GCS_PORT, NodeAddress

logger = logging.getLogger(__name__)

INDEX_VARIABLE = "CLUSTER_NODE_INDEX"
MAX_CPUS_VARIABLE = "CLUSTER_MAX_CPUS"
ATTEMPTS = 3
RAYS_PATIENCE_S = 30.0
"""How long `ray start` waits for the processes that it has started. What fails sooner fails for another reason."""

OPTIONS_VARIABLE = "BRUNO_RAY_START_OPTIONS"
CONFIG_OPTION = "--autoscaling-config="

TUNNEL_TIMEOUT_S = 180.0
"""How long a worker waits for the supervisor to bring it the head's ports; then its start fails and the autoscaler
replaces it."""

HEALTH_CHECK_PERIOD_MS = 3000
HEALTH_CHECK_FAILURES = 20
"""A node is dead after so many failures in a row. In a cut, ssh ends the connection after 9 to 12 s, and from then on
every check fails at once: about 70 s in all, so a cut of 45 s passes, and a machine that is gone is noticed within two
minutes. With Ray's own limits a cut of 15 s kills a node, and a second later the autoscaler buys another."""
GCS_RECONNECT_S = 300
"""A raylet that has lost the head waits so long for it before it gives up itself."""

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_health_check_period_ms": str(HEALTH_CHECK_PERIOD_MS),
    "RAY_health_check_failure_threshold": str(HEALTH_CHECK_FAILURES),
    "RAY_gcs_rpc_server_reconnect_timeout_s": str(GCS_RECONNECT_S),
    # An object that two nodes have is fetched from either, by chance. In `mesh: head-only` one of them may be a worker,
    # which cannot be reached, and the next try comes after 10, 20, 40 ... s. So what calls and actors are given travels
    # with them up to 8 MB, not 100 KB, and the waits begin with 2 s.
    "RAY_max_direct_call_object_size": str(8 * 1024**2),
    "RAY_object_manager_pull_timeout_ms": "2000",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A job that is cancelled gives back what it holds before it is killed: a server its replicas, with their GPUs.
    "RAY_JOB_STOP_WAIT_TIME_S": "30",
}
"""For every process of Ray on every node."""


def address_here(environment: Mapping[str, str]) -> NodeAddress:
    """The address of this node. Raises `ClusterSettingsError` when the command runner has not said which it is."""
    try:
        return NodeAddress(int(environment[INDEX_VARIABLE]), int(environment[MAX_CPUS_VARIABLE]))
    except (KeyError, ValueError) as error:
        raise ClusterSettingsError(
            f"{INDEX_VARIABLE} and {MAX_CPUS_VARIABLE} must be numbers in the environment ({error}); "
            "start Ray through `ray up` with this project's provider"
        ) from error


def command_line(here: NodeAddress, more: Sequence[str] = ()) -> list[str]:
    """`ray start` for a node: it is known by its alias and uses the ports of its block only."""
    head = NodeAddress(0, here.max_cpus)
    if here.index == 0:
        # The dashboard binds every interface because `ray dashboard` forwards to "localhost" on the head: behind the
        # machine's NAT no interface of it can be reached from outside, and it asks for the token.
        place = ["--head", f"--port={GCS_PORT}", f"--ray-client-server-port={CLIENT_PORT}"]
        place += ["--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD_PORT}"]
    else:
        place = [f"--address={head.alias}:{GCS_PORT}"]
    return [
        *("ray", "start", *place),
        f"--node-ip-address={here.alias}",
        f"--node-manager-port={here.node_manager_port}",
        f"--object-manager-port={here.object_manager_port}",
        f"--dashboard-agent-listen-port={here.dashboard_agent_listen_port}",
        f"--dashboard-agent-grpc-port={here.dashboard_agent_grpc_port}",
        f"--runtime-env-agent-port={here.runtime_env_agent_port}",
        f"--metrics-export-port={here.metrics_export_port}",
        f"--worker-port-list={','.join(str(port) for port in here.worker_ports)}",
        "--disable-usage-stats",
        *more,
    ]


def without_autoscaler(more: Sequence[str]) -> list[str]:
    """The head's options; where its configuration says that a launcher elsewhere launches workers, none of Ray's own
    autoscaler, which would need a key."""
    for option in more:
        if option.startswith(CONFIG_OPTION):
            config = yaml.safe_load(Path(option.removeprefix(CONFIG_OPTION)).expanduser().read_text())
            if config["provider"].get("launcher") == "laptop":
                return [*(other for other in more if other != option), "--no-monitor"]
    return list(more)


def wait_for_head(here: NodeAddress, timeout_s: float = TUNNEL_TIMEOUT_S) -> None:
    """Return when the head's ports listen on this worker. Raises `NodeError` when the supervisor does not come."""
    head = NodeAddress(0, here.max_cpus)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((head.alias, GCS_PORT), 2).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise NodeError(
                    f"the tunnel to the head has not come within {timeout_s:.0f} s ({error}); on the head, look at "
                    "`python -m cluster.supervisor status` and ~/.bruno-ray/mesh/supervisor.log"
                ) from error
        time.sleep(0.3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["head", "worker"])
    options, more = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        here = address_here(os.environ)
        if (here.index == 0) != (options.role == "head"):
            raise ClusterSettingsError(
                f"node {here.index} cannot be started as {options.role}; only node 0 is the head"
            )
        if here.index:
            wait_for_head(here)
        else:
            more = without_autoscaler(more)
    except (ClusterSettingsError, NodeError) as error:
        logger.error("%s", error)
        return 2
    more += shlex.split(os.environ.get(OPTIONS_VARIABLE, ""))
    return start(command_line(here, more))


def start(command: Sequence[str]) -> int:
    """Run `ray start`; its exit code. Ray gives its own processes 30 s, which a slow machine needs more than once."""
    environment = {**os.environ, **ENVIRONMENT}
    for left in reversed(range(ATTEMPTS)):
        began = time.monotonic()
        code = subprocess.run(command, env=environment).returncode
        if code == 0 or not left or time.monotonic() - began < RAYS_PATIENCE_S:
            break
        logger.warning("ray start ended with %d after %.0f s: trying again", code, time.monotonic() - began)
        subprocess.run([command[0], "stop", "--force"], env=environment)
    return code


if __name__ == "__main__":
    sys.exit(main())
