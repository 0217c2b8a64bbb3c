"""An edit that goes to vLLM: the exported tensors, hooked as the plug-in hooks them, are the edit.

``tests/test_vllm.py`` (nightly) does it in vLLM itself; here the plug-in's hooks, which need torch alone, are on models
of transformers, and on linear modules that answer as vLLM's do.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bruno_ray.errors import ModelError
from bruno_ray.exporting import vllm_edit
from bruno_ray.exporting.base import Options
from bruno_ray.model.loading import load_model
from bruno_ray_vllm import hooks
from tests.support import tiny_models
from tests.support.live_helpers import EDITS, batch, difference, logits
from tests.test_exports import ATTENTION, baked, called, run, source_of, write  # noqa: F401 - run is a fixture

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("family", "mode"), [("llama", 0), ("llama", 1), ("llama", 2), ("gpt2", 2), ("gemma3", 1)])
def test_base_and_hooks_answer_as_the_baked_model(tmp_path: Path, family: str, mode: int) -> None:
    source = source_of(write(tmp_path / "base", family), EDITS[mode])
    said = vllm_edit.export(source, tmp_path / "out", Options())
    model = load_model(source.model, full_precision=True).model
    unedited = logits(model, batch(3))
    hooked = hooks.attach(model, hooks.edits_of(load_file(tmp_path / "out" / "edit.safetensors")))
    assert f"{len(hooked)} modules" in said
    expected = logits(baked(source), batch(3))
    assert difference(logits(model, batch(3)), expected) < 1e-4
    assert difference(unedited, expected) > 1e-2


def test_the_folder_has_everything_of_the_base_but_weights(tmp_path: Path) -> None:
    base = write(tmp_path / "base", "llama")
    vllm_edit.export(source_of(base, EDITS[2]), tmp_path / "out", Options())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in base.iterdir()} - {"model.safetensors"} | {
        "README.md", "bruno.json", "edit.safetensors",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    entry = config.pop("bruno_ray")
    assert config == json.loads((base / "config.json").read_text())
    assert (entry["base"], entry["base_name"], entry["trial"]) == (None, "base", 7)
    written = "".join(file.read_text() for file in (tmp_path / "out").glob("*") if file.suffix in (".json", ".md"))
    assert str(tmp_path) not in written and "--load-format bruno_ray" in written


def test_experts_in_one_tensor_are_refused_and_attention_is_not(tmp_path: Path) -> None:
    base = tiny_models.write(tmp_path / "base", "mixtral")
    with pytest.raises(ModelError, match=r"experts keeps its experts in one tensor.*bruno-ray save"):
        vllm_edit.export(source_of(base, EDITS[0]), tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()
    assert "3 modules" in vllm_edit.export(source_of(base, ATTENTION), tmp_path / "out", Options())


def test_the_command_line_writes_it(run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    code, out, _ = called(capsys, "export", f"{run.path}:3", "--to", "vllm", tmp_path / "out")
    assert (code, out) == (0, str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bruno_ray"]["trial"] == 3


def test_vllm_finds_what_the_package_declares() -> None:
    project = tomllib.loads((ROOT / "vllm_plugin" / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"bruno_ray": "bruno_ray_vllm:register"}
    assert not any("bruno-ray" in needed or "transformers" in needed for needed in project["dependencies"])


# ----- modules as vLLM has them (0.32, vllm/model_executor/layers/linear.py) -----


class RowParallel(nn.Module):
    """A slice of a linear map: each rank has some of its inputs, and the first adds the bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rank: int = 0, **flags: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.output_size, self.tp_rank = len(weight), rank
        self.skip_bias_add = flags.get("skip_bias_add", False)
        self.reduce_results = flags.get("reduce_results", True)
        self.return_bias = flags.get("return_bias", True)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        y = nn.functional.linear(x, self.weight, None if self.tp_rank or self.skip_bias_add else self.bias)
        return (y, self.bias if self.skip_bias_add else None) if self.return_bias else y


D = 12


@pytest.fixture
def edit() -> hooks.Edit:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(2, D, generator=generator), torch.randn(2, D, generator=generator)
    return hooks.Edit(left, right, torch.rand(D, generator=generator) + 0.5)


def expected_of(weight: Tensor, edit: hooks.Edit) -> Tensor:
    """The edited weight."""
    assert edit.scale is not None
    return edit.scale[:, None] * (weight - edit.left.T @ (edit.right @ weight))


def within(module: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"o_proj": module})


@pytest.mark.parametrize("return_bias", [True, False])
@pytest.mark.parametrize("skip_bias_add", [True, False])
def test_the_bias_is_left_alone_wherever_it_is_added(edit: hooks.Edit, skip_bias_add: bool, return_bias: bool) -> None:
    weight, bias, x = torch.randn(D, 8), torch.randn(D), torch.randn(5, 8)
    module = RowParallel(weight, bias, skip_bias_add=skip_bias_add, return_bias=return_bias)
    assert hooks.attach(within(module), {"o_proj": edit}) == ["o_proj"]
    found = module(x)
    y = found[0] if isinstance(found, tuple) else found
    wanted = x @ expected_of(weight, edit).T + (0 if skip_bias_add else bias)
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    if isinstance(found, tuple):
        assert found[1] is (module.bias if skip_bias_add else None)


