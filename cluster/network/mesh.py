"""The network between the nodes: which ssh connections there are, and what each of them carries.

The head dials every worker. A connection carries

    -R  the head's alias and ports, first, because a worker waits for them before it starts Ray
    -L  the worker's alias and ports, so that the head reaches the worker
    -R  the aliases and ports of all other workers, which listen on this worker and lead through the head: in a star

all of them on ssh's own command line, which asks for them at once: added one by one they take a round trip each, and
there are hundreds. Only those of machines that join later are added, in parts side by side. So a node has the same
address everywhere, its loopback alias (cluster/network/addresses.py), and no port is open to the outside.

Head-only: the first two. Forwards grow with the workers, not with their square, and nothing is added to a connection
when another worker joins; workers do not reach each other.

Star: all three, so that every node reaches every other.

Direct: workers also dial each other (cluster/network/peers.py), and the third kind of forward is only what stands in
for a direct link that cannot be had.

`-R` on an alias needs `GatewayPorts clientspecified` in the worker's sshd; with the usual `no` sshd listens on
127.0.0.1 *without a word*. So the listeners are looked up on the worker, and where they are wrong the connection is
made again through an sshd of our own (cluster/network/ssh_master.py).
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

from cluster.network.addresses import NodeAddress
from cluster.network.keys import host_key_alias
from cluster.network.peers import Peer, PeerDialer, make_peer_key
from cluster.network.ssh_master import Endpoint, Forward, LinkError, ListenError, SshIdentity, SshMaster
from cluster.settings import MeshKind

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 0.3
SLOWEST_RETRY_S = 30.0
"""Waits between attempts grow from one to the other for a machine that has not answered yet."""
LOST_RETRY_S = 0.7
"""A machine that answered within LOST_S is tried at least this often: its work is waiting."""
LOST_S = 180.0
LOOK_S = 0.2
"""How often the state of a connection is looked at; the time in which its loss is noticed."""
DIAL_S = 1.0
"""How often a worker is asked about its direct links."""
EVICTION_TRIES = 3

LOOKED_UP = 16
"""Of so many addresses the listeners are picked out on the worker."""

HEARTBEAT_S = 60.0
HEARTBEAT = 'touch "$HOME/.bruno-ray/heartbeat"'
"""Shows the worker that its head is there; without it the worker ends itself (cluster/vast/onstart.py)."""

SESSION = """\
d="$HOME/.bruno-ray/mesh"; mkdir -p "$d"; old=$(cat "$d/session" 2>/dev/null)
is_sshd() { case "$(cat "/proc/$1/comm" 2>/dev/null)" in sshd*) return 0 ;; esac; return 1; }
if [ -n "$old" ] && [ "$old" != "$PPID" ] && is_sshd "$old"; then
  kill "$old"; echo evicted
  for i in 1 2 3 4 5 6 7 8 9 10; do is_sshd "$old" || break; sleep 0.2; done
fi
echo "$PPID" > "$d/session"
"""
"""Ends the sshd process of our previous connection, which keeps its listeners for hours after a cut that neither side
has said goodbye across, says so, and notes the one of this connection: last, so that a connection that breaks
meanwhile does not make it forget the other."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster as the mesh sees it."""

    id: str
    index: int
    endpoints: tuple[Endpoint, ...] = field(compare=False)
    """Where its sshd may answer, best first; empty while it boots."""


@dataclass
class LinkStatus:
    """What is known about the connection to one node; times are seconds since the epoch."""

    state: str = "booting"
    """booting (no address yet), connecting, up, lost (was up before)."""
    since: float = field(default_factory=time.time)
    endpoint: str = ""
    inner_sshd: bool = False
    connections: int = 0
    adopted: int = 0
    """How many of the connections were made by an earlier supervisor."""
    last_up: float | None = None
    last_error: str = ""
    peers: list[int] = field(default_factory=list)
    """Indices of the workers that this one reaches through the head."""
    direct: list[int] = field(default_factory=list)
    """Indices of the workers that this one has dialled itself."""


