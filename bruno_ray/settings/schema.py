"""Every knob of a run, in one tree, importable without torch or Ray.

Precedence, highest first: command line, ``BRUNO_*`` environment (``__`` for nesting),
``--config FILE`` or ``config.toml``, the behaviour preset, the defaults below. How the sources are
read and merged is in ``sources.py``. An unknown key is an error at every depth.
"""

import re
from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_serializer,
    field_validator,
    model_validator,
)

from bruno_ray.settings.fields import Section, setting
from bruno_ray.settings.learned import LearnedSettings
from bruno_ray.settings.passwords import without_password
from bruno_ray.settings.prompts import PromptSettings
from bruno_ray.settings.scoring import ScoringSettings
from bruno_ray.settings.search import DirectionSettings, ResidualSettings, SearchSettings

SamplerName = Literal["tpe", "gp", "nsga2", "cmaes"]

SMALLEST_STORE = 80 * 1024**2
"""Bytes; Ray refuses a smaller object store."""


class ModelSettings(Section):
    id: str = setting("", resumable=True)
    """Hugging Face model id, a folder or a GGUF file on disk, or `smollm2`, a small model that comes as a package. Also
    the positional argument of `bruno-ray run`. A run may be resumed with a copy of the same files in another place."""

    gguf_file: str | None = None
    """A .gguf file in that folder or hub repository; it is dequantised when it is loaded."""

    revision: str | None = None
    """Commit, tag or branch on the hub."""

    dtypes: tuple[Literal["auto", "bfloat16", "float16", "float32"], ...] = ("auto", "bfloat16", "float16", "float32")
    """Tried in this order; each must generate one token with finite logits."""

    quantization: Literal["none", "bnb_4bit", "bnb_8bit"] = "none"
    """Load the base quantised by bitsandbytes. A saved model has full-precision weights."""

    device_map: str = setting("auto", resumable=True)
    """Accelerate's device map within one worker: auto, balanced, sequential, cpu, cuda:0 ..."""

    max_memory: dict[str, str] | None = setting(None, resumable=True)
    """Memory cap per device, such as {"0" = "20GiB", "cpu" = "60GiB"}."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for repositories you trust."""

    accept_probed: bool = setting(False, resumable=True)
    """Edit a model whose family is in no table, with the writers that probing found; `bruno-ray coverage MODEL` shows
    them. Accepted once, a model is remembered."""

    lean_forward: Literal["auto", "off"] = setting("auto", resumable=True)
    """`auto`: use a faster forward pass if it knows this kind of model and gives the model's own logits, which is
    checked when the model is loaded. `off`: always use transformers' forward pass."""


class StudySettings(Section):
    name: str | None = setting(None, alias="--study-name")
    """Name of the study and of the run directory; when not given, from the model, behaviour and a hash of both."""

    @field_validator("name")
    @classmethod
    def _names_one_folder(cls, name: str | None) -> str | None:
        if name is not None and (name in ("", ".", "..") or re.search(r"[/\\\0]|:\d+$", name)):
            raise ValueError("a study's name is that of a folder: no / or \\ in it, and no :NUMBER at its end")
        return name

    n_trials: PositiveInt = setting(200, alias="--trials")
    """Completed trials in total, over all resumptions."""

    n_startup_trials: NonNegativeInt = 60
    """Trials spread evenly over the search space before TPE takes over."""

    method: Literal["auto", "searched", "learned", "both"] = setting("auto", alias="--method", resumable=True)
    """searched: kernels over directions that are read off the residual stream; learned: directions and strengths that
    are trained by gradient; both: searched first, and the last `learned.trials` trained. auto: both if a training costs
    at most five times as much as the search, and the model and the settings allow it; without desired answers it
    trains two such (docs/learned.md)."""

    seed: NonNegativeInt = setting(0, alias="--seed")
    """Seeds the sampler: the same seed and the same schedule of batches give the same parameters in every trial.
    `ray.workers` and `study.trials_per_batch` set the schedule; with other values later batches differ."""

    sampler: SamplerName = setting("tpe", alias="--sampler")
    """What proposes edits after the startup trials (docs/search.md): tpe; gp, a Gaussian process; nsga2; cmaes, for one
    objective. Only tpe works beside trained trials."""

    prune: bool = setting(False, alias="--prune", resumable=True)
    """Stop a trial half-way once an earlier one is known to dominate it (docs/search.md). Only with the
    objectives behaviour_rate and kl_divergence; pruned trials count, and cannot be selected."""

    start_from: tuple[str, ...] = setting((), alias="--start-from")
    """Edits to try before any is sampled: RUN (its Pareto front), RUN:TRIAL, a saved model's folder or bruno.json,
    heretic's reproduce.json or model card (docs/search.md)."""

    literature_first: bool = setting(True, resumable=True)
    """Trial 0 is the literature's edit (Arditi et al. 2024): one difference-in-means direction removed with strength 1
    at every layer, norm mode `none`. A study that has begun keeps its trials."""

    layer_by: Literal["off", "causal", "cosmic", "both"] = setting("off", resumable=True)
    """Try, after trial 0, the same edit from the layer whose direction has most effect (docs/search.md). causal:
    removing it suppresses the behaviour and adding it induces it, at little KL (Arditi et al. 2024); cosmic: by
    residuals alone (COSMIC, Siu et al. 2025); both: COSMIC leaves half of the layers to causal. A study that has begun
    keeps its trials."""

    trials_per_batch: PositiveInt | None = setting(None, resumable=True)
    """Trials evaluated in one forward pass by one worker; when not given, 8, or 1 where a single trial keeps a CPU busy
    (models from 50 million parameters)."""

    storage: str | None = setting(None, alias="--storage")
    """Any Optuna storage URL; when not given, a journal file in the run directory. A password in it is not
    stored: set BRUNO_STUDY__STORAGE to the same URL for every command that reads the run."""

    take_over: bool = setting(False, resumable=True)
    """Continue a study whose driver on another machine is believed dead."""

    @field_serializer("storage")
    def _without_password(self, storage: str | None) -> str | None:
        return None if storage is None else without_password(storage)