def test_outputs_that_are_summed_over_gpus_later_are_edited_before(edit: hooks.Edit) -> None:
    """As of shared experts, whose sum vLLM leaves to the end of the block."""
    weight, bias, x = torch.randn(D, 8), torch.randn(D), torch.randn(5, 8)
    total = torch.zeros(5, D)
    for rank, columns in enumerate((slice(0, 4), slice(4, 8))):
        module = RowParallel(weight[:, columns], bias, rank, reduce_results=False)
        hooks.attach(within(module), {"o_proj": edit})
        total += module(x[:, columns])[0]
    torch.testing.assert_close(total, x @ expected_of(weight, edit).T + bias, atol=1e-5, rtol=1e-5)


def test_an_output_keeps_its_dtype_and_a_checkpoint_its_names(edit: hooks.Edit) -> None:
    module = RowParallel(torch.randn(D, 8).bfloat16(), None)
    hooks.attach(within(module), {"o_proj": edit})
    assert module(torch.randn(5, 8).bfloat16())[0].dtype == torch.bfloat16
    assert set(module.state_dict()) == {"weight"} and {name for name, _ in module.named_parameters()} == {"weight"}


def test_a_compiled_model_is_edited(edit: hooks.Edit) -> None:
    """Dynamo takes hooks into its graph, and the edit as an input of it."""
    weight, x = torch.randn(D, 8), torch.randn(5, 8)
    model = nn.Sequential()
    model.o_proj = RowParallel(weight, None, return_bias=False)
    hooks.attach(model, {"o_proj": edit})
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), x @ expected_of(weight, edit).T, atol=1e-5, rtol=1e-5)


# ----- under other names -----


class Mapper:
    """As ``WeightsMapper.apply_list``."""

    def apply_list(self, names: list[str]) -> list[str]:
        return [name.replace("model.language_model.", "language_model.model.") for name in names]


class PPMissingLayer(nn.Identity):
    pass


def nested(path: str, module: nn.Module, root: nn.Module | None = None) -> nn.Module:
    root = at = nn.Module() if root is None else root
    *above, last = path.split(".")
    for part in above:
        if not hasattr(at, part):
            at.add_module(part, nn.Module())
        at = getattr(at, part)
    at.add_module(last, module)
    return root


def linear() -> nn.Module:
    return RowParallel(torch.randn(D, 8), None)


NAME = "model.language_model.layers.0.self_attn.o_proj"


def test_a_writer_is_found_by_vllms_own_table_of_names_or_by_its_end(edit: hooks.Edit) -> None:
    mapped = nested("language_model.model.layers.0.self_attn.o_proj", linear())
    nested("vision_tower.layers.0.self_attn.o_proj", linear(), mapped)
    mapped.hf_to_vllm_mapper = Mapper()
    assert hooks.attach(mapped, {NAME: edit}) == ["language_model.model.layers.0.self_attn.o_proj"]
    only = nested("lm.layers.0.self_attn.o_proj", linear())
    nested("lm.layers.10.self_attn.o_proj", linear(), only)
    assert hooks.attach(only, {NAME: edit}) == ["lm.layers.0.self_attn.o_proj"]


def test_a_block_of_another_pipeline_stage_is_left_to_that(edit: hooks.Edit) -> None:
    model = nested("model.layers.0", PPMissingLayer())
    nested("model.layers.1.self_attn.o_proj", linear(), model)
    edits = {f"model.layers.{i}.self_attn.o_proj": edit for i in range(2)}
    assert hooks.attach(model, edits) == ["model.layers.1.self_attn.o_proj"]


def test_a_writer_that_is_not_there_or_does_not_fit_leaves_the_model_unhooked(edit: hooks.Edit) -> None:
    """Rather no server than one that answers half edited."""
    model = nested("model.layers.0.self_attn.o_proj", linear())
    model.add_module("narrow", RowParallel(torch.randn(4, 8), None))
    model.add_module("norm", nn.LayerNorm(D))
    both = nested("a.layers.0.self_attn.o_proj", linear(), nested("b.layers.0.self_attn.o_proj", linear()))
    for at, name, reason in (
        (model, "model.layers.0.mlp.down_proj", "no module is called so"),
        (model, "narrow", "is 12 wide and narrow writes 4"),
        (model, "norm", "no linear map"),
        (both, NAME, "could be b.layers.0.self_attn.o_proj or a.layers"),
    ):
        with pytest.raises(ValueError, match=reason):
            hooks.attach(at, {"model.layers.0.self_attn.o_proj": edit, name: edit} if at is model else {name: edit})
        assert not any(module._forward_hooks for module in at.modules())
