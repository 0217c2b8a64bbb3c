"""Ray's own commands bring up the same application, and `bruno-ray serve` joins a cluster that is there."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from bruno_ray.workers.starting import TIMED_OUT
from tests.serve.server import ROOT, START_SECONDS, STORE, environment, free_port, ray_folder
from tests.support import tiny_models
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("deploy")]

BIN = Path(sys.executable).parent
KEY = "a-key-for-deployments-0123456789"


@dataclass
class Cluster:
    """A head that was started with `ray start`, and where Serve listens on it."""

    folder: Path
    variables: dict[str, str]
    address: str
    dashboard: str
    port: int

    def spawn(self, name: str, *command: str | Path) -> "Child":
        log = self.folder / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [str(BIN / command[0]), *map(str, command[1:])],
                cwd=self.folder, env=self.variables, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        return Child(process, log)

    def answer(self, prefix: str, child: "Child | None" = None) -> dict:
        """What the one served model says, once the application under this prefix is ready."""
        url, headers = f"http://127.0.0.1:{self.port}{prefix}", {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(headers=headers, timeout=60) as client:

            def ready() -> bool:
                assert child is None or child.process.poll() is None, child.said()
                try:
                    return client.get(f"{url}/ready").status_code == 200
                except httpx.TransportError:
                    return False  # Serve is not up yet

            wait_for(ready, f"{url} is ready", START_SECONDS, child.said if child else str, interval_s=0.5)
            (model,) = client.get(f"{url}/v1/models").json()["data"]
            body = {"model": model["id"], "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
            answer = client.post(f"{url}/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] == 4
        return answer["choices"][0]


@dataclass
class Child:
    process: subprocess.Popen
    log: Path

    def said(self) -> str:
        return self.log.read_text()[-3000:]

    def wait_until_it_says(self, text: str) -> None:
        def says() -> bool:
            assert self.process.poll() is None, self.said()
            return text in self.log.read_text()

        wait_for(says, f"it says {text!r}", START_SECONDS, self.said, interval_s=0.3)

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(120)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Behind a token, as `ray start` makes it where there is one."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "token").write_text("0123456789abcdef" * 4)
    gcs, dashboard, agent = free_port(), free_port(), free_port()
    variables = environment(BRUNO_API_KEY=KEY, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "token"))
    with ray_folder() as place:
        made = Cluster(folder, variables, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", free_port())
        command = (
            "ray", "start", "--head", "--block", "--port", str(gcs), "--num-cpus", "4",
            "--object-store-memory", STORE, "--temp-dir", place, "--disable-usage-stats",
            "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard),
            "--dashboard-agent-listen-port", str(agent),
        )  # fmt: skip
        head = made.spawn("head", *command)
        try:
            try:
                head.wait_until_it_says("Ray runtime started")
            except AssertionError:
                if TIMED_OUT not in head.log.read_text():
                    raise
                head.end()
                head = made.spawn("head", *command)
                head.wait_until_it_says("Ray runtime started")
            yield made
        finally:
            head.end()


def test_deployed_run_and_joined_applications_live_side_by_side(cluster: Cluster, model: Path) -> None:
    """`serve deploy` of config.yaml, `serve run serve.app:build`, and `bruno-ray serve --address`: one cluster."""
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = cluster.port
    (application,) = config["applications"]
    application |= {"name": "deployed", "route_prefix": "/deployed"}
    application["args"] |= {"models": [str(model)], "pages": False}
    (cluster.folder / "config.yaml").write_text(yaml.safe_dump(config))
    deploy = cluster.spawn("deploy", "serve", "deploy", "--address", cluster.dashboard, "config.yaml")
    assert deploy.process.wait(START_SECONDS) == 0, deploy.log.read_text()[-3000:]
    expected = cluster.answer("/deployed")

    arguments = ["serve.app:build", f"models={model}", "require_key=false", "pages=false"]
    run = cluster.spawn(
        "run", "serve", "run", "--address", cluster.address, "--name", "run", "--route-prefix", "/run", *arguments
    )
    join = [str(model), "--address", cluster.address, "--route-prefix", "/joined", "--no-pages"]
    try:
        assert cluster.answer("/run", run) == expected
        joined = cluster.spawn("join", "python", "-m", "serve.command", "--model", *join)
        try:
            joined.wait_until_it_says("Ctrl-C stops")
            assert cluster.answer("/joined", joined) == expected
            assert joined.interrupt() == 0
        finally:
            joined.end()
        # It took nothing with it.
        assert cluster.answer("/deployed") == expected
        assert cluster.answer("/run", run) == expected
    finally:
        run.end()


def test_a_cluster_that_asks_for_a_token_says_so(cluster: Cluster, model: Path) -> None:
    variables = {name: value for name, value in cluster.variables.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "serve.command", "--model", str(model), "--address", cluster.address]
    done = subprocess.run(
        command, env={**variables, "HOME": str(cluster.folder)}, cwd=cluster.folder, capture_output=True, text=True,
        timeout=START_SECONDS,
    )  # fmt: skip
    assert done.returncode == 2
    assert "RAY_AUTH_MODE=token" in done.stderr.strip().splitlines()[-1]