class RaySettings(Section):
    workers: PositiveInt = setting(1, alias="--workers")
    """Model copies, each in its own actor. If they do not fit on the cluster, the autoscaler asks for machines."""

    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs of one worker; when not given, 1 if the cluster has any, else 0."""

    cpus_per_worker: float | None = Field(None, gt=0)
    """CPUs of one worker, also its torch thread count (at least 1). When not given, 1; on this machine
    without GPUs, its share of the cores (of OMP_NUM_THREADS, if set)."""

    address: str | None = None
    """Ray cluster to join; when not given, RAY_ADDRESS or a local one."""

    object_store_memory: int = Field(256 * 1024**2, ge=SMALLEST_STORE)
    """Bytes of a local cluster's object store (shared memory)."""

    start_timeout: PositiveFloat = 900.0
    """Seconds to wait for the first worker; with an autoscaler this includes renting and booting."""


class SelectionSettings(Section):
    auto: bool = setting(False, alias="--auto-select")
    """Pick and save a trial without asking (`--auto-select`)."""

    max_kl: PositiveFloat = 0.1
    """Auto-select picks no trial whose mean KL is above this, in nats."""

    finalists: PositiveInt = 6
    """This many of the best trials are measured again, with answers of `scoring.report_tokens` to the prompts of
    `prompts.n_finalists`; auto-select picks one of them by these results."""


class OutputSettings(Section):
    directory: Path = setting(Path("runs"), alias="--output")
    """Folder in which run directories are made."""

    max_shard_size: str = setting("5GB", resumable=True)
    """Largest safetensors file of a saved model whose base had to be loaded to be saved (docs/models.md). Any other
    model gets files like those of its base."""

    mtp: Literal["leave", "edit"] = setting("leave", resumable=True)
    """What is done with layers for multi-token prediction, the drafts of speculative decoding, which the search never
    runs: `leave` them as they are, or `edit` them as the last layer."""


class EvaluationSettings(Section):
    lm_eval: Path | None = setting(None, alias="--lm-eval", resumable=True)
    """Program of lm-eval, for `bruno-ray evaluate --suite`; when not given, the one beside this Python or on PATH."""


class Settings(Section):
    """The whole tree. Build it with `sources.load`, which knows the precedence."""

    model: ModelSettings = ModelSettings()
    behaviour: str = setting("refusal", alias="--behavior")
    """A preset in `bruno_ray/presets/` by name, or the path of a .toml file like those. With your own prompts for
    both sides, any name for the behaviour."""

    prompts: PromptSettings = PromptSettings()
    residuals: ResidualSettings = ResidualSettings()
    directions: DirectionSettings = DirectionSettings()
    search: SearchSettings = SearchSettings()
    learned: LearnedSettings = setting(LearnedSettings(), resumable=True)
    scoring: ScoringSettings = ScoringSettings()
    study: StudySettings = StudySettings()
    ray: RaySettings = setting(RaySettings(), resumable=True)
    selection: SelectionSettings = setting(SelectionSettings(), resumable=True)
    output: OutputSettings = OutputSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _agree(self) -> "Settings":
        search, report = self.scoring.response_tokens, self.scoring.report_tokens
        if report < search:
            raise ValueError(
                f"scoring.report_tokens is {report} but the search reads {search} tokens (scoring.response_tokens);"
                f" raise scoring.report_tokens to {search} or more"
            )
        if self.study.sampler == "cmaes" and len(self.scoring.objectives) > 1:
            raise ValueError(
                f"study.sampler cmaes minimises one objective, scoring.objectives has {len(self.scoring.objectives)};"
                " keep one of them, or choose tpe, gp or nsga2"
            )
        if self.study.sampler != "tpe" and self.study.method in ("learned", "both"):
            raise ValueError(
                f"study.sampler {self.study.sampler} cannot learn beside trained trials; use tpe with study.method"
                f" {self.study.method}"
            )
        position = max(self.directions.positions, default=0)
        if position > self.residuals.answer_tokens:
            raise ValueError(
                f"directions.positions asks for answer token {position} but residuals.answer_tokens is"
                f" {self.residuals.answer_tokens}; raise residuals.answer_tokens to {position}"
            )
        return self
