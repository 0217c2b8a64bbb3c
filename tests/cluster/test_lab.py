"""The imitation holds what the cluster's tests rely on: NAT, capabilities, isolation, cuts, and nothing left behind."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.network.probe import greets
from cluster.network.ssh_master import Endpoint, SshIdentity
from tests.cluster.fake_vast.machines import MachineOrder
from tests.cluster.lab import Container, Lab
from tests.cluster.lab.container import CHECKOUT, INSIDE
from tests.cluster.lab.machine import NamespaceMachine
from tests.cluster.lab.namespaces import NETNS_FOLDER, namespaces_of, sweep
from tests.cluster.ssh import KeyPair
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("lab")]

DOCKER_DEFAULT_CAPABILITIES = 0xA80425FB


@pytest.fixture(scope="module")
def pair(lab: Lab, key: KeyPair) -> list[Container]:
    return [lab.add([key.public]), lab.add([key.public])]


def open_port(lab: Lab, address: str, port: int, timeout: float = 1.0) -> bool:
    """Whether a connection from the internet is accepted."""

    def connect() -> bool:
        try:
            socket.create_connection((address, port), timeout).close()
        except OSError:
            return False
        return True

    return lab.on_internet(connect)


def test_container_has_the_capabilities_of_docker_and_its_own_file_system(
    lab: Lab, pair: list[Container], key: KeyPair
) -> None:
    status = lab.ssh(pair[0], key.private, "grep CapEff /proc/self/status; hostname; ls -A /root /tmp; ls /")
    assert int(status.split()[1], 16) == DOCKER_DEFAULT_CAPABILITIES
    assert "c0" in status and "old" not in status.split()
    refused = lab.ssh(pair[0], key.private, "ip link add dummy0 type dummy 2>&1 || true; touch /usr/x 2>&1 || true")
    assert "Operation not permitted" in refused and "Read-only file system" in refused
    lab.ssh(pair[0], key.private, "echo mine > /root/file; echo mine > /tmp/file")
    assert pair[0].read("/root/file") == "mine\n"
    assert not (pair[1].home / "file").exists()


def test_container_is_told_what_docker_would_tell_it(lab: Lab, key: KeyPair) -> None:
    onstart = 'touch ~/.no_auto_tmux; echo "$COLOUR" > /root/told'
    machine = NamespaceMachine(lab)
    machine.start(MachineOrder(1, "image", onstart, {"COLOUR": "it's red"}, (key.public,)))
    assert machine.container is not None
    told = machine.container.home / "told"
    wait_for(told.exists, "the end of onstart")
    said = lab.ssh(machine.container, key.private, 'cat /root/told; echo "session: $COLOUR"')
    assert said.splitlines() == ["it's red", "session: "], "sessions do not inherit the container's environment"
    machine.stop()
    assert not machine.container.folder.exists()


def test_shells_run_nothing_before_onstart_has_said_so(lab: Lab, key: KeyPair) -> None:
    """As on Vast.ai: sshd is up, and its shells put every command into tmux."""
    machine = NamespaceMachine(lab)
    address = machine.start(MachineOrder(1, "image", "", {}, (key.public,)))
    assert machine.container is not None
    identity = SshIdentity(key.private, machine.container.folder / "known_hosts")
    endpoint = Endpoint(address.host, address.port)

    def usable() -> bool:
        return in_lab(lab, endpoint, identity)

    assert lab.on_internet(lambda: greets(endpoint))
    with pytest.raises(RuntimeError):
        lab.ssh(machine.container, key.private, "echo here", timeout=20)
    assert not usable()
    (machine.container.home / ".no_auto_tmux").touch()
    assert lab.ssh(machine.container, key.private, "echo here") == "here\n", "it greets interactive shells only"
    assert usable()
    machine.stop()
    assert not usable()


def in_lab(lab: Lab, endpoint: Endpoint, identity: SshIdentity) -> bool:
    """`runs_commands`, asked on the laptop."""
    program = (
        "import sys; from pathlib import Path; from cluster.network.ssh_master import Endpoint, SshIdentity;"
        "from cluster.network.probe import runs_commands;"
        "host, port, key, hosts = sys.argv[1:];"
        "print(runs_commands(Endpoint(host, int(port)), SshIdentity(Path(key), Path(hosts)), 'a-machine'))"
    )
    words = [endpoint.host, str(endpoint.port), str(identity.key), str(identity.known_hosts)]
    done = lab.run(sys.executable, "-c", program, *words, cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": str(CHECKOUT)})
    assert done.stdout.strip() in ("True", "False"), done.stderr
    return done.stdout.strip() == "True"


def test_container_shares_this_python_and_this_checkout(lab: Lab, pair: list[Container], key: KeyPair) -> None:
    command = f"cd {CHECKOUT} && {sys.executable} -c 'import bruno_ray, sys; print(bruno_ray.__file__, sys.prefix)'"
    assert lab.ssh(pair[0], key.private, command).split() == [str(CHECKOUT / "bruno_ray" / "__init__.py"), sys.prefix]


def test_only_the_mapped_sshd_answers_from_the_internet(lab: Lab, pair: list[Container], key: KeyPair) -> None:
    listen = 'import socket,time; s=socket.create_server(("0.0.0.0", 6379)); print("up", flush=True); time.sleep(60)'
    options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-p", str(pair[0].ssh_port)]
    target = [f"root@{pair[0].public_address}", f"{sys.executable} -c '{listen}'"]
    server = subprocess.Popen(
        lab.command("ssh", "-q", "-tt", "-i", str(key.private), *options, *target),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        assert server.stdout is not None and b"up" in server.stdout.readline()
        assert open_port(lab, pair[0].public_address, pair[0].ssh_port)
        assert not open_port(lab, pair[0].public_address, 6379)
        assert not open_port(lab, INSIDE, 6379)
        with pytest.raises(RuntimeError, match="exit"):  # containers cannot reach each other either, all are 172.17.0.2
            lab.ssh(pair[1], key.private, f"timeout 2 bash -c 'exec 3<>/dev/tcp/{pair[0].public_address}/6379'")
    finally:
        server.kill()
        server.wait()


def test_container_reaches_the_internet_through_its_router(lab: Lab, pair: list[Container], key: KeyPair) -> None:
    server = lab.on_internet(lambda: socket.create_server(("10.99.0.1", 8090)))
    server.settimeout(5)
    with server:
        lab.ssh(pair[1], key.private, "bash -c 'exec 3<>/dev/tcp/10.99.0.1/8090'")
        connection, peer = server.accept()
        connection.close()
    assert peer[0] == pair[1].public_address, "the router masquerades"


def test_cut_is_silent_and_an_open_connection_outlives_it(lab: Lab, pair: list[Container], key: KeyPair) -> None:
    address = (pair[0].public_address, pair[0].ssh_port)
    connection = lab.on_internet(lambda: socket.create_connection(address, 5))
    with connection:
        assert connection.recv(4) == b"SSH-"
        pair[0].cut()
        try:
            assert not open_port(lab, *address, timeout=0.5)
            connection.settimeout(0.2)
            connection.sendall(b"SSH-2.0-test\r\n")
        finally:
            pair[0].mend()
        connection.settimeout(10)
        assert connection.recv(1)
    assert open_port(lab, *address)


def test_removed_container_leaves_no_process_namespace_or_file(lab: Lab, key: KeyPair) -> None:
    container = lab.add([key.public])
    lab.ssh(container, key.private, "setsid sleep 600 < /dev/null > /dev/null 2>&1 & echo started")
    assert len(container.processes()) >= 2
    pids = container.processes()
    lab.remove(container)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the end of its processes")
    assert not (NETNS_FOLDER / container.namespace).exists() and not (NETNS_FOLDER / container.router).exists()
    assert not container.folder.exists()


def test_lab_of_a_killed_session_is_swept_and_a_living_one_is_not(namespaces: None, lab: Lab) -> None:
    program = (
        "from tests.cluster.lab import Lab; import time; "
        "l = Lab().__enter__(); l.add([]); print(l.name, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)
    try:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
    finally:
        owner.kill()
        owner.wait()
    assert len(namespaces_of(name + "-")) == 3
    wait_for(lambda: sweep() is not None and not namespaces_of(name + "-"), "the end of the killed lab")
    assert lab.wan in namespaces_of(lab.name), "a lab in use stays"
