"""What the network takes at 4, 64 and 256 workers, by mesh: forwards, time to rent and to join; where ssh ends.

    python -m benchmarks.mesh_size

Nothing is rented and no Ray runs. The times of renting come from the provider on the imitated API, with its rate
limits, on a virtual clock. The forwards are those that cluster/network/mesh.py makes. Times to join are a model: what
ssh took here for so many forwards on its command line, through a local sshd, and a round trip for each that is added
later. Needs root and sshd for the measured part.
"""

import argparse
import logging
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import write_section
from cluster.network.addresses import NodeAddress, block_size, max_nodes
from cluster.network.mesh import LOOK_S, both_sides, listeners
from cluster.network.ssh_master import COMMANDS_AT_ONCE, FORWARDS_PER_COMMAND
from cluster.settings import MeshKind
from tests.cluster.fake_vast.cluster import NODE_CONFIG, ImitatedCluster, worker_tags

logger = logging.getLogger(__name__)

MESHES: tuple[MeshKind, ...] = ("star", "head-only")
SIZES = ((4, 32), (64, 32), (64, 16), (256, 8))
"""Workers, and max_cpus."""
TRIPS_S = (0.03, 0.15)
"""Round trips: within a continent, and across an ocean."""
LOGIN_TRIPS = 8
TRIED = (500, 5000, 15_000, 17_000)
"""Forwards of one connection."""
PORT = 22997