class Link:
    """Keeps the connection from this machine to one node, with its forwards, until it is cancelled."""

    def __init__(
        self,
        node: Node,
        here: NodeAddress,
        folder: Path,
        identity: SshIdentity,
        max_cpus: int,
        kind: MeshKind,
        is_looked_after: Callable[[], bool],
    ) -> None:
        self.node = node
        self.status = LinkStatus()
        self.peers: dict[str, Peer] = {}
        """The other workers, whose ports this one needs: none where the mesh is head-only."""
        self._here = here
        self._there = NodeAddress(node.index, max_cpus)
        self._max_cpus = max_cpus
        self._master = SshMaster(folder / f"{node.id}.sock", identity, host_key_alias(node.id))
        self._inner_sshd = False
        self._attempts = 0
        self._dialer = PeerDialer(self._master, self._there, folder) if kind == "direct" else None
        self._dial_at = 0.0
        self._beat_at = 0.0
        self._is_looked_after = is_looked_after

    async def keep(self) -> None:
        """Connect, watch, connect again, for ever. Cancelling leaves the connection as it is; see `close`."""
        while True:
            if not (self.node.endpoints or await self._master.adopt()):
                await asyncio.sleep(LOOK_S)
                continue
            self._enter("lost" if self.status.last_up else "connecting")
            try:
                await self._connect()
                self._attempts = 0
                self._enter("up")
                await self._watch()
                raise LinkError("the connection ended")
            except (LinkError, OSError) as error:
                self.status.last_error = str(error)
                if isinstance(error, ListenError):
                    self._inner_sshd = not self._inner_sshd
                await self._master.close()
                logger.warning("node %d (%s): %s", self.node.index, self.node.id, error)
                self._enter("lost" if self.status.last_up else "connecting")
            await asyncio.sleep(self._pause())

    def renew(self, node: Node) -> None:
        """The same machine with other endpoints: a new address deserves a new try without a wait."""
        self.node = node
        self._attempts = 0

    async def close(self) -> None:
        await self._master.close()

    def _enter(self, state: str) -> None:
        if state != self.status.state:
            self.status.state, self.status.since = state, time.time()
            logger.info("node %d (%s) is %s", self.node.index, self.node.id, state)

    def _pause(self) -> float:
        self._attempts += 1
        slowest = SLOWEST_RETRY_S
        if self.status.last_up and time.time() - self.status.last_up < LOST_S:
            slowest = LOST_RETRY_S
        return min(slowest, FIRST_RETRY_S * 2 ** min(self._attempts - 1, 10)) * random.uniform(0.7, 1.0)

    async def _connect(self) -> None:
        """Have a connection with every forward in place, by adoption or anew. Raises `LinkError`."""
        peers = self._peers_through_head()
        there = [*both_sides("R", [self._here]), *both_sides("R", self._addresses(peers))]
        here = both_sides("L", [self._there])
        if adopted := await self._master.adopt():
            self.status.adopted += 1
            await self._master.run(SESSION)
        else:
            await self._open([*there, *here])
        self.status.endpoint, self.status.inner_sshd = str(self._master.endpoint), self._master.inner_sshd
        self._inner_sshd = self._master.inner_sshd
        self.status.connections += 1
        self.status.peers = []
        await self._listen_here(here)
        if not adopted and len(await self._missing_there(there)) == len(there):
            raise ListenError("its sshd listens on no alias (GatewayPorts is not clientspecified)")
        await self._listen_there(there)
        self.status.peers = sorted(peers)

    async def _open(self, forwards: Sequence[Forward]) -> None:
        """Connect, and once more where a dead connection of ours had the ports until it was ended."""
        endpoint = self.node.endpoints[self._attempts % len(self.node.endpoints)]
        for _ in range(EVICTION_TRIES):
            await self._master.open(endpoint, self._inner_sshd, forwards)
            evicted = "evicted" in (await self._master.run(SESSION)).split()
            refused = self._master.refused_forwards()
            if not (evicted or refused):
                return
            await self._master.close()
        raise LinkError(f"its sshd refuses to listen on {refused} ports: another connection holds them")

    async def _listen_here(self, wanted: Sequence[Forward]) -> None:
        """Listen for the worker on this machine, where ssh's command line has not brought that about."""
        found = listeners(Path("/proc/net/tcp").read_text())
        missing = [forward for forward in wanted if (forward.address, forward.port) not in found]
        await self._master.forward(missing)

    def _peers_through_head(self) -> set[int]:
        """Indices of the workers whose ports should listen on this one and lead through the head."""
        if self._dialer is not None:
            return self._dialer.overdue(self.peers)
        return {peer.address.index for peer in self.peers.values()}

    def _addresses(self, indices: Iterable[int]) -> list[NodeAddress]:
        return [NodeAddress(index, self._max_cpus) for index in sorted(indices)]

    async def _listen_there(self, wanted: Sequence[Forward]) -> None:
        """Make the machine listen for other nodes where it does not yet, and see that it does where it should."""
        if missing := await self._missing_there(wanted):
            await self._master.forward(missing)
            missing = await self._missing_there(wanted)
        if missing:
            where = f"{missing[0].address}:{missing[0].port}"
            raise ListenError(f"its sshd does not listen on {where} (GatewayPorts is not clientspecified)")

    async def _missing_there(self, wanted: Sequence[Forward]) -> list[Forward]:
        found = listeners(await self._master.run(listening_on({forward.address for forward in wanted})))
        return [forward for forward in wanted if (forward.address, forward.port) not in found]

    async def _watch(self) -> None:
        """Return when the connection has ended; meanwhile give the worker the ports of nodes that are new.

        Listeners for nodes that are gone stay: they lead to an alias where nobody listens, and are right again when
        the index is given to another machine.
        """
        while self._master.alive():
            self.status.last_up = time.time()
            if self._dialer is not None and time.monotonic() >= self._dial_at:
                await self._dial(self._dialer)
            if time.monotonic() >= self._beat_at and self._is_looked_after():
                await self._beat()
            peers = self._peers_through_head()
            if peers != set(self.status.peers):
                await self._listen_there(both_sides("R", self._addresses(peers - set(self.status.peers))))
                self.status.peers = sorted(peers)
            await asyncio.sleep(LOOK_S)

    async def _beat(self) -> None:
        """Show the worker that we are there. It ends itself after thirty that failed."""
        self._beat_at = time.monotonic() + HEARTBEAT_S
        try:
            await self._master.run(HEARTBEAT)
        except LinkError as error:
            logger.debug("no heartbeat for node %d: %s", self.node.index, error)

    async def _dial(self, dialer: PeerDialer) -> None:
        """Look after the direct links; where that fails the star stands in, and this connection stays."""
        try:
            await dialer.step(self.peers)
        except LinkError as error:
            if str(error) != self.status.last_error:
                logger.warning("direct links of node %d: %s", self.node.index, error)
            self.status.last_error = str(error)
        self.status.direct = sorted(dialer.direct(self.peers))
        self._dial_at = time.monotonic() + DIAL_S


