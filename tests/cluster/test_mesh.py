"""The tunnels between real ssh servers behind NAT: everyone reaches everyone, and what happens when things break."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.network.addresses import NodeAddress
from cluster.network.mesh import listeners, listening_on
from tests.cluster.lab import Container, Lab
from tests.cluster.lab.container import CHECKOUT
from tests.cluster.lab.far_away import ROUND_TRIP_S
from tests.cluster.lab.supervised import MAX_CPUS
from tests.cluster.ssh import KeyPair
from tests.support.waiting import wait_for

pytestmark = pytest.mark.xdist_group("lab")

MESH = "root/.bruno-ray/mesh"


class Network:
    """A head with a supervisor and workers that answer on all their ports."""

    def __init__(self, lab: Lab, key: KeyPair, mode: str = "star") -> None:
        self.lab, self.key, self.mode = lab, key, mode
        self.nodes: dict[int, Container] = {}

    def add(self, index: int, gateway_ports: str = "clientspecified") -> Container:
        self.nodes[index] = self.lab.add([self.key.public], gateway_ports)
        log = "< /dev/null > /tmp/echo.log 2>&1 &"
        self.shell(index, f"{self.python('tests.cluster.lab.echo', index, MAX_CPUS)} {log}")
        wait_for(lambda: "ready" in self.nodes[index].read("/tmp/echo.log"), f"servers of node {index}")
        return self.nodes[index]

    def tell(self, **changes: object) -> None:
        """What the list of machines says from now on."""
        rows = [
            {"id": container.name, "index": index, "endpoints": [[container.public_address, container.ssh_port]]}
            for index, container in self.nodes.items()
        ]
        fresh = self.nodes[0].home / "nodes.new"
        fresh.write_text(json.dumps(changes.get("instead", rows)))
        fresh.replace(self.nodes[0].home / "nodes.json")

    def start_supervisor(self) -> None:
        (self.nodes[0].home / "key").write_text(self.key.private.read_text())
        (self.nodes[0].home / "key").chmod(0o600)
        self.shell(0, self.python("tests.cluster.lab.supervised", "start", self.mode, MAX_CPUS))

    def shell(self, index: int, command: str) -> str:
        return self.lab.ssh(self.nodes[index], self.key.private, command)

    def python(self, *words: object) -> str:
        return f"cd {CHECKOUT}; {sys.executable} -m {shlex.join(str(word) for word in words)}"

    def status(self) -> dict:
        return json.loads(self.nodes[0].read(f"{MESH}/status.json"))

    def link(self, index: int) -> dict:
        return next((row for row in self.status()["nodes"].values() if row["index"] == index), {"state": "none"})

    def place(self, index: int) -> tuple[str, int]:
        """Where the node's sshd answers."""
        return self.nodes[index].public_address, self.nodes[index].ssh_port

    def wait_until_up(self) -> None:
        workers = set() if self.mode == "head-only" else set(self.nodes) - {0}

        def up() -> bool:
            links = {row["index"]: row for row in self.status()["nodes"].values()}
            kind = "direct" if self.mode == "direct" else "peers"
            peers = {index: set(row[kind]) for index, row in links.items() if row["state"] == "up"}
            return peers == {index: workers - {index} for index in set(self.nodes) - {0}}

        wait_for(up, "all links", detail=self.status)

    def address(self, index: int) -> NodeAddress:
        return NodeAddress(index, MAX_CPUS)

    def answers(self, index: int) -> dict[int, list[str]]:
        others = sorted(set(self.nodes) - {index})
        said = json.loads(self.shell(index, self.python("tests.cluster.lab.echo", "ask", MAX_CPUS, *others)))
        return {int(number): answers for number, answers in said.items()}

    def check_everyone_reaches_everyone(self) -> None:
        self.check_reach({index: set(self.nodes) - {index} for index in self.nodes})

    def check_reach(self, reached: dict[int, set[int]]) -> None:
        """By node which others it reaches; their ports refuse it elsewhere."""
        for index, others in reached.items():
            expected = {
                other: [f"node {other}" if other in others else "ConnectionRefusedError"] * 3
                for other in self.nodes
                if other != index
            }
            assert self.answers(index) == expected, f"from node {index}"

    def master(self, index: int) -> int:
        """Process id, as the host sees it, of the head's ssh to a worker."""
        name = f"bruno-ray-{self.nodes[index].name}"
        found = [pid for pid in self.nodes[0].processes() if is_master(pid, name)]
        assert len(found) == 1, found
        return found[0]

    def supervisor(self, action: str = "run") -> int:
        found = [pid for pid in self.nodes[0].processes() if f"supervised {action} " in command_line(pid)]
        assert len(found) == 1, found
        return found[0]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def is_master(pid: int, name: str) -> bool:
    command = command_line(pid)
    return command.startswith("ssh -M ") and f"HostKeyAlias={name} " in command


