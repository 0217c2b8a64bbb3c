"""How a node is written on its instance, so that laptop and head read the same from the API.

Ray's tags at creation, the node's index and a mark of the launch are environment variables of the instance and never
change. What changes is the label:

    bruno-ray:CLUSTER:w3:up-to-date                      worker 3, set up
    bruno-ray:CLUSTER:h0:up-to-date:12.34:HASH:HASH      the head, 12.34 dollars spent on machines that are gone
    bruno-ray:CLUSTER:h0:up-to-date::::1.20@T+60p        a head that has cost 1.20 dollars until Unix time T, since when
                                                         it is paused, after other pauses of 60 s; without the p it runs

The label alone decides whose an instance is. Hashes of Ray's runtime and file mounts come last and are left out where
the API refuses the label; they only save Ray from setting a node up again. Vast.ai documents 256 characters for a label
at creation, 1024 later, and 256 for `env`, which may mean each variable: tags that follow from the label are not sent.
"""

import base64
import binascii
import json
import re
from dataclasses import dataclass, field, replace

from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UNINITIALIZED,
    STATUS_UP_TO_DATE,
    STATUS_UPDATE_FAILED,
    TAG_RAY_CLUSTER_NAME,
    TAG_RAY_FILE_MOUNTS_CONTENTS,
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_LAUNCH_REQUEST,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_RUNTIME_CONFIG,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.vast.models import Instance, State

PREFIX = "bruno-ray"
INDEX_VARIABLE = "CLUSTER_NODE_INDEX"
TAGS_VARIABLE = "CLUSTER_NODE_TAGS"
LAUNCH_VARIABLE = "CLUSTER_LAUNCH"
TRAFFIC_VARIABLE = "CLUSTER_TRAFFIC"

HASH_TAGS = (TAG_RAY_RUNTIME_CONFIG, TAG_RAY_FILE_MOUNTS_CONTENTS)
LASTING_STATUSES = frozenset({STATUS_UP_TO_DATE, STATUS_UPDATE_FAILED})
"""Others pass within minutes and concern only the process that sets the node up."""

SHORT_NAMES = {TAG_RAY_LAUNCH_CONFIG: "c", TAG_RAY_LAUNCH_REQUEST: "r", TAG_RAY_USER_NODE_TYPE: "t"}
"""How the tags that cannot be derived are written."""

_LABEL = re.compile(rf"{PREFIX}:(?P<cluster>[a-z0-9-]+):(?P<kind>[hw])(?P<index>\d+)(?::(?P<rest>.*))?")
_KINDS = {"h": NODE_KIND_HEAD, "w": NODE_KIND_WORKER}


_PAUSE = re.compile(r"(\d+\.\d+)@(\d+)\+(\d+)(p?)")


@dataclass(frozen=True)
class Pause:
    """What a machine that has been stopped, and perhaps started again, has cost before, apart from its downloads."""

    spent: float
    """Dollars until `since`."""

    since: float
    """Unix seconds of the last stop or start."""

    seconds: float
    """Length of all pauses that are over."""

    paused: bool

    def text(self) -> str:
        return f"{self.spent:.4f}@{self.since:.0f}+{self.seconds:.0f}{'p' if self.paused else ''}"

    @classmethod
    def parse(cls, text: str) -> "Pause | None":
        found = _PAUSE.fullmatch(text)
        return None if found is None else cls(float(found[1]), float(found[2]), float(found[3]), bool(found[4]))

    def total(self, now: float) -> float:
        """Seconds of all pauses until Unix time `now`."""
        return self.seconds + (max(now - self.since, 0.0) if self.paused else 0.0)


@dataclass(frozen=True)
class Label:
    """What a node's label says."""

    cluster: str
    kind: str
    index: int
    status: str = STATUS_UNINITIALIZED
    spent: float = 0.0
    """Dollars for machines of the cluster that are gone; only the head's label carries it."""
    hashes: tuple[str, ...] = field(default=("", ""))
    """Values of `HASH_TAGS`, hexadecimal."""
    pause: Pause | None = None
    """None for a machine that has always run."""

    @property
    def tags(self) -> dict[str, str]:
        """Ray's tags that follow from the label."""
        return {
            TAG_RAY_CLUSTER_NAME: self.cluster,
            TAG_RAY_NODE_KIND: self.kind,
            TAG_RAY_NODE_NAME: f"ray-{self.cluster}-{self.kind}",
        }

    def text(self, *, with_hashes: bool = True) -> str:
        hashes = [_packed(value) if with_hashes else "" for value in self.hashes]
        more = [f"{self.spent:.2f}" if self.spent else "", *hashes, self.pause.text() if self.pause else ""]
        while more and not more[-1]:
            more.pop()
        return ":".join([PREFIX, self.cluster, f"{self.kind[0]}{self.index}", self.status, *more])

    @classmethod
    def parse(cls, text: str) -> "Label | None":
        """None for a label of somebody else; parts that are cut off or damaged are taken as not there."""
        match = _LABEL.fullmatch(text)
        if match is None:
            return None
        status, spent, *hashes, pause = [*(match["rest"] or "").split(":"), "", "", "", "", ""][:5]
        return cls(
            match["cluster"],
            _KINDS[match["kind"]],
            int(match["index"]),
            status or STATUS_UNINITIALIZED,
            float(spent) if re.fullmatch(r"\d+\.\d\d", spent) else 0.0,
            tuple(_unpacked(value) for value in hashes),
            Pause.parse(pause),
        )


