"""The Tune trainable: a light process that takes batches of edits to the pool and brings back outcomes.

A Tune trial is one such trip. A lane does not stay with the batches it has brought: it returns with whatever has
finished meanwhile, so a few lanes serve any number of workers. This module imports no torch: a lane is an extra
process on the driver's machine.
"""

import traceback
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError, RayTaskError

from bruno_ray.errors import BrunoError
from bruno_ray.workers.broker import NoWorkerLeft


class BatchLane(tune.Trainable):
    """One iteration is one trip; the process is used again for the next."""

    def setup(self, config: dict[str, Any], broker: Any = None) -> None:
        self._broker = broker
        self._name = ray.get_runtime_context().get_actor_id()
        self._first = True

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        """``results``: (ticket, result) of every batch that has come back. A result holds ``worker`` and ``outcomes``
        (one dict per edit), or ``error`` for the whole batch, or ``stop``: the pool has no worker left and the batch
        was not evaluated, or ``lost``: so were its outcomes.

        An error is a result, not a crash: the study records it per trial and goes on.
        """
        if self._first:
            self._broker.lane_started.remote()
        trip = {name: self.config[name] for name in ("batches", "wait", "again")}
        replies = ray.get(self._broker.exchange.remote(self._name, **trip))
        results = [(ticket, _result(reply)) for ticket, reply in replies]
        if self._first:
            ray.get(self._broker.lanes_started.remote())
            self._first = False
        return {"done": True, "results": results}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: the study's storage is the record."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""


def _result(reply: Any) -> dict[str, Any]:
    try:
        if isinstance(reply, Exception):
            raise reply
        worker, (value,) = reply
        return {"worker": worker, "outcomes": ray.get(value)}
    except Exception as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, NoWorkerLeft):
            return {"stop": str(cause)}
        if isinstance(cause, BrunoError):
            return {"error": str(cause)}
        if isinstance(cause, RayError):  # the worker's machine went away with the finished outcomes
            return {"lost": str(cause)}
        return {
            "error": f"{type(cause).__name__}: {cause}",
            "traceback": "".join(traceback.format_exception(error)),
        }
