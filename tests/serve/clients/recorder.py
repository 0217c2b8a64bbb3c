"""What other people's clients send: written down by a proxy in front of a server, and sent again without them.

    RECORD_CLIENTS=1 python -m pytest -m nightly tests/serve/test_clients.py      # rewrites recorded/*.json

``test_recorded_clients.py`` sends what is recorded; the nightly ``test_clients.py`` runs the clients themselves, and
says when what they send has changed.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from tests.serve.environments import RECORDED, python_of, run_team
from tests.serve.server import Server

FOLDER = Path(__file__).parent / "recorded"
HEADERS = ("content-type", "accept")
TEAM_MODELS = {"orchestrator": "base", "first": "trial", "second": "selected"}


@dataclass(frozen=True)
class Sent:
    """One request of a client. Model ids are placeholders, such as ``{base}``."""

    method: str
    path: str
    """Below the address of the server."""

    headers: dict[str, str]
    body: Any
    status: int

    @property
    def shape(self) -> tuple:
        """What does not depend on the answers that the client got before."""
        fields = sorted(self.body) if isinstance(self.body, dict) else None
        return self.method, self.path, fields, self.status


def models_of(server: Server) -> dict[str, str]:
    """Placeholder -> model id."""
    names = ("base", "selected", "saved", "talkative")
    return {f"{{{name}}}": getattr(server, name) for name in names} | {"{trial}": server.trials[0]}


@contextmanager
def recording(server: Server) -> Iterator[tuple[Server, list[Sent]]]:
    """The server as it is reached through a proxy that writes down what is asked of it."""
    sent: list[Sent] = []
    placeholders = {model: name for name, model in models_of(server).items()}
    lock = threading.Lock()

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            passed_on = dict(self.headers)
            for name in ("Host", "Accept-Encoding"):
                passed_on.pop(name, None)
            with httpx.Client(timeout=300) as client:
                answer = client.request(self.command, server.url + self.path, content=content, headers=passed_on)
            body = json.loads(content) if content else None
            if isinstance(body, dict) and "model" in body:
                body["model"] = placeholders.get(body["model"], body["model"])
            headers = {name: self.headers[name] for name in HEADERS if name in self.headers}
            with lock:
                sent.append(Sent(self.command, self.path, headers, body, answer.status_code))
            self.send_response(answer.status_code)
            for name in ("content-type", "retry-after"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = forward

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield replace(server, url=f"http://127.0.0.1:{proxy.server_port}"), sent
        finally:
            proxy.shutdown()


def run_recorded(name: str, server: Server, folder: Path) -> list[Sent]:
    """Run a client, and say what it sent."""
    with recording(server) as (proxied, sent):
        if name == "team":
            names = {role: models_of(server)[f"{{{model}}}"] for role, model in TEAM_MODELS.items()}
            done = run_team(
                python_of("crewai"), folder, key=server.key, base_url=proxied.base_url, max_tokens=6, **names
            )
            assert done.returncode == 0, done.stderr[-2000:]
        else:
            RECORDED[name].run(proxied, folder)
    return sent


NAMES = (*RECORDED, "team")


def read(name: str) -> list[Sent]:
    return [Sent(**entry) for entry in json.loads((FOLDER / f"{name}.json").read_text())]


def write(name: str, sent: Sequence[Sent]) -> None:
    """One request a line, so that a change of a client is a change of lines."""
    lines = ",\n".join(json.dumps(vars(entry)) for entry in sent)
    (FOLDER / f"{name}.json").write_text(f"[\n{lines}\n]\n")
