"""The `provider:` section of cluster.yaml and the `node_config:` of each node type, validated.

Ray hands both over as plain dicts: `ClusterSettings.from_provider` and `NodeSettings.model_validate` read them, an
unknown key is an error. Prices are in US dollars, sizes in GB (10^9 bytes), waits in seconds unless the name says
otherwise.
"""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    model_validator,
)

from cluster.errors import ClusterSettingsError

RAY_KEYS = frozenset(
    {"type", "module", "use_internal_ips", "use_external_head_ip", "disable_node_updaters"}
    | {"disable_launch_config_check", "foreground_node_launch", "worker_liveness_check"}
)
"""Keys of the provider section that Ray itself reads; keys with a leading underscore are Ray's too."""

MeshKind = Literal["head-only", "star", "direct"]
"""Whom a worker reaches beside the head: nobody, the other workers through the head, or those that it dials itself."""

LauncherPlace = Literal["head", "laptop"]
"""Where workers are rented, watched and given back, and so where an API key has to be."""

CUDA_OF_IMAGE = re.compile(r"cuda-?(\d+\.\d+)")

CLUSTER_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?")
"""The name is part of labels, folders and host-key aliases."""


def checked_cluster_name(name: str) -> str:
    if not CLUSTER_NAME.fullmatch(name):
        raise ClusterSettingsError(
            f"cluster_name {name!r} is part of labels: use up to 24 lower-case letters, digits and inner hyphens"
        )
    return name


def _with_blanks(names: tuple[str, ...]) -> tuple[str, ...]:
    """Vast.ai's command line writes RTX_4090 for what its API calls RTX 4090."""
    return tuple(" ".join(name.replace("_", " ").split()) for name in names)


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError("there is no such home directory; write the path in full") from error


UserPath = Annotated[Path, AfterValidator(_expanded)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True
    )


class BudgetSettings(Section):
    max_price_per_hour: PositiveFloat = 5.0
    """What all machines of the cluster together may cost per hour; no machine is rented that would pass it."""

    max_total_cost: PositiveFloat = 50.0
    """What the cluster may cost from its first machine on. Shortly before it is spent jobs are told to stop, and when
    it is spent every worker is destroyed. The head stays, because it may hold runs that are not fetched, and costs."""

    max_hours: PositiveFloat | None = None
    """The same after so many hours from the head's beginning; `bruno-ray cluster up --max-hours` comes before it."""

    credit_must_cover: bool = True
    """Whether `bruno-ray cluster up` refuses a plan that the account's credit does not cover; false where Vast.ai
    charges a card when the credit is low."""


def _web_address(url: SecretStr) -> SecretStr:
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url.get_secret_value()):
        raise ValueError("a webhook is an address that begins with https:// or http://")
    return url


class NotifySettings(Section):
    """Who is told of what happens while nobody looks (docs/cluster.md lists the events)."""

    command: str = ""
    """Run by a shell on the machine that noticed it, the head as a rule; the text comes on standard input."""

    webhook: Annotated[SecretStr, AfterValidator(_web_address)] | None = None
    """Address that gets a POST with JSON, such as an incoming webhook of Slack or Discord. It is a password: `ray up`
    keeps it and the command out of the configuration that Ray logs, in a file of the head."""

    @property
    def is_set(self) -> bool:
        return bool(self.command or self.webhook)


