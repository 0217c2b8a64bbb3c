"""Settings of edits that are trained by gradient."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from bruno_ray.settings.fields import DepthRange, Range, Section


class LearnedSettings(Section):
    """Edits that are trained by gradient, the last trials of a study (`--method`)."""

    trials: NonNegativeInt | None = None
    """How many of `study.n_trials` are trained, at the end. When not given, 24 with `--method both`, and with `auto` as
    many as cost about what the search costs, at most 24."""

    steps: PositiveInt = 160
    """Optimiser steps of one training."""

    checkpoints: PositiveInt = 3
    """Trials of one training: its edit after all steps, after half of them, a quarter ..."""

    ranks: tuple[PositiveInt, ...] = (1,)
    """Directions of a trained subspace; several compete."""

    shared: tuple[bool, ...] = (True,)
    """Whether all layers share one subspace; both compete if both are given."""

    start_layer: DepthRange = (0.0, 1.0)
    """Layer whose direction a training starts from, as a fraction of the last layer's index."""

    starts: PositiveInt = 4
    """Layers that a training starts from at once, evenly spaced; at each checkpoint the worse half of them ends. Which
    layer's direction leads to good answers is seen in training only. 4 cost twice as much as 1."""

    first_layer: DepthRange = (0.0, 0.0)
    """Layers below it are not edited."""

    norm_mode: Literal["none", "pre", "full"] = "none"
    """As `search.norm_mode`. none needs no weight and is exact as an adapter; full reads the edited weights twice a
    step."""

    polish: bool = True
    """The best searched trial by then is one of a training's starts, and every other training's only one."""

    answers: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the likelihood of desired answers (`answer_column` of `prompts.target.train`)."""

    suppress: Annotated[float, Field(ge=0)] | None = None
    """Weight of the unlikelihood of what the unedited model says where it shows the behaviour. When not given, 0 where
    there are desired answers, which lead further alone, and 1 where there are none."""

    retain: Range = (1.5, 15.0)
    """Weight of the KL divergence on baseline prompts; spread evenly in its logarithm."""

    retain_kl: Annotated[float, Field(ge=0)] = 0.03
    """Nats per token. While the KL divergence on baseline prompts is above it, the weight of retain grows by a tenth a
    step; once it is below half of that, the weight sinks again to where it began. 0 leaves the weight alone."""

    induce: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the behaviour's own text after baseline prompts, while the trained subspace holds what target prompts
    put there: what is taken out must be what causes the behaviour."""

    protect: Annotated[float, Field(ge=0)] = 1.0
    """Weight of what the unedited model's answers to `prompts.protect` lose in likelihood."""

    protected_prompts: PositiveInt = 64
    """At most this many prompts of that set are trained on."""

    learning_rate: PositiveFloat = 0.02
    """Of Adam, for directions and strengths alike."""

    max_strength: PositiveFloat = 1.5
    """Largest ablation strength of a trained edit."""

    target_prompts: PositiveInt = 64
    """At most this many train prompts with the behaviour are trained on ..."""

    baseline_prompts: PositiveInt = 128
    """... and this many without."""

    target_rows: PositiveInt = 16
    """Texts of a step per term on target prompts."""

    baseline_rows: PositiveInt = 16
    """Texts of a step on baseline prompts."""

    retain_tokens: PositiveInt = 16
    """Answer positions that the KL divergence is taken over."""

    most_answers: PositiveInt = 64
    """More desired answers than this are not used."""

    phrasings: NonNegativeInt = 2
    """After each prompt this many of the other prompts' answers are suppressed as well as its own."""

    renew_every: NonNegativeInt = 8
    """After so many steps the edit answers some train prompts: what still shows the behaviour is suppressed from then
    on, and confident proper answers are learned. 0 leaves that out."""

    renewal_prompts: PositiveInt = 24
    """How many of the train prompts it answers."""

    confidence: Annotated[float, Field(ge=0, le=1)] | None = None
    """Probability that each token of such an answer must have, 1 for none of them. When not given, 0.5; where there are
    desired answers none, since one's own lead away from them."""

    agreement: PositiveInt = 1
    """How many edits must say much the same before such an answer is learned: the edit itself, the other starts of its
    training, and the best of the searched trials by then. 1 asks no other edit."""

    checkpointing: Literal["auto", "on", "off"] = "auto"
    """Whether layers compute their activations again on the way back instead of keeping them, for a third more time.
    auto: once memory does not suffice for a batch of 512 tokens."""

    batch_tokens: NonNegativeInt = 0
    """Tokens that go forward and back at a time; 0 finds it from memory."""
