"""Settings of edits that are trained by gradient."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from bruno_ray.settings.fields import DepthRange, Range, Section


class LearnedSettings(Section):
    """Edits that are trained by gradient, the last trials of a study (`--method`)."""

    trials: NonNegativeInt | None = None
    """How many of `study.n_trials` are trained, at the end: `checkpoints` times `scales` are one training. When not
    given, half of them with `--method both`, and with `auto` as many as cost about what the search costs; at most 8
    trainings."""

    steps: PositiveInt = 160
    """Optimiser steps of one training."""

    checkpoints: PositiveInt = 5
    """Trials of one training: its edit after all steps, after half of them, a quarter ..."""

    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] | None = None
    """Each of these edits is tried with its strengths multiplied by each of these. When not given, 1, 0.9 and 0.8 with
    desired answers, 1, 0.8 and 0.65 without. On a real model a training goes further than it has to: with answers nine
    tenths of its edit may remove the behaviour as well, at three quarters of the KL divergence, without answers four
    fifths, at three fifths."""

    ranks: tuple[PositiveInt, ...] = (1,)
    """Directions of a trained subspace; several compete."""

    shared: tuple[bool, ...] = (True,)
    """Whether all layers share one subspace; both compete if both are given."""

    start_layer: DepthRange = (0.0, 1.0)
    """Layer whose direction a training starts from, as a fraction of the last layer's index."""

    starts: PositiveInt = 4
    """Layers from which one training starts in parallel, evenly spaced; after a quarter and after half of the steps
    the worse half is dropped. Only training shows which layer's direction leads to good answers. 4 cost twice as much
    as 1."""

    first_layer: DepthRange = (0.0, 0.0)
    """Layers below this one are not edited; as a fraction of the last layer's index."""

    norm_mode: Literal["none", "pre", "full"] = "none"
    """As `search.norm_mode`. none needs no weight and is exact as an adapter; full reads the edited weights twice a
    step."""

    polish: bool | None = None
    """The best searched trial by then is one of a training's starts, and every other training's only one. When not
    given, so with desired answers only: without them it leads to fewer answers than a layer's direction does."""

    answers: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the likelihood of desired answers (`answer_column` of `prompts.target.train`)."""

    suppress: Annotated[float, Field(ge=0)] | None = None
    """Weight of the unlikelihood of what the unedited model says where it shows the behaviour, in all steps. When not
    given, 1 if there are no desired answers; if there are, 0.3 in the first quarter of the steps and then 0."""

    retain: Range = (1.5, 15.0)
    """Weight of the KL divergence on baseline prompts; sampled evenly on a logarithmic scale."""

    retain_kl: Annotated[float, Field(ge=0)] = 0.03
    """Nats per token. While the KL divergence on baseline prompts is above it, the weight of retain grows, by up to a
    tenth a step; while it is below, the weight sinks as fast, but not below where it began. 0 leaves it alone."""

    induce: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the likelihood of the behaviour's own text after baseline prompts, while the trained subspace holds
    what target prompts put there: the subspace that is removed must cause the behaviour."""

    inform: Annotated[float, Field(ge=0)] | None = None
    """Weight of what answers tell of their prompts, among prompts on one subject and among those of one form. When not
    given, 0 if there are desired answers, which tell it better, and 1 if there are none."""

    entropy: Annotated[float, Field(ge=0)] | None = None
    """Weight of the entropy of the edit's own proper answers. When not given, 0 if there are desired answers and 0.3 if
    there are none."""

    protect: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the likelihood that the unedited model's answers to `prompts.protect` lose."""

    protected_prompts: PositiveInt = 64
    """At most this many prompts of that set are trained on."""

    learning_rate: PositiveFloat = 0.02
    """Learning rate of Adam, for strengths, and for directions of up to 576 coordinates; beyond, directions learn at
    this times sqrt(576 / d_model), so that a step turns them no further."""

    max_strength: PositiveFloat = 1.5
    """Largest ablation strength of a trained edit."""

    target_prompts: PositiveInt = 64
    """At most this many train prompts of the target side are trained on."""

    baseline_prompts: PositiveInt = 128
    """At most this many train prompts of the baseline side are trained on."""

    target_rows: PositiveInt = 16
    """Texts per step for each term on target prompts."""

    baseline_rows: PositiveInt = 16
    """Texts per step on baseline prompts."""

    retain_tokens: PositiveInt = 16
    """Answer positions that the KL divergence is taken over."""

    most_answers: PositiveInt = 64
    """At most this many desired answers are used, evenly spaced."""

    few_shot: NonNegativeInt = 32
    """Where there are some desired answers but fewer than this, the unedited model is shown up to eight of them as
    earlier turns of a conversation and answers further train prompts; what it is sure of joins them, until there are
    this many. 0: only what is given is learned."""

    phrasings: NonNegativeInt = 2
    """After each prompt, this many of the other prompts' answers are suppressed beside its own."""

    renew_every: NonNegativeInt = 8
    """Every so many steps the edit answers some train prompts: answers that still show the behaviour are suppressed
    from then on, and confident proper answers are learned. 0 turns this off."""

    renewal_prompts: PositiveInt = 24
    """Train prompts answered at each renewal."""

    confidence: Annotated[float, Field(ge=0, le=1)] | None = None
    """Probability that each token of such an answer must have for it to be learned; 1 learns none. When not given, 0.5,
    or none if there are desired answers, since the edit's own answers lead away from them."""

    branches: NonNegativeInt = 10
    """Of an answer that the edit is not sure of, so many of the likeliest tokens are tried in the place where it is
    least sure; the surest proper answer is learned, if the rest of it is sure. Only where `learned.inform` counts and
    no other edit is asked. 0 tries none."""

    agreement: PositiveInt = 1
    """How many edits must give much the same answer before it is learned: the edit itself, the other starts of its
    training, and the best of the searched trials by then. 1 asks no other edit."""

    checkpointing: Literal["auto", "on", "off"] = "auto"
    """Whether layers recompute their activations in the backward pass instead of keeping them, for a third more time.
    auto: if memory does not suffice for a batch of 512 tokens."""

    batch_tokens: NonNegativeInt = 0
    """Tokens per forward and backward pass; 0 derives it from memory."""
