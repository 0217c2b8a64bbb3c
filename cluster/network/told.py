"""Which machines there are, told to the head by a launcher elsewhere, where the head itself has no key of the API.

One file that is replaced as a whole each few seconds. How old it is says whether the launcher is there.
"""

import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster.errors import NodeError
from cluster.network.mesh import Node
from cluster.network.ssh_master import Endpoint

FILE = "told.json"
TAKEN = "taken"
TAKE = f"""\
umask 077; d="$HOME/.bruno-ray/mesh"; mkdir -p "$d"; cd "$d" || exit
while IFS= read -r line; do printf "%s" "$line" > {FILE}.new && mv {FILE}.new {FILE} && echo {TAKEN}; done"""
"""The head's part: takes a message a line, whole lines only, and says so."""

FRESH_S = 60.0
"""A launcher that has said nothing for so long is not there, and workers are no longer shown that they have a head."""


def message(nodes: Iterable[Node], costs: dict[str, Any]) -> str:
    """What the launcher says, in one line; `costs` is what its ledger holds, for what runs have cost."""
    return json.dumps({"nodes": [dataclasses.asdict(node) for node in nodes], "costs": costs})


def node_of(row: dict[str, Any]) -> Node:
    """The inverse of ``dataclasses.asdict``, for what has been through JSON."""
    return Node(row["id"], row["index"], tuple(Endpoint(**endpoint) for endpoint in row["endpoints"]))


class Told:
    """The head's reading of it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE

    def is_fresh(self) -> bool:
        """Whether the launcher is there, by this machine's own clock."""
        return self._age_s() < FRESH_S

    def nodes(self) -> list[Node]:
        """Raises `NodeError` where the launcher is not there."""
        if not self.is_fresh():
            raise NodeError(
                "the launcher is not there, which runs on the machine where `bruno-ray cluster up` was called: nothing"
                " is rented or given back, and workers end themselves when it stays away"
            )
        return [node_of(row) for row in self._content()["nodes"]]

    def costs(self) -> dict[str, Any]:
        """Raises `NodeError` as well."""
        return self._content()["costs"]

    def _age_s(self) -> float:
        try:
            return time.time() - self._file.stat().st_mtime
        except FileNotFoundError:
            return float("inf")

    def _content(self) -> dict[str, Any]:
        try:
            return json.loads(self._file.read_text())
        except (OSError, ValueError) as error:
            raise NodeError(f"what the launcher said cannot be read ({error})") from error
