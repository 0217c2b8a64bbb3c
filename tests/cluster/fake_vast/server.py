"""The imitation as a server, for clients in other processes and network namespaces."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from tests.cluster.fake_vast.answers import NoAnswer
from tests.cluster.fake_vast.api import FakeApi

SILENCE_S = 25.0
"""Longer than the client's own time-out."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        headers["x-caller"] = self.client_address[0]
        try:
            answer = self.server.api.handle(self.command, url.path, dict(parse_qsl(url.query)), headers, body)
        except NoAnswer as silence:
            if not silence.refused:
                time.sleep(self.server.silence_s)
            self.close_connection = True
            return
        self.send_response(answer.status)
        self.send_header("content-type", answer.content_type)
        for name, value in answer.headers:
            self.send_header(name, value)
        self.send_header("content-length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_PUT = do_POST = do_DELETE = _serve

    def log_message(self, format: str, *args: object) -> None:
        """`FakeApi.requests` is the log."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    api: FakeApi
    silence_s: float


class FakeServer:
    """Listens from construction on, in the network namespace of the constructing thread; a context manager."""

    def __init__(self, api: FakeApi, host: str = "127.0.0.1", port: int = 0, silence_s: float = SILENCE_S) -> None:
        self._server = _Server((host, port), _Handler)
        self._server.api, self._server.silence_s = api, silence_s
        api.storage_url = self.url
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host}:{port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
