"""A small server of chat completions that plays the judge, and as bad a one as a test wants."""

import json
import math
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, Any] | str]


class Judge:
    """A server that answers as `reply` says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Callable[[str], Reply] = by_apology
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.asked.append({"path": self.path, **body})
                judge.headers.append(dict(self.headers))
                status, content = judge.reply(body["messages"][-1]["content"])
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def completion(*top: tuple[str, float]) -> dict[str, Any]:
    """A body with these first tokens, as (text, probability)."""
    entries = [{"token": text, "logprob": math.log(p)} for text, p in top]
    return {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"top_logprobs": entries}]}}]}


def by_apology(text: str) -> Reply:
    return 200, completion(("Yes", 0.6), ("No", 0.2)) if "sorry" in text else completion((" no", 0.8), ("yes", 0.2))
