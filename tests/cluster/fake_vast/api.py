"""The imitation's HTTP words: routes, pages, errors in Vast.ai's several shapes, rate limits, and faults on order."""

import json
import re
import threading
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tests.cluster.fake_vast.state import FakeInstance, FakeOffer, FakeVast

API_KEY = "imitated-key"
PAGE_SIZE = 25


class Fault(Enum):
    """What goes wrong with one request."""

    TOO_FREQUENT = "429 in plain text, nothing done"
    SERVER_ERROR = "500, nothing done"
    GARBAGE = "done, but the answer is an HTML page"
    NOTHING = "done, but the answer is empty"
    SILENCE = "nothing done and no answer before the time-out"
    LOST_ANSWER = "done, but no answer before the time-out"
    NO_CONNECTION = "the connection is refused"
    QUOTA = "the day's quota is used up, nothing done"
    TAKEN = "somebody else rents the offer first (creations only)"
    FAILS_AFTER_CONTRACT = "the contract exists and the answer is an error that names it (creations only)"


DONE_FIRST = {Fault.GARBAGE, Fault.NOTHING, Fault.LOST_ANSWER}
CREATIONS_ONLY = {Fault.TAKEN, Fault.FAILS_AFTER_CONTRACT}


class NoAnswer(Exception):
    """The client hears nothing, or (`refused`) is not let in."""

    def __init__(self, refused: bool = False) -> None:
        super().__init__("no answer")
        self.refused = refused


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    content_type: str = "application/json"

    @classmethod
    def json(cls, content: Any, status: int = 200) -> "Answer":
        return cls(status, json.dumps(content).encode())

    @classmethod
    def text(cls, content: str, status: int) -> "Answer":
        return cls(status, content.encode(), "text/plain")

    @classmethod
    def refusal(cls, code: str, message: str, status: int = 400, **more: Any) -> "Answer":
        return cls.json({"success": False, "error": code, "msg": message, **more}, status)


