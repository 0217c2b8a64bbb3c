"""`bruno-ray serve` as a process of our own, for as long as something is asked of it.

It is started as a program, because the server stands above this package and knows it, not the other way round.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bruno_ray.errors import SERVER_FAILED, ServerError, first_line
from bruno_ray.progress import phase

START_SECONDS = 900.0
"""As long as `ray.start_timeout`: a large model is read from a slow disk."""

STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Server:
    url: str
    """Of the API, ends with /v1."""

    models: list[dict[str, Any]]
    """As GET /v1/models has them."""

    def require(self, model: str) -> str:
        """The id, if it can be asked. Raises ServerError with the reason if not."""
        answer = httpx.get(f"{self.url}/models/{model}", trust_env=False, timeout=60)
        problem = answer.json()["bruno"]["problem"] if answer.is_success else answer.json()["error"]["message"]
        if problem:
            raise ServerError(f"{model} cannot be served: {problem}")
        return model


@contextmanager
def own_server(arguments: Sequence[str]) -> Iterator[Server]:
    """A server on this machine that listens to this machine only.

    Raises:
        ServerError: it has ended before it was ready, or was not ready in time.
    """
    port = _free_port()
    command = [sys.executable, "-m", "bruno_ray.cli.main", "serve", *arguments]
    command += ["--no-pages", "--no-key", "--host", "127.0.0.1", "--port", str(port)]
    # A cluster of its own, whose port is the one above; on another one Serve listens where that cluster says.
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "BRUNO_API_KEY")}
    with tempfile.TemporaryDirectory(prefix="bruno-serve-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        try:
            with phase("starting the server"):
                url = f"http://127.0.0.1:{port}"
                _wait(process, url, log)
            listed = httpx.get(f"{url}/v1/models", trust_env=False, timeout=60).json()["data"]
            yield Server(f"{url}/v1", listed)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM ends this process as Ctrl-C does: what it has started is ended, nothing half-written
    stays. By itself Python would leave the server behind."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    """Below the ports that the system hands out: gRPC shares a port with whoever else has it, without an error."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            last = said[-1].removeprefix("error: ").removeprefix(SERVER_FAILED) if said else "it said nothing"
            raise ServerError(SERVER_FAILED + first_line(last))
        try:
            if httpx.get(f"{url}/ready", trust_env=False, timeout=10).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # nobody listens yet
        time.sleep(0.5)
    raise ServerError(f"the server was not ready after {START_SECONDS:.0f} s: see its log with `bruno-ray serve`")
