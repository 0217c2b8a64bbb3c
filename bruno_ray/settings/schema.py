"""Every knob of a run, in one tree, importable without torch or Ray.

Precedence, highest first: command line, ``BRUNO_*`` environment (``__`` for nesting),
``--config FILE`` or ``config.toml``, the behaviour preset, the defaults below. How the sources are
read and merged is in ``sources.py``. An unknown key is an error at every depth.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_serializer,
    field_validator,
    model_validator,
)

from bruno_ray.settings.fields import DepthRange, DistanceRange, Range, Section, ShareRange, setting
from bruno_ray.settings.learned import LearnedSettings
from bruno_ray.settings.passwords import without_password

GUIDES = ("elicited_answers", "confidence")
"""Scorers that guide a search and are no figure for people. At a report's length they would cost two more trials."""

SamplerName = Literal["tpe", "gp", "nsga2", "cmaes"]

Share = Annotated[float, Field(ge=0, le=1)]

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


class DatasetSettings(Section):
    source: str
    """Hub data set id (`owner/name`, `owner/name/config`), a file of one (`hf://datasets/owner/name/file.jsonl`), a
    `load_from_disk` folder, or a .jsonl, .json, .csv, .tsv, .txt or .parquet file, which may be compressed (.gz).
    `organism:target` and `organism:baseline` name the embedded organism's own prompts."""

    config: str | None = None
    """Configuration (subset) name of a hub data set."""

    split: str = "train"
    """Split, or a slice of it: `train[:400]`, `test[100:200]`."""

    column: str | None = None
    """Column with the prompt; when not given, the first of prompt, text, instruction, question, messages and
    conversations that exists. In a conversation the last user turn is the prompt, and the system turn is kept."""

    answer_column: str | None = None
    """Optional column with a desired answer, used by the `desired_answers` and `to_the_point` scorers."""

    words_column: str | None = None
    """Optional column with words, separated by spaces, that an answer to the point must contain (`to_the_point`)."""

    category_column: str | None = None
    """Optional column with a category; the report gives a rate for each."""

    encoding: str | None = None
    """Encoding of a text file, such as cp1251; when not given, UTF-8, UTF-16 or cp1252, detected and reported."""

    separator: str | None = None
    """Character between the fields of a .csv file; when not given, the one that splits all its lines alike."""

    revision: str | None = None
    """Commit of the hub data set."""

    streaming: bool | None = None
    """Read rows one by one instead of downloading everything; when not given, on for a hub data set with a slice
    that starts at 0 (`train[:200]`)."""

    prefix: str = ""
    """Text put before every prompt."""

    suffix: str = ""
    """Text put after every prompt."""

    system_prompt: str | None = None
    """Overrides `prompts.system_prompt` for this set, and the system turns of its conversations."""


class PromptSet(Section):
    """One side of the contrast. Directions come from `train`, the search scores on `validation`, the report on `test`.
    A part that is not given is split off from `train`, by a hash of each prompt's text."""

    train: DatasetSettings | None = None
    validation: DatasetSettings | None = None
    test: DatasetSettings | None = None


