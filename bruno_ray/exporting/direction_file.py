"""Directions and edit in one safetensors file that other tools can read, and that ``bruno-ray apply`` bakes.

Tensors, float32 (P = n_layers + 1 stream points: the embedding's output, then the output of each block):

    bank.SET               (P, rank, d_model)          every direction set that the run chose from; orthonormal rows
    edit.directions        (n_layers, rank, d_model)   what each layer is edited with
    edit.strength.PART     (n_layers,)                 ablation strength of "attention", "mlp" or a further component, 0
                                                       where untouched

Metadata has one key, ``bruno_ray``, with JSON (``Description``): the edit, and which base model it was found on. With
norm_mode ``none`` the edit is ``W' = W - strength V^T (V W)`` for every weight W (d_model, in) that writes to the
residual stream in that layer and part; the other modes are in docs/exports.md.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bruno_ray import __version__
from bruno_ray.ablation.closed_forms import DirectionBank, directions_for
from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import OutputError
from bruno_ray.exporting.base import Options, Source, short_card
from bruno_ray.files import atomic_directory
from bruno_ray.model.architectures import Architecture
from bruno_ray.model.loading import load_model

FORMAT = 1
FORMATS = (FORMAT, FORMAT + 1)
"""Readable ones. The second has edits of some experts or heads, of what is read, or of biases: a reader that knows the
first only would leave that away."""

FILE_NAME = "edit.safetensors"
KEY = "bruno_ray"
SAMPLED_ROWS = 16
"""Of every weight that count for ``digest_of``: training changes all of them."""


class Base(BaseModel):
    """The model that the directions belong to."""

    model_config = ConfigDict(extra="forbid")

    name: str
    """Hub id, or the last part of a path."""

    revision: str | None
    family: str
    n_layers: int
    d_model: int
    digest: str
    """``digest_of`` its weights."""


class Description(BaseModel):
    """The JSON under ``bruno_ray`` in the file's metadata."""

    model_config = ConfigDict(extra="forbid")

    format: int
    version: str
    """Of bruno-ray."""

    run: str
    trial: int
    behaviour: str
    edit: dict[str, Any]
    base: Base


def export(source: Source, folder: Path, options: Options) -> str:
    """Write the file and a card. Raises as ``exporting.base.Exporter``."""
    loaded = load_model(source.model, full_precision=True)
    architecture = loaded.architecture
    base = Base(
        name=source.base_name,
        revision=source.model.revision,
        family=architecture.family,
        n_layers=architecture.n_layers,
        d_model=architecture.d_model,
        digest=digest_of(architecture),
    )
    described = Description(
        format=FORMATS[bool(source.edit.further or source.edit.parts)],
        version=__version__,
        run=source.run,
        trial=source.trial,
        behaviour=source.behaviour,
        edit=source.edit.to_dict(),
        base=base,
    )
    card = short_card(
        source,
        "bruno-ray",
        f"Directions of {source.behaviour} in {source.base_name}",
        f"`bruno-ray apply {FILE_NAME} MODEL --to FOLDER` writes the edit into the weights of {source.base_name}.",
    )
    with atomic_directory(folder) as aside:
        metadata = {KEY: described.model_dump_json()}  # one entry: several are written in an order by chance
        save_file(_tensors(source, architecture), aside / FILE_NAME, metadata=metadata)
        (aside / "README.md").write_text(card, encoding="utf-8")
    return f"{folder / FILE_NAME}: {len(source.bank)} direction sets, and trial {source.trial} made of them"


def _tensors(source: Source, architecture: Architecture) -> dict[str, Tensor]:
    tensors = {f"bank.{name}": directions.float().contiguous() for name, directions in source.bank.items()}
    tensors["edit.directions"] = directions_for(source.edit, source.bank).contiguous()
    for component in (*architecture.components, *source.edit.further):
        strengths = [source.edit.strength(component, layer) for layer in range(architecture.n_layers)]
        tensors[f"edit.strength.{component}"] = torch.tensor(strengths)
    return tensors


def read(file: Path) -> tuple[Description, Edit, DirectionBank]:
    """What is in a file. Raises OutputError if it is none of ours, damaged, or of a later version."""
    file = file / FILE_NAME if file.is_dir() else file
    if not file.is_file():
        raise OutputError(f"there is no file {file}: `bruno-ray export RUN --to directions FOLDER` writes one")
    try:
        with safe_open(file, framework="pt") as content:
            text = (content.metadata() or {}).get(KEY)
            bank = {key.removeprefix("bank."): content.get_tensor(key) for key in content.keys() if "bank." in key}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{file} is damaged or not a safetensors file: export the directions again") from error
    if text is None:
        raise OutputError(f"{file} holds no edit: give a file that `bruno-ray export RUN --to directions FOLDER` wrote")
    version = _format_of(text)
    if version not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise OutputError(f"{file} has format {version} and this bruno-ray reads {known}: use the one that wrote it")
    try:
        described = Description.model_validate_json(text)
        edit = Edit.from_dict(described.edit)
        shape = bank[edit.direction_set].shape
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{file} is damaged: export the directions again") from error
    if (shape[0], shape[-1]) != (described.base.n_layers + 1, described.base.d_model):
        raise OutputError(f"{file} is damaged (directions of shape {tuple(shape)}): export the directions again")
    return described, edit, bank


def _format_of(text: str) -> Any:
    try:
        return json.loads(text)["format"]
    except (ValueError, KeyError, TypeError):
        return "unknown"


def digest_of(architecture: Architecture) -> str:
    """A hash of the weights that edits reach: the same for every copy of a model, on the hub or in a folder, sharded in
    whatever way, also where a copy is kept in more bits. Rows that are spread evenly count, of every expert too."""
    digest = hashlib.sha256()
    for writer in architecture.writers:
        for matrix in writer.matrices:
            weight = matrix.read()
            rows = torch.linspace(0, len(weight) - 1, SAMPLED_ROWS).long().unique()
            digest.update(f"{matrix.name}:{tuple(weight.shape)}:".encode())
            digest.update(weight[rows].cpu().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
