"""Settings of the directions, and of the edits that are searched along them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from bruno_ray.settings.fields import DepthRange, DistanceRange, Range, Section, ShareRange, setting

Share = Annotated[float, Field(ge=0, le=1)]


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
