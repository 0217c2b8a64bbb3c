"""The space of edits a study searches: one flat set of parameters, every one of them sampled in every trial.

Multivariate TPE models only parameters that all trials share, so nothing here is conditional: the layer of the
global direction is sampled even when each layer gets its own direction, and is then ignored. Ranges that are
fractions of the last layer's index are turned into layers here, so parameters and edits are in layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from bruno_ray.ablation.edit import PART_NAMES, AblationParameters, Edit, Parts
from bruno_ray.errors import SettingsError
from bruno_ray.settings import Range, SearchSettings
from bruno_ray.settings.fields import WIDEST_DISTANCE

SCOPE = "direction_scope"
INDEX = "direction_index"
SET = "direction_set"
NEAR, OFTEN, FEWEST_AT_BOUND = 0.02, 0.3, 2

IN_LAYERS = (INDEX, "max_weight_position", "min_weight_distance")
"""Parameters in layers whose ranges the settings have as fractions of the last layer's index."""

Choices = Mapping[str, Parts]
"""Of experts and heads, "SETTING:CHOICE" ("experts:target") -> what is edited then; only those that a model has."""

KERNEL_PARAMETERS = ("max_weight", "max_weight_position", "min_weight", "min_weight_distance", "shape")


def edited_components(search: SearchSettings, info: Any) -> tuple[str, ...]:
    """What the search edits: all that writes to the residual stream, and what further components the model has a place
    for. ``info`` is a ``ModelInfo``."""
    reasons = getattr(info, "further", {})
    return (*info.components, *(name for name in search.further if not reasons.get(name, "unknown")))


def search_space(
    search: SearchSettings,
    direction_sets: Sequence[str],
    n_layers: int,
    components: Sequence[str],
    choices: Choices | None = None,
) -> dict[str, BaseDistribution]:
    """Distribution per parameter, in the order they are sampled.

    A choice with one option is no parameter. Raises SettingsError for a component without settings.
    """
    last = n_layers - 1
    space: dict[str, BaseDistribution] = {}
    if len(search.direction_scopes) > 1:
        space[SCOPE] = CategoricalDistribution(search.direction_scopes)
    space[INDEX] = _float(search.direction_index, last)
    if len(direction_sets) > 1:
        space[SET] = CategoricalDistribution(tuple(direction_sets))
    for component in components:
        ranges = getattr(search, component, None)
        if ranges is None:
            raise SettingsError(f"the search has no ranges for the component {component!r}: add it to SearchSettings")
        low, high = ranges.min_weight_distance
        space[f"{component}.max_weight"] = _float(ranges.max_weight)
        space[f"{component}.max_weight_position"] = _float(ranges.max_weight_position, last)
        space[f"{component}.min_weight"] = _float(ranges.min_weight)
        space[f"{component}.min_weight_distance"] = _float((max(low * last, 1.0), max(high * last, 1.0)))
        if len(search.kernels) > 1:
            space[f"{component}.shape"] = CategoricalDistribution(search.kernels)
    for name in PART_NAMES.values():
        possible = _possible(search, name, choices or {})
        if len(possible) > 1:
            space[name] = CategoricalDistribution(possible)
    return space


def _possible(search: SearchSettings, name: str, choices: Choices) -> tuple[str, ...]:
    """Of `search.experts` or `search.heads` what this model can do; "all" if nothing."""
    return tuple(one for one in getattr(search, name) if one == "all" or f"{name}:{one}" in choices) or ("all",)


@dataclass(frozen=True)
class AtBound:
    """A bound of the search space that many edits lie at."""

    name: str
    """Of the parameter, which is a range of settings below `search.` as well."""

    bound: float
    n: int
    """Edits within NEAR of the range from it."""

    of: int
    """Edits in which the parameter has a say."""


