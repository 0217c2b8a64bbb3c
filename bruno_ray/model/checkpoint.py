"""A model's safetensors files, tensor by tensor: what lies where, read without loading the model.

A file is eight bytes with the length of the header, the header (JSON: tensor name -> dtype, shape, offsets), and the
tensors' bytes without gaps (https://huggingface.co/docs/safetensors, "Format"). It is read with plain reads, not
mapped: what a process may address then bounds the memory it takes, and other bytes can be streamed past.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.errors import ModelError
from bruno_ray.model.writers import Matrix

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of weights that can be edited, by their name in a header."""

LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, and where its bytes are."""

    file: Path
    name: str
    dtype: str
    """As the header writes it, such as "BF16"."""

    shape: tuple[int, ...]
    start: int
    """First byte, counted from the beginning of the file."""

    n_bytes: int

    @property
    def end(self) -> int:
        return self.start + self.n_bytes

    @property
    def is_float(self) -> bool:
        """Whether it holds numbers as they are, in a dtype that an edit can be computed from."""
        return self.dtype in FLOATS

    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in the order of their bytes.

    Raises:
        ModelError: the file is damaged or cut off, or no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if 0 < length <= min(size - 8, LONGEST_HEADER) else b""
    first = 8 + length
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        found = [
            StoredTensor(
                file=file,
                name=name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                start=first + entry["data_offsets"][0],
                n_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in entries.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{file} is damaged, its header cannot be read: download it again") from error
    found.sort(key=lambda tensor: (tensor.start, tensor.end))
    ends = [first, *(tensor.end for tensor in found)]
    fits = all(tensor.n_bytes == tensor.numel() * FLOATS[tensor.dtype].itemsize for tensor in found if tensor.is_float)
    if [*(tensor.start for tensor in found), size] != ends or any(tensor.n_bytes < 0 for tensor in found) or not fits:
        raise ModelError(f"{file} is damaged or cut off, its tensors do not fill it: download it again")
    return {tensor.name: tensor for tensor in found}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model in ``folder`` is loaded from, as transformers chooses them:
    `model.safetensors`, else those that the index names. Empty where there are neither.

    Raises:
        ModelError: the index cannot be read, or a file that it names is missing.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        return []
    files = [folder / name for name in sorted(set(read_index(folder).values()))]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{folder} has no {file.name}, which its {INDEX_FILE} names: download it again")
    return files


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> name of its file. Raises ModelError where the index is damaged."""
    try:
        names: dict[str, Any] = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(name, str) and "/" not in name for name in names.values()):
            return names
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ModelError(f"{folder / INDEX_FILE} is damaged: download it again")


@dataclass(frozen=True, kw_only=True)
class StoredMatrix(Matrix):
    """A matrix that writes to the residual stream, in its file: `Matrix` without the model in memory.

    ``module`` is that of a model on the meta device; ``index`` is a slice of the stored tensor.
    """

    tensor: StoredTensor

    @property
    def quantized(self) -> bool:
        return not self.tensor.is_float

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def start(self) -> int:
        """First of its bytes in the file."""
        return self.tensor.start + (self.index or 0) * self.n_bytes

    @property
    def n_bytes(self) -> int:
        return self.tensor.n_bytes if self.index is None else self.tensor.n_bytes // self.tensor.shape[0]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.index is None else self.tensor.shape[1:]

    def numel(self) -> int:
        return self.tensor.numel() if self.index is None else self.tensor.numel() // self.tensor.shape[0]

    def read(self) -> Float[Tensor, "d_model in"]:
        """The weight in float32, read from the file. Raises ModelError if the file has become shorter."""
        content = bytearray(self.n_bytes)
        with self.tensor.file.open("rb") as stream:
            stream.seek(self.start)
            if stream.readinto(content) != self.n_bytes:
                raise ModelError(f"{self.tensor.file} is cut off: download it again")
        weight = torch.frombuffer(content, dtype=FLOATS[self.tensor.dtype]).view(self.stored_shape).float()
        return weight.T if self.transposed else weight

    def stored(self, weight: Float[Tensor, "d_model in"]) -> Tensor:
        """``weight`` as its file keeps it: cast to the stored dtype, contiguous, transposed if that is."""
        weight = weight.T if self.transposed else weight
        return weight.to(FLOATS[self.tensor.dtype]).contiguous()
