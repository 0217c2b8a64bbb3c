"""Asking Vast.ai's API: typed requests and answers, retries within a deadline, errors that say how to react.

Reading, destroying and labelling may be repeated and are, with growing pauses, after 429, 5xx, time-outs and answers
that are not JSON. Creating may not: it is repeated only when the API certainly did nothing. An empty list therefore
always means that nothing exists; "could not ask" is a `VastUnavailableError`. No request comes sooner than the
documented rate limits allow (cluster/vast/pace.py). Rows are read one by one, because an account may hold instances of
others with anything in them.
"""

import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import httpx
from pydantic import ValidationError

from cluster.clock import Clock, SystemClock
from cluster.vast.errors import (
    CreateFailedError,
    CreateUncertainError,
    OfferTakenError,
    VastAuthError,
    VastCreditError,
    VastQuotaError,
    VastRefusedError,
    VastUnavailableError,
)
from cluster.vast.models import CreateRequest, Instance, Offer, WireModel
from cluster.vast.pace import Endpoint, Pace, TooSoonError

logger = logging.getLogger(__name__)

SEARCH_DEADLINE_S = 90.0
"""For one search: ten a minute are allowed, so the next turn may be a minute away."""

DEADLINE_S = 30.0
"""Default for one call with its retries. Ray polls every five seconds, so a longer wait would only pile up."""

LOGS_DEADLINE_S, LOGS_PAUSE_S = 30.0, 0.5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
TIMEOUT = httpx.Timeout(20.0, connect=5.0)
PAGE_SIZE = 25
"""The API's maximum for the list of instances."""

OFFERS_PER_SEARCH = 64
"""The API's maximum for a search, whatever limit it is asked with."""

DAY_S = 86400.0
TAKEN_WORDS = ("no_such_ask", "not available", "no longer available", "already_rented", "not_available")
CREDIT_WORDS = ("insufficient_credit", "insufficient credit", "lacks credit")
QUOTA_WORDS = ("quota", "daily")
AUTH_WORDS = ("auth_error", "invalid user key")

Model = TypeVar("Model", bound=WireModel)


@dataclass(frozen=True)
class OfferPage:
    """What one search brought."""

    offers: list[Offer]

    cut: bool
    """There are more than one search brings."""


