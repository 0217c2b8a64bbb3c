"""Checkpoints that were stored quantised: read right, edited right, saved as plain ones; or refused by name."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.ablation.live import LiveEditor
from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.loading import LoadedModel, load_model
from bruno_ray.model.writers import scaled
from bruno_ray.settings import ModelSettings
from tests.support import packed, tiny_models

SIZES = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16}  # 160 is no multiple of the blocks of 128
EVERYWHERE = AblationParameters(max_weight=0.8, max_weight_position=0.0, min_weight=0.8, min_weight_distance=99.0)


def load(folder: Path, full_precision: bool = False, **changes: object) -> LoadedModel:
    settings = ModelSettings(id=str(folder), device_map="cpu", dtypes=("float32",), **changes)
    return load_model(settings, full_precision=full_precision)


@pytest.fixture(params=["fp8", "mxfp4"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    if request.param == "fp8":
        folder = tiny_models.write(tmp_path / "m", "qwen3", **SIZES)
        return folder, packed.fp8(folder)
    folder = tiny_models.write(tmp_path / "m", "gpt_oss", hidden_size=64, intermediate_size=64)
    return folder, packed.mxfp4(folder)


@pytest.mark.parametrize("full_precision", [False, True])
def test_every_weight_is_what_the_format_says(
    stored: tuple[Path, dict[str, torch.Tensor]], full_precision: bool
) -> None:
    folder, true = stored
    loaded = load(folder, full_precision)
    names = dict(loaded.model.named_parameters())
    assert names.keys() == true.keys()
    for name, parameter in names.items():
        # transformers rounds what it dequantises to bfloat16 first; FP4 and powers of two survive that exactly
        torch.testing.assert_close(parameter.detach().float(), true[name].float(), rtol=2**-8, atol=0, msg=name)
    assert load(folder, full_precision).fingerprint == loaded.fingerprint, "the same tensors at every load"


def test_live_is_baked_and_the_saved_folder_is_plain(
    stored: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, _ = stored
    loaded = load(folder)
    architecture = loaded.architecture
    direction = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(0)), dim=0)
    bank = {"x": direction.expand(architecture.n_layers + 1, 1, -1)}
    edit = Edit({"attention": EVERYWHERE, "mlp": EVERYWHERE}, "x", None, "full")
    editor = LiveEditor(architecture)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        before = loaded.model(ids).logits
        editor.set([editor.resolve(edit, bank)], [0, 0])
        live = loaded.model(ids).logits
    full = load(folder, full_precision=True)
    bake(full.architecture, edit, bank)
    full.model.save_pretrained(tmp_path / "saved")
    read, found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert getattr(read.config, "quantization_config", None) is None
    with torch.no_grad():
        saved = read.eval()(ids).logits
    assert (saved - live).abs().max() < 1e-3 * (live - before).abs().max()


def test_bitsandbytes_checkpoints_are_read_edited_and_saved_plain(tmp_path: Path) -> None:
    plain = tiny_models.write(tmp_path / "plain", "llama", **tiny_models.FOR_4BIT)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantised = AutoModelForCausalLM.from_pretrained(plain, quantization_config=four_bit, dtype=torch.float32)
    quantised.save_pretrained(tmp_path / "stored")
    tiny_models.build_tokenizer().save_pretrained(tmp_path / "stored")

    loaded = load(tmp_path / "stored")
    assert all(matrix.quantized for writer in loaded.architecture.writers for matrix in writer.matrices)
    full = load(tmp_path / "stored", full_precision=True)
    original = find_architecture(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))
    for packed_one, plain_one, exact in zip(
        loaded.architecture.writers, full.architecture.writers, original.writers, strict=True
    ):
        assert torch.equal(packed_one.matrices[0].read(), plain_one.matrices[0].read())
        weight = exact.matrices[0].read()
        assert (plain_one.matrices[0].read() - weight).norm() < 0.1 * weight.norm()
    full.model.save_pretrained(tmp_path / "saved")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), full.model.parameters(), strict=True))


def test_a_format_whose_package_is_missing_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "m", "llama")
    packed.gptq(folder)
    with pytest.raises(ModelError, match=r"(?i)gptq.*install"):
        load(folder)
    with pytest.raises(ModelError, match=r"stored in gptq, which cannot hold an edit"):
        load(folder, full_precision=True)


def test_a_stored_quantisation_is_not_quantised_again(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "m", "qwen3", **SIZES)
    packed.fp8(folder)
    with pytest.raises(ModelError, match=r"stored in fp8 already: leave model\.quantization bnb_8bit out"):
        load(folder, quantization="bnb_8bit")


def test_fp8_weights_are_read_block_by_block() -> None:
    """What a GPU that computes in FP8 keeps: the weight and its scales."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(160, 200, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, generator=generator)
    read = scaled(weight, scale, (128, 128))
    for i, j in ((0, 0), (127, 199), (128, 127), (159, 128)):
        assert read[i, j] == weight[i, j].float() * scale[i // 128, j // 128]
    assert torch.equal(scaled(weight, torch.tensor(2.0), None), 2 * weight.float())
