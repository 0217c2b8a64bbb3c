"""Folders of the driver's machine on the machines where workers run: local models, and the model just saved.

Machines of a cluster share no file system. What is on the hub each machine downloads for itself; a folder is read
from the driver's machine in chunks, once per machine, into the cache. This module imports no torch.
"""

import hashlib
import logging
from collections import deque
from pathlib import Path

import ray
from filelock import FileLock
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bruno_ray.errors import WorkerError
from bruno_ray.files import atomic_directory, cache_folder, expanded, output_errors, require_free_space, size_text

logger = logging.getLogger(__name__)

CHUNK_BYTES = 16 * 1024**2
CHUNKS_IN_FLIGHT = 4
"""Enough to fill a line of 50 ms and 1 Gbit/s, and little to hold in the object store."""


@ray.remote(num_cpus=0)
class FolderReader:
    """Reads files on the driver's machine for workers elsewhere."""

    def listing(self, folder: str) -> tuple[str, dict[str, int]]:
        """A key for the folder as it is now, and the size in bytes of every file in it by relative name."""
        root = Path(folder)
        digest = hashlib.sha256(str(root.resolve()).encode())
        sizes = {}
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            name, stat = path.relative_to(root).as_posix(), path.stat()
            digest.update(f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
            sizes[name] = stat.st_size
        return digest.hexdigest()[:24], sizes

    def read(self, folder: str, name: str, offset: int) -> bytes:
        with (Path(folder) / name).open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK_BYTES)


class Folders:
    """Made on the driver, used in workers; safe to pickle."""

    def __init__(self) -> None:
        self.node = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(self.node, soft=False)
        self.reader = FolderReader.options(scheduling_strategy=here).remote()

    def local(self, name: str) -> str:
        """What to load for the model ``name``: a folder on the driver's machine as a folder here, anything else as it
        is. Raises WorkerError when the driver's machine cannot be asked, OutputError when the disk is full.
        """
        if ray.get_runtime_context().get_node_id() == self.node:
            return name
        try:
            return str(self._copied(name)) if Path(name).is_absolute() else name
        except RayError as error:
            raise WorkerError(f"{name} could not be copied from the driver's machine: resume the run") from error

    def _copied(self, folder: str) -> Path:
        key, sizes = ray.get(self.reader.listing.remote(folder))
        if not sizes:
            raise WorkerError(f"{folder} on the driver's machine holds no files: check model.id")
        target = cache_folder("shipped") / key
        with output_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # workers of one machine share one copy
            if target.is_dir():
                return target
            require_free_space(target.parent, sum(sizes.values()), f"a copy of {folder}")
            logger.info("copying %s from the driver's machine: %s", folder, size_text(sum(sizes.values())))
            with atomic_directory(target) as aside:
                for name, size in sizes.items():
                    self._copy(folder, name, size, aside / name)
        return target

    def _copy(self, folder: str, name: str, size: int, to: Path) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        offsets = iter(range(0, size, CHUNK_BYTES))
        flying: deque[ray.ObjectRef] = deque()
        with to.open("wb") as file:
            while True:
                while len(flying) < CHUNKS_IN_FLIGHT and (offset := next(offsets, None)) is not None:
                    flying.append(self.reader.read.remote(folder, name, offset))
                if not flying:
                    break
                file.write(ray.get(flying.popleft()))
        if to.stat().st_size != size:
            raise WorkerError(f"{folder}/{name} changed while it was copied: resume the run")


def absolute_if_folder(name: str) -> str:
    """The full path of a model that is a folder here, so that it means the same in every process."""
    path = expanded(name)
    return str(path.resolve()) if path.is_dir() else name
