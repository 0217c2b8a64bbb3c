"""What goes over the wire, typed. Unknown fields are ignored and most may be null, because the API is not versioned.

Prices are in dollars per hour, memory of GPUs and CPUs in MB, disk in GB, bandwidth in Mbit/s, times in Unix seconds.
"""

from enum import Enum
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from cluster.network.ssh_master import Endpoint


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _number(value: Any) -> float:
    return 0.0 if value is None else float(value)


def _count(value: Any) -> Any:
    return 0 if value is None else value


def _environment(value: Any) -> dict[str, str]:
    """A list of pairs when read, a dict when written; null where there is none. What is no pair is left out."""
    pairs = value.items() if isinstance(value, dict) else value if isinstance(value, list) else []
    return {str(pair[0]): str(pair[1]) for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2}


def _ports(value: Any) -> dict[str, list[dict[str, Any]]]:
    return {name: bindings or [] for name, bindings in value.items()} if isinstance(value, dict) else {}


Text = Annotated[str, BeforeValidator(_text)]
Number = Annotated[float, BeforeValidator(_number)]
Count = Annotated[int, BeforeValidator(_count)]
Environment = Annotated[dict[str, str], BeforeValidator(_environment)]
Ports = Annotated[dict[str, list[dict[str, Any]]], BeforeValidator(_ports)]


Row = TypeVar("Row", bound="WireModel")


BOOT_ERRORS = (
    "oci runtime create failed",
    "manifest unknown",
    "manifest for",
    "pull access denied",
    "error response from daemon",
    "no space left on device",
    "failed to create shim",
)
"""Words of `status_msg`, in small letters, after which a container never runs. Others tell how far its image is."""

IMAGE_ERRORS = ("manifest unknown", "manifest for", "pull access denied")
"""Those that every host would say."""


class WireModel(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def of_row(cls: "type[Row]", row: Any) -> "Row":
        """A row of an answer. Raises pydantic's `ValidationError` where it does not say what it is about."""
        return cls.model_validate(row)


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
    machine_id: Count = 0
    """0 where the answer does not say it."""
    gpu_name: Text = ""
    num_gpus: Count = 0
    gpu_ram: Number = 0.0
    """MB of each GPU."""
    gpu_frac: Number = 0.0
    """The offer's share of the machine's GPUs."""
    cpu_cores: Number = 0.0
    """Of the whole machine."""
    cpu_cores_effective: Number = 0.0
    """Of this offer."""
    cpu_ram: Number = 0.0
    """Of the whole machine; see `container_ram`."""
    disk_space: Number = 0.0
    dph_total: Number = 0.0
    """With the disk that the search asked for."""
    min_bid: Number = 0.0
    reliability2: float | None = None
    reliability: float | None = None
    """Some answers have only this one."""
    verification: Text = ""
    """"verified", "unverified" or "deverified"."""
    verified: bool | None = None
    """Older answers have this instead of `verification`."""
    geolocation: Text = ""
    """"Region, CC"."""
    inet_down: Number = 0.0
    inet_down_cost: Number = 0.0
    """Dollars per GB, also of what comes in."""
    inet_up_cost: Number = 0.0
    cuda_max_good: Number = 0.0
    direct_port_count: int | None = None
    """0 for a machine that is reached through Vast.ai's proxy only."""
    duration: float | None = None
    """Seconds for which the host lets it."""
    cpu_arch: Text = ""
    gpu_arch: Text = ""
    rentable: bool | None = None
    rented: bool | None = None

    @property
    def uptime(self) -> float:
        """The host's share of time up."""
        return self.reliability2 if self.reliability2 is not None else self.reliability or 0.0

    @property
    def container_ram(self) -> float:
        """MB that the container gets for sure: of the machine's memory its share of CPUs, which is that of GPUs."""
        if self.cpu_cores > 0 and self.cpu_cores_effective > 0:
            return self.cpu_ram * min(self.cpu_cores_effective / self.cpu_cores, 1.0)
        return self.cpu_ram * min(self.gpu_frac or 1.0, 1.0)

    @property
    def is_verified(self) -> bool:
        return bool(self.verified) or self.verification == "verified"

    @property
    def country(self) -> str:
        return self.geolocation.rsplit(",", 1)[-1].strip().upper()


class Instance(WireModel):
    """A rented machine; `id` is the contract's number."""

    id: int
    machine_id: Count = 0
    actual_status: Text = ""
    intended_status: Text = ""
    label: Text = ""
    extra_env: Environment = {}
    public_ipaddr: Text = ""
    ports: Ports = {}
    ssh_host: Text = ""
    ssh_port: int | None = None
    dph_total: Number = 0.0
    """With its disk; of a stopped machine perhaps of its disk alone."""
    storage_total_cost: float | None = None
    """Dollars per hour for its disk, whatever it does."""
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
    end_date: float | None = None
    """When the contract ends."""
    inet_up_cost: Number = 0.0
    """Dollars per GB."""
    inet_down_cost: Number = 0.0
    unreadable: tuple[str, ...] = ()
    """Fields of the row that hold what they should not, and count as not given."""

    @classmethod
    def of_row(cls: "type[Row]", row: Any) -> "Row":
        """A row with its number is an instance, whatever else is wrong with it: it may be ours, and cost money."""
        try:
            return cls.model_validate(row)
        except ValidationError as error:
            wrong = {str(problem["loc"][0]) for problem in error.errors() if problem["loc"]}
            if not isinstance(row, dict) or "id" in wrong or not wrong:
                raise
            readable = {name: value for name, value in row.items() if name not in wrong}
            return cls.model_validate({**readable, "unreadable": sorted(wrong)})

    @property
    def state(self) -> State:
        if self.intended_status in ("stopped", "frozen") or self.actual_status in ("stopped", "exited", "frozen"):
            return State.STOPPED
        if self.actual_status in ("unknown", "offline"):
            return State.UNREACHABLE
        return State.RUNNING if self.actual_status == "running" else State.BOOTING

    @property
    def boot_error(self) -> str:
        """Why it will never run, if it has not run yet; empty where nothing says so."""
        said = self.status_msg.lower()
        if self.actual_status != "running" and any(words in said for words in BOOT_ERRORS):
            return f"its host says {self.status_msg[:200]!r}"
        if self.actual_status in ("exited", "offline", "unknown"):
            return f"its host reports it as {self.actual_status}"
        return ""

    @property
    def is_image_error(self) -> bool:
        """Whether `boot_error` would come on every host."""
        return any(words in self.status_msg.lower() for words in IMAGE_ERRORS)

    @property
    def published_ports(self) -> frozenset[str]:
        """Ports that the internet reaches, such as "22/tcp"."""
        return frozenset(name for name, bindings in self.ports.items() if bindings)

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
