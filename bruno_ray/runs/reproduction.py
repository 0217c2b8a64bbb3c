"""What reproduce.json holds: all that it takes to get an edit's figures again. Importable without torch."""

import datetime
import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from bruno_ray.errors import OutputError
from bruno_ray.runs.records import Record, ScoresRecord, first_mistake

FILE = "reproduce.json"
FORMAT = 1


class BaseRecord(Record):
    """The unedited model."""

    name: str
    revision: str | None = None
    fingerprint: str
    """Of its files and, at the end, of the tensors that were loaded from them (``model.identity``)."""

    dtype: str
    """What it computed in."""

    family: str = ""
    n_layers: int = 0
    d_model: int = 0


class PartRecord(Record):
    """One part of one side of the prompts."""

    source: str
    split: str | None = None
    """None where the part was taken out of another one, which `source` then names."""

    revision: str | None = None
    n: int
    sha256: str
    """Of the prompts, as ``prompts.sets.hash_of`` makes it."""


class DirectionRecord(Record):
    """Where the edit's directions come from."""

    set: str
    """Name of the direction set: METHOD@POSITION, or that of a trained one."""

    method: str
    position: str
    """Token that they are read at: 0 is the last of the prompt. Empty for trained ones."""

    layer: float | None
    """Whose direction is used everywhere; None: each layer its own."""


class Measured(Record):
    """Figures on the test prompts."""

    response_tokens: int
    """Longest answer that was read."""

    kl_tokens: int
    """Answer positions that the KL divergence is taken over."""

    unedited: ScoresRecord
    edited: ScoresRecord
    """The edit applied live, which is what is measured again."""

    saved: ScoresRecord | None = None
    """The saved weights, read back from disk."""


class Reproduction(Record):
    """The whole file."""

    format: int = FORMAT
    bruno_ray: str
    versions: dict[str, str]
    run: str
    trial: int
    behaviour: str
    date: datetime.date
    """The day that chat templates print."""

    base_model: BaseRecord
    prompts: dict[str, dict[str, PartRecord]]
    """side -> part -> prompts."""

    protected: dict[str, PartRecord] = Field(default_factory=dict)
    """Name -> prompts that the directions were cleaned of, or that a training left as they are."""

    response_prefix: str
    settings: dict[str, Any]
    """Those that decide the figures, every value, defaults too."""

    directions: DirectionRecord
    edit: dict[str, Any]
    trained: dict[str, Any] | None = None
    """Directions of a trained edit, as ``ablation.plan.pack`` writes them; others are rebuilt from the prompts."""

    seeds: dict[str, int]
    measured: Measured


def read_json(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file (of a folder the one in it), and its content, ours or another tool's. Raises OutputError."""
    if path.is_dir():
        places = [path / FILE, path / "reproduce" / FILE]  # heretic uploads the second
        path = next((place for place in places if place.is_file()), places[0])
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OutputError(f"{path} does not exist: give a {FILE}, or the folder of a run or a saved model") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} is damaged or not a {FILE}: get it again") from error
    if not isinstance(content, dict):
        raise OutputError(f"{path} is not a {FILE}: give one")
    return path, content


def parse(content: dict[str, Any], path: Path) -> Reproduction:
    """Raises OutputError if it is not of this format."""
    if content.get("format") != FORMAT:
        raise OutputError(
            f"{path} has format {content.get('format')} and this bruno-ray reads {FORMAT}: use bruno-ray"
            f" {content.get('bruno_ray', '')} or a later one"
        )
    try:
        return Reproduction.model_validate(content)
    except ValidationError as error:
        raise OutputError(f"{path} is damaged ({first_mistake(error)}): get it again") from error
