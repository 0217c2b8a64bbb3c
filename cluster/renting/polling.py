"""The API's list of instances, asked for by one process of a machine at a time and read by all of them.

Autoscaler and supervisor on the head need the same list every few seconds, and Vast.ai allows one request a second for
each key and address. Whoever finds the list too old asks, and leaves it in a file for the others.
"""

import json
import logging
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from bruno_ray.files import write_json
from cluster.clock import Clock
from cluster.renting.tags import Label
from cluster.vast.client import VastClient
from cluster.vast.errors import VastUnavailableError
from cluster.vast.models import Instance

logger = logging.getLogger(__name__)


class InstanceList:
    """Safe for several threads and processes."""

    def __init__(self, client: VastClient, folder: Path, clock: Clock, fresh_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._client = client
        self._file = folder / "instances.json"
        self._lock_file = folder / "instances.lock"
        self._clock = clock
        self._fresh_s = fresh_s

    def get(self, deadline_s: float, *, force: bool = False) -> tuple[list[Instance], float]:
        """All instances of the account, and when that was asked, Unix seconds.

        A list that another process began to ask for at most `fresh_s` ago will do; with `force` only one that was begun
        after this call. Raises `VastError`.
        """
        called = self._clock.time()
        oldest = called if force else called - self._fresh_s
        if not force and (kept := self._kept(oldest)) is not None:
            return kept
        try:
            with FileLock(self._lock_file, timeout=deadline_s):
                if (kept := self._kept(oldest)) is not None:
                    return kept
                begun = self._clock.time()
                instances = self._client.instances(deadline_s)
                rows = [_kept_of(instance) for instance in instances]
                write_json(self._file, {"begun": begun, "instances": rows}, durable=False)
                return instances, begun
        except Timeout as error:
            raise VastUnavailableError(
                f"another process has been asking for the instances for {deadline_s:.0f} s; try again later"
            ) from error

    def outdate(self) -> None:
        """We have changed what exists: the next one asks, of whatever process."""
        self._file.unlink(missing_ok=True)

    def _kept(self, oldest: float) -> tuple[list[Instance], float] | None:
        """What the file holds, unless that was asked before `oldest` or by a clock that is ahead."""
        try:
            content = json.loads(self._file.read_text())
            begun = float(content["begun"])
            if not oldest < begun <= self._clock.time():
                return None
            return [Instance.model_validate(row) for row in content["instances"]], begun
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            logger.warning("%s cannot be read (%s); the API is asked", self._file, error)
            return None


def _kept_of(instance: Instance) -> dict[str, Any]:
    """Of an instance that is none of ours only that it exists: its environment may hold what is nobody's business."""
    own = Label.parse(instance.label) is not None
    return instance.model_dump(mode="json", include=None if own else {"id", "label"})
