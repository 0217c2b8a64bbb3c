"""The actor around one worker object, and what is shown of it. Imports no torch: the worker it builds does."""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray import cloudpickle

from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.plan import TrainingPlan
from bruno_ray.workers.messages import EditOutcome, edit_outcome

STARTING, IDLE, BUSY, LOST, FAILED = "starting", "idle", "busy", "lost", "failed"


@dataclass
class WorkerState:
    """What the progress view shows of one worker."""

    name: str
    state: str = STARTING
    host: str = ""
    pid: int = 0
    memory: int = 0
    """Resident bytes of the process."""

    gpu_memory: int = 0
    """Bytes that torch holds on GPUs."""

    calls: int = 0
    losses: int = 0
    doing: str = ""
    """What it is at, with counts and a time to go."""

    to_go: float | None = None
    """Seconds until that is done; None where nothing can be said."""


@ray.remote(concurrency_groups={"control": 1})
class WorkerActor:
    """Owns one worker object (a ``ModelWorker``) and forwards calls to it."""

    _packed = b""
    _opened: Any = None

    def start(self, payload: bytes) -> None:
        """Build the worker. Apart from ``__init__``, so that its errors arrive as what they are."""
        factory, args = cloudpickle.loads(payload)
        self._worker = factory(*args)

    def set_context(self, context: bytes) -> None:
        """What calls get that want the context. Opened by the first of them, where an error is that call's."""
        self._packed, self._opened = context, None

    def _context(self) -> Any:
        if self._packed:
            self._opened, self._packed = cloudpickle.loads(self._packed), b""
        return self._opened

    def call(self, method: str, arguments: bytes, with_context: bool = False) -> tuple[None, Any]:
        """(None, result): with two returns the broker can await the first and pass the second on unopened."""
        context = [self._context()] if with_context else []
        return None, getattr(self._worker, method)(*context, *cloudpickle.loads(arguments))

    def evaluate(
        self, edits: Sequence[Edit | TrainingPlan], rivals: Sequence[tuple[float, float]] = ()
    ) -> tuple[None, tuple[EditOutcome, ...]]:
        """Like ``call`` with the context, with outcomes that a process without torch can open."""
        outcomes = self._worker.evaluate(self._context(), list(edits), rivals)
        return None, tuple(edit_outcome(outcome) for outcome in outcomes)

    @ray.method(concurrency_group="control")
    def stat(self) -> dict[str, Any]:
        """Answered while a call is running, from another thread."""
        gpu_memory = 0
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            gpu_memory = sum(torch.cuda.memory_reserved(i) for i in range(torch.cuda.device_count()))
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "memory": psutil.Process().memory_info().rss,
            "gpu_memory": gpu_memory,
            "doing": getattr(getattr(self, "_worker", None), "progress", str)(),
            "to_go": getattr(getattr(self, "_worker", None), "to_go", lambda: None)(),
        }
