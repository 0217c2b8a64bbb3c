"""The imitated marketplace: offers, instances, what becomes of them with time, and what they cost."""

import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.clock import Clock, SystemClock
from tests.cluster.fake_vast.machines import Machine, MachineOrder, SshEndpoint

logger = logging.getLogger(__name__)


@dataclass
class FakeOffer:
    id: int
    machine_id: int
    gpu_name: str = "RTX 4090"
    num_gpus: int = 1
    gpu_ram: float = 24564.0
    cpu_cores_effective: float = 16.0
    cpu_ram: float = 64000.0
    disk_space: float = 800.0
    dph_base: float = 0.35
    dph_per_gb: float = 0.0002
    min_bid: float = 0.15
    reliability2: float = 0.995
    verification: str = "verified"
    geolocation: str = "Bavaria, DE"
    inet_down: float = 900.0
    cuda_max_good: float = 12.8
    direct_port_count: int = 64
    hidden: bool = False
    """Withdrawn by the host: neither searched nor rented."""

    def row(self, allocated_gb: float) -> dict[str, Any]:
        row = {name: value for name, value in vars(self).items() if name not in ("dph_base", "dph_per_gb", "hidden")}
        price = self.dph_base + self.dph_per_gb * allocated_gb
        return {**row, "dph_total": price, "rentable": True, "rented": False, "external": False}


@dataclass
class FakeInstance:
    id: int
    offer: FakeOffer
    created_at: float
    image: str
    disk: float
    label: str
    env: dict[str, str]
    onstart: str
    bid: float | None
    boots: bool = True
    """False for a host that never gets past "loading"."""
    forced: str = ""
    """`actual_status` from here on, whatever the clock says."""
    ready: bool = False
    """The machine behind it has started."""
    destroyed_at: float | None = None
    endpoint: SshEndpoint | None = None
    machine: Machine | None = None
    ssh_keys: list[str] = field(default_factory=list)

    @property
    def price(self) -> float:
        base = self.offer.dph_base if self.bid is None else self.bid
        return base + self.offer.dph_per_gb * self.disk


