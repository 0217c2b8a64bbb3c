"""An exported edit baked into another copy of its base model."""

import logging
from pathlib import Path

from bruno_ray.errors import ModelError, OutputError
from bruno_ray.exporting import direction_file
from bruno_ray.exporting.base import Source, short_card
from bruno_ray.exporting.direction_file import Base, digest_of
from bruno_ray.model.architectures import Architecture
from bruno_ray.model.loading import load_model
from bruno_ray.publishing.saving import SavedModel, save_model
from bruno_ray.settings import ModelSettings

logger = logging.getLogger(__name__)


def apply(file: Path, model: ModelSettings, folder: Path) -> SavedModel:
    """Write ``model`` with the edit of ``file`` in its weights to ``folder``, complete or not at all.

    Raises:
        OutputError: the file is none of ours, or the folder exists or cannot be written.
        ModelError: the model cannot be loaded, or is not the one that the edit was found on.
    """
    if folder.exists():
        raise OutputError(f"{folder} exists already: choose another folder or remove it first")
    described, edit, bank = direction_file.read(file)
    require_base(described.base, load_model(model, full_precision=True).architecture, model.id)
    source = Source(model, edit, bank, described.run, described.trial, described.behaviour)
    card = short_card(
        source,
        "transformers",
        f"{source.base_name}, {described.behaviour} ablated",
        f"{source.base_name} with an edit in its weights that was found on {described.base.name}.",
    )
    origin = {"run": described.run, "trial": described.trial}
    return save_model(model, edit, bank, folder, card=lambda _: card, origin=origin)


def require_base(base: Base, architecture: Architecture, name: str) -> None:
    """Raise ModelError unless the architecture's model has the weights that the edit was found on."""
    found = (architecture.family, architecture.n_layers, architecture.d_model)
    wanted = (base.family, base.n_layers, base.d_model)
    if found != wanted:
        raise ModelError(
            f"{name} is a {_shape(*found)}, and the edit is for a {_shape(*wanted)} ({base.name}): give a copy of that"
        )
    if digest_of(architecture) != base.digest:
        raise ModelError(
            f"{name} has other weights than {base.name}, on which the edit was found: give an unchanged copy of that"
        )


def _shape(family: str, n_layers: int, d_model: int) -> str:
    return f"{family} of {n_layers} layers, {d_model} wide"
