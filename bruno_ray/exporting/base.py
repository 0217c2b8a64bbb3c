"""What every exporter gets, and what it has in common with the others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers.pytorch_utils import Conv1D

from bruno_ray import __version__
from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import ModelError
from bruno_ray.model.named_models import find_named
from bruno_ray.model.readers import Reader
from bruno_ray.model.writers import Writer
from bruno_ray.publishing.base import source_folder
from bruno_ray.publishing.card import is_hub_id, license_of, public_path
from bruno_ray.settings import ModelSettings


@dataclass(frozen=True)
class Source:
    """A trial, as an edit of its base model."""

    model: ModelSettings
    """The base, as the search loaded it; exporters read it unquantised."""

    edit: Edit
    bank: DirectionBank
    """With the direction set of the edit, and what else the run's search chose from."""

    run: str
    trial: int
    behaviour: str

    @property
    def base_id(self) -> str | None:
        """The base model's id on the hub; None where it is a folder or a file of this machine."""
        if named := find_named(self.model.id):
            return named.base_model
        return self.model.id if is_hub_id(self.model.id) else None

    @property
    def base_name(self) -> str:
        """As the id, or the last part of a path."""
        return self.base_id or public_path(self.model.id)

    @property
    def origin(self) -> dict[str, Any]:
        """What is written into every export."""
        return {"bruno_ray": __version__, "run": self.run, "trial": self.trial, "edit": self.edit.to_dict()}


@dataclass(frozen=True)
class Options:
    """What a user may ask of exporters; each takes what concerns it."""

    max_error: float = 0.05
    """`lora`: largest share of the edit, by Frobenius norm, that an adapter may leave out."""

    max_rank: int = 64
    """`lora`: largest rank of an adapter."""

    outtype: str = "auto"
    """`gguf`: what the weights are written in, as the converter calls it."""

    given: Mapping[str, str] = field(default_factory=dict)
    """For exporters from outside: what the user said with `--option NAME=VALUE`."""


RELATIONS = {"peft": "adapter"}
"""Library -> what the hub calls an export's relation to its base model. A GGUF file holds other weights than the base,
so it is no mere quantisation of it."""

Exporter = Callable[[Source, Path, Options], str]
"""Writes the folder, complete or not at all; returns one line that says what is in it. Raises OutputError if the folder
exists or cannot be written, ModelError if the base model cannot be loaded or the edit has no such form."""


def require_modules(sites: Sequence[Writer | Reader]) -> None:
    """Raise ModelError if one is no linear module of its own, such as experts that share one tensor."""
    for site in sites:
        if len(site.matrices) > 1 or site.matrices[0].index is not None:
            raise ModelError(
                f"{site.name} keeps its experts in one tensor, which has no module that an adapter or a hook could be"
                " added to: save the whole model with `bruno-ray save`, or choose a trial that leaves the MLP alone"
            )
        if not isinstance(site.module, nn.Linear | Conv1D):
            raise ModelError(
                f"{site.name} is a {type(site.module).__name__}, to which no adapter or hook can be added: save the"
                f" whole model with `bruno-ray save`, or choose a trial without {site.component} edits"
            )


def short_card(source: Source, library: str, title: str, text: str) -> str:
    """README.md of an export, front matter with the base model's licence included."""
    data: dict[str, Any] = {"library_name": library}
    if source.base_id:
        data |= {"base_model": source.base_id, "base_model_relation": RELATIONS.get(library, "finetune")}
    data["pipeline_tag"] = "text-generation"
    data |= {
        "tags": ["bruno-ray", "directional-ablation", "abliterated", source.behaviour],
        **license_of(source_folder(source.model)),
    }
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True).rstrip("\n")
    return (
        f"---\n{front}\n---\n\n# {title}\n\n{text}\n\nTrial {source.trial} of the run `{source.run}`, made by"
        f" bruno-ray {__version__} for the behaviour `{source.behaviour}`. What it does was measured in that run.\n"
    )
