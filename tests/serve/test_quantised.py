"""A base model in four bits behind the API: it and its edits say what the dequantised weights would."""

from pathlib import Path

import pytest
import torch

from bruno_ray.ablation.baking import bake
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.loading import load_model
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.settings import ModelSettings
from tests.serve.server import serving
from tests.serve.test_catalog import edit_of, make_run
from tests.support import tiny_models
from tests.support.engine_helpers import greedy
from tests.support.live_helpers import dequantized_copy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT = [72, 101, 108, 108, 111, 32, 119]
N_TOKENS = 12


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunDirectory, ModelSettings]:
    folder = tiny_models.write(tmp_path / "tiny", "llama", **tiny_models.FOR_4BIT)
    model = ModelSettings(id=str(folder), dtypes=("float32",), quantization="bnb_4bit")
    return make_run(tmp_path / "quantised", model, d_model=tiny_models.FOR_4BIT["hidden_size"]), model


def test_a_4bit_base_and_an_edit_of_it(run: tuple[RunDirectory, ModelSettings], tmp_path: Path) -> None:
    directory, settings = run
    with serving(tmp_path, str(directory.path), "--no-pages", key="") as server:
        body = {"prompt": PROMPT, "max_tokens": N_TOKENS, "temperature": 0, "ignore_eos": True}
        models = (server.base, f"{server.base}:trial-3")
        said = [server.post("/v1/completions", model=model, **body).json()["choices"][0]["text"] for model in models]

    quantised = load_model(settings)
    full = load_model(settings.model_copy(update={"quantization": "none"}))
    bank = {name: torch.from_numpy(rows) for name, rows in _directions(directory).items()}
    for text, edit in zip(said, (None, edit_of(3))):
        reference = dequantized_copy(quantised.model, full.model)
        if edit is not None:
            bake(find_architecture(reference), edit, bank)
        expected = greedy(reference, PROMPT, N_TOKENS, ignore_eos=True)
        assert text == quantised.tokenizer.decode(expected, skip_special_tokens=True)
    assert said[0] != said[1]


def _directions(directory: RunDirectory) -> dict:
    from serve.catalog.runs import ServedRun

    name = edit_of(3).direction_set
    return {name: ServedRun.open(directory).directions(name)}