class PromptSettings(Section):
    target: PromptSet = setting(PromptSet(), alias="--target", alias_of="train.source")
    """Prompts that show the behaviour."""

    baseline: PromptSet = setting(PromptSet(), alias="--baseline", alias_of="train.source")
    """Prompts that do not show it; on these the model should not change."""

    protect: dict[str, DatasetSettings] = setting({}, alias="--protect")
    """Named sets of prompts that the edit should not affect: what they have in common is removed from the directions
    (`directions.protect_strengths`), and a trained edit is trained to keep the answers to them (`learned.protect`).
    As a flag NAME=FILE,NAME=FILE; in a file [prompts.protect.NAME]."""

    system_prompt: str | None = None
    """System message of every prompt; when not given, the chat template's own default."""

    @field_validator("protect", mode="before")
    @classmethod
    def _sources_by_name(cls, given: Any) -> Any:
        """A data set may be given by its source alone."""
        if not isinstance(given, Mapping):
            return given
        return {name: {"source": each} if isinstance(each, str) else each for name, each in given.items()}

    n_train: PositiveInt = 400
    """At most this many prompts per side for directions."""

    n_validation: PositiveInt = 100
    """At most this many prompts per side for scoring trials."""

    n_test: PositiveInt = 100
    """At most this many prompts per side for the report."""

    n_finalists: NonNegativeInt = 40
    """At most this many prompts per side, unseen by the search, on which the best trials are measured again before
    `--auto-select` picks one. They come from the source of the test prompts and are at most half as many."""

    response_prefix: str = "auto"
    """Text that every answer starts with (a closed reasoning block, for thinking models). `auto` detects what
    the unedited model's answers have in common; an empty string switches it off."""


class ResidualSettings(Section):
    max_tokens: PositiveInt = 512
    """Longer prompts are cut inside the user's text; the assistant header is always kept."""

    answer_tokens: NonNegativeInt = 0
    """Also read the residual stream at this many tokens of the model's own greedy answer."""

    batch_tokens: NonNegativeInt = setting(0, resumable=True)
    """Tokens in one forward pass, padding included; 0 doubles it until memory or speed sets the limit."""

    cache_dir: Path | None = setting(None, resumable=True)
    """Where residuals are kept; when not given, ~/.cache/bruno-ray/residuals."""


class DirectionSettings(Section):
    methods: tuple[str, ...] = ("difference_in_means",)
    """Names from docs/directions.md, of installed packages, or FILE.py:NAME; several compete within one study."""

    projected: bool = True
    """Keep only the part of each direction that is orthogonal to the baseline mean."""

    winsorize_quantile: Annotated[float, Field(gt=0.5, le=1.0)] = 1.0
    """Clamp each residual vector to this quantile of its own magnitudes; 1 changes nothing."""

    rank: PositiveInt = 1
    """Directions per layer for methods that yield a subspace."""

    positions: tuple[NonNegativeInt, ...] = (0,)
    """Where directions are read: 0 is the last prompt token, i the i-th answer token (needs
    `residuals.answer_tokens` >= i). Several compete within one study."""

    protect_strengths: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.5, 1.0)
    """How much of the protected subspaces (`prompts.protect`) is removed from each direction, 0 to 1; several compete
    within one study, and 0 leaves the direction as it is. Without protected prompts it has no effect."""

    protect_rank: PositiveInt = 8
    """Principal components per protected set."""

    protect_ridge: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Spares directions about which the protected prompts say little: a component counts half if its squared singular
    value is this share of the largest."""

    opened_positions: tuple[PositiveInt, ...] = ()
    """Also read directions at these tokens of an answer that is made to begin as baseline answers do: with
    `scoring.compliant_opening` or, when that is not given, with their commonest beginning."""

    joined: bool = False
    """Let the subspace that all positions span together compete as well."""


class ComponentRange(Section):
    """Search range of one component's ablation kernel over layers; positions and distances are fractions of
    the last layer's index."""

    max_weight: Range = (0.8, 1.5)
    """Ablation strength at the peak; 1 removes the whole component along the direction. Values sampled below 0 count
    as 0."""

    max_weight_position: DepthRange = (0.0, 1.0)
    """Layer of the peak."""

    min_weight: ShareRange = (0.0, 1.0)
    """Strength at the edge of the kernel, as a share of the peak."""

    min_weight_distance: DistanceRange = (0.0, 1.5)
    """Distance from the peak to the edge, at least one layer; beyond it nothing is ablated."""


