"""`cluster doctor`: takes one cheap machine through its life and writes down what Vast.ai does, for a few cents.

What our code assumes and Vast.ai does not document (docs/cluster.md) is looked at where it can be. The machine is
destroyed whatever happens, and ends itself after half an hour besides.
"""

import argparse
import logging
import shlex
import time
from collections.abc import Callable
from typing import Any

from bruno_ray import terminal
from bruno_ray.files import write_json
from cluster.cli.asking import agree
from cluster.cli.planning import describe
from cluster.errors import ClusterError, NodeError
from cluster.jobs.session import Session
from cluster.jobs.shell import Shell
from cluster.network.keys import KEY_NAME, KNOWN_HOSTS_NAME, host_key_alias, public_key
from cluster.network.probe import greets, runs_commands
from cluster.network.ssh_master import Endpoint, SshIdentity
from cluster.settings import NodeSettings, Requirements
from cluster.vast.client import VastClient
from cluster.vast.models import CreateRequest, Instance, State
from cluster.vast.offers import RankedOffer, Wanted, find_offers
from cluster.vast.onstart import Switch, onstart

logger = logging.getLogger(__name__)

LABEL = "bruno-ray:doctor:w1"
"""A cluster of its own, so that no autoscaler takes the machine for one of its nodes."""

LIFE_S = 1800.0
BOOT_S = 900.0
COMMANDS_S = 180.0
POLL_S = 5.0
MOST_DOLLARS_PER_HOUR = 0.15
LONGEST_VARIABLE = 256

OWN_COMMANDS = 'env | grep -c "^CONTAINER_" > ~/container_variables; env | wc -c > ~/environment_size'
QUESTIONS = {
    "CONTAINER_ variables in onstart": "cat ~/container_variables",
    "longest variable arrived": "grep -c . ~/environment_size",
    "umask of shells": "umask",
    "programs": "command -v curl python3 tmux rsync sshd | tr '\\n' ' '",
    "GatewayPorts of sshd": "PATH=$PATH:/usr/sbin sshd -T 2>/dev/null | grep -i gatewayports",
    "ports that listen": "cat /proc/net/tcp | awk '$4 == \"0A\" {print $2}' | sort -u | tr '\\n' ' '",
    "memory limit": "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null",
    "dead man's switch": "pgrep -fc LOOK_S || true",
}


def doctor(arguments: argparse.Namespace) -> int:
    session, out = Session.open(arguments.cluster_config), terminal.console()
    client = session.provider.new_client()
    facts: dict[str, Any] = {"url": session.settings.vast_url, "credit": client.credit()}
    image = NodeSettings.from_config(
        session.config["available_node_types"][session.config["head_node_type"]]["node_config"]
    )
    node = NodeSettings(
        image=image.image,
        disk_gb=16,
        requirements=Requirements(max_price_per_hour=MOST_DOLLARS_PER_HOUR, min_duration_h=1),
    )
    wanted = Wanted.of(node)
    page = client.search_offers(wanted.everything() | {"limit": 1000})
    ranking = find_offers(client, wanted)
    facts["search"] = {
        "offers for a limit of 1000": len(page.offers),
        "said to be cut": page.cut,
        "offers that a filter should have left out": len(ranking.rejected) if ranking.accepted else None,
    }
    best = min(ranking.best(), key=lambda ranked: ranked.price_per_hour)
    most = LIFE_S / 3600 * best.price_per_hour + best.traffic_cost
    agree(f"Rent {describe(best)} for some minutes, {most:.2f} $ at most, and destroy it?", arguments.yes)
    key = session.folder / KEY_NAME
    contract = rent(client, best, node, public_key(key), session.settings.vast_url)
    out.print(f"instance {contract} is rented")
    try:
        instance = watch_boot(client, contract, facts, out.print)
        ask_machine(instance, SshIdentity(key, session.folder / KNOWN_HOSTS_NAME), facts)
    except ClusterError as error:
        facts["failed"] = str(error)
    finally:
        client.destroy_instance(contract, deadline_s=120)
    client.destroy_instance(contract, deadline_s=120)
    facts["destroyed twice without an error"] = True
    facts["shown after its end"] = client.instance(contract) is not None
    facts["listed after its end"] = any(found.id == contract for found in client.instances())
    for name, fact in facts.items():
        out.print(f"{name}: {fact}", highlight=False)
    write_json(session.folder / "doctor.json", facts)
    out.print(f"written to {session.folder / 'doctor.json'}; the machine is destroyed")
    return 1 if "failed" in facts else 0


def rent(client: VastClient, best: RankedOffer, node: NodeSettings, key: str, url: str) -> int:
    """The contract's number. The machine ends itself after `LIFE_S`, with or without us."""
    switch = Switch(url, LIFE_S, time.time() + LIFE_S)
    request = CreateRequest(
        image=node.image,
        disk=node.disk_gb or 16,
        label=LABEL,
        env={"CLUSTER_LONGEST": "x" * LONGEST_VARIABLE},
        onstart=onstart(key, OWN_COMMANDS, switch),
    )
    return client.create_instance(best.offer.id, request)


def watch_boot(client: VastClient, contract: int, facts: dict[str, Any], say: Callable[[str], Any]) -> Instance:
    """Until it runs; notes when each status came. Raises `NodeError` where it never will."""
    begun, seen = time.time(), {}
    while time.time() < begun + BOOT_S:
        instance = client.instance(contract)
        if instance is not None:
            status = instance.actual_status or "null"
            if status not in seen:
                seen[status] = round(time.time() - begun)
                say(f"{status} after {seen[status]} s {instance.status_msg}".rstrip())
            facts["seconds to each status"] = seen
            if instance.state is State.RUNNING and instance.ssh_endpoints:
                facts["ports"] = sorted(instance.published_ports)
                facts["status_msg"] = instance.status_msg
                facts["fields that could not be read"] = list(instance.unreadable)
                return instance
            if instance.boot_error:
                raise NodeError(f"it will never run: {instance.boot_error}")
        time.sleep(POLL_S)
    raise NodeError(f"it does not run after {BOOT_S:.0f} s")


def ask_machine(instance: Instance, identity: SshIdentity, facts: dict[str, Any]) -> None:
    """When each address greets and when it runs commands, and what the machine says of itself."""
    begun, alias = time.time(), host_key_alias(str(instance.id))
    ways: dict[str, dict[str, int]] = {str(endpoint): {} for endpoint in instance.ssh_endpoints}
    usable: Endpoint | None = None
    while usable is None and time.time() < begun + COMMANDS_S:
        for endpoint in instance.ssh_endpoints:
            way = ways[str(endpoint)]
            if greets(endpoint):
                way.setdefault("greets after s", round(time.time() - begun))
            if runs_commands(endpoint, identity, alias):
                way.setdefault("runs commands after s", round(time.time() - begun))
                usable = usable or endpoint
        time.sleep(1)
    facts["addresses"] = ways
    if usable is None:
        raise NodeError(f"no address runs a command within {COMMANDS_S:.0f} s")
    shell = Shell(usable, identity, alias)
    for name, command in QUESTIONS.items():
        try:
            facts[name] = shell.run(f"bash -c {shlex.quote(command)}").strip()
        except NodeError as error:
            facts[name] = f"? {error}"
