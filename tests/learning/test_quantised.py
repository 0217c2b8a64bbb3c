"""Training on a base in four bits: gradients flow through it as through its dequantised weights."""

import datetime
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bruno_ray.ablation.plan import TrainedEdit, TrainingPlan
from bruno_ray.directions import build_bank
from bruno_ray.errors import ModelError
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.learning.material import Teacher
from bruno_ray.learning.training import Trainer
from bruno_ray.model.batching import TokenBudget
from bruno_ray.model.loading import load_model
from bruno_ray.prompts.sets import Prompt
from bruno_ray.residuals.extraction import extract_residuals
from bruno_ray.scoring.base import Evaluation, ScoringPrompts
from bruno_ray.settings import LearnedSettings, ModelSettings, ScoringSettings
from bruno_ray.workers.model_worker import ModelWorker
from tests.support import tiny_models
from tests.support.live_helpers import dequantized_copy

DATE = datetime.date(2024, 2, 29)
LEARNED = LearnedSettings(target_rows=4, baseline_rows=4, renew_every=0)
TARGET = tuple(Prompt(f"What is {word}?", answer="It is here.") for word in ("tea", "jam", "ink", "oak"))
BASELINE = tuple(Prompt(f"Where are the {word}?") for word in ("cups", "pens", "jars", "bees"))


def plan(norm_mode: str) -> TrainingPlan:
    given = (1, True, "difference_in_means@0", 1.0, 0, 1.0, 0.0, 0.1, 0.05, 16, 3)
    return TrainingPlan(*given, norm_mode=norm_mode)


def trained(engine: BatchEngine, plans: Sequence[TrainingPlan]) -> list[TrainedEdit]:
    prompts = ScoringPrompts.rendered(engine, TARGET, BASELINE, date=DATE)
    sides = (prompts.target_ids, prompts.baseline_ids)
    residuals = [extract_residuals(engine.loaded, side, 0, TokenBudget.for_device("cpu")) for side in sides]
    scoring = ScoringSettings(markers=("sorry",), response_tokens=8)
    teacher = Teacher(Evaluation(engine, prompts, scoring, whole=True), LEARNED)
    return Trainer(engine, teacher, build_bank(*residuals), LEARNED).train(plans)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("tiny-4bit"), "llama", **tiny_models.FOR_4BIT)


def test_a_4bit_base_trains_as_its_dequantised_weights_do(stored: Path) -> None:
    plans = [plan("none"), plan("full")]
    settings = ModelSettings(id=str(stored), dtypes=("float32",), lean_forward="off")
    full = load_model(settings)
    engine = BatchEngine(load_model(settings.model_copy(update={"quantization": "bnb_4bit"})))
    found = trained(engine, plans)
    dequantized_copy(engine.model, full.model)
    wanted = trained(BatchEngine(full), plans)
    for ours, theirs in zip(found, wanted):
        curve = ours.curves["answers"]
        assert curve[-1] < 0.95 * curve[0]
        assert curve == pytest.approx(theirs.curves["answers"], rel=1e-3)
        np.testing.assert_allclose(ours.directions, theirs.directions, atol=1e-3)


@pytest.mark.parametrize("quantization", ["bnb_4bit", "bnb_8bit"])
def test_whether_a_base_gives_gradients_is_known_before_the_run(stored: Path, quantization: str) -> None:
    worker = ModelWorker(ModelSettings(id=str(stored), dtypes=("float32",), quantization=quantization))
    worker.require_gradient(TARGET[:1], DATE, LearnedSettings(norm_mode="full"), 8)
    # As a kernel does that knows no way back.
    worker.engine.model.lm_head.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(ModelError, match="cannot be trained on this model, its kernels give no gradient"):
        worker.require_gradient(TARGET[:1], DATE, LEARNED, 8)
