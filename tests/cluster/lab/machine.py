"""The machine behind an imitated instance: a container of the lab."""

import threading
from collections.abc import Callable

from tests.cluster.fake_vast.machines import MachineOrder, SshEndpoint
from tests.cluster.lab.container import Container
from tests.cluster.lab.lab import Lab


class NamespaceMachine:
    """Implements `tests.cluster.fake_vast.machines.Machine`."""

    def __init__(
        self,
        lab: Lab,
        gateway_ports: str = "clientspecified",
        furnish: Callable[[Container], None] = lambda container: None,
    ) -> None:
        """``furnish`` puts files into it before anybody knows its address."""
        self.container: Container | None = None
        self._lab = lab
        self._gateway_ports = gateway_ports
        self._furnish = furnish
        self._guard = threading.Lock()

    def start(self, order: MachineOrder) -> SshEndpoint:
        with self._guard:
            self.container = self._lab.add(order.ssh_keys, self._gateway_ports, order.env, order.onstart)
            self._furnish(self.container)
            return SshEndpoint(self.container.public_address, self.container.ssh_port)

    def attach_key(self, public_key: str) -> None:
        assert self.container is not None, "a key is attached to a machine that runs"
        with open(self.container.home / ".ssh" / "authorized_keys", "a") as authorized:
            authorized.write(public_key.strip() + "\n")

    def stop(self) -> None:
        with self._guard:
            if self.container is not None:
                self._lab.remove(self.container)
