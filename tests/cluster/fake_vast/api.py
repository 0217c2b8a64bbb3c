"""The imitation's HTTP words: routes, pages, errors in Vast.ai's several shapes, rate limits, and faults on order."""

import base64
import itertools
import json
import re
import threading
from collections import deque
from enum import Enum
from typing import Any

from tests.cluster.fake_vast.answers import Answer, NoAnswer, instance_gone, offer_gone
from tests.cluster.fake_vast.rates import Rates, too_frequent
from tests.cluster.fake_vast.state import FakeInstance, FakeOffer, FakeVast

__all__ = ["API_KEY", "HEAD_KEY", "Answer", "FakeApi", "Fault", "NoAnswer"]

API_KEY = "imitated-key"
HEAD_KEY = "imitated-restricted-key"
"""May search, rent, see and destroy, and is told nothing of the account (no `user_read`)."""

PAGE_SIZE = 25
MOST_OFFERS = 64
"""A search never brings more, whatever it asks for."""

LONGEST_LABEL, LONGEST_NEW_LABEL = 256, 1024
"""At creation, and later."""
LONGEST_VARIABLE, LONGEST_ENVIRONMENT = 256, 32768
LONGEST_ONSTART = 4096
LEAST_DISK_GB = 8.0


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
    REFUSED_TOO_OFTEN = "429 as JSON with Retry-After, nothing done"
    TAKEN = "somebody else rents the offer first (creations only)"
    FAILS_AFTER_CONTRACT = "the contract exists and the answer is an error that names it (creations only)"


DONE_FIRST = {Fault.GARBAGE, Fault.NOTHING, Fault.LOST_ANSWER}
CREATIONS_ONLY = {Fault.TAKEN, Fault.FAILS_AFTER_CONTRACT}


