"""Direct links: a worker dials the other workers itself, told to by the head through the head's connection to it.

A direct link carries `-L` only: the other worker's alias and ports listen here and lead straight there. It is made with
a key of its own that lies on the workers and opens nothing but Ray's ports of the machine it is for (no shell, no other
address), and Ray's ports ask for the token. What a worker cannot reach directly within a few seconds it reaches through
the head, as in a star, until it can.
"""

import asyncio
import json
import logging
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.network.addresses import NodeAddress
from cluster.network.keys import host_key_alias
from cluster.network.ssh_master import Endpoint, Forward, LinkError, SshIdentity, SshMaster

logger = logging.getLogger(__name__)

PEER_KEY = "peer_key"
PATIENCE_S = 6.0
"""How long a direct link may be missing before the star stands in for it."""
FIRST_RETRY_S = 1.0
SLOWEST_RETRY_S = 60.0

THERE = SshIdentity(Path("~/.bruno-ray/mesh/peer_key"), Path("~/.bruno-ray/mesh/peer_hosts"), accept_new=False)

RECEIVE = """\
umask 077; d="$HOME/.bruno-ray/mesh"; mkdir -p "$d"
python3 -c '
import json, pathlib, sys
told = json.load(sys.stdin)
folder = pathlib.Path("~/.bruno-ray/mesh").expanduser()
(folder / "peer_key").write_text(told["key"])
(folder / "peer_key").chmod(0o600)
(folder / "peer_hosts").write_text(told["hosts"])
authorized = pathlib.Path("~/.ssh/authorized_keys").expanduser()
old = authorized.read_text()
lines = [line for line in old.splitlines() if not line.endswith(" bruno-ray-peer")]
new = chr(10).join([*lines, told["authorized"], ""])
if new != old:
    authorized.write_text(new)
'
"""
"""Takes key, known hosts and the line for authorized_keys from standard input, so that they are in no process list."""

ALIVE = """\
cd "$HOME/.bruno-ray/mesh" 2>/dev/null || exit 0
for s in peer-*.sock; do
  [ -S "$s" ] || continue
  if ssh -F /dev/null -S "$s" -O check peer 2>/dev/null; then echo "$s"; else rm -f "$s"; fi
done
true
"""


@dataclass(frozen=True)
class Peer:
    """Another worker, as the one that dials it sees it."""

    id: str
    address: NodeAddress
    endpoints: tuple[Endpoint, ...]


@dataclass
class _Dial:
    """What is known about the link to one peer; times are of the monotonic clock."""

    missing_since: float
    attempts: int = 0
    next_attempt: float = 0.0
    carries: bool = False
    """Connected, with all forwards in place."""


async def make_peer_key(folder: Path) -> None:
    """The key pair of the direct links, made on the head where there is none."""
    if not (folder / PEER_KEY).exists():
        command = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "bruno-ray-peer", "-f", str(folder / PEER_KEY))
        process = await asyncio.create_subprocess_exec(*command)
        if await process.wait():
            raise LinkError("ssh-keygen could not make the key of the direct links")


