"""Imitated rented machines: network-namespace containers, each behind its own NAT, reachable only by sshd.

    internet (10.99.0.0/24, a bridge in the namespace "wan"; 10.99.0.1 is the laptop and the API server)
       |               |
    router 1        router 2        DNAT of one port to 172.17.0.2:22, masquerade, everything else dropped
       |               |
    container 1     container 2     172.17.0.2 each; own root, /tmp, /dev/shm, pids; Docker's default capabilities

A container's root is assembled from the host's ``/usr`` and ``/etc``, read-only; the Python installation and the
checkout are shared read-only, so nothing is installed. Nothing else of the host's files is visible.
"""

from tests.cluster.lab.container import Container
from tests.cluster.lab.lab import Lab
from tests.cluster.lab.namespaces import missing_for_lab, sweep

__all__ = ["Container", "Lab", "missing_for_lab", "sweep"]