class Mesh:
    """Keeps one `Link` per worker. Call `update` whenever it is known which nodes exist."""

    def __init__(
        self,
        folder: Path,
        identity: SshIdentity,
        max_cpus: int,
        kind: MeshKind,
        is_looked_after: Callable[[], bool] = lambda: True,
    ) -> None:
        """Workers are shown that their head is there while the cluster `is_looked_after`, else they end themselves."""
        self._is_looked_after = is_looked_after
        self.links: dict[str, Link] = {}
        self._kind: MeshKind = kind
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._folder = folder
        self._identity = identity
        self._max_cpus = max_cpus

    async def update(self, nodes: Iterable[Node]) -> None:
        """Have links to exactly these workers. Unless the mesh is head-only, let each know the ports of all others."""
        workers = {node.id: node for node in nodes if node.index > 0}
        for gone in [name for name in self.links if name not in workers]:
            await self._drop(gone)
        await self._close_forgotten(workers)
        if self._kind == "direct":
            await make_peer_key(self._folder)
        for name, node in workers.items():
            if name not in self.links:
                here, place = NodeAddress(0, self._max_cpus), (self._folder, self._identity, self._max_cpus)
                self.links[name] = Link(node, here, *place, self._kind, self._is_looked_after)
                self._tasks[name] = asyncio.create_task(self.links[name].keep(), name=f"link-{name}")
            elif self.links[name].node.endpoints != node.endpoints:
                self.links[name].renew(node)
        if self._kind == "head-only":
            return
        peers = {
            name: Peer(name, NodeAddress(node.index, self._max_cpus), node.endpoints) for name, node in workers.items()
        }
        for name, link in self.links.items():
            link.peers = {other: peer for other, peer in peers.items() if other != name}

    def failed(self) -> list[BaseException]:
        """Defects: a link only ends when it is cancelled."""
        ended = [task for task in self._tasks.values() if task.done() and not task.cancelled()]
        return [error for task in ended if (error := task.exception()) is not None]

    async def detach(self) -> None:
        """Stop watching and leave the connections to the next supervisor."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()
        self.links.clear()

    async def close(self) -> None:
        """End all connections."""
        for name in list(self.links):
            await self._drop(name)

    async def _drop(self, name: str) -> None:
        task, link = self._tasks.pop(name), self.links.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await link.close()
        logger.info("node %d (%s) is gone", link.node.index, name)

    async def _close_forgotten(self, workers: dict[str, Node]) -> None:
        """End connections that an earlier supervisor left to machines that exist no more."""
        for socket in self._folder.glob("*.sock"):
            if socket.stem not in workers and socket.stem not in self.links:
                forgotten = SshMaster(socket, self._identity, host_key_alias(socket.stem))
                await forgotten.adopt()
                await forgotten.close()


def both_sides(side: str, addresses: Sequence[NodeAddress]) -> list[Forward]:
    """Forwards of all ports of the given nodes."""
    return [Forward(side, address.alias, port) for address in addresses for port in address.ports]


def listening_on(addresses: Collection[str]) -> str:
    """The command that prints /proc/net/tcp, only the lines of a few addresses: there are thousands, and each machine
    that joins is looked up on all others."""
    if len(addresses) > LOOKED_UP:
        return "cat /proc/net/tcp"
    patterns = " ".join(f"-e ' {bytes(reversed(IPv4Address(address).packed)).hex().upper()}:'" for address in addresses)
    return f"echo; grep {patterns} /proc/net/tcp || true"


def listeners(proc_net_tcp: str) -> set[tuple[str, int]]:
    """Addresses and ports that listen, from the text of /proc/net/tcp (hexadecimal, address bytes reversed)."""
    found = set()
    for line in proc_net_tcp.splitlines()[1:]:
        words = line.split()
        if len(words) > 3 and words[3] == "0A":
            address, _, port = words[1].partition(":")
            found.add((".".join(str(byte) for byte in reversed(bytes.fromhex(address))), int(port, 16)))
    return found
