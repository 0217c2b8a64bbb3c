"""The rate limits that Vast.ai documents (`x-rate-limit` in its OpenAPI files), per caller and endpoint.

A caller is a key at an address. `asks` has a penalty: whoever asks too early waits so long from that request on, and
asking meanwhile begins the wait anew. 429 comes in the documented shapes, one after the other: plain text, `detail`,
and `error` with `msg`; every second one says how long to wait.
"""

import itertools
import re
import threading
from collections import defaultdict, deque
from dataclasses import dataclass

from tests.cluster.fake_vast.answers import Answer

Caller = tuple[str, str]
"""Key and address."""


@dataclass(frozen=True)
class Limit:
    """At most `requests` within `seconds`; who passes it is refused for `penalty_s` more."""

    requests: int
    seconds: float
    penalty_s: float = 0.0


LIMITS = {
    "POST /api/v0/bundles": Limit(10, 60.0),
    "PUT /api/v0/asks/N": Limit(1, 4.5, penalty_s=12.0),
    "DELETE /api/v0/instances/N": Limit(1, 3.0),
    "GET /api/v0/instances/N": Limit(1, 2.0),
    "GET /api/v1/instances": Limit(1, 1.0),
    "PUT /api/v0/instances/N": Limit(1, 1.0),
    "PUT /api/v0/instances/bid_price/N": Limit(1, 5.5),
}
ROUNDING_S = 1e-6


class Rates:
    def __init__(self) -> None:
        self.passed: list[tuple[float, Caller, str]] = []
        """Every request that came too early: when, from whom, to which endpoint."""
        self._accepted: dict[tuple[Caller, str], deque[float]] = defaultdict(deque)
        self._barred_until: dict[tuple[Caller, str], float] = {}
        self._shapes = itertools.count()
        self._lock = threading.Lock()

    def refusal(self, caller: Caller, method: str, path: str, now: float) -> Answer | None:
        """None where the request is in time."""
        route = f"{method} {re.sub(r'(?<=/)[0-9]+(?=/|$)', 'N', path.rstrip('/'))}"
        limit = LIMITS.get(route)
        if limit is None:
            return None
        with self._lock:
            accepted = self._accepted[caller, route]
            while accepted and accepted[0] <= now - limit.seconds + ROUNDING_S:
                accepted.popleft()
            barred = self._barred_until.get((caller, route), 0.0)
            if now >= barred - ROUNDING_S and len(accepted) < limit.requests:
                accepted.append(now)
                return None
            self.passed.append((now, caller, route))
            wait = max(limit.penalty_s, limit.seconds)
            if limit.penalty_s:
                self._barred_until[caller, route] = now + limit.penalty_s
            return too_frequent(next(self._shapes), limit.seconds / limit.requests, wait)


def too_frequent(shape: int, threshold: float, wait_s: float) -> Answer:
    """429 in one of its documented shapes."""
    words = f"API requests too frequent endpoint threshold={threshold}"
    answers = [
        Answer.text(words.replace("frequent ", "frequent: "), 429),
        Answer.json({"detail": words}, 429),
        Answer.json({"success": False, "error": "rate_limit_exceeded", "msg": words}, 429),
    ]
    answer = answers[shape % len(answers)]
    return answer.with_header("Retry-After", str(int(wait_s) + 1)) if shape % 2 else answer