@dataclass(frozen=True)
class ClusterNode:
    """An instance that belongs to the cluster."""

    instance: Instance
    label: Label
    creation_tags: dict[str, str]
    launch: str
    """Mark of the attempt that created it; empty when unknown."""
    traffic: float = 0.0
    """Dollars that its host takes for what it downloads before it is useful."""

    @property
    def id(self) -> str:
        return str(self.instance.id)

    @property
    def is_head(self) -> bool:
        return self.label.kind == NODE_KIND_HEAD

    @property
    def is_up(self) -> bool:
        return self.instance.state is State.RUNNING and bool(self.instance.ssh_endpoints)

    @property
    def is_paused(self) -> bool:
        """Stopped on purpose, to be started again."""
        return self.label.pause is not None and self.label.pause.paused

    @property
    def is_stopped_by_host(self) -> bool:
        """Stopped, and not on purpose: it may start again at any time, and be billed in full."""
        return self.instance.state is State.STOPPED and not self.is_paused

    @property
    def tags(self) -> dict[str, str]:
        """Ray's tags as the API knows them."""
        tags = {**self.label.tags, **self.creation_tags, TAG_RAY_NODE_STATUS: self.label.status}
        return tags | {tag: value for tag, value in zip(HASH_TAGS, self.label.hashes, strict=True) if value}

    def labelled(self, tags: dict[str, str], spent: float) -> Label:
        """The label that says `tags`."""
        status = tags.get(TAG_RAY_NODE_STATUS, "")
        return replace(
            self.label,
            status=status if status in LASTING_STATUSES else self.label.status,
            spent=spent if self.is_head else 0.0,
            hashes=tuple(tags.get(tag, "") for tag in HASH_TAGS),
        )


def node_of(instance: Instance, cluster_name: str) -> ClusterNode | None:
    """The node that `instance` is in this cluster, or None where its label does not say so."""
    label = Label.parse(instance.label)
    if label is None or label.cluster != cluster_name:
        return None
    env = instance.extra_env
    said = env.get(TRAFFIC_VARIABLE, "")
    traffic = float(said) if re.fullmatch(r"\d+\.\d+", said) else 0.0
    return ClusterNode(instance, label, _decoded(env.get(TAGS_VARIABLE, "")), env.get(LAUNCH_VARIABLE, ""), traffic)


def creation_env(label: Label, tags: dict[str, str], launch: str, traffic: float) -> dict[str, str]:
    """The environment variables that make `node_of` possible."""
    derived = {**label.tags, TAG_RAY_NODE_STATUS: tags.get(TAG_RAY_NODE_STATUS)}
    kept = {SHORT_NAMES.get(tag, tag): value for tag, value in tags.items() if derived.get(tag) != value}
    encoded = base64.b64encode(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).decode()
    return {
        INDEX_VARIABLE: str(label.index),
        TAGS_VARIABLE: encoded,
        LAUNCH_VARIABLE: launch,
        TRAFFIC_VARIABLE: f"{traffic:.4f}",
    }


def _decoded(text: str) -> dict[str, str]:
    try:
        tags = json.loads(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return {}
    names = {short: tag for tag, short in SHORT_NAMES.items()}
    return {names.get(tag, str(tag)): str(value) for tag, value in tags.items()} if isinstance(tags, dict) else {}


def _packed(hexadecimal: str) -> str:
    """40 hexadecimal digits in 27 characters."""
    if not re.fullmatch(r"([0-9a-f]{2})+", hexadecimal):
        return ""
    return base64.urlsafe_b64encode(bytes.fromhex(hexadecimal)).decode().rstrip("=")


def _unpacked(text: str) -> str:
    if len(text) != 27:  # a SHA-1; anything else was cut off
        return ""
    try:
        return base64.urlsafe_b64decode(text + "=").hex()
    except (binascii.Error, ValueError):
        return ""
