"""An edit as data: what is asked of a worker, written into journals and records, and computed in ``closed_forms.py``.

This module imports no torch: processes that only pass edits on are many, and start in a fraction of the time.
"""

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
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

INPUTS = ("router", "attention_input", "mlp_input")
"""Components that read the residual stream; an edit of one takes the direction out of what it reads."""

ADDITION = "addition"
"""Component that adds a multiple of the difference of means (CAA) instead of removing a direction."""

SHIFTS = "mean_difference"
"""Of the direction bank's names that of the differences of means, as long as they are: what an addition adds."""

PART_NAMES = {"mlp": "experts", "attention": "heads"}
"""Component -> what its modules consist of, of which an edit may take some and leave the others."""

Parts = Mapping[str, tuple[tuple[int, ...] | None, ...]]
"""Component -> for each layer the experts (`mlp`) or attention heads (`attention`) that are edited; None is all."""


def direction_sets_of(bank: Iterable[str]) -> tuple[str, ...]:
    """What an edit's directions are chosen from: a bank without the differences of means, which are no directions."""
    return tuple(name for name in bank if name != SHIFTS)


def sets_of(edit: Mapping[str, Any]) -> tuple[str, ...]:
    """What an edit (``Edit.to_dict()``) needs of a bank."""
    return (edit["direction_set"], *((SHIFTS,) if ADDITION in edit["components"] else ()))


@dataclass(frozen=True)
class Edit:
    """A whole edit of a model, small enough to send to any worker and to write into any JSON file."""

    components: Mapping[str, Strengths]
    """Kernel or table per component ("attention", "mlp", and those of ``INPUTS`` and ``ADDITION``); a component that is
    missing is not edited."""

    direction_set: str
    """Key into the direction bank."""

    direction_index: float | None
    """Layer whose direction is used everywhere, fractions interpolate; None gives each layer its own."""

    norm_mode: NormMode

    parts: Parts = field(default_factory=dict)
    """Where not all experts or heads are edited. Modules that are not made of such are edited as a whole."""

    def __post_init__(self) -> None:
        if self.norm_mode not in get_args(NormMode):
            raise ValueError(f"norm_mode must be one of {', '.join(get_args(NormMode))}, not {self.norm_mode!r}")

    def strength(self, component: str, layer: int) -> float:
        kernel = self.components.get(component)
        return kernel.strength(layer) if kernel else 0.0

    def part(self, component: str, layer: int) -> tuple[int, ...] | None:
        """The experts or heads of one layer that are edited; None is all."""
        chosen = self.parts.get(component)
        return None if chosen is None else chosen[layer]

    @property
    def further(self) -> tuple[str, ...]:
        """Components that change more than weights which write to the residual stream."""
        return tuple(name for name in (*INPUTS, ADDITION) if name in self.components)

    @property
    def identity(self) -> Hashable:
        """Equal for edits that change a model alike: a component of strength 0 counts as one that is missing."""
        components = frozenset((name, given) for name, given in self.components.items() if not given.is_nothing)
        parts = frozenset((name, chosen) for name, chosen in self.parts.items() if any(c is not None for c in chosen))
        return components, self.direction_set, self.direction_index, self.norm_mode, parts

    def scaled(self, factor: float) -> "Edit":
        """The same edit with every strength multiplied by ``factor``, which is not negative."""
        return replace(self, components={name: given.scaled(factor) for name, given in self.components.items()})

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        if not self.parts:  # as it was written before there were any
            del values["parts"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Edit":
        components = {name: _strengths(given) for name, given in values["components"].items()}
        parts = {
            name: tuple(None if each is None else tuple(each) for each in chosen)
            for name, chosen in values.get("parts", {}).items()
        }
        return cls(components, values["direction_set"], values["direction_index"], values["norm_mode"], parts)


def _strengths(given: Mapping[str, Any]) -> Strengths:
    return StrengthTable(tuple(given["strengths"])) if "strengths" in given else AblationParameters(**given)
