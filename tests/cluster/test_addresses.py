"""Aliases and port blocks are disjoint, below the ephemeral range, and large enough for Ray's workers."""

import ipaddress

import pytest

from cluster.errors import ClusterSettingsError
from cluster.network.addresses import END_PORT, FIRST_PORT, HEAD_PORTS, NodeAddress, max_addresses, max_nodes


@pytest.mark.parametrize("max_cpus", [1, 2, 48, 256])
def test_no_port_means_two_nodes(max_cpus: int) -> None:
    nodes = [NodeAddress(index, max_cpus) for index in range(max_addresses(max_cpus))]
    ports = [port for node in nodes for port in node.ports]
    assert len(ports) == len(set(ports))
    assert max(ports) < END_PORT
    assert min(ports[len(HEAD_PORTS) :]) >= FIRST_PORT
    assert len({node.alias for node in nodes}) == len(nodes)


@pytest.mark.parametrize("max_cpus", [1, 16, 256])
def test_a_block_has_two_worker_ports_per_cpu_and_thirty_two_to_spare(max_cpus: int) -> None:
    assert len(NodeAddress(1, max_cpus).worker_ports) >= 2 * max_cpus + 32


def test_services_have_ports_of_their_own_inside_the_tunnelled_ones() -> None:
    node = NodeAddress(3, 8)
    services = [
        node.node_manager_port,
        node.object_manager_port,
        node.dashboard_agent_listen_port,
        node.dashboard_agent_grpc_port,
        node.runtime_env_agent_port,
        node.metrics_export_port,
    ]
    assert len(set(services)) == 6
    assert not set(services) & set(node.worker_ports)
    assert {*services, *node.worker_ports} == set(node.ports)


def test_aliases_are_loopback_hosts_beyond_the_254th_node_too() -> None:
    assert NodeAddress(0).alias == "127.77.0.1"
    assert NodeAddress(253, 1).alias == "127.77.0.254"
    assert NodeAddress(254, 1).alias == "127.77.1.1"
    assert ipaddress.ip_address(NodeAddress(254, 1).alias).is_loopback


def test_the_documented_limits_hold() -> None:
    limits = [(max_nodes(max_cpus, "head-only"), max_nodes(max_cpus, "star")) for max_cpus in (8, 16, 32, 48, 256)]
    assert limits == [(370, 268), (288, 209), (199, 145), (152, 111), (37, 28)]
    assert max_nodes(48, "direct") == max_nodes(48, "star"), "the star may have to stand in for every direct link"


@pytest.mark.parametrize("max_cpus", [1, 8, 16, 32, 48, 64, 128, 256])
def test_what_a_worker_listens_on_fits_into_one_ssh_connection(max_cpus: int) -> None:
    """OpenSSH ends a connection with more than 16384 channels; streams that run through it need some of them."""
    addresses = [NodeAddress(index, max_cpus) for index in range(max_nodes(max_cpus, "star"))]
    listened = sum(len(address.ports) for address in addresses[:-1])
    assert listened <= 15_000


@pytest.mark.parametrize(("index", "max_cpus"), [(-1, 8), (max_addresses(256), 256), (0, 0)])
def test_a_node_that_does_not_fit_is_refused(index: int, max_cpus: int) -> None:
    with pytest.raises(ClusterSettingsError, match="max_cpus"):
        NodeAddress(index, max_cpus)
