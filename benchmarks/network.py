"""What the tunnels cost: actor calls and 200 MB between two workers, star and direct, against a plain wire.

    python -m benchmarks.network [--rounds 2]
    python -m benchmarks.network join [--rounds 2]     how long eight workers take to join from 60 ms away

Head and workers are containers behind their own NAT on this machine (tests/cluster/lab), so all of them, and the
encryption, share its cores; the wire is a veth bridge between the same containers. Needs root.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from benchmarks.mesh_size import MESHES, Size
from benchmarks.results import write_section
from cluster.settings import MeshKind
from tests.cluster.lab import Lab, missing_for_lab, sweep
from tests.cluster.lab.far_away import ROUND_TRIP_S
from tests.cluster.lab.ray_lab import Joined, RayLab

logger = logging.getLogger(__name__)

NETWORKS = {"veth": "plain wire", "star": "star", "direct": "direct links"}
WORKERS, MAX_CPUS = 8, 32
"""Of the clusters that are joined; the ports are those of machines of 32 CPUs, though each offers one to Ray."""
STORE = 80_000_000

DRIVER = """
import json, time
import numpy as np, ray
ray.init(address="auto", log_to_driver=False)

@ray.remote(num_cpus=0.1)
class Node:
    def nop(self):
        return None
    def call_ms(self, other, calls):
        began = time.perf_counter()
        for _ in range(calls):
            ray.get(other.nop.remote())
        return (time.perf_counter() - began) / calls * 1e3
    def put(self):
        return [ray.put(np.random.default_rng().integers(0, 255, 200_000_000, np.uint8))]
    def fetch_mb_per_s(self, held):
        began = time.perf_counter()
        ray.get(held[0])
        return 200 / (time.perf_counter() - began)

head, first, second = (Node.options(resources={f"node{i}": 0.1}).remote() for i in range(3))
ray.get([first.call_ms.remote(second, 50), head.call_ms.remote(first, 50)])
seen = {"worker to worker, ms per call": [], "worker to worker, MB/s": [], "head to worker, MB/s": []}
for _ in range(4):
    seen["worker to worker, ms per call"].append(ray.get(first.call_ms.remote(second, 300)))
    for giver, name in ((first, "worker to worker, MB/s"), (head, "head to worker, MB/s")):
        held = ray.get(giver.put.remote())
        seen[name].append(ray.get(second.fetch_mb_per_s.remote(held)))
        del held
        time.sleep(0.5)
print("RESULT " + json.dumps(seen))
"""


def measure(network: str, key: Path) -> dict[str, list[float]]:
    """One cluster of three nodes on the given network, measured by a driver on the head."""
    with Lab() as lab:
        cluster = RayLab(lab, key, key.with_suffix(".pub").read_text(), workers=2, network=network)
        logger.info("%s: Ray on three nodes after %.0f s", network, cluster.start())
        output = cluster.python(DRIVER)
    return json.loads(next(line for line in output.splitlines() if line.startswith("RESULT "))[7:])


def joining(mesh: MeshKind, key: Path, ray: bool = True) -> Joined:
    """Workers that are all known at once to a head that is up; the tunnels alone unless `ray`."""
    with Lab(ROUND_TRIP_S) as lab:
        public = key.with_suffix(".pub").read_text()
        cluster = RayLab(lab, key, public, WORKERS, mesh, max_cpus=MAX_CPUS, cpus=1, store=STORE)
        cluster.start_head(ray)
        return cluster.join(ray)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["cost", "join"], default="cost")
    parser.add_argument("--rounds", type=int, default=2, help="clusters per network, taken in turn")
    parser.add_argument("--tunnels-alone", action="store_true", help="join: start no Ray, for which cores are missing")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if reason := missing_for_lab():
        raise SystemExit(reason)
    sweep()
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder) / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        if arguments.what == "join":
            write_section("network_join", joining_table(key, rounds, not arguments.tunnels_alone))
        else:
            write_section("network", cost_table(key, rounds))


def cost_table(key: Path, rounds: int) -> str:
    seen: dict[str, dict[str, list[float]]] = {network: {} for network in NETWORKS}
    for _ in range(rounds):
        for network in NETWORKS:
            for name, values in measure(network, key).items():
                seen[network].setdefault(name, []).extend(values)
    return table(seen, rounds)


def joining_table(key: Path, rounds: int, ray: bool) -> str:
    rows = [
        "| mesh | forwards of a worker | tunnels up | Ray started | a task has run on each | load before |",
        "|---" * 6 + "|",
    ]
    for _ in range(rounds):
        for mesh in MESHES:
            load = os.getloadavg()[0]
            joined = joining(mesh, key, ray)
            logger.info("%s: %s at a load of %.1f", mesh, joined, load)
            forwards = Size(WORKERS, MAX_CPUS, mesh).of_a_worker
            times = (joined.tunnels_s, joined.nodes_s, joined.tasks_s)
            cells = ["-" if seconds is None else f"{seconds:.0f} s" for seconds in times]
            rows.append(f"| {' | '.join([mesh, f'{forwards:,}', *cells, f'{load:.1f}'])} |")
    with_ray = "Each runs Ray with one CPU, and all share this machine's cores: starting Ray takes most of the time."
    without = "The tunnels alone: no Ray was started, for which this machine's cores were not to be had."
    return (
        "## Eight workers join from 60 ms away (`python -m benchmarks.network join`)\n\n"
        f"Seconds from when {WORKERS} machines that have booted are known to the head. They are behind NAT, 60 ms away,"
        f" with the ports of machines of {MAX_CPUS} CPUs. {with_ray if ray else without} One cluster a row.\n\n"
        + "\n".join(rows)
    )


def table(seen: dict[str, dict[str, list[float]]], rounds: int) -> str:
    names = list(next(iter(seen.values())))
    rows = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for network, title in NETWORKS.items():
        cells = [
            f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
            for values in seen[network].values()
        ]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return (
        "## The network between the nodes (`python -m benchmarks.network`)\n\n"
        "Three nodes behind NAT on one machine, reached by ssh only, against the same containers on a plain wire. "
        f"Median (lowest to highest) of 4 measurements in each of {rounds} clusters per network; 200 MB objects.\n\n"
        + "\n".join(rows)
    )


if __name__ == "__main__":
    main()
