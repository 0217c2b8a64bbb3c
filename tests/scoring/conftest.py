"""A tiny random model whose tokens are bytes, prompts, and two edits."""

from pathlib import Path

import pytest
import torch

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.model.loading import load_model
from bruno_ray.prompts.sets import Prompt
from bruno_ray.scoring.base import ScoringPrompts
from bruno_ray.settings import ModelSettings
from tests.scoring.helpers import BASELINE, DATE, TARGET
from tests.support import tiny_models


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> BatchEngine:
    folder: Path = tiny_models.write(tmp_path_factory.mktemp("model"), "llama")
    return BatchEngine(load_model(ModelSettings(id=str(folder), dtypes=("float32",))))


@pytest.fixture(scope="module")
def prompts(engine: BatchEngine) -> ScoringPrompts:
    return ScoringPrompts.rendered(engine, TARGET, BASELINE, date=DATE)


@pytest.fixture(scope="module")
def many_prompts(engine: BatchEngine) -> ScoringPrompts:
    target = tuple(Prompt(f"what is number {i} of the list?", answer=str(i)) for i in range(40))
    baseline = tuple(Prompt(f"say {i}") for i in range(10))
    return ScoringPrompts.rendered(engine, target, baseline, date=DATE)


@pytest.fixture(scope="module")
def edits(engine: BatchEngine) -> list:
    """A strong edit, and one that removes next to nothing."""
    shape = (engine.loaded.architecture.n_layers + 1, 1, engine.loaded.architecture.d_model)
    directions = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    bank = {"random": directions / directions.norm(dim=-1, keepdim=True)}
    return engine.editor.resolve_all(
        [
            Edit({"mlp": AblationParameters(strength, 1.0, 1.0, 5.0)}, "random", None, "full")
            for strength in (1.5, 1e-9)
        ],
        bank,
    )
