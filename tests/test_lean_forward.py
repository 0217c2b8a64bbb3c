"""The lean forward pass gives what transformers' own gives, and is left aside for models it does not know."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from bruno_ray.generation.lean_forward import FAMILIES, LeanForward, lean_forward, own_forward
from bruno_ray.model.loading import load_model
from bruno_ray.pipeline.steps import with_name
from bruno_ray.settings import ModelSettings, Settings
from tests.support import tiny_models
from tests.support.engine_helpers import (
    EIGHT_EDITS,
    answers,
    bank_of,
    engine_of,
    load,
    loaded_from,
    prompt,
    request,
)

KNOWN = sorted(FAMILIES)


@pytest.mark.parametrize("family", KNOWN)
def test_logits_are_those_of_the_model_itself(family: str) -> None:
    lean = lean_forward(tiny_models.build(family))
    assert lean is not None
    with torch.inference_mode():
        assert lean.difference_from_model() < 1e-5


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("family", KNOWN)
def test_in_bfloat16_logits_are_as_near_to_float32_as_the_models_own(family: str, heads: int) -> None:
    """Read at once, and with a cache one token and several at a time; with 4, 2 and 1 query heads per pair of keys and
    values."""
    exact = tiny_models.build(family, num_key_value_heads=heads)
    rounded = copy.deepcopy(exact).bfloat16()
    lean = lean_forward(rounded)
    assert lean is not None
    ids = torch.arange(27).view(3, 9) * 7 % 256
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        wanted = own_forward(exact, ids, mask, positions, None, 4)
        own = own_forward(rounded, ids, mask, positions, None, 4)
        cache = DynamicCache(config=rounded.config)
        pieces = [
            lean(ids[:, a:b], mask[:, :b], positions[:, a:b], cache, b - max(a, 5)) for a, b in ((0, 6), (6, 7), (7, 9))
        ]
        for found in (lean(ids, mask, positions, None, 4), torch.cat(pieces, dim=1)):
            assert (found - wanted).square().mean() < 2 * (own - wanted).square().mean()


def test_windows_that_would_show_are_left_to_the_model() -> None:
    assert lean_forward(tiny_models.build("mistral", sliding_window=16)) is None
    assert lean_forward(tiny_models.build("qwen3", layer_types=["sliding_attention"] * tiny_models.LAYERS)) is None


def test_fused_weights_take_no_memory_and_change_no_weight() -> None:
    model = tiny_models.build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert lean_forward(model) is not None
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    layer = model.model.layers[0]
    query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
    assert query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()


def test_a_model_that_computes_otherwise_is_left_to_itself() -> None:
    """As a checkpoint with code of its own would."""
    model = tiny_models.build("llama")
    model.model.layers[1].mlp.forward = lambda x: 2 * x
    assert lean_forward(model) is None


def test_hooks_on_what_is_not_called_as_a_module_are_respected() -> None:
    model = tiny_models.build("llama")
    model.model.layers[0].self_attn.register_forward_hook(lambda module, args, output: None)
    assert lean_forward(model) is None


def test_other_kinds_and_other_weights_are_left_to_themselves() -> None:
    assert lean_forward(tiny_models.build("gpt2")) is None
    assert lean_forward(tiny_models.build("llama").half()) is None
    model = tiny_models.build("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj = type("Quantised", (nn.Linear,), {})(32, 32, bias=False)
    assert lean_forward(model) is None


def test_both_engines_compute_lean() -> None:
    from bruno_ray.generation.engine import BatchEngine
    from serve.engine.batch import EditableModel

    loaded = load("llama")
    engine = BatchEngine(loaded)
    assert engine._lean is not None
    assert EditableModel(loaded, engine.editor)._lean is not None


@pytest.mark.parametrize("family", KNOWN)
def test_switched_off_transformers_computes_and_says_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the study's engine and in the server's, under an edit and without."""
    from bruno_ray.generation.engine import BatchEngine

    passes = []
    lean = LeanForward.__call__
    monkeypatch.setattr(LeanForward, "__call__", lambda self, *given: passes.append(1) or lean(self, *given))
    prompts = [prompt(length, seed=length) for length in (5, 9)]
    asked = [request(ids, edit, ignore_eos=True) for ids in prompts for edit in (None, "0")]
    said = []
    for switched_on in (True, False):
        loaded = loaded_from(tiny_models.build(family), switched_on)
        passes.clear()
        batch = BatchEngine(loaded)
        edit = batch.editor.resolve(EIGHT_EDITS[0], bank_of(loaded))
        answers_KP = batch.generate(prompts, [None, edit], max_new_tokens=12)
        batch.editor.close()
        assert bool(passes) is switched_on
        passes.clear()
        with engine_of(loaded) as serving:
            events = answers(serving, asked)
        assert bool(passes) is switched_on
        said.append([[answer.text for row in answers_KP for answer in row], [event.token_ids for event in events]])
    assert said[0] == said[1]


def test_the_setting_reaches_the_loaded_model(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "tiny", "llama")
    for value, expected in (("auto", True), ("off", False)):
        settings = ModelSettings(id=str(folder), dtypes=("float32",), device_map="cpu", lean_forward=value)
        assert load_model(settings).lean_forward is expected


def test_a_study_has_the_same_name_however_its_model_is_computed() -> None:
    names = {
        with_name(Settings(behaviour="refusal", model=ModelSettings(id="a/b", lean_forward=value))).study.name
        for value in ("auto", "off")
    }
    assert len(names) == 1


def test_more_positions_than_there_are_give_all_of_them() -> None:
    lean, ids = lean_forward(tiny_models.build("llama")), torch.arange(6).view(2, 3)
    assert lean is not None
    mask = torch.ones_like(ids)
    positions = mask.cumsum(-1) - 1
    with torch.inference_mode():
        assert torch.equal(lean(ids, mask, positions, None, 9), lean(ids, mask, positions, None, 3))