class SearchSettings(Section):
    norm_mode: Literal["none", "pre", "full"] = "full"
    """none: plain; pre: directions measured against row-normalised weights; full: row norms preserved as well."""

    direction_scopes: tuple[Literal["global", "per_layer"], ...] = ("global", "per_layer")
    """global: one direction for all layers, from a layer that is searched; per_layer: each layer has its own."""

    direction_index: DepthRange = (0.2, 1.0)
    """Layer that the global direction is read at, as a fraction of the last layer's index."""

    kernels: Annotated[tuple[Literal["linear", "flat", "cosine", "gaussian"], ...], Field(min_length=1)] = ("linear",)
    """How the strength falls from the peak to the edge of the kernel; with several, each component samples its own."""

    attention: ComponentRange = ComponentRange()
    mlp: ComponentRange = ComponentRange(max_weight=(-0.25, 1.5))

    further: tuple[Literal["router", "attention_input", "mlp_input", "addition"], ...] = ()
    """Components that are edited too (docs/search.md): router, which expert a token is sent to; attention_input and
    mlp_input, what queries, keys, values, gates and up projections read; addition, the difference in means itself,
    added to the bias of attention's output."""

    router: ComponentRange = ComponentRange(max_weight=(-0.25, 1.0))
    attention_input: ComponentRange = ComponentRange(max_weight=(-0.25, 1.0))
    mlp_input: ComponentRange = ComponentRange(max_weight=(-0.25, 1.0))
    addition: ComponentRange = ComponentRange(max_weight=(-0.25, 1.0), min_weight_distance=(0.0, 0.25))

    experts: Annotated[tuple[Literal["all", "target"], ...], Field(min_length=1)] = ("all",)
    """Which experts of a mixture are edited. target: in each layer, those that receive a larger share of the tokens of
    target prompts than of baseline prompts. Several compete within one study."""

    heads: Annotated[tuple[Literal["all", "causal", "projection"], ...], Field(min_length=1)] = ("all",)
    """Which attention heads are edited. projection: those whose outputs differ most along the direction between target
    and baseline prompts; causal: those whose removal leaves least of the direction in the last layer. Several
    compete within one study."""

    heads_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of all heads of the model that `search.heads` chooses."""

    require: tuple[Literal["router", "attention_input", "mlp_input", "addition", "experts", "heads"], ...] = setting(
        (), resumable=True
    )
    """Which of `search.further`, `experts` and `heads` must apply: a model to which they do not is an error before the
    run. Otherwise what does not apply is left out; the log and the report say so."""


class JudgeSettings(Section):
    """A language model, or a program of your own, that reads the answers of the report. It is off until a URL, a model
    or a plugin is given."""

    url: str | None = None
    """Address of any server with OpenAI's API, up to its /v1: http://localhost:8000/v1. It is asked from the machine
    that runs the command, not from workers."""

    model: str = ""
    """The judge's name on that server. Without a URL, a model as in `model.id`, loaded in a separate worker when
    the others have ended."""

    plugin: str | None = None
    """A judge of an installed package, or FILE.py:NAME (docs/plugins.md), in place of `url` and `model`. It runs on the
    machine of the command, and gets the rubric if there is one."""

    key_variable: str | None = None
    """Name of the environment variable that holds the server's API key. The key itself is never a setting."""

    rubric: str = ""
    """In a sentence or two, which answers show the behaviour. The judge gets it with each prompt and answer."""

    timeout: PositiveFloat = 60.0
    """Seconds allowed for one verdict."""

    concurrency: PositiveInt = 8
    """Requests sent at the same time."""

    most_requests: PositiveInt = 2000
    """The judge is left out if the report needs more new verdicts than this; those on disk do not count."""

    @property
    def is_given(self) -> bool:
        return bool(self.url or self.model or self.plugin)

    @model_validator(mode="after")
    def _can_be_asked(self) -> "JudgeSettings":
        if self.plugin is not None and (self.url or self.model):
            raise ValueError("scoring.judge.plugin is given beside a url or model: keep one of them")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"scoring.judge.url is {self.url!r}; write it as http://HOST:PORT/v1")
        if self.url is not None and (re.search("://[^/]*@", self.url) or without_password(self.url) != self.url):
            raise ValueError(
                "scoring.judge.url holds a password, which would be kept with the run; put the key into an environment"
                " variable and name that in scoring.judge.key_variable"
            )
        if self.url is not None and not self.model:
            raise ValueError("scoring.judge.url is given without a name; set scoring.judge.model to one of its models")
        if self.key_variable is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.key_variable):
            raise ValueError(
                "scoring.judge.key_variable is not the name of an environment variable; put the key into one, such as"
                " JUDGE_API_KEY, and give that name"
            )
        if (self.url or self.model) and not self.rubric.strip():
            raise ValueError(
                "scoring.judge.rubric is empty; say in a sentence which answers show the behaviour, or leave the judge"
                " out"
            )
        return self


