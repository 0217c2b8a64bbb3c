"""A provider in front of the imitation, in the same process and on a virtual clock."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UNINITIALIZED,
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_LAUNCH_REQUEST,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.node_provider import VastNodeProvider
from cluster.vast.client import VastClient
from cluster.vast.pace import Pace
from tests.cluster.fake_vast.api import API_KEY, FakeApi
from tests.cluster.fake_vast.clock import VirtualClock
from tests.cluster.fake_vast.state import FakeInstance, FakeOffer, FakeVast
from tests.cluster.fake_vast.transport import FakeTransport

PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIimitated imitated"
NODE_CONFIG: dict[str, Any] = {"disk_gb": 40, "requirements": {"gpu_names": ["RTX 4090"], "num_gpus": 1}}


ODD_ROWS: tuple[dict[str, Any], ...] = (
    {},
    {"machine_id": None, "num_gpus": None, "start_date": None},
    {"extra_env": [["-p 70001:70001", "1"], ["lonely"], None]},
    {"extra_env": "A=1", "ports": [], "ssh_port": "none yet"},
    {"dph_total": "n/a", "gpu_util": "n/a", "label": 7},
)
"""What rows of instances that others made can hold."""


def head_tags() -> dict[str, str]:
    return {
        TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
        TAG_RAY_USER_NODE_TYPE: "head",
        TAG_RAY_LAUNCH_CONFIG: "0123456789abcdef0123456789abcdef01234567",
        TAG_RAY_NODE_NAME: "ray-demo-head",
        TAG_RAY_NODE_STATUS: STATUS_UNINITIALIZED,
    }


def worker_tags(request: str = "request-1", node_type: str = "gpu") -> dict[str, str]:
    """As autoscaler v2 sets them."""
    return {
        TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
        TAG_RAY_USER_NODE_TYPE: node_type,
        TAG_RAY_LAUNCH_CONFIG: "89abcdef0123456789abcdef0123456789abcdef",
        TAG_RAY_LAUNCH_REQUEST: request,
        TAG_RAY_NODE_NAME: "ray-demo-worker",
        TAG_RAY_NODE_STATUS: STATUS_UNINITIALIZED,
    }


@dataclass
class ImitatedCluster:
    """One marketplace and the processes that use it. Each provider is like a process of its own."""

    folder: Path
    clock: VirtualClock
    vast: FakeVast
    api: FakeApi
    jobs_stopped: list[float] = field(default_factory=list)
    """When jobs were told to stop."""

    @classmethod
    def make(cls, folder: Path, offers: int = 30, **fake: Any) -> "ImitatedCluster":
        clock = VirtualClock()
        vast = FakeVast(clock, **fake)
        vast.add_offers(offers)
        return cls(folder, clock, vast, FakeApi(vast))

    def provider(self, machine: str = "head", cluster_name: str = "demo", **settings: Any) -> VastNodeProvider:
        """`machine` is where it runs; each has a folder of its own. All but the head are laptops."""
        config = {
            "type": "external",
            "module": "cluster.node_provider.VastNodeProvider",
            "state_folder": str(self.folder / machine),
            "public_key": PUBLIC_KEY,
            "role": "head" if machine == "head" else "laptop",
            **settings,
        }
        client = self.client(caller=str(config["state_folder"]))
        stop_jobs = lambda: self.jobs_stopped.append(self.clock.time())  # noqa: E731
        return VastNodeProvider(config, cluster_name, client=client, clock=self.clock, stop_jobs=stop_jobs)

    def autoscaler(self, **settings: Any) -> VastNodeProvider:
        """The head's provider, on a head that has been there for ages and costs nothing."""
        if not any(":h0" in instance.label for instance in self.vast.billed()):
            offer = FakeOffer(id=1, machine_id=1, dph_base=0.0, dph_per_gb=0.0, hidden=True)
            age = self.clock.time() - 86400.0
            head = FakeInstance(107, offer, age, "image", 40.0, "bruno-ray:demo:h0:up-to-date", {}, "", None)
            self.vast.instances[head.id] = head
        return self.provider("head", **settings)

    def client(self, caller: str = "") -> VastClient:
        transport = FakeTransport(self.api, caller)
        pace = Pace(self.clock, Path(caller) if caller else None)
        return VastClient("https://vast.invalid", API_KEY, transport=transport, clock=self.clock, pace=pace)

    def foreign_instance(self, label: str = "somebody else's", odd: dict[str, Any] | None = None) -> int:
        """An instance of the same account that is none of ours; `odd` are fields of its row in the list."""
        offer = self.vast.free_offers()[-1]
        instance = self.vast.rent(offer.id, {"image": "other", "disk": 10, "label": label, "env": {}})
        assert instance is not None
        instance.odd = odd or {}
        return instance.id
