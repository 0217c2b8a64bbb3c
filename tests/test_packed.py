"""Packed weights give what the modules give, hooks and all, and follow what is baked into the weights."""

import pytest
import torch
from torch import nn

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.edit import Edit
from bruno_ray.generation import packed
from bruno_ray.generation.lean_forward import FAMILIES, lean_forward, own_forward
from bruno_ray.model.architectures import find_architecture
from tests.support import tiny_models
from tests.support.engine_helpers import answers, engine_of, loaded_from, prompt, request
from tests.test_generation import KERNEL

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor computes in float32 only"
)


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found.float() - wanted.float()).abs().max() <= 0.02 * wanted.float().abs().max()


@pytest.mark.parametrize("rows", [(1,), (7,), (3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_the_module_with_its_hooks(rows: tuple[int, ...], bias: bool) -> None:
    module = nn.Linear(48, 32, bias=bias).bfloat16().requires_grad_(False)
    x = torch.randn(*rows, 96, generator=torch.Generator().manual_seed(0)).bfloat16()[..., ::2]
    near(packed.called(module, True)(x), module(x))
    near(packed.linear(module.weight, module.bias, True)(x), module(x))
    module.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,))
    module.register_forward_hook(lambda module, arguments, output: output + arguments[0].sum())
    near(packed.called(module, True)(x), module(x))
    module.register_forward_hook(lambda module, arguments, given, output: output * 3, with_kwargs=True)
    near(packed.called(module, True)(x), module(x))


def test_modules_of_other_kinds_are_called() -> None:
    quantised = type("Quantised", (nn.Linear,), {})(4, 4)
    assert packed.called(quantised, True) is quantised


@pytest.mark.parametrize("for_inference", [False, True])
def test_an_edit_that_is_baked_shows(for_inference: bool) -> None:
    model = tiny_models.build("llama").bfloat16()
    with torch.inference_mode(for_inference):  # as the server makes it
        lean, architecture = lean_forward(model), find_architecture(model)
    assert lean is not None and packed.packs(model)
    ids = torch.arange(12).view(2, 6)
    given = ids, torch.ones_like(ids), torch.arange(6).expand_as(ids), None, 6
    with torch.inference_mode():
        before = lean(*given)
    shape = (architecture.n_layers + 1, 1, architecture.d_model)
    directions = nn.functional.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(1)), dim=-1)
    bake(architecture, Edit(dict.fromkeys(architecture.components, KERNEL), "one", 1.0, "none"), {"one": directions})
    with torch.inference_mode():
        after = own_forward(model, *given)
        near(lean(*given), after)
    assert (before - after).abs().max() > 0.1 * after.abs().max()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_server_s_engine_answers_in_bfloat16(family: str) -> None:
    loaded = loaded_from(tiny_models.build(family).bfloat16())
    assert packed.packs(loaded.model)
    with engine_of(loaded) as engine:
        [answer] = answers(engine, [request(prompt(7), ignore_eos=True)])
    assert len(answer.token_ids) > 1


def test_nothing_is_packed_in_float32_or_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama")
    assert not packed.packs(model)
    assert packed.packs(model.bfloat16())
    monkeypatch.setattr(packed.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert not packed.packs(model)