@pytest.fixture(scope="module")
def network(lab: Lab, key: KeyPair) -> Network:
    """Head, two workers whose sshd allows `-R` on an alias, and one whose sshd silently does not."""
    network = Network(lab, key)
    for index, gateway_ports in enumerate(["clientspecified", "clientspecified", "clientspecified", "no"]):
        network.add(index, gateway_ports)
    network.tell()
    network.start_supervisor()
    network.wait_until_up()
    return network


@pytest.mark.cluster
class TestStar:
    def test_everyone_reaches_everyone_under_the_same_address(self, network: Network) -> None:
        network.check_everyone_reaches_everyone()

    def test_every_worker_is_shown_that_its_head_is_there(self, network: Network) -> None:
        beats = [network.nodes[index].home / ".bruno-ray" / "heartbeat" for index in (1, 2, 3)]
        wait_for(lambda: all(beat.exists() for beat in beats), "a heartbeat on each worker")

    def test_sshd_that_does_not_listen_on_an_alias_is_replaced_by_our_own(self, network: Network) -> None:
        assert [network.link(index)["inner_sshd"] for index in (1, 2, 3)] == [False, False, True]
        table = network.shell(3, "cat /proc/net/tcp")
        wanted = {(address.alias, port) for address in map(address_of, (0, 1, 2)) for port in address.ports}
        assert wanted <= listeners(table)
        assert not {port for address, port in listeners(table) if address in ("0.0.0.0", "127.0.0.1")} - {22}

    def test_machine_that_appears_is_connected_and_known_to_all_and_forgotten_when_it_goes(
        self, network: Network
    ) -> None:
        network.add(4)
        network.tell()
        network.wait_until_up()
        network.check_everyone_reaches_everyone()
        network.lab.remove(network.nodes.pop(4))
        network.tell()
        network.wait_until_up()
        assert network.link(4)["state"] == "none"
        network.check_everyone_reaches_everyone()

    def test_link_is_not_up_while_somebody_else_holds_one_of_its_ports(self, network: Network) -> None:
        """Such as a connection of ours that is dead on this side and that nobody remembers."""
        alias, port = network.address(0).alias, network.address(0).node_manager_port
        hold = (
            f'import socket,time; s=socket.create_server(("{alias}", {port})); print("held", flush=1); time.sleep(600)'
        )
        network.add(4)
        network.shell(4, f"{sys.executable} -c '{hold}' < /dev/null > /tmp/held 2>&1 & echo $! > /tmp/holder")
        wait_for(lambda: "held" in network.nodes[4].read("/tmp/held"), "somebody who holds the port")
        network.tell()
        wait_for(lambda: "refuses to listen on 1 ports" in network.link(4).get("last_error", ""), "the refusal")
        assert network.link(4)["state"] == "connecting" and network.link(4)["inner_sshd"] is False
        network.shell(4, "kill $(cat /tmp/holder)")
        network.wait_until_up()
        network.check_everyone_reaches_everyone()
        network.lab.remove(network.nodes.pop(4))
        network.tell()
        network.wait_until_up()

    def test_killed_connection_is_made_again_at_once(self, network: Network) -> None:
        before = network.link(1)["connections"]
        os.kill(network.master(1), signal.SIGKILL)
        began = time.monotonic()
        wait_for(lambda: network.link(1)["connections"] > before, "a new connection")
        network.wait_until_up()
        print(f"reconnected after {time.monotonic() - began:.1f} s (status is written every second)")
        network.check_everyone_reaches_everyone()
        assert network.link(2)["connections"] == 1

    def test_supervisor_killed_breaks_no_tunnel_and_the_next_adopts_them(self, network: Network) -> None:
        masters = [network.master(index) for index in (1, 2, 3)]
        old, before = network.supervisor(), network.status()["pid"]
        os.kill(old, signal.SIGKILL)
        network.check_everyone_reaches_everyone()
        began = time.monotonic()
        wait_for(lambda: network.status()["pid"] != before, "a new supervisor")
        network.wait_until_up()
        print(f"supervisor back after {time.monotonic() - began:.1f} s")
        assert network.supervisor() != old
        assert [network.master(index) for index in (1, 2, 3)] == masters
        assert [network.link(index)["adopted"] for index in (1, 2, 3)] == [1, 1, 1]
        assert [network.link(index)["inner_sshd"] for index in (1, 2, 3)] == [False, False, True]
        network.check_everyone_reaches_everyone()

    def test_killed_keeper_is_replaced_too(self, network: Network) -> None:
        old = network.supervisor("keep")
        before = network.status()["pid"]
        os.kill(old, signal.SIGKILL)
        wait_for(lambda: network.status()["pid"] != before, "a new supervisor")
        assert network.supervisor("keep") != old
        network.wait_until_up()

    def test_api_outage_and_an_answer_without_the_head_change_nothing(self, network: Network) -> None:
        masters = [network.master(index) for index in (1, 2, 3)]
        for answer, error in (("unavailable", "does not answer"), ([], "does not contain the head")):
            network.tell(instead=answer)
            wait_for(lambda e=error: e in network.status()["api"]["error"], "the error in the status")
            first = network.status()["api"]["asked"]
            wait_for(lambda f=first: network.status()["api"]["asked"] > f + 1, "several answers")
            assert [network.master(index) for index in (1, 2, 3)] == masters
        old = network.status()["pid"]
        os.kill(network.supervisor(), signal.SIGKILL)  # a supervisor that starts meanwhile knows the machines
        os.kill(network.master(2), signal.SIGKILL)  # and mends what breaks
        wait_for(lambda: network.status()["pid"] != old, "a new supervisor")
        network.wait_until_up()
        network.check_everyone_reaches_everyone()
        network.tell()
        wait_for(lambda: network.status()["api"]["error"] == "", "the end of the outage")

    def test_short_cut_breaks_no_connection_that_runs_through_the_tunnel(self, network: Network) -> None:
        before = network.link(1)["connections"]
        command = network.python("tests.cluster.lab.echo", "talk", MAX_CPUS, 1)
        network.shell(2, f"{command} < /dev/null > /tmp/talk.log 2>&1 &")
        wait_for(lambda: "talking" in network.nodes[2].read("/tmp/talk.log"), "a conversation from node 2 to node 1")
        network.nodes[1].cut()
        time.sleep(2)
        network.nodes[1].mend()
        wait_for(lambda: "done" in network.nodes[2].read("/tmp/talk.log"), "the end of the conversation")
        assert network.link(1)["connections"] == before

    def test_long_cut_is_noticed_and_mended_although_the_other_side_never_heard_of_it(self, network: Network) -> None:
        """The worker's sshd still holds the old listeners when the head comes back: they are evicted."""
        for index in (1, 3):
            network.nodes[index].cut()
        wait_for(lambda: all(network.link(index)["state"] == "lost" for index in (1, 3)), "the loss of both")
        for index in (1, 3):
            network.nodes[index].mend()
        began = time.monotonic()
        network.wait_until_up()
        print(f"up {time.monotonic() - began:.1f} s after the cut")
        network.check_everyone_reaches_everyone()

    def test_host_key_that_changes_is_refused(self, network: Network) -> None:
        known = network.nodes[0].home / ".bruno-ray/mesh/known_hosts"
        text = known.read_text()
        assert f"bruno-ray-{network.nodes[2].name} " in text
        try:
            other = (network.nodes[1].folder / "host_key.pub").read_text().split()[1]
            lines = [line for line in text.splitlines() if not line.startswith(f"bruno-ray-{network.nodes[2].name} ")]
            known.write_text("\n".join([*lines, f"bruno-ray-{network.nodes[2].name} ssh-ed25519 {other}", ""]))
            os.kill(network.master(2), signal.SIGKILL)
            wait_for(lambda: "ost key verification failed" in network.link(2).get("last_error", ""), "a refusal")
        finally:
            known.write_text(text)
        network.wait_until_up()

    def test_machine_that_never_answers_costs_the_others_nothing(self, network: Network) -> None:
        rows = json.loads((network.nodes[0].home / "nodes.json").read_text())
        network.tell(instead=[*rows, {"id": "dead", "index": 5, "endpoints": [["10.99.9.9", 22]]}])
        wait_for(lambda: network.link(5)["state"] == "connecting" and bool(network.link(5)["last_error"]), "an attempt")
        network.check_everyone_reaches_everyone()
        network.tell()
        wait_for(lambda: network.link(5)["state"] == "none", "the end of the dead machine's link")