class FakeApi:
    """`handle` answers one request. Faults come from `faults`, one per request, None for no fault."""

    def __init__(self, vast: FakeVast, min_interval_s: float = 0.0) -> None:
        self.vast = vast
        self.faults: deque[Fault | None] = deque()
        self.outage: Fault | None = None
        """Hits every request while set, or those to `outage_path` only."""
        self.outage_path = ""
        """Regular expression."""
        self.min_interval_s = min_interval_s
        """Rate limit: requests to one route closer together than this get a 429."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of everything asked."""
        self._last: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()

    def handle(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Answer:
        """Raises `NoAnswer`."""
        with self._lock:
            self.requests.append((method, path))
            creating = method == "PUT" and "/asks/" in path
            out = self.outage if re.search(self.outage_path, path) else None
            fault = out or self._next_fault(creating)
        return self._faulty(fault, method, path, query, headers, body)

    def _next_fault(self, creating: bool) -> Fault | None:
        """The first that fits; those for creations wait for one."""
        for position, fault in enumerate(self.faults):
            if creating or fault not in CREATIONS_ONLY:
                del self.faults[position]
                return fault
        return None

    def _faulty(
        self, fault: Fault | None, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> Answer:
        if fault is Fault.NO_CONNECTION:
            raise NoAnswer(refused=True)
        if fault is Fault.TOO_FREQUENT:
            return Answer.text("API requests too frequent: endpoint threshold=1.0", 429)
        if fault is Fault.QUOTA:
            return Answer.text("Daily quota for this endpoint exceeded", 429)
        if fault is Fault.SERVER_ERROR:
            return Answer.text("Internal Server Error", 500)
        if fault is Fault.SILENCE:
            raise NoAnswer()
        if fault is Fault.TAKEN:
            self._rented_by_somebody_else(int(path.strip("/").split("/")[-1]))
        answer = self._answer(method, path, query, headers, body)
        if fault is Fault.FAILS_AFTER_CONTRACT and answer.status == 200:
            contract = json.loads(answer.body)["new_contract"]
            return Answer.refusal("insufficient_bid", "Your bid was not accepted", new_contract=contract)
        if fault is Fault.GARBAGE:
            return Answer(200, b"<html><body>502 Bad Gateway</body></html>", "text/html")
        if fault is Fault.NOTHING:
            return Answer(200, b"")
        if fault is Fault.LOST_ANSWER:
            raise NoAnswer()
        return answer

    def _answer(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Answer:
        if headers.get("authorization") != f"Bearer {API_KEY}":
            return Answer.refusal("auth_error", "Invalid user key", 401)
        parts = path.strip("/").split("/")
        if len(parts) < 3 or parts[0] != "api":
            return Answer.text("404 page not found", 404)
        if self._too_frequent(method, re.sub(r"\d+", "N", path)):
            return Answer.text(f"API requests too frequent: endpoint threshold={self.min_interval_s}", 429)
        content = json.loads(body) if body else {}
        match method, *parts[1:]:
            case "POST", "v0", "bundles":
                return self._search(content)
            case "PUT", "v0", "asks", offer_id:
                return self._create(int(offer_id), content)
            case "GET", "v1", "instances":
                return self._page(query)
            case "GET", "v0", "instances", number:
                found = self._listed(int(number))
                return Answer.json({"instances": None if found is None else self.vast.row(found)})
            case "DELETE", "v0", "instances", number:
                done = self.vast.destroy(int(number))
                return Answer.json({"success": True}) if done else self._no_such_instance(number)
            case "PUT", "v0", "instances", "bid_price", number:
                return self._rebid(int(number), float(content["price"]))
            case "PUT", "v0", "instances", "request_logs", number:
                return Answer.json(
                    {"success": True, "result_url": None, "msg": f"no logs of {number} in the imitation"}
                )
            case "POST", "v0", "instances", number, "ssh":
                return self._attach(int(number), content.get("ssh_key", ""))
            case "PUT", "v0", "instances", number:
                return self._update(int(number), content)
            case "POST", "v0", "ssh":
                self.vast.account_keys.append(content.get("ssh_key", ""))
                return Answer.json({"success": True})
        return Answer.refusal("not_found", f"no route {method} {path}", 404)

    def _search(self, query: dict[str, Any]) -> Answer:
        allocated = float(query.get("allocated_storage", 5.0))
        bidding = query.get("type") == "bid"
        rows = [self._offer_row(offer, allocated, bidding) for offer in self.vast.free_offers()]
        rows = [row for row in rows if all(_meets(row.get(name), rule) for name, rule in query.items())]
        rows.sort(key=lambda row: row["dph_total"])
        return Answer.json({"success": True, "offers": rows[: int(query.get("limit", 64))]})

    @staticmethod
    def _offer_row(offer: FakeOffer, allocated: float, bidding: bool) -> dict[str, Any]:
        row = offer.row(allocated)
        if bidding:
            row["dph_total"] += offer.min_bid - offer.dph_base
        return row

    def _create(self, offer_id: int, content: dict[str, Any]) -> Answer:
        price = content.get("price")
        instance = self.vast.rent(offer_id, content, None if price is None else float(price))
        if instance is None:
            return Answer.refusal("no_such_ask", f"Instance type by id {offer_id} is not available", 404)
        if instance.forced == "stopped":
            message = f"bid {price} is below the minimum {instance.offer.min_bid}"
            return Answer.refusal("invalid_price", message, new_contract=instance.id)
        return Answer.json({"success": True, "new_contract": instance.id})

    def _page(self, query: dict[str, str]) -> Answer:
        limit = min(int(query.get("limit", PAGE_SIZE)), PAGE_SIZE)
        after = int(query.get("after_token", "0"))
        rest = sorted((i for i in self.vast.listed() if i.id > after), key=lambda instance: instance.id)
        page = rest[:limit]
        token = str(page[-1].id) if len(rest) > limit else None
        rows = [self.vast.row(instance) for instance in page]
        return Answer.json({"success": True, "instances_found": len(rows), "next_token": token, "instances": rows})

    def _update(self, number: int, content: dict[str, Any]) -> Answer:
        found = self._listed(number)
        if found is None:
            return self._no_such_instance(number)
        if "label" in content:
            if self.vast.max_label is not None and len(content["label"]) > self.vast.max_label:
                return Answer.refusal("invalid_args", f"label longer than {self.vast.max_label}")
            found.label = content["label"]
        if content.get("state") in ("stopped", "running"):
            found.forced = "stopped" if content["state"] == "stopped" else ""
        return Answer.json({"success": True})

    def _attach(self, number: int, key: str) -> Answer:
        found = self._listed(number)
        if found is None:
            return self._no_such_instance(number)
        found.ssh_keys.append(key)
        if found.machine is not None and found.ready:
            found.machine.attach_key(key)
        return Answer.json({"success": True})

    def _rebid(self, number: int, price: float) -> Answer:
        found = self._listed(number)
        if found is None:
            return self._no_such_instance(number)
        found.bid = price
        if price >= found.offer.min_bid and found.forced == "stopped":
            found.forced = ""
        return Answer.json({"success": True})

    def _listed(self, number: int) -> FakeInstance | None:
        """Single instances are found at once, listed or not yet."""
        found = self.vast.instances.get(number)
        return None if found is None or found.destroyed_at is not None else found

    @staticmethod
    def _no_such_instance(number: object) -> Answer:
        return Answer.refusal("no_such_instance", f"Instance {number} not found", 404)

    def _rented_by_somebody_else(self, offer_id: int) -> None:
        offer = self.vast.offers.get(offer_id)
        if offer is not None:
            offer.hidden = True

    def _too_frequent(self, method: str, route: str) -> bool:
        now = self.vast.clock.time()
        with self._lock:
            last = self._last.get((method, route))
            if last is not None and now - last < self.min_interval_s:
                return True
            self._last[method, route] = now
            return False


def _meets(value: Any, rule: Any) -> bool:
    """Vast.ai's filter language, as far as it is used; anything that is not a rule is an option of the search."""
    if not isinstance(rule, dict):
        return True
    tests = {
        "eq": lambda wanted: value == wanted,
        "neq": lambda wanted: value != wanted,
        "gte": lambda wanted: value is not None and value >= wanted,
        "lte": lambda wanted: value is not None and value <= wanted,
        "gt": lambda wanted: value is not None and value > wanted,
        "lt": lambda wanted: value is not None and value < wanted,
        "in": lambda wanted: value in wanted,
        "notin": lambda wanted: value not in wanted,
    }
    return all(tests[operator](wanted) for operator, wanted in rule.items())