class FakeApi:
    """`handle` answers one request. Faults come from `faults`, one per request, None for no fault."""

    def __init__(self, vast: FakeVast) -> None:
        self.vast = vast
        self.rates = Rates()
        self.faults: deque[Fault | None] = deque()
        self.outage: Fault | None = None
        """Hits every request while set, or those to `outage_path` only."""
        self.outage_path = ""
        """Regular expression."""
        self.ignored_filters = {"rented", "direct_port_count", "inet_down_cost"}
        """Fields that the search does not filter by although it is asked to."""
        self.odd_offers: list[dict[str, Any]] = []
        """Rows that every search brings besides, whatever is in them."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of everything asked."""
        self.searches: list[dict[str, Any]] = []
        """Every query of a search."""
        self.storage_url = "https://storage.invalid"
        """Where logs are left to be fetched."""
        self.logs: dict[tuple[int, str], str] = {}
        """Of instances: by number and "logs" or "daemon_logs"."""
        self._stored: dict[str, tuple[str, int]] = {}
        """Text, and how often it is not there yet."""
        self._shapes = itertools.count()
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
        caller = headers.get("authorization", ""), headers.get("x-caller", "")
        if (refusal := self.rates.refusal(caller, method, path, self.vast.clock.time())) is not None:
            return refusal
        if fault is Fault.TOO_FREQUENT:
            return too_frequent(0, 1.0, 0.0)
        if fault is Fault.REFUSED_TOO_OFTEN:
            return too_frequent(1, 1.0, 3.0)
        if fault is Fault.QUOTA:
            refusal = {"error": "search_quota_exceeded", "msg": "Daily search row quota exhausted"}
            return Answer.json(refusal, 429).with_header("Retry-After", str(self._seconds_to_midnight()))
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
        key = headers.get("authorization", "").removeprefix("Bearer ")
        parts = path.strip("/").split("/")
        if parts[0] == "instance_logs":
            return self._stored_logs(parts[-1], headers)
        if len(parts) < 3 or parts[0] != "api":
            return Answer.text("404 page not found", 404)
        if (refusal := self._unauthorised(key, method, parts)) is not None:
            return refusal
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
                if found is None and next(self._shapes) % 2:
                    return self._no_such_instance(number)
                return Answer.json({"instances": None if found is None else self.vast.row(found)})
            case "DELETE", "v0", "instances", number:
                done = self.vast.destroy(int(number))
                return Answer.json({"success": True}) if done else self._no_such_instance(number)
            case "GET", "v0", "users", "current":
                return Answer.json({"id": 7, "credit": round(self.vast.credit_left(), 4), "balance": 0.0})
            case "PUT", "v0", "instances", "bid_price", number:
                return self._rebid(int(number), float(content["price"]))
            case "PUT", "v0", "instances", "request_logs", number:
                return self._request_logs(int(number), content)
            case "POST", "v0", "instances", number, "ssh":
                return self._attach(int(number), content.get("ssh_key", ""))
            case "PUT", "v0", "instances", number:
                return self._update(int(number), content)
            case "POST", "v0", "ssh":
                self.vast.account_keys.append(content.get("ssh_key", ""))
                return Answer.json({"success": True})
        return Answer.refusal("not_found", f"no route {method} {path}", 404)

    def _unauthorised(self, key: str, method: str, parts: list[str]) -> Answer | None:
        """The key of an instance may see and end that instance, the head's key is told nothing of the account."""
        if key == API_KEY or (key == HEAD_KEY and "users" not in parts):
            return None
        owner = self.vast.instance_of_key(key)
        if owner is not None and method in ("GET", "DELETE", "PUT") and parts[2:] == ["instances", str(owner.id)]:
            return None
        if key == HEAD_KEY:
            return Answer.refusal("auth_error", "This key has no permission for user_read", 403)
        return Answer.refusal("auth_error", "Invalid user key", 401)

    def _search(self, query: dict[str, Any]) -> Answer:
        """The documented filters, but for those of `ignored_filters`; never more than `MOST_OFFERS` rows."""
        self.searches.append(query)
        allocated = float(query.get("allocated_storage", 8.0))
        bidding = query.get("type") == "bid"
        rows = [self._offer_row(offer, allocated, bidding) for offer in self.vast.visible_offers()] + self.odd_offers
        rules = {name: rule for name, rule in query.items() if name not in self.ignored_filters}
        rows = [row for row in rows if all(_meets(_searched(row, name), rule) for name, rule in rules.items())]
        rows.sort(key=lambda row: row.get("dph_total") or 0.0)
        limit = min(int(query.get("limit", MOST_OFFERS)), MOST_OFFERS)
        return Answer.json({"offers": rows[:limit], "truncated": len(rows) > limit})

    def _offer_row(self, offer: FakeOffer, allocated: float, bidding: bool) -> dict[str, Any]:
        row = {**offer.row(allocated), "rented": self.vast.is_rented(offer)}
        if bidding:
            row["dph_total"] += offer.min_bid - offer.dph_base
        return row

    def _create(self, offer_id: int, content: dict[str, Any]) -> Answer:
        if (wrong := _invalid(content)) is not None:
            return Answer.refusal("invalid_args", f"error 400/3467: Invalid args: {wrong}", 400)
        if self.vast.credit_left() <= 0:
            return Answer.refusal("insufficient_credit", "Your account lacks credit; see the billing page.", 400)
        price = content.get("price")
        instance = self.vast.rent(offer_id, content, None if price is None else float(price))
        if instance is None:
            return offer_gone(next(self._shapes), offer_id)
        if instance.forced == "stopped":
            message = f"bid {price} is below the minimum {instance.offer.min_bid}"
            return Answer.refusal("invalid_price", message, new_contract=instance.id)
        return Answer.json({"success": True, "new_contract": instance.id})

    def _page(self, query: dict[str, str]) -> Answer:
        limit = min(int(query.get("limit", PAGE_SIZE)), PAGE_SIZE)
        after = 0
        if token := query.get("after_token"):
            try:
                after = int(json.loads(base64.urlsafe_b64decode(token))["values"]["id"])
            except (ValueError, KeyError):
                return Answer.json({"error": "invalid_request", "msg": "Error in query parameters: after_token"}, 400)
        rest = sorted((i for i in self.vast.listed() if i.id > after), key=lambda instance: instance.id)
        page = rest[:limit]
        cursor = json.dumps({"values": {"id": page[-1].id}}).encode() if len(rest) > limit else b""
        token = base64.urlsafe_b64encode(cursor).decode() or None
        rows = [self.vast.row(instance) for instance in page]
        return Answer.json({"success": True, "instances_found": len(rows), "next_token": token, "instances": rows})

    def _update(self, number: int, content: dict[str, Any]) -> Answer:
        found = self._listed(number)
        if found is None:
            return self._no_such_instance(number)
        if "label" in content:
            if len(content["label"]) > min(self.vast.max_label or LONGEST_NEW_LABEL, LONGEST_NEW_LABEL):
                return Answer.refusal("invalid_args", "error 400/1782: Invalid args: label is too long")
            found.label = content["label"]
        if content.get("state") in ("stopped", "running"):
            if content["state"] == "stopped":
                self.vast.stop(found)
            elif found.gpu_taken and next(self._shapes) % 2:
                return Answer.refusal("resources_unavailable", "Required resources are currently unavailable.")
            else:
                self.vast.start(found)
        return Answer.json({"success": True})

    def _attach(self, number: int, key: str) -> Answer:
        found = self._listed(number)
        if found is None:
            return self._no_such_instance(number)
        found.ssh_keys.append(key)
        if found.machine is not None and found.ready:
            found.machine.attach_key(key)
        return Answer.json({"success": True})

    def _request_logs(self, number: int, content: dict[str, Any]) -> Answer:
        if self._listed(number) is None:
            return Answer.json({"error": "invalid_id", "msg": "Invalid instance id."}, 404)
        kind = "daemon_logs" if content.get("daemon_logs") == "true" else "logs"
        lines = self.logs.get((number, kind), "").splitlines()[-int(content.get("tail", 1000)) :]
        name = f"{len(self._stored)}.log"
        self._stored[name] = ("\n".join(lines), 2)
        return Answer.json({"success": True, "result_url": f"{self.storage_url}/instance_logs/{name}"})

    def _stored_logs(self, name: str, headers: dict[str, str]) -> Answer:
        """As the storage service answers: not there at first, and a second way to authenticate is refused."""
        if "authorization" in headers:
            return Answer.text("Only one auth mechanism allowed", 400)
        text, waits = self._stored[name]
        self._stored[name] = (text, waits - 1)
        return Answer.text("<Error><Code>AccessDenied</Code></Error>", 403) if waits > 0 else Answer.text(text, 200)

    def _rebid(self, number: int, price: float) -> Answer:
        found = self._listed(number)
        if found is None:
            return self._no_such_instance(number)
        found.bid = price
        if price >= found.offer.min_bid and found.forced == "stopped":
            self.vast.resume(found)
        return Answer.json({"success": True})

    def _listed(self, number: int) -> FakeInstance | None:
        """Single instances are found at once, listed or not yet."""
        found = self.vast.instances.get(number)
        return None if found is None or found.destroyed_at is not None else found

    def _no_such_instance(self, number: object) -> Answer:
        return instance_gone(next(self._shapes), number)

    def _rented_by_somebody_else(self, offer_id: int) -> None:
        offer = self.vast.offers.get(offer_id)
        if offer is not None:
            offer.hidden = True

    def _seconds_to_midnight(self) -> int:
        return int(86400 - self.vast.clock.time() % 86400)


