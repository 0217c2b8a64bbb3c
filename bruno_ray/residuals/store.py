"""Residuals on disk, so that they are computed once: Arrow IPC files, one per shard of prompts.

    <cache>/<key>/prompts-00000-00063.arrow     one row per prompt: its index and its residuals, flattened

The key is a hash of everything that the numbers depend on. A shard is written aside and then renamed, so that a
killed run leaves finished shards and nothing else, and several writers of one shard do no harm. Its schema holds
the key, the shape and a sha256 of the values; a file that does not match is treated as missing, with a warning.

Shapes: N prompts, P positions (last prompt token, then answer tokens), L stream points, D = d_model.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from bruno_ray.errors import OutputError
from bruno_ray.files import atomic_file, expanded

logger = logging.getLogger(__name__)

FORMAT = "1"
SHARD_SIZE = 64


@dataclass(frozen=True)
class Shard:
    """Prompts `start` to `stop - 1` of a prompt list."""

    index: int
    start: int
    stop: int


def residual_key(model: str, prompts: Sequence[Sequence[int] | str], **settings: str | int) -> str:
    """A hash over the model's fingerprint, the prompts (token ids, or rendered texts) and settings.

    `settings` are those that change the numbers (dtype, answer_tokens ...); a batch size is none of them.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, model, settings], sort_keys=True).encode())
    for prompt in prompts:
        digest.update(json.dumps(prompt if isinstance(prompt, str) else [int(token) for token in prompt]).encode())
        digest.update(b"\n")
    return digest.hexdigest()


class ResidualStore:
    """The shards of one prompt list. `missing` says what to compute, `write` keeps it, `read` returns everything.

    Args:
        cache_dir: Folder of all keys, made if need be.
        key: From `residual_key`.
        n_prompts: Length of the prompt list.
        shard_size: Prompts of one file, and of one piece of work for an actor.

    Raises:
        OutputError: The folder cannot be made.
    """

    def __init__(self, cache_dir: Path, key: str, n_prompts: int, shard_size: int = SHARD_SIZE) -> None:
        self.folder = expanded(cache_dir) / key[:32]
        self.key = key
        starts = range(0, n_prompts, shard_size)
        self.shards = [Shard(i, start, min(start + shard_size, n_prompts)) for i, start in enumerate(starts)]
        self._verified: dict[int, Float[np.ndarray, "prompt position layer d_model"]] = {}  # memory maps
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def path(self, shard: Shard) -> Path:
        return self.folder / f"prompts-{shard.start:05d}-{shard.stop - 1:05d}.arrow"

    def missing(self) -> list[Shard]:
        """Shards that are not on disk, or not whole. Checks the sum of every file once per store object."""
        return [shard for shard in self.shards if self._load(shard) is None]

    def write(self, shard: Shard, residuals_NPLD: Float[np.ndarray, "prompt position layer d_model"]) -> None:
        """Keep one shard's residuals as float32.

        Raises:
            OutputError: the disk is full or the folder not writable; nothing half-written is left.
        """
        values = np.ascontiguousarray(residuals_NPLD, dtype=np.float32)
        if values.ndim != 4 or len(values) != shard.stop - shard.start:
            raise ValueError(f"shard {shard.index} has {shard.stop - shard.start} prompts, got shape {values.shape}")
        width = int(np.prod(values.shape[1:]))
        metadata = {
            "format": FORMAT,
            "key": self.key,
            "shape": json.dumps(values.shape),
            "start": str(shard.start),
            "sha256": _checksum(values),
        }
        table = pa.table(
            [
                pa.array(np.arange(shard.start, shard.stop), pa.int32()),
                pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width),
            ],
            schema=pa.schema([("prompt", pa.int32()), ("residual", pa.list_(pa.float32(), width))], metadata=metadata),
        )
        path = self.path(shard)
        try:
            with atomic_file(path) as aside, pa.ipc.new_file(str(aside), table.schema) as writer:
                writer.write_table(table)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._verified.pop(shard.index, None)

    def read(self) -> Float[np.ndarray, "prompt position layer d_model"]:
        """All residuals, in the order of the prompts. A single shard comes as a read-only memory map.

        Raises:
            OutputError: a shard is missing.
        """
        missing = self.missing()
        if missing:
            names = ", ".join(str(shard.index) for shard in missing)
            raise OutputError(f"residual shards {names} of {self.folder} are missing: run again to compute them")
        arrays = [self._verified[shard.index] for shard in self.shards]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def _load(self, shard: Shard) -> Float[np.ndarray, "prompt position layer d_model"] | None:
        if shard.index not in self._verified:
            path = self.path(shard)
            if not path.exists():
                return None
            try:
                self._verified[shard.index] = self._open(path, shard)
            except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("residuals in %s are damaged (%s): they are computed again", path, error)
                return None
        return self._verified[shard.index]

    def _open(self, path: Path, shard: Shard) -> Float[np.ndarray, "prompt position layer d_model"]:
        """Map a file and check that it is this shard and whole; any of many exceptions if it is not."""
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            metadata = {name.decode(): value.decode() for name, value in (reader.schema.metadata or {}).items()}
            if metadata["format"] != FORMAT or metadata["key"] != self.key or int(metadata["start"]) != shard.start:
                raise ValueError("it belongs to something else")
            column = reader.read_all().column("residual").combine_chunks()
        shape = tuple(json.loads(metadata["shape"]))
        values = column.flatten().to_numpy(zero_copy_only=True).reshape(shape)
        if shape[0] != shard.stop - shard.start:
            raise ValueError(f"it holds {shape[0]} prompts")
        if _checksum(values) != metadata["sha256"]:
            raise ValueError("its checksum is wrong")
        return values


def _checksum(values: np.ndarray) -> str:
    return hashlib.sha256(memoryview(values).cast("B")).hexdigest()


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot keep residuals in {folder} ({error.strerror}): free some space or set residuals.cache_dir"
    )
