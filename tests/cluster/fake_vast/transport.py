"""Connects an httpx client to the imitation without a socket."""

import httpx

from tests.cluster.fake_vast.api import FakeApi, NoAnswer


class FakeTransport(httpx.BaseTransport):
    """A time-out takes as long on the imitation's clock as the client allows."""

    def __init__(self, api: FakeApi) -> None:
        self._api = api

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            answer = self._api.handle(
                request.method,
                request.url.path,
                dict(request.url.params),
                {name.lower(): value for name, value in request.headers.items()},
                request.read(),
            )
        except NoAnswer as silence:
            if silence.refused:
                raise httpx.ConnectError("connection refused", request=request) from silence
            self._api.vast.clock.sleep(request.extensions["timeout"]["read"])
            raise httpx.ReadTimeout("timed out", request=request) from silence
        return httpx.Response(
            answer.status, content=answer.body, headers={"content-type": answer.content_type}, request=request
        )