@pytest.fixture(scope="module")
def direct(network: Network, key: KeyPair) -> Network:
    """Workers that dial each other; the star of the tests above is gone by then."""
    network.lab.close_containers()
    network = Network(network.lab, key, "direct")
    for index, gateway_ports in enumerate(["clientspecified", "clientspecified", "clientspecified", "no"]):
        network.add(index, gateway_ports)
    network.tell()
    network.start_supervisor()
    network.wait_until_up()
    return network


@pytest.mark.cluster
class TestDirect:
    def test_everyone_reaches_everyone_and_workers_without_the_head(self, direct: Network) -> None:
        direct.check_everyone_reaches_everyone()
        wait_for(lambda: not any(direct.link(index)["peers"] for index in (1, 2, 3)), "the star standing back")
        command = direct.python("tests.cluster.lab.echo", "talk", MAX_CPUS, 1)
        direct.shell(2, f"{command} < /dev/null > /tmp/talk.log 2>&1 &")
        wait_for(lambda: "talking" in direct.nodes[2].read("/tmp/talk.log"), "a conversation from node 2 to node 1")
        direct.nodes[0].cut()
        try:
            wait_for(lambda: "done" in direct.nodes[2].read("/tmp/talk.log"), "the end of the conversation")
        finally:
            direct.nodes[0].mend()
        direct.wait_until_up()

    def test_peer_key_opens_no_shell_and_no_other_port(self, direct: Network) -> None:
        there = direct.nodes[2]
        options = "-i ~/.bruno-ray/mesh/peer_key -o UserKnownHostsFile=~/.bruno-ray/mesh/peer_hosts -o BatchMode=yes"
        options += f" -F /dev/null -o IdentitiesOnly=yes -o HostKeyAlias=bruno-ray-{there.name} -p {there.ssh_port}"
        target = f"root@{there.public_address}"
        assert "root" not in direct.shell(1, f"timeout 10 ssh {options} {target} id 2>&1; true")
        assert "SSH-" not in direct.shell(1, f"timeout 5 ssh {options} -W 127.0.0.1:22 {target} 2>&1; true")
        inside = f"{direct.address(2).alias}:{direct.address(2).node_manager_port}"
        assert "node 2" in direct.shell(1, f"timeout 30 ssh {options} -W {inside} {target} < /dev/null 2>&1; true")

    def test_star_stands_in_for_a_direct_link_that_cannot_be_had(self, direct: Network) -> None:
        """Node 1 can no longer dial node 2; node 2 still reaches node 1."""
        direct.nodes[1].refuse(direct.nodes[2].public_address)
        direct.shell(1, f"ssh -S ~/.bruno-ray/mesh/peer-{direct.nodes[2].name}.sock -O exit peer")
        try:
            wait_for(lambda: direct.link(1)["peers"] == [2], "the star for node 2 on node 1", detail=direct.status)
            direct.check_everyone_reaches_everyone()
        finally:
            direct.nodes[1].refuse(None)
        direct.wait_until_up()
        wait_for(lambda: direct.link(1)["peers"] == [], "the star standing back")
        direct.check_everyone_reaches_everyone()

    def test_machine_that_appears_is_dialled_and_dials(self, direct: Network) -> None:
        direct.add(4)
        direct.tell()
        direct.wait_until_up()
        direct.check_everyone_reaches_everyone()