class PeerDialer:
    """The direct links of one worker. ``folder`` holds the peer key and the pinned host keys on the head."""

    def __init__(self, master: SshMaster, here: NodeAddress, folder: Path) -> None:
        self._master = master
        self._here = here
        self._folder = folder
        self._told = ""
        self._dials: dict[str, _Dial] = {}

    def direct(self, peers: Mapping[str, Peer]) -> set[int]:
        """Indices of the peers that the worker reaches directly."""
        return {peer.address.index for peer in peers.values() if self._dial(peer).carries}

    def overdue(self, peers: Mapping[str, Peer]) -> set[int]:
        """Indices of the peers that the worker has not reached directly for so long that the star should stand in."""
        now = time.monotonic()
        return {
            peer.address.index
            for peer in peers.values()
            if not (dial := self._dial(peer)).carries and now - dial.missing_since > PATIENCE_S
        }

    async def step(self, peers: Mapping[str, Peer]) -> None:
        """See which links live, begin those that are missing and let those that are new carry. Raises `LinkError`."""
        await self._tell()
        alive = {name.removeprefix("peer-").removesuffix(".sock") for name in (await self._master.run(ALIVE)).split()}
        for gone in (alive | self._dials.keys()) - peers.keys():
            self._dials.pop(gone, None)
            if gone in alive:
                await self._master.run(self._through(gone, "-O", "exit") + "; true")
        now = time.monotonic()
        for name, peer in peers.items():
            dial = self._dial(peer)
            if name in alive:
                if not dial.carries:
                    await self._let_carry(peer, dial)
            else:
                if dial.carries:
                    dial.carries, dial.missing_since, dial.attempts, dial.next_attempt = False, now, 0, now
                if peer.endpoints and now >= dial.next_attempt:
                    await self._begin(peer, dial)

    def _dial(self, peer: Peer) -> _Dial:
        return self._dials.setdefault(peer.id, _Dial(time.monotonic()))

    async def _tell(self) -> None:
        """Give the worker the key, the host keys pinned so far, and the right to be dialled."""
        public = (self._folder / f"{PEER_KEY}.pub").read_text().strip()
        hosts = self._folder / "known_hosts"
        told = json.dumps(
            {
                "key": (self._folder / PEER_KEY).read_text(),
                "hosts": hosts.read_text() if hosts.exists() else "",
                "authorized": f'restrict,port-forwarding,command="false",permitopen="{self._here.alias}:*" {public}',
            }
        )
        if told != self._told:
            await self._master.run(RECEIVE, told)
            self._told = told

    async def _begin(self, peer: Peer, dial: _Dial) -> None:
        """Start ssh on the worker without waiting for it; the next step sees whether it lives."""
        endpoint = peer.endpoints[dial.attempts % len(peer.endpoints)]
        dial.attempts += 1
        dial.next_attempt = time.monotonic() + min(SLOWEST_RETRY_S, FIRST_RETRY_S * 2 ** min(dial.attempts, 10))
        words = ["ssh", "-M", "-N", "-S", f"peer-{peer.id}.sock", *THERE.options(host_key_alias(peer.id))]
        command = shlex.join([*words, "-p", str(endpoint.port), f"{endpoint.user}@{endpoint.host}"])
        log = shlex.quote(f"peer-{peer.id}.log")
        await self._master.run(f'cd "$HOME/.bruno-ray/mesh"; setsid {command} < /dev/null > {log} 2>&1 &')

    async def _let_carry(self, peer: Peer, dial: _Dial) -> None:
        """Take the peer's ports from the star and give them to the direct link."""
        try:
            await self._master.cancel([Forward("R", peer.address.alias, port) for port in peer.address.ports])
        except LinkError:
            logger.debug("the star did not stand in for node %d on %d", peer.address.index, self._here.index)
        forwards = [Forward("L", peer.address.alias, port) for port in peer.address.ports]
        try:
            await self._master.run(self._through(peer.id, "-O", "forward", *(w for f in forwards for w in f.words())))
        except LinkError as error:
            logger.warning("node %d cannot listen for node %d: %s", self._here.index, peer.address.index, error)
            dial.next_attempt = time.monotonic() + SLOWEST_RETRY_S
            await self._master.run(self._through(peer.id, "-O", "exit") + "; true")
        else:
            dial.carries, dial.attempts = True, 0
            logger.info("node %d reaches node %d directly", self._here.index, peer.address.index)

    def _through(self, peer_id: str, *words: str) -> str:
        """A shell command for the worker's own ssh to a peer."""
        command = shlex.join(["ssh", "-F", "/dev/null", "-S", f"peer-{peer_id}.sock", *words, "peer"])
        return f'cd "$HOME/.bruno-ray/mesh"; {command}'
