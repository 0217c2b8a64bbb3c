"""What the editor does on a GPU: the same equalities as on a CPU, and 4-bit as its kernels there compute it."""

import pytest
import torch

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.live import LiveEditor
from bruno_ray.generation.lean_forward import FAMILIES, lean_forward
from bruno_ray.model.architectures import find_architecture
from tests.support import tiny_models
from tests.support.live_helpers import EDITS, batch, difference, logits, make_bank

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_live_equals_baked_on_a_gpu(family: str) -> None:
    model = tiny_models.build(family).cuda()
    architecture = find_architecture(model)
    bank, rows = make_bank(architecture.n_layers), [0, 3, 4, 1, 2, 4, 0]
    inputs = {name: tensor.cuda() for name, tensor in batch(len(rows)).items()}
    plain = logits(model, inputs)
    editor = LiveEditor(architecture)
    editor.set([*editor.resolve_all(EDITS, bank), None], rows)  # the bank stays on the CPU
    live = logits(model, inputs)
    for k, edit in enumerate(EDITS):
        reference = tiny_models.build(family).cuda()
        bake(find_architecture(reference), edit, bank)
        mine = torch.tensor([row == k for row in rows])
        assert difference(live[mine], logits(reference, inputs)[mine]) < 1e-4
    bare = torch.tensor([row == 4 for row in rows])
    assert torch.equal(live[bare], plain[bare])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_on_a_gpu(dtype: torch.dtype) -> None:
    exact_model, model = (tiny_models.build("qwen3_moe", dtype=dtype).cuda() for _ in range(2))
    exact_model.float()
    editors = [LiveEditor(find_architecture(m)) for m in (exact_model, model)]
    bank = make_bank(tiny_models.LAYERS)
    inputs = {name: tensor.cuda() for name, tensor in batch(4).items()}
    cost = difference(logits(model, inputs), logits(exact_model, inputs))
    for editor in editors:
        editor.set(editor.resolve_all(EDITS, bank), [0, 1, 2, 3])
    assert difference(logits(model, inputs), logits(exact_model, inputs)) < 3 * cost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_lean_forward_pass_on_a_gpu(family: str, dtype: torch.dtype) -> None:
    assert lean_forward(tiny_models.build(family, dtype=dtype).cuda()) is not None


def test_4bit_on_a_gpu(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    from bruno_ray.model.loading import load_model
    from bruno_ray.settings import ModelSettings
    from tests.support.live_helpers import dequantized_copy

    folder = tiny_models.write(tmp_path / "m", **tiny_models.FOR_4BIT)
    settings = ModelSettings(id=str(folder), dtypes=("float32",), quantization="bnb_4bit", device_map="cuda:0")
    base = load_model(settings)
    bank = make_bank(base.architecture.n_layers, base.architecture.d_model)
    inputs = {name: tensor.cuda() for name, tensor in batch(3).items()}
    editor = LiveEditor(base.architecture)
    for edit in EDITS[:3]:
        editor.set([editor.resolve(edit, bank)], [0, 0, 0])
        live = logits(base.model, inputs)
        editor.clear()
        plain = load_model(settings.model_copy(update={"quantization": "none"}))
        reference = dequantized_copy(base.model, plain.model)
        bake(find_architecture(reference), edit, bank)
        assert difference(live, logits(reference, inputs)) < 1e-4