@pytest.fixture(scope="module")
def head_only(network: Network, key: KeyPair) -> Iterator[Network]:
    """Two workers, 60 ms away, that know of nobody but the head; what was there before is gone."""
    network.lab.close_containers()
    with Lab(ROUND_TRIP_S) as lab:
        network = Network(lab, key, "head-only")
        for index, gateway_ports in enumerate(["clientspecified", "clientspecified", "no"]):
            network.add(index, gateway_ports)
        network.tell()
        network.start_supervisor()
        network.wait_until_up()
        yield network


@pytest.mark.cluster
class TestHeadOnly:
    def test_a_worker_reaches_the_head_and_no_other_worker(self, head_only: Network) -> None:
        head_only.check_reach({0: {1, 2}, 1: {0}, 2: {0}})
        assert [head_only.link(index)["inner_sshd"] for index in (1, 2)] == [False, True]

    def test_a_machine_that_joins_adds_nothing_to_the_connections_of_the_others(self, head_only: Network) -> None:
        def heard() -> list[set[tuple[str, int]]]:
            return [listeners(head_only.shell(index, "cat /proc/net/tcp")) for index in (1, 2)]

        before, made = heard(), [head_only.link(index)["connections"] for index in (1, 2)]
        head_only.add(3)
        head_only.tell()
        head_only.wait_until_up()
        head_only.check_reach({0: {1, 2, 3}, 1: {0}, 2: {0}, 3: {0}})
        assert heard() == before
        assert [head_only.link(index)["connections"] for index in (1, 2)] == made

    def test_a_connection_that_breaks_is_made_again_without_the_other_workers(self, head_only: Network) -> None:
        before = head_only.link(1)["connections"]
        os.kill(head_only.master(1), signal.SIGKILL)
        wait_for(lambda: head_only.link(1)["connections"] > before, "a new connection")
        head_only.wait_until_up()
        head_only.check_reach({0: {1, 2, 3}, 1: {0}})


