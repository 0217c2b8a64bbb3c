"""The imitated marketplace: offers, instances, what becomes of them with time, and what they cost."""

import itertools
import logging
import re
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
    cpu_cores: float | None = 16.0
    """Of the whole machine, of which this offer may be a part."""
    cpu_cores_effective: float = 16.0
    """Of this offer."""
    cpu_ram: float = 64000.0
    """MB of the whole machine."""
    gpu_frac: float = 1.0
    """Share of the machine's GPUs."""
    disk_space: float = 800.0
    dph_base: float = 0.35
    dph_per_gb: float = 0.0002
    min_bid: float = 0.15
    reliability2: float | None = 0.995
    reliability: float | None = None
    """What some answers have instead of `reliability2`."""
    verification: str = "verified"
    geolocation: str = "Bavaria, DE"
    inet_down: float = 900.0
    inet_up: float = 400.0
    inet_down_cost: float | None = 0.001
    """Dollars per GB, on top of the price."""
    inet_up_cost: float | None = 0.001
    cuda_max_good: float = 12.8
    compute_cap: int | None = 890
    direct_port_count: int | None = 64
    duration: float | None = 30 * 86400.0
    """Seconds for which the host lets it."""
    cpu_arch: str | None = "amd64"
    gpu_arch: str | None = "nvidia"
    hidden: bool = False
    """Withdrawn by the host: neither searched nor rented."""

    def row(self, allocated_gb: float) -> dict[str, Any]:
        row = {name: value for name, value in vars(self).items() if name not in ("dph_base", "dph_per_gb", "hidden")}
        price = self.dph_base + self.dph_per_gb * allocated_gb
        return {**row, "dph_total": price, "rentable": True, "rented": False, "external": None}


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
    status_msg: str | None = None
    """What the host says, such as why the container could not be made."""
    ports: dict[str, Any] = field(default_factory=dict)
    """Ports that its image publishes beside ssh's."""
    odd: dict[str, Any] = field(default_factory=dict)
    """Fields of its row in the list that are not as they should be."""
    gpu_taken: bool = False
    """While it was stopped somebody else has rented its place."""
    waits: bool = False
    """It was told to run and begins when there is room."""
    idle: list[tuple[float, float | None]] = field(default_factory=list)
    """When it was stopped and went on again: meanwhile only its disk is billed."""
    heartbeat_at: float = 0.0
    """When the head last showed it that somebody is there."""
    ready: bool = False
    """The machine behind it has started."""
    ready_at: float | None = None
    destroyed_at: float | None = None
    endpoint: SshEndpoint | None = None
    machine: Machine | None = None
    ssh_keys: list[str] = field(default_factory=list)

    @property
    def price(self) -> float:
        """Dollars per hour while it runs."""
        base = self.offer.dph_base if self.bid is None else self.bid
        return base + self.storage_price

    @property
    def storage_price(self) -> float:
        """Dollars per hour from creation on, whatever it does."""
        return self.offer.dph_per_gb * self.disk

    @property
    def end_date(self) -> float | None:
        """When the contract ends."""
        return None if self.offer.duration is None else self.created_at + self.offer.duration

    @property
    def key(self) -> str:
        """CONTAINER_API_KEY, good for this instance only."""
        return f"key-of-container-{self.id}"

    def running_s(self, begun: float | None, now: float) -> float:
        """Seconds until `now` for which its GPUs are billed, when it ran from `begun` on."""
        if begun is None:
            return 0.0
        end = now if self.destroyed_at is None else self.destroyed_at
        idle = sum(max(min(end if to is None else to, end) - max(since, begun), 0.0) for since, to in self.idle)
        return max(end - begun - idle, 0.0)


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
        self.credit = 1000.0
        """Dollars before anything was rented."""
        self.max_label: int | None = None
        self.stopped_is_cheap = False
        """A stopped instance's row says what it costs now, its disk, and not what it costs when it runs."""
        self.tells_storage = True
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

    def add_slices(self, count: int, machine_id: int, **fields: Any) -> list[FakeOffer]:
        """`count` offers of one GPU each of one machine, whose whole CPUs and RAM every one of them states."""
        with self.lock:
            cores = fields.pop("cpu_cores", 64.0)
            parts = self.add_offers(
                count, cpu_cores=cores, cpu_cores_effective=cores / count, gpu_frac=1 / count, **fields
            )
            for offer in parts:
                offer.machine_id = machine_id
            return parts

    # What the API does.

    def visible_offers(self) -> list[FakeOffer]:
        """What a search sees: also what is rented by now, which it does not leave out."""
        with self.lock:
            return [offer for offer in self.offers.values() if not offer.hidden]

    def is_rented(self, offer: FakeOffer) -> bool:
        with self.lock:
            return self._rented(offer)

    def credit_left(self) -> float:
        return self.credit - self.cost()

    def instance_of_key(self, key: str) -> FakeInstance | None:
        """Whose CONTAINER_API_KEY that is."""
        with self.lock:
            return next((found for found in self.instances.values() if found.key == key), None)

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
            instance.heartbeat_at = instance.created_at
            self.instances[instance.id] = instance
            if bid is not None and bid < offer.min_bid:
                self._pause(instance, "stopped")
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
        if instance.end_date is not None and self.clock.time() >= instance.end_date:
            return "exited"
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
        machine = instance.offer.machine_id  # one address for all instances of a machine
        host = f"203.0.{machine // 250 % 250}.{machine % 250 + 1}"
        address = instance.endpoint or SshEndpoint(host, 40000 + instance.id % 20000)
        known = status == "running"
        return {
            "id": instance.id,
            "machine_id": instance.offer.machine_id,
            "actual_status": status,
            "intended_status": "stopped" if instance.forced == "stopped" and not instance.waits else "running",
            "cur_state": "stopped" if instance.forced == "stopped" else "running",
            "storage_total_cost": instance.storage_price if self.tells_storage else None,
            "label": instance.label or None,
            "extra_env": [[name, value] for name, value in instance.env.items()],
            "onstart": instance.onstart,
            "image_uuid": instance.image,
            "public_ipaddr": f"{address.host} " if known else None,
            "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(address.port)}], **instance.ports}
            if known
            else None,
            "ssh_host": "ssh5.vast.invalid",
            "ssh_port": 10000 + instance.id % 50000,
            "dph_total": instance.storage_price
            if instance.forced == "stopped" and self.stopped_is_cheap
            else instance.price,
            "start_date": instance.created_at,
            "disk_space": instance.disk,
            "gpu_name": instance.offer.gpu_name,
            "num_gpus": instance.offer.num_gpus,
            "gpu_ram": instance.offer.gpu_ram,
            "gpu_util": 0.0 if known else None,
            "geolocation": instance.offer.geolocation,
            "status_msg": instance.status_msg or (f"success, running {instance.image}/ssh" if known else None),
            "is_bid": instance.bid is not None,
            "end_date": instance.end_date,
            "inet_up_cost": instance.offer.inet_up_cost,
            "inet_down_cost": instance.offer.inet_down_cost,
            "credit_balance": None,
            **instance.odd,
        }

    # What happens in the world.

    def outbid(self, instance_id: int) -> None:
        self._pause(self.instances[instance_id], "stopped")

    def host_deletes(self, instance_id: int) -> None:
        self.destroy(instance_id)

    def host_offline(self, instance_id: int) -> None:
        self._pause(self.instances[instance_id], "offline")

    def host_back(self, instance_id: int) -> None:
        """Also a bid that is high enough again: it goes on by itself."""
        self.resume(self.instances[instance_id])

    def cannot_boot(self, instance_id: int, status: str, message: str | None = None) -> None:
        """The host could not make the container: `status` stays, and `status_msg` says why, if anything does."""
        instance = self.instances[instance_id]
        instance.boots, instance.status_msg = False, message
        if status != "loading":
            self._pause(instance, status)

    def start(self, instance: FakeInstance) -> bool:
        """By its renter; it waits where its place is taken (False)."""
        with self.lock:
            instance.waits = instance.gpu_taken
        if not instance.waits:
            self.resume(instance)
        return not instance.waits

    def stop(self, instance: FakeInstance) -> None:
        """By its renter."""
        instance.waits = False
        self._pause(instance, "stopped")

    def place_is_taken(self, instance_id: int, taken: bool) -> None:
        """Of a stopped instance, by somebody else; when it is free again what waits begins."""
        instance = self.instances[instance_id]
        instance.gpu_taken = taken and instance.forced == "stopped"
        if instance.waits and not taken:
            self.resume(instance)

    def resume(self, instance: FakeInstance) -> None:
        with self.lock:
            instance.forced, instance.waits, instance.gpu_taken = "", False, False
            instance.idle = [(since, self.clock.time() if to is None else to) for since, to in instance.idle]

    def let_dead_mans_switches_act(self, reached: set[int]) -> None:
        """What `onstart` does on each machine that has no body here.

        The head's heartbeat has just come to those of `reached`; the others end themselves when their time is over.
        """
        now = self.clock.time()
        for instance in self.billed():
            if instance.id in reached:
                instance.heartbeat_at = now
            switch = re.search(r"PATIENCE_S=(\d+) END=(\d+)", instance.onstart)
            if switch and self.status(instance) == "running":
                patience, end = map(float, switch.groups())
                if now - instance.heartbeat_at >= patience or (end and now >= end):
                    self.destroy(instance.id)

    def never_boots(self, instance_id: int) -> None:
        self.instances[instance_id].boots = False

    # What is true.

    def billed(self) -> list[FakeInstance]:
        """Every instance that costs money now, listed or not."""
        with self.lock:
            return [instance for instance in self.instances.values() if instance.destroyed_at is None]

    def cost(self) -> float:
        """Dollars since the beginning: storage from creation on, GPUs while running."""
        with self.lock:
            return sum(self.cost_of(instance) for instance in self.instances.values())

    def cost_of(self, instance: FakeInstance) -> float:
        """Dollars, so far."""
        now = self.clock.time()
        end = now if instance.destroyed_at is None else instance.destroyed_at
        storage = instance.storage_price * (end - instance.created_at)
        gpus = (instance.price - instance.storage_price) * instance.running_s(self._running_since(instance), now)
        return (storage + gpus) / 3600.0

    def _running_since(self, instance: FakeInstance) -> float | None:
        if not instance.boots:
            return None
        return instance.ready_at if self._make_machine is not None else instance.created_at + self.boot_s

    def _pause(self, instance: FakeInstance, status: str) -> None:
        with self.lock:
            if not instance.forced:
                instance.idle.append((self.clock.time(), None))
            instance.forced = status

    def close(self) -> None:
        """Destroy everything and wait for the machines to be gone."""
        for instance in self.billed():
            self.destroy(instance.id)
        for thread in list(self._threads):
            thread.join()

    def _rented(self, offer: FakeOffer) -> bool:
        return any(
            instance.offer.id == offer.id and instance.destroyed_at is None for instance in self.instances.values()
        )

    def _boot(self, instance: FakeInstance, machine: Machine) -> None:
        own = {"CONTAINER_ID": str(instance.id), "CONTAINER_API_KEY": instance.key}
        order = MachineOrder(
            instance.id, instance.image, instance.onstart, {**instance.env, **own}, tuple(self.account_keys)
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
                instance.ready_at = self.clock.time()

        self._in_background(boot)

    def _in_background(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()
