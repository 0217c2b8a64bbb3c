"""An edit does the same live and baked: on every architecture, in every norm mode, mixed within one batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.ablation.live import LiveEditor
from bruno_ray.ablation.resolving import Resolver
from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.loading import LoadedModel, load_model
from bruno_ray.model.writers import Matrix
from bruno_ray.settings import ModelSettings
from tests.support import tiny_models
from tests.support.live_helpers import EDITS, KERNEL, NARROW, batch, dequantized_copy, difference, logits, make_bank


def baked(family: str, edit: Edit, bank: DirectionBank, **options: object) -> nn.Module:
    model = tiny_models.build(family, **options)
    bake(find_architecture(model), edit, bank)
    return model


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_live_equals_baked(family: str) -> None:
    """One batch holds rows of every edit and of none; each row equals a model with its edit in the weights."""
    model = tiny_models.build(family)
    architecture = find_architecture(model)
    bank, inputs, rows = make_bank(architecture.n_layers), batch(7), [0, 3, 4, 1, 2, 4, 0]
    plain = logits(model, inputs)
    editor = LiveEditor(architecture)
    assert torch.equal(logits(model, inputs), plain)
    editor.set([*editor.resolve_all(EDITS, bank), None], rows)
    live = logits(model, inputs)
    editor.clear()
    assert torch.equal(logits(model, inputs), plain)
    for k, edit in enumerate(EDITS):
        mine = torch.tensor([row == k for row in rows])
        expected = logits(baked(family, edit, bank), inputs)[mine]
        assert difference(live[mine], expected) < 1e-4
        assert difference(live[mine], plain[mine]) > 1e-2, "the edit does nothing: the comparison is empty"
    bare = torch.tensor([row == 4 for row in rows])
    assert torch.equal(live[bare], plain[bare])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_5_moe_text"])
def test_mixed_batch_equals_separate_runs(family: str) -> None:
    model = tiny_models.build(family)
    architecture = find_architecture(model)
    bank, inputs = make_bank(architecture.n_layers), batch(8)
    editor = LiveEditor(architecture)
    resolved = editor.resolve_all(EDITS, bank)
    editor.set(resolved, [0, 0, 1, 1, 2, 2, 3, 3])
    mixed = logits(model, inputs)
    for k, edit in enumerate(EDITS):
        alone = LiveEditor(architecture)
        editor.clear()
        alone.set([alone.resolve(edit, bank)], [0] * 8)
        assert difference(logits(model, inputs)[2 * k : 2 * k + 2], mixed[2 * k : 2 * k + 2]) < 1e-4
        alone.close()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_5_moe_text"])
def test_every_experts_implementation_keeps_the_hook_valid(family: str, implementation: str) -> None:
    def with_implementation(model: nn.Module) -> nn.Module:
        model.set_experts_implementation(implementation)
        return model

    model = with_implementation(tiny_models.build(family))
    assert model.config._experts_implementation == implementation
    architecture = find_architecture(model)
    bank, inputs = make_bank(architecture.n_layers), batch(3)
    editor = LiveEditor(architecture)
    editor.set(editor.resolve_all(EDITS[2:3], bank), [0, 0, 0])
    expected = logits(with_implementation(baked(family, EDITS[2], bank)), inputs)
    assert difference(logits(model, inputs), expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_low_precision(family: str, dtype: torch.dtype) -> None:
    """With weights of the low precision, computed in float32, live equals baked to 1e-4. Computed in the low
    precision itself, neither is further from that exact result than a few times what the dtype costs unedited.
    (Baking rounds the edited weights once more: a rounding of the same size as that of the original ones.)"""
    exact_model = tiny_models.build(family, dtype=dtype).float()
    low_model = tiny_models.build(family, dtype=dtype)
    architecture, low_architecture = find_architecture(exact_model), find_architecture(low_model)
    bank, inputs = make_bank(architecture.n_layers), batch(3)
    cost = difference(logits(low_model, inputs), logits(exact_model, inputs))
    assert cost > 1e-4
    exact_editor, low_editor = LiveEditor(architecture), LiveEditor(low_architecture)
    for edit in EDITS[:3]:
        exact_editor.set([exact_editor.resolve(edit, bank)], [0, 0, 0])
        exact = logits(exact_model, inputs)
        baked_model = tiny_models.build(family, dtype=dtype).float()
        bake(find_architecture(baked_model), edit, bank)
        assert difference(logits(baked_model, inputs), exact) < 1e-4
        low_editor.set([low_editor.resolve(edit, bank)], [0, 0, 0])
        assert low_model(**inputs).logits.dtype == dtype
        assert difference(logits(low_model, inputs), exact) < 3 * cost
        assert difference(logits(baked(family, edit, bank, dtype=dtype), inputs), exact) < 4 * cost


# ----- quantised bases -----


def load(folder: Path, quantization: str) -> LoadedModel:
    return load_model(ModelSettings(id=str(folder), dtypes=("float32",), quantization=quantization, device_map="cpu"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_live_on_a_4bit_base_equals_baked_dequantized(family: str, tmp_path: Path) -> None:
    """Exact for `none`, which reads no weight; `pre` and `full` use the dequantised weights and agree as well."""
    folder = tiny_models.write(tmp_path / "model", family, **tiny_models.FOR_4BIT)
    base = load(folder, "bnb_4bit")
    assert all(writer.matrices[0].quantized for writer in base.architecture.writers if writer.component == "attention")
    bank, inputs = make_bank(base.architecture.n_layers, base.architecture.d_model), batch(3)
    plain = logits(base.model, inputs)
    editor = LiveEditor(base.architecture)
    for edit in EDITS[:3]:
        editor.set([editor.resolve(edit, bank)], [0, 0, 0])
        live = logits(base.model, inputs)
        editor.clear()
        reference = dequantized_copy(base.model, load(folder, "none").model)
        assert difference(logits(reference, inputs), plain) < 1e-4
        bake(find_architecture(reference), edit, bank)
        assert difference(live, logits(reference, inputs)) < 1e-4
        assert difference(live, plain) > 1e-2


@pytest.mark.parametrize("quantization", ["bnb_4bit", "bnb_8bit"])
def test_a_quantized_model_is_not_baked(quantization: str, tmp_path: Path) -> None:
    base = load(tiny_models.write(tmp_path / "model", **tiny_models.FOR_4BIT), quantization)
    bank, inputs = make_bank(base.architecture.n_layers, base.architecture.d_model), batch(2)
    before = logits(base.model, inputs)
    with pytest.raises(ModelError, match="full precision"):
        bake(base.architecture, EDITS[0], bank)
    assert torch.equal(logits(base.model, inputs), before)


@torch.no_grad()
def test_live_on_an_8bit_base(tmp_path: Path) -> None:
    """8-bit products round their inputs too, so what is checked is the write itself: nothing along the subspace is
    left, and `full` scales by the dequantised rows."""
    base = load(tiny_models.write(tmp_path / "model"), "bnb_8bit")
    bank, inputs = make_bank(base.architecture.n_layers), batch(2)
    writer = base.architecture.writers[0]
    whole = AblationParameters(1.0, 0.0, 1.0, 9.0)
    editor = LiveEditor(base.architecture)
    seen: list[Tensor] = []
    handle = writer.module.register_forward_hook(lambda module, args, output: seen.append(output))
    base.model(**inputs)
    editor.set([editor.resolve(Edit({"attention": whole}, "a", None, "none"), bank)], [0, 0])
    base.model(**inputs)
    editor.set([editor.resolve(Edit({"attention": whole}, "a", None, "full"), bank)], [0, 0])
    base.model(**inputs)
    handle.remove()
    plain, none, full = seen
    assert (none @ bank["a"][1].T).abs().max() < 1e-4 < (plain @ bank["a"][1].T).abs().max()
    rho = writer.matrices[0].read().norm(dim=1)
    direct = writer.matrices[0].read() / rho[:, None]
    direct = direct - bank["a"][1].T @ (bank["a"][1] @ direct)
    removed = (plain / rho) @ bank["a"][1].T @ bank["a"][1] * rho
    assert difference(full, (plain - removed) / direct.norm(dim=1)) < 1e-4


# ----- decoding -----


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_5_moe_text"])
def test_cached_decoding_equals_the_full_forward(family: str) -> None:
    """Rows of different edits decode together from one cache; rows that are finished leave it."""
    model = tiny_models.build(family)
    architecture = find_architecture(model)
    bank, inputs, rows = make_bank(architecture.n_layers), batch(5), torch.tensor([3, 0, 1, 2, 4])
    editor = LiveEditor(architecture)
    edits = [*editor.resolve_all(EDITS, bank), None]
    editor.set(edits, rows)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    step = model(**inputs, position_ids=positions(mask), use_cache=True)
    token = ids[:, -1:]
    for n_decoded in range(4):
        if n_decoded == 2:
            keep = torch.tensor([True, False, True, False, True])
            editor.select(keep)
            kept = keep.nonzero()[:, 0]
            step.past_key_values.reorder_cache(kept)  # batch_select_indices lacks linear attention layers
            ids, mask, rows, token = ids[kept], mask[kept], rows[kept], token[kept]
        else:
            token = step.logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        step = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=positions(mask)[:, -1:],
            past_key_values=step.past_key_values,
            use_cache=True,
        )
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
        assert difference(step.logits[:, -1], whole.logits[:, -1]) < 1e-4
        if n_decoded == 2:
            editor.set(edits, rows)  # what select() should have left
            again = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
            assert torch.equal(whole.logits, again.logits)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


# ----- the editor itself -----


def test_reads_each_weight_once_for_many_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = find_architecture(tiny_models.build("qwen3_moe"))
    bank = make_bank(architecture.n_layers)
    reads: list[str] = []
    read = Matrix.read
    monkeypatch.setattr(Matrix, "read", lambda self: (reads.append(self.name), read(self))[1])
    resolver = Resolver(architecture)
    resolver.resolve_all([EDITS[0]], bank)
    assert not reads, "none needs no weight"
    everywhere = AblationParameters(1.0, 1.0, 1.0, 9.0)
    edits = [Edit({"attention": everywhere, "mlp": everywhere}, "a", index, "full") for index in (0.2, 0.7, 1.4, None)]
    first = resolver.resolve_all(edits, bank)
    n_matrices = sum(len(writer.matrices) for writer in architecture.writers)
    assert len(reads) == 2 * n_matrices  # once for the norms, once for all four edits
    reads.clear()
    resolver.resolve_all([Edit(edits[0].components, "a", 1.9, "full")], bank)
    assert not reads, "other points between the same layers need nothing new"
    changed = resolver.resolve_all(edits, make_bank(architecture.n_layers, seed=2))
    assert reads, "another bank under the same name is noticed"
    fresh = Resolver(architecture).resolve_all(edits, make_bank(architecture.n_layers, seed=2))
    for a, b, old in zip(*(each[0].factors[: len(architecture.writers)] for each in (changed, fresh, first))):
        assert torch.equal(a.scale, b.scale) and not torch.equal(a.scale, old.scale)


def test_layers_without_strength_are_left_out() -> None:
    architecture = find_architecture(tiny_models.build("llama"))
    resolved = Resolver(architecture).resolve_all(
        [Edit({"mlp": NARROW}, "a", None, "full")], make_bank(architecture.n_layers)
    )[0]
    edited = [writer.name for writer, factors in zip(architecture.writers, resolved.factors) if factors]
    assert edited == ["model.layers.1.mlp.down_proj"]


def test_close_and_wrong_rows() -> None:
    model = tiny_models.build("llama")
    architecture = find_architecture(model)
    bank, inputs = make_bank(architecture.n_layers), batch(3)
    plain = logits(model, inputs)
    editor = LiveEditor(architecture)
    resolved = editor.resolve(EDITS[0], bank)
    for rows in ([], [1], [-1]):
        with pytest.raises(ValueError, match="rows"):
            editor.set([resolved], rows)
    editor.set([resolved], [0, 0])  # a batch of three is coming
    with pytest.raises(ValueError, match="no batch of the 2 rows"):
        logits(model, inputs)
    editor.close()
    assert torch.equal(logits(model, inputs), plain)


def test_baking_twice_at_strength_one_changes_nothing_more() -> None:
    whole = AblationParameters(1.0, 0.0, 1.0, 9.0)
    edit = Edit({"attention": whole, "mlp": whole}, "a", 0.5, "none")
    bank, inputs = make_bank(tiny_models.LAYERS), batch(2)
    once = baked("mixtral", edit, bank)
    expected = logits(once, inputs)
    bake(find_architecture(once), edit, bank)
    assert difference(logits(once, inputs), expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gpt_oss"])
def test_full_keeps_the_row_norms_of_the_stored_weights(family: str) -> None:
    architecture = find_architecture(tiny_models.build(family))
    after = find_architecture(baked(family, EDITS[2], make_bank(architecture.n_layers)))
    for before, edited in zip(architecture.writers, after.writers):
        norms = [torch.cat(list(w.weights()), dim=1).norm(dim=1) for w in (before, edited)]
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("index", [0.7, None])
@pytest.mark.parametrize("mode", ["none", "pre"])
def test_baked_weights_are_what_heretic_publishes(mode: str, index: float | None) -> None:
    """none: W - lambda v (v^T W), pre: W - lambda (rho * v) (v^T What); the direction of layer index i is point i + 1,
    a float index interpolates linearly and normalises; lambda falls linearly from the peak, 0 beyond the edge."""
    bank = make_bank(tiny_models.LAYERS)
    edit = Edit({"attention": KERNEL, "mlp": NARROW}, "b", index, mode)
    original = find_architecture(tiny_models.build("llama"))
    edited = find_architecture(baked("llama", edit, bank))
    points = bank["b"][:, 0]
    for before, after in zip(original.writers, edited.writers):
        kernel = edit.components[before.component]
        distance = abs(before.layer - kernel.max_weight_position)
        share = 1 - (1 - kernel.min_weight) * distance / kernel.min_weight_distance
        strength = kernel.max_weight * share if distance <= kernel.min_weight_distance else 0.0
        v = points[before.layer + 1] if index is None else 0.3 * points[1] + 0.7 * points[2]
        v = v / v.norm()
        weight = before.matrices[0].read()
        rho = weight.norm(dim=1)
        if mode == "none":
            expected = weight - strength * torch.outer(v, v @ weight)
        else:
            expected = weight - strength * torch.outer(rho * v, v @ (weight / rho[:, None]))
        torch.testing.assert_close(after.matrices[0].read(), expected, rtol=1e-5, atol=1e-5)
