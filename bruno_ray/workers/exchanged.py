"""What is sent to the owner of a model and what comes back. Processes that have no model, the driver first, import no
torch and no transformers for it: that takes ten seconds.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bruno_ray.ablation.edit import Edit, Parts
from bruno_ray.ablation.plan import TrainedEdit
from bruno_ray.model.coverage_table import CoverageRow
from bruno_ray.prompts.sets import Prompt
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import LearnedSettings, ModelSettings, ScoringSettings

if TYPE_CHECKING:
    from bruno_ray.workers.model_worker import ModelWorker


def model_worker(*arguments: Any) -> ModelWorker:
    """A ``ModelWorker``, for a pool that builds one in each of its actors."""
    from bruno_ray.workers.model_worker import ModelWorker

    return ModelWorker(*arguments)


@dataclass(frozen=True)
class ModelInfo:
    """What the rest of a run needs to know about the model."""

    n_layers: int
    d_model: int
    family: str
    components: tuple[str, ...]
    fingerprint: str
    dtype: str
    coverage: tuple[CoverageRow, ...]
    n_parameters: int
    device: str
    task: str
    """What the hub calls what the model does, such as `text-generation`."""

    prints_date: bool
    """Whether the chat template writes the date into every prompt."""

    further: Mapping[str, str] = field(default_factory=dict)
    """Of the components beside what writes, and of `experts` and `heads`: why they cannot be edited; "" where they can.
    """


@dataclass(frozen=True)
class TrainingPrompts:
    """What edits are trained on: some of the train prompts, and how."""

    target: tuple[Prompt, ...]
    baseline: tuple[Prompt, ...]
    settings: LearnedSettings
    protected: tuple[Prompt, ...] = ()
    """Prompts of a third set, whose answers must stay."""


@dataclass(frozen=True)
class EvaluationContext:
    """All that trials of one study share. Sent to each worker once."""

    key: str
    """Names the context; the same key means the same content."""

    bank: dict[str, np.ndarray]
    """Direction sets, (n_layers + 1, rank, d_model) float32."""

    target: tuple[Prompt, ...]
    baseline: tuple[Prompt, ...]
    response_prefix: str
    scoring: ScoringSettings
    date: datetime.date
    """For chat templates that print one."""

    readings: bool = False
    """Whether scores bring the whole answers along, with who takes which for the behaviour."""

    training: TrainingPrompts | None = None
    """Only where edits are trained."""

    choices: Mapping[str, Parts] = field(default_factory=dict)
    """Of experts and heads, "SETTING:CHOICE" -> those that sampled edits keep to."""


@dataclass(frozen=True)
class TrialOutcome:
    """What came of one edit: scores, or the reason why there are none."""

    scores: Scores | None
    error: str | None = None
    seconds: float = 0.0
    """This edit's share of the time its batch took."""

    tokens: int = 0
    """Its share of the tokens that were computed."""

    samples: tuple[tuple[str, str], ...] = ()
    """(user's message, answer) of the first target prompts."""

    pruned: bool = False
    """Whether it was left when a rival was known to dominate it. The scores are then its KL, and the behaviour rate
    among the prompts that it was asked."""

    trained: TrainedEdit | None = None
    """What training has come to, where a plan was handed in instead of an edit."""


@dataclass(frozen=True)
class ComparedEdits:
    """Edits of one model that are compared with those of others."""

    model: ModelSettings
    edits: tuple[Edit | None, ...]
    """None: the model as it is."""

    bank: dict[str, np.ndarray]
    """The direction sets that the edits name."""
