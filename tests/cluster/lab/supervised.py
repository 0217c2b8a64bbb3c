"""The supervisor as it runs on a head, with the list of machines in a file where the API would be.

python -m tests.cluster.lab.supervised start|keep|run MESH MAX_CPUS

Reads ~/nodes.json; "unavailable" there is an outage.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import get_args

from cluster import supervisor
from cluster.errors import NodeError
from cluster.network.mesh import Mesh, Node
from cluster.network.ssh_master import Endpoint, SshIdentity
from cluster.settings import MeshKind

MAX_CPUS = 2
FOLDER = supervisor.FOLDER
PROGRAM = [sys.executable, "-m", "tests.cluster.lab.supervised"]


def nodes() -> list[Node]:
    listed = json.loads(Path("~/nodes.json").expanduser().read_text())
    if listed == "unavailable":
        raise NodeError("the API does not answer")
    return [Node(row["id"], row["index"], tuple(Endpoint(*pair) for pair in row["endpoints"])) for row in listed]


def main() -> None:
    action, kind, max_cpus = sys.argv[1:4]
    (mode,) = (known for known in get_args(MeshKind) if known == kind)
    if action == "start":
        supervisor.start([*PROGRAM, "keep", mode, max_cpus], FOLDER)
    elif action == "keep":
        supervisor.keep([*PROGRAM, "run", mode, max_cpus], FOLDER)
    else:
        supervisor.log_to(FOLDER)
        supervisor.ASK_S = 0.3
        mesh = Mesh(FOLDER, SshIdentity(Path("~/key").expanduser(), FOLDER / "known_hosts"), int(max_cpus), mode)
        asyncio.run(supervisor.Supervisor(FOLDER, mesh, nodes).run(int(sys.argv[-1])))
        supervisor.spawn([*PROGRAM, "keep", mode, max_cpus], FOLDER)


if __name__ == "__main__":
    main()
