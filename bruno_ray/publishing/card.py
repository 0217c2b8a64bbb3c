"""The model card of a saved model: what it is, how it was changed, what that did, how to do it again.

Everything in it comes from run.json. Paths of this machine are kept out of it, since cards are published.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
import yaml
from huggingface_hub import ModelCard

from bruno_ray.errors import OutputError
from bruno_ray.model.named_models import find_named
from bruno_ray.publishing import comparing, task_table, wording
from bruno_ray.publishing.card_metadata import examples, model_index, quoted, widgets
from bruno_ray.publishing.environment import environment
from bruno_ray.publishing.training_account import source_lines
from bruno_ray.runs.records import RunRecord, Sample
from bruno_ray.settings import PromptSet, Settings
from bruno_ray.study.selection import COUNTED

# Settings that decide where and how fast a run goes, not what comes out.
UNESSENTIAL = {"ray": True, "evaluation": True, "output": {"directory": True, "max_shard_size": True}}


def render_card(
    record: RunRecord, base_license: dict[str, str] | None = None, mtp: str = "", samples: Sequence[Sample] = ()
) -> str:
    """README.md of the saved model, front matter included.

    Args:
        record: the run, with a selected trial.
        base_license: `license` and relatives of the base model's card, see `license_of`.
        mtp: what became of layers for multi-token prediction, see `SavedModel`.
        samples: of this trial, answers before and after.

    Raises:
        OutputError: no trial is selected.
    """
    selected, settings = record.selected, record.settings
    if selected is None:
        raise OutputError("a model card needs a selected trial: name one with `bruno-ray save RUN:TRIAL`")
    scores, measured_on = wording.final_scores(record)
    part = "validation" if scores is selected.validation else "test"
    base = base_name(settings)
    title = f"{base.rpartition('/')[2]}, {behaviour_name(settings)} ablated"
    chosen = examples(behaviour_name(settings), samples)
    return (
        environment()
        .get_template("card.md.j2")
        .render(
            front_matter=front_matter(record, base_license or {}, title, chosen),
            title=title,
            examples=[(quoted(each.prompt), quoted(each.before), quoted(each.after)) for each in chosen],
            base=base,
            attribution=named.attribution if (named := find_named(settings.model.id)) else "",
            behaviour=behaviour_name(settings),
            searched_in=searched_in(record),
            mtp=wording.MTP[mtp],
            direction=wording.direction_phrase(selected.edit),
            direction_options=direction_options(settings),
            edit=selected.edit,
            trained_on=source_lines(selected),
            norm_mode=wording.NORM_MODES[selected.edit["norm_mode"]],
            number=selected.number,
            n_trials=sum(record.n_trials.get(state, 0) for state in COUNTED) or settings.study.n_trials,
            study=settings.study.name or "unnamed",
            strength_header=wording.strength_header(selected.edit),
            strengths=wording.strength_rows(selected.edit),
            coverage=wording.coverage_rows(record.coverage),
            changed=", ".join(f"{name} {wording.percent(share)}" for name, share in selected.changed.items()),
            kept=wording.kept_rows(record),
            measured_on=measured_on,
            warnings=comparing.suspicions(record),
            kl_where=" at the first answer token"
            if settings.scoring.kl_tokens == 1
            else f" over the first {settings.scoring.kl_tokens} answer tokens",
            results=wording.before_and_after(record.baseline.get(part), scores),
            meanings=wording.meanings(scores.values if scores else ()),
            tasks=task_table.task_rows(task_table.of_selected(record)),
            task_header=task_table.HEADER,
            extra={name.replace("_", " "): wording.plain(value) for name, value in record.extra.items()},
            prompts=prompt_rows(record),
            measured_again=selected.test is not None and selected.saved is not None,
            command=public_command(record.command),
            config=reproduction_config(settings),
            seeds=", ".join(f"{name} {seed}" for name, seed in record.seeds.items()) or f"study {settings.study.seed}",
            hashes=", ".join(f"{name} `{public_text(value)}`" for name, value in record.hashes.items()) or "none",
            versions={"bruno-ray": "unknown", **record.versions},
            version_line=", ".join(f"{name} {version}" for name, version in record.versions.items()) or "unknown",
        )
    )


def front_matter(
    record: RunRecord, base_license: dict[str, str], title: str = "", chosen: Sequence[Sample] = ()
) -> str:
    """The card's YAML, as the hub reads it."""
    settings = record.settings
    data: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": record.model.get("task", "text-generation"),
    }
    if named := find_named(settings.model.id):
        data |= {"base_model": named.base_model, "base_model_relation": "finetune"}
    elif is_hub_id(settings.model.id):
        data |= {"base_model": settings.model.id, "base_model_relation": "finetune"}
    data["tags"] = ["bruno-ray", "directional-ablation", "abliterated", behaviour_name(settings)]
    datasets = [source.source for _, _, source in sources(settings) if is_hub_id(source.source)]
    if datasets:
        data["datasets"] = list(dict.fromkeys(datasets))
    if offered := widgets(chosen):
        data["widget"] = offered
    if index := model_index(title, behaviour_name(settings), record, _dataset_types(settings)):
        data["model-index"] = index
    return yaml.safe_dump(data | base_license, sort_keys=False, allow_unicode=True).rstrip("\n")


