"""Probing: what a model's own computation says about where it writes, held against the table, and its refusals."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.ablation.live import LiveEditor
from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.families import FAMILIES
from bruno_ray.model.loading import load_model
from bruno_ray.model.probing import probe
from bruno_ray.model.probing_checks import check
from bruno_ray.settings import ModelSettings
from tests.support import all_families, tiny_models

THIRD_WRITE = "gemma4_text"
"""Its table row leaves a gated write alone, on purpose."""

NEW = pytest.mark.skipif(sys.version_info < (3, 11), reason="of a later transformers than Python 3.10 has")


@pytest.mark.parametrize("family", [name for name in tiny_models.FAMILIES if name != THIRD_WRITE])
def test_probing_finds_what_the_table_says(family: str) -> None:
    model = tiny_models.build(family)
    row = find_architecture(model)
    found, given = probe(model)
    check(model, found, given)
    assert {(w.name, w.component, len(w.matrices)) for w in found.writers} == {
        (w.name, w.component, len(w.matrices)) for w in row.writers
    }
    assert found.layers == row.layers
    assert found.final_norm is row.final_norm
    assert found.embedding is row.embedding


def test_probing_finds_a_write_that_the_table_leaves_alone() -> None:
    found, _ = probe(tiny_models.build(THIRD_WRITE))
    assert any(writer.name.endswith("per_layer_projection") for writer in found.writers)


@torch.no_grad()
def test_a_change_of_the_stream_that_no_module_writes_is_refused() -> None:
    """Here a block that halves what comes in, on top of what it adds."""
    model = tiny_models.build("llama")
    model.model.layers[1].register_forward_hook(lambda module, args, output: output - 0.5 * args[0].roll(1, -1))
    with pytest.raises(ModelError, match=r"layer 1 of this llama model adds .* stays unexplained"):
        probe(model)


@torch.no_grad()
def test_a_writer_that_is_not_linear_in_its_weights_is_refused() -> None:
    model = tiny_models.build("llama")

    class Squared(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) ** 2

    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = Squared
    found, given = probe(model)
    with pytest.raises(ModelError, match=r"down_proj: an edit of its output is no edit of its weights"):
        check(model, found, given)


def test_a_model_whose_rows_see_each_other_is_refused() -> None:
    model = tiny_models.build("llama")
    model.model.layers[0].self_attn.o_proj.register_forward_hook(
        lambda module, args, output: output + output.mean(dim=0, keepdim=True)
    )
    found, given = probe(tiny_models.build("llama"))
    with pytest.raises(ModelError, match="a row of a padded batch differs from it alone"):
        check(model, found, given)


@pytest.fixture
def unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A chat model of a family without a row."""
    monkeypatch.setenv("BRUNO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    all_families.tiny_model("opt").save_pretrained(folder)
    tiny_models.build_tokenizer().save_pretrained(folder)
    return folder


def test_what_was_probed_is_accepted_once(unknown: Path) -> None:
    settings = ModelSettings(id=str(unknown), device_map="cpu")
    with pytest.raises(ModelError, match=r"\(fc2, self_attn\.out_proj\).*accept it once with --model\.accept-probed"):
        load_model(settings)
    assert load_model(settings, only_look=True).architecture.probed
    with pytest.raises(ModelError, match="accept it once"):
        load_model(settings)
    assert load_model(settings.model_copy(update={"accept_probed": True})).architecture.probed
    assert load_model(settings).architecture.probed
    assert load_model(settings, full_precision=True).architecture.probed
    (unknown / "chat_template.jinja").write_text(tiny_models.CHAT_TEMPLATE + " ")
    with pytest.raises(ModelError, match="accept it once"):
        load_model(settings)


@torch.no_grad()
@pytest.mark.parametrize("norm_mode", ["none", "pre", "full"])
@pytest.mark.parametrize("family", ["opt", "bloom", "nemotron_h", pytest.param("lfm3", marks=NEW), "llama4_text"])
def test_live_is_baked_where_probing_found_the_writers(family: str, norm_mode: str) -> None:
    model = all_families.tiny_model(family)
    architecture = find_architecture(model) if family in FAMILIES else probe(model)[0]
    parameters = AblationParameters(max_weight=0.9, max_weight_position=0.0, min_weight=0.9, min_weight_distance=99.0)
    v = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    bank = {"x": v.expand(architecture.n_layers + 1, 1, -1)}
    edit = Edit(dict.fromkeys(architecture.components, parameters), "x", None, norm_mode)
    editor = LiveEditor(architecture)
    ids = torch.arange(20).reshape(2, 10)
    before = model(ids).logits
    editor.set([editor.resolve(edit, bank), None], [0, 1])  # the second row is unedited
    live = model(ids).logits
    editor.close()
    torch.testing.assert_close(live[1], before[1])
    bake(architecture, edit, bank)
    baked = model(ids).logits
    assert (live[0] - baked[0]).abs().max() < 1e-4 < 1e-2 < (live[0] - before[0]).abs().max()


@NEW
def test_every_model_type_of_the_table_is_one_of_transformers() -> None:
    from transformers import CONFIG_MAPPING

    assert set(FAMILIES) <= set(CONFIG_MAPPING), re.sub("[{}]", "", str(set(FAMILIES) - set(CONFIG_MAPPING)))
