"""What a machine of the cluster remembers in a file: costs, pending launches, machines to avoid, indices at rest.

The truth about what exists is the API. This file only adds what the API forgets: what destroyed contracts have cost,
and what went wrong lately. Losing it costs comfort, not money: the head writes the cost of what is gone into its label
as well. Costs are upper bounds, since Vast.ai bills a machine that has not started for its disk only.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from bruno_ray.files import write_json
from cluster.clock import Clock
from cluster.renting.cost import storage_price
from cluster.renting.tags import ClusterNode

logger = logging.getLogger(__name__)


@dataclass
class Contract:
    """One rented machine's cost; times in Unix seconds, price in dollars per hour."""

    price: float
    begin: float
    ended: float | None = None
    traffic: float = 0.0
    """Dollars, once."""
    pauses: list[list[float]] = field(default_factory=list)
    """Begin and end of each time for which it was paused, at `paused_price`."""
    paused_price: float = 0.0
    is_partial: bool = False
    """Whether it was seen only while its host had stopped it: `price` may be that of its disk."""

    def cost(self, now: float) -> float:
        return self.cost_between(self.begin, now if self.ended is None else self.ended) + self.traffic

    def cost_between(self, begin: float, end: float) -> float:
        """Dollars per hour and time, within its life; without the traffic."""
        begin = max(begin, self.begin)
        paused_s = sum(max(min(to, end) - max(since, begin), 0.0) for since, to in self.pauses)
        return (self.price * max(end - begin, 0.0) - (self.price - self.paused_price) * paused_s) / 3600

    def note_pauses(self, seconds: float, price: float, now: float) -> None:
        """It has been paused for so long in all: what is new of that lies right before now."""
        new = seconds - sum(to - since for since, to in self.pauses)
        if new < 1:
            return
        self.paused_price = max(price, self.paused_price)
        if self.pauses and now - new <= self.pauses[-1][1] + 1:
            self.pauses[-1][1] = now
        else:
            self.pauses.append([now - new, now])


@dataclass
class PendingLaunch:
    """A creation that was begun: until the list shows it or it is refused, it may be a machine that costs money."""

    price: float
    index: int
    until: float
    """When it is forgotten, Unix seconds."""


@dataclass
class Entries:
    """The content of the file. Its keys are older than these names: see `from_json`."""

    contracts: dict[str, Contract] = field(default_factory=dict)
    avoided: dict[str, float] = field(default_factory=dict)
    """Machine id to the time until which it is not rented."""
    pending: dict[str, PendingLaunch] = field(default_factory=dict)
    """By mark of the launch; they outlive a process that dies while it creates."""
    resting: dict[str, float] = field(default_factory=dict)
    """Node index to the time until which it is not given away."""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Entries":
        """Raises KeyError or TypeError for what is no ledger."""
        contracts = {name: Contract(**values) for name, values in content["contracts"].items()}
        pending = {launch: PendingLaunch(**values) for launch, values in content["intents"].items()}
        return cls(contracts, content["avoided"], pending, content["resting"])

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        for values in content["contracts"].values():
            for later in ("traffic", "pauses", "paused_price", "is_partial"):  # older code knows none of them
                if not values[later]:
                    del values[later]
        content["intents"] = content.pop("pending")
        return content


