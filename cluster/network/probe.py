"""Whether a machine runs commands, which is more than that its sshd answers.

Vast.ai's shells put every session into tmux until `~/.no_auto_tmux` is there, and then run no command at all, or hang.
`onstart` makes that file, a moment after sshd is up. And Vast.ai's proxy accepts connections before the machine does.
"""

import logging
import math
import socket
import subprocess

from cluster.network.ssh_master import CONNECT_TIMEOUT_S, Endpoint, SshIdentity

logger = logging.getLogger(__name__)

GREETING_S = 4.0
"""How long an sshd may take to greet."""

COMMAND_S = 8.0
"""How long it may take to log in and run a command."""

MARK = "bruno-ray-runs-commands"


def runs_commands(endpoint: Endpoint, identity: SshIdentity, host_key_alias: str, patience: float = 1.0) -> bool:
    """Whether a command comes back from there; False is "not yet", and takes 12 s at most, times ``patience``."""
    if not greets(endpoint, patience * GREETING_S):
        return False
    options = identity.options(host_key_alias, math.ceil(patience * CONNECT_TIMEOUT_S))
    words = ["ssh", "-T", "-n", *options, "-p", str(endpoint.port)]
    words += [f"{endpoint.user}@{endpoint.host}", f"echo {MARK}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=patience * COMMAND_S, errors="replace")
    except subprocess.TimeoutExpired:
        logger.debug("%s logs us in, perhaps, and runs nothing", endpoint)
        return False
    if done.returncode or MARK not in done.stdout.split():
        logger.debug("%s runs no commands yet (%d): %s", endpoint, done.returncode, done.stderr.strip()[-200:])
        return False
    return True


def greets(endpoint: Endpoint, timeout_s: float = GREETING_S) -> bool:
    """Whether an sshd answers there."""
    try:
        with socket.create_connection((endpoint.host, endpoint.port), timeout_s) as connection:
            connection.settimeout(timeout_s)
            return connection.recv(4) == b"SSH-"
    except OSError as error:
        logger.debug("no sshd at %s: %s", endpoint, error)
        return False
