"""reproduce.json as heretic (https://github.com/p-e-w/heretic) writes it beside a model that it uploads.

Versions 1 and 2 (heretic 1.4.0) have the prompts and markers among the settings and the figures in `metrics`; version 3
has them in the settings and `scores` of its scorers `KeywordRate` and `KLDivergence`. What the fields mean was read
from the files and heretic's documentation; nothing of its source is used.

Their terms in ours: bad_prompts and good_prompts are the target and baseline train prompts, the evaluation prompts are
the test prompts, attn.o_proj and mlp.down_proj are attention and mlp, row_normalization is the norm mode. A kernel's
`min_weight` is a strength there and a share of the peak here. KL divergence is taken at the first token.
"""

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.errors import OutputError
from bruno_ray.runs.records import ScoresRecord, first_mistake
from bruno_ray.settings import (
    DatasetSettings,
    DirectionSettings,
    ModelSettings,
    PromptSet,
    PromptSettings,
    ScoringSettings,
    Settings,
)

VERSIONS = ("1", "2", "3")
COMPONENTS = {"attn.o_proj": "attention", "mlp.down_proj": "mlp"}
DIRECTION_SET = "difference_in_means@0"
DTYPES = ("auto", "bfloat16", "float16", "float32")


class _Part(BaseModel):
    """What is read of a group of theirs; the rest is theirs alone."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)


class _Dataset(_Part):
    dataset: str
    commit: str | None = None
    split: str | None = None
    column: str | None = None
    prefix: str = ""
    suffix: str = ""
    system_prompt: str | None = None


class _Keywords(_Part):
    keyword_markers: tuple[str, ...] = ()
    prompts: _Dataset | None = None


class _Divergence(_Part):
    prompts: _Dataset | None = None


class _Scorers(_Part):
    KeywordRate: _Keywords = _Keywords()
    KLDivergence: _Divergence = _Divergence()


class _Settings(_Part):
    model: str
    model_commit: str | None = None
    dtypes: tuple[str, ...] = ()
    quantization: str = "none"
    max_response_length: int = 100
    response_prefix: str | None = None
    orthogonalize_direction: bool = False
    row_normalization: str = "none"
    winsorization_quantile: float = 1.0
    system_prompt: str = ""
    good_prompts: _Dataset
    bad_prompts: _Dataset
    refusal_markers: tuple[str, ...] = ()
    good_evaluation_prompts: _Dataset | None = None
    bad_evaluation_prompts: _Dataset | None = None
    scorer: _Scorers = _Scorers()


class _Kernel(_Part):
    max_weight: float
    max_weight_position: float
    min_weight: float
    min_weight_distance: float


class _Parameters(_Part):
    direction_index: float | None
    abliteration_parameters: dict[str, _Kernel]


class _Metrics(_Part):
    kl_divergence: float
    refusals: int
    base_refusals: int
    n_bad_prompts: int


class _Score(_Part):
    value: float
    md_display: str = ""


class _Scores(_Part):
    name: str
    score: _Score
    baseline: _Score


class _File(_Part):
    version: str
    timestamp: datetime.datetime
    environment: dict[str, Any] = {}
    settings: _Settings
    parameters: _Parameters
    metrics: _Metrics | None = None
    scores: list[_Scores] = Field(default_factory=list)


@dataclass(frozen=True)
class HereticFile:
    """In our terms."""

    settings: Settings
    """With the four data sets; test prompts and markers are missing where a file of version 3 does not name them."""

    edit: Edit
    date: datetime.date
    recorded: dict[str, ScoresRecord]
    """`unedited` and `edited`: behaviour rate, and KL divergence at the first token."""

    versions: dict[str, str]
    notes: tuple[str, ...]


def is_heretic(content: Mapping[str, Any]) -> bool:
    """Whether it looks like one of theirs, of whatever version."""
    return "version" in content and "parameters" in content and "format" not in content


def parse(content: Mapping[str, Any], path: Path) -> HereticFile:
    """Raises OutputError if the file is of another version, or holds what has no counterpart here."""
    if (version := str(content.get("version"))) not in VERSIONS:
        raise OutputError(
            f"{path} has version {version} of heretic's format, and this bruno-ray reads {', '.join(VERSIONS)}: use"
            " heretic, or a later bruno-ray"
        )
    try:
        file = _File.model_validate(content)
        given = file.settings
        settings = _settings(given, path)
        edit = Edit(
            components={
                _component(name, path): _kernel(kernel, path)
                for name, kernel in file.parameters.abliteration_parameters.items()
            },
            direction_set=DIRECTION_SET,
            direction_index=file.parameters.direction_index,
            norm_mode=given.row_normalization,  # ty: ignore[invalid-argument-type] - Edit checks it
        )
    except ValidationError as error:
        raise OutputError(f"{path} is damaged, or not heretic's ({first_mistake(error)}): get it again") from error
    except ValueError as error:
        raise OutputError(f"{path} needs what bruno-ray does not have ({error}): use heretic") from error
    notes = []
    if given.row_normalization == "full":
        notes.append("heretic approximates row_normalization full by an adapter of low rank, here it is exact")
    environment = file.environment
    versions = {"heretic": str(environment.get("heretic", {}).get("version", "unknown"))}
    if "pytorch_version" in environment:
        versions["torch"] = str(environment["pytorch_version"])
    return HereticFile(settings, edit, file.timestamp.date(), _recorded(file, path), versions, tuple(notes))


def _settings(given: _Settings, path: Path) -> Settings:
    keywords, divergence = given.scorer.KeywordRate, given.scorer.KLDivergence
    if given.quantization not in get_args(ModelSettings.model_fields["quantization"].annotation):
        raise ValueError(f"quantization {given.quantization}")
    dtypes = tuple(name for name in given.dtypes if name in DTYPES) or DTYPES
    return Settings(
        model=ModelSettings.model_validate(
            {
                "id": given.model,
                "revision": given.model_commit,
                "dtypes": dtypes,
                "quantization": given.quantization,
            }
        ),
        behaviour="refusal",
        prompts=PromptSettings(
            target=PromptSet(
                train=_dataset(given.bad_prompts),
                test=_dataset(given.bad_evaluation_prompts or keywords.prompts),
            ),
            baseline=PromptSet(
                train=_dataset(given.good_prompts),
                test=_dataset(given.good_evaluation_prompts or divergence.prompts),
            ),
            system_prompt=given.system_prompt,
            response_prefix="auto" if given.response_prefix is None else given.response_prefix,
        ),
        directions=DirectionSettings(
            methods=("difference_in_means",),
            projected=given.orthogonalize_direction,
            winsorize_quantile=given.winsorization_quantile,
        ),
        scoring=ScoringSettings(
            scorers=("behaviour_rate", "kl_divergence"),
            report_scorers=(),
            markers=given.refusal_markers or keywords.keyword_markers,
            response_tokens=given.max_response_length,
            report_tokens=given.max_response_length,
            kl_tokens=1,
        ),
    )


def _dataset(given: _Dataset | None) -> DatasetSettings | None:
    """Prefix and suffix stand a space apart from the prompt there."""
    if given is None:
        return None
    split = given.split or "train"
    return DatasetSettings(
        source=given.dataset,
        split=f"train{split}" if split.startswith("[") else split,
        column=given.column,
        revision=given.commit,
        prefix=f"{given.prefix} " if given.prefix else "",
        suffix=f" {given.suffix}" if given.suffix else "",
        system_prompt=given.system_prompt,
    )


def _component(name: str, path: Path) -> str:
    if name not in COMPONENTS:
        raise OutputError(f"{path} edits {name}, and bruno-ray edits {', '.join(COMPONENTS)} only: use heretic")
    return COMPONENTS[name]


def _kernel(given: _Kernel, path: Path) -> AblationParameters:
    """A peak of 0 is an edit that leaves the component alone; its edge is 0 as well then."""
    if given.max_weight < 0 or (given.max_weight == 0 and given.min_weight != 0):
        raise OutputError(
            f"{path} has a kernel with max_weight {given.max_weight:g} and min_weight {given.min_weight:g}, which"
            " has no counterpart here: use heretic"
        )
    share = given.min_weight / given.max_weight if given.max_weight else 0.0
    return AblationParameters(given.max_weight, given.max_weight_position, share, given.min_weight_distance)


def _recorded(file: _File, path: Path) -> dict[str, ScoresRecord]:
    if file.metrics is not None:
        found = file.metrics
        counts, n = (found.base_refusals, found.refusals), found.n_bad_prompts
        kl = found.kl_divergence
    else:
        keywords = next((score for score in file.scores if score.name == "Keywords"), None)
        divergence = next((score for score in file.scores if score.name == "KL divergence"), None)
        if keywords is None or divergence is None:
            raise OutputError(f"{path} has no scores called Keywords and KL divergence to compare with: use heretic")
        shown = re.fullmatch(r"(\d+)/(\d+)", keywords.score.md_display)
        if shown is None:
            raise OutputError(f"{path} does not say how many prompts its Keywords score is of: use heretic")
        n = int(shown[2])
        counts = (round(keywords.baseline.value * n), round(keywords.score.value * n))
        kl = divergence.score.value
    unedited, edited = (
        ScoresRecord(values={"behaviour_rate": count / n}, counts={"behaviour_rate": (count, n)}) for count in counts
    )
    edited.values["kl_first"] = kl
    return {"unedited": unedited, "edited": edited}
