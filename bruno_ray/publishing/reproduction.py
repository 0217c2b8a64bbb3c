"""reproduce.json of a trial, and whether figures that were measured again are the ones in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bruno_ray import __version__, organism
from bruno_ray.ablation.plan import PREFIX, pack
from bruno_ray.files import cache_folder
from bruno_ray.model.named_models import find_named
from bruno_ray.prompts.sets import PARTS, Prompts, hash_of
from bruno_ray.publishing import wording
from bruno_ray.publishing.card import behaviour_name, public_path, public_text, sources
from bruno_ray.runs.records import RunRecord, ScoresRecord
from bruno_ray.runs.reproduction import BaseRecord, DirectionRecord, Measured, PartRecord, Reproduction
from bruno_ray.scoring.judge import METRICS as JUDGED
from bruno_ray.settings import DatasetSettings, Settings

if TYPE_CHECKING:
    from bruno_ray.ablation.closed_forms import DirectionBank

ONE_PROMPT = 1
"""Prompts by which a count may differ: another machine's rounding turns an answer now and then."""

KL_SHARE, KL_NATS = 0.02, 0.0002
"""By which a KL divergence may differ, whichever is more: of itself, and in nats (what rounding in bfloat16 leaves)."""

KL_METRICS = ("kl_divergence", "kl_first")

TOLERANCES = f"equal within {ONE_PROMPT} prompt of a rate, and {KL_SHARE:.0%} or {KL_NATS:g} nats of a KL divergence"

ELSEWHERE: dict[str, Any] = {
    "model": {"device_map", "max_memory", "lean_forward", "accept_probed"},
    "residuals": {"cache_dir", "batch_tokens"},
    "scoring": {"judge", "row_tokens"},
    "ray": True,
    "learned": True,
    "selection": True,
    "output": True,
    "study": True,
}
"""Settings that say where and how fast, or how an edit is searched for: no figure of a given edit depends on them. A
judge's figures are another model's, and its address is nobody else's business."""


def describe(record: RunRecord, prompts: Prompts, bank: "DirectionBank", public: bool) -> Reproduction:
    """What is needed to get the figures of the selected trial again, which has been tested.

    Args:
        bank: with the edit's direction set.
        public: paths of this machine lose their folders, since the file travels with a model.
    """
    selected, settings = record.selected, record.settings
    assert selected is not None and selected.test is not None
    edit = selected.edit
    name = edit["direction_set"]
    is_trained = name.startswith(PREFIX)
    method, _, position = ("", "", "") if is_trained else name.partition("@")
    named = find_named(settings.model.id)
    values = settings.model_dump(mode="json", exclude=ELSEWHERE)
    values["model"]["id"] = _portable_id(settings.model.id)
    return Reproduction(
        bruno_ray=__version__,
        versions=record.versions,
        run=settings.study.name or "unnamed",
        trial=selected.number,
        behaviour=behaviour_name(settings),
        date=record.date,
        base_model=BaseRecord(
            name=named.base_model if named else public_path(settings.model.id),
            revision=settings.model.revision,
            fingerprint=public_text(record.hashes.get("model", "")),
            **{key: record.model[key] for key in ("dtype", "family", "n_layers", "d_model") if key in record.model},
        ),
        prompts=_parts(settings, prompts),
        protected=_protected(settings, prompts),
        response_prefix=record.response_prefix,
        settings=_without_folders(values) if public else values,
        directions=DirectionRecord(
            set=name,
            method="trained" if is_trained else method,
            position=position,
            layer=edit["direction_index"],
        ),
        edit=edit,
        trained=pack(bank[name].numpy()) if is_trained else None,
        seeds=record.seeds or {"study": settings.study.seed},
        measured=Measured(
            response_tokens=settings.scoring.report_tokens,
            kl_tokens=settings.scoring.kl_tokens,
            unedited=_figures(record.baseline["test"]),
            edited=_figures(selected.test),
            saved=_figures(selected.saved) if selected.saved else None,
        ),
    )


def _portable_id(model: str) -> str:
    """An organism by the name that means the same on every machine."""
    folder = organism.folder_of(model)
    if folder is None or folder.parent != cache_folder("organisms"):
        return model
    recipe = folder.name.partition("-")[0]
    return "organism" if recipe == "standard" else f"organism-{recipe}"


def _parts(settings: Settings, prompts: Prompts) -> dict[str, dict[str, PartRecord]]:
    given = {(side, part): dataset for side, part, dataset in sources(settings)}
    found: dict[str, dict[str, PartRecord]] = {"target": {}, "baseline": {}}
    for side, parts in found.items():
        for part in PARTS:
            if not (of_part := getattr(getattr(prompts, side), part)):
                continue
            facts: dict[str, Any] = {"n": len(of_part), "sha256": hash_of(of_part)}
            if (dataset := given.get((side, part))) is not None:
                facts |= _place(dataset)
            else:
                facts["source"] = "test" if part == "finalists" and (side, "test") in given else "train"
            parts[part] = PartRecord(**facts)
    return found


def _protected(settings: Settings, prompts: Prompts) -> dict[str, PartRecord]:
    return {
        name: PartRecord(**_place(settings.prompts.protect[name]), n=len(each), sha256=hash_of(each))
        for name, each in prompts.protect.items()
    }


def _place(dataset: DatasetSettings) -> dict[str, Any]:
    return {"source": public_path(dataset.source), "split": dataset.split, "revision": dataset.revision}


def _figures(scores: ScoresRecord) -> ScoresRecord:
    """Without the rows, which are prompts times metrics, and without what a judge has said."""
    kept = {
        name: {metric: value for metric, value in getattr(scores, name).items() if metric not in JUDGED}
        for name in ("values", "counts", "intervals")
    }
    return ScoresRecord(**kept)


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_folders(entry) for entry in value]
    return public_path(value) if isinstance(value, str) and value.startswith(("/", "~")) else value


# ----- measured again -----


@dataclass(frozen=True)
class Line:
    """One figure, as it was and as it is."""

    whose: str
    """`unedited` or `edited`."""

    metric: str
    recorded: str
    found: str
    same: bool


def compared(recorded: Mapping[str, ScoresRecord], found: Mapping[str, ScoresRecord]) -> list[Line]:
    """Every rate and KL divergence that is in ``recorded``, by whose it is, beside what was found now.

    Other figures are left out: they are means over answers, and one other answer moves them by an amount that says
    nothing.
    """
    lines = []
    for whose, old in recorded.items():
        new = found[whose]
        for metric in dict.fromkeys((*old.counts, *(name for name in KL_METRICS if name in old.values))):
            if metric in KL_METRICS and whose == "unedited":
                continue  # 0 by definition
            same = metric in new.values and (
                _same_count(old.counts[metric], new.counts.get(metric))
                if metric in old.counts
                else abs(old.values[metric] - new.values[metric]) <= max(KL_SHARE * old.values[metric], KL_NATS)
            )
            texts = [wording.count_or_value(scores, metric) for scores in (old, new)]
            lines.append(Line(whose, wording.label(metric), texts[0], texts[1], same))
    return lines


def _same_count(old: tuple[int, int], new: tuple[int, int] | None) -> bool:
    return new is not None and old[1] == new[1] and abs(old[0] - new[0]) <= ONE_PROMPT
