"""A base model in four bits behind the API: it and its edits say what the dequantised weights would."""

from pathlib import Path

import pytest
import torch

from bruno_ray.ablation.baking import bake
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.loading import load_model
from bruno_ray.runs.directory import RunDirectory
from serve.catalog.runs import ServedRun
from tests.serve.server import Server
from tests.serve.test_catalog import edit_of
from tests.support.engine_helpers import greedy
from tests.support.live_helpers import dequantized_copy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT = [72, 101, 108, 108, 111, 32, 119]
N_TOKENS = 12


def test_a_4bit_base_and_an_edit_of_it(small: Server, four_bit: Path) -> None:
    body = {"prompt": PROMPT, "max_tokens": N_TOKENS, "temperature": 0, "ignore_eos": True}
    models = (small.base, f"{small.base}:trial-3")
    said = [small.post("/v1/completions", model=model, **body).json()["choices"][0]["text"] for model in models]

    run = ServedRun.open(RunDirectory.open(four_bit))
    quantised = load_model(run.model)
    full = load_model(run.model.model_copy(update={"quantization": "none"}))
    name = edit_of(3).direction_set
    bank = {name: torch.from_numpy(run.directions(name))}
    for text, edit in zip(said, (None, edit_of(3))):
        reference = dequantized_copy(quantised.model, full.model)
        if edit is not None:
            bake(find_architecture(reference), edit, bank)
        expected = greedy(reference, PROMPT, N_TOKENS, ignore_eos=True)
        assert text == quantised.tokenizer.decode(expected, skip_special_tokens=True)
    assert said[0] != said[1]
