"""A base model's safetensors files copied with the edit in them, without loading the model.

An edited tensor keeps dtype and shape, so each new file is the old one, byte for byte, except where an edited matrix
lies: header, layout, names and whatever no model class loads stay. Several files are copied at a time; one matrix at a
time is in memory.
"""

import hashlib
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch

from bruno_ray.ablation.closed_forms import DirectionBank, Factors, apply_to_columns, apply_to_weight
from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.resolving import Resolver, part_of
from bruno_ray.errors import ModelError, OutputError
from bruno_ray.files import flush, size_text
from bruno_ray.model.architectures import Architecture
from bruno_ray.model.checkpoint import StoredMatrix, read_header
from bruno_ray.publishing.resuming import PartialFolder

logger = logging.getLogger(__name__)

THREADS = min(4, os.cpu_count() or 1)
"""Files that are copied at a time, at most. More gain nothing where one disk is read and written."""

CHUNK_BYTES = 1024**2


@dataclass(frozen=True)
class Change:
    """The bytes of one matrix that an edit changes, and the writer that it belongs to."""

    matrix: StoredMatrix
    writer: int
    columns: list[int] | None = None
    """Of the matrix that are edited; None is all, none where the matrix lies among edited ones in one tensor."""

    @property
    def start(self) -> int:
        return self.matrix.start

    @property
    def end(self) -> int:
        return self.matrix.start + self.matrix.n_bytes


@dataclass
class StoredEdit:
    """An edit of stored weights. Factors are worked out when a writer's first matrix is written.

    Whatever needs a matrix in float32 happens under one lock: memory does not grow with the number of threads.
    """

    architecture: Architecture
    """Of an empty model; its writers are those in the files."""

    edit: Edit
    bank: DirectionBank
    _factors: dict[int, Factors] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def changes(self) -> dict[Path, list[Change]]:
        """File -> what is changed in it, in the order of its bytes."""
        found: defaultdict[Path, list[Change]] = defaultdict(list)
        for i, writer in enumerate(self.architecture.writers):
            if self.edit.strength(writer.component, writer.layer) == 0:
                continue
            part = part_of(self.edit, writer)
            if part == ():
                continue
            chosen = {id(matrix): columns for matrix, columns in writer.chosen(part)}
            for matrix in writer.matrices:
                assert isinstance(matrix, StoredMatrix)
                if id(matrix) in chosen or matrix.index is not None:  # a tensor is written, and checked, as a whole
                    found[matrix.tensor.file].append(Change(matrix, i, chosen.get(id(matrix), [])))
        return {file: sorted(changes, key=lambda change: change.start) for file, changes in found.items()}

    @torch.no_grad()
    def content(self, change: Change) -> memoryview:
        """The edited bytes: computed in float32, cast to the stored dtype.

        Raises ModelError if that dtype cannot hold them.
        """
        with self._lock:
            factors = self._factors_of(change.writer)
            if change.columns is None:
                weight = apply_to_weight(change.matrix.read(), factors, in_place=True)
            else:
                weight = apply_to_columns(change.matrix.read(), factors, change.columns)
            edited = change.matrix.stored(weight)
            if not torch.isfinite(torch.stack(edited.aminmax())).all():  # both are NaN where one value is
                raise ModelError(
                    f"{change.matrix.name} is not finite in {str(edited.dtype).removeprefix('torch.')} after the edit,"
                    " nothing was written: pick a trial with smaller weights"
                )
            return memoryview(edited.view(torch.uint8).numpy()).cast("B")

    def _factors_of(self, writer: int) -> Factors:
        if writer not in self._factors:
            alone = replace(self.architecture, writers=[self.architecture.writers[writer]], readers=[])
            (factors,) = Resolver(alone).resolve_all([self.edit], self.bank)[0].factors
            assert factors is not None  # of strength 0 there are no changes
            self._factors[writer] = factors
        return self._factors[writer]


