"""Exports hold the edit: merged, applied or converted they are the model with the edit in its weights."""

import json
import os
import re
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.closed_forms import factors
from bruno_ray.ablation.edit import AblationParameters, Edit, StrengthTable
from bruno_ray.ablation.plan import PREFIX
from bruno_ray.cli.main import main
from bruno_ray.errors import ModelError, OutputError
from bruno_ray.exporting import applying, direction_file, gguf_file, lora
from bruno_ray.exporting.base import Options, Source
from bruno_ray.exporting.registry import EXPORTERS, exporter
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.loading import load_model
from bruno_ray.model.writers import Matrix, Writer
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.settings import ModelSettings
from tests.serve.test_catalog import edit_of, make_run
from tests.support import tiny_models
from tests.support.live_helpers import EDITS, KERNEL, NARROW, batch, difference, logits, make_bank

EXACT = [EDITS[0], EDITS[1]]
ATTENTION = Edit({"attention": KERNEL}, "a", 1.7, "none")
FULL = EDITS[2]
MODELS = {"llama": {}, "gpt2": {}, "tied": {"tie_word_embeddings": True}, "gemma3": {}, "qwen3_5_text": {}}


@pytest.fixture(params=MODELS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def write(folder: Path, family: str) -> Path:
    return tiny_models.write(folder, "llama" if family == "tied" else family, **MODELS.get(family, {}))


def source_of(base: Path, edit: Edit) -> Source:
    architecture = load_model(ModelSettings(id=str(base)), full_precision=True).architecture
    bank = make_bank(architecture.n_layers, architecture.d_model)
    return Source(ModelSettings(id=str(base)), edit, bank, "mine", 7, "verbosity")


def baked(source: Source) -> nn.Module:
    loaded = load_model(source.model, full_precision=True)
    bake(loaded.architecture, source.edit, source.bank)
    return loaded.model


def written_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {writer.name: torch.cat(list(writer.weights()), 1) for writer in find_architecture(model).writers}


# ----- lora -----


def merged(base: Path, adapter: Path) -> nn.Module:
    """By PEFT itself."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = load_model(ModelSettings(id=str(base)), full_precision=True).model
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()


@pytest.mark.parametrize("edit", EXACT, ids=lambda edit: edit.norm_mode)
def test_peft_merges_an_adapter_to_the_baked_weights(tmp_path: Path, family: str, edit: Edit) -> None:
    """Exactly, for none and pre: every weight of the model, and what it answers."""
    source = source_of(write(tmp_path / "base", family), edit)
    said = lora.export(source, tmp_path / "adapter", Options())
    rank = source.bank[edit.direction_set].shape[1]
    assert f"rank {rank}" in said and "exact" in said
    expected, found = baked(source), merged(tmp_path / "base", tmp_path / "adapter")
    mine, theirs = expected.state_dict(), found.state_dict()
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(theirs[name], weight, atol=1e-5, rtol=0)
    inputs = batch(3)
    assert difference(logits(found, inputs), logits(expected, inputs)) < 1e-5
    unedited = load_model(source.model, full_precision=True).model
    assert difference(logits(unedited, inputs), logits(expected, inputs)) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_that_is_not_merged_answers_alike(tmp_path: Path, family: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    source = source_of(write(tmp_path / "base", family), EXACT[1])
    lora.export(source, tmp_path / "adapter", Options())
    base = load_model(source.model, full_precision=True).model
    live = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert difference(logits(live, batch(3)), logits(baked(source), batch(3))) < 1e-5


def test_the_files_are_as_peft_documents_them(tmp_path: Path) -> None:
    """Without PEFT: a pair of tensors per edited weight, named after its module, r = alpha, and no path of ours."""
    source = source_of(write(tmp_path / "base", "llama"), Edit({"mlp": NARROW}, "a", 0.2, "none"))
    lora.export(source, tmp_path / "adapter", Options())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 2, 2, "none")
    assert config["target_modules"] == ["model.layers.1.mlp.down_proj"] and config["fan_in_fan_out"] is False
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj"
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert shapes == {f"{name}.lora_A.weight": (2, 48), f"{name}.lora_B.weight": (32, 2)}
    written = "".join(file.read_text() for file in (tmp_path / "adapter").glob("*") if file.suffix in (".json", ".md"))
    assert str(tmp_path) not in written and '"trial": 7' in written
    assert config["base_model_name_or_path"] is None
    assert replace(source, model=ModelSettings(id="owner/name")).base_id == "owner/name"


def test_a_full_edit_has_the_least_rank_that_holds_the_error(tmp_path: Path, family: str) -> None:
    """By Eckart, Young and Mirsky: what the singular values of the change leave out."""
    source = source_of(write(tmp_path / "base", family), FULL)
    options = Options(max_error=0.1, max_rank=32)
    lora.export(source, tmp_path / "adapter", options)
    before = written_weights(load_model(source.model, full_precision=True).model)
    after = written_weights(baked(source))
    found = written_weights(merged(tmp_path / "base", tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    least = 0
    for name, change in ((name, after[name] - before[name]) for name in before):
        if name not in config["target_modules"]:
            assert not change.any()
            continue
        values = torch.linalg.svdvals(change.double())
        left_out = (values.square().flip(0).cumsum(0).flip(0).roll(-1)[:-1] / values.square().sum()).sqrt()
        rank = int((left_out <= options.max_error).nonzero()[0]) + 1
        least = max(least, rank)
        error = float((found[name] - after[name]).norm() / change.norm())
        assert error == pytest.approx(float(left_out[rank - 1]), abs=1e-4)
    assert config["r"] == least > source.bank["a"].shape[1]
    told = json.loads((tmp_path / "adapter" / "bruno.json").read_text())["max_error"]
    assert 0 < told <= options.max_error


def test_a_full_edit_of_too_high_a_rank_is_refused_with_the_figure(tmp_path: Path) -> None:
    source = source_of(write(tmp_path / "base", "llama"), FULL)
    with pytest.raises(ModelError, match=r"rank 3 leaves out \d+\.\d%: raise --max-rank or") as raised:
        lora.export(source, tmp_path / "adapter", Options(max_error=0.001, max_rank=3))
    assert "\n" not in str(raised.value) and not (tmp_path / "adapter").exists()


def test_random_projections_find_what_the_whole_decomposition_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """For weights that are too large for it: the error that is told is that of what was found, and near the least."""
    torch.manual_seed(3)
    d, width = 200, 300
    weight = torch.randn(d, width)
    directions = torch.linalg.qr(torch.randn(d, 2))[0].T
    linear = nn.Linear(width, d, bias=False)
    linear.weight.data = weight
    writer = Writer("down", 0, "mlp", linear, [Matrix(linear, "weight", "down.weight", d)], None)
    found = factors([weight], directions, 1.1, "full")
    exact = lora.update_of(writer, found, Options(0.2, 64))
    monkeypatch.setattr(lora, "EXACT_SVD", 1)
    near = lora.update_of(writer, found, Options(0.2, 64))
    change = (found.scale[:, None] * (weight - found.left.T @ (found.right @ weight))) - weight
    for update in (exact, near):
        told = float((update.b @ update.a - change).norm() / change.norm())
        assert update.error == pytest.approx(told, abs=1e-4) and told <= 0.2
    assert exact.rank <= near.rank <= exact.rank + 2


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_in_one_tensor_are_refused_by_name_and_attention_is_not(tmp_path: Path, family: str) -> None:
    base = write(tmp_path / "base", family)
    with pytest.raises(ModelError, match=r"experts keeps its experts in one tensor.*bruno-ray save"):
        lora.export(source_of(base, EXACT[0]), tmp_path / "adapter", Options())
    assert not (tmp_path / "adapter").exists()
    source = source_of(base, ATTENTION)
    lora.export(source, tmp_path / "adapter", Options())
    found, expected = written_weights(merged(base, tmp_path / "adapter")), written_weights(baked(source))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)


def test_an_edit_of_nothing_is_refused(tmp_path: Path) -> None:
    nothing = Edit({"mlp": AblationParameters(0.0, 1.0, 0.0, 1.0)}, "a", 0.5, "none")
    with pytest.raises(ModelError, match="edits nothing"):
        lora.export(source_of(write(tmp_path / "base", "llama"), nothing), tmp_path / "adapter", Options())


# ----- directions -----


def test_applied_to_another_copy_of_the_base_it_is_the_baked_model(tmp_path: Path, family: str) -> None:
    """A copy that is sharded otherwise and kept in more bits than the first."""
    base = write(tmp_path / "base", family)
    source = source_of(base, FULL)
    direction_file.export(source, tmp_path / "out", Options())
    loaded = load_model(source.model, full_precision=True)
    copy = tmp_path / "copy"
    loaded.model.save_pretrained(copy, max_shard_size="20KB")
    loaded.tokenizer.save_pretrained(copy)
    if loaded.processor is not None:
        loaded.processor.save_pretrained(copy)
    saved = applying.apply(tmp_path / "out", ModelSettings(id=str(copy)), tmp_path / "applied")
    found = load_model(ModelSettings(id=str(saved.folder)), full_precision=True).model
    for name, weight in baked(source).state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    assert json.loads((saved.folder / "bruno.json").read_text())["run"] == "mine"
    assert (saved.folder / "README.md").read_text().startswith("---\nlibrary_name: transformers")


def test_a_copy_in_more_bits_is_the_same_model(tmp_path: Path) -> None:
    base = tiny_models.write(tmp_path / "base", dtype=torch.bfloat16)
    wide = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    narrow = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    digests = {direction_file.digest_of(find_architecture(model)) for model in (wide, narrow)}
    assert len(digests) == 1
    with torch.no_grad():
        wide.model.layers[1].mlp.down_proj.weight += 1e-6 * torch.randn(32, 48)
    assert direction_file.digest_of(find_architecture(wide)) not in digests


def test_the_file_alone_says_how_to_edit_a_weight(tmp_path: Path) -> None:
    """As docs/exports.md has it, with numpy: a reader of it needs no bruno-ray."""
    source = source_of(write(tmp_path / "base", "llama"), EXACT[0])
    direction_file.export(source, tmp_path / "out", Options())
    with safe_open(tmp_path / "out" / "edit.safetensors", framework="numpy") as file:
        described = json.loads(file.metadata()["bruno_ray"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert described["edit"]["norm_mode"] == "none" and described["trial"] == 7
    assert (described["base"]["name"], described["base"]["family"]) == ("base", "llama")
    assert {key for key in tensors if key.startswith("bank.")} == {"bank.a", "bank.b"}
    before = written_weights(load_model(source.model, full_precision=True).model)
    after = written_weights(baked(source))
    for layer in range(3):
        for part, module in (("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
            name = f"model.layers.{layer}.{module}"
            weight, v = before[name].numpy(), tensors["edit.directions"][layer]
            edited = weight - tensors[f"edit.strength.{part}"][layer] * v.T @ (v @ weight)
            assert abs(edited - after[name].numpy()).max() < 1e-5


def test_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    source = source_of(write(tmp_path / "base", "llama"), EXACT[0])
    direction_file.export(source, tmp_path / "out", Options())
    others = {
        "deeper": tiny_models.write(tmp_path / "deeper", num_hidden_layers=4),
        "wider": tiny_models.write(tmp_path / "wider", hidden_size=64),
        "qwen": tiny_models.write(tmp_path / "qwen", "qwen3"),
        "other": tiny_models.write(tmp_path / "other", seed=1),
    }
    reasons = {
        "deeper": "4 layers",
        "wider": "64 wide",
        "qwen": "is a qwen3 of",
        "other": "has other weights than base",
    }
    for name, folder in others.items():
        with pytest.raises(ModelError, match=reasons[name]) as raised:
            applying.apply(tmp_path / "out", ModelSettings(id=str(folder)), tmp_path / "applied")
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "applied").exists()


def test_files_that_are_none_of_ours_are_refused_in_one_line(tmp_path: Path) -> None:
    source = source_of(write(tmp_path / "base", "llama"), EXACT[0])
    direction_file.export(source, tmp_path / "out", Options())
    good = tmp_path / "out" / "edit.safetensors"
    with safe_open(good, framework="pt") as file:
        text = file.metadata()["bruno_ray"]
    tensors = load_file(good)

    def refused(reason: str, file: Path) -> None:
        with pytest.raises(OutputError, match=reason) as raised:
            direction_file.read(file)
        assert "\n" not in str(raised.value)

    def with_text(text: str | None, tensors: dict[str, torch.Tensor] = tensors) -> Path:
        save_file(tensors, tmp_path / "file", metadata=None if text is None else {"bruno_ray": text})
        return tmp_path / "file"

    refused("there is no file", tmp_path / "nothing")
    refused("holds no edit", with_text(None))
    refused("has format 3", with_text(json.dumps({**json.loads(text), "format": 3})))
    refused("has format unknown", with_text("[]"))
    refused("is damaged", with_text(json.dumps({**json.loads(text), "more": 1})))
    refused("is damaged", with_text(text.replace('"norm_mode":"none"', '"norm_mode":"nothing"')))
    refused("is damaged", with_text(text, {"bank.b": tensors["bank.b"]}))
    refused("is damaged", with_text(text, {**tensors, "bank.a": tensors["bank.a"][:2].clone()}))
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-100])
    refused("damaged or not a safetensors", tmp_path / "cut")


# ----- gguf -----


def test_without_a_converter_gguf_is_refused_with_how_to_get_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    source = source_of(write(tmp_path / "base", "llama"), FULL)
    with pytest.raises(OutputError, match=r"convert_hf_to_gguf\.py of https.*on PATH.*pipx install") as raised:
        gguf_file.export(source, tmp_path / "out", Options())
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


CONVERTER = """
import sys
from transformers import AutoModelForCausalLM
from tests.support.gguf_files import write_model
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert sys.argv[2::2] == ["--outfile", "--outtype"] and sys.argv[5] == "f32"
write_model(sys.argv[3], model)
"""


def test_a_converter_gets_the_baked_model_and_its_file_is_the_edited_model(tmp_path: Path, monkeypatch) -> None:
    """By a converter of llama.cpp's name and arguments, made of the gguf package; read back as a base model."""
    pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
    from tests.support.gguf_files import SIZES

    base = tiny_models.write(tmp_path / "base", **SIZES)
    program(tmp_path / "bin" / "convert_hf_to_gguf.py", CONVERTER)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # the script takes our writer of such files
    source = source_of(base, FULL)
    said = gguf_file.export(source, tmp_path / "out", Options(outtype="f32"))
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert file.name == "base-mine-7.gguf" and str(file) in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", file.name]
    monkeypatch.setenv("BRUNO_CACHE", str(tmp_path / "cache"))
    read = load_model(ModelSettings(id=str(file)), full_precision=True).model
    inputs = batch(3)
    assert difference(logits(read, inputs), logits(baked(source), inputs)) < 1e-5


def test_what_a_converter_fails_with_is_told_and_nothing_is_left(tmp_path: Path, monkeypatch) -> None:
    script = "import sys\nprint('loading', file=sys.stderr)\nsys.exit('ERROR: TinyForCausalLM is not supported')\n"
    program(tmp_path / "bin" / "convert_hf_to_gguf.py", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(OutputError, match=r"could not convert the model \(ERROR: TinyForCausalLM is not supported\)"):
        gguf_file.export(source_of(write(tmp_path / "base", "llama"), FULL), tmp_path / "out", Options())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "bin"]


def program(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# ----- all of them -----


def test_what_is_there_already_is_not_overwritten(tmp_path: Path, monkeypatch) -> None:
    program(tmp_path / "bin" / "convert_hf_to_gguf.py", CONVERTER)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    source = source_of(write(tmp_path / "base", "llama"), EXACT[0])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep me")
    for name in EXPORTERS:
        with pytest.raises(OutputError, match="exists already"):
            exporter(name)(source, tmp_path / "out", Options())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


# ----- as a user calls it -----


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Four trials that edit the MLP, of which trial 1 is selected."""
    run = make_run(tmp_path / "runs" / "mine", tiny_models.write(tmp_path / "base"))
    run.save_directions({"difference_in_means@0": make_bank(3)["b"]})
    return run


def called(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out.strip(), said.err


def test_a_trial_goes_out_and_comes_back(run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The selected one, and one by number: each is the model that `save` would bake."""
    base = tmp_path / "base"
    for reference, number in ((run.path, 1), (f"{run.path}:3", 3)):
        out, applied = tmp_path / f"out-{number}", tmp_path / f"applied-{number}"
        assert called(capsys, "export", reference, "--to", "directions", out)[:2] == (0, str(out))
        assert called(capsys, "apply", out, base, "--to", applied)[:2] == (0, str(applied))
        loaded = load_model(ModelSettings(id=str(base)), full_precision=True)
        bake(loaded.architecture, edit_of(number), run.load_bank())
        found = load_model(ModelSettings(id=str(applied)), full_precision=True).model
        for name, weight in loaded.model.state_dict().items():
            assert torch.equal(found.state_dict()[name], weight), name
    code, out, _ = called(capsys, "export", f"{run.path}:0", "--to", "lora", tmp_path / "adapter")
    assert (code, out) == (0, str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 1


def test_a_trained_trial_takes_its_own_directions_along(run: RunDirectory, tmp_path: Path, capsys) -> None:
    name = f"{PREFIX}0123456789abcdef"
    run.save_learned(name, make_bank(3)["b"].numpy())
    trained = Edit({"mlp": StrengthTable((0.2, 1.0, 0.4))}, name, None, "none")
    run.change(lambda record: {"selected": record.selected.model_copy(update={"edit": trained.to_dict()})})
    assert called(capsys, "export", run.path, "--to", "directions", tmp_path / "out")[0] == 0
    described, edit, bank = direction_file.read(tmp_path / "out")
    assert edit == trained and set(bank) == {name, "difference_in_means@0"}
    assert torch.equal(bank[name], make_bank(3)["b"]) and described.trial == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["export", "RUN:9", "--to", "lora", "out"], "no trial 9"),
        (["export", "RUN", "--to", "onnx", "out"], "lora.*gguf.*directions"),
        (["export", "RUN", "out"], "--to"),
        (["export", "RUN", "--to", "lora", "RUN"], "exists already"),
        (["export", "RUN", "--to", "lora", "out", "--max-error", "2"], "up to 1"),
        (["export", "RUN", "--to", "gguf", "out"], "llama.cpp's converter"),
        (["apply", "nothing", "BASE", "--to", "out"], "no file nothing"),
        (["apply", "RUN/directions.safetensors", "BASE", "--to", "out"], "holds no edit"),
        (["apply", "nothing", "--to", "out"], "no model"),
        (["apply", "nothing", "BASE", "--to", "BASE"], "exists already"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    run: RunDirectory, tmp_path: Path, monkeypatch, capsys, arguments: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = [word.replace("RUN", str(run.path)).replace("BASE", str(tmp_path / "base")) for word in arguments]
    code, _, said = called(capsys, *words)
    last = said.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and re.search(reason, last), said
    assert "Traceback" not in said and not (tmp_path / "out").exists()
