"""One imitated rented machine: a container behind its own NAT router."""

import logging
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.cluster.lab.namespaces import processes_in, remove_namespace, run

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[3]
INIT = Path(__file__).with_name("container_init.sh")
BASHRC = Path(__file__).with_name("bashrc.sh")
FAR_AWAY = Path(__file__).with_name("far_away.py")
INSIDE = "172.17.0.2"
ROUTER = "172.17.0.1"
START_TIMEOUT_S = 120.0
"""For a machine whose processors others have as well."""
UNSHARE = ("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
SSHD_CONFIG = """\
Port 22
HostKey /run/lab/host_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
AllowTcpForwarding yes
GatewayPorts {gateway_ports}
MaxStartups 200
PrintMotd no
Subsystem sftp /usr/lib/openssh/sftp-server
"""
ROUTER_RULES = """\
table ip nat {{
  chain in {{ type nat hook prerouting priority -100; {sshd} }}
  chain out {{ type nat hook postrouting priority 100; oifname "wan" masquerade; }}
}}
table ip filter {{
  chain through {{
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname "lan" accept
    ct status dnat accept
  }}
}}
"""
TO_SSHD = "ip daddr {public} tcp dport {port} dnat to {inside}:22;"
"""Left out where a proxy on the router stands for the distance."""
REFUSAL_RULES = """\
table ip refuse {{}}
delete table ip refuse
table ip refuse {{
  chain through {{ type filter hook forward priority -10; ip daddr {} ct state new reject; }}
}}
"""
CUT_RULES = """\
table ip cut {
  chain through { type filter hook prerouting priority -300; policy drop; }
  chain own { type filter hook output priority -300; policy drop; }
}
"""


def shared_paths() -> list[str]:
    """What every container sees of the host, read-only: the checkout and the Python installation."""
    paths: list[Path] = []
    for path in sorted({CHECKOUT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}):
        if not any(path.is_relative_to(outer) for outer in paths) and not path.is_relative_to("/usr"):
            paths.append(path)
    return [str(path) for path in paths]


class Container:
    """``number`` is unique in its lab and decides the public address; it is no node index."""

    def __init__(
        self,
        lab_name: str,
        folder: Path,
        wan: str,
        number: int,
        keys: Sequence[str],
        gateway_ports: str,
        env: Mapping[str, str],
        onstart: str | None,
        round_trip_s: float = 0.0,
    ) -> None:
        self.name = f"c{number}"
        self.namespace = f"{lab_name}-n{number}"
        self.router = f"{lab_name}-r{number}"
        self.public_address = f"10.99.{1 + number // 200}.{1 + number % 200}"
        self.ssh_port = 40020 + number
        self.folder = folder / self.name
        self._wan = wan
        self._keys = keys
        self._gateway_ports = gateway_ports
        self._env = env
        self._onstart = onstart
        self._number = number
        self._round_trip_s = round_trip_s
        self._process: subprocess.Popen[bytes] | None = None
        self._proxy: subprocess.Popen[str] | None = None

    @property
    def home(self) -> Path:
        """The container's /root, seen from the host."""
        return self.folder / "root"

    def start(self) -> None:
        """Make the network and the file system, start sshd and wait until it answers from the internet."""
        self._make_network()
        self._make_files()
        arguments = [str(self.folder), self.name, *shared_paths()]
        with open(self.folder / "sshd.log", "wb") as log:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *UNSHARE, "bash", str(INIT), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_for_sshd()
        if self._round_trip_s:
            self._be_far_away()

    def stop(self) -> None:
        """Kill every process of the container and remove its network and files; twice is harmless."""
        for namespace in (self.namespace, self.router):
            remove_namespace(namespace)
        for process in (self._process, self._proxy):
            if process is not None:
                process.wait(timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def cut(self) -> None:
        """Drop every packet between this machine and the internet, without a word to either side."""
        run("ip", "netns", "exec", self.router, "nft", "-f", "-", input=CUT_RULES)

    def mend(self) -> None:
        run("ip", "netns", "exec", self.router, "nft", "delete", "table", "ip", "cut")

    def refuse(self, address: str | None) -> None:
        """Refuse new connections from this machine to one address, or to none again."""
        run(
            "ip",
            "netns",
            "exec",
            self.router,
            "nft",
            "-f",
            "-",
            input=REFUSAL_RULES.format(address or "255.255.255.254"),
        )

    def processes(self) -> list[int]:
        """Process ids, as the host sees them."""
        return processes_in(self.namespace)

    def read(self, path: str) -> str:
        """A file below the container's /root or /tmp."""
        area, _, rest = path.lstrip("/").partition("/")
        return (self.folder / area / rest).read_text()

    def _make_network(self) -> None:
        run("ip", "netns", "add", self.namespace)
        run("ip", "netns", "add", self.router)
        port_name = f"port{self._number}"
        lines = [
            f"link add eth0 netns {self.namespace} type veth peer name lan netns {self.router}",
            f"link add wan netns {self.router} type veth peer name {port_name} netns {self._wan}",
        ]
        run("ip", "-batch", "-", input="\n".join(lines))
        lines = [
            "link set lo up",
            f"addr add {INSIDE}/16 dev eth0",
            "link set eth0 up",
            f"route add default via {ROUTER}",
        ]
        run("ip", "-n", self.namespace, "-batch", "-", input="\n".join(lines))
        lines = ["link set lo up", f"addr add {ROUTER}/16 dev lan", "link set lan up"]
        lines += [f"addr add {self.public_address}/16 dev wan", "link set wan up"]
        run("ip", "-n", self.router, "-batch", "-", input="\n".join(lines))
        run("ip", "-n", self._wan, "link", "set", port_name, "master", "bridge0", "up")
        run("ip", "netns", "exec", self.router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        place = {"public": self.public_address, "port": self.ssh_port, "inside": INSIDE}
        rules = ROUTER_RULES.format(sshd="" if self._round_trip_s else TO_SSHD.format(**place))
        run("ip", "netns", "exec", self.router, "nft", "-f", "-", input=rules)

    def _be_far_away(self) -> None:
        """Let sshd be reached through a proxy on the router, which ends with the router's namespace."""
        words = [self.public_address, str(self.ssh_port), INSIDE, "22", str(self._round_trip_s / 2)]
        proxy = subprocess.Popen(
            ["ip", "netns", "exec", self.router, sys.executable, str(FAR_AWAY), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._proxy = proxy
        assert proxy.stdout is not None
        if not proxy.stdout.readline():
            raise RuntimeError(f"the proxy of container {self.name} ended with {proxy.wait()}")

    def _make_files(self) -> None:
        for part in ("rootfs", "root/.ssh", "tmp"):
            (self.folder / part).mkdir(parents=True)
        (self.folder / "tmp").chmod(0o1777)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{INSIDE} {self.name}\n")
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(gateway_ports=self._gateway_ports))
        environment = [f"export {name}={shlex.quote(value)}\n" for name, value in self._env.items()]
        (self.folder / "environment").write_text("".join(environment))
        (self.folder / "onstart.sh").write_text((self._onstart or "") + "\n")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "host_key"))
        (self.home / ".ssh").chmod(0o700)
        self.home.chmod(0o700)
        authorized = self.home / ".ssh" / "authorized_keys"
        authorized.write_text("".join(key.strip() + "\n" for key in self._keys))
        authorized.chmod(0o600)
        shutil.copyfile(BASHRC, self.home / ".bashrc")
        if self._onstart is None:
            (self.home / ".no_auto_tmux").touch()

    def _wait_for_sshd(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        log = self.folder / "sshd.log"
        while "Server listening" not in log.read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"container {self.name} did not start: {log.read_text()[-500:]}")
            time.sleep(0.02)