class Requirements(Section):
    """What a machine must be to be rented."""

    gpu_names: Annotated[tuple[str, ...], AfterValidator(_with_blanks)] = ()
    """Names as Vast.ai writes them, such as ["RTX 4090"], or RTX_4090 as its command line does; empty for any."""

    num_gpus: NonNegativeInt | None = None
    """Exactly so many GPUs; None for any number, the head's choice."""

    min_gpu_ram_gb: NonNegativeFloat = 0.0
    """Memory of each GPU."""

    min_cpus: PositiveInt = 1
    """CPUs of the container, not of the host (`cpu_cores_effective`)."""

    min_ram_gb: NonNegativeFloat = 0.0
    """Of the container, which gets of the machine's memory its share of the GPUs. The head needs at least the size of
    the largest model of the cluster and 12 GB more, which is the default there."""

    min_reliability: float = Field(0.98, ge=0, le=1)
    """The host's share of time up, as Vast.ai measures it (`reliability2`)."""

    verified: bool = True
    """Only hosts that Vast.ai has verified."""

    max_price_per_hour: PositiveFloat | None = None
    """Of one machine with its disk. For interruptible machines the cap of the bid."""

    interruptible: bool = False
    """Bid for the machine instead of renting it: cheaper, and gone when somebody bids more."""

    bid_margin: NonNegativeFloat = 0.2
    """How far above the lowest accepted bid to go, as a fraction of it."""

    locations: tuple[str, ...] = ()
    """Two-letter country codes such as ["DE", "NL"]; empty for any."""

    min_cuda: NonNegativeFloat = 0.0
    """The newest CUDA version that the host's driver supports must be at least this one, and that of the image's tag
    in any case."""

    min_download_mbps: NonNegativeFloat = 200.0
    """Models are downloaded once per machine; a slow line is paid for in GPU-hours."""

    max_traffic_price_per_gb: NonNegativeFloat = 0.02
    """Dollars that the host takes per GB in or out, on top of the price per hour."""

    min_duration_h: NonNegativeFloat = 24.0
    """The host must let the machine for at least so many hours; afterwards it stops, with all that is on it."""


class NodeSettings(Section):
    """The `node_config:` of one node type."""

    image: str = "vastai/base-image:cuda-12.8.1-auto"
    """Docker image. It needs bash, sshd and rsync, which Vast.ai's own images have. Set-up uses an image's torch
    where it is the pinned one for your Python (cluster/scripts/setup_node.sh); any other is only a longer download."""

    requirements: Requirements = Requirements()
    disk_gb: PositiveFloat | None = None
    """Disk to rent. Left out, it follows from the model's size: 2 x size + 20, at least 200 for 32B, 300 for 70B."""

    model: str | None = None
    """Model id on the hub, or a local folder, whose size decides about the disk; resolved by `ray up`."""

    model_size_gb: PositiveFloat | None = None
    """Size of the model where it cannot be looked up."""

    onstart: str = ""
    """Shell commands that run when the machine has booted, before anything else."""

    @property
    def min_cuda(self) -> float:
        """What the requirements say, and what the image's tag implies."""
        found = CUDA_OF_IMAGE.search(self.image)
        return max(self.requirements.min_cuda, float(found.group(1)) if found else 0.0)

    @model_validator(mode="after")
    def _one_source_of_the_disk(self) -> "NodeSettings":
        if self.model and self.model_size_gb:
            raise ValueError("give model or model_size_gb, not both")
        return self

    @classmethod
    def from_config(cls, node_config: dict[str, Any]) -> "NodeSettings":
        """Raises `ClusterSettingsError` naming the key."""
        return _validated(cls, node_config, "node_config")


