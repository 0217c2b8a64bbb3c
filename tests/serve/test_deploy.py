"""Ray's own commands bring up the same application, and `bruno-ray serve` joins a cluster that is there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from tests.serve.server import ROOT, STORE, environment, free_port, ray_folder

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BIN = Path(sys.executable).parent
KEY = "a-key-for-deployments-0123456789"


def test_config_yaml_and_bruno_ray_serve_on_a_cluster_that_is_there(served_run, tmp_path):
    """One cluster for both: `serve run config.yaml` brings up the first application, `--address` joins, and leaves."""
    port, gcs = free_port(), free_port()
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["name"] = "deployed"
    config["applications"][0]["route_prefix"] = "/deployed"
    config["applications"][0]["args"] |= {"runs": [str(served_run)], "pages": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{gcs}"
    with ray_folder() as place:
        variables = environment(BRUNO_API_KEY=KEY)
        start = [BIN / "ray", "start", "--head", "--block", "--port", str(gcs), "--num-cpus", "4",
                 "--object-store-memory", STORE, "--include-dashboard", "false", "--temp-dir", place,
                 "--node-ip-address", "127.0.0.1", "--disable-usage-stats"]  # fmt: skip
        cluster = spawn(start, tmp_path / "ray.log", variables, tmp_path)
        children = [cluster]
        try:
            wait_for(tmp_path / "ray.log", "Ray runtime started", cluster)
            run = [BIN / "serve", "run", "--address", address, "config.yaml"]
            children.append(spawn(run, tmp_path / "run.log", variables, tmp_path))
            models(f"http://127.0.0.1:{port}/deployed", children[-1], tmp_path / "run.log")

            join = [sys.executable, "-m", "serve.command", str(served_run), "--address", address, "--route-prefix",
                    "/joined", "--port", str(port), "--no-pages"]  # fmt: skip
            joined = spawn(join, tmp_path / "join.log", variables, tmp_path)
            children.append(joined)
            wait_for(tmp_path / "join.log", "Ctrl-C stops", joined)
            assert models(f"http://127.0.0.1:{port}/joined", joined, tmp_path / "join.log")
            joined.send_signal(signal.SIGINT)
            assert joined.wait(120) == 0
            # The other application goes on.
            assert models(f"http://127.0.0.1:{port}/deployed", children[1], tmp_path / "run.log")
        finally:
            for child in reversed(children):
                end(child)


def spawn(command: list, log: Path, variables: dict[str, str], folder: Path) -> subprocess.Popen:
    with log.open("wb") as file:
        return subprocess.Popen(
            list(map(str, command)), cwd=folder, env=variables, stdout=file, stderr=file, start_new_session=True
        )


def end(child: subprocess.Popen) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def wait_for(log: Path, text: str, child: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while text not in log.read_text():
        assert child.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.3)


def models(url: str, child: subprocess.Popen, log: Path) -> list[str]:
    """Ids that are served, once the server is ready."""
    deadline = time.monotonic() + 300
    with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        while True:
            try:
                if client.get(f"{url}/ready").status_code == 200:
                    return [model["id"] for model in client.get(f"{url}/v1/models").json()["data"]]
            except httpx.TransportError:
                pass
            assert child.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
