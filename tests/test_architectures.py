"""The table of architectures: complete, honest about what it does not reach, and clear about what it does not know."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.ablation.live import LiveEditor
from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.coverage import coverage
from bruno_ray.model.coverage_table import format_coverage
from tests.support import tiny_models

EVERYWHERE = AblationParameters(max_weight=1.0, max_weight_position=0.0, min_weight=1.0, min_weight_distance=99.0)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_writers(family: str) -> None:
    model = tiny_models.build(family)
    architecture = find_architecture(model)
    assert architecture.d_model == tiny_models.HIDDEN
    assert architecture.components == ("attention", "mlp")
    assert architecture.embedding is model.get_input_embeddings()
    for layer in range(architecture.n_layers):
        found = [writer.component for writer in architecture.writers if writer.layer == layer]
        assert found.count("attention") == 1
        assert "mlp" in found
    for writer in architecture.writers:
        assert model.get_submodule(writer.name) is writer.module
        for matrix in writer.matrices:
            assert matrix.read().shape[0] == architecture.d_model
            assert matrix.read().numel() == matrix.numel()


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in tiny_models.FAMILIES if name != "gemma4_text"])
def test_nothing_else_writes_to_the_residual_stream(family: str) -> None:
    """Remove a direction from the embedding by hand and, with strength 1, from every writer: if the table names all
    of them, the final residual stream has nothing left along it. (Biases are set to 0 and norm weights to a
    constant first: they are outside of the edit.)"""
    model = tiny_models.build(family)
    architecture = find_architecture(model)
    v = torch.nn.functional.normalize(
        torch.randn(architecture.d_model, generator=torch.Generator().manual_seed(3)), dim=0
    )
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.fill_(0.5)
        if name.endswith("bias"):
            parameter.zero_()
    for embedding in [architecture.embedding, *architecture.other_embeddings]:
        embedding.weight -= torch.outer(embedding.weight @ v, v)
    seen: list[torch.Tensor] = []
    architecture.final_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    editor = LiveEditor(architecture)
    bank = {"x": v.expand(architecture.n_layers + 1, 1, -1)}
    edit = editor.resolve(Edit({"attention": EVERYWHERE, "mlp": EVERYWHERE}, "x", None, "none"), bank)
    ids = torch.arange(20).reshape(2, 10)
    model(input_ids=ids)
    editor.set([edit], [0, 0])
    model(input_ids=ids)
    before, after = ((stream @ v).abs().max().item() for stream in seen)
    assert after < 1e-4 < 0.05 < before


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("qwen3_5_moe", {"linear_attn.out_proj", "self_attn.o_proj", "mlp.experts", "mlp.shared_expert.down_proj"}),
        ("qwen3_moe", {"self_attn.o_proj", "mlp.down_proj", "mlp.experts"}),
        ("gpt2", {"attn.c_proj", "mlp.c_proj"}),
    ],
)
def test_layers_of_one_model_may_differ(family: str, modules: set[str]) -> None:
    architecture = find_architecture(tiny_models.build(family))
    assert {re.sub(r"^.*?\.\d+\.", "", writer.name) for writer in architecture.writers} == modules


def test_multimodal_models_are_edited_in_the_language_model_only() -> None:
    for family in tiny_models.MULTIMODAL:
        architecture = find_architecture(tiny_models.build(family))
        assert all(".language_model." in writer.name for writer in architecture.writers)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_write_stores_what_read_gives(family: str) -> None:
    """In every layout: (out, in), (in, out), fused, fused and transposed, bias columns."""
    architecture = find_architecture(tiny_models.build(family))
    for writer in architecture.writers:
        for i, matrix in enumerate(writer.matrices):
            new = torch.full_like(matrix.read(), float(i)) + torch.arange(architecture.d_model)[:, None]
            matrix.write(new)
            assert torch.equal(matrix.read(), new)
        if len(writer.matrices) > 1:
            assert not torch.equal(writer.matrices[0].read(), writer.matrices[1].read())


def test_gpt_oss_expert_biases_are_columns_of_the_map() -> None:
    writer = next(w for w in find_architecture(tiny_models.build("gpt_oss")).writers if w.component == "mlp")
    assert writer.bias is None
    assert [tuple(matrix.read().shape) for matrix in writer.matrices] == [(32, 48)] * 4 + [(32, 4)]


# ----- coverage -----


def test_coverage_counts_everything_that_writes() -> None:
    model = tiny_models.build("qwen3_moe")  # the first layer is dense, two have four experts
    rows = coverage(model, find_architecture(model))
    assert [(row.component, row.reached, row.total, row.modules) for row in rows] == [
        ("attention", 3 * 32 * 32, 3 * 32 * 32, 3),
        ("mlp", 32 * 48 + 2 * 4 * 32 * 24, 32 * 48 + 2 * 4 * 32 * 24, 3),
        ("not reached", 0, tiny_models.VOCAB_SIZE * 32, 1),
    ]
    reached = 3 * 32 * 32 + 32 * 48 + 2 * 4 * 32 * 24
    text = format_coverage(rows)
    assert f"{reached / (reached + tiny_models.VOCAB_SIZE * 32):.1%}" in text.splitlines()[-1]
    assert "layers.*.mlp.experts" in text


def test_coverage_shows_writes_that_the_table_leaves_alone() -> None:
    model = tiny_models.build("gemma4_text")
    rows = coverage(model, find_architecture(model))
    assert ("layers.*.per_layer_projection", 0, 3 * 8 * 32) in [(row.detail, row.reached, row.total) for row in rows]
    gpt2 = tiny_models.build("gpt2")
    details = [row.detail for row in coverage(gpt2, find_architecture(gpt2)) if row.reached == 0]
    assert details == ["biases", "embedding", "embedding"]  # of tokens, and of positions


# ----- what it does not know -----


def test_an_unknown_family_shows_what_was_found() -> None:
    config = AutoConfig.for_model(
        "opt",
        vocab_size=50,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    with pytest.raises(ModelError) as caught:
        find_architecture(AutoModelForCausalLM.from_config(config))
    message = str(caught.value)
    for expected in ("'opt'", "model.decoder.layers (2)", "self_attn (OPTAttention)", "fc2.weight (32, 48)"):
        assert expected in message
    assert "\n" not in message


def test_a_known_family_with_other_blocks_is_refused() -> None:
    model = tiny_models.build("llama")
    model.model.layers[1].mlp = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    with pytest.raises(ModelError, match=r"layer 1 .* no mlp .*mlp\.1\.weight \(32, 48\)"):
        find_architecture(model)


def test_weights_that_cannot_be_read_say_so() -> None:
    model = tiny_models.build("llama")
    architecture = find_architecture(model)
    matrix = architecture.writers[0].matrices[0]
    matrix.module.weight = nn.Parameter(matrix.module.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert matrix.quantized
    with pytest.raises(ModelError, match=r"float8_e4m3fn.*norm_mode none"):
        matrix.read()


def test_experts_in_another_format_are_refused() -> None:
    model = tiny_models.build("mixtral")
    experts = model.model.layers[0].mlp.experts
    packed = experts.down_proj.detach().flatten(1)
    del experts.down_proj
    experts.down_proj = packed
    with pytest.raises(ModelError, match="no 3-D tensor down_proj"):
        find_architecture(model)


def test_reading_an_offloaded_weight_says_so() -> None:
    model = tiny_models.build("llama")
    architecture = find_architecture(model)
    model.to("meta")
    with pytest.raises(ModelError, match="offloaded"):
        architecture.writers[0].matrices[0].read()
