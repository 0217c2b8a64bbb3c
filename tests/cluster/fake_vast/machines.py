"""What may stand behind an imitated instance."""

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class SshEndpoint:
    """Where the internet reaches a machine's sshd."""

    host: str
    port: int


@dataclass(frozen=True)
class MachineOrder:
    """What a machine is told when it boots, as Docker would be."""

    instance_id: int
    image: str
    onstart: str
    """Shell commands; they put the cluster's public key into ~/.ssh/authorized_keys."""
    env: dict[str, str] = field(default_factory=dict)
    ssh_keys: tuple[str, ...] = ()
    """Keys of the account, put into ~/.ssh/authorized_keys before `onstart` runs."""


class Machine(Protocol):
    """One container. Both methods may be called from any thread, each once; `stop` may come during `start`."""

    def start(self, order: MachineOrder) -> SshEndpoint:
        """Boot, run `onstart`, start sshd; returns when sshd answers (or would, for a machine that is broken)."""
        ...

    def attach_key(self, public_key: str) -> None:
        """Let one more key in."""
        ...

    def stop(self) -> None:
        """Gone, with everything in it, when this returns."""
        ...