class ClusterSettings(Section):
    """The `provider:` section of cluster.yaml without the keys that are Ray's."""

    vast_url: str = "https://console.vast.ai"
    """Base URL of the API. The environment variable VAST_URL, read by `ray up`, comes before it."""

    api_key_file: UserPath = Path("~/.bruno-ray/vast_api_key")
    """File with the API key. On the head the same path holds the key of `head_api_key_file`."""

    head_api_key_file: UserPath = Path("~/.bruno-ray/vast_api_key_head")
    """File on the laptop with the restricted key that `ray up` copies to the head, and to the head only."""

    head_files: tuple[str, ...] = ()
    """Mounts that are for the head only; filled in by `ray up`."""

    state_folder: UserPath = Path("~/.bruno-ray/clusters")
    """Holds a folder per cluster with its key pair, known hosts and ledger."""

    budget: BudgetSettings = BudgetSettings()
    notify: NotifySettings = NotifySettings()
    notify_file: UserPath | None = None
    """Where `notify` is instead; filled in by `ray up`."""

    launcher: LauncherPlace = "head"
    """head: the autoscaler runs on the head, with a restricted key, and the cluster lives while this computer is off.
    laptop: it runs on the machine where `bruno-ray cluster up` was called, and the head has no key; without that
    machine workers end themselves after `dead_mans_switch_s` (cluster/launcher.py)."""

    mesh: MeshKind = "head-only"
    """head-only: workers reach the head and no other worker. star: they reach each other through the head. direct: they
    also dial each other (cluster/network/mesh.py)."""

    max_cpus: PositiveInt = 48
    """The most CPUs any node offers to Ray; decides how many nodes fit (cluster/network/addresses.py)."""

    refresh_s: PositiveFloat = 5.0
    """How long one listing of the instances answers all questions of all processes of a machine."""

    boot_timeout_s: PositiveFloat = 900.0
    """A machine that is not running so long after it was rented is destroyed, avoided and replaced."""

    join_timeout_s: PositiveFloat = 900.0
    """A running machine that has not been set up so long after it booted is destroyed, avoided and replaced."""

    avoid_machine_s: PositiveFloat = 6 * 3600.0
    """A machine that failed to boot or join is not rented again for so long."""

    index_rest_s: PositiveFloat = 300.0
    """An index, and with it alias and ports, is not given to another machine for so long."""

    dead_mans_switch_s: PositiveFloat = 1800.0
    """A worker that has had no sign of its head for so long destroys itself."""

    allowed_ports: tuple[str, ...] = ("22/tcp",)
    """What the internet may reach on a machine. One that publishes more, as images that EXPOSE ports do, is destroyed:
    some of Ray's services listen on all interfaces."""

    role: Literal["laptop", "head", "launcher"] = "laptop"
    """Who reads this: `ray up` sets it to head in the copy for the head, `up` to launcher in that for the launcher."""

    public_key: str = ""
    """The cluster's ssh public key; filled in by `ray up`."""

    @classmethod
    def from_provider(cls, provider: dict[str, Any]) -> "ClusterSettings":
        """From the dict Ray hands over. Raises `ClusterSettingsError` naming the key."""
        ours = {key: value for key, value in provider.items() if key not in RAY_KEYS and not key.startswith("_")}
        return _validated(cls, ours, "provider")

    @model_validator(mode="before")
    @classmethod
    def _url_of_the_environment(cls, values: Any) -> Any:
        url = os.environ.get("VAST_URL")
        return {**values, "vast_url": url} if url else values

    @property
    def looks_after_workers(self) -> bool:
        """Whether this is the process that destroys workers which are no use, and keeps to the limits."""
        return self.role != "laptop"

    def folder(self, cluster_name: str) -> Path:
        """The folder of one cluster, made on demand by whoever writes to it."""
        return self.state_folder / checked_cluster_name(cluster_name)

    def who_to_notify(self) -> NotifySettings:
        """From `notify_file` where there is one. Raises `ClusterSettingsError` where it cannot be read."""
        if self.notify_file is None:
            return self.notify
        try:
            content = json.loads(self.notify_file.read_text())
        except (OSError, ValueError) as error:
            raise ClusterSettingsError(
                f"{self.notify_file} cannot be read ({type(error).__name__}): nobody is told; run `ray up` again"
            ) from error
        return _validated(NotifySettings, content, "provider.notify")

    def api_key(self) -> str:
        """From the environment variable VAST_API_KEY or the key file; never logged, never an argument of a command.

        Raises `ClusterSettingsError` if there is none.
        """
        if key := os.environ.get("VAST_API_KEY", "").strip():
            return key
        try:
            key = self.api_key_file.read_text().strip()
        except OSError as error:
            raise ClusterSettingsError(
                f"no Vast.ai API key: {self.api_key_file} cannot be read ({error.strerror}); "
                "put the key there (chmod 600) or set VAST_API_KEY"
            ) from error
        if not key:
            raise ClusterSettingsError(f"{self.api_key_file} is empty; put the Vast.ai API key there")
        return key


def _validated(model: type[Section], values: dict[str, Any], section: str) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([section, *(str(part) for part in first["loc"])])
        raise ClusterSettingsError(f"{where}: {first['msg']}; correct it in cluster.yaml") from error