def at_bounds(
    search: SearchSettings,
    space: Mapping[str, BaseDistribution],
    params: Sequence[Mapping[str, Any]],
    n_layers: int,
) -> list[AtBound]:
    """Bounds beyond which better edits may lie: OFTEN of the ``params``, those of the Pareto front, lie at them.

    Bounds that are what a parameter means (the first and last layer, a share of 0 or 1) cannot be moved and are left
    out, and so are ranges of one value, which somebody has chosen.
    """
    found = []
    for name, distribution in space.items():
        if not isinstance(distribution, FloatDistribution) or distribution.single():
            continue
        near = NEAR * (distribution.high - distribution.low)
        values = [given[name] for given in params if name in given and _matters(name, given, search)]
        for bound in (distribution.low, distribution.high):
            n = sum(abs(value - bound) <= near for value in values)
            if n >= max(FEWEST_AT_BOUND, OFTEN * len(values)) and not _is_natural(name, bound, n_layers - 1):
                found.append(AtBound(name, bound, n, len(values)))
    return found


def bound_lines(
    search: SearchSettings,
    space: Mapping[str, BaseDistribution],
    params: Sequence[Mapping[str, Any]],
    n_layers: int,
) -> list[str]:
    """What `at_bounds` finds, as advice; each bound as it is written in the settings."""
    lines = []
    for found in at_bounds(search, space, params, n_layers):
        scale = n_layers - 1 if found.name.rpartition(".")[2] in IN_LAYERS else 1
        lines.append(
            f"{found.n} of {found.of} trials on the Pareto front lie at the bound {found.bound / max(scale, 1):.3g} of"
            f" search.{found.name}: widen it to look beyond"
        )
    return lines


def _matters(name: str, params: Mapping[str, Any], search: SearchSettings) -> bool:
    """Whether a parameter has a say in the edit that ``params`` stand for."""
    if name == INDEX:
        return params.get(SCOPE, search.direction_scopes[0]) == "global"
    component, _, parameter = name.rpartition(".")
    if parameter == "max_weight":
        return True
    if params.get(f"{component}.max_weight", 1.0) <= 0:
        return False
    return not (parameter == "min_weight" and params.get(f"{component}.shape", search.kernels[0]) == "flat")


def _is_natural(name: str, bound: float, last: int) -> bool:
    """Whether nothing lies beyond a bound: no strength below 0, no layer beyond the last."""
    match name.rpartition(".")[2]:
        case "max_weight":
            return bound <= 0
        case "min_weight":
            return bound in (0.0, 1.0)
        case "min_weight_distance":
            return bound <= 1 or bound >= WIDEST_DISTANCE * last
        case _:
            return bound in (0.0, float(last))


def _float(limits: Range, scale: float = 1.0) -> FloatDistribution:
    return FloatDistribution(limits[0] * scale, limits[1] * scale)


def sampled(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """The value that the study's sampler gives a trial for one parameter."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def suggest(
    trial: optuna.Trial,
    search: SearchSettings,
    direction_sets: Sequence[str],
    n_layers: int,
    components: Sequence[str],
    choices: Choices | None = None,
) -> Edit:
    """Sample one edit. ``direction_sets`` are the names in the direction bank."""
    for name, distribution in search_space(search, direction_sets, n_layers, components, choices).items():
        sampled(trial, name, distribution)
    return edit_from_params(trial.params, search, direction_sets, choices)


def edit_from_params(
    params: Mapping[str, Any],
    search: SearchSettings,
    direction_sets: Sequence[str],
    choices: Choices | None = None,
) -> Edit:
    """The edit that sampled parameters stand for; choices with one option are filled in from the settings."""
    components = dict.fromkeys(name.split(".")[0] for name in params if "." in name)
    given: dict[str, Any] = {f"{component}.shape": search.kernels[0] for component in components}
    given |= params
    kernels = {
        component: AblationParameters(**{name: given[f"{component}.{name}"] for name in KERNEL_PARAMETERS})
        for component in components
    }
    scope = params.get(SCOPE, search.direction_scopes[0])
    parts: dict[str, Any] = {}
    for name in PART_NAMES.values():
        chosen = params.get(name, _possible(search, name, choices or {})[0])
        parts |= (choices or {}).get(f"{name}:{chosen}", {})
    return Edit(
        components=kernels,
        direction_set=params.get(SET, direction_sets[0]),
        direction_index=params[INDEX] if scope == "global" else None,
        norm_mode=search.norm_mode,
        parts=parts,
    )
