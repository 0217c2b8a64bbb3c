"""The lean forward pass gives what transformers' own gives, and is left aside for models it does not know."""

import pytest
import torch
from torch import nn

from bruno_ray.generation.lean_forward import FAMILIES, lean_forward
from tests.support import tiny_models
from tests.support.engine_helpers import load

KNOWN = sorted(FAMILIES)


@pytest.mark.parametrize("family", KNOWN)
def test_logits_are_those_of_the_model_itself(family: str) -> None:
    lean = lean_forward(tiny_models.build(family))
    assert lean is not None
    with torch.inference_mode():
        assert lean.difference_from_model() < 1e-5


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
    assert lean_forward(tiny_models.build("llama").bfloat16()) is None
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


def test_more_positions_than_there_are_give_all_of_them() -> None:
    lean, ids = lean_forward(tiny_models.build("llama")), torch.arange(6).view(2, 3)
    assert lean is not None
    mask = torch.ones_like(ids)
    positions = mask.cumsum(-1) - 1
    with torch.inference_mode():
        assert torch.equal(lean(ids, mask, positions, None, 9), lean(ids, mask, positions, None, 3))