class ShardCopies:
    """The copies of all files of a base model."""

    def __init__(self, files: Sequence[Path], edit: StoredEdit, partial: PartialFolder) -> None:
        self._files, self._edit, self._partial = files, edit, partial
        self._changes = edit.changes()
        self._stopped = threading.Event()
        self._n_bytes = 0
        self._total = sum(file.stat().st_size for file in files)
        self._counting = threading.Lock()

    def progress(self) -> str:
        """How far it has come, in words."""
        n_files = sum(file.name in self._partial.complete for file in self._files)
        return (
            f"{n_files} of {len(self._files)} files written and checked,"
            f" {size_text(self._n_bytes)} of {size_text(self._total)}"
        )

    def write(self) -> dict[str, str]:
        """Write and check every file that is not complete yet. Returns the sha256 of each by name.

        Raises:
            ModelError: an edited matrix is not finite, or a file of the base model is damaged.
            OutputError: what lies on the disk is not what was written.
        """
        kept = self._partial.complete
        with ThreadPoolExecutor(min(THREADS, len(self._files)), "shard") as threads:
            try:
                tasks = {threads.submit(self._one, file, kept.get(file.name)): file for file in self._files}
                digests = {tasks[task].name: task.result() for task in as_completed(tasks)}
            except BaseException:
                self._stopped.set()
                threads.shutdown(cancel_futures=True)
                raise
        n_kept = sum(digests[name] == digest for name, digest in kept.items() if name in digests)
        if n_kept:
            logger.info("%d of %d files were there from an earlier attempt", n_kept, len(digests))
        return dict(sorted(digests.items()))

    def _one(self, source: Path, known: str | None) -> str:
        target = self._partial.folder / source.name
        if known is not None and self._hash(target) == known:
            self._count(target.stat().st_size)
            return known
        edited = self._copy(source, target, self._changes.get(source, []))
        flush(target)
        digest = self._check(source, target, edited)
        self._partial.completed(source.name, digest)
        return digest

    def _copy(self, source: Path, target: Path, changes: list[Change]) -> dict[str, str]:
        """Write the new file: the old one's bytes, and in place of some of them the edited ones.

        Returns the sha256 of each edited tensor by name.
        """
        edited: defaultdict[str, hashlib._Hash] = defaultdict(hashlib.sha256)
        with source.open("rb") as old, target.open("wb") as new:
            for change in changes:
                self._put(self._chunks(old, change.start - old.tell()), new)
                content = self._edit.content(change)
                edited[change.matrix.tensor.name].update(content)
                self._put([content], new)
                old.seek(change.end)
            self._put(self._chunks(old, os.fstat(old.fileno()).st_size - old.tell()), new)
        return {name: digest.hexdigest() for name, digest in edited.items()}

    def _put(self, contents: Iterable[bytes | memoryview], new: BinaryIO) -> None:
        for content in contents:
            new.write(content)
            self._count(len(content))

    def _count(self, n_bytes: int) -> None:
        with self._counting:
            self._n_bytes += n_bytes

    def _check(self, source: Path, target: Path, edited: Mapping[str, str]) -> str:
        """Read back what was written: its edited tensors must be what was meant, and everything else equal to the base.

        Returns the sha256 of the file.
        """
        tensors = read_header(source)
        header_end = min((tensor.start for tensor in tensors.values()), default=source.stat().st_size)
        whole, wrong = hashlib.sha256(), []
        with source.open("rb") as old, target.open("rb") as new:
            for name, end in [("header", header_end), *((name, tensor.end) for name, tensor in tensors.items())]:
                old.seek(new.tell())
                equal, part = True, hashlib.sha256()
                for content in self._chunks(new, end - new.tell()):
                    whole.update(content)
                    if name in edited:
                        part.update(content)
                    else:
                        equal &= old.read(len(content)) == content
                if not equal or edited.get(name, part.hexdigest()) != part.hexdigest():
                    wrong.append(name)
        if wrong or target.stat().st_size != source.stat().st_size:
            raise OutputError(
                f"{target} does not hold what was written to it ({', '.join(wrong[:3]) or 'its length'}):"
                " check the disk and save again"
            )
        return whole.hexdigest()

    def _hash(self, file: Path) -> str:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            for content in self._chunks(stream, file.stat().st_size):
                digest.update(content)
        return digest.hexdigest()

    def _chunks(self, stream: BinaryIO, n_bytes: int) -> Iterator[bytes]:
        """The next ``n_bytes`` in pieces. Raises ModelError if there are fewer."""
        while n_bytes:
            if self._stopped.is_set():
                raise OutputError("saving was stopped: save again")
            content = stream.read(min(CHUNK_BYTES, n_bytes))
            if not content:
                raise ModelError(f"{stream.name} has become shorter meanwhile: download it again")
            n_bytes -= len(content)
            yield content
