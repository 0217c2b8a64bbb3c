"""The Tune trainable: the one light process, the lane, between Tune and the pool. It imports no torch.

A Tune trial is one swap: the lane takes along the batches that are due, and brings back whatever has finished,
whichever batches it had brought before. One lane thus serves any number of workers.
"""

import traceback
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError, RayTaskError

from bruno_ray.errors import BrunoError
from bruno_ray.workers.broker import NoWorkerLeft
from bruno_ray.workers.messages import BatchResult, CallReply, Failed, Lost, NoWorkers, Scored

SWAP = "swap"
"""Key of a ``Swap`` in a Tune trial's config."""

RESULTS = "results"
"""Key of the ``BatchResults`` in a Tune trial's result."""


class BatchLane(tune.Trainable):
    """One iteration is one swap; the process is used again for the next."""

    def setup(self, config: dict[str, Any], broker: Any = None) -> None:
        self._broker = broker

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        """An error is a result, not a crash: the study records it per trial and goes on."""
        replies = ray.get(self._broker.swap.remote(self.config[SWAP]))
        return {"done": True, RESULTS: [(batch_id, batch_result(reply)) for batch_id, reply in replies]}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: the study's storage is the record."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""


def batch_result(reply: CallReply | Exception) -> BatchResult:
    """What became of a batch, its outcomes fetched."""
    try:
        if isinstance(reply, Exception):
            raise reply
        return Scored(reply.worker, ray.get(reply.result[0]))
    except Exception as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        match cause:
            case NoWorkerLeft():
                return NoWorkers(str(cause))
            case BrunoError():
                return Failed(str(cause))
            case RayError():  # the worker's machine went away with the finished outcomes
                return Lost(str(cause))
            case _:
                return Failed(f"{type(cause).__name__}: {cause}", "".join(traceback.format_exception(error)))
