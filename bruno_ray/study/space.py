"""The space of edits a study searches: one flat set of parameters, every one of them sampled in every trial.

Multivariate TPE models only parameters that all trials share, so nothing here is conditional: the layer of the
global direction is sampled even when each layer gets its own direction, and is then ignored. Ranges that are
fractions of the last layer's index are turned into layers here, so parameters and edits are in layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.errors import SettingsError
from bruno_ray.settings import Range, SearchSettings

SCOPE = "direction_scope"
INDEX = "direction_index"
SET = "direction_set"
NEAR, OFTEN, FEWEST_AT_BOUND = 0.02, 0.3, 2
WIDENED = ("max_weight", "min_weight_distance")
"""Parameters whose bounds are chosen, not given by what they mean."""

KERNEL_PARAMETERS = ("max_weight", "max_weight_position", "min_weight", "min_weight_distance", "shape")


def search_space(
    search: SearchSettings, direction_sets: Sequence[str], n_layers: int, components: Sequence[str]
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
    return space


def at_bounds(
    space: Mapping[str, BaseDistribution], params: Sequence[Mapping[str, Any]]
) -> list[tuple[str, float, int]]:
    """Bounds of the space that many trials lie at: (parameter, bound, trials within NEAR of the range from it).

    ``params`` are those of the Pareto front. Where OFTEN of it or more lie at a bound, better values may lie beyond.
    """
    found = []
    for name, distribution in space.items():
        if not isinstance(distribution, FloatDistribution) or not params:
            continue
        near = NEAR * (distribution.high - distribution.low)
        values = [given[name] for given in params if name in given]
        for bound in (distribution.low, distribution.high):
            n = sum(abs(value - bound) <= near for value in values)
            if n >= max(FEWEST_AT_BOUND, OFTEN * len(params)):
                found.append((name, bound, n))
    return found


def bound_lines(space: Mapping[str, BaseDistribution], params: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `at_bounds` finds, as advice. Natural limits (a share of 0 or 1, the first and last layer) are left out."""
    lines = []
    for name, bound, n in at_bounds(space, params):
        if name.rpartition(".")[2] in WIDENED:
            lines.append(
                f"{n} of {len(params)} trials on the Pareto front lie at the bound {bound:.3g} of {name}: widen"
                f" search.{name} to look beyond it"
            )
    return lines


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
) -> Edit:
    """Sample one edit. ``direction_sets`` are the names in the direction bank."""
    for name, distribution in search_space(search, direction_sets, n_layers, components).items():
        sampled(trial, name, distribution)
    return edit_from_params(trial.params, search, direction_sets)


def edit_from_params(params: Mapping[str, Any], search: SearchSettings, direction_sets: Sequence[str]) -> Edit:
    """The edit that sampled parameters stand for; choices with one option are filled in from the settings."""
    components = dict.fromkeys(name.split(".")[0] for name in params if "." in name)
    given: dict[str, Any] = {f"{component}.shape": search.kernels[0] for component in components}
    given |= params
    kernels = {
        component: AblationParameters(**{name: given[f"{component}.{name}"] for name in KERNEL_PARAMETERS})
        for component in components
    }
    scope = params.get(SCOPE, search.direction_scopes[0])
    return Edit(
        components=kernels,
        direction_set=params.get(SET, direction_sets[0]),
        direction_index=params[INDEX] if scope == "global" else None,
        norm_mode=search.norm_mode,
    )
