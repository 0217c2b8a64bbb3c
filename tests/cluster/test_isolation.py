"""The hosts are not trusted, and the internet even less: who can reach and read what while the main job runs."""

import json
import re
import socket
import subprocess
from pathlib import Path

import pytest

from cluster.network.keys import KEY_NAME
from cluster.network.mesh import listeners
from tests.cluster.fake_vast.api import API_KEY, HEAD_KEY
from tests.cluster.lab import Container, Lab
from tests.cluster.lab.life import RunningJob

pytestmark = [
    *(pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow),
    *(pytest.mark.xdist_group("lab"), pytest.mark.timeout(1200)),
]

ASK = """
import pathlib, sys, urllib.error, urllib.request
request = urllib.request.Request(sys.argv[1])
if len(sys.argv) > 2:
    request.add_header("Authorization", "Bearer " + pathlib.Path(sys.argv[2]).read_text())
try:
    print(urllib.request.urlopen(request, timeout=20).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


def test_nothing_but_sshd_answers_from_the_internet(job: RunningJob) -> None:
    for container in job.containers():
        heard = job.cluster.shell(container, "cat /proc/net/tcp")
        assert len(listeners(heard)) > 100, "Ray and tunnels listen inside"
        assert open_ports(job.cluster.lab, container.public_address) == [container.ssh_port]


@pytest.mark.parametrize("node", ["head", "worker"])
def test_dashboard_and_job_api_refuse_without_the_token(job: RunningJob, node: str) -> None:
    """Even to those who are inside: the head, and a worker through its tunnel."""
    container = job.containers()[0 if node == "head" else 1]
    (container.folder / "tmp" / "ask.py").write_text(ASK)
    for path in ("/api/jobs/", "/nodes?view=summary", "/api/cluster_status"):
        url = f"http://127.77.0.1:8265{path}"
        assert job.cluster.shell(container, f"python /tmp/ask.py '{url}'").strip() == "401", path
        assert job.cluster.shell(container, f"python /tmp/ask.py '{url}' ~/.ray/auth_token").strip() == "200", path


def test_ray_refuses_without_the_token(job: RunningJob) -> None:
    program = 'import ray; ray.init(address="auto"); print("nodes", sum(n["Alive"] for n in ray.nodes()))'
    connect = f"timeout 60 python -c '{program}' 2>&1; true"
    head = job.cluster.head()
    assert re.search(r"nodes [3-5]", job.cluster.shell(head, connect))
    refused = job.cluster.shell(head, f"export RAY_AUTH_TOKEN=0000; {connect}")
    assert "InvalidAuthToken" in refused and not re.search(r"nodes \d", refused)


def test_api_key_and_private_key_are_on_the_head_alone_and_only_in_their_files(job: RunningJob) -> None:
    cluster_key = (job.cluster.folder / KEY_NAME).read_text()
    for container in job.containers():
        assert not files_with(container, API_KEY), "the account's own key stays at home"
        with_key = {str(path.relative_to(container.folder)) for path in files_with(container, HEAD_KEY)}
        private = {str(path.relative_to(container.folder)) for path in files_with(container, "PRIVATE KEY-----")}
        if container is job.cluster.head():
            assert with_key == {"root/.bruno-ray/vast_api_key"}
            assert private == {"root/ray_bootstrap_key.pem"}
            assert container.read("root/ray_bootstrap_key.pem") == cluster_key, "the cluster's key, not the user's"
        else:
            assert with_key == private == set()


def test_secrets_are_in_no_process_list_environment_or_instance(job: RunningJob) -> None:
    secrets = [API_KEY, HEAD_KEY, (job.cluster.folder / "auth_token").read_text()]
    for instance in job.cluster.vast.billed():
        told = json.dumps([instance.env, instance.onstart, instance.label, instance.image])
        assert not any(secret in told for secret in secrets)
    seen = 0
    for container in job.containers():
        for pid in container.processes():
            try:
                text = Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/environ").read_text()
            except (OSError, UnicodeDecodeError):
                continue  # it has just ended
            seen += 1
            assert not any(secret in text for secret in secrets), text
    assert seen > 20


def open_ports(lab: Lab, address: str) -> list[int]:
    """All TCP ports of a machine that accept a connection from the internet."""

    def scan() -> list[int]:
        found = []
        for port in range(1, 65536):
            with socket.socket() as attempt:
                attempt.settimeout(1)
                if attempt.connect_ex((address, port)) == 0:
                    found.append(port)
        return found

    return lab.on_internet(scan)


def files_with(container: Container, text: str) -> list[Path]:
    """Files that a node has written or been given, logs included, which contain ``text``."""
    areas = [str(container.home), str(container.folder / "tmp")]
    found = subprocess.run(["grep", "-rlaF", "-e", text, *areas], capture_output=True, text=True)
    return [Path(line) for line in found.stdout.splitlines()]