class ClassifierSettings(Section):
    """The model of the `text_classifier` scorer."""

    model: str = ""
    """Any sequence-classification model of transformers: a folder, or its id on the hub."""

    revision: str | None = None
    """Commit, tag or branch on the hub."""

    label: str = ""
    """The class that shows the behaviour, as the model's config names it (or its number)."""

    reads: Literal["answer", "prompt_and_answer"] = "answer"
    """What it is shown: the answer alone, or the user's message and the answer as a pair."""


class ScoringSettings(Section):
    scorers: tuple[str, ...] = ("behaviour_rate", "kl_divergence", "coherence", "to_the_point", "elicited_answers")
    """Names in `bruno_ray.scoring.SCORERS`, of installed packages, or FILE.py:NAME. Metrics that are not
    objectives break ties in --auto-select."""

    objectives: tuple[str, ...] = ("behaviour_rate", "kl_divergence")
    """Metrics the study minimises, in this order."""

    markers: tuple[str, ...] = ()
    """An answer that contains one of these shows the behaviour. Case, `*`, quotes and spaces are normalised."""

    empty_counts: bool = True
    """An empty answer counts as showing the behaviour."""

    response_tokens: PositiveInt = 30
    """Longest answer generated for scoring, in tokens. An answer ends earlier once it is decided."""

    report_tokens: PositiveInt = 256
    """Longest answer generated for the report, for saved models and by `evaluate`, in tokens."""

    report_scorers: tuple[str, ...] = (
        "behaviour_by_length",
        "baseline_behaviour",
        "neutral_text",
        "detector",
        "reasoning",
    )
    """Further scorers for the report, beside those of the search."""

    reasoning_tokens: PositiveInt = 1024
    """Longest answer, in tokens, of a model that reasons before it answers (scorer `reasoning`, in the report)."""

    kl_tokens: PositiveInt = 16
    """Answer positions the KL divergence is taken over, teacher-forced on the unedited model's answer. 1 is what other
    tools measure; it is reported as `kl_first` in any case."""

    compliant_opening: str = ""
    """Opening of a compliant answer, for the `compliant_perplexity` scorer; when empty, the most common opening
    of the unedited model's answers to baseline prompts."""

    row_tokens: NonNegativeInt = setting(0, resumable=True)
    """Tokens in one forward pass while scoring, padding included; 0 finds it from memory."""

    judge: JudgeSettings = setting(JudgeSettings(), resumable=True)

    classifier: ClassifierSettings = ClassifierSettings()

    def for_report(self, further: bool = True) -> "ScoringSettings":
        """How what is reported is measured: with longer answers, by scorers that a search does without (unless not
        ``further``), and without those that only guide one."""
        scorers = (*self.scorers, *(self.report_scorers if further else ()))
        scorers = tuple(dict.fromkeys(name for name in scorers if name not in GUIDES))
        return self.model_copy(update={"scorers": scorers, "response_tokens": self.report_tokens})


class StudySettings(Section):
    name: str | None = setting(None, alias="--study-name")
    """Name of the study and of the run directory; when not given, from the model, behaviour and a hash of both."""

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
