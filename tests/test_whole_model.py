"""A base model that must be loaded to be saved: what is written is what the model class loads, or nothing is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.live import LiveEditor
from bruno_ray.errors import ModelError, OutputError
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.families import FAMILIES
from bruno_ray.model.loading import LoadedModel, load_model
from bruno_ray.publishing.base import find_base, find_stored
from bruno_ray.publishing.saving import SavedModel, save_model
from bruno_ray.publishing.whole_model import bake_whole, write_whole
from bruno_ray.settings import ModelSettings
from tests.support import packed, tiny_models
from tests.support.live_helpers import EDITS, batch, difference, logits, make_bank

FULL = EDITS[2]
SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}


def save(base: Path, folder: Path, **options: object) -> SavedModel:
    bank = make_bank(tiny_models.LAYERS)
    return save_model(ModelSettings(id=str(base)), FULL, bank, folder, card=lambda mtp: f"MTP {mtp}", **options)


def as_pytorch_file(base: Path) -> Path:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    return base


def as_transformers_loads(folder: Path) -> LoadedModel:
    """Without what `load_model` does for a checkpoint that is stored quantised."""
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


@pytest.mark.parametrize("pack", [packed.mxfp4, packed.fp8])
def test_a_quantised_base_is_saved_whole_and_plain(tmp_path: Path, pack: Callable[[Path], object]) -> None:
    """In files of the size that was asked for, and computing what the live edit does."""
    family = "gpt_oss" if pack is packed.mxfp4 else "qwen3"
    base = tiny_models.write(tmp_path / "base", family, **SIZES)
    pack(base)
    described = find_base(ModelSettings(id=str(base)))
    assert described.is_quantised and find_stored(described) is None
    bank = make_bank(tiny_models.LAYERS, SIZES["hidden_size"])
    save_model(ModelSettings(id=str(base)), FULL, bank, tmp_path / "out", card=lambda _: "", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    base_model = load_model(ModelSettings(id=str(base), dtypes=("float32",), device_map="cpu"))
    plain = logits(base_model.model, batch(2))
    editor = LiveEditor(base_model.architecture)
    editor.set(editor.resolve_all([FULL], bank), [0, 0])
    live = logits(base_model.model, batch(2))
    assert difference(logits(saved, batch(2)), live) < 0.02  # dequantised to bfloat16 on the way
    assert difference(live, plain) > 0.1


def test_names_that_the_class_does_not_load_are_refused(tmp_path: Path) -> None:
    """transformers 5.23 writes a dequantised model under the names of the packed tensors; read back, those are left out
    and the experts random."""
    base = tiny_models.write(tmp_path / "base", "gpt_oss", **SIZES)
    packed.mxfp4(base)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match=r"no model\.layers\.0\.mlp\.experts\.\w+; .*nothing was saved"):
        write_whole(as_transformers_loads(base), tmp_path / "out", "5GB")


def test_a_family_that_is_probed_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was accepted, and without a row in the table."""
    monkeypatch.setenv("BRUNO_CACHE", str(tmp_path / "cache"))
    base = tiny_models.write(tmp_path / "base", "llama")
    monkeypatch.delitem(FAMILIES, "llama")
    with pytest.raises(ModelError, match="accept it once"):
        save(base, tmp_path / "out")
    bank = make_bank(tiny_models.LAYERS)
    accepted = ModelSettings(id=str(base), accept_probed=True)
    save_model(accepted, FULL, bank, tmp_path / "out", card=lambda _: "")
    monkeypatch.undo()
    save(base, tmp_path / "known")
    probed, known = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "known"))
    assert probed.keys() == known.keys()
    for name in probed:
        torch.testing.assert_close(probed[name], known[name])


def test_weights_that_stay_quantised_are_refused(tmp_path: Path) -> None:
    """What cannot be dequantised is no whole model, wherever the packed weights are."""
    loaded = as_transformers_loads(tiny_models.write(tmp_path / "base"))
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