@dataclass(frozen=True)
class Size:
    """Of one cluster."""

    workers: int
    max_cpus: int
    mesh: MeshKind

    @property
    def block(self) -> int:
        return block_size(self.max_cpus)

    @property
    def of_a_worker(self) -> int:
        """Forwards of the connection to the last worker: its own ports, the head's, and in a star those of the other
        workers."""
        addresses = [NodeAddress(index, self.max_cpus) for index in range(self.workers + 1)]
        there = addresses[:1] if self.mesh == "head-only" else addresses[:-1]
        return len(both_sides("L", addresses[-1:])) + len(both_sides("R", there))

    @property
    def in_all(self) -> int:
        """All connections are alike: each worker has all addresses but its own, and only the head's has more ports."""
        return self.workers * self.of_a_worker

    def later_s(self, trip_s: float) -> float:
        """Until all others listen for a worker that joins: its ports are added to each connection, all side by side."""
        commands = -(-self.block // FORWARDS_PER_COMMAND)
        rounds = -(-commands // COMMANDS_AT_ONCE)
        return LOOK_S + (rounds * min(self.block, FORWARDS_PER_COMMAND) + 3) * trip_s

    def head_cpu_s(self, line_s: float) -> float:
        """For reading what each worker listens on: all of it three times when it joins, a block twice for another."""
        if self.mesh == "head-only":
            return line_s * self.workers * 3 * self.block
        return line_s * sum(3 * joined * self.block + 2 * joined * self.block for joined in range(1, self.workers + 1))


def rented_s(workers: int, max_cpus: int) -> float:
    """How long the provider takes to rent them, asked for all at once, by the documented rate limits."""
    with tempfile.TemporaryDirectory() as folder:
        world = ImitatedCluster.make(Path(folder), offers=workers + 10, boot_s=60.0)
        world.vast.credit, world.api.ignored_filters = 1e6, set()  # a search brings 253 offers at most
        budget = {"max_price_per_hour": 1e4, "max_total_cost": 1e5}
        patience = {"boot_timeout_s": 1e5, "join_timeout_s": 1e5}  # nobody sets them up here
        provider, begun = world.autoscaler(max_cpus=max_cpus, budget=budget, **patience), world.clock.time()
        provider.create_node(NODE_CONFIG, worker_tags(), workers)
        assert world.api.rates.passed == [] and len(world.vast.billed()) == workers + 1
        return world.clock.time() - begun


def line_s() -> float:
    """Seconds of this machine for one line of /proc/net/tcp."""
    line = "   0: 0100007F:2EE0 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0\n"
    text, begun = "head\n" + line * 20_000, time.perf_counter()
    listeners(text)
    return (time.perf_counter() - begun) / 20_000


def tried(folder: Path) -> dict[int, float | None]:
    """Seconds of a local ssh for so many `-R` on its command line; None where the connection ended instead."""
    for name in ("key", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "conf").write_text(
        f"Port {PORT}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/key.pub\n"
        "GatewayPorts clientspecified\nStrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPidFile none\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    options = [f"UserKnownHostsFile={folder}/hosts", "StrictHostKeyChecking=accept-new", "LogLevel=ERROR"]
    ssh = [
        "ssh",
        "-F",
        "/dev/null",
        "-i",
        str(folder / "key"),
        *(word for option in options for word in ("-o", option)),
    ]
    found: dict[int, float | None] = {}
    server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", str(folder / "conf"), "-E", str(folder / "log")])
    try:
        target = ["-p", str(PORT), "root@127.0.0.1"]
        while subprocess.run([*ssh, *target, "true"], capture_output=True).returncode:
            time.sleep(0.1)
        for number in TRIED:
            places = [f"127.78.{port // 15_000}.1:{12_000 + port % 15_000}" for port in range(number)]
            words = [word for place in places for word in ("-R", f"{place}:{place}")]
            begun = time.perf_counter()
            done = subprocess.run([*ssh, *words, *target, "cat /proc/net/tcp"], capture_output=True, text=True)
            listening = sum(address.startswith("127.78.") for address, _ in listeners(done.stdout))
            found[number] = time.perf_counter() - begun if done.returncode == 0 and listening == number else None
            logger.info("%d forwards: %s s", number, found[number])
    finally:
        server.terminate()
        server.wait()
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("cluster").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        took = tried(Path(folder))
    write_section("mesh_size", table(took, line_s()))


def table(took: dict[int, float | None], each_line_s: float) -> str:
    each_s = (took[15_000] or 0.0) / 15_000
    near, far = (f"{1000 * trip:.0f} ms" for trip in TRIPS_S)
    columns = [
        *("workers", "max_cpus", "mesh", "nodes that fit", "forwards of a worker", "forwards in all", "rented after"),
        *(f"a worker joins at {near} / {far}", f"the others know it at {near} / {far}", "head CPU, reading listeners"),
    ]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rented: dict[int, float] = {}
    for workers, max_cpus in SIZES:
        if workers not in rented:  # the limits of requests do not ask how large a machine is
            rented[workers] = rented_s(workers, max_cpus)
            logger.info("%d workers rented in %.0f s", workers, rented[workers])
        for mesh in MESHES:
            size = Size(workers, max_cpus, mesh)
            joins = [LOGIN_TRIPS * trip + each_s * size.of_a_worker for trip in TRIPS_S]
            later = [size.later_s(trip) for trip in TRIPS_S]
            cells = [
                *(f"{workers}", f"{max_cpus}", mesh, f"{max_nodes(max_cpus, mesh)}"),
                *(f"{size.of_a_worker:,}", f"{size.in_all:,}", f"{rented[workers] / 60:.1f} min"),
                f"{joins[0]:.1f} / {joins[1]:.1f} s",
                "-" if mesh == "head-only" else f"{later[0]:.1f} / {later[1]:.1f} s",
                f"{size.head_cpu_s(each_line_s):.1f} s",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    seen = ", ".join(
        f"{number:,}: {'the connection ended' if seconds is None else f'{seconds:.1f} s'}"
        for number, seconds in took.items()
    )
    return (
        "## The network at 64 and 256 workers (`python -m benchmarks.mesh_size`)\n\n"
        "Counted and modelled, not run: forwards as cluster/network/mesh.py makes them, renting by the provider on the"
        " imitated API with its rate limits, joining by what ssh takes here for its forwards and by round trips."
        f" Measured: `-R` forwards in one connection to a local sshd, {seen}.\n\n" + "\n".join(rows)
    )


if __name__ == "__main__":
    main()
