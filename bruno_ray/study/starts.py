"""Edits that a study tries before it samples any: the literature's, and those of earlier runs.

Trial i is start i. Its edit is exact; its parameters are the nearest point of the search space, which is what the
sampler learns from. Every other trial has the parameters of its own number, whatever was tried before: starts take
the place of startup points and move none. The starts are kept with the study, so that a resumed one has the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.ablation.plan import TrainingPlan
from bruno_ray.errors import StudyError
from bruno_ray.study.space import INDEX, KERNEL_PARAMETERS, SCOPE, SET
from bruno_ray.study.trial_result import ORIGIN

STARTS = "starts"
"""The study's user attribute."""

LITERATURE = "the literature's edit"
LITERATURE_SET = "difference_in_means@"
LITERATURE_DEPTH = 0.6
"""Of the last layer's index. Arditi et al. pick the layer by its effect, model by model: 0.39 to 0.65, median 0.59 in
the five models whose choice their repository has."""


@dataclass(frozen=True)
class Start:
    """An edit that is given, not sampled."""

    edit: Edit
    origin: str
    n_layers: int | None = None
    """Of the model that it was found on, where that is known."""


def literature_edit(direction_sets: Sequence[str], n_layers: int, components: Sequence[str]) -> Edit:
    """One difference-in-means direction removed wholly from all that writes to the residual stream, at every layer:
    weight orthogonalization (Arditi et al. 2024, https://arxiv.org/abs/2406.11717, section 4), embeddings left out.

    Of the study's direction sets it takes the first difference in means, or else the first.
    """
    last = n_layers - 1
    means = [name for name in direction_sets if name.startswith(LITERATURE_SET)]
    everywhere = AblationParameters(1.0, last / 2, 1.0, max(float(last), 1.0))
    return Edit(
        components=dict.fromkeys(components, everywhere),
        direction_set=(means or list(direction_sets))[0],
        direction_index=float(round(LITERATURE_DEPTH * last)),
        norm_mode="none",
    )


def refuse_trained(starts: Sequence[Start]) -> None:
    """Raise StudyError for a start whose edit was trained: its directions are not in the bank."""
    for start in starts:
        if any(not isinstance(given, AblationParameters) for given in start.edit.components.values()):
            raise StudyError(f"{start.origin} was trained and is no point of the search: start from a searched trial")


def fitted(start: Start, direction_sets: Sequence[str], n_layers: int, components: Sequence[str]) -> Start:
    """An edit of another study as one of this: its layers at the same share of the depth, a direction set that there is
    (the same or else the first), and no components that this model does not have. Of a model of other depth it is an
    edit of all experts and heads."""
    scale = (n_layers - 1) / max(1, (start.n_layers or n_layers) - 1)
    kernels = {
        name: replace(
            kernel,
            max_weight_position=scale * kernel.max_weight_position,
            min_weight_distance=scale * kernel.min_weight_distance,
        )
        if isinstance(kernel, AblationParameters)
        else kernel
        for name, kernel in start.edit.components.items()
        if name in components
    }
    index, known = start.edit.direction_index, start.edit.direction_set in direction_sets
    edit = replace(
        start.edit,
        components=kernels,
        direction_set=start.edit.direction_set if known else direction_sets[0],
        direction_index=None if index is None else scale * index,
        parts={name: chosen for name, chosen in start.edit.parts.items() if len(chosen) == n_layers},
    )
    return replace(start, edit=edit)


def each_once(starts: Sequence[Start]) -> list[Start]:
    """Without those whose edit an earlier one has."""
    return [start for i, start in enumerate(starts) if all(start.edit != other.edit for other in starts[:i])]


def kept_starts(study: optuna.Study, wanted: Sequence[Start]) -> list[Start]:
    """The starts of a study: ``wanted`` when it has no trials yet, afterwards those that it was begun with.

    Raises as `refuse_trained`.
    """
    if STARTS not in study.user_attrs:
        refuse_trained(wanted)
        new = [] if study.get_trials(deepcopy=False) else list(wanted)
        study.set_user_attr(STARTS, [{"edit": start.edit.to_dict(), "origin": start.origin} for start in new])
        return new
    return [Start(Edit.from_dict(each["edit"]), each["origin"]) for each in study.user_attrs[STARTS]]


def given_first(
    starts: Sequence[Start],
    is_start: Callable[[int], bool],
    suggest: Callable[[optuna.Trial], Edit | TrainingPlan],
) -> Callable[[optuna.Trial], Edit | TrainingPlan]:
    """``suggest``, but the trials that ``is_start`` knows by number get the edits that were given for them."""

    def suggested(trial: optuna.Trial) -> Edit | TrainingPlan:
        edit = suggest(trial)
        if not is_start(trial.number):
            return edit
        trial.set_user_attr(ORIGIN, starts[trial.number].origin)
        return starts[trial.number].edit

    return suggested


def nearest_params(edit: Edit, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """The point of the search space that is nearest to an edit, parameter by parameter.

    Where the edit does not say (the layer of a direction that each layer has of its own, a component that is not
    edited) it is the middle of the range or the lowest strength; a choice that the space does not have is its first.
    """
    wanted: dict[str, Any] = {
        SCOPE: "per_layer" if edit.direction_index is None else "global",
        INDEX: edit.direction_index,
        SET: edit.direction_set,
    }
    for component, kernel in edit.components.items():
        wanted |= {f"{component}.{name}": getattr(kernel, name) for name in KERNEL_PARAMETERS}
    return {name: _nearest(name, wanted.get(name), distribution) for name, distribution in space.items()}


def _nearest(name: str, value: Any, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return value if value in distribution.choices else distribution.choices[0]
    assert isinstance(distribution, FloatDistribution)
    if value is None:
        value = distribution.low if name.endswith(".max_weight") else (distribution.low + distribution.high) / 2
    return min(max(float(value), distribution.low), distribution.high)
