"""Stored tensors are found under the names that transformers itself gives them, for every family."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.checkpoint import StoredMatrix, StoredTensor, read_header, weight_files
from bruno_ray.model.classes import auto_class
from bruno_ray.model.families import in_table, require_known
from bruno_ray.model.stored_names import empty_model, map_names, misfits, mtp_blocks, mtp_writers, stored_writers
from bruno_ray.model.writers import Writer
from tests.support import all_families, tiny_models


def stored(folder: Path) -> tuple[dict[str, StoredTensor], list[Writer] | None]:
    tensors = {name: tensor for file in weight_files(folder) for name, tensor in read_header(file).items()}
    model = empty_model(AutoConfig.from_pretrained(folder))
    return tensors, stored_writers(model, find_architecture(model), map_names(model, tensors), tensors)


def rename(folder: Path, old: str, new: str) -> None:
    weights = {name.replace(old, new): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_each_matrix_is_the_one_that_transformers_loads(tmp_path: Path, family: str) -> None:
    tiny_models.build(family, dtype=torch.bfloat16).save_pretrained(tmp_path)
    check_against_transformers(tmp_path)


@pytest.mark.nightly
def test_each_matrix_of_every_family_of_the_table(tmp_path: Path) -> None:
    checked = []
    for family in sorted(all_families.families()):
        try:
            config = all_families.tiny_config(family)
            require_known(config, family)
            model = all_families.tiny_model(family) if in_table(config) else None
        except Exception as error:  # refused, or in need of a package, or of sizes that are not tiny
            print(f"{family} is left out: {type(error).__name__}: {error}")
            continue
        if model is not None:
            model.bfloat16().save_pretrained(tmp_path / family)
            check_against_transformers(tmp_path / family)
            shutil.rmtree(tmp_path / family)
            checked.append(family)
    assert len(checked) > 140


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_that_are_transposed_while_loading(tmp_path: Path, transposed: bool) -> None:
    """qwen3_vl_moe: on the hub as (E, in, d_model), which transformers 5 turns around if the shapes say so."""
    model = all_families.tiny_model("qwen3_vl_moe").bfloat16()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for name in [name for name in weights if name.endswith(("experts.down_proj", "experts.gate_up_proj"))]:
        shape = model.get_parameter(name).shape
        as_it_is = weights[name] if weights[name].shape == shape else weights[name].transpose(1, 2)
        weights[name] = (as_it_is.transpose(1, 2) if transposed else as_it_is).contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    check_against_transformers(tmp_path)


def check_against_transformers(folder: Path) -> None:
    """Each matrix in the files against that of the model which transformers loads from them."""
    config = AutoConfig.from_pretrained(folder)
    loaded = find_architecture(auto_class(config).from_pretrained(folder, dtype=torch.bfloat16))
    tensors, writers = stored(folder)
    assert [writer.name for writer in writers] == [writer.name for writer in loaded.writers]
    spans = []
    for writer, expected in zip(writers, loaded.writers):
        assert (writer.layer, writer.component) == (expected.layer, expected.component)
        assert len(writer.matrices) == len(expected.matrices)
        for matrix, in_memory in zip(writer.matrices, expected.matrices):
            assert torch.equal(matrix.read(), in_memory.read()) and matrix.numel() == in_memory.numel()
            written = matrix.stored(matrix.read()).view(torch.uint8).numpy().tobytes()
            content = matrix.tensor.file.read_bytes()[matrix.start : matrix.start + matrix.n_bytes]
            assert written == content
            spans.append((matrix.start, matrix.start + matrix.n_bytes))
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert misfits(empty_model(config), tensors) == []


@pytest.mark.parametrize(
    ("family", "old", "new", "first"),
    [
        ("gpt2", "transformer.", "", "h.0.attn.c_proj.weight"),  # as on the hub: the base class's names
        (
            "qwen3_5_text",  # the text model of a multimodal checkpoint
            "model.",
            "model.language_model.",
            "model.language_model.layers.0.linear_attn.out_proj.weight",
        ),
    ],
)
def test_other_prefixes_are_found_as_transformers_finds_them(
    tmp_path: Path, family: str, old: str, new: str, first: str
) -> None:
    tiny_models.build(family).save_pretrained(tmp_path)
    _, before = stored(tmp_path)
    expected = [matrix.read() for writer in before for matrix in writer.matrices]
    rename(tmp_path, old, new)
    _, after = stored(tmp_path)
    matrices = [matrix for writer in after for matrix in writer.matrices]
    assert matrices[0].tensor.name == first
    assert all(torch.equal(matrix.read(), weight) for matrix, weight in zip(matrices, expected, strict=True))


def test_matrices_that_are_stored_otherwise_are_not_found(tmp_path: Path) -> None:
    tiny_models.build("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    for other in (
        {name: weights[name].T.contiguous()},
        {name: weights[name].to(torch.float8_e4m3fn)},
        {f"{name}_packed": weights[name]},
    ):
        save_file({key: value for key, value in weights.items() if key != name} | other, file)
        tensors, writers = stored(tmp_path)
        assert writers is None
        assert misfits(empty_model(AutoConfig.from_pretrained(tmp_path)), tensors)
    save_file({key: value for key, value in weights.items() if key != name}, file)
    tensors, writers = stored(tmp_path)
    assert writers is None and misfits(empty_model(AutoConfig.from_pretrained(tmp_path)), tensors) == [f"no {name}"]


def test_experts_that_are_not_all_there_are_not_found(tmp_path: Path) -> None:
    tiny_models.build("qwen3_moe").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.experts.2.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    tensors, writers = stored(tmp_path)
    assert writers is None
    assert (
        "model.layers.1.mlp.experts.down_proj" in misfits(empty_model(AutoConfig.from_pretrained(tmp_path)), tensors)[0]
    )


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    tiny_models.build("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors, writers = stored(tmp_path)
    assert "lm_head.weight" not in tensors and writers
    assert misfits(empty_model(AutoConfig.from_pretrained(tmp_path)), tensors) == []


# ----- multi-token prediction -----


def test_blocks_beyond_the_last_write_as_the_last_one_does(tmp_path: Path) -> None:
    folder = tiny_models.write_with_mtp(tmp_path, "glm4_moe")
    tensors, writers = stored(folder)
    model = empty_model(AutoConfig.from_pretrained(folder))
    blocks = mtp_blocks(writers, map_names(model, tensors).unused)
    assert set(blocks.values()) == {"model.layers.3."} and blocks.keys() == {n for n in tensors if "layers.3." in n}
    found = mtp_writers(writers, blocks, tensors)
    names = {matrix.tensor.name for writer in found for matrix in writer.matrices}
    assert names == {
        "model.layers.3.self_attn.o_proj.weight",
        "model.layers.3.mlp.shared_experts.down_proj.weight",
        *(f"model.layers.3.mlp.experts.{i}.down_proj.weight" for i in range(4)),
    }
    assert {writer.layer for writer in found} == {2}
    assert {writer.component: len(writer.matrices) for writer in found if writer.component == "attention"} == {
        "attention": 1
    }


def test_layers_called_mtp_write_as_the_last_attention_of_their_kind(tmp_path: Path) -> None:
    folder = tiny_models.write_with_mtp(tmp_path, "qwen3_5_text")
    tensors, writers = stored(folder)
    blocks = mtp_blocks(writers, map_names(empty_model(AutoConfig.from_pretrained(folder)), tensors).unused)
    assert blocks.keys() == {name for name in tensors if name.startswith("mtp.")}
    assert blocks["mtp.fc.weight"] == "" and blocks["mtp.layers.0.mlp.up_proj.weight"] == "mtp.layers.0."
    names = {m.tensor.name for writer in mtp_writers(writers, blocks, tensors) for m in writer.matrices}
    assert names == {"mtp.layers.0.self_attn.o_proj.weight", "mtp.layers.0.mlp.down_proj.weight"}


def test_other_unused_tensors_are_no_such_layers(tmp_path: Path) -> None:
    tiny_models.build("llama").save_pretrained(tmp_path)
    _, writers = stored(tmp_path)
    unused = ["audio.layers.9.self_attn.o_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "odd"]
    assert mtp_blocks(writers, unused) == {}


# ----- files -----


def test_a_header_tells_where_each_tensor_lies(tmp_path: Path) -> None:
    weights = {"b": torch.arange(6, dtype=torch.int32).view(2, 3), "a": torch.tensor(1.5, dtype=torch.float16)}
    save_file(weights, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        "b": ("I32", (2, 3)),
        "a": ("F16", ()),
    }
    for name, tensor in found.items():
        assert content[tensor.start : tensor.end] == weights[name].numpy().tobytes()


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "no header", "not json", "shape"])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    content = file.read_bytes()
    file.write_bytes(
        {
            "cut": content[:-1],
            "longer": content + b"x",
            "empty": b"",
            "no header": (10**12).to_bytes(8, "little") + content[8:],
            "not json": content[:8] + b"!" + content[9:],
            "shape": content.replace(b"[100]", b"[101]"),
        }[damage]
    )
    with pytest.raises(ModelError, match="download it again"):
        read_header(file)


def test_files_are_those_that_transformers_reads(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    save_file({"a": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    names = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert {file.name for file in weight_files(tmp_path)} == names and len(names) > 1
    (tmp_path / min(names)).unlink()
    with pytest.raises(ModelError, match=f"no {min(names)}"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="damaged"):
        weight_files(tmp_path)
    model.save_pretrained(tmp_path)
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]


def test_a_stored_matrix_of_a_file_that_was_cut_off_is_not_read(tmp_path: Path) -> None:
    tiny_models.build("llama").save_pretrained(tmp_path)
    _, writers = stored(tmp_path)
    matrix = writers[-1].matrices[0]
    assert isinstance(matrix, StoredMatrix)
    with matrix.tensor.file.open("r+b") as file:
        file.truncate(matrix.start + 8)
    with pytest.raises(ModelError, match="cut off"):
        matrix.read()
