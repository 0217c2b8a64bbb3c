"""Next-token log-probabilities of many prompts under many edits, made in pieces between the steps of answers."""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from bruno_ray.ablation.resolving import ResolvedEdit
from serve.engine.batch import EditableModel, next_logprobs


class ScoreJob:
    """One call of ``next_logprobs``: rows are (edit, prompt) pairs, longest prompts first."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        edits: Sequence[ResolvedEdit | None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.loop = loop
        self.future: asyncio.Future[np.ndarray] = loop.create_future()
        self.cancelled = False
        self._prompts, self._edits = prompts, edits
        order = sorted(range(len(prompts)), key=lambda p: -len(prompts[p]))
        self._rows = [(k, p) for p in order for k in range(len(edits))]
        self._n_done = 0
        self._result: np.ndarray | None = None

    @property
    def done(self) -> bool:
        return self._n_done == len(self._rows)

    def advance(self, model: EditableModel, n_tokens: int) -> None:
        """Score some rows, about so many tokens, one row at least. If it raises, nothing has changed."""
        longest = len(self._prompts[self._rows[self._n_done][1]])
        piece = self._rows[self._n_done : self._n_done + max(1, n_tokens // longest)]
        found_PV = next_logprobs(model, [self._prompts[p] for _, p in piece], [self._edits[k] for k, _ in piece])
        if self._result is None:
            self._result = np.empty((len(self._edits), len(self._prompts), found_PV.shape[-1]), dtype=np.float32)
        edits, prompts = zip(*piece)
        self._result[list(edits), list(prompts)] = found_PV.numpy()
        self._n_done += len(piece)

    def finish(self) -> Callable[[], None]:
        """To be called in the loop."""
        return lambda: None if self.future.done() else self.future.set_result(self._result)

    def fail(self, error: Exception) -> Callable[[], None]:
        return lambda: None if self.future.done() else self.future.set_exception(error)