class Ledger:
    """Safe for several threads and processes: every change reads, changes and replaces the file under a lock."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = folder / "ledger.json"
        self._lock = FileLock(folder / "ledger.lock")
        self._clock = clock

    def observe(
        self, nodes: Iterable[ClusterNode], settled: Iterable[str] = (), unaccounted: Iterable[str] = ()
    ) -> None:
        """Note everything that exists now; contracts that are not among it have ended.

        `settled` are marks of pending launches whose instances the API lists by now, or that are gone again;
        `unaccounted` are contracts of which it could not be learned whether they exist.
        """
        now, unknown = self._clock.time(), set(unaccounted)
        with self._changed() as entries:
            existing = {node.id: node for node in nodes}
            for contract_id, node in existing.items():
                instance = node.instance
                begin = min(instance.start_date or now, now)
                contract = entries.contracts.setdefault(
                    contract_id, Contract(instance.dph_total, begin, traffic=node.traffic, is_partial=True)
                )
                contract.price, contract.ended = max(contract.price, instance.dph_total), None
                contract.is_partial &= node.is_stopped_by_host
                if node.label.pause is not None:
                    contract.note_pauses(node.label.pause.total(now), storage_price(instance), now)
            for contract_id, contract in entries.contracts.items():
                if contract_id not in existing and contract_id not in unknown and contract.ended is None:
                    contract.ended = now
            for times in (entries.avoided, entries.resting):
                for name in [name for name, until in times.items() if until <= now]:
                    del times[name]
            over = {launch for launch, pending in entries.pending.items() if pending.until <= now}
            for launch in over.union(settled) & entries.pending.keys():
                del entries.pending[launch]

    def open_contracts(self) -> dict[str, float]:
        """Contracts that existed when this machine last looked, with their highest prices in dollars per hour; 0 where
        the whole price was never seen."""
        contracts = {name: contract for name, contract in self._read().contracts.items() if contract.ended is None}
        return {name: 0.0 if contract.is_partial else contract.price for name, contract in contracts.items()}

    def ended_cost(self) -> float:
        """Dollars for contracts that are gone."""
        return sum(contract.cost(0.0) for contract in self._read().contracts.values() if contract.ended is not None)

    def cost_between(self, begin: float, end: float) -> float:
        """Dollars from `begin` to `end`, Unix seconds, with the downloads of machines that were rented meanwhile."""
        now, cost = self._clock.time(), 0.0
        for contract in self._read().contracts.values():
            ended = now if contract.ended is None else contract.ended
            cost += contract.cost_between(begin, min(ended, end))
            cost += contract.traffic if begin <= contract.begin < end else 0.0
        return cost

    def avoid(self, machine_id: int, seconds: float) -> None:
        with self._changed() as entries:
            entries.avoided[str(machine_id)] = self._clock.time() + seconds

    def avoided(self) -> frozenset[int]:
        now = self._clock.time()
        return frozenset(int(machine) for machine, until in self._read().avoided.items() if until > now)

    def rest(self, indices: Iterable[int], seconds: float) -> None:
        with self._changed() as entries:
            entries.resting.update({str(index): self._clock.time() + seconds for index in indices})

    def unavailable_indices(self) -> frozenset[int]:
        """Indices at rest, and those of pending launches."""
        now, entries = self._clock.time(), self._read()
        resting = {int(index) for index, until in entries.resting.items() if until > now}
        return frozenset(resting | {pending.index for pending in entries.pending.values() if pending.until > now})

    def add_pending_launch(self, launch: str, price: float, index: int, seconds: float) -> None:
        """Note, before it is asked for, that a machine may exist; the note outlives this process."""
        with self._changed() as entries:
            entries.pending[launch] = PendingLaunch(price, index, self._clock.time() + seconds)

    def drop_pending_launch(self, launch: str) -> None:
        """It was refused: there is no machine."""
        with self._changed() as entries:
            entries.pending.pop(launch, None)

    def pending_price(self, known: Iterable[str]) -> float:
        """Dollars per hour of pending launches, without those whose marks are `known`."""
        now, counted = self._clock.time(), set(known)
        return sum(
            pending.price
            for launch, pending in self._read().pending.items()
            if launch not in counted and pending.until > now
        )

    def forget_costs(self) -> None:
        """Forget the costs: the cluster was taken down on purpose and its account is closed."""
        with self._changed() as entries:
            entries.contracts.clear()
            entries.pending.clear()

    def content(self) -> dict[str, Any]:
        """All of it, for `replace` on another machine."""
        return self._read().to_json()

    def replace(self, content: dict[str, Any]) -> None:
        """Raises KeyError or TypeError for what is no ledger."""
        entries = Entries.from_json(content)
        with self._lock:
            write_json(self._file, entries.to_json(), durable=False)

    @contextmanager
    def _changed(self) -> Iterator[Entries]:
        with self._lock:
            entries = self._read()
            yield entries
            write_json(self._file, entries.to_json())

    def _read(self) -> Entries:
        try:
            return Entries.from_json(json.loads(self._file.read_text()))
        except FileNotFoundError:
            return Entries()
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s) and is begun anew", self._file, error)
            return Entries()
