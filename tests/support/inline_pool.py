"""A pool whose one worker lives in this process: the model is a real one, only Ray is left out."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from bruno_ray.pipeline import commands, finishing, judging, reproducing, side_by_side
from bruno_ray.settings import Settings
from bruno_ray.workers.model_worker import ModelWorker
from bruno_ray.workers.shipping import absolute_if_folder


class InlinePool:
    """The methods of `WorkerPool` that the pipeline calls, one call after the other."""

    def __init__(self, settings: Settings, folder: Path | None = None) -> None:
        """``folder``: the worker's current directory, which no other process of a cluster shares with the driver."""
        self._folder = folder
        model = settings.model.model_copy(update={"id": absolute_if_folder(settings.model.id)})
        self.worker = ModelWorker(model)
        self.calls: list[str] = []

    def __enter__(self) -> "InlinePool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_ready(self) -> None:
        pass

    def progress(self) -> str:
        return self.worker.progress()

    def set_context(self, context: Any) -> None:
        self._context = context

    def call(self, method: str, *args: Any, with_context: bool = False) -> Any:
        self.calls.append(method)
        with _inside(self._folder):
            return getattr(self.worker, method)(*([self._context] if with_context else []), *args)

    def map_shards(self, method: str, shards: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        for index, shard in enumerate(shards):
            yield index, self.call(method, *shard)


@contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


def use_inline_pools(monkeypatch: pytest.MonkeyPatch, folder: Path | None = None) -> list[InlinePool]:
    """Let the commands of this test use such pools; the list gets each one that they make."""
    made: list[InlinePool] = []

    def worker_pool(settings: Settings, workers: int | None = None) -> InlinePool:
        made.append(InlinePool(settings, folder))
        return made[-1]

    for module in (commands, finishing, judging, reproducing, side_by_side):
        monkeypatch.setattr(module, "worker_pool", worker_pool)
        monkeypatch.setattr(module, "ray_session", lambda settings: nullcontext())
    return made