class FakeVast:
    """All methods are safe to call from several threads. Times come from `clock`, so a virtual one works."""

    def __init__(
        self,
        clock: Clock | None = None,
        make_machine: Callable[[FakeInstance], Machine] | None = None,
        boot_s: float = 30.0,
        listing_lag_s: float = 0.0,
        destroying_lag_s: float = 0.0,
    ) -> None:
        self.clock = clock or SystemClock()
        self.boot_s = boot_s
        self.listing_lag_s = listing_lag_s
        """How long a new instance is missing from the list."""
        self.destroying_lag_s = destroying_lag_s
        """How long a destroyed instance stays in the list."""
        self.offers: dict[int, FakeOffer] = {}
        self.instances: dict[int, FakeInstance] = {}
        """All that ever were."""
        self.unlisted_until: dict[int, float] = {}
        """Instances that the list forgets for a while although they exist."""
        self.account_keys: list[str] = []
        self.max_label: int | None = None
        self.lock = threading.RLock()
        self._make_machine = make_machine
        self._ids = itertools.count(30_000_001)
        self._threads: list[threading.Thread] = []

    def add_offers(self, count: int, **fields: Any) -> list[FakeOffer]:
        """Offers of machines of their own, each a little dearer than the one before."""
        with self.lock:
            added = []
            for number in range(len(self.offers), len(self.offers) + count):
                offer = FakeOffer(id=7_000_001 + number, machine_id=501 + number, **fields)
                offer.dph_base += 0.001 * number
                self.offers[offer.id] = offer
                added.append(offer)
            return added

    # What the API does.

    def free_offers(self) -> list[FakeOffer]:
        with self.lock:
            return [offer for offer in self.offers.values() if not offer.hidden and not self._rented(offer)]

    def rent(self, offer_id: int, body: dict[str, Any], bid: float | None = None) -> FakeInstance | None:
        """None where the offer is gone."""
        with self.lock:
            offer = self.offers.get(offer_id)
            if offer is None or offer.hidden or self._rented(offer):
                return None
            instance = FakeInstance(
                id=next(self._ids),
                offer=offer,
                created_at=self.clock.time(),
                image=body.get("image") or "",
                disk=float(body.get("disk") or 10.0),
                label=(body.get("label") or "")[: self.max_label],
                env={str(name): str(value) for name, value in (body.get("env") or {}).items()},
                onstart=body.get("onstart") or "",
                bid=bid,
            )
            self.instances[instance.id] = instance
            if bid is not None and bid < offer.min_bid:
                instance.forced = "stopped"
            elif self._make_machine is not None:
                self._boot(instance, self._make_machine(instance))
            return instance

    def listed(self) -> list[FakeInstance]:
        now = self.clock.time()
        with self.lock:
            return [
                instance
                for instance in self.instances.values()
                if now >= max(instance.created_at + self.listing_lag_s, self.unlisted_until.get(instance.id, 0.0))
                and (instance.destroyed_at is None or now < instance.destroyed_at + self.destroying_lag_s)
            ]

    def destroy(self, instance_id: int) -> bool:
        """False where there is none."""
        with self.lock:
            instance = self.instances.get(instance_id)
            if instance is None or instance.destroyed_at is not None:
                return False
            instance.destroyed_at = self.clock.time()
            machine, instance.machine = instance.machine, None
        if machine is not None:
            self._in_background(machine.stop)
        return True

    def status(self, instance: FakeInstance) -> str | None:
        if instance.forced:
            return instance.forced
        age = self.clock.time() - instance.created_at
        if age < 0.1 * self.boot_s:
            return None
        if age < 0.2 * self.boot_s:
            return "created"
        up = instance.ready if self._make_machine is not None else age >= self.boot_s
        return "running" if up and instance.boots else "loading"

    def row(self, instance: FakeInstance) -> dict[str, Any]:
        """As the API shows it, nulls and stray blanks included."""
        status = self.status(instance)
        address = instance.endpoint or SshEndpoint(f"203.0.113.{instance.id % 250 + 1}", 40000 + instance.id % 20000)
        known = status == "running"
        return {
            "id": instance.id,
            "machine_id": instance.offer.machine_id,
            "actual_status": status,
            "intended_status": "stopped" if instance.forced == "stopped" else "running",
            "cur_state": "stopped" if instance.forced == "stopped" else "running",
            "label": instance.label or None,
            "extra_env": [[name, value] for name, value in instance.env.items()],
            "onstart": instance.onstart,
            "image_uuid": instance.image,
            "public_ipaddr": f"{address.host} " if known else None,
            "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(address.port)}]} if known else None,
            "ssh_host": "ssh5.vast.invalid",
            "ssh_port": 10000 + instance.id % 50000,
            "dph_total": instance.price,
            "start_date": instance.created_at,
            "disk_space": instance.disk,
            "gpu_name": instance.offer.gpu_name,
            "num_gpus": instance.offer.num_gpus,
            "gpu_ram": instance.offer.gpu_ram,
            "gpu_util": 0.0 if known else None,
            "geolocation": instance.offer.geolocation,
            "status_msg": None if status is None else "imitated",
            "is_bid": instance.bid is not None,
        }

    # What happens in the world.

    def outbid(self, instance_id: int) -> None:
        self.instances[instance_id].forced = "stopped"

    def host_deletes(self, instance_id: int) -> None:
        self.destroy(instance_id)

    def host_offline(self, instance_id: int) -> None:
        self.instances[instance_id].forced = "offline"

    def host_back(self, instance_id: int) -> None:
        self.instances[instance_id].forced = ""

    def never_boots(self, instance_id: int) -> None:
        self.instances[instance_id].boots = False

    # What is true.

    def billed(self) -> list[FakeInstance]:
        """Every instance that costs money now, listed or not."""
        with self.lock:
            return [instance for instance in self.instances.values() if instance.destroyed_at is None]

    def cost(self) -> float:
        """Dollars since the beginning."""
        now = self.clock.time()
        with self.lock:
            return (
                sum(
                    instance.price
                    * ((now if instance.destroyed_at is None else instance.destroyed_at) - instance.created_at)
                    for instance in self.instances.values()
                )
                / 3600.0
            )

    def close(self) -> None:
        """Destroy everything and wait for the machines to be gone."""
        for instance in self.billed():
            self.destroy(instance.id)
        for thread in list(self._threads):
            thread.join()

    def _rented(self, offer: FakeOffer) -> bool:
        return any(
            instance.offer.machine_id == offer.machine_id and instance.destroyed_at is None
            for instance in self.instances.values()
        )

    def _boot(self, instance: FakeInstance, machine: Machine) -> None:
        order = MachineOrder(
            instance.id, instance.image, instance.onstart, dict(instance.env), tuple(self.account_keys)
        )

        def boot() -> None:
            self.clock.sleep(self.boot_s)
            with self.lock:
                if instance.destroyed_at is not None or not instance.boots:
                    return
                instance.machine = machine
            endpoint = machine.start(order)
            with self.lock:
                instance.endpoint, instance.ready = endpoint, instance.destroyed_at is None

        self._in_background(boot)

    def _in_background(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()