def _invalid(content: dict[str, Any]) -> str | None:
    """What create_instance.yaml's `x-input-validation` forbids."""
    env = {str(name): str(value) for name, value in (content.get("env") or {}).items()}
    if any(len(value) > LONGEST_VARIABLE for value in env.values()):
        return f"a variable of env is longer than {LONGEST_VARIABLE}"
    if sum(len(name) + len(value) for name, value in env.items()) > LONGEST_ENVIRONMENT:
        return f"env is longer than {LONGEST_ENVIRONMENT}"
    if len(content.get("label") or "") > LONGEST_LABEL:
        return f"label is longer than {LONGEST_LABEL}"
    if len(content.get("onstart") or "") > LONGEST_ONSTART:
        return f"args and onstart are longer than {LONGEST_ONSTART}"
    if float(content.get("disk") or 10.0) < LEAST_DISK_GB:
        return f"disk is below {LEAST_DISK_GB}"
    return None


def _searched(row: dict[str, Any], name: str) -> Any:
    """What the filter `name` looks at."""
    if name == "verified":
        return row.get("verification") == "verified"
    if name == "geolocation":
        return (row.get("geolocation") or "").rsplit(",", 1)[-1].strip()
    return row.get(name)


def _meets(value: Any, rule: Any) -> bool:
    """Vast.ai's filter language, as far as it is used; anything that is not a rule is an option of the search."""
    if not isinstance(rule, dict):
        return True
    tests = {
        "eq": lambda wanted: value == wanted or (wanted is False and value is None),
        "neq": lambda wanted: value != wanted,
        "gte": lambda wanted: value is not None and value >= wanted,
        "lte": lambda wanted: value is not None and value <= wanted,
        "gt": lambda wanted: value is not None and value > wanted,
        "lt": lambda wanted: value is not None and value < wanted,
        "in": lambda wanted: value in wanted,
        "notin": lambda wanted: value not in wanted,
    }
    return all(tests[operator](wanted) for operator, wanted in rule.items())
