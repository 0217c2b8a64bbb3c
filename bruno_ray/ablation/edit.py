"""An edit as data: what is asked of a worker, written into journals and records, and computed in ``closed_forms.py``.

This module imports no torch: processes that only pass edits on are many, and start in a fraction of the time.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

NormMode = Literal["none", "pre", "full"]
KernelShape = Literal["linear", "flat", "cosine", "gaussian"]

OPENED = "opened"
"""Before an answer token in the name of a direction set, if the answer was made to begin as baseline answers do:
``difference_in_means@opened2``."""

GAUSSIAN_WIDTH = 0.5
"""Standard deviation of the Gaussian kernel, as a share of the distance from peak to edge."""


@dataclass(frozen=True)
class AblationParameters:
    """Ablation kernel of one component over layers; positions and distances are in layers.

    With x the share of the way from peak (0) to edge (1) and m = ``min_weight``, the strength is ``max_weight`` times

        linear:    1 - (1 - m) x                        heretic's
        cosine:    m + (1 - m) (1 + cos(pi x)) / 2
        gaussian:  m + (1 - m) (g(x) - g(1)) / (g(0) - g(1)), g(x) = exp(-x^2 / (2 GAUSSIAN_WIDTH^2))
        flat:      1, whatever m is

    and 0 beyond the edge. All but `flat` are 1 at the peak and m at the edge.
    """

    max_weight: float
    max_weight_position: float
    min_weight: float
    min_weight_distance: float

    shape: KernelShape = "linear"
    """Edits of older versions do not say: they are linear."""

    def __post_init__(self) -> None:
        if self.shape not in get_args(KernelShape):
            raise ValueError(f"a kernel is one of {', '.join(get_args(KernelShape))}, not {self.shape!r}")

    def strength(self, layer: int) -> float:
        """Falls from ``max_weight`` at the peak to ``max_weight * min_weight`` at the edge, 0 beyond it."""
        peak = max(self.max_weight, 0.0)
        distance = abs(layer - self.max_weight_position)
        if distance > self.min_weight_distance:
            return 0.0
        if self.min_weight_distance == 0:
            return peak
        return peak * (1 + self._fallen(distance / self.min_weight_distance) * (self.min_weight - 1))

    def _fallen(self, x: float) -> float:
        """How much of the way down from peak to edge the strength has gone, at the share ``x`` of the distance."""
        match self.shape:
            case "linear":
                return x
            case "flat":
                return 0.0
            case "cosine":
                return (1 - math.cos(math.pi * x)) / 2
            case "gaussian":
                return math.expm1(-(x**2) / (2 * GAUSSIAN_WIDTH**2)) / math.expm1(-1 / (2 * GAUSSIAN_WIDTH**2))

    @property
    def is_nothing(self) -> bool:
        """Whether it is 0 at every layer."""
        return self.max_weight <= 0

    def scaled(self, factor: float) -> "AblationParameters":
        return replace(self, max_weight=factor * self.max_weight)


@dataclass(frozen=True)
class StrengthTable:
    """Ablation strength of one component at every layer, each of its own: what training finds."""

    strengths: tuple[float, ...]

    def strength(self, layer: int) -> float:
        return self.strengths[layer]

    @property
    def is_nothing(self) -> bool:
        """Whether it is 0 at every layer."""
        return not any(self.strengths)

    def scaled(self, factor: float) -> "StrengthTable":
        return StrengthTable(tuple(factor * strength for strength in self.strengths))


Strengths = AblationParameters | StrengthTable


@dataclass(frozen=True)
class Edit:
    """A whole edit of a model, small enough to send to any worker and to write into any JSON file."""

    components: Mapping[str, Strengths]
    """Kernel or table per component ("attention", "mlp"); a component that is missing is not edited."""

    direction_set: str
    """Key into the direction bank."""

    direction_index: float | None
    """Layer whose direction is used everywhere, fractions interpolate; None gives each layer its own."""

    norm_mode: NormMode

    def __post_init__(self) -> None:
        if self.norm_mode not in get_args(NormMode):
            raise ValueError(f"norm_mode must be one of {', '.join(get_args(NormMode))}, not {self.norm_mode!r}")

    def strength(self, component: str, layer: int) -> float:
        kernel = self.components.get(component)
        return kernel.strength(layer) if kernel else 0.0

    @property
    def identity(self) -> Hashable:
        """Equal for edits that change a model alike: a component of strength 0 counts as one that is missing."""
        components = frozenset((name, given) for name, given in self.components.items() if not given.is_nothing)
        return components, self.direction_set, self.direction_index, self.norm_mode

    def scaled(self, factor: float) -> "Edit":
        """The same edit with every strength multiplied by ``factor``, which is not negative."""
        return replace(self, components={name: given.scaled(factor) for name, given in self.components.items()})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Edit":
        components = {name: _strengths(given) for name, given in values["components"].items()}
        return cls(components, values["direction_set"], values["direction_index"], values["norm_mode"])


def _strengths(given: Mapping[str, Any]) -> Strengths:
    return StrengthTable(tuple(given["strengths"])) if "strengths" in given else AblationParameters(**given)
