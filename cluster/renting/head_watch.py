"""Noticing, from the user's computer, that the head is lost: nobody on a lost head can tell of it."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray.autoscaler.tags import STATUS_UP_TO_DATE

from bruno_ray.files import write_json
from cluster.clock import Clock
from cluster.notices.notices import Notices
from cluster.renting.tags import ClusterNode
from cluster.vast.models import State

logger = logging.getLogger(__name__)

SILENT_S = 180.0
"""How long a host may be without a heartbeat before its head counts as lost."""


class HeadWatch:
    """Remembers in a file which head this computer saw at work, until the cluster is taken down from here."""

    def __init__(self, folder: Path, clock: Clock, notices: Notices) -> None:
        self._file = folder / "head.json"
        self._clock = clock
        self._notices = notices

    def look(self, nodes: Iterable[ClusterNode]) -> list[str]:
        """Compare what exists with what was there; what is wrong is told, and returned as lines."""
        heads = {node.id: node for node in nodes if node.is_head}
        seen = self._read()
        for head in heads.values():
            at_work = head.label.status == STATUS_UP_TO_DATE and head.instance.state is State.RUNNING
            if at_work or head.is_paused:
                self._notices.arm("head-lost", head.id)
                self._write({"id": head.id})
                return []
        if seen.get("id") is None:
            return []
        reason = self._lost(heads.get(seen["id"]), seen)
        if not reason:
            return []
        said = f"head {seen['id']} {reason}"
        self._notices.tell("head-lost", said, seen["id"])
        return [said]

    def forget(self) -> None:
        """It was taken down on purpose."""
        self._file.unlink(missing_ok=True)

    def _lost(self, head: ClusterNode | None, seen: dict[str, Any]) -> str:
        """Why it counts as lost; empty while it does not."""
        if head is None:
            return "is gone, and was not taken down from this computer; workers without it end themselves"
        if head.instance.state is State.STOPPED:
            return f"has stopped ({head.instance.status_msg or 'its host does not say why'}); its disk is still there"
        if head.instance.state is not State.UNREACHABLE:
            self._write({"id": head.id})
            return ""
        now = self._clock.time()
        since = seen.setdefault("silent_since", now)
        self._write(seen)
        silent_s = now - since
        return f"has sent no sign of life for {silent_s:.0f} s" if silent_s >= SILENT_S else ""

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s) and is begun anew", self._file, error)
            return {}

    def _write(self, seen: dict[str, Any]) -> None:
        if seen != self._read():
            write_json(self._file, seen)
