"""A hub for models over real HTTP, as far as huggingface_hub asks for it to publish: login, repositories, the LFS flow
(preupload, batch, upload, verify) and commits. What was uploaded and not committed stays in its storage, as there."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

import yaml

TOKEN = "hf_write"
LFS = (".safetensors", ".gguf")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class ModelHub:
    """The server and what it has; `url` goes into HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.role = "write"
        self.stored: dict[str, bytes] = {}
        """The LFS storage, by SHA-256."""

        self.uploads: list[str] = []
        """SHA-256 of every upload that came in whole, in order."""

        self.requests: list[tuple[str, str]] = []
        """(method, path)"""

        self.failing: dict[str, list[int]] = {}
        """Pattern of a path -> statuses that it answers with next."""

        self.hold_after: int | None = None
        """Uploads after this many are not read until `release`."""

        self.holding, self.release = threading.Event(), threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                hub.answer(self)

            do_GET = do_POST = do_PUT = handle_any

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self._http.shutdown()
        self._http.server_close()

    def asked(self, method: str, pattern: str) -> int:
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.requests)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urlparse(request.path)
        path = unquote(url.path)
        self.requests.append((request.command, path))
        length = int(request.headers.get("Content-Length") or 0)
        if request.command == "PUT" and self.hold_after is not None and len(self.uploads) >= self.hold_after:
            request.rfile.read(length // 2)
            self.holding.set()
            self.release.wait()
        body = request.rfile.read(length)
        for pattern, statuses in self.failing.items():
            if re.search(pattern, path) and statuses:
                return _send(request, statuses.pop(0), {"error": "out of order"})
        if path == "/api/validate-yaml":  # needs no login
            return self._validate(request, json.loads(body)["content"])
        if not path.startswith("/storage/") and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _send(request, 401, {"error": "Invalid credentials"})
        if path == "/api/whoami-v2":
            auth = {"accessToken": {"displayName": "test", "role": self.role}}
            return _send(request, 200, {"name": "me", "orgs": [{"name": "team"}], "auth": auth})
        if path == "/api/repos/create":
            return self._create(request, json.loads(body))
        if match := re.fullmatch(r"/storage/(\w{64})", path):
            return self._store(request, match[1], body)
        if match := re.fullmatch(r"/verify/(\w{64})", path):
            given = json.loads(body)
            whole = len(self.stored.get(match[1], b"")) == given["size"] and given["oid"] == match[1]
            return _send(request, 200 if whole else 404, {})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/main)?", path) or re.fullmatch(
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch)", path
        )
        if match is None or match[1] not in self.repos:
            return _send(request, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        repo, what = self.repos[match[1]], match[2]
        if what is None:
            info = {"id": match[1], "private": repo.private, "sha": COMMIT, "tags": [], "siblings": []}
            return _send(request, 200, info)
        if what == "tree":
            if parse_qs(url.query).get("recursive", [""])[0].lower() != "true":
                return _send(request, 400, {"error": "this hub lists whole trees only"})
            return _send(request, 200, [_entry(name, content) for name, content in repo.files.items()])
        if what == "preupload":
            return _send(request, 200, {"files": [_mode(file, repo) for file in json.loads(body)["files"]]})
        if what == "batch":
            return self._batch(request, json.loads(body))
        return self._commit(request, match[1], repo, body)

    def _create(self, request: BaseHTTPRequestHandler, given: dict) -> None:
        name = f"{given.get('organization') or 'me'}/{given['name']}"
        status = 409 if name in self.repos else 200
        self.repos.setdefault(name, Repo(private=given.get("visibility") == "private" or bool(given.get("private"))))
        _send(request, status, {"url": f"{self.url}/{name}"})

    def _validate(self, request: BaseHTTPRequestHandler, content: str) -> None:
        """What the hub insists on of what our cards hold."""
        data = yaml.safe_load(content.split("---")[1])
        errors = []
        if not re.fullmatch(r"[a-z0-9.-]+", str(data.get("license", "mit"))):
            errors.append('"license" must be one of [apache-2.0, mit, ...]')
        for model in data.get("model-index", []):
            for result in model["results"]:
                if (
                    not {"task", "dataset", "metrics"} <= result.keys()
                    or not {"type", "name"} <= result["dataset"].keys()
                ):
                    errors.append('"model-index[0].results[0]" is incomplete')
        _send(request, 400 if errors else 200, {"errors": [{"message": text} for text in errors], "warnings": []})

    def _store(self, request: BaseHTTPRequestHandler, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return _send(request, 400, {"error": "another hash"})
        self.stored[oid] = body
        self.uploads.append(oid)
        return _send(request, 200, {})

    def _batch(self, request: BaseHTTPRequestHandler, given: dict) -> None:
        objects = []
        for wanted in given["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.stored:
                entry["actions"] = {
                    "upload": {"href": f"{self.url}/storage/{wanted['oid']}"},
                    "verify": {"href": f"{self.url}/verify/{wanted['oid']}"},
                }
            objects.append(entry)
        _send(request, 200, {"transfer": "basic", "objects": objects})

    def _commit(self, request: BaseHTTPRequestHandler, name: str, repo: Repo, body: bytes) -> None:
        new = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
            elif entry["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] in self.stored:
                new[value["path"]] = self.stored[value["oid"]]
            else:
                return _send(request, 400, {"error": f"{value['path']} was not uploaded"})
        repo.files |= new
        repo.commits.append(summary)
        return _send(request, 200, {"commitUrl": f"{self.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})


def _entry(name: str, content: bytes) -> dict:
    git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry = {"type": "file", "path": name, "size": len(content), "oid": git}
    if name.endswith(LFS):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _mode(file: dict, repo: Repo) -> dict:
    mode = "lfs" if file["path"].endswith(LFS) else "regular"
    there = repo.files.get(file["path"])
    oid = _entry(file["path"], there) if there is not None else {}
    known = oid["lfs"]["oid"] if "lfs" in oid else oid.get("oid")
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known}


def _send(request: BaseHTTPRequestHandler, status: int, content: object, headers: dict[str, str] | None = None) -> None:
    data = json.dumps(content).encode()
    try:
        request.send_response(status)
        for name, value in {
            **(headers or {}),
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
        }.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)
    except OSError:  # whoever asked was killed
        pass