class _TryAgain(Exception):
    """One attempt brought no usable answer; `sent` is False where the API certainly did nothing."""

    def __init__(self, reason: str, sent: bool, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.sent = sent
        self.wait_s = wait_s
        """How long it is no use to ask again."""


class VastClient:
    """Thread-safe; close it, or use it as a context manager."""

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        transport: httpx.BaseTransport | None = None,
        clock: Clock | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._pace = pace or Pace(self._clock)
        self._http = httpx.Client(
            base_url=base_url.rstrip("/"),
            headers={"Authorization": f"Bearer {api_key}", "Accept": "application/json"},
            timeout=TIMEOUT,
            transport=transport,
        )
        self._transport = transport
        logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per poll would drown Ray's logs

    def __enter__(self) -> "VastClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def search_offers(self, query: dict[str, Any], deadline_s: float = SEARCH_DEADLINE_S) -> OfferPage:
        """Offers that match `query` (Vast.ai's own filter language, see `offers.search_query`)."""
        answer = self._ask(Endpoint.SEARCH, "POST", "/api/v0/bundles/", query, deadline_s)
        rows = _rows(answer, "offers")
        return OfferPage(
            _models(Offer, rows, "offers"), bool(answer.get("truncated")) or len(rows) >= OFFERS_PER_SEARCH
        )

    def credit(self, deadline_s: float = DEADLINE_S) -> float | None:
        """Dollars that the account has left; None where the key may not know (it lacks `user_read`)."""
        try:
            answer = self._ask(Endpoint.OTHER, "GET", "/api/v0/users/current/", None, deadline_s)
        except (VastAuthError, VastRefusedError) as error:
            logger.debug("the account's credit cannot be asked for with this key: %s", error)
            return None
        credit = answer.get("credit")
        return float(credit) if isinstance(credit, int | float) else None

    def instances(self, deadline_s: float = DEADLINE_S) -> list[Instance]:
        """All instances of the account, every page; an empty list means that there are none."""
        return list(self._pages(self._clock.time() + deadline_s))

    def instance(self, instance_id: int, deadline_s: float = DEADLINE_S) -> Instance | None:
        """One instance, or None where it does not exist (any more)."""
        try:
            answer = self._ask(
                Endpoint.SHOW, "GET", f"/api/v0/instances/{instance_id}/", None, deadline_s, params={"owner": "me"}
            )
        except VastRefusedError as error:
            if error.means_gone:
                return None
            raise
        row = answer.get("instances")
        return None if row is None else _models(Instance, [row], "instances")[0]

    def create_instance(self, offer_id: int, request: CreateRequest, deadline_s: float = DEADLINE_S) -> int:
        """Rent an offer; returns the contract's number.

        Raises:
            OfferTakenError: the offer is gone, nothing was created.
            CreateFailedError: an error, and a contract that must be destroyed.
            CreateUncertainError: no answer, so there may be a contract; look for its label and env.
            VastCreditError: the account has no credit.
            VastError: refused, or not asked at all; nothing was created.
        """
        body = request.model_dump(exclude_none=True)
        try:
            answer = self._ask(Endpoint.CREATE, "PUT", f"/api/v0/asks/{offer_id}/", body, deadline_s, repeatable=False)
        except VastRefusedError as error:
            words = f"{error.code} {error}".lower()
            if error.status in (404, 410) or any(word in words for word in TAKEN_WORDS):
                raise OfferTakenError(str(error), error.code, error.status) from error
            raise
        contract = answer.get("new_contract")
        if not isinstance(contract, int):
            raise CreateUncertainError(f"Vast.ai accepted offer {offer_id} but named no contract: {_short(answer)}")
        return contract

    def destroy_instance(self, instance_id: int, deadline_s: float = DEADLINE_S) -> None:
        """Destroy a contract; one that does not exist counts as destroyed."""
        try:
            self._ask(Endpoint.DESTROY, "DELETE", f"/api/v0/instances/{instance_id}/", {}, deadline_s)
        except VastRefusedError as error:
            if not error.means_gone:
                raise

    def set_label(self, instance_id: int, label: str, deadline_s: float = DEADLINE_S) -> None:
        self._ask(Endpoint.CHANGE, "PUT", f"/api/v0/instances/{instance_id}/", {"label": label}, deadline_s)

    def set_state(self, instance_id: int, state: Literal["stopped", "running"], deadline_s: float = DEADLINE_S) -> None:
        """Order a machine to stop, which keeps its disk, or to start again. That it is accepted says no more."""
        self._ask(Endpoint.CHANGE, "PUT", f"/api/v0/instances/{instance_id}/", {"state": state}, deadline_s)

    def attach_ssh_key(self, instance_id: int, public_key: str, deadline_s: float = DEADLINE_S) -> None:
        """Let this key into one instance, without adding it to the account."""
        self._ask(Endpoint.OTHER, "POST", f"/api/v0/instances/{instance_id}/ssh/", {"ssh_key": public_key}, deadline_s)

    def change_bid(self, instance_id: int, price: float, deadline_s: float = DEADLINE_S) -> None:
        """Raise or lower the bid of an interruptible instance, in dollars per hour."""
        body = {"client_id": "me", "price": price}
        self._ask(Endpoint.BID, "PUT", f"/api/v0/instances/bid_price/{instance_id}/", body, deadline_s)

    def logs(
        self, instance_id: int, tail: int = 1000, *, of_host: bool = False, deadline_s: float = LOGS_DEADLINE_S
    ) -> str:
        """The last lines of the container, or `of_host` of the host's service that made it.

        The API answers with a URL that holds them some seconds later. Raises `VastError`.
        """
        deadline = self._clock.time() + deadline_s
        body = {"tail": str(tail)} | ({"daemon_logs": "true"} if of_host else {})
        path = f"/api/v0/instances/request_logs/{instance_id}/"
        answer = self._ask(Endpoint.OTHER, "PUT", path, body, deadline_s)
        url = answer.get("result_url")
        if not isinstance(url, str) or not url.startswith(("https://", "http://")):
            raise VastRefusedError(f"no logs of instance {instance_id}: {_short(answer)}", str(answer.get("error", "")))
        # A storage service by a signed URL, which must not be sent our key.
        with httpx.Client(timeout=TIMEOUT, transport=self._transport) as storage:
            while True:
                try:
                    response = storage.get(url)
                    if response.status_code == 200:
                        return response.text
                except httpx.TransportError as error:
                    logger.debug("the logs of instance %d: %s", instance_id, error)
                if self._clock.time() >= deadline:
                    raise VastUnavailableError(f"the logs of instance {instance_id} did not arrive; ask again later")
                self._clock.sleep(LOGS_PAUSE_S)

    def _pages(self, deadline: float) -> Iterator[Instance]:
        params = {"limit": str(PAGE_SIZE), "order_by": json.dumps([{"col": "id", "dir": "asc"}])}
        while True:
            left_s = deadline - self._clock.time()
            answer = self._ask(Endpoint.LIST, "GET", "/api/v1/instances/", None, left_s, params=params)
            yield from _models(Instance, _rows(answer, "instances"), "instances")
            if not answer.get("next_token"):
                return
            params = {**params, "after_token": str(answer["next_token"])}

    def _ask(
        self,
        endpoint: Endpoint,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        deadline_s: float,
        *,
        params: dict[str, str] | None = None,
        repeatable: bool = True,
    ) -> dict[str, Any]:
        """The answer's JSON object. Repeats until `deadline_s` has passed, at least once if it is our turn by then."""
        deadline = self._clock.time() + deadline_s
        pause = FIRST_PAUSE_S
        while True:
            try:
                self._pace.wait(endpoint, deadline)
            except TooSoonError as reason:
                raise VastUnavailableError(f"{method} {path} was not asked: {reason}; try again later") from reason
            try:
                return self._attempt(endpoint, method, path, body, params)
            except _TryAgain as reason:
                if reason.sent and not repeatable:
                    raise CreateUncertainError(f"no usable answer to {method} {path}: {reason}") from reason
                # Jitter, so that laptop and head do not ask in step.
                wait = max(pause * random.uniform(0.75, 1.25), reason.wait_s)
                if self._clock.time() + wait >= deadline:
                    raise VastUnavailableError(
                        f"Vast.ai did not answer {method} {path} within {deadline_s:.0f} s ({reason}); try again later"
                    ) from reason
                logger.debug("%s %s: %s; again in %.1f s", method, path, reason, wait)
                self._clock.sleep(wait)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _attempt(
        self, endpoint: Endpoint, method: str, path: str, body: dict[str, Any] | None, params: dict[str, str] | None
    ) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, json=body, params=params)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise _TryAgain(f"no connection: {error}", sent=False) from error
        except httpx.TransportError as error:
            raise _TryAgain(f"{type(error).__name__}: {error}", sent=True) from error
        answer = _json_object(response)
        message = _message(answer, response)
        words = message.lower()
        if answer is not None and isinstance(answer.get("new_contract"), int) and not _succeeded(answer, response):
            raise CreateFailedError(message, answer["new_contract"])
        if response.status_code == 429:
            self._refuse_429(endpoint, message, _seconds(response.headers.get("Retry-After")))
        if response.status_code >= 500:
            raise _TryAgain(f"{response.status_code} {message}", sent=True)
        failed = response.status_code >= 400 or (answer is not None and answer.get("success") is False)
        if response.status_code in (401, 403) or (failed and any(word in words for word in AUTH_WORDS)):
            raise VastAuthError(
                f"Vast.ai refuses the API key ({response.status_code} {message}); check it and its rights"
            )
        if response.status_code == 402 or (failed and any(word in words for word in CREDIT_WORDS)):
            raise VastCreditError(f"the Vast.ai account has no credit ({message}); add some in its console, then go on")
        if failed:
            code = "" if answer is None else str(answer.get("error") or response.status_code)
            raise VastRefusedError(f"Vast.ai refused {method} {path}: {message}", code, response.status_code)
        if answer is None:
            raise _TryAgain(f"an answer that is not JSON: {response.text[:80]!r}", sent=True)
        return answer

    def _refuse_429(self, endpoint: Endpoint, message: str, retry_after_s: float | None) -> None:
        """Raises `VastQuotaError` where the day's quota is meant, `_TryAgain` otherwise."""
        if any(word in message.lower() for word in QUOTA_WORDS):
            now = self._clock.time()
            until = now - now % DAY_S + DAY_S if retry_after_s is None else now + retry_after_s
            raise VastQuotaError(
                f"{message}; wait {(until - now) / 3600:.1f} h or ask Vast.ai to raise the quota", until
            )
        raise _TryAgain(f"429 {message}", sent=False, wait_s=self._pace.refused(endpoint, retry_after_s))


