"""A base model that must be loaded to be saved: what is written is what the model class loads, or nothing is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bruno_ray.ablation.baking import bake
from bruno_ray.errors import ModelError, OutputError
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.loading import LoadedModel, load_model
from bruno_ray.publishing.base import find_base, find_stored
from bruno_ray.publishing.saving import SavedModel, save_model
from bruno_ray.publishing.whole_model import bake_whole, write_whole
from bruno_ray.settings import ModelSettings
from tests.support import tiny_models
from tests.support.live_helpers import EDITS, batch, difference, logits, make_bank

FULL = EDITS[2]


def save(base: Path, folder: Path, **options: object) -> SavedModel:
    bank = make_bank(tiny_models.LAYERS)
    return save_model(ModelSettings(id=str(base)), FULL, bank, folder, card=lambda mtp: f"MTP {mtp}", **options)


def as_pytorch_file(base: Path) -> Path:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    return base


def write_mxfp4(folder: Path) -> Path:
    """A gpt_oss checkpoint as OpenAI publishes it: experts as blocks of 4-bit numbers and their scales."""
    tiny_models.write(folder, "gpt_oss", dtype=torch.bfloat16, hidden_size=64, intermediate_size=64, head_dim=16)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, n_in, n_out = weights.pop(name).shape

        def draw(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

        weights[f"{name}_blocks"] = draw(0, 256, experts, n_out, n_in // 32, 16)
        weights[f"{name}_scales"] = draw(122, 126, experts, n_out, n_in // 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dequantised(folder: Path) -> LoadedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval().requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        processor=None,
        architecture=find_architecture(model),
        dtype="bfloat16",
        fingerprint="",
        device=torch.device("cpu"),
        generation_config=model.generation_config,
    )


def test_both_ways_write_the_same_weights(tmp_path: Path) -> None:
    base = tiny_models.write(tmp_path / "base", dtype=torch.bfloat16)
    save(base, tmp_path / "copied")
    save(as_pytorch_file(base), tmp_path / "loaded")
    copied, loaded = (load_file(tmp_path / name / "model.safetensors") for name in ("copied", "loaded"))
    assert copied.keys() == loaded.keys() and all(torch.equal(copied[name], loaded[name]) for name in copied)


@pytest.mark.parametrize("family", ["mixtral", "gemma3", "qwen3_5_moe"])
def test_what_it_checks_holds_for_other_names(tmp_path: Path, family: str) -> None:
    base = as_pytorch_file(tiny_models.write(tmp_path / "base", family))
    bank = make_bank(4)
    save_model(ModelSettings(id=str(base)), FULL, bank, tmp_path / "out", card=lambda _: "")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == torch.load(base / "pytorch_model.bin").keys()


def test_a_tensor_in_two_files_is_saved_as_it_is_loaded(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_models.build("llama").save_pretrained(base, max_shard_size="40KB")
    tiny_models.build_tokenizer().save_pretrained(base)
    first, *_, last = sorted(base.glob("model-*.safetensors"))
    name, other = "model.layers.1.mlp.down_proj.weight", torch.randn(32, 48)
    for file in (first, last):
        save_file(load_file(file) | {name: other}, file, metadata={"format": "pt"})
    save(base, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    bake(find_architecture(model), FULL, make_bank(tiny_models.LAYERS))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(saved, batch(2)), logits(model, batch(2)))


def test_a_dequantised_model_is_saved_under_the_names_of_its_class(tmp_path: Path) -> None:
    base = write_mxfp4(tmp_path / "base")
    described = find_base(ModelSettings(id=str(base)))
    assert described.is_quantised and find_stored(described) is None
    loaded = load_model(ModelSettings(id=str(base)), full_precision=True)
    plain = logits(loaded.model, batch(2))
    bake_whole(loaded, FULL, make_bank(tiny_models.LAYERS, 64))
    (tmp_path / "out").mkdir()
    write_whole(loaded, tmp_path / "out", "100KB")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for name, parameter in loaded.model.state_dict().items():
        assert torch.equal(read.state_dict()[name], parameter)
    assert torch.equal(logits(read, batch(2)), logits(loaded.model, batch(2)))
    assert difference(logits(read, batch(2)), plain) > 1e-2


def test_names_that_the_class_does_not_load_are_refused(tmp_path: Path) -> None:
    """transformers 5.23 writes a dequantised model under the names of the packed tensors; read back, those are left out
    and the experts random."""
    loaded = dequantised(write_mxfp4(tmp_path / "base"))
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match=r"no model\.layers\.0\.mlp\.experts\.\w+; .*nothing was saved"):
        write_whole(loaded, tmp_path / "out", "5GB")


def test_weights_that_stay_quantised_are_refused(tmp_path: Path) -> None:
    """What cannot be dequantised is no whole model, wherever the packed weights are."""
    loaded = dequantised(tiny_models.write(tmp_path / "base"))
    norm = loaded.model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.to(torch.float8_e4m3fn), requires_grad=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="F8_E4M3"):
        write_whole(loaded, tmp_path / "out", "5GB")
    projection = loaded.architecture.writers[0].module
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        bake_whole(loaded, EDITS[0], make_bank(tiny_models.LAYERS))


def test_config_promises_no_layers_that_are_not_saved(tmp_path: Path) -> None:
    base = as_pytorch_file(tiny_models.write_with_mtp(tmp_path / "base", "glm4_moe"))
    saved = save(base, tmp_path / "out")
    assert saved.mtp == "dropped" and (tmp_path / "out" / "README.md").read_text() == "MTP dropped"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not any(name.startswith("model.layers.3.") for name in load_file(tmp_path / "out" / "model.safetensors"))
