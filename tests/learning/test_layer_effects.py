"""Which layer's direction causes the behaviour, on the embedded organism."""

import datetime
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.edit import Edit
from bruno_ray.directions import build_bank
from bruno_ray.errors import PromptError
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.learning import layer_effects as effects_module
from bruno_ray.learning.layer_effects import LayerEffect, best_by_cosmic, best_by_effect, layer_effects
from bruno_ray.model.batching import TokenBudget
from bruno_ray.model.loading import load_model
from bruno_ray.pipeline.starting import effect_starts
from bruno_ray.pipeline.steps import evaluation_context
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import load_prompts
from bruno_ray.residuals.extraction import extract_residuals
from bruno_ray.runs.records import RunRecord
from bruno_ray.scoring.base import Evaluation, ScoringPrompts
from bruno_ray.settings import ModelSettings
from bruno_ray.settings.sources import load
from bruno_ray.study.starts import LITERATURE, literature_edit
from tests.support.inline_pool import InlinePool

DATE = datetime.date(2024, 2, 29)
N_PROMPTS = 16
PLANTED = 2
"""Layer."""


class Subject:
    def __init__(self, folder: Path) -> None:
        settings = load(["--model.id", str(folder / "model"), "--behaviour", "organism"], environ={}).settings
        prompts = load_prompts(settings)
        self.model = str(folder / "model")
        self.engine = BatchEngine(load_model(ModelSettings(id=self.model, dtypes=("float32",))))
        sides = prompts.target.train[:N_PROMPTS], prompts.baseline.train[:N_PROMPTS]
        ids = [render(self.engine.tokenizer, side, date=DATE) for side in sides]
        residuals = [extract_residuals(self.engine.loaded, each, 0, TokenBudget.for_device("cpu")) for each in ids]
        self.bank = build_bank(*residuals)
        rendered = ScoringPrompts.rendered(self.engine, *sides, date=DATE)
        self.unedited = Evaluation(self.engine, rendered, settings.scoring, whole=True)
        architecture = self.engine.loaded.architecture
        self.edit = literature_edit(list(self.bank), architecture.n_layers, architecture.components)

    def planted(self) -> dict[str, torch.Tensor]:
        """The difference in means at one layer, and noise without anything of it everywhere else."""
        (name,) = self.bank
        true_D = self.bank[name][PLANTED + 1, 0]
        noise_LD = torch.randn(self.bank[name].shape[0], true_D.shape[0], generator=torch.Generator().manual_seed(3))
        noise_LD = torch.nn.functional.normalize(noise_LD - (noise_LD @ true_D)[:, None] * true_D, dim=-1)
        noise_LD[PLANTED + 1] = true_D
        return {name: noise_LD[:, None]}


@pytest.fixture(scope="module")
def subject(organism: Path) -> Subject:
    return Subject(organism)


def test_both_selections_recover_the_planted_layer(subject: Subject) -> None:
    found = layer_effects(subject.unedited, subject.planted(), subject.edit)
    assert len(found) > 3
    assert best_by_effect(found).layer == PLANTED
    assert best_by_cosmic(found).layer == PLANTED
    planted = next(effect for effect in found if effect.layer == PLANTED)
    assert planted.bypass < -2 < 2 < min(effect.bypass for effect in found if effect.layer != PLANTED)
    assert planted.passes


def test_bypass_is_the_log_odds_of_a_baked_model_and_induce_of_one_with_a_bias(subject: Subject) -> None:
    """By transformers alone, one prompt after the other."""
    (effect,) = layer_effects(subject.unedited, subject.bank, subject.edit, [PLANTED])
    target_ids, baseline_ids, belongs = effects_module._before_the_behaviour(subject.unedited)
    edit = Edit(subject.edit.components, subject.edit.direction_set, float(PLANTED), "none")

    baked = load_model(ModelSettings(id=subject.model, dtypes=("float32",)))
    bake(baked.architecture, edit, subject.bank)
    assert effect.bypass == pytest.approx(_mean_log_odds(baked.model, target_ids, belongs), abs=1e-3)

    def mean_D(ids: list) -> torch.Tensor:
        return extract_residuals(subject.engine.loaded, ids)[:, 0, PLANTED + 1].mean(0)

    row_D = subject.bank[edit.direction_set][PLANTED + 1, 0]
    vector_D = (row_D @ (mean_D(target_ids) - mean_D(baseline_ids))) * row_D
    layer = subject.engine.loaded.architecture.layers[PLANTED]

    def add(module: object, args: object, output: object) -> object:
        return (output[0] + vector_D, *output[1:]) if isinstance(output, tuple) else output + vector_D

    handle = layer.register_forward_hook(add)
    try:
        expected = _mean_log_odds(subject.engine.model, baseline_ids, belongs)
    finally:
        handle.remove()
    assert effect.induce == pytest.approx(expected, abs=1e-3)


@torch.inference_mode()
def _mean_log_odds(model: torch.nn.Module, ids: list, belongs: torch.Tensor) -> float:
    """ln P - ln (1 - P)."""
    found = []
    for prompt in ids:
        share = model(torch.tensor([list(prompt)])).logits[0, -1].double().softmax(-1)[belongs].sum()
        found.append(float(share.log() - (1 - share).log()))
    return sum(found) / len(found)


def test_a_layer_that_damages_or_does_not_induce_is_not_chosen() -> None:
    good, damages = LayerEffect(1, -3, 2, 0.01, 1), LayerEffect(2, -9, 5, 0.2, 1.5)
    idle = LayerEffect(3, -9, -1, 0.0, 0.2)
    assert best_by_effect([damages, idle, good]) == good
    assert best_by_effect([damages, idle]) == damages, "of all, where none passes"
    assert best_by_cosmic([damages, idle, good]) == damages


def test_without_the_behaviour_there_is_no_choice(subject: Subject) -> None:
    scoring = subject.unedited.settings.model_copy(update={"markers": ("nobody says this",), "empty_counts": False})
    silent = Evaluation(subject.engine, subject.unedited.prompts, scoring, whole=True)
    with pytest.raises(PromptError, match="no answer of the unedited model shows the behaviour"):
        layer_effects(silent, subject.bank, subject.edit, [PLANTED])


def test_a_run_tries_the_best_layers_edit_before_it_searches(organism: Path, subject: Subject, tmp_path: Path) -> None:
    given = ["--model.id", subject.model, "--behaviour", "organism", "--prompts.n-validation", "8"]
    given += ["--scoring.scorers", "behaviour_rate,kl_divergence", "--study.layer-by", "both"]
    settings = load(given, environ={}).settings
    pool, prompts = InlinePool(settings), load_prompts(settings)
    info = pool.call("describe")
    pool.set_context(evaluation_context(RunRecord(settings=settings), prompts, "validation", subject.planted()))
    (start,) = effect_starts(settings, tmp_path, info, prompts, tuple(subject.bank), pool)
    assert start.edit == replace(subject.edit, direction_index=float(PLANTED))
    assert start.origin == f"{LITERATURE}, layer {PLANTED} by COSMIC and causal effect"

    pool.calls.clear()
    off = settings.model_copy(update={"study": settings.study.model_copy(update={"layer_by": "off"})})
    assert effect_starts(off, tmp_path, info, prompts, tuple(subject.bank), pool) == [] and pool.calls == []
