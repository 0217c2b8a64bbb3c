"""A served organism for tests: a small finished run, and `bruno-ray serve` on it as a process of its own."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil

from tests.serve.bodies import check_event, check_response
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]
KEY = "a-key-for-the-tests-0123456789abcdef"
STORE = "100000000"
START_SECONDS = 1200.0
"""For a run or a server to be there. A machine that stalls makes a test late, not red."""


def environment(**more: str) -> dict[str, str]:
    """Of a child process: our sources, nothing of a Ray cluster that somebody else has started."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**inherited, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **more}


def make_run(folder: Path) -> Path:
    """A finished run of the organism with six trials, one of them selected and saved."""
    sizes = {"prompts.n_train": 48, "prompts.n_validation": 24, "prompts.n_test": 24, "study.n_trials": 6,
             "study.n_startup_trials": 4, "selection.max_kl": 5, "ray.object_store_memory": STORE}  # fmt: skip
    settings = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "bruno_ray.cli.main", "run", "--behaviour", "organism", "--study-name", "tiny"]
    with ray_folder() as place:
        done = subprocess.run(
            [*command, *settings, "--auto-select", "--output.directory", str(folder)],
            cwd=folder, env=environment(RAY_TMPDIR=place), capture_output=True, text=True,
            timeout=START_SECONDS,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "tiny"


@contextmanager
def ray_folder() -> Iterator[str]:
    """Ray's own files; short, since the names of sockets in it must be."""
    folder = tempfile.mkdtemp(prefix="br-", dir="/tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Below the ports that the system hands out: gRPC shares a port with whoever else has it, without an error."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        return port


@dataclass
class Server:
    """A running server."""

    url: str
    """Without /v1; with the route prefix."""

    key: str
    process: subprocess.Popen
    output: Path
    """What it prints."""

    ray: Path
    """Ray's folder, with all logs."""

    run: Path | None = None
    base: str = ""
    """Model ids."""

    trials: list[str] = field(default_factory=list)
    selected: str = ""
    saved: str = ""
    talkative: str = ""
    """A model that never ends a greedy answer, and takes long prompts."""

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def client(self, timeout: float = 120.0) -> httpx.Client:
        """Every body but those of streams is held against its model."""
        check = partial(check_response, prefix=urlsplit(self.url).path)
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=timeout, event_hooks={"response": [check]})

    def post(self, path: str, **body: object) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body)

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    def running(self) -> int:
        """Rows in all engines."""
        engines = self.get("/api/stats").json()["engines"]
        return sum(engine["running"] + engine["waiting"] for engine in engines.values())

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Of this server's Ray, those whose command line has ``name``."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            mine = (process.info["environ"] or {}).get("RAY_TMPDIR") == str(self.ray)
            if mine and name in " ".join(process.info["cmdline"] or []):
                found.append(process)
        return found

    def engines(self) -> list[psutil.Process]:
        """Copies of the first model."""
        return self.processes("Engine-0")

    def logs(self) -> str:
        """Everything that was printed or logged by any process."""
        files = [self.output, *(file for file in self.ray.rglob("*") if "logs" in file.parts and file.is_file())]
        return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

    def stop(self) -> int:
        """As Ctrl-C does; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(120)


def events_of(server: Server, path: str, **body: object) -> list[str]:
    """What comes after `data: ` in a stream, event by event, each held against its model."""
    with server.client() as client, client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        text = response.read().decode()
    assert text.endswith("\n\n")
    parts = text[:-2].split("\n\n")
    assert all(part.startswith("data: ") for part in parts)
    events = [part.removeprefix("data: ") for part in parts]
    for event in events:
        check_event(path, event)
    return events


@contextmanager
def serving(folder: Path, *arguments: str, key: str = KEY, **variables: str) -> Iterator[Server]:
    """`bruno-ray serve` with these arguments, until the block ends."""
    port = free_port()
    output = folder / f"serve-{port}.log"
    with ray_folder() as place, output.open("wb") as log:
        command = [sys.executable, "-m", "serve.command", *arguments, "--port", str(port)]
        given = {"BRUNO_API_KEY": key} if key else {}
        process = subprocess.Popen(
            [*command, "--object-store-memory", STORE],
            cwd=folder, env=environment(RAY_TMPDIR=place, **given, **variables), stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            prefix = argument_after(arguments, "--route-prefix", "")
            server = Server(f"http://127.0.0.1:{port}{prefix}", key, process, output, Path(place))
            wait_until_ready(server)
            name_models(server)
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def argument_after(arguments: Sequence[str], name: str, default: str) -> str:
    return arguments[arguments.index(name) + 1] if name in arguments else default


def wait_until_ready(server: Server) -> None:
    def said() -> str:
        return server.output.read_text()[-3000:]

    def announced() -> bool:
        assert server.process.poll() is None, said()
        return "Ctrl-C stops" in server.output.read_text()

    wait_for(announced, "the server is ready", START_SECONDS, said, interval_s=0.3)
    if not server.key and (made := re.search(r"^key: +(bruno-\S+)", server.output.read_text(), re.MULTILINE)):
        server.key = made[1]


def name_models(server: Server) -> None:
    by_kind: dict[str, list[dict]] = {}
    for model in server.get("/v1/models").json()["data"]:
        by_kind.setdefault(model["bruno"]["kind"] or "broken", []).append(model)
    first = {kind: models[0]["id"] for kind, models in by_kind.items()}
    server.base, server.selected, server.saved = (first.get(kind, "") for kind in ("base", "run", "saved"))
    server.trials = [model["id"] for model in by_kind.get("trial", [])]
