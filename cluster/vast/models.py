"""What goes over the wire, typed. Unknown fields are ignored and most may be null, because the API is not versioned.

Prices are in dollars per hour, memory of GPUs and CPUs in MB, disk in GB, bandwidth in Mbit/s, times in Unix seconds.
"""

from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from cluster.network.ssh_master import Endpoint


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _number(value: Any) -> float:
    return 0.0 if value is None else float(value)


def _environment(value: Any) -> dict[str, str]:
    """A list of pairs when read, a dict when written; null where there is none."""
    pairs = value.items() if isinstance(value, dict) else value or []
    return {str(name): str(content) for name, content in pairs}


def _ports(value: Any) -> dict[str, list[dict[str, Any]]]:
    return {name: bindings or [] for name, bindings in (value or {}).items()}


Text = Annotated[str, BeforeValidator(_text)]
Number = Annotated[float, BeforeValidator(_number)]
Environment = Annotated[dict[str, str], BeforeValidator(_environment)]
Ports = Annotated[dict[str, list[dict[str, Any]]], BeforeValidator(_ports)]


class WireModel(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class State(Enum):
    """What an instance means to the cluster, from `actual_status` and `intended_status`."""

    BOOTING = "booting"
    RUNNING = "running"
    UNREACHABLE = "unreachable"
    """The host sends no heartbeat; it may come back."""
    STOPPED = "stopped"
    """Outbid, exited or stopped by hand: its disk is still billed."""


class Offer(WireModel):
    """A machine, or a part of one, that can be rented now."""

    id: int
    machine_id: int
    gpu_name: Text = ""
    num_gpus: int = 0
    gpu_ram: Number = 0.0
    """MB of each GPU."""
    cpu_cores_effective: Number = 0.0
    cpu_ram: Number = 0.0
    disk_space: Number = 0.0
    dph_total: Number = 0.0
    """With the disk that the search asked for."""
    min_bid: Number = 0.0
    reliability2: Number = 0.0
    verification: Text = ""
    """"verified", "unverified" or "deverified"."""
    verified: bool | None = None
    """Older answers have this instead of `verification`."""
    geolocation: Text = ""
    """"Region, CC"."""
    inet_down: Number = 0.0
    cuda_max_good: Number = 0.0
    direct_port_count: int | None = None
    rentable: bool | None = None

    @property
    def is_verified(self) -> bool:
        return bool(self.verified) or self.verification == "verified"

    @property
    def country(self) -> str:
        return self.geolocation.rsplit(",", 1)[-1].strip().upper()


class Instance(WireModel):
    """A rented machine; `id` is the contract's number."""

    id: int
    machine_id: int = 0
    actual_status: Text = ""
    intended_status: Text = ""
    label: Text = ""
    extra_env: Environment = {}
    public_ipaddr: Text = ""
    ports: Ports = {}
    ssh_host: Text = ""
    ssh_port: int | None = None
    dph_total: Number = 0.0
    start_date: Number = 0.0
    disk_space: Number = 0.0
    gpu_name: Text = ""
    num_gpus: int | None = None
    gpu_ram: Number = 0.0
    gpu_util: float | None = None
    """Per cent, as the host last reported."""
    status_msg: Text = ""
    geolocation: Text = ""
    is_bid: bool | None = None

    @property
    def state(self) -> State:
        if self.intended_status in ("stopped", "frozen") or self.actual_status in ("stopped", "exited", "frozen"):
            return State.STOPPED
        if self.actual_status in ("unknown", "offline"):
            return State.UNREACHABLE
        return State.RUNNING if self.actual_status == "running" else State.BOOTING

    @property
    def ssh_endpoints(self) -> tuple[Endpoint, ...]:
        """The machine's own address first, then Vast.ai's proxy; empty while neither is known."""
        found = []
        for binding in self.ports.get("22/tcp", [])[:1]:
            if self.public_ipaddr and binding.get("HostPort"):
                found.append(Endpoint(self.public_ipaddr, int(binding["HostPort"])))
        if self.ssh_host and self.ssh_port:
            found.append(Endpoint(self.ssh_host, self.ssh_port))
        return tuple(found)


class CreateRequest(WireModel):
    """The body of a creation. It holds no secret: `env` and `label` are shown to the host and in the console."""

    image: str
    disk: float
    """GB."""
    label: str
    env: dict[str, str]
    onstart: str
    price: float | None = None
    """The bid in dollars per hour; None rents on demand."""
    client_id: str = "me"
    runtype: str = "ssh_direc ssh_proxy"
    """sshd reachable directly and through the proxy; nothing else is published."""
    cancel_unavail: bool = True
    """Fail rather than wait in a stopped state for a machine that is not free."""
