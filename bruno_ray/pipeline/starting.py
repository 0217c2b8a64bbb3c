"""`--start-from`: edits of earlier runs, of saved models and of heretic's files, as the first trials of a new study.

    RUN            the trials on its Pareto front, MOST_OF_A_FRONT of them at most, spread evenly
    RUN:7          one trial
    FOLDER         a saved model: its bruno.json, or what heretic has left in it
    FILE.json      bruno.json of a saved model, or heretic's reproduce.json (formats 2 and 3)
    FILE.md        a model card with heretic's table "Abliteration parameters"

heretic writes the strength at the edge of a kernel as such, ours is a share of the peak; its layers and its direction
index count as ours do. Which of a model's matrices it names by its own module (``attn.o_proj``) is told by the first
part of the name. Its card does not say how rows are normalised: then it is as in this run.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bruno_ray.ablation.edit import AblationParameters, Edit, NormMode
from bruno_ray.errors import NoStudyError, OutputError, SettingsError
from bruno_ray.files import expanded
from bruno_ray.pipeline.choosing import study_of, trials_of
from bruno_ray.prompts.sets import Prompts
from bruno_ray.prompts.slicing import spread
from bruno_ray.runs.lookup import find_trial
from bruno_ray.settings import Settings
from bruno_ray.study.selection import find_trial as trial_of
from bruno_ray.study.selection import pareto_front
from bruno_ray.study.starts import LITERATURE, STARTS, Start, literature_edit, refuse_trained
from bruno_ray.workers.exchanged import ModelInfo
from bruno_ray.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

MOST_OF_A_FRONT = 8

PARTS = {"attn": "attention", "mlp": "mlp"}
"""First part of heretic's names of components -> ours."""

PREFERRED = "attn.o_proj"
"""Of two of heretic's components that are one of ours."""

EFFECT_PROMPTS = 32
"""Train prompts a side that the layers' directions are tried on; Arditi et al. take as many."""

NAMES = {"causal": "causal effect", "cosmic": "COSMIC", "both": "COSMIC and causal effect"}

ROW = re.compile(r"^\|\s*\**([\w.]+)\**\s*\|\s*([^|]+?)\s*\|\s*$", re.MULTILINE)
HERETIC_SET = "difference_in_means@0"


def starts_of(settings: Settings, path: Path) -> list[Start]:
    """The edits that `study.start_from` names; none if the study has been begun, which then has its own.

    Raises SettingsError, OutputError or StudyError, one line, for what cannot be read.
    """
    if has_begun(settings, path):
        return []
    norm_mode, directory = settings.search.norm_mode, settings.output.directory
    starts = [start for name in settings.study.start_from for start in read_starts(name, norm_mode, directory)]
    refuse_trained(starts)
    return starts


def has_begun(settings: Settings, path: Path) -> bool:
    """Whether there is a study, which then keeps the starts that it was begun with."""
    try:
        return STARTS in study_of(path, settings).user_attrs
    except NoStudyError:
        return False


def effect_starts(
    settings: Settings, path: Path, info: ModelInfo, prompts: Prompts, sets: Sequence[str], pool: WorkerPool
) -> list[Start]:
    """The literature's edit from the layer that `study.layer_by` takes; none if it is off or the study has been begun.

    Args:
        sets: names of the direction sets that compete.
    """
    how = settings.study.layer_by
    if how == "off" or has_begun(settings, path):
        return []
    edit = literature_edit(sets, info.n_layers, info.components)
    some = spread(prompts.target.train, EFFECT_PROMPTS), spread(prompts.baseline.train, EFFECT_PROMPTS)
    found = pool.call("layer_by", *some, edit, how, with_context=True)
    origin = f"{LITERATURE}, layer {found['layer']} by {NAMES[how]}"
    logger.info(
        "%s: bypass %.2f, induce %.2f, KL %.4f, COSMIC %.3f",
        *(origin, *(found[name] for name in ("bypass", "induce", "kl", "cosmic"))),
    )
    return [Start(replace(edit, direction_index=float(found["layer"])), origin)]


def read_starts(reference: str, norm_mode: NormMode, directory: Path | None = None) -> list[Start]:
    """The edits at one place.

    Args:
        norm_mode: that of edits that do not say theirs.
        directory: folder in which runs are looked up by name; when not given, where the settings say.
    """
    path = expanded(reference)
    if path.is_dir() and not (path / "run.json").is_file():
        inside = ("bruno.json", "reproduce/reproduce.json", "reproduce.json", "README.md")
        found = next((path / name for name in inside if (path / name).is_file()), None)
        if found is None:
            raise OutputError(
                f"{reference} is not a run and has no bruno.json, reproduce.json or README.md to start from"
            )
        path = found
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        return [Start(*_in_file(reference, path, text, norm_mode))]
    return _of_run(reference, directory)


def _of_run(reference: str, directory: Path | None) -> list[Start]:
    run, number = find_trial(reference, directory)
    record = run.read()
    trials = trials_of(run.path, record.settings)
    if number is not None:
        chosen = [trial_of(trials, number)]
    else:
        front = pareto_front(trials, record.settings.scoring.objectives)
        n = min(len(front), MOST_OF_A_FRONT)
        chosen = [front[round(i * (len(front) - 1) / max(1, n - 1))] for i in range(n)]
    n_layers = record.model.get("n_layers")
    return [
        Start(Edit.from_dict(dict(trial.edit)), f"{run.name}:{trial.number}", n_layers)
        for trial in chosen
        if trial.edit is not None and (number is not None or trial.training is None)
    ]


def _in_file(reference: str, path: Path, text: str, norm_mode: NormMode) -> tuple[Edit, str]:
    origin = path.name if path.parent == Path() else f"{path.parent.name}/{path.name}"
    try:
        if path.suffix == ".json":
            content = json.loads(text)
            if "edit" in content:
                return Edit.from_dict(content["edit"]), origin
            given = content["parameters"]
            mode = content.get("settings", {}).get("row_normalization", norm_mode)
            return _heretic_edit(given["direction_index"], given["abliteration_parameters"], mode), origin
        rows = dict(ROW.findall(text))
        index = rows["direction_index"]
        components: dict[str, dict[str, float]] = {}
        for name, value in rows.items():
            component, _, parameter = name.rpartition(".")
            if parameter in ("max_weight", "max_weight_position", "min_weight", "min_weight_distance"):
                components.setdefault(component, {})[parameter] = float(value)
        return _heretic_edit(None if index == "per layer" else float(index), components, norm_mode), origin
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"study.start_from: there is no edit in {reference}: give a run, RUN:TRIAL, a saved model's folder, its"
            " bruno.json, or heretic's reproduce.json or model card"
        ) from error


def _heretic_edit(
    direction_index: float | None, components: Mapping[str, Mapping[str, float]], norm_mode: NormMode
) -> Edit:
    """heretic's parameters as an edit of ours."""
    kernels: dict[str, AblationParameters] = {}
    for name in sorted(components, key=lambda name: name != PREFERRED):  # stable
        ours, given = PARTS.get(name.split(".")[0]), components[name]
        if ours is None:  # of a kind of layer that we count to no component
            continue
        peak, edge = max(given["max_weight"], 0.0), max(given["min_weight"], 0.0)
        kernels.setdefault(
            ours,
            AblationParameters(
                given["max_weight"],
                given["max_weight_position"],
                min(edge / peak, 1.0) if peak else 0.0,
                given["min_weight_distance"],
            ),
        )
    if not kernels:
        raise ValueError("no component")
    return Edit(kernels, HERETIC_SET, direction_index, norm_mode)
