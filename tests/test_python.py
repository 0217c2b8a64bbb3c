"""The door for Python programs: any model of transformers, edited in a block or for good. Runs: test_pipeline.py."""

import subprocess
import sys

import pytest
import torch
from transformers import PreTrainedModel

import bruno_ray as br
from bruno_ray.errors import ModelError, OutputError
from tests.support import all_families, tiny_models

TARGET = [f"tell me of the garden {i}" for i in range(6)]
BASELINE = [f"count to {i} and back" for i in range(6)]


def logits(model: PreTrainedModel, rows: int = 3) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(rows * 7).reshape(rows, 7)).logits


@pytest.fixture(params=["llama", "llama4_text", "opt"])  # a row of the table, experts that are stacked, probed
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return all_families.tiny_model(request.param)


def test_a_model_is_edited_in_the_block_and_as_it_was_afterwards(model: PreTrainedModel) -> None:
    bank = br.find_directions(model, tiny_models.build_tokenizer(), TARGET, BASELINE)
    edit = br.everywhere(bank, strength=0.8)
    before = logits(model)
    with br.ablate(model, edit, bank):
        live = logits(model)
        assert torch.allclose(logits(model, rows=1), live[:1], atol=1e-4), "a batch of any size"
    assert torch.equal(logits(model), before)
    br.bake(model, edit, bank)
    assert (logits(model) - live).abs().max() < 1e-4 < 1e-2 < (live - before).abs().max()


def test_an_error_in_the_block_leaves_the_model_unedited() -> None:
    model = all_families.tiny_model("llama")
    bank = br.find_directions(model, tiny_models.build_tokenizer(), TARGET, BASELINE, rank=2)
    before = logits(model)
    with pytest.raises(ZeroDivisionError), br.ablate(model, br.everywhere(bank, layer=1.5), bank):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)


def test_what_cannot_be_edited_says_why() -> None:
    model = all_families.tiny_model("bert")
    with pytest.raises(ModelError, match="stays unexplained"), br.ablate(model, br.Edit({}, "x", None, "none"), {}):
        pass


def test_no_such_run() -> None:
    with pytest.raises(OutputError, match="no run called nowhere"):
        br.open_run("nowhere")


def test_the_package_itself_is_light_and_tells_what_it_has() -> None:
    script = "import sys, bruno_ray as br; print('torch' in sys.modules, br.Edit.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "Edit"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = br.nothing
    assert all(getattr(br, name) is not None for name in br.__all__)
