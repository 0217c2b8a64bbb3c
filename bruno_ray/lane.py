"""The Tune trainable: a light process that takes one batch of edits to the pool and waits for its outcomes.

There are more lanes than workers, so that a worker that finishes a batch finds the next one waiting. This module
imports no torch: a lane is an extra process on the driver's machine.
"""

import traceback
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayTaskError

from bruno_ray.broker import NoWorkerLeft
from bruno_ray.errors import BrunoError


class BatchLane(tune.Trainable):
    """One iteration evaluates one batch of trials; the process is used again for the next batch."""

    def setup(self, config: dict[str, Any], broker: Any = None) -> None:
        self._broker = broker
        self._first = True

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        """``worker`` and ``outcomes`` (one dict per edit), or ``error`` for the whole batch, or ``stop``: the pool
        has no worker left and the batch was not evaluated.

        An error is a result, not a crash: the study records it per trial and goes on. With no edits the lane only
        waits a while: Tune ends the process of a lane that has nothing to do, and starting one takes seconds.
        """
        if not self.config["edits"]:
            ray.get(self._broker.pause.remote())
            return {"done": True, "paused": True}
        if self._first:
            self._broker.lane_started.remote()
        result = self._evaluate()
        if self._first:
            ray.get(self._broker.lanes_started.remote())
            self._first = False
        return {"done": True, **result}

    def _evaluate(self) -> dict[str, Any]:
        try:
            worker, (value,) = ray.get(self._broker.evaluate.remote(self.config["edits"]))
            return {"worker": worker, "outcomes": ray.get(value)}
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, NoWorkerLeft):
                return {"stop": str(cause)}
            if isinstance(cause, BrunoError):
                return {"error": str(cause)}
            return {
                "error": f"{type(cause).__name__}: {cause}",
                "traceback": "".join(traceback.format_exception(error)),
            }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: the study's storage is the record."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""