def _dataset_types(settings: Settings) -> dict[str, str]:
    """Side -> hub id of its test prompts, or a name where they are nobody else's."""
    given = {(side, part): dataset.source for side, part, dataset in sources(settings)}
    found = {}
    for side in ("target", "baseline"):
        source = given.get((side, "test")) or given.get((side, "train")) or ""
        found[side] = source if is_hub_id(source) else f"{behaviour_name(settings)}-{side}"
    return found


def license_of(folder: Path) -> dict[str, str]:
    """The licence entries of a model card in ``folder``; empty where there is none."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def reproduction_config(settings: Settings) -> str:
    """The settings that differ from the defaults, as TOML, without paths of this machine."""
    values = settings.model_dump(mode="json", exclude_defaults=True, exclude=UNESSENTIAL)
    if not values.get("output", True):
        del values["output"]
    values.get("study", {}).pop("storage", None)
    values.get("residuals", {}).pop("cache_dir", None)
    return tomli_w.dumps(_publishable(values))


def prompt_rows(record: RunRecord) -> list[tuple[str, str, str, str]]:
    """Rows (side, part, source, number of prompts)."""
    given = {(side, part): source for side, part, source in sources(record.settings)}
    rows = []
    for side, parts in record.prompts.items():
        for part, count in parts.items():
            source = given.get((side, part))
            if not count:
                continue
            if source is None:
                origin = "test" if part == "finalists" and (side, "test") in given else "train"
                text = f"out of the {origin} part, by a hash of each prompt"
            else:
                details = [source.config, source.split, source.revision and f"revision {source.revision}"]
                text = f"{public_path(source.source)} ({', '.join(d for d in details if d)})"
            rows.append((side, part, text, str(count)))
    return rows


def sources(settings: Settings) -> list[tuple[str, str, Any]]:
    """(side, part, DatasetSettings) of every part that names a data set."""
    return [
        (side, part, getattr(getattr(settings.prompts, side), part))
        for side in ("target", "baseline")
        for part in PromptSet.model_fields
        if getattr(getattr(settings.prompts, side), part) is not None
    ] + [("protect", name, source) for name, source in settings.prompts.protect.items()]


def searched_in(record: RunRecord) -> str:
    """Precision of the base model during the search."""
    dtype, quantization = record.model.get("dtype", "an unknown dtype"), record.settings.model.quantization
    return dtype if quantization == "none" else f"{quantization} ({dtype})"


def direction_options(settings: Settings) -> str:
    directions = settings.directions
    return ", ".join(
        [
            "orthogonal to the baseline mean" if directions.projected else "not projected",
            f"rank {directions.rank}",
            f"residuals clamped at their quantile {directions.winsorize_quantile:g}"
            if directions.winsorize_quantile < 1
            else "residuals not clamped",
            *(
                [
                    f"cleaned of what {', '.join(settings.prompts.protect)} protects (rank {directions.protect_rank},"
                    f" ridge {directions.protect_ridge:g})"
                ]
                if settings.prompts.protect
                else []
            ),
        ]
    )


def behaviour_name(settings: Settings) -> str:
    """Of a preset, or of a preset file without its folder."""
    return Path(settings.behaviour).name.removesuffix(".toml")


def base_name(settings: Settings) -> str:
    """What the card calls the base model."""
    named = find_named(settings.model.id)
    return named.title if named else public_path(settings.model.id)


def is_hub_id(name: str) -> bool:
    """Whether a model or data set is named as on the hub: no folder, no file, no prompts built into this package."""
    return bool(name) and ":" not in name and not _is_local(name)


def public_path(name: str) -> str:
    """A hub id as it is; of a path on this machine only the last part that says something."""
    if not _is_local(name):
        return name
    path = Path(name)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def public_command(command: list[str]) -> str:
    """A command line without the folders of this machine."""
    return public_text(shlex.join([*(Path(word).name for word in command[:1]), *command[1:]]))


def public_text(text: str) -> str:
    """Text without the name of the user's home folder."""
    try:
        home = Path.home()
    except RuntimeError:  # this user has none
        return text
    return text if home == home.parent else text.replace(str(home), "~")  # / is the home of users without an entry


def _is_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).expanduser().exists()


def _publishable(value: Any) -> Any:
    """TOML knows no null; local paths lose their folders."""
    if isinstance(value, dict):
        return {k: _publishable(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_publishable(v) for v in value if v is not None]
    return public_path(value) if isinstance(value, str) and value.startswith(("/", "~")) else value
