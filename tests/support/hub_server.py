"""A hub with one data set repository, as far as `datasets` and `huggingface_hub` ask for it over HTTP."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_with(repository: str, files: dict[str, bytes]) -> Iterator[str]:
    """The address of a hub that has ``repository`` (owner/name), at any revision, with these files and nothing else."""

    def described(path: str) -> dict[str, object]:
        return {"type": "file", "path": path, "size": len(files[path]), "oid": hashlib.sha1(files[path]).hexdigest()}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            api, _, rest = path.partition(f"/datasets/{repository}")
            if api == "/api" and rest.startswith("/tree/"):
                below = rest.removeprefix("/tree/").partition("/")[2]
                self._json(200, [described(name) for name in files if name.startswith(below)])
            elif api == "/api":
                siblings = [{"rfilename": name} for name in files]
                self._json(200, {"id": repository, "sha": COMMIT, "tags": [], "siblings": siblings})
            elif rest.startswith("/resolve/"):
                name = rest.removeprefix("/resolve/").partition("/")[2]
                if name in files:
                    headers = {"ETag": f'"{described(name)["oid"]}"', "X-Repo-Commit": COMMIT}
                    self._send(200, files[name], headers)
                else:
                    self._json(404, {}, {"X-Error-Code": "EntryNotFound"})
            else:
                self._json(404, {}, {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            """Which of these paths there are."""
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self._json(200, [described(name) for name in asked.get("paths", []) if name in files])

        def _json(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
            self._send(status, json.dumps(content).encode(), headers or {})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
