"""Where each node of the cluster is found: a loopback alias and a block of ports, both functions of its index.

Rented machines are containers behind NAT, all with the same private address, so a node is known by an alias in
127.77.0.0/16 that every node can bind on its own loopback interface. Some of Ray's services listen on all
interfaces, so a port may mean only one node: node ``i`` owns the ports

    FIRST_PORT + i * block_size  ...  FIRST_PORT + (i + 1) * block_size - 1

and the tunnels carry exactly those. All ports lie below 32768, where Linux begins to hand out ephemeral ports.
The size of a block follows from ``max_cpus``, the most CPUs any node of the cluster offers to Ray, because Ray
keeps up to two worker processes per CPU; a list that is too short leaves actors pending for ever without an error.
The number of nodes that fit is therefore limited by the ports, to 152 with the default of 48 CPUs. Where workers are to
reach each other it is limited as well by what a worker's sshd listens on for all other nodes in one connection, to 111
(`max_nodes`).
"""

from dataclasses import dataclass

from cluster.errors import ClusterSettingsError
from cluster.settings import MeshKind

FIRST_PORT = 12000
"""Start of node 0's block; above Ray's fixed ports and the usual services of machine images."""

END_PORT = 32768
"""First ephemeral port of Linux (net.ipv4.ip_local_port_range): a block that reaches it loses ports at random."""

SPARE_WORKERS = 32
"""Worker processes beyond two per CPU: drivers, job supervisors, the actors of Serve and of the study."""

NAMED_PORTS = 8
"""Ports at the start of a block that belong to services; two of them are unused."""

GCS_PORT = 6379
DASHBOARD_PORT = 8265
CLIENT_PORT = 10001
HEAD_PORTS = (GCS_PORT, DASHBOARD_PORT, CLIENT_PORT)
"""Fixed ports of the head, beside its block: they keep Ray's documented defaults."""

MAX_ALIASES = 254 * 254

MAX_LISTENERS = 15_000
"""Ports that one ssh connection listens on. OpenSSH ends a connection with more than 16384 channels ("channels_alloc
too big"), and each listener is one, as is each stream that runs through it."""


def block_size(max_cpus: int) -> int:
    """Ports in one node's block."""
    return NAMED_PORTS + 2 * max_cpus + SPARE_WORKERS


def max_addresses(max_cpus: int) -> int:
    """How many blocks of ports fit below `END_PORT`, the head's included, when no node has more than `max_cpus`."""
    return min((END_PORT - FIRST_PORT) // block_size(max_cpus), MAX_ALIASES)


def max_nodes(max_cpus: int, mesh: MeshKind) -> int:
    """How many nodes have addresses, the head included, and fit into the connection to a worker, which unless the mesh
    is head-only carries the ports of all nodes but its own."""
    if mesh == "head-only":
        return max_addresses(max_cpus)
    return min(max_addresses(max_cpus), (MAX_LISTENERS - len(HEAD_PORTS)) // block_size(max_cpus) + 1)


@dataclass(frozen=True)
class NodeAddress:
    """Alias and ports of the node with `index`; the head is node 0.

    Raises `ClusterSettingsError` where no such node fits.
    """

    index: int

    max_cpus: int = 48
    """The same on every node of the cluster (`ClusterSettings.max_cpus`), or blocks would overlap."""

    def __post_init__(self) -> None:
        if self.max_cpus < 1:
            raise ClusterSettingsError(f"max_cpus is {self.max_cpus}; give the CPUs of the largest node, at least 1")
        limit = max_addresses(self.max_cpus)
        if not 0 <= self.index < limit:
            raise ClusterSettingsError(
                f"node {self.index} does not fit: {limit} nodes of up to {self.max_cpus} CPUs have ports below"
                f" {END_PORT}; lower max_workers, or provider.max_cpus if none has that many"
            )

    @property
    def alias(self) -> str:
        """127.77.0.1 for the head, up to 127.77.0.254, then 127.77.1.1 and so on (never .0 nor .255)."""
        return f"127.77.{self.index // 254}.{self.index % 254 + 1}"

    @property
    def first_port(self) -> int:
        return FIRST_PORT + self.index * block_size(self.max_cpus)

    @property
    def node_manager_port(self) -> int:
        return self.first_port

    @property
    def object_manager_port(self) -> int:
        return self.first_port + 1

    @property
    def dashboard_agent_listen_port(self) -> int:
        return self.first_port + 2

    @property
    def dashboard_agent_grpc_port(self) -> int:
        return self.first_port + 3

    @property
    def runtime_env_agent_port(self) -> int:
        return self.first_port + 4

    @property
    def metrics_export_port(self) -> int:
        return self.first_port + 5

    @property
    def worker_ports(self) -> range:
        """One port per worker process; the length is the cap on worker processes of the node."""
        return range(self.first_port + NAMED_PORTS, self.first_port + block_size(self.max_cpus))

    @property
    def ports(self) -> tuple[int, ...]:
        """Every port that the tunnels carry to this node."""
        services = range(self.first_port, self.first_port + NAMED_PORTS - 2)
        return (*(HEAD_PORTS if self.index == 0 else ()), *services, *self.worker_ports)
