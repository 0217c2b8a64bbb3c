"""A server with OpenAI's API, asked for many chat completions at a time. Every failure is one line.

It is used by processes that run a command, not by workers: its address and its key mean something there.
"""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, TypeVar

from bruno_ray.errors import ServerError, first_line

if TYPE_CHECKING:
    import httpx

TRIES = 4
"""Requests for one completion, if the server says that it is busy."""

BUSY = (429, 503)

Item = TypeVar("Item")
Option = Callable[[str], str]
"""What users know a setting of the server as: ``url`` -> ``scoring.judge.url``, or ``--url``."""


class ChatServer:
    """Where it is, how it is asked, and what users call it."""

    def __init__(
        self, who: str, url: str, model: str, key_variable: str | None, timeout: float, concurrency: int, option: Option
    ):
        """Raises ServerError if the variable that shall hold the key is not set."""
        self.where = f"{who} at {url}"
        self.option = option
        self._who, self._model, self._timeout, self._concurrency = who, model, timeout, concurrency
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._headers = {}
        if key_variable is not None:
            key = os.environ.get(key_variable)
            if not key:
                raise ServerError(
                    f"{key_variable} is not set, and {option('key_variable')} names it: put the API key of {who} there"
                )
            self._headers["Authorization"] = f"Bearer {key}"

    def ask_all(
        self, items: Iterable[Item], body: Callable[[Item], dict[str, Any]], keep: Callable[[Item, dict], None]
    ) -> None:
        """Post ``body(item)`` for each item, and hand the first choice of the reply to ``keep`` as it comes.

        Raises ServerError at the first that cannot be had.
        """
        import httpx  # here, since a worker that never asks need not load it

        def ask(client: httpx.Client, item: Item) -> None:
            keep(item, self._choice(self._post(client, {"model": self._model, **body(item)})))

        limits = httpx.Limits(max_connections=self._concurrency)
        with (
            httpx.Client(headers=self._headers, timeout=self._timeout, limits=limits) as client,
            ThreadPoolExecutor(self._concurrency) as threads,
        ):
            asked = [threads.submit(ask, client, item) for item in items]
            try:
                for done in as_completed(asked):
                    done.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _post(self, client: "httpx.Client", body: dict[str, Any]) -> "httpx.Response":
        import httpx

        for tries_left in reversed(range(TRIES)):
            try:
                response = client.post(self._url, json=body)
            except httpx.TimeoutException as error:
                raise ServerError(
                    f"{self.where} did not answer within {self._timeout:g} s: raise {self.option('timeout')}, or lower"
                    f" {self.option('concurrency')}"
                ) from error
            except (httpx.TransportError, httpx.InvalidURL) as error:
                raise ServerError(
                    f"{self.where} cannot be reached ({first_line(error)}): start it, or correct {self.option('url')}"
                ) from error
            if response.status_code not in BUSY or not tries_left:
                break
            time.sleep(min(self._timeout, _seconds(response.headers.get("Retry-After"))))
        if response.status_code in (401, 403):
            raise ServerError(
                f"{self.where} wants another key (status {response.status_code}): set {self.option('key_variable')} to"
                " the name of the environment variable that holds it"
            )
        if response.status_code != 200:
            raise ServerError(
                f"{self.where} answered with status {response.status_code} ({_said(response)}): check"
                f" {self.option('url')} and {self.option('model')}"
            )
        return response

    def _choice(self, response: "httpx.Response") -> dict[str, Any]:
        try:
            choice = response.json()["choices"][0]
            if not isinstance(choice, dict):
                raise TypeError(choice)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise self.is_none() from error
        return choice

    def is_none(self) -> ServerError:
        """For a reply that is no chat completion."""
        return ServerError(
            f"{self.where} is no server of chat completions: {self.option('url')} must end where /chat/completions"
            " begins"
        )


def _seconds(header: str | None) -> float:
    """What Retry-After asks for; one second if it says nothing of use."""
    try:
        return max(0.0, float(header or 1))
    except ValueError:
        return 1.0


def _said(response: "httpx.Response") -> str:
    try:
        return first_line(str(response.json()["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return first_line(response.text) or response.reason_phrase