def _json_object(response: httpx.Response) -> dict[str, Any] | None:
    try:
        answer = response.json()
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _succeeded(answer: dict[str, Any], response: httpx.Response) -> bool:
    return response.status_code < 400 and answer.get("success") is not False


def _message(answer: dict[str, Any] | None, response: httpx.Response) -> str:
    if answer is None:
        return response.text.strip()[:200] or response.reason_phrase
    words = [str(answer[key]) for key in ("error", "msg", "message", "detail") if answer.get(key)]
    return ": ".join(words) or response.reason_phrase


def _seconds(text: str | None) -> float | None:
    """Of a Retry-After header that counts seconds."""
    try:
        return None if text is None else max(float(text), 0.0)
    except ValueError:
        return None


def _rows(answer: dict[str, Any], what: str) -> list[Any]:
    """`answer[what]`; a list that is missing must not pass for an empty one."""
    rows = answer.get(what)
    if not isinstance(rows, list):
        raise VastUnavailableError(f"Vast.ai's answer holds no {what}: {_short(answer)}; try again later")
    return rows


def _models(model: type[Model], rows: list[Any], what: str) -> list[Model]:
    """The rows that say what they are about. Raises `VastUnavailableError` where not a single one does."""
    read: list[Model] = []
    unreadable: ValidationError | None = None
    for row in rows:
        try:
            read.append(model.of_row(row))
        except ValidationError as error:
            unreadable = error
            logger.warning("a row of Vast.ai's %s cannot be read and is left out: %s", what, _short(error))
    if unreadable is not None and not read:
        raise VastUnavailableError(
            f"Vast.ai's {what} cannot be read ({_short(unreadable)}); its API may have changed"
        ) from unreadable
    return read


def _short(value: object) -> str:
    return str(value).replace("\n", " ")[:200]
