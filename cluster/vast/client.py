"""Asking Vast.ai's API: typed requests and answers, retries within a deadline, errors that say how to react.

Reading, destroying and labelling may be repeated and are, with growing pauses, after 429, 5xx, time-outs and answers
that are not JSON. Creating may not: it is repeated only when the API certainly did nothing. An empty list therefore
always means that nothing exists; "could not ask" is a `VastUnavailableError`.
"""

import json
import logging
import random
from collections.abc import Iterator
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from cluster.clock import Clock, SystemClock
from cluster.vast.errors import (
    CreateFailedError,
    CreateUncertainError,
    OfferTakenError,
    VastAuthError,
    VastQuotaError,
    VastRefusedError,
    VastUnavailableError,
)
from cluster.vast.models import CreateRequest, Instance, Offer

logger = logging.getLogger(__name__)

DEADLINE_S = 30.0
"""Default for one call with its retries. Ray polls every five seconds, so a longer wait would only pile up."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
TIMEOUT = httpx.Timeout(20.0, connect=5.0)
PAGE_SIZE = 25
"""The API's maximum for the list of instances."""

Model = TypeVar("Model", bound=BaseModel)


class _TryAgain(Exception):
    """One attempt brought no usable answer; `sent` is False where the API certainly did nothing."""

    def __init__(self, reason: str, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


class VastClient:
    """Thread-safe; close it, or use it as a context manager."""

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        transport: httpx.BaseTransport | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._http = httpx.Client(
            base_url=base_url.rstrip("/"),
            headers={"Authorization": f"Bearer {api_key}", "Accept": "application/json"},
            timeout=TIMEOUT,
            transport=transport,
        )
        logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per poll would drown Ray's logs

    def __enter__(self) -> "VastClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def search_offers(self, query: dict[str, Any], deadline_s: float = DEADLINE_S) -> list[Offer]:
        """Offers that match `query` (Vast.ai's own filter language, see `offers.search_query`)."""
        return _models(Offer, self._ask("POST", "/api/v0/bundles/", query, deadline_s), "offers")

    def instances(self, deadline_s: float = DEADLINE_S) -> list[Instance]:
        """All instances of the account, every page; an empty list means that there are none."""
        return list(self._pages(self._clock.time() + deadline_s))

    def instance(self, instance_id: int, deadline_s: float = DEADLINE_S) -> Instance | None:
        """One instance, or None where it does not exist (any more)."""
        try:
            answer = self._ask("GET", f"/api/v0/instances/{instance_id}/", None, deadline_s, params={"owner": "me"})
        except VastRefusedError as error:
            if error.code in ("no_such_instance", "404"):
                return None
            raise
        row = answer.get("instances")
        return None if row is None else _models(Instance, {"instances": [row]}, "instances")[0]

    def create_instance(self, offer_id: int, request: CreateRequest, deadline_s: float = DEADLINE_S) -> int:
        """Rent an offer; returns the contract's number.

        Raises:
            OfferTakenError: the offer is gone, nothing was created.
            CreateFailedError: an error, and a contract that must be destroyed.
            CreateUncertainError: no answer, so there may be a contract; look for its label and env.
            VastError: refused, or not asked at all; nothing was created.
        """
        body = request.model_dump(exclude_none=True)
        try:
            answer = self._ask("PUT", f"/api/v0/asks/{offer_id}/", body, deadline_s, repeatable=False)
        except VastRefusedError as error:
            if error.code in ("no_such_ask", "not_available", "already_rented"):
                raise OfferTakenError(str(error), error.code) from error
            raise
        contract = answer.get("new_contract")
        if not isinstance(contract, int):
            raise CreateUncertainError(f"Vast.ai accepted offer {offer_id} but named no contract: {_short(answer)}")
        return contract

    def destroy_instance(self, instance_id: int, deadline_s: float = DEADLINE_S) -> None:
        """Destroy a contract; one that does not exist counts as destroyed."""
        try:
            self._ask("DELETE", f"/api/v0/instances/{instance_id}/", {}, deadline_s)
        except VastRefusedError as error:
            if error.code not in ("no_such_instance", "404"):
                raise

    def set_label(self, instance_id: int, label: str, deadline_s: float = DEADLINE_S) -> None:
        self._ask("PUT", f"/api/v0/instances/{instance_id}/", {"label": label}, deadline_s)

    def attach_ssh_key(self, instance_id: int, public_key: str, deadline_s: float = DEADLINE_S) -> None:
        """Let this key into one instance, without adding it to the account."""
        self._ask("POST", f"/api/v0/instances/{instance_id}/ssh/", {"ssh_key": public_key}, deadline_s)

    def change_bid(self, instance_id: int, price: float, deadline_s: float = DEADLINE_S) -> None:
        """Raise or lower the bid of an interruptible instance, in dollars per hour."""
        body = {"client_id": "me", "price": price}
        self._ask("PUT", f"/api/v0/instances/bid_price/{instance_id}/", body, deadline_s)

    def logs(self, instance_id: int, tail: int = 200, deadline_s: float = DEADLINE_S) -> str:
        """The container's last lines. The API answers with a URL that holds them some seconds later."""
        deadline = self._clock.time() + deadline_s
        answer = self._ask("PUT", f"/api/v0/instances/request_logs/{instance_id}/", {"tail": str(tail)}, deadline_s)
        url = answer.get("result_url")
        while url:
            # Without our headers: the URL is signed and belongs to a storage service.
            response = httpx.get(url, timeout=TIMEOUT)
            if response.status_code == 200:
                return response.text
            if self._clock.time() >= deadline:
                raise VastUnavailableError(f"the logs of instance {instance_id} did not arrive; ask again later")
            self._clock.sleep(1.0)
        raise VastRefusedError(f"no logs of instance {instance_id}: {_short(answer)}", str(answer.get("error", "")))

    def _pages(self, deadline: float) -> Iterator[Instance]:
        params = {"limit": str(PAGE_SIZE), "order_by": json.dumps([{"col": "id", "dir": "asc"}])}
        while True:
            answer = self._ask("GET", "/api/v1/instances/", None, deadline - self._clock.time(), params=params)
            yield from _models(Instance, answer, "instances")
            if not answer.get("next_token"):
                return
            params = {**params, "after_token": str(answer["next_token"])}

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        deadline_s: float,
        *,
        params: dict[str, str] | None = None,
        repeatable: bool = True,
    ) -> dict[str, Any]:
        """The answer's JSON object. Repeats until `deadline_s` has passed, at least once."""
        deadline = self._clock.time() + deadline_s
        pause = FIRST_PAUSE_S
        while True:
            try:
                return self._attempt(method, path, body, params)
            except _TryAgain as reason:
                if reason.sent and not repeatable:
                    raise CreateUncertainError(f"no usable answer to {method} {path}: {reason}") from reason
                # Jitter, so that laptop and head do not ask in step.
                wait = pause * random.uniform(0.75, 1.25)
                if self._clock.time() + wait >= deadline:
                    raise VastUnavailableError(
                        f"Vast.ai did not answer {method} {path} within {deadline_s:.0f} s ({reason}); try again later"
                    ) from reason
                logger.debug("%s %s: %s; again in %.1f s", method, path, reason, wait)
                self._clock.sleep(wait)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _attempt(
        self, method: str, path: str, body: dict[str, Any] | None, params: dict[str, str] | None
    ) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, json=body, params=params)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise _TryAgain(f"no connection: {error}", sent=False) from error
        except httpx.TransportError as error:
            raise _TryAgain(f"{type(error).__name__}: {error}", sent=True) from error
        answer = _json_object(response)
        message = _message(answer, response)
        if answer is not None and isinstance(answer.get("new_contract"), int) and not _succeeded(answer, response):
            raise CreateFailedError(message, answer["new_contract"])
        if response.status_code == 429:
            # The API has no code for a used-up quota, only the words.
            if any(word in message.lower() for word in ("quota", "daily")):
                raise VastQuotaError(f"{message}; wait until tomorrow or ask Vast.ai to raise the quota")
            raise _TryAgain(f"429 {message}", sent=False)
        if response.status_code >= 500:
            raise _TryAgain(f"{response.status_code} {message}", sent=True)
        if response.status_code in (401, 403):
            raise VastAuthError(
                f"Vast.ai refuses the API key ({response.status_code} {message}); check it and its rights"
            )
        if response.status_code >= 400 or (answer is not None and answer.get("success") is False):
            code = "" if answer is None else str(answer.get("error") or response.status_code)
            raise VastRefusedError(f"Vast.ai refused {method} {path}: {message}", code)
        if answer is None:
            raise _TryAgain(f"an answer that is not JSON: {response.text[:80]!r}", sent=True)
        return answer


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
    words = [str(answer[key]) for key in ("error", "msg", "message") if answer.get(key)]
    return ": ".join(words) or response.reason_phrase


def _models(model: type[Model], answer: dict[str, Any], what: str) -> list[Model]:
    """The rows of `answer[what]`; a list that is missing or unreadable must not pass for a shorter one."""
    rows = answer.get(what)
    if not isinstance(rows, list):
        raise VastUnavailableError(f"Vast.ai's answer holds no {what}: {_short(answer)}; try again later")
    try:
        return [model.model_validate(row) for row in rows]
    except ValidationError as error:
        raise VastUnavailableError(
            f"Vast.ai's {what} cannot be read ({_short(error)}); its API may have changed"
        ) from error


def _short(value: object) -> str:
    return str(value).replace("\n", " ")[:200]