FAR_S = 0.15
"""Each way: a round trip of 0.3 s, with which one forward after the other takes 26 s."""


@pytest.mark.cluster
class TestFar:
    def test_links_to_the_other_side_of_the_world_come_up_and_grow(self, network: Network, key: KeyPair) -> None:
        network.lab.close_containers()
        far = Network(network.lab, key)
        for index in range(3):
            far.add(index)
        rows = []
        for index, container in far.nodes.items():
            proxy = 30000 + index
            far_away = far.python("tests.cluster.lab.far_away", "127.0.0.1", proxy, *far.place(index))
            far.shell(0, f"{far_away} {FAR_S} < /dev/null > /tmp/far{index}.log 2>&1 &")
            wait_for(lambda log=f"/tmp/far{index}.log": "ready" in far.nodes[0].read(log), "the proxy")
            rows.append({"id": container.name, "index": index, "endpoints": [["127.0.0.1", proxy]]})
        far.tell(instead=rows[:2])
        far.start_supervisor()
        wait_for(lambda: far.link(1)["state"] == "up", "the first link", detail=far.status)
        far.tell(instead=rows)
        far.wait_until_up()
        far.check_everyone_reaches_everyone()
        assert [far.link(index)["connections"] for index in (1, 2)] == [1, 1]


def address_of(index: int) -> NodeAddress:
    return NodeAddress(index, MAX_CPUS)


def test_the_listeners_of_a_few_addresses_are_picked_out_where_they_are() -> None:
    held = {}
    with contextlib.ExitStack() as stack:
        for address in ("127.77.0.3", "127.77.1.254", "127.77.0.30"):
            listening = stack.enter_context(socket.socket())
            listening.bind((address, 0))
            listening.listen()
            held[address] = listening.getsockname()

        def found(*addresses: str) -> set[tuple[str, int]]:
            done = subprocess.run(listening_on(addresses), shell=True, capture_output=True, text=True, check=True)
            return listeners(done.stdout)

        assert found("127.77.0.3", "127.77.1.254") == {held["127.77.0.3"], held["127.77.1.254"]}
        assert found("127.77.9.9") == set()
        assert set(held.values()) <= found(*(f"127.77.9.{number}" for number in range(1, 40)))


def test_listeners_are_read_from_the_kernels_table() -> None:
    table = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "   0: 01004D7F:18EB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1\n"
        "   1: 01004D7F:18EC 0200007F:1000 01 00000000:00000000 00:00000000 00000000     0        0 1 1\n"
    )
    assert listeners(table) == {("127.77.0.1", 6379)}
