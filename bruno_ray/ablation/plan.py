"""A training as data: what is asked of a worker, and what comes back. This imports no torch, and numpy only in use."""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bruno_ray.ablation.edit import Edit, NormMode

if TYPE_CHECKING:
    import numpy as np

PREFIX = "learned-"
"""Of the names of direction sets that were trained; the rest is a hash of their content."""


@dataclass(frozen=True)
class TrainingPlan:
    """One edit to be trained: where it starts, what it is trained for, and how long."""

    rank: int
    """Directions of the subspace."""

    shared: bool
    """One subspace for all layers, or one for each."""

    start_set: str
    """Key into the direction bank."""

    start_layer: float
    """Layer whose direction it starts from; fractions interpolate."""

    first_layer: int
    """Layers before it are not edited."""

    answers: float
    """Weight of the likelihood of desired answers."""

    suppress: float
    """Weight of the unlikelihood of the behaviour's own text."""

    retain: float
    """Weight of the KL divergence on baseline prompts."""

    learning_rate: float
    steps: int
    """Plans of a batch that differ in nothing else, or in ``scale`` alone, are one training, looked at after each of
    these numbers of steps."""

    seed: int
    scale: float = 1.0
    """What the strengths are multiplied by once it is trained."""

    rivals: tuple[float, ...] = ()
    """Layers of further starts, beside ``start_layer`` or ``base``. After ``heat`` steps, twice that, four times ...
    the better half of them goes on (successive halving, Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943).
    """

    heat: int = 0
    base: Edit | None = None
    """The edit that is polished: its directions and strengths are the start."""

    peers: tuple[Edit, ...] = ()
    """Searched edits that are asked as well before an answer of its own is learned (``learning/agreement.py``)."""

    induce: float = 0.0
    """Weight of the likelihood of the behaviour's own text after baseline prompts, with the subspace's part put in."""

    protect: float = 0.0
    """Weight of what becomes less likely of the answers to a third set of prompts."""

    inform: float = 0.0
    """Weight of what answers tell of the prompts that they answer, among prompts on the same subject."""

    entropy: float = 0.0
    """Weight of the entropy of what it says by now."""

    norm_mode: NormMode = "none"

    suppress_steps: int | None = None
    """In so many steps, the first ones, the term counts; in all when not given."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingPlan:
        given: dict[str, Any] = dict(values)
        if given["base"] is not None:
            given["base"] = Edit.from_dict(given["base"])
        given["rivals"] = tuple(given.get("rivals", ()))
        given["peers"] = tuple(map(Edit.from_dict, given.get("peers", ())))
        return cls(**given)

    @property
    def training(self) -> TrainingPlan:
        """What it has in common with the plans that are the same training."""
        return replace(self, steps=0, scale=1.0)


@dataclass(frozen=True)
class TrainedEdit:
    """What a training has come to."""

    edit: Edit
    directions: np.ndarray
    """(n_layers + 1, rank, d_model) float32, orthonormal rows per point; the set that `edit` names."""

    curves: dict[str, list[float]] = field(default_factory=dict)
    """Loss term -> its mean over each tenth of the steps."""

    sources: dict[str, int] = field(default_factory=dict)
    """Where what it was trained on came from -> how many rows."""

    few_shot: tuple[tuple[str, str], ...] = ()
    """Prompts, and the desired answers that the unedited model gave them with others as examples."""

    start_layer: float | None = None
    """Layer whose direction it started from; None if it is an edit that was polished."""

    seconds: float = 0.0
    tokens: int = 0
    """Tokens that went forward and back, padding not counted."""

    def scaled(self, factor: float) -> TrainedEdit:
        """The same directions, taken out with every strength multiplied by ``factor``."""
        return replace(self, edit=self.edit.scaled(factor))

    def account(self) -> dict[str, Any]:
        """All but the edit, for people."""
        return {
            "curves": self.curves,
            "sources": self.sources,
            "few_shot": [list(pair) for pair in self.few_shot],
            "start_layer": self.start_layer,
            "seconds": self.seconds,
            "tokens": self.tokens,
        }


def pack(directions: np.ndarray) -> dict[str, Any]:
    """A direction set as JSON, to the bit. One that all points share takes the room of one point: 16 kB at a width of
    4096."""
    import numpy as np

    shared = bool((directions == directions[:1]).all())
    rows = directions[:1] if shared else directions
    text = base64.b64encode(np.ascontiguousarray(rows, dtype="<f4").tobytes()).decode()
    return {"shape": list(directions.shape), "shared": shared, "float32": text}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """(n_layers + 1, rank, d_model) float32, as they were."""
    import numpy as np

    shape = tuple(packed["shape"])
    rows = np.frombuffer(base64.b64decode(packed["float32"]), dtype="<f4").reshape(-1, *shape[1:])
    return np.ascontiguousarray(np.broadcast_to(rows, shape), dtype=np.float32)
