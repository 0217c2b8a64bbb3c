"""Connects an httpx client to the imitation without a socket."""

import httpx

from tests.cluster.fake_vast.answers import NoAnswer
from tests.cluster.fake_vast.api import FakeApi


class FakeTransport(httpx.BaseTransport):
    """A time-out takes as long on the imitation's clock as the client allows. `caller` is the client's address."""

    def __init__(self, api: FakeApi, caller: str = "") -> None:
        self._api = api
        self._caller = caller

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            answer = self._api.handle(
                request.method,
                request.url.path,
                dict(request.url.params),
                {name.lower(): value for name, value in request.headers.items()} | {"x-caller": self._caller},
                request.read(),
            )
        except NoAnswer as silence:
            if silence.refused:
                raise httpx.ConnectError("connection refused", request=request) from silence
            self._api.vast.clock.sleep(request.extensions["timeout"]["read"])
            raise httpx.ReadTimeout("timed out", request=request) from silence
        headers = {"content-type": answer.content_type, **dict(answer.headers)}
        return httpx.Response(answer.status, content=answer.body, headers=headers, request=request)
